"""A store that fails for some adapters: what those notice of it who ask for others, over HTTP.

    python -m benchmarks.faults --json

The store is a bucket of moto's S3 server, a process of its own. Requests of one text each come at random and do not
wait for each other: `--rate` (100) a second for eight adapters in memory, three a second for adapters that are asked
for the first time, and twenty a second for three more. In every other slice the store fails for these three, which no
slice before has asked for: it hangs for one, refuses another and serves a corrupted file of the third. In the slices
between, all is the same, but the store does not fail. They take turns, so that a noisy machine disturbs both.

`resident`, `cold`  requests for the others: their latency in slices with the faults and in such without.
`p99_ratio`         of the two.
`faulty`            what becomes of the requests for the three.
`healed_s`          from the end of the last faults until each of the three is served, by the same server.
`failed`, `wrong`   requests for the others without a 200; any answer of 200 that is another adapter's.
"""

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch
import uvloop
from transformers.utils import logging

from benchmarks.faulty import CREDENTIALS, Fault, faulty_s3
from benchmarks.serving import (
    BACKBONE,
    Answered,
    Arrivals,
    Connection,
    Server,
    classify_request,
    make_artifact,
    make_texts,
    percentile_ms,
    print_report,
    say,
    serve,
)
from server.backbone.backbone import Backbone
from server.store.releases import Plan
from server.store.store import AdapterStore

RESIDENT = [f"resident-{index}" for index in range(8)]
FAULTS = {
    "hangs": ("GET hangs-", Fault.HANG),
    "refused": ("GET refused-", Fault.REFUSE),
    "corrupted": ("GET corrupted-.*/adapter.safetensors", Fault.CORRUPT),
}
"""What the names of adapters begin with -> which requests go wrong, and how."""
COLD_RPS = 3
FAULTY_RPS = 20
TEXTS = 64
WARM_UP_SECONDS = 4.0
STORE_SECONDS = 30.0
AT_ONCE = 8
"""Adapters that are put into the bucket at the same time."""
LONGEST_HEALING_SECONDS = 120.0


def _run_bucket(pipe: Pipe) -> None:
    """The process of the store: tells where it is, and fails or heals when it is told to, until it is told None."""
    with faulty_s3() as s3:
        pipe.send((s3.url, s3.bucket()))
        for failing in iter(pipe.recv, None):
            s3.heal()
            for pattern, fault in FAULTS.values() if failing else ():
                s3.fail(pattern, fault)
            pipe.send(failing)


class Bucket:
    """A bucket in another process."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self.endpoint, self.url = pipe.recv()

    def set_failing(self, failing: bool) -> None:
        """From here on it fails for some adapters, or for none."""
        self._pipe.send(failing)
        self._pipe.recv()


@contextmanager
def bucket() -> Iterator[Bucket]:
    """An empty one; it is gone at the end."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_run_bucket, args=(theirs,), daemon=True)
    process.start()
    try:
        yield Bucket(ours)
        ours.send(None)
        process.join(10)
    finally:
        process.kill()


