"""The capacity simulation against what can be computed without it."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.simulate import Scene, Simulation, Times

CONSTANT = Times(
    batch_base_ms=5, batch_token_ms=0.1, batch_ratios=[1, 1], overhead_ms=[2, 2], load_ms=[30, 30], parallel_loads=1
)
SCENE = Scene(CONSTANT, replicas=1, adapters=200, resident=60, rate=1, routing="random", requests=4000)


def test_who_comes_alone_takes_a_batch_and_the_overhead() -> None:
    scene = replace(SCENE, resident=200, median_tokens=1e-9, rate=0.001)  # the shortest texts: 6 tokens
    outcome = Simulation(scene).run()
    assert outcome.hit_rate == 1
    assert (outcome.p50_ms, outcome.p99_ms) == pytest.approx((5 + 6 * 0.1 + 2, 5 + 6 * 0.1 + 2))


def test_who_misses_waits_for_a_load() -> None:
    scene = replace(SCENE, resident=1, adapters=100_000, median_tokens=1e-9, rate=0.001)
    assert Simulation(scene).run().p99_ms == pytest.approx(30 + 5 + 6 * 0.1 + 2)


def test_memories_begin_as_they_are_in_the_long_run() -> None:
    choices = np.random.default_rng(1)
    shares = 1 / np.arange(1, SCENE.adapters + 1)
    memory: OrderedDict[int, None] = OrderedDict()
    hits = []
    for adapter in choices.choice(SCENE.adapters, 60_000, p=shares / shares.sum()).tolist():
        hits.append(adapter in memory)
        memory[adapter] = None
        memory.move_to_end(adapter)
        if len(memory) > SCENE.resident:
            memory.popitem(last=False)
    expected = np.mean(hits[5000:])
    few = Simulation(replace(SCENE, rate=0.001, requests=500, replicas=1)).run()
    many = Simulation(replace(SCENE, rate=0.001, requests=60_000, replicas=200)).run()
    assert many.hit_rate == pytest.approx(expected, abs=0.01)
    assert few.hit_rate == pytest.approx(expected, abs=0.06)


def test_a_queue_of_batches_is_as_long_as_theory_has_it() -> None:
    """With a budget of one text and constant times this is an M/D/1 queue (Pollaczek and Khinchine)."""
    times = replace(CONSTANT, batch_token_ms=0, overhead_ms=[0, 0])
    load = 0.7
    scene = replace(
        SCENE, times=times, resident=200, rate=1000 * load / 5, max_batch_tokens=1, routing="random", requests=100_000
    )
    assert Simulation(scene).run().mean_ms == pytest.approx(5 + load * 5 / (2 * (1 - load)), rel=0.03)


@pytest.mark.parametrize("routing", ["hash", "bounded"])
def test_adapters_with_a_replica_of_their_own_are_in_memory_more_often(routing: str) -> None:
    scene = replace(SCENE, replicas=4, rate=100, requests=20_000)
    random, own = (Simulation(replace(scene, routing=one)).run() for one in ("random", routing))
    assert own.hit_rate > random.hit_rate + 0.05


def test_a_hot_adapter_is_shared_where_loads_are_bounded() -> None:
    scene = replace(SCENE, replicas=20, adapters=10, rate=20 * 100, requests=20_000)
    hashed, bounded, two = (Simulation(replace(scene, routing=one)).run() for one in ("hash", "bounded", "two"))
    assert hashed.p99_ms > 10 * bounded.p99_ms
    assert bounded.p99_ms < 3 * two.p99_ms
