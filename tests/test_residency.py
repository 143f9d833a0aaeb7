"""Which adapters are in memory, and which release serves: budgets, single loads, and stores that fail."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.adapters.base import AdapterWeights
from server.engine.catalog import Catalog
from server.engine.residency import Residency
from server.errors import StoreUnavailable, UnknownAdapter
from server.metrics import Metrics
from server.store.store import AdapterStore, Release
from server.tasks.adapter import TaskAdapter

VERSIONS = [digit * 64 for digit in "abc"]


def adapter(nbytes: int) -> TaskAdapter:
    return TaskAdapter(AdapterWeights(()), None, None, ("a", "b"), nbytes)  # type: ignore[arg-type]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


class Source:
    """A store's load: counts, and fails where it is told to."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.failing: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, name: str, version: str) -> TaskAdapter:
        self.loads[version] += 1
        self.gate.wait(10)
        if version in self.failing:
            raise StoreUnavailable("gone")
        return adapter(100)


def test_the_least_recently_used_leaves_first(pool: ThreadPoolExecutor) -> None:
    source = Source()
    residency = Residency(source, pool, max_bytes=250, metrics=Metrics())

    async def run() -> None:
        for version in ("v1", "v2", "v1", "v3"):
            await residency.get("name", version)
        assert [version in residency for version in ("v1", "v2", "v3")] == [True, False, True]
        await residency.get("name", "v2")

    asyncio.run(run())
    assert source.loads == {"v1": 1, "v2": 2, "v3": 1}
    assert residency._metrics.adapter_bytes._value.get() == 200
    assert residency._metrics.adapters_resident._value.get() == 2


def test_one_adapter_larger_than_the_budget_is_still_served(pool: ThreadPoolExecutor) -> None:
    source = Source()
    residency = Residency(source, pool, max_bytes=10, metrics=Metrics())

    async def run() -> None:
        await residency.get("name", "v1")
        await residency.get("name", "v2")

    asyncio.run(run())
    assert "v2" in residency
    assert "v1" not in residency


def test_concurrent_requests_for_a_cold_adapter_cause_one_load(pool: ThreadPoolExecutor) -> None:
    source = Source()
    source.gate.clear()
    residency = Residency(source, pool, max_bytes=1000, metrics=Metrics())

    async def run() -> list[TaskAdapter]:
        requests = [asyncio.create_task(residency.get("name", "v1")) for _ in range(20)]
        await asyncio.sleep(0)
        requests[0].cancel()  # a client that gives up takes nobody else's answer with it
        source.gate.set()
        return await asyncio.gather(*requests[1:])

    loaded = asyncio.run(run())
    assert source.loads == {"v1": 1}
    assert len({id(one) for one in loaded}) == 1


def test_a_failing_load_fails_its_callers_and_is_tried_again(pool: ThreadPoolExecutor) -> None:
    source = Source()
    source.failing.add("bad")
    residency = Residency(source, pool, max_bytes=1000, metrics=Metrics())

    async def run() -> None:
        results = await asyncio.gather(
            *(residency.get("name", version) for version in ("bad", "good", "bad")), return_exceptions=True
        )
        assert [type(result) for result in results] == [StoreUnavailable, TaskAdapter, StoreUnavailable]
        source.failing.clear()
        await residency.get("name", "bad")

    asyncio.run(run())
    assert source.loads == {"bad": 2, "good": 1}


class FlakyStore(AdapterStore):
    """The real store in memory, which can be told to fail, and counts its reads."""

    def __init__(self) -> None:
        super().__init__(AdapterStore.open("memory://")._objects)
        self.reads = 0
        self.failing = False

    def current(self, name: str) -> Release | None:
        self.reads += 1
        if self.failing:
            raise StoreUnavailable("gone")
        return super().current(name)


@pytest.fixture
def store() -> FlakyStore:
    return FlakyStore()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def catalog(store: AdapterStore, pool: ThreadPoolExecutor, clock: Clock) -> Catalog:
    return Catalog(store, pool, poll_seconds=2, clock=clock)


def serving(of: Catalog, name: str) -> str:
    return asyncio.run(of.serving(name))[1]