async def publish(bucket: Bucket, names: Sequence[str]) -> None:
    """An adapter of its own under each name, past the server."""
    backbone = Backbone.load(BACKBONE, device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    store = AdapterStore.open(bucket.url, endpoint=bucket.endpoint, timeout_seconds=STORE_SECONDS)
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> None:
        async with turns:
            version = await store.put_version(name, make_artifact(backbone, generator, ["no", "yes"]))
            await store.release(name, Plan.only(version), by="benchmark")

    await asyncio.gather(*map(one, names))


class Load:
    """Requests for all adapters, and the answers by what was asked for and whether the store failed."""

    def __init__(self, server: Server, bucket: Bucket, rate: float, cold: Sequence[str]) -> None:
        self._bucket = bucket
        self._rate = rate
        self._texts = [json.dumps(text).encode() for text in make_texts(TEXTS)]
        self._random = random.Random(1)
        self._unasked = iter(cold)
        self._faulty: Sequence[str] = ()
        self._arrivals = {
            "resident": Arrivals(server.port, self._draw(lambda: self._random.choice(RESIDENT)), seed=2),
            "cold": Arrivals(server.port, self._draw(lambda: next(self._unasked)), seed=3),
            "faulty": Arrivals(server.port, self._draw(lambda: self._random.choice(self._faulty)), seed=4),
        }
        self.answers: dict[tuple[str, bool], list[Answered]] = {
            (kind, failing): [] for kind in self._arrivals for failing in (False, True)
        }
        self.healed_at = math.nan
        """When the last slice ended, by time.perf_counter."""

    def _draw(self, name: Callable[[], str]) -> Callable[[], tuple[str, bytes]]:
        def draw() -> tuple[str, bytes]:
            asked = name()
            return asked, classify_request(asked, self._random.choice(self._texts))

        return draw

    async def warm_up(self) -> None:
        """Brings the first eight into memory."""
        await self._arrivals["resident"].run(WARM_UP_SECONDS, self._rate)

    async def run(self, faulty: Sequence[str], seconds: float, *, failing: bool) -> None:
        """A slice. What hangs at its end is answered once the store has healed."""
        self._faulty = faulty
        self._bucket.set_failing(failing)
        beside = asyncio.create_task(self._arrivals["faulty"].run(seconds, FAULTY_RPS))
        resident, cold = await asyncio.gather(
            self._arrivals["resident"].run(seconds, self._rate), self._arrivals["cold"].run(seconds, COLD_RPS)
        )
        self._bucket.set_failing(False)
        self.healed_at = time.perf_counter()
        for kind, one in (("resident", resident), ("cold", cold), ("faulty", await beside)):
            self.answers[kind, failing] += one.answers

    def close(self) -> None:
        """Ends all connections."""
        for arrivals in self._arrivals.values():
            arrivals.close()


async def healing(port: int, names: Sequence[str], since: float) -> dict[str, float]:
    """Seconds from then until each of the adapters is served; NaN for one that is not."""
    connection = await Connection.open(port)
    healed = dict.fromkeys(FAULTS, math.nan)
    waiting = dict(zip(FAULTS, names, strict=True))
    while waiting and time.perf_counter() - since < LONGEST_HEALING_SECONDS:
        for fault, name in list(waiting.items()):
            if (await connection.ask(name, classify_request(name, b'"a lovely day"'))).status == 200:
                healed[fault] = time.perf_counter() - since
                del waiting[fault]
        await asyncio.sleep(0.1)
    connection.close()
    return healed


async def measure(server: Server, bucket: Bucket, options: argparse.Namespace, cold: Sequence[str]) -> dict[str, Any]:
    """All figures."""
    load = Load(server, bucket, options.rate, cold)
    await load.warm_up()
    for index in range(2 * options.slices):
        await load.run(faulty_names(index), options.seconds / options.slices, failing=index % 2 == 1)
        say(f"slice {index + 1} of {2 * options.slices}")
    healed = await healing(server.port, faulty_names(2 * options.slices - 1), load.healed_at)
    load.close()
    others = [answer for kind in ("resident", "cold") for answer in _of(load, kind)]
    everything = [*others, *_of(load, "faulty")]
    return {
        "resident": _compared(load, "resident"),
        "cold": _compared(load, "cold"),
        "faulty": {
            "p50_ms": percentile_ms(load.answers["faulty", True], 50),
            "longest_ms": percentile_ms(load.answers["faulty", True], 100),
            "statuses": {
                str(status): count
                for status, count in sorted(Counter(one.status for one in load.answers["faulty", True]).items())
            },
        },
        "healed_s": healed,
        "requests": len(everything),
        "failed": sum(one.status != 200 for one in others),
        "wrong": sum(one.status == 200 and json.loads(one.body)["adapter"] != one.key for one in everything),
    }


def faulty_names(index: int) -> list[str]:
    """Those of a slice."""
    return [f"{fault}-{index}" for fault in FAULTS]


def _of(load: Load, kind: str) -> list[Answered]:
    return [*load.answers[kind, False], *load.answers[kind, True]]


def _compared(load: Load, kind: str) -> dict[str, Any]:
    well, failing = load.answers[kind, False], load.answers[kind, True]
    return {
        "requests": len(well) + len(failing),
        "well_p50_ms": percentile_ms(well, 50),
        "failing_p50_ms": percentile_ms(failing, 50),
        "well_p99_ms": percentile_ms(well, 99),
        "failing_p99_ms": percentile_ms(failing, 99),
        "p99_ratio": percentile_ms(failing, 99) / percentile_ms(well, 99),
        "well_longest_ms": percentile_ms(well, 100),
        "failing_longest_ms": percentile_ms(failing, 100),
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--seconds", type=float, default=80.0, help="with the faults; as many without")
    parser.add_argument("--slices", type=int, default=4, help="into which the seconds are cut")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second for adapters in memory")
    options = parser.parse_args()
    logging.disable_progress_bar()
    os.environ.update(CREDENTIALS)
    cold = [f"cold-{index}" for index in range(int(4 * options.seconds * COLD_RPS) + 50)]  # twice what is expected
    named = itertools.chain.from_iterable(faulty_names(index) for index in range(2 * options.slices))
    with tempfile.TemporaryDirectory() as folder, bucket() as store:
        say("filling the store")
        uvloop.run(publish(store, [*RESIDENT, *cold, *named]))
        with serve(store.url, Path(folder, "log"), log_level="warning", store_endpoint=store.endpoint) as server:
            figures = uvloop.run(measure(server, store, options, cold))
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
