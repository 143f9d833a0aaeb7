"""Swapping versions under load: what clients notice of it, over HTTP, on a real server.

    python -m benchmarks.swap --json

32 clients classify one text each on 8 adapters while another client swaps their versions 5 times a second, in four
ways: a release of a stored version, a canary release of two, a roll-back, and a new upload of a checkpoint. Calm slices
and slices with swaps alternate, so that a noisy machine disturbs both.

Every answer is checked: its release was the adapter's last one at some moment of the request (one that was sent after a
swap's answer had arrived may not get the release before), its version is one of that release's, its labels are all
that version's, and its scores are those that the version gave for the text before the load.

Load: clients and server share the machine's processors, and where they are saturated, p99 is the length of the queue
and no more. So the clients pace themselves to `--load` (0.7) of the throughput that the same clients reached without
pauses at the start; `saturated_rps` and `load` say what came of it.

`p99_ratio` compares all slices with swaps with all calm ones; `p99_ratio_of_slices` is the median over pairs of
neighbouring slices, which a single disturbance of the machine does not move.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import uvloop
from transformers.utils import logging

from benchmarks.serving import (
    BACKBONE,
    Answered,
    Clients,
    Connection,
    Server,
    Slice,
    http_request,
    make_artifact,
    make_texts,
    percentile_ms,
    print_report,
    say,
    serve,
    upload_request,
)
from server.backbone.backbone import Backbone
from server.store.artifact import Artifact

ADAPTERS = 8
VERSIONS = 4
TEXTS = 64
LABELS = ("no", "yes")
WAYS = ("release", "canary", "rollback", "upload")
CANARY_SHARE = 0.25
WARM_UP_SECONDS = 3.0
SATURATED_SECONDS = 3.0
TOLERANCE = 0.05
"""Of a score: in bfloat16 it depends a little on which other texts are in the batch."""


@dataclass(slots=True)
class Version:
    """A version that the benchmark made."""

    digest: str
    labels: frozenset[str]
    upload: bytes
    """The request that uploads and releases it."""
    scores: list[dict[str, float]]
    """For each text, what it gives."""


@dataclass(frozen=True, slots=True)
class Released:
    """A release, made at some moment between two."""

    number: int
    traffic: dict[str, float]
    asked: float
    answered: float
    is_rollback: bool = False


class Swaps:
    """A client that swaps versions, one after the other, and what it knows of them."""

    def __init__(self, port: int, adapters: dict[str, list[Version]], log: dict[str, list[Released]]) -> None:
        """`log`: the releases so far of each adapter."""
        self._port = port
        self._adapters = adapters
        self.log = log
        self.failures: list[str] = []
        self.made: list[tuple[str, float]] = []
        """Way and seconds of each swap."""
        self._random = random.Random(1)

    async def run(self, seconds: float, per_second: float) -> None:
        """Swaps on a schedule; one that is late goes at once."""
        connection = await Connection.open(self._port)
        started = time.perf_counter()
        for index in range(int(seconds * per_second)):
            await asyncio.sleep(max(0.0, started + index / per_second - time.perf_counter()))
            await self._swap(connection)
        connection.close()

    async def _swap(self, connection: Connection) -> None:
        name = self._random.choice(list(self._adapters))
        current = self.log[name][-1]
        way = self._random.choice(WAYS)
        if way == "rollback" and (len(self.log[name]) < 2 or current.is_rollback):
            way = "release"  # a second roll-back in a row would go further back, perhaps beyond the first release
        expected, request = self._plan(name, current, way)
        answer = await connection.ask(way, request)
        self.made.append((way, answer.seconds))
        if answer.status not in (200, 201):
            self.failures.append(f"{way} of {name}: {answer.status} {answer.body[:300]!r}")
            return
        body = json.loads(answer.body)
        traffic = {body["version"]: 1.0} if way == "upload" else body["traffic"]
        if body["release"] != current.number + 1 or traffic != expected:
            self.failures.append(f"{way} of {name}: release {body['release']} after {current.number} is {traffic}")
        self.log[name].append(Released(body["release"], traffic, answer.sent, answer.received, way == "rollback"))

    def _plan(self, name: str, current: Released, way: str) -> tuple[dict[str, float], bytes]:
        """What is to serve, always something else than now, and the request for it."""
        path = f"/admin/adapters/{name}"
        if way == "rollback":
            return self.log[name][-2].traffic, http_request("POST", f"{path}/rollback")
        others = [version for version in self._adapters[name] if version.digest not in current.traffic]
        first, second = self._random.sample(others, 2)
        if way == "upload":
            return {first.digest: 1.0}, first.upload
        traffic = {first.digest: 1.0}
        if way == "canary":
            traffic = {first.digest: 1 - CANARY_SHARE, second.digest: CANARY_SHARE}
        return traffic, http_request("POST", f"{path}/releases", json.dumps({"traffic": traffic}).encode())


class Checker:
    """Tells right answers from wrong ones."""

    def __init__(self, adapters: dict[str, list[Version]], log: dict[str, list[Released]]) -> None:
        """`log`: all releases of each adapter, the later ones too."""
        self._versions = {name: {one.digest: one for one in versions} for name, versions in adapters.items()}
        self._spans = {
            name: {
                before.number: (before, after.answered)
                for before, after in pairwise([*releases, Released(0, {}, 0.0, float("inf"))])
            }
            for name, releases in log.items()
        }

    def wrong(self, answer: Answered) -> str | None:
        """What is wrong with an answer that came with status 200."""
        name, text = answer.key
        body = json.loads(answer.body)
        if body["adapter"] != name or body["release"] not in self._spans[name]:
            return f"{name}: the answer is of {body['adapter']}, release {body['release']}"
        release, over = self._spans[name][body["release"]]
        if answer.received < release.asked or answer.sent > over:
            return f"{name}: release {release.number} did not serve during the request"
        if body["version"] not in release.traffic:
            return f"{name}: version {body['version']} is not in release {release.number}"
        version = self._versions[name][body["version"]]
        (prediction,) = body["predictions"]
        scores = {one["label"]: one["score"] for one in prediction}
        if scores.keys() != version.labels:
            return f"{name}: the labels {list(scores)} are not those of version {version.digest}"
        off = max(abs(score - version.scores[text][label]) for label, score in scores.items())
        return f"{name}: a score is off by {off:.3f}" if off > TOLERANCE else None


async def set_up(
    connection: Connection, artifacts: dict[str, list[Artifact]], texts: list[str]
) -> tuple[dict[str, list[Version]], dict[str, list[Released]]]:
    """Uploads all versions, the first of each adapter last, and asks each for the scores of every text."""
    adapters: dict[str, list[Version]] = {}
    log: dict[str, list[Released]] = {}
    for name, made in artifacts.items():
        adapters[name], log[name] = [], []
        for artifact in reversed(made):
            upload = upload_request(name, artifact)
            answer = await connection.ask(None, upload)
            assert answer.status == 201, answer.body
            body = json.loads(answer.body)
            log[name].append(Released(body["release"], {artifact.version: 1.0}, answer.sent, answer.received))
            question = {"adapter": name, "version": artifact.version, "inputs": texts}
            answer = await connection.ask(None, http_request("POST", "/classify", json.dumps(question).encode()))
            assert answer.status == 200, answer.body
            scores = [{one["label"]: one["score"] for one in text} for text in json.loads(answer.body)["predictions"]]
            adapters[name].append(Version(artifact.version, frozenset(artifact.manifest.labels), upload, scores))
    return adapters, log


def make_artifacts() -> dict[str, list[Artifact]]:
    """Versions whose labels give them away."""
    backbone = Backbone.load(BACKBONE, device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    return {
        f"a{index}": [
            make_artifact(backbone, generator, [f"a{index}-v{number}-{label}" for label in LABELS])
            for number in range(VERSIONS)
        ]
        for index in range(ADAPTERS)
    }


async def measure(server: Server, artifacts: dict[str, list[Artifact]], options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    texts = make_texts(TEXTS)
    say(f"uploading {VERSIONS} versions of {ADAPTERS} adapters")
    connection = await Connection.open(server.port)
    adapters, log = await set_up(connection, artifacts, texts)
    connection.close()
    swaps = Swaps(server.port, adapters, log)

    requests = [
        ((name, index), http_request("POST", "/classify", json.dumps({"adapter": name, "inputs": text}).encode()))
        for name in adapters
        for index, text in enumerate(texts)
    ]
    chooser = random.Random(2)
    clients = Clients(server.port, options.clients, lambda: chooser.choice(requests))
    warm_up = await clients.run(WARM_UP_SECONDS)
    saturated = await clients.run(SATURATED_SECONDS)
    rate = options.load * saturated.throughput if options.load else None
    say(f"{saturated.throughput:.0f} requests/s saturated")
    seconds = options.seconds / options.slices
    calm: list[Slice] = []
    swapped: list[Slice] = []
    used, own, began = server.cpu_seconds(), time.process_time(), time.perf_counter()
    for index in range(options.slices):
        calm.append(await clients.run(seconds, rate))
        during, _ = await asyncio.gather(clients.run(seconds, rate), swaps.run(seconds, options.swaps_per_second))
        swapped.append(during)
        say(f"slice {index + 1} of {options.slices}: {_line(calm[-1])} calm, {_line(during)} with swaps")
    wall = time.perf_counter() - began
    used, own = server.cpu_seconds() - used, time.process_time() - own

    measured = [*calm, *swapped]
    answers = [answer for one in (warm_up, saturated, *measured) for answer in one.answers]
    failed = [answer for answer in answers if answer.status != 200]
    checker = Checker(adapters, swaps.log)
    wrong = [words for answer in answers if answer.status == 200 and (words := checker.wrong(answer))]
    for words in (*[f"{one.key}: {one.status} {one.body[:300]!r}" for one in failed[:3]], *wrong[:3]):
        say(words)
    for words in swaps.failures[:3]:
        say(words)
    calm_p50, calm_p99 = _percentiles(calm)
    swap_p50, swap_p99 = _percentiles(swapped)
    return {
        "clients": options.clients,
        "requests": len(answers),
        "failed": len(failed),
        "wrong": len(wrong),
        "swaps": len(swaps.made),
        "swaps_per_second": len(swaps.made) / options.seconds,
        "swap_failures": len(swaps.failures),
        "calm_p50_ms": calm_p50,
        "calm_p99_ms": calm_p99,
        "swap_p50_ms": swap_p50,
        "swap_p99_ms": swap_p99,
        "p50_ratio": swap_p50 / calm_p50,
        "p99_ratio": swap_p99 / calm_p99,
        "p99_ratio_of_slices": statistics.median(
            percentile_ms(during.answers, 99) / percentile_ms(before.answers, 99)
            for before, during in zip(calm, swapped, strict=True)
        ),
        "calm_rps": _throughput(calm),
        "swap_rps": _throughput(swapped),
        "saturated_rps": saturated.throughput,
        "load": _throughput(calm) / saturated.throughput,
        "server_cores_used": used / wall,
        "client_cores_used": own / wall,
        "ways": _ways(swaps.made),
    }


def _line(one: Slice) -> str:
    return f"{one.throughput:.0f}/s p99 {percentile_ms(one.answers, 99):.1f} ms"


def _percentiles(slices: Sequence[Slice]) -> tuple[float, float]:
    """p50 and p99 in milliseconds, of all slices' answers together."""
    answers = [answer for one in slices for answer in one.answers]
    return percentile_ms(answers, 50), percentile_ms(answers, 99)


def _throughput(slices: Sequence[Slice]) -> float:
    return sum(len(one.answers) for one in slices) / sum(one.seconds for one in slices)


def _ways(made: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """How many swaps of each way, and how long the median one took."""
    counts = Counter(way for way, _ in made)
    return {
        way: {"count": count, "median_ms": sorted(took for one, took in made if one == way)[count // 2] * 1000}
        for way, count in sorted(counts.items())
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load with swaps; as much again without")
    parser.add_argument("--slices", type=int, default=6, help="into which the seconds are cut")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--swaps-per-second", type=float, default=5.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the saturated throughput; 0: no pauses")
    options = parser.parse_args()
    logging.disable_progress_bar()
    artifacts = make_artifacts()
    with tempfile.TemporaryDirectory() as folder:
        say("starting the server")
        with serve(Path(folder, "store"), Path(folder, "log")) as server:
            figures = uvloop.run(measure(server, artifacts, options))
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
