"""Three servers on one bucket behind a proxy: an adapter's requests to one of them, or to each in turn; one is killed.

    python -m benchmarks.replicas --json

A store of `--adapters` (200) classifiers in a bucket of moto's S3 server, three server processes whose memory holds
`--resident` (60) each, and Caddy with deploy/proxy/Caddyfile in front. Requests have one text each and ask for adapters
by Zipf's law. They come at random, `--rate` in a second, by default `--load` of what the servers answer when they are
saturated and take turns. Slices of the two ways take turns; before each measured slice one that is not measured brings
the memories to what the way makes of them. Releases are read again every `--poll-seconds` only: moto answers some
hundred requests a second, and would be what is measured.

`hash`         requests have the header X-Adapter, by which the proxy picks the server: rendezvous hashing.
`round_robin`  they have not, and the servers take turns.

`hit_rate`     requests whose adapter was in memory, of all, as the servers count. `p50_ms`, `p99_ms`: of all requests.
`loads`        adapters read from the bucket.

Then, with the header, one server gets SIGKILL under load, `--kills` times, and is started again each time:

`failed`       requests without an answer of 200.
`under_way`    requests that, by the proxy's log, were at the server that was killed when it was.
`failed_elsewhere`  those that failed and were not among these.
`moved`        requests for adapters of the killed server that came when it was gone, and were answered by others.

`times`        what benchmarks.simulate computes with, measured on these servers; `owners`, each adapter's server.

Every answer is checked: its adapter, that adapter's version, that version's labels. Nothing is asked twice; the proxy
asks another server only where it could not connect to the first.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import httpx
import uvloop
from transformers.utils import logging

from benchmarks import service_times
from benchmarks.proxy import Proxy, proxy, routed_request
from benchmarks.scale import Answers, make_store, memory_of_one, zipf
from benchmarks.serving import (
    HOST,
    Answered,
    Arrivals,
    Clients,
    Server,
    Slice,
    answers_ok,
    free_port,
    make_texts,
    percentile_ms,
    print_report,
    say,
)

SERVERS = 3
TEXTS = 256
BUCKET = "adapters"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
START_SECONDS = 30
WARM_UP_SECONDS = 5.0
KILL_SECONDS = 4.0
"""Of load around a kill, which comes in the middle."""
CHECK_SECONDS = 3.0
"""After which the proxy has noticed that a server is back."""


class Asked(NamedTuple):
    """What a request is known by."""

    adapter: str
    number: int
    """Its X-Request-ID."""


@contextmanager
def bucket(folder: Path, log: Path) -> Iterator[str]:
    """A copy of a folder's store in the bucket of moto's S3, which is a process of its own. Yields its endpoint."""
    port = free_port()
    endpoint = f"http://{HOST}:{port}"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "--host", HOST, "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        until = time.perf_counter() + START_SECONDS
        while not answers_ok(f"{endpoint}/moto-api/"):
            if process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"the bucket did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        with httpx.Client(base_url=endpoint) as client:
            client.put(f"/{BUCKET}").raise_for_status()
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                client.put(f"/{BUCKET}/{path.relative_to(folder)}", content=path.read_bytes()).raise_for_status()
        yield endpoint
    finally:
        process.kill()
        process.wait()


class Replicas:
    """The servers behind their proxy, and those who ask them."""

    def __init__(
        self, servers: list[Server], front: Proxy, versions: dict[str, str], options: argparse.Namespace
    ) -> None:
        self.servers = servers
        self.checker = Answers(versions, lambda asked: asked.adapter)
        self._front = front
        self._options = options
        self._adapters = list(versions)
        self._names = zipf(self._adapters, seed=4)
        self._named: list[Asked] = []
        self._texts = cycle([json.dumps(text).encode() for text in make_texts(TEXTS)])
        self._numbers = count()

    def drawing(self, named: bool) -> Callable[[], tuple[Asked, bytes]]:
        """Draws requests by Zipf's law, with the header that the proxy routes by or without."""

        def draw() -> tuple[Asked, bytes]:
            asked = Asked(next(self._names), next(self._numbers))
            if named:
                self._named.append(asked)
            return asked, routed_request(asked.adapter, next(self._texts), asked.number, named=named)

        return draw

    async def saturated(self, seconds: float) -> Slice:
        """As much as they answer to clients without pauses, taking turns."""
        clients = Clients(self._front.port, self._options.clients, self.drawing(named=False))
        done = await clients.run(seconds)
        self.checker.check(done.answers)
        return done

    async def arriving(self, named: bool, seconds: float, rate: float) -> Slice:
        """Requests that come at random."""
        arrivals = Arrivals(self._front.port, self.drawing(named))
        done = await arrivals.run(seconds, rate)
        arrivals.close()
        self.checker.check(done.answers)
        return done

    def lookups(self) -> tuple[float, float]:
        """(hits, misses) of all servers since their start."""
        counts = [server.counts() for server in self.servers]
        hits, misses = (
            sum(one.get(f"adapterd_adapter_lookups_total/{result}", 0) for one in counts) for result in ("hit", "miss")
        )
        return hits, misses

    async def times(self, rate: float, seconds: float) -> dict[str, Any]:
        """Their service times, as they are with all on one machine."""

        def draw(adapter: str) -> tuple[Asked, bytes]:
            asked = Asked(adapter, next(self._numbers))
            return asked, routed_request(adapter, next(self._texts), asked.number, named=False)

        resident = self._options.resident
        return await service_times.measure(
            self.servers, self._front.port, self._adapters, resident, rate, seconds, draw, self.checker.check
        )

    def owners(self) -> list[int]:
        """Of each adapter, the most popular one first: the server that its requests go to by their header; -1 where
        none has been sent."""
        addresses = {server.address: number for number, server in enumerate(self.servers)}
        upstreams = self._front.upstreams()
        owners = {one.adapter: addresses.get(upstreams[one.number], -1) for one in self._named}
        return [owners.get(name, -1) for name in self._adapters]

    async def killing(self, number: int) -> tuple[list[Answered], float, float]:
        """Load without pauses, in the middle of which a server is killed: what came of it, and when that began and was
        done."""
        clients = Clients(self._front.port, self._options.clients, self.drawing(named=True))
        under_load = asyncio.create_task(clients.run(KILL_SECONDS))
        await asyncio.sleep(KILL_SECONDS / 2)
        begun = time.perf_counter()
        await asyncio.to_thread(self.servers[number].kill)
        gone = time.perf_counter()
        return (await under_load).answers, begun, gone


