"""What servers take for a request, measured on running ones: the figures that benchmarks.simulate computes with.

A batch takes a constant time and more for each token; what is left of a request's latency beside its wait and its batch
is HTTP, the tokenizer and whatever lies between client and server; and an adapter that is not in memory takes a load.
"""

import asyncio
import json
import statistics
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter, time
from typing import Any

import numpy as np

from benchmarks.serving import Answered, Arrivals, Clients, Connection, Server, Slice, http_request

POLL_SECONDS = 0.3
"""Servers remember their last fifty batches."""
QUANTILES = 51
PARALLEL_CLIENTS = 8
ONE_STRANGER_IN = 4
"""Requests at the rate, for an adapter that is not in memory: the others tell how long it takes otherwise."""
Draw = Callable[[str], tuple[Any, bytes]]
"""A request for an adapter, and what to know it by."""
Check = Callable[[list[Answered]], None]
"""Is given all answers."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A batch."""

    started: float
    """time.perf_counter's, as far as two clocks agree."""
    seconds: float
    tokens: int
    rows: tuple[tuple[str, float], ...]
    """(adapter, seconds in the queue)"""


class Watch:
    """Reads which batches servers run while others load them."""

    def __init__(self, servers: list[Server]) -> None:
        self._servers = servers
        self._offset = perf_counter() - time()
        self._batches: dict[tuple[int, float], Ran] = {}

    async def during(self, load: Coroutine[Any, Any, Slice]) -> Slice:
        """Awaits a load and watches meanwhile."""
        watching = asyncio.create_task(self._forever())
        try:
            return await load
        finally:
            watching.cancel()
            await asyncio.gather(*(self._read(index) for index in range(len(self._servers))))

    @property
    def batches(self) -> list[Ran]:
        """In the order in which they began."""
        return sorted(self._batches.values(), key=lambda batch: batch.started)

    async def _forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await asyncio.gather(*(self._read(index) for index in range(len(self._servers))))

    async def _read(self, index: int) -> None:
        connection = await Connection.open(self._servers[index].port)
        answer = await connection.ask(None, http_request("GET", "/admin/debug/batches"))
        connection.close()
        for one in json.loads(answer.body)["batches"]:
            rows = tuple((row["adapter"], row["wait_seconds"]) for row in one["rows"])
            self._batches[index, one["started_at"]] = Ran(
                one["started_at"] + self._offset, one["seconds"], one["tokens"], rows
            )


async def measure(
    servers: list[Server],
    port: int,
    names: list[str],
    resident: int,
    rate: float,
    seconds: float,
    draw: Draw,
    check: Check,
) -> dict[str, Any]:
    """Measures servers behind a port that share their requests evenly: twice so long at a rate, and once saturated.
    `resident`: how many of the adapters fit in memory.

    Returns milliseconds: `batch_base_ms` and `batch_token_ms`; `batch_ratios`, quantiles of what batches took over what
    these two say; `overhead_ms` and `load_ms`, quantiles; and `parallel_loads`, how many loads run at once.
    """
    warm = names[: resident // 2]
    known: Iterator[str] = cycle(warm)
    each_for_each_server = [adapter for adapter in warm for _ in servers]
    check(await _one_by_one(port, each_for_each_server, draw))
    watch, busy = Watch(servers), Watch(servers)
    arrivals = Arrivals(port, lambda: draw(next(known)))
    paced = await watch.during(arrivals.run(seconds, rate))
    arrivals.close()
    clients = Clients(port, PARALLEL_CLIENTS * len(servers), lambda: draw(next(known)))
    saturated = await busy.during(clients.run(seconds / 2))
    base, token = _fit([*watch.batches, *busy.batches])
    overhead = _overhead(paced.answers, watch.batches)
    strangers = cycle(names[resident // 2 :])
    turns = cycle([known] * (ONE_STRANGER_IN - 1) + [strangers])
    arrivals = Arrivals(port, lambda: draw(next(next(turns))))
    mixed = (await arrivals.run(seconds, rate)).answers
    arrivals.close()
    warm_names = set(warm)
    hit_ms = statistics.median(one.seconds for one in mixed if one.key.adapter in warm_names) * 1000
    loads = [max(0.0, one.seconds * 1000 - hit_ms) for one in mixed if one.key.adapter not in warm_names]
    together = await Clients(port, PARALLEL_CLIENTS * len(servers), lambda: draw(next(strangers))).run(seconds / 2)
    for answers in (paced.answers, saturated.answers, mixed, together.answers):
        check(answers)
    parallel = together.throughput / len(servers) * statistics.fmean(loads) / 1000
    ratios = [batch.seconds * 1000 / (base + token * batch.tokens) for batch in watch.batches]
    return {
        "batch_base_ms": base,
        "batch_token_ms": token,
        "batch_ratios": _quantiles(ratios),
        "overhead_ms": _quantiles(overhead),
        "load_ms": _quantiles(loads),
        "parallel_loads": max(1, round(parallel)),
        "batches": len(watch.batches),
    }


async def _one_by_one(port: int, adapters: list[str], draw: Draw) -> list[Answered]:
    connection = await Connection.open(port)
    answers = [await connection.ask(*draw(adapter)) for adapter in adapters]
    connection.close()
    return answers


def _fit(batches: list[Ran]) -> tuple[float, float]:
    """Milliseconds of a batch, and of a token in it; the sum of relative errors is least."""
    tokens = np.array([batch.tokens for batch in batches])
    took = np.array([batch.seconds * 1000 for batch in batches])
    columns = np.stack([np.ones(len(tokens)), tokens], axis=1) / took[:, None]
    base, token = np.linalg.lstsq(columns, np.ones(len(tokens)), rcond=None)[0]
    return max(0.0, float(base)), max(0.0, float(token))


def _overhead(answers: list[Answered], batches: list[Ran]) -> list[float]:
    """Milliseconds of each request that were neither its wait nor its batch. A request's batch is the one with a row of
    its adapter that began after it was sent and ended before its answer came."""
    by_adapter: dict[str, list[tuple[float, float, float]]] = {}
    for batch in batches:
        for adapter, wait in batch.rows:
            by_adapter.setdefault(adapter, []).append((batch.started, batch.started + batch.seconds, wait))
    overhead = []
    for answer in answers:
        name = answer.key.adapter
        own = [row for row in by_adapter.get(name, ()) if answer.sent <= row[0] and row[1] <= answer.received]
        if len(own) == 1:
            ((began, ended, wait),) = own
            overhead.append((answer.seconds - wait - (ended - began)) * 1000)
    return overhead


def _quantiles(values: list[float]) -> list[float]:
    return [round(float(value), 3) for value in np.quantile(values, np.linspace(0, 1, QUANTILES))]