def test_a_release_by_another_process_is_seen_within_the_poll_interval(
    store: FlakyStore, pool: ThreadPoolExecutor
) -> None:
    clock = Clock()
    seen = catalog(store, pool, clock)
    store.release("sentiment", VERSIONS[0], by="test")
    assert serving(seen, "sentiment") == VERSIONS[0]
    store.release("sentiment", VERSIONS[1], by="test")
    clock.now = 2.0
    assert serving(seen, "sentiment") == VERSIONS[0]
    assert store.reads == 1  # nothing is read before its time
    clock.now = 2.1
    assert serving(seen, "sentiment") == VERSIONS[1]


def test_the_own_releases_are_seen_at_once(store: FlakyStore, pool: ThreadPoolExecutor) -> None:
    seen = catalog(store, pool, Clock())
    seen.note("sentiment", store.release("sentiment", VERSIONS[0], by="test"))
    assert serving(seen, "sentiment") == VERSIONS[0]
    assert store.reads == 0


def test_a_release_read_before_it_was_overtaken_does_not_win(store: FlakyStore, pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    seen = catalog(store, pool, clock)
    old = store.release("sentiment", VERSIONS[0], by="test")
    new = store.release("sentiment", VERSIONS[1], by="test")
    seen.note("sentiment", new)
    store.current = lambda name: old  # type: ignore[method-assign]
    clock.now = 10.0
    assert serving(seen, "sentiment") == VERSIONS[1]


def test_a_store_that_fails_leaves_the_known_release_serving(store: FlakyStore, pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    seen = catalog(store, pool, clock)
    store.release("sentiment", VERSIONS[0], by="test")
    assert serving(seen, "sentiment") == VERSIONS[0]
    store.failing = True
    clock.now = 100.0
    assert serving(seen, "sentiment") == VERSIONS[0]
    reads = store.reads
    assert serving(seen, "sentiment") == VERSIONS[0]
    assert store.reads == reads  # a failing store is asked once per interval, not once per request
    with pytest.raises(StoreUnavailable):
        serving(seen, "never-seen")
    store.failing = False
    store.release("sentiment", VERSIONS[1], by="test")
    clock.now = 200.0
    assert serving(seen, "sentiment") == VERSIONS[1]


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("sentimnt", "did you mean 'sentiment'"), ("SENTIMENT", "did you mean 'sentiment'"), ("zzz", "'zzz'$")],
)
def test_unknown_names_are_answered_with_the_nearest(
    store: FlakyStore, pool: ThreadPoolExecutor, asked: str, hint: str
) -> None:
    store.release("sentiment", VERSIONS[0], by="test")
    store.release("spam", VERSIONS[0], by="test")
    with pytest.raises(UnknownAdapter, match=hint):
        serving(catalog(store, pool, Clock()), asked)


@pytest.mark.parametrize("asked", ["", "../spam", "a/b", "x" * 1000, "\ud800", "a\0b"])
def test_names_that_cannot_be_are_unknown(store: FlakyStore, pool: ThreadPoolExecutor, asked: str) -> None:
    with pytest.raises(UnknownAdapter):
        serving(catalog(store, pool, Clock()), asked)
    assert store.reads == 0


def test_a_store_that_hangs_leaves_the_known_release_serving(
    store: FlakyStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.catalog.PATIENCE_SECONDS", 0.05)
    clock = Clock()
    seen = catalog(store, pool, clock)
    store.release("sentiment", VERSIONS[0], by="test")
    assert serving(seen, "sentiment") == VERSIONS[0]
    answer = threading.Event()
    store.current = lambda name: answer.wait(10) and None  # type: ignore[assignment,method-assign,return-value]
    clock.now = 100.0
    assert serving(seen, "sentiment") == VERSIONS[0]
    assert not answer.is_set()
    answer.set()


def test_a_deleted_adapter_is_unknown_and_says_since_when(store: FlakyStore, pool: ThreadPoolExecutor) -> None:
    store.release("sentiment", VERSIONS[0], by="test")
    store.release("sentiment", None, by="test")
    with pytest.raises(UnknownAdapter, match="deleted in release 2"):
        serving(catalog(store, pool, Clock()), "sentiment")


def test_a_slow_adapter_does_not_delay_the_others(pool: ThreadPoolExecutor) -> None:
    source = Source()
    residency = Residency(source, pool, max_bytes=1000, metrics=Metrics())

    async def run() -> None:
        await residency.get("name", "warm")
        source.gate.clear()
        slow = asyncio.create_task(residency.get("name", "cold"))
        await asyncio.sleep(0)
        started = time.monotonic()
        while time.monotonic() - started < 0.05:
            await residency.get("name", "warm")
        assert not slow.done()
        source.gate.set()
        await slow

    asyncio.run(run())