@dataclass
class Way:
    """The slices of one way of routing."""

    named: bool
    answers: list[Answered] = field(default_factory=list)
    hits: float = 0
    misses: float = 0

    def figures(self) -> dict[str, float]:
        """Of all slices."""
        return {
            "hit_rate": self.hits / (self.hits + self.misses),
            "loads": self.misses,
            "p50_ms": percentile_ms(self.answers, 50),
            "p99_ms": percentile_ms(self.answers, 99),
            "mean_ms": statistics.fmean(answer.seconds for answer in self.answers) * 1000,
            "requests": len(self.answers),
        }


async def compare(replicas: Replicas, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """The two ways, in turns."""
    ways = {"hash": Way(named=True), "round_robin": Way(named=False)}
    for turn in range(options.slices):
        for name, way in ways.items():
            await replicas.arriving(way.named, options.settling_seconds, rate)
            hits, misses = replicas.lookups()
            done = await replicas.arriving(way.named, options.seconds / options.slices, rate)
            after = replicas.lookups()
            way.hits += after[0] - hits
            way.misses += after[1] - misses
            way.answers += done.answers
            say(f"slice {turn + 1} of {options.slices}, {name}: p99 {percentile_ms(done.answers, 99):.0f} ms")
    return {name: way.figures() for name, way in ways.items()}


async def kill(replicas: Replicas, front: Proxy, start: Callable[[int], Server], kills: int) -> dict[str, int]:
    """What killing servers costs."""
    answered = under_way = failed = elsewhere = moved = 0
    for turn in range(kills):
        number = turn % SERVERS
        victim = replicas.servers[number].address
        answers, begun, gone = await replicas.killing(number)
        upstream = front.upstreams()
        there = {
            one.key
            for one in answers
            if upstream[one.key.number] == victim and one.sent <= gone and one.received >= begun
        }
        failures = {one.key for one in answers if one.status != 200}
        owned = {one.key.adapter for one in answers if one.sent < begun and upstream[one.key.number] == victim}
        answered += len(answers) - len(failures)
        under_way += len(there)
        failed += len(failures)
        elsewhere += len(failures - there)
        moved += sum(one.status == 200 and one.sent > gone and one.key.adapter in owned for one in answers)
        replicas.checker.check([one for one in answers if one.status == 200])
        say(f"kill {turn + 1} of {kills}: {len(there)} under way, {len(failures)} failed")
        for one in answers:
            if one.key in failures - there:
                late = (one.sent - gone) * 1000
                say(f"failed elsewhere: {one.status} from {upstream[one.key.number]}, sent {late:.1f} ms after the end")
        replicas.servers[number] = start(replicas.servers[number].port)
        await asyncio.to_thread(replicas.servers[number].wait_ready)
        await asyncio.sleep(CHECK_SECONDS)
    return {
        "kills": kills,
        "answered": answered,
        "under_way": under_way,
        "failed": failed,
        "failed_elsewhere": elsewhere,
        "moved": moved,
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    store = folder / "store"
    versions = asyncio.run(make_store(store, options.adapters))
    one = asyncio.run(memory_of_one(store, versions))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, CREDENTIALS))
        endpoint = stack.enter_context(bucket(store, folder / "bucket"))
        servers: list[Server] = []
        stack.callback(_kill_all, servers)

        def start(port: int) -> Server:
            return Server(
                f"s3://{BUCKET}",
                folder / "log",
                port=port,
                log_level="warning",
                store_endpoint=endpoint,
                store_poll_seconds=options.poll_seconds,
                host_memory_bytes=options.resident * one,
            )

        servers += [start(free_port()) for _ in range(SERVERS)]
        for server in servers:
            server.wait_ready()
        addresses = " ".join(server.address for server in servers)
        front = stack.enter_context(proxy("Caddyfile", folder / "proxy", ADAPTERD_SERVERS=addresses))
        replicas = Replicas(servers, front, versions, options)
        figures = uvloop.run(load(replicas, front, start, options))
    return {
        "servers": SERVERS,
        "adapters": options.adapters,
        "resident": options.resident,
        "bytes_of_one": one,
        **figures,
        "requests": replicas.checker.requests,
        "failed": replicas.checker.failed,
        "wrong": replicas.checker.wrong,
    }


