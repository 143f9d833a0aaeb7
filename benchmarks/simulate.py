"""How many replicas, and how to route: a simulation with measured service times, from one replica to a thousand.

    python -m benchmarks.simulate --json                            # measures a server first, then simulates
    python -m benchmarks.simulate --json --measure times.json       # only measures
    python -m benchmarks.simulate --json --times times.json         # only simulates
    python -m benchmarks.simulate --json --validate replicas.json   # what benchmarks.replicas has measured

The service times are those of benchmarks.service_times. Requests come at random (Poisson), have one text each with as
many tokens as benchmarks.serving makes, and ask for adapters by Zipf's law. A replica has memory for `--resident`
adapters, of which the least recently used leaves; loads run beside batches, as many at once as was measured, and
requests for an adapter that is on its way share its load. A free device takes what waits, oldest first, up to the token
budget: the server's order without the turns that adapters take, which are of little effect where little waits. Memories
begin as they are in the long run: which adapters are in one, if each is asked for at its own rate, depends on when each
was asked for last, and that is drawn.

`random`      any replica.
`two`         the one with fewer requests under way, of two that are drawn at random.
`hash`        the adapter's own replica, by a consistent hash.
`bounded`     the same, unless that has `--bound` times its share of all requests under way: then the next one that
              has not (Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018).
`round_robin` all in turn; for validation.

`replicas`        hit rate, p50, p99, and the price of a million requests, for each number of replicas and each routing,
                  at `--load` of what a replica answers when all adapters are in memory.
`needed`          the fewest replicas that answer `--rate` requests a second with a p99 of at most `--p99-ms`, and what
                  a million requests cost then; null where the most of `--replicas` are too few.
"""

import argparse
import asyncio
import heapq
import json
import math
import tempfile
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray
from transformers.utils import logging

from benchmarks import service_times
from benchmarks.proxy import routed_request
from benchmarks.replicas import Asked
from benchmarks.scale import Answers, make_store, memory_of_one
from benchmarks.serving import LONGEST, SHORTEST, Clients, Server, make_texts, print_report, rounded, say, serve

