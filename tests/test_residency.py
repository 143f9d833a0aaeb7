"""How adapters get into memory: single loads, failures that stay with one adapter, two tiers, references."""

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from server.adapters.base import AdapterWeights
from server.engine.loading import Checked
from server.engine.memory import Memory
from server.engine.residency import AT_ONCE, Residency
from server.errors import AdapterdError, CorruptVersion, MemoryFull, OverBudget, StoreUnavailable, UnservableAdapter
from server.metrics import Metrics
from server.store.store import OpenedVersion
from server.tasks.adapter import TaskAdapter

NBYTES = 100
FILE_BYTES = 150
READING_BYTES = 2 * AT_ONCE * FILE_BYTES


def adapter(nbytes: int = NBYTES) -> TaskAdapter:
    return TaskAdapter(AdapterWeights(()), None, None, None, ("a", "b"), nbytes)


class Source:
    """Stands for the loader: counts its steps, and fails or waits where it is told to."""

    in_one_go = False
    """Whether what is small needs not be opened before it is read."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()
        self.placed: Counter[int] = Counter()
        self.failing: dict[str, AdapterdError] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def open(self, name: str, version: str) -> OpenedVersion:
        self.opened[version] += 1
        if version in self.gates:
            await self.gates[version].wait()
        if version in self.failing:
            raise self.failing[version]
        return OpenedVersion(version, b"", FILE_BYTES, None)

    async def check(self, name: str, opened: OpenedVersion) -> Checked:
        self.checked[opened.version] += 1
        return Checked(None, None, {}, nbytes=FILE_BYTES, estimate=NBYTES)

    async def bring(self, name: str, opened: OpenedVersion) -> tuple[Checked, TaskAdapter]:
        checked = await self.check(name, opened)
        return checked, await self.place(checked)

    async def bring_small(self, name: str, version: str, at_most: int) -> tuple[Checked, TaskAdapter] | None:
        if not self.in_one_go or at_most < FILE_BYTES:
            return None
        return await self.bring(name, await self.open(name, version))

    async def place(self, checked: Checked) -> TaskAdapter:
        self.placed[id(checked)] += 1
        return adapter()

    async def prove(self, *_: object) -> None:
        await asyncio.sleep(0)


@pytest.fixture(params=[False, True], ids=["opened first", "in one go"], autouse=True)
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "in_one_go", request.param)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Setting:
    """A residency over a source; one memory, or two."""

    def __init__(self, max_bytes: int, host_bytes: int | None = None, wait_seconds: float = 0.0) -> None:
        self.source = Source()
        self.clock = Clock()
        self.metrics = Metrics()
        wait: Any = {"wait_seconds": wait_seconds, "metrics": self.metrics}
        self.device = Memory[TaskAdapter]("device", max_bytes, **wait)
        self.host = Memory[Checked]("host", host_bytes, **wait) if host_bytes is not None else None
        self.residency = Residency(
            self.source,
            device=self.device,
            host=self.host,
            reading=Memory[None]("reading", READING_BYTES, **wait),
            metrics=self.metrics,
            clock=self.clock,
        )

    async def use(self, version: str, name: str = "name") -> TaskAdapter:
        async with self.residency.lease(name, version) as leased:
            return leased

    def loads(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("adapterd_adapter_loads_total", {"outcome": outcome}) or 0.0


def test_the_least_recently_used_leaves_first() -> None:
    async def run() -> None:
        one = Setting(250)
        for version in ("v1", "v2", "v1", "v3"):
            await one.use(version)
        assert [version in one.residency for version in ("v1", "v2", "v3")] == [True, False, True]
        await one.use("v2")
        assert one.source.opened == {"v1": 1, "v2": 2, "v3": 1}
        assert one.loads("success") == 4

    asyncio.run(run())


def test_an_adapter_that_fits_alone_is_served() -> None:
    async def run() -> None:
        one = Setting(NBYTES)
        for version in ("v1", "v2", "v1"):
            await one.use(version)
        assert "v1" in one.residency
        assert "v2" not in one.residency
        with pytest.raises(OverBudget):
            await Setting(NBYTES - 1).use("v1")

    asyncio.run(run())


def test_concurrent_requests_for_a_cold_adapter_cause_one_load() -> None:
    async def run() -> None:
        one = Setting(1000)
        one.source.gates["v1"] = asyncio.Event()
        requests = [asyncio.create_task(one.use("v1")) for _ in range(20)]
        await asyncio.sleep(0)
        requests[0].cancel()  # a client that gives up takes nobody else's answer with it
        await asyncio.sleep(0)
        one.source.gates["v1"].set()
        loaded = await asyncio.gather(*requests[1:])
        assert one.source.opened == {"v1": 1}
        assert len({id(each) for each in loaded}) == 1

    asyncio.run(run())


def test_a_failing_load_fails_its_callers_and_is_tried_again_after_a_pause() -> None:
    async def run() -> None:
        one = Setting(1000)
        one.source.failing["bad"] = StoreUnavailable("gone")
        results = await asyncio.gather(
            *(one.use(version) for version in ("bad", "good", "bad")), return_exceptions=True
        )
        assert [type(result) for result in results] == [StoreUnavailable, TaskAdapter, StoreUnavailable]
        for _ in range(5):
            with pytest.raises(StoreUnavailable) as caught:
                await one.use("bad")
            assert caught.value.retry_after == 1
        assert one.source.opened == {"bad": 1, "good": 1}
        one.source.failing.clear()
        one.clock.now = 1.0
        await one.use("bad")
        assert one.source.opened == {"bad": 2, "good": 1}

    asyncio.run(run())


@pytest.mark.parametrize("error", [CorruptVersion("bad"), UnservableAdapter("bad"), StoreUnavailable("bad")])
def test_a_failure_is_that_of_one_adapter_and_not_of_its_content(error: AdapterdError) -> None:
    async def run() -> None:
        one = Setting(1000)
        one.source.failing["v1"] = error
        with pytest.raises(type(error)):
            await one.use("v1", name="damaged")
        one.source.failing.clear()
        await one.use("v1", name="whole")
        assert await one.use("v1", name="damaged")  # the same bytes, and in memory now

    asyncio.run(run())


def test_a_busy_server_is_no_failure_of_the_adapter() -> None:
    async def run() -> None:
        one = Setting(NBYTES)
        async with one.residency.lease("name", "v1"):
            with pytest.raises(MemoryFull):
                await one.use("v2")
        await one.use("v2")
        assert one.loads("failure") == 1

    asyncio.run(run())


def test_what_is_in_use_does_not_leave_and_others_wait_for_it() -> None:
    async def run() -> None:
        one = Setting(NBYTES, wait_seconds=30)
        async with one.residency.lease("name", "v1"):
            waiting = asyncio.create_task(one.use("v2"))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not waiting.done()
            assert "v1" in one.residency
        await waiting
        assert "v1" not in one.residency

    asyncio.run(run())


def test_a_retired_version_leaves_with_its_last_reference() -> None:
    async def run() -> None:
        one = Setting(1000)
        async with one.residency.lease("name", "v1") as first:
            async with one.residency.lease("name", "v1") as second:
                one.residency.retire("v1")
                assert first is second
                assert "v1" in one.residency
            assert "v1" in one.residency
        assert "v1" not in one.residency
        one.residency.retire("v1")
        await one.use("v1")
        assert "v1" in one.residency

    asyncio.run(run())


def test_a_slow_adapter_does_not_delay_the_others() -> None:
    async def run() -> None:
        one = Setting(1000)
        await one.use("warm")
        gate = one.source.gates["cold"] = asyncio.Event()
        slow = asyncio.create_task(one.use("cold"))
        await asyncio.sleep(0)
        for _ in range(100):
            await one.use("warm")
        await one.use("other")  # a cold one as well
        assert not slow.done()
        gate.set()
        await slow

    asyncio.run(run())


def test_what_leaves_the_device_comes_back_from_the_host() -> None:
    async def run() -> None:
        one = Setting(2 * NBYTES, host_bytes=10 * FILE_BYTES)
        for version in ("v1", "v2", "v3", "v1", "v2", "v3"):
            await one.use(version)
        assert one.source.opened == {"v1": 1, "v2": 1, "v3": 1}
        assert sum(one.source.placed.values()) == 6
        assert one.host is not None
        assert all(version in one.host for version in ("v1", "v2", "v3"))
        one.residency.retire("v1")
        assert "v1" not in one.host

    asyncio.run(run())


def test_it_tells_what_is_ready_to_run_and_what_is_in_the_hosts_memory() -> None:
    async def run() -> None:
        one = Setting(2 * NBYTES, host_bytes=10 * FILE_BYTES)
        assert (list(one.residency.loaded()), one.residency.ready, one.residency.capacity) == ([], 0, 1)
        for version in ("v1", "v2", "v3", "v2"):
            await one.use(version)
        assert list(one.residency.loaded()) == [("v2", "gpu"), ("v3", "gpu"), ("v1", "cpu")]
        assert (one.residency.ready, one.residency.capacity) == (2, 2)
        one.source.gates["v4"] = asyncio.Event()
        request = asyncio.create_task(one.use("v4", "newcomer"))
        await asyncio.sleep(0)
        assert one.residency.loading == ["newcomer"]
        one.source.gates["v4"].set()
        await request
        await asyncio.sleep(0)
        assert one.residency.loading == []

    asyncio.run(run())


def test_a_small_host_memory_costs_reads() -> None:
    async def run() -> None:
        one = Setting(NBYTES, host_bytes=FILE_BYTES)
        for version in ("v1", "v2", "v1"):
            await one.use(version)
        assert one.source.opened == {"v1": 2, "v2": 1}

    asyncio.run(run())


def test_a_newcomer_stays_unless_it_is_refused() -> None:
    async def run() -> None:
        one = Setting(2 * NBYTES)
        checked = await one.source.check("name", OpenedVersion("new", b"", FILE_BYTES, None))
        with pytest.raises(RuntimeError):
            async with one.residency.newcomer("name", "new", checked):
                raise RuntimeError
        assert "new" not in one.residency
        async with one.residency.newcomer("name", "new", checked) as adapter:
            assert "new" in one.residency
        async with one.residency.newcomer("name", "new", checked) as again:
            assert again is adapter  # and takes no more memory
        assert await one.use("new") is adapter
        assert one.source.opened == {}

    asyncio.run(run())


def test_pinned_versions_stay() -> None:
    async def run() -> None:
        one = Setting(3 * NBYTES)
        await one.use("pinned")
        one.residency.pin({"pinned"})
        for index in range(10):
            await one.use(f"v{index}")
        assert "pinned" in one.residency
        one.residency.pin(set())
        for index in range(10):
            await one.use(f"v{index}")
        assert "pinned" not in one.residency

    asyncio.run(run())


def test_a_version_that_is_released_again_stays() -> None:
    async def run() -> None:
        one = Setting(1000)
        async with one.residency.lease("name", "v1"):
            one.residency.retire("v1")
            await one.use("v1")  # a roll-back has brought it back
        assert "v1" in one.residency

    asyncio.run(run())


def test_on_a_device_what_never_fits_drives_nobody_out() -> None:
    async def run() -> None:
        one = Setting(3 * NBYTES, host_bytes=10 * FILE_BYTES)
        for version in ("v1", "v2", "v3"):
            await one.use(version)
        check = one.source.check

        async def large(name: str, opened: OpenedVersion) -> Checked:
            return replace(await check(name, opened), estimate=100 * NBYTES)

        one.source.check = large
        with pytest.raises(OverBudget):
            await one.use("large")
        assert all(version in one.residency for version in ("v1", "v2", "v3"))

    asyncio.run(run())
