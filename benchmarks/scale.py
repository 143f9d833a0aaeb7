"""Ten thousand adapters behind one server, of which a tenth fits in its memory: what that costs.

    python -m benchmarks.scale --json

A store of `--adapters` different LoRA classifiers is made first, each proven on the backbone and written with its
report, as an upload would be; `--store` keeps it for the next time. The server's memory for adapters is set to hold a
tenth of them. Requests have one text each and ask for adapters by Zipf's law, the k-th most popular one 1/k as often
as the first. Store and server are on one machine, so files come from the operating system's cache.

`scale_ratio`           32 clients without pauses: throughput of requests by Zipf's law over that of requests for one
                        adapter, of the same texts in the same order, in slices that take turns on one server whose
                        memory is full; medians.
`peak_rss_growth_ratio` the server's largest resident memory during all requests by Zipf's law, less its largest with a
                        few adapters (without these) in the minute before, over its memory for adapters. Means something
                        only where that memory is much larger than the noise: with thousands of adapters.
`startup_ratio`         time from the start of the process to the first 200 of /readyz, with all adapters in the store
                        over with ten; the starts take turns; medians.
`cold_p50_ms`, `..p99`  latency of requests for adapters that nobody had asked this server for before, so that they had
                        to be read from the store: those among the requests of a slice by Zipf's law at `--load` (0.7)
                        of the saturated throughput. `warm_..` is of the ten most popular adapters in the same slice.
`hit_rate`              requests that needed no load, in the saturated slices by Zipf's law.

Every answer is checked: its adapter, that adapter's version, that version's labels.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from transformers.utils import logging

from benchmarks.serving import (
    BACKBONE,
    Answered,
    Clients,
    Server,
    Slice,
    classify_request,
    make_artifact,
    make_texts,
    percentile_ms,
    print_report,
    say,
    serve,
)
from server.backbone.backbone import Backbone
from server.engine.loading import Checker
from server.engine.pipeline import Pipeline
from server.engine.proof import Prover
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.worker import Worker
from server.metrics import Metrics
from server.store.releases import Plan
from server.store.store import AdapterStore

FEW = 10
"""Adapters of the small store whose start is compared."""
WARM = 10
"""Adapters that are surely in memory: the most popular ones."""
TEXTS = 256
LABELS = ("first", "second", "third")
AT_ONCE = 64
"""Adapters that are proven together; the worker makes batches of them."""
WARM_ADAPTERS = 32
WARM_UP_SECONDS = 10.0
"""With one adapter. A product of a size that has not been before costs torch memory that it keeps (on a CPU, in
bfloat16, most of a megabyte), whatever adapters are in it."""
FEW_SECONDS = 60.0
"""With a few: as long as with many, for memory goes up and down by tens of megabytes, and the two are compared.
`warm_growth_mb`, what the second half added to the largest, says how far that had settled."""
SATURATED_SECONDS = 3.0
FILL_SECONDS = 120.0


def name_of(index: int) -> str:
    """An adapter's name."""
    return f"adapter-{index:05}"


def labels_of(name: str) -> list[str]:
    """Labels that no other adapter has."""
    return [f"{name}-{label}" for label in LABELS]


# ---------------------------------------------------------------------------------------------------------- the store


@contextmanager
def proving(backbone: Backbone) -> Iterator[Prover]:
    """What proves uploads in the server: the same pipeline, without HTTP."""
    scheduler = Scheduler[Any](max_batch_tokens=4096, max_queue_tokens=1 << 20, clock=time.monotonic)
    metrics = Metrics()
    worker = Worker(Runner(backbone), scheduler, metrics)
    worker.start()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield Prover(backbone, Pipeline(backbone.tokenizer, worker, pool, metrics))
        finally:
            worker.stop()


