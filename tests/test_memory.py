"""Memory with a budget: against a model, and what waits for it."""

import asyncio
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.failures import Failures
from server.engine.memory import HALF_LIFE, MAX_LEAD, MAX_STALE, Memory
from server.errors import MemoryFull, OverBudget, StoreUnavailable
from server.metrics import Metrics

KEYS = st.sampled_from("abcdefgh")


def memory(max_bytes: int, wait_seconds: float = 0.0, metrics: Metrics | None = None) -> Memory[str]:
    return Memory("host", max_bytes, wait_seconds=wait_seconds, metrics=metrics or Metrics())


@dataclass
class Asked:
    """A value as the model knows it, here or gone."""

    key: str
    size: int
    weight: float = 0.0
    """How often it was asked for, what is earlier counting less."""


class MemoryMachine(RuleBasedStateMachine):
    """What is in memory is what a plain list of values says, of which the one that was asked for last comes last;
    another list has those that left for others."""

    BUDGET = 100

    def __init__(self) -> None:
        super().__init__()
        self.metrics = Metrics()
        self.memory = memory(self.BUDGET, metrics=self.metrics)
        self.here: list[Asked] = []
        self.ghosts: list[Asked] = []
        self.now = 0.0
        self.held: list[tuple[str, Any]] = []
        self.pinned: set[str] = set()
        self.retired: set[str] = set()
        self.loop = asyncio.new_event_loop()

    def teardown(self) -> None:
        self.loop.close()

    def value(self, key: str) -> Asked | None:
        return next((one for one in self.here if one.key == key), None)

    def size(self) -> int:
        return sum(one.size for one in self.here)

    def stays(self, key: str) -> bool:
        return key in self.pinned or any(key == held for held, _ in self.held)

    def without(self, key: str) -> None:
        self.here = [one for one in self.here if one.key != key]
        self.retired.discard(key)

    def asked(self, value: Asked) -> None:
        value.weight = min(value.weight + 2**self.now, 2 ** (self.now + MAX_LEAD))
        self.here = [one for one in self.here if one is not value] + [value]

    @rule(key=KEYS, nbytes=st.integers(0, 110), claimed=st.integers(0, 110))
    def bring(self, key: str, nbytes: int, claimed: int) -> None:
        def room(needed: int, replaced: str = "") -> bool:
            values, size = len(self.here), self.size()
            leaving: list[Asked] = []
            for one in sorted(self.here, key=lambda one: one.weight):
                if size + needed <= self.BUDGET:
                    break
                if one.key != replaced and not self.stays(one.key):
                    leaving.append(one)
                    size -= one.size
            if size + needed > self.BUDGET:
                return False
            for one in leaving:
                self.without(one.key)
                self.ghosts.append(one)
            if leaving:
                self.ghosts = self.ghosts[max(0, len(self.ghosts) - values) :]
            return True

        expected: type[Exception] | None = None
        if claimed > self.BUDGET:
            expected = OverBudget
        elif not room(claimed):
            expected = MemoryFull
        elif nbytes > self.BUDGET:
            expected = OverBudget
        elif not room(nbytes - (old.size if (old := self.value(key)) else 0), key):
            expected = MemoryFull
        else:
            before = self.value(key) or next((one for one in self.ghosts if one.key == key), None)
            if any(one.key == key for one in self.ghosts):
                self.now += 1 / (HALF_LIFE * max(1, len(self.here)))
            self.ghosts = [one for one in self.ghosts if one.key != key]
            self.without(key)
            self.asked(Asked(key, nbytes, before.weight if before else 0.0))
        with pytest.raises(expected) if expected else nullcontext():
            self.loop.run_until_complete(take(self.memory, key, nbytes, claimed))

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        value = self.value(key)
        assert self.memory.get(key) == (key.upper() if value else None)
        if value:
            self.asked(value)
            self.retired.discard(key)

    @rule(key=KEYS)
    def hold(self, key: str) -> None:
        held = self.memory.held(key)
        held.__enter__()
        self.held.append((key, held))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 100))
    def let_go(self, index: int) -> None:
        _, held = self.held.pop(index % len(self.held))
        held.__exit__(None, None, None)
        self.sweep()

    @rule(keys=st.sets(KEYS, max_size=2))
    def pin(self, keys: set[str]) -> None:
        self.memory.pin(keys)
        self.pinned = keys
        self.sweep()

    @rule(key=KEYS)
    def retire(self, key: str) -> None:
        self.memory.retire(key)
        if self.value(key):
            self.retired.add(key)
        self.sweep()

    def sweep(self) -> None:
        for key in [key for key in self.retired if not self.stays(key)]:
            self.without(key)

    @invariant()
    def same_as_the_model(self) -> None:
        ordered = sorted(self.here, key=lambda one: one.weight)
        assert list(self.memory) == [one.key for one in ordered[::-1]]
        assert list(self.memory._ghosts) == [one.key for one in self.ghosts]
        assert self.memory._value_bytes == self.size() <= self.BUDGET
        assert self.memory._claimed_bytes == 0
        assert len(self.memory._order) <= 2 * len(self.here) + MAX_STALE
        assert [self.memory.nbytes(one.key) for one in self.here] == [one.size for one in self.here]
        sample = self.metrics.registry.get_sample_value
        assert sample("adapterd_adapter_bytes", {"memory": "host"}) == self.size()
        assert sample("adapterd_adapters_resident", {"memory": "host"}) == len(self.here)