SIGMA = 0.8
"""Of the logarithm of a text's tokens, as benchmarks.serving.make_texts has it."""
WARM_UP = 0.2
"""Share of the requests that are not counted: those that find queues empty."""
LEAST_REQUESTS = 60_000
REQUESTS_EACH = 250
"""Of a replica, where there are many."""
ROUTINGS = ("random", "two", "hash", "bounded")
MEASURED_ADAPTERS = 200
MEASURED_RESIDENT = 60
MEASURED_CLIENTS = 16
MEASURE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Times:
    """What a replica takes; milliseconds."""

    batch_base_ms: float
    batch_token_ms: float
    batch_ratios: Sequence[float]
    overhead_ms: Sequence[float]
    load_ms: Sequence[float]
    parallel_loads: int

    @classmethod
    def of(cls, figures: dict[str, Any]) -> "Times":
        """From what benchmarks.service_times has measured."""
        return cls(**{name: figures[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class Scene:
    """What is simulated."""

    times: Times
    replicas: int
    adapters: int
    resident: int
    """Adapters that fit in a replica's memory."""
    rate: float
    """Requests a second, of all replicas together."""
    routing: str
    requests: int
    max_batch_tokens: int = 2048
    bound: float = 1.25
    median_tokens: float = 15.0
    owners: Sequence[int] | None = None
    """The replica of each adapter, the most popular one first; drawn at random otherwise."""
    store_ms: float = 0.0
    """More of each load, spent waiting for the store: any number at once."""
    seed: int = 0


@dataclass(slots=True)
class Replica:
    """A server."""

    resident: OrderedDict[int, None]
    """Adapters in memory, the least recently used first."""
    loading: dict[int, list[int]] = field(default_factory=dict)
    """Adapter -> requests that wait for it."""
    to_load: deque[int] = field(default_factory=deque)
    loads: int = 0
    """Under way."""
    queue: deque[int] = field(default_factory=deque)
    batch: list[int] = field(default_factory=list)
    under_way: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    hit_rate: float
    p50_ms: float
    p99_ms: float
    mean_ms: float


class Simulation:
    """One run. Times are milliseconds."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._random = np.random.default_rng(scene.seed)
        shares = 1 / np.arange(1, scene.adapters + 1)
        self._shares: NDArray[np.float64] = shares / shares.sum()
        number = scene.requests
        self._arrivals = np.cumsum(self._random.exponential(1000 / scene.rate, number)).tolist()
        self._asked = self._random.choice(scene.adapters, number, p=self._shares).tolist()
        lengths = self._random.lognormal(math.log(scene.median_tokens), SIGMA, number)
        self._tokens = np.clip(lengths.astype(np.int64), SHORTEST, LONGEST).tolist()
        self._overhead = self._drawn(scene.times.overhead_ms, number)
        self._ratios = cycle(self._drawn(scene.times.batch_ratios, 100_003))
        self._load_times = cycle(self._drawn(scene.times.load_ms, 100_003))
        self._anywhere = self._random.integers(scene.replicas, size=number).tolist()
        self._elsewhere = self._random.integers(scene.replicas, size=number).tolist()
        drawn = self._random.integers(scene.replicas, size=scene.adapters).tolist()
        self._owners: Sequence[int] = drawn if scene.owners is None else scene.owners
        self._replicas = [Replica(memory) for memory in self._memories()]
        self._under_way = 0
        self._events: list[tuple[float, int, Callable[[float, int, int], None], int, int]] = []
        self._order = count()
        self._hits = 0
        self._first = int(WARM_UP * number)
        self._latencies = np.full(number, np.nan)

    def run(self) -> Outcome:
        """All requests."""
        route = getattr(self, f"_route_{self._scene.routing}")
        events, replicas = self._events, self._replicas
        for request, now in enumerate(self._arrivals):
            while events and events[0][0] <= now:
                self._next_event()
            adapter = self._asked[request]
            replica = route(request, adapter)
            self._under_way += 1
            replicas[replica].under_way += 1
            self._arrive(now, replica, request, adapter)
        while events:
            self._next_event()
        counted = self._latencies[self._first :]
        p50, p99 = np.percentile(counted, [50, 99])
        return Outcome(self._hits / len(counted), float(p50), float(p99), float(counted.mean()))

    # ------------------------------------------------------------------------------------------------------- events

    def _next_event(self) -> None:
        now, _, happen, replica, subject = heapq.heappop(self._events)
        happen(now, replica, subject)

    def _arrive(self, now: float, number: int, request: int, adapter: int) -> None:
        replica = self._replicas[number]
        if adapter in replica.resident:
            replica.resident.move_to_end(adapter)
            self._hits += request >= self._first
            self._enqueue(now, number, request)
        elif adapter in replica.loading:
            replica.loading[adapter].append(request)
        else:
            replica.loading[adapter] = [request]
            self._at(now + self._scene.store_ms, self._fetched, number, adapter)

    def _fetched(self, now: float, number: int, adapter: int) -> None:
        self._replicas[number].to_load.append(adapter)
        self._start_loads(now, number)

    def _start_loads(self, now: float, number: int) -> None:
        replica = self._replicas[number]
        while replica.to_load and replica.loads < self._scene.times.parallel_loads:
            replica.loads += 1
            self._at(now + next(self._load_times), self._loaded, number, replica.to_load.popleft())

    def _loaded(self, now: float, number: int, adapter: int) -> None:
        replica = self._replicas[number]
        replica.loads -= 1
        if len(replica.resident) >= self._scene.resident:
            replica.resident.popitem(last=False)
        replica.resident[adapter] = None
        for request in replica.loading.pop(adapter):
            self._enqueue(now, number, request)
        self._start_loads(now, number)

    def _enqueue(self, now: float, number: int, request: int) -> None:
        replica = self._replicas[number]
        replica.queue.append(request)
        if not replica.batch:
            self._start_batch(now, number)

    def _start_batch(self, now: float, number: int) -> None:
        replica, tokens = self._replicas[number], 0
        while replica.queue:
            tokens += self._tokens[replica.queue[0]]
            if replica.batch and tokens > self._scene.max_batch_tokens:
                tokens -= self._tokens[replica.queue[0]]
                break
            replica.batch.append(replica.queue.popleft())
        times = self._scene.times
        took = (times.batch_base_ms + times.batch_token_ms * tokens) * next(self._ratios)
        self._at(now + took, self._ended, number, 0)

    def _ended(self, now: float, number: int, _: int) -> None:
        replica = self._replicas[number]
        for request in replica.batch:
            self._latencies[request] = now - self._arrivals[request] + self._overhead[request]
        self._under_way -= len(replica.batch)
        replica.under_way -= len(replica.batch)
        replica.batch = []
        if replica.queue:
            self._start_batch(now, number)

    def _at(self, when: float, happen: Callable[[float, int, int], None], replica: int, subject: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen, replica, subject))

    # ------------------------------------------------------------------------------------------------------ routing

    def _route_round_robin(self, request: int, adapter: int) -> int:
        return request % self._scene.replicas

    def _route_random(self, request: int, adapter: int) -> int:
        return int(self._anywhere[request])

    def _route_two(self, request: int, adapter: int) -> int:
        one, other = int(self._anywhere[request]), int(self._elsewhere[request])
        return one if self._replicas[one].under_way <= self._replicas[other].under_way else other

    def _route_hash(self, request: int, adapter: int) -> int:
        return int(self._owners[adapter])

    def _route_bounded(self, request: int, adapter: int) -> int:
        most = math.ceil(self._scene.bound * (self._under_way + 1) / self._scene.replicas)
        one = int(self._owners[adapter])
        while self._replicas[one].under_way >= most:  # not all of them, since it is more than the mean
            one = (one + 1) % self._scene.replicas
        return one

    # -------------------------------------------------------------------------------------------------------- draws

    def _drawn(self, quantiles: Sequence[float], number: int) -> list[float]:
        drawn = np.interp(self._random.random(number), np.linspace(0, 1, len(quantiles)), quantiles)
        return list(drawn.tolist())

    def _memories(self) -> list[OrderedDict[int, None]]:
        """What is in each replica's memory: what it was asked for last."""
        everybody = np.arange(self._scene.adapters)
        if self._scene.routing not in ("hash", "bounded"):
            return [self._memory(everybody) for _ in range(self._scene.replicas)]
        owners = np.array(self._owners)
        order = np.argsort(owners, kind="stable")
        bounds = np.searchsorted(owners[order], np.arange(self._scene.replicas + 1))
        return [self._memory(order[start:end]) for start, end in pairwise(bounds)]

    def _memory(self, adapters: NDArray[np.int64]) -> OrderedDict[int, None]:
        """Of adapters that are asked for at random, each at its own rate, the time since the last request is drawn from
        an exponential distribution; those of the shortest times are there."""
        ages = self._random.standard_exponential(len(adapters), dtype=np.float32) / self._shares[adapters]
        if len(ages) > self._scene.resident:
            youngest = np.argpartition(ages, self._scene.resident)[: self._scene.resident]
            adapters, ages = adapters[youngest], ages[youngest]
        return OrderedDict.fromkeys(adapters[np.argsort(-ages)].tolist())


# -------------------------------------------------------------------------------------------------------- the figures


def simulate(times: Times, options: argparse.Namespace, replicas: int, rate: float, routing: str) -> Outcome:
    """So many replicas at a rate of requests a second."""
    scene = Scene(
        times,
        replicas,
        options.adapters,
        options.resident,
        rate,
        routing,
        requests=max(LEAST_REQUESTS, REQUESTS_EACH * replicas),
        max_batch_tokens=options.max_batch_tokens,
        bound=options.bound,
        store_ms=options.store_ms,
    )
    return Simulation(scene).run()


def tables(measured: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a service, by the number of replicas and the routing."""
    times, saturated = Times.of(measured["times"]), measured["saturated_rps"]
    grown: dict[str, Any] = {}
    for replicas in options.replicas:
        rate = options.load * saturated * replicas
        row: dict[str, Any] = {"requests_per_second": rate}
        for routing in ROUTINGS:
            outcome = simulate(times, options, replicas, rate, routing)
            row[routing] = {"hit_rate": outcome.hit_rate, "p50_ms": outcome.p50_ms, "p99_ms": outcome.p99_ms}
        row["price_per_million"] = _price_per_million(replicas, rate, options)
        grown[str(replicas)] = row
        say(f"{replicas} replicas: " + ", ".join(f"{name} {row[name]['p99_ms']:.0f} ms" for name in ROUTINGS))
    return {"replicas": grown, "needed": {routing: needed(times, saturated, options, routing) for routing in ROUTINGS}}


def needed(times: Times, saturated: float, options: argparse.Namespace, routing: str) -> dict[str, Any] | None:
    """The fewest replicas that keep the promise; None where the most that may be are too few."""
    few, many = math.ceil(options.rate / saturated), max(options.replicas)
    best: tuple[int, Outcome] | None = None
    while few <= many:
        replicas = (few + many) // 2
        outcome = simulate(times, options, replicas, options.rate, routing)
        if outcome.p99_ms <= options.p99_ms:
            best, many = (replicas, outcome), replicas - 1
        else:
            few = replicas + 1
    if best is None:
        return None
    replicas, outcome = best
    return {
        "replicas": replicas,
        "p99_ms": outcome.p99_ms,
        "hit_rate": outcome.hit_rate,
        "price_per_million": _price_per_million(replicas, options.rate, options),
    }


def _price_per_million(replicas: int, rate: float, options: argparse.Namespace) -> float:
    return float(replicas * options.price / 3600 / rate * 1e6)


def validate(measured: dict[str, Any]) -> dict[str, Any]:
    """Simulates what benchmarks.replicas has measured. Errors are the simulation's figure less the measured one: of the
    hit rate in points, of the latencies as a share."""
    figures: dict[str, Any] = {}
    for routing in ("hash", "round_robin"):
        scene = Scene(
            Times.of(measured["times"]),
            measured["servers"],
            measured["adapters"],
            measured["resident"],
            measured["rate"],
            routing,
            LEAST_REQUESTS,
            owners=[rank % measured["servers"] if own < 0 else own for rank, own in enumerate(measured["owners"])],
        )
        outcome, real = Simulation(scene).run(), measured[routing]
        figures[routing] = {
            "hit_rate": outcome.hit_rate,
            "hit_rate_measured": real["hit_rate"],
            "hit_rate_error": outcome.hit_rate - real["hit_rate"],
            **{
                name: value
                for percent, simulated in (("p50_ms", outcome.p50_ms), ("p99_ms", outcome.p99_ms))
                for name, value in (
                    (percent, simulated),
                    (f"{percent}_measured", real[percent]),
                    (f"{percent}_error", simulated / real[percent] - 1),
                )
            },
        }
    return figures


def measure() -> dict[str, Any]:
    """The service times of one server, alone on this machine."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        versions = asyncio.run(make_store(folder / "store", MEASURED_ADAPTERS))
        one = asyncio.run(memory_of_one(folder / "store", versions))
        budget = MEASURED_RESIDENT * one
        with serve(folder / "store", folder / "log", host_memory_bytes=budget, log_level="warning") as server:
            return {"bytes_per_adapter": one, **uvloop.run(_measure(server, versions))}


async def _measure(server: Server, versions: dict[str, str]) -> dict[str, Any]:
    names, checker = list(versions), Answers(versions, lambda asked: asked.adapter)
    texts = cycle([json.dumps(text).encode() for text in make_texts(256)])
    numbers = count()

    def draw(adapter: str) -> tuple[Asked, bytes]:
        asked = Asked(adapter, next(numbers))
        return asked, routed_request(adapter, next(texts), asked.number)

    warm = cycle(names[: MEASURED_RESIDENT // 2])
    clients = Clients(server.port, MEASURED_CLIENTS, lambda: draw(next(warm)))
    checker.check((await clients.run(MEASURE_SECONDS)).answers)
    saturated = await clients.run(MEASURE_SECONDS)
    checker.check(saturated.answers)
    tokens = sum(json.loads(answer.body)["usage"]["tokens"] for answer in saturated.answers)
    rate = saturated.throughput / 2
    times = await service_times.measure(
        [server], server.port, names, MEASURED_RESIDENT, rate, MEASURE_SECONDS, draw, checker.check
    )
    return {
        "failed": checker.failed,
        "wrong": checker.wrong,
        "saturated_rps": saturated.throughput,
        "tokens_per_second": tokens / saturated.seconds,
        "times": times,
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--times", type=Path, help="what --measure has written; measured first where not given")
    parser.add_argument("--measure", type=Path, help="only measure, and write that to a file")
    parser.add_argument("--validate", type=Path, help="only simulate what benchmarks.replicas has printed, and compare")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 3, 10, 30, 100, 300, 1000])
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--resident", type=int, default=1000, help="adapters that fit in a replica's memory")
    parser.add_argument("--load", type=float, default=0.6, help="share of what a replica answers, all in memory")
    parser.add_argument("--rate", type=float, default=10_000.0, help="requests a second, for what is needed")
    parser.add_argument("--p99-ms", type=float, default=75.0, help="target, for what is needed")
    parser.add_argument("--price", type=float, default=0.10, help="of a replica for an hour")
    parser.add_argument(
        "--store-ms", type=float, default=0.0, help="more of each load: a store that is not a folder here"
    )
    parser.add_argument("--bound", type=float, default=1.25)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    options = parser.parse_args()
    if options.validate:
        figures = validate(json.loads(options.validate.read_text()))
    else:
        measured = json.loads(options.times.read_text()) if options.times else measure()
        if options.measure:
            options.measure.write_text(json.dumps(rounded(measured)))
            figures = measured
        else:
            figures = {"measured": measured} | tables(measured, options)
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