async def make_store(folder: Path, adapters: int) -> dict[str, str]:
    """Adds what is missing of so many adapters. Their names and versions."""
    store = AdapterStore.open(str(folder), timeout_seconds=60)
    there = set(await store.names())
    wanted = [name_of(index) for index in range(adapters)]
    if missing := [name for name in wanted if name not in there]:
        backbone = Backbone.load(BACKBONE, device="auto", dtype="auto")
        started = time.perf_counter()
        with proving(backbone) as prover:
            for start in range(0, len(missing), AT_ONCE):
                some = missing[start : start + AT_ONCE]
                await asyncio.gather(*(_publish(store, backbone, prover, name) for name in some))
                if start // AT_ONCE % 20 == 0:
                    say(f"{start} of {len(missing)} adapters made in {time.perf_counter() - started:.0f} s")
    versions: dict[str, str] = {}
    for start in range(0, adapters, AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        for name, release in zip(some, await asyncio.gather(*map(store.current, some)), strict=True):
            assert release is not None
            (versions[name],) = release.traffic
    return versions


async def _publish(store: AdapterStore, backbone: Backbone, prover: Prover, name: str) -> None:
    """What an upload does, from the check on."""
    generator = torch.Generator().manual_seed(int(name.rpartition("-")[2]))
    artifact = make_artifact(backbone, generator, labels_of(name))
    checker = Checker(backbone)
    checked = checker.check(artifact)
    adapter = checker.bind(checked)
    parameters = sum(tensor.numel() for tensor in checked.tensors.values())
    report = await prover.report(artifact.manifest, len(checked.tensors), parameters, adapter)
    version = await store.put_version(name, artifact, report)
    await store.release(name, Plan.only(version), by="benchmark")


async def memory_of_one(folder: Path, versions: dict[str, str]) -> int:
    """Bytes that an adapter takes in the server's memory, as its report says."""
    name, version = next(iter(versions.items()))
    report = (await AdapterStore.open(str(folder)).get_version(name, version)).report
    assert report is not None
    return report.memory_bytes


# --------------------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True, slots=True)
class Traffic:
    """A source of requests: which adapter each is for, and of what text."""

    adapters: Iterator[str]
    texts: Iterator[bytes]

    def draw(self) -> tuple[str, bytes]:
        """The next one; it is known by its adapter."""
        name = next(self.adapters)
        return name, classify_request(name, next(self.texts))


def zipf(names: list[str], seed: int) -> Iterator[str]:
    """Names without end, the k-th of the list 1/k as often as the first."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(names) + 1)
    shares /= shares.sum()
    while True:
        for index in generator.choice(len(names), 10_000, p=shares):
            yield names[index]


class Answers:
    """Counts answers that failed and answers that are wrong, and says which the first were."""

    def __init__(self, versions: dict[str, str], adapter_of: Callable[[Any], str] = str) -> None:
        """`adapter_of` tells the adapter from what a request is known by."""
        self._versions = versions
        self._adapter_of = adapter_of
        self.requests = self.failed = self.wrong = 0

    def check(self, answers: list[Answered]) -> None:
        """All of a slice."""
        for answer in answers:
            self.requests += 1
            if answer.status != 200:
                self.failed += 1
                self._tell(answer, self.failed)
            elif not self._is_right(answer):
                self.wrong += 1
                self._tell(answer, self.wrong)

    def _is_right(self, answer: Answered) -> bool:
        body = json.loads(answer.body)
        name = self._adapter_of(answer.key)
        labels = {one["label"] for prediction in body["predictions"] for one in prediction}
        return bool(
            (body["adapter"], body["version"]) == (name, self._versions[name])
            and len(body["predictions"]) == 1
            and labels == set(labels_of(name))
        )

    def _tell(self, answer: Answered, count: int) -> None:
        if count <= 3:
            say(f"{answer.key}: {answer.status} {answer.body[:300]!r}")


async def load(server: Server, versions: dict[str, str], budget: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the server under load."""
    names = list(versions)
    random.Random(3).shuffle(names)  # so that popularity has nothing to do with the order in the store
    texts = [json.dumps(text).encode() for text in make_texts(TEXTS, median=options.median_tokens)]
    checker = Answers(versions)
    one = Traffic(cycle(names[:1]), cycle(texts))
    many = Traffic(zipf(names, seed=4), cycle(texts))

    async def run(traffic: Traffic, seconds: float, rate: float | None = None) -> Slice:
        done = await Clients(server.port, options.clients, traffic.draw).run(seconds, rate)
        checker.check(done.answers)
        return done

    await run(one, WARM_UP_SECONDS)
    server.forget_peak()
    few = Traffic(cycle(names[:WARM_ADAPTERS]), cycle(texts))
    await run(few, FEW_SECONDS / 2)
    half_warm_rss = server.memory("VmHWM")
    await run(few, FEW_SECONDS / 2)
    few_rss = server.memory("VmHWM")
    warm_rss = few_rss - int(_count(server, "adapterd_adapter_bytes"))
    server.forget_peak()

    asked: set[str] = set()
    filling = time.perf_counter()
    while not _count(server, "adapterd_evictions_total"):  # until the memory is full
        asked |= {answer.key for answer in (await run(many, SATURATED_SECONDS)).answers}
        if time.perf_counter() - filling > FILL_SECONDS:
            raise RuntimeError("the server's memory does not fill up")
    saturated = await run(many, SATURATED_SECONDS)
    asked |= {answer.key for answer in saturated.answers}
    say(f"memory is full after {time.perf_counter() - filling:.0f} s; {saturated.throughput:.0f} requests/s saturated")
    paced = await run(many, options.seconds / 2, options.load * saturated.throughput)
    cold = _first_asked(paced.answers, asked)
    warm = [answer for answer in paced.answers if answer.key in names[:WARM]]

    seconds = options.seconds / options.slices
    slices: dict[str, list[Slice]] = {"one": [], "many": []}
    loads = evictions = 0.0
    used, began = server.cpu_seconds(), time.perf_counter()
    for index in range(options.slices):
        slices["one"].append(await run(one, seconds))
        before = server.counts()
        slices["many"].append(await run(many, seconds))
        after = server.counts()
        loads += _gained(before, after, "adapterd_adapter_loads_total")
        evictions += _gained(before, after, "adapterd_evictions_total")
        rates = {kind: f"{done[-1].throughput:.0f}/s" for kind, done in slices.items()}
        say(f"slice {index + 1} of {options.slices}: one adapter {rates['one']}, by Zipf's law {rates['many']}")
    used, wall = server.cpu_seconds() - used, time.perf_counter() - began
    busy = [answer for done in slices["many"] for answer in done.answers]
    one_rps, zipf_rps = (statistics.median(done.throughput for done in slices[kind]) for kind in ("one", "many"))
    peak = server.memory("VmHWM")
    return {
        "scale_ratio": zipf_rps / one_rps,
        "peak_rss_growth_ratio": (peak - warm_rss) / budget,
        "cold_p50_ms": percentile_ms(cold, 50),
        "cold_p99_ms": percentile_ms(cold, 99),
        "warm_p50_ms": percentile_ms(warm, 50),
        "warm_p99_ms": percentile_ms(warm, 99),
        "cold_requests": len(cold),
        "paced_load": paced.throughput / saturated.throughput,
        "hit_rate": 1 - loads / len(busy),
        "loads": loads,
        "evictions": evictions,
        "one_rps": one_rps,
        "zipf_rps": zipf_rps,
        "one_p50_ms": percentile_ms([answer for done in slices["one"] for answer in done.answers], 50),
        "zipf_p50_ms": percentile_ms(busy, 50),
        "zipf_p99_ms": percentile_ms(busy, 99),
        "server_cores_used": used / wall,
        "budget_mb": budget / 1e6,
        "warm_rss_mb": warm_rss / 1e6,
        "warm_growth_mb": (few_rss - half_warm_rss) / 1e6,
        "peak_rss_mb": peak / 1e6,
        "resident": _count(server, "adapterd_adapters_resident"),
        "requests": checker.requests,
        "failed": checker.failed,
        "wrong": checker.wrong,
    }


def _first_asked(answers: list[Answered], asked: set[str]) -> list[Answered]:
    """The answers to the first request of each adapter that nobody had asked for before."""
    first: list[Answered] = []
    for answer in sorted(answers, key=lambda answer: answer.sent):
        if answer.key not in asked:
            asked.add(answer.key)
            first.append(answer)
    return first


def _count(server: Server, name: str) -> float:
    return sum(value for key, value in server.counts().items() if key.startswith(name))


def _gained(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(name))


def start_up(stores: dict[str, Path], log: Path, starts: int) -> dict[str, float]:
    """Seconds to ready, the median for each store."""
    seconds: dict[str, list[float]] = {kind: [] for kind in stores}
    for turn in range(starts + 1):
        for kind, store in stores.items():
            with serve(store, log) as server:
                if turn:  # the first fills the operating system's cache
                    seconds[kind].append(server.ready_seconds)
        say(f"start {turn} of {starts}")
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def measure(folder: Path, store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    versions = asyncio.run(make_store(store, options.adapters))
    one = asyncio.run(memory_of_one(store, versions))
    resident = options.resident or max(1, options.adapters // 10)
    budget = resident * one
    few = folder / "few"
    for name in list(versions)[:FEW]:
        shutil.copytree(store / name, few / name)
    log = folder / "log"
    say(f"{options.adapters} adapters of {one} bytes, memory for {resident}")
    ready = start_up({"all": store, "few": few}, log, options.starts)
    with serve(store, log, host_memory_bytes=budget) as server:
        figures = uvloop.run(load(server, versions, budget, options))
    return {
        "adapters": options.adapters,
        "clients": options.clients,
        "median_tokens": options.median_tokens,
        "bytes_of_one": one,
        **figures,
        "startup_ratio": ready["all"] / ready["few"],
        "startup_all_s": ready["all"],
        "startup_few_s": ready["few"],
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--resident", type=int, help="adapters that fit in the server's memory; a tenth by default")
    parser.add_argument("--store", type=Path, help="folder of the adapters; those it has are used")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of saturated load by Zipf's law")
    parser.add_argument("--slices", type=int, default=20, help="into which the seconds are cut")
    parser.add_argument("--median-tokens", type=float, default=15.0, help="of the texts, which have at most 128")
    parser.add_argument("--load", type=float, default=0.7, help="share of the saturated throughput, for cold latency")
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = measure(folder, options.store or folder / "all", options)
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