TestMemoryMachine = MemoryMachine.TestCase


def loads(values: Memory[str], keys: Iterable[str]) -> int:
    """How many of the keys, asked for in turn, are not there and have to be brought."""

    async def run() -> int:
        missing = 0
        for key in keys:
            if values.get(key) is None:
                missing += 1
                async with values.claim(10) as claim:
                    await claim.settle(key, key, 10)
        return missing

    return asyncio.run(run())


def test_a_crawl_pushes_out_few_of_those_in_demand() -> None:
    values = memory(100)
    wanted = [f"wanted {index}" for index in range(8)]
    loads(values, wanted * 2)
    loads(values, (f"crawled {index}" for index in range(1000)))
    assert loads(values, wanted) == 0


@pytest.mark.parametrize(("slots", "yesterday", "today"), [(100, 90, 30), (4, 3, 2), (10, 8, 10), (10, 10, 9)])
def test_what_is_in_demand_today_takes_the_place_of_what_was(slots: int, yesterday: int, today: int) -> None:
    values = memory(10 * slots)
    loads(values, [f"old {index}" for index in range(yesterday)] * 3)
    passes = [loads(values, [f"new {index}" for index in range(today)]) for _ in range(4)]
    assert passes[0] == today
    assert passes[-1] == 0


def test_a_claim_waits_for_a_value_to_be_let_go() -> None:
    values = memory(100, wait_seconds=30)

    async def run() -> None:
        async with values.claim(80) as claim:
            await claim.settle("a", "A", 80)
        with values.held("a"):
            waiting = asyncio.create_task(take(values, "b", 50))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            assert "a" in values
        await waiting
        assert ("a" in values, "b" in values) == (False, True)

    asyncio.run(run())


async def take(values: Memory[str], key: str, nbytes: int, claimed: int | None = None) -> None:
    async with values.claim(nbytes if claimed is None else claimed) as claim:
        await claim.settle(key, key.upper(), nbytes)


def test_what_turns_out_larger_than_its_claim_waits_as_well() -> None:
    values = memory(100, wait_seconds=30)

    async def run() -> None:
        await take(values, "a", 60)
        with values.held("a"):
            waiting = asyncio.create_task(take(values, "b", 50, claimed=30))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            assert "a" in values
        await waiting
        assert ("a" in values, "b" in values) == (False, True)
        await take(values, "c", 50)
        assert "b" in values

    asyncio.run(run())


def test_claims_count_before_they_are_settled() -> None:
    values = memory(100)

    async def run() -> None:
        async with values.claim(60):
            with pytest.raises(MemoryFull) as caught:
                await take(values, "b", 50)
            assert caught.value.retry_after
        await take(values, "b", 50)

    asyncio.run(run())


@pytest.mark.parametrize("nbytes", [0, 60])
def test_a_claim_that_comes_to_nothing_is_given_back(nbytes: int) -> None:
    values = memory(100)

    async def run() -> None:
        with pytest.raises(RuntimeError):
            async with values.claim(nbytes):
                raise RuntimeError
        await take(values, "a", 100)

    asyncio.run(run())


def test_what_is_held_while_it_is_on_its_way_does_not_leave_before_it_was_used() -> None:
    values = memory(100)

    async def run() -> None:
        with values.held("a"):
            await take(values, "a", 100)
            with pytest.raises(MemoryFull):
                await take(values, "b", 1)
            assert values.get("a") == "A"
        await take(values, "b", 1)

    asyncio.run(run())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_failures_are_remembered_with_growing_pauses() -> None:
    clock = Clock()
    failures = Failures[str](clock)
    assert failures.recent("a") is None
    for pause in (1, 2, 4, 8, 16, 30, 30):
        failures.note("a", StoreUnavailable("gone", param="x"))
        error = failures.recent("a")
        assert isinstance(error, StoreUnavailable)
        assert (error.message, error.param, error.retry_after) == ("gone", "x", pause)
        clock.now += pause - 0.25
        assert failures.recent("a").retry_after == 1
        clock.now += 0.25
        assert failures.recent("a") is None
    failures.clear("a")
    failures.note("a", StoreUnavailable("gone"))
    assert failures.recent("a").retry_after == 1
    assert failures.recent("b") is None


def test_a_long_list_of_failures_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.failures.MAX_REMEMBERED", 3)
    failures = Failures[int](Clock())
    for key in range(5):
        failures.note(key, StoreUnavailable("gone"))
    assert [failures.recent(key) is not None for key in range(5)] == [False, False, True, True, True]