def _kill_all(servers: list[Server]) -> None:
    for server in servers:
        server.kill()


async def load(
    replicas: Replicas, front: Proxy, start: Callable[[int], Server], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of the servers under load."""
    await replicas.saturated(WARM_UP_SECONDS)
    saturated = (await replicas.saturated(WARM_UP_SECONDS)).throughput
    rate = options.rate or options.load * saturated
    say(f"{saturated:.0f} requests/s saturated, {rate:.0f}/s from here on")
    ways = await compare(replicas, options, rate)
    times = await replicas.times(rate, options.times_seconds)
    owners = replicas.owners()
    killed = await kill(replicas, front, start, options.kills)
    return {"saturated_rps": saturated, "rate": rate, **ways, "kill": killed, "times": times, "owners": owners}


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--resident", type=int, default=60, help="adapters that fit in each server's memory")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=24.0, help="of each way, measured")
    parser.add_argument("--settling-seconds", type=float, default=12.0, help="of each way, before each slice")
    parser.add_argument("--slices", type=int, default=2, help="into which the seconds are cut")
    parser.add_argument("--load", type=float, default=0.4, help="share of the saturated throughput")
    parser.add_argument("--rate", type=float, help="requests a second, instead of --load")
    parser.add_argument("--times-seconds", type=float, default=8.0, help="for benchmarks.simulate --validate")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--poll-seconds", type=float, default=60.0, help="ADAPTERD_STORE_POLL_SECONDS")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), options)
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
