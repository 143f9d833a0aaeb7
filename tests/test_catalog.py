"""Which release serves, as this process knows it: polling, stores that fail, names that nobody knows."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.catalog import REREAD_SECONDS, Catalog
from server.engine.news import LONGEST_GAP_SECONDS, News
from server.errors import CorruptVersion, StoreUnavailable, UnknownAdapter
from server.store.announcements import KEPT, Announcements
from server.store.artifact import Artifact, Manifest
from server.store.objects import Objects
from server.store.releases import Plan, Release
from server.store.store import AdapterStore

MANIFEST = Manifest(method="lora", config={}, task="classification", labels=("a", "b"), source="test")
ARTIFACTS = [Artifact.build(MANIFEST.model_copy(update={"source": source}), {}) for source in "abc"]
VERSIONS = [artifact.version for artifact in ARTIFACTS]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedAnnouncements(Announcements):
    """Announcements that go by the clock of a test, are counted, and fail when they are told to."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        super().__init__(objects, clock)
        self.clock = clock
        self.made: list[tuple[float, str, int]] = []
        self.reads = 0
        self.failing = False
        self.seconds = 0.0
        """That a reading takes."""

    async def add(self, name: str, number: int) -> None:
        self.made.append((self.clock(), name, number))

    async def read(self) -> dict[str, int]:
        self.reads += 1
        if self.failing:
            raise StoreUnavailable("gone")
        self.clock.now += self.seconds
        return {name: number for _, name, number in self.made}

    async def sweep(self) -> None:
        newest = max(at for at, _, _ in self.made)
        self.made = [one for one in self.made if newest - one[0] <= KEPT.total_seconds()]


class FlakyStore(AdapterStore):
    """The real store in memory, which can be told to fail or hang, and counts its reads."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(AdapterStore.open("memory://")._objects)
        self.announcements: TimedAnnouncements = TimedAnnouncements(self._objects, clock)
        self.reads = 0
        self.failing = False
        self.hangs: asyncio.Event | None = None

    async def current(self, name: str, known: Release | None = None) -> Release | None:
        self.reads += 1
        if self.hangs:
            await self.hangs.wait()
        if self.failing:
            raise StoreUnavailable("gone")
        return await super().current(name, known)


class Setting:
    """A catalog, its store and its clock."""

    def __init__(self, prepare: Callable[[str, Release, Release], Awaitable[None]] | None = None) -> None:
        self.clock = Clock()
        self.store = FlakyStore(self.clock)
        self.prepared: list[tuple[str, int, int]] = []
        self.retired: list[str] = []
        self.released: list[tuple[str, int]] = []
        self.catalog = Catalog(
            self.store,
            poll_seconds=2,
            clock=self.clock,
            prepare=prepare or self.prepare,
            retire=self.retired.append,
            released=lambda name, number: self.released.append((name, number)),
        )

    async def prepare(self, name: str, known: Release, later: Release) -> None:
        self.prepared.append((name, known.number, later.number))

    async def release(self, *versions: int, name: str = "sentiment", shadow: tuple[int, ...] = ()) -> Release:
        traffic = {VERSIONS[version]: 1 / len(versions) for version in versions}
        for artifact in ARTIFACTS:
            await self.store.put_version(name, artifact)
        plan = Plan(traffic=traffic, shadow=tuple(VERSIONS[version] for version in shadow))
        return await self.store.release(name, plan, by="test")

    async def serves(self, name: str = "sentiment") -> int:
        """Index of the version that serves."""
        return VERSIONS.index((await self.catalog.serving(name)).main_version or "")


async def settled() -> None:
    """What was started beside has ended."""
    others = (task for task in asyncio.all_tasks() if task is not asyncio.current_task())
    await asyncio.gather(*others, return_exceptions=True)


def test_a_release_by_another_process_is_seen_within_the_poll_interval() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        assert await one.serves() == 0
        await one.release(1)
        one.clock.now = 1.0
        assert await one.serves() == 0
        assert one.store.reads == 1  # nothing is read before its time
        one.clock.now = 2.1
        assert await one.serves() == 1
        assert one.prepared == [("sentiment", 1, 2)]
        assert one.released == [("sentiment", 1), ("sentiment", 2)]

    asyncio.run(run())


def test_what_is_asked_for_often_is_read_beside_serving() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        assert await one.serves() == 0
        await one.release(1)
        one.store.hangs = asyncio.Event()
        one.clock.now = 1.5
        for _ in range(3):
            assert await one.serves() == 0  # nobody waits
        one.store.hangs.set()
        await settled()
        assert one.store.reads == 2
        assert await one.serves() == 1

    asyncio.run(run())


async def followed(one: Setting, until: float, *names: str, step: float = 0.5) -> None:
    """Time passes, and adapters are asked for all along."""
    while one.clock.now < until:
        one.clock.now += step
        for name in names:
            await one.serves(name)
        await settled()


def test_one_listing_tells_of_all_adapters() -> None:
    async def run() -> None:
        one = Setting()
        names = [f"adapter-{index}" for index in range(20)]
        for name in names:
            await one.release(0, name=name)
        await followed(one, 30, *names)
        assert one.store.reads == 2 * len(names)  # once more when the announcements began to be followed
        assert one.store.announcements.reads <= 30
        await one.release(1, name=names[7])
        await followed(one, 32.5, *names)
        assert one.store.reads == 2 * len(names) + 1
        assert [await one.serves(name) for name in names] == [int(name == names[7]) for name in names]
        assert one.prepared == [(names[7], 1, 2)]

    asyncio.run(run())


def test_what_was_announced_is_looked_for_until_it_is_made() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        await followed(one, 5, "sentiment")
        await one.store.announcements.add("sentiment", 2)
        await followed(one, 20, "sentiment")
        assert one.store.reads > 5
        await one.release(1)
        one.clock.now += 2.1
        assert await one.serves() == 1

    asyncio.run(run())


def test_what_was_announced_and_never_made_is_looked_for_in_vain_for_a_while() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        await followed(one, 5, "sentiment")
        await one.store.announcements.add("sentiment", 2)
        await followed(one, 90, "sentiment")
        await one.release(0, name="spam")  # which takes the old announcement away
        await followed(one, 95, "sentiment")
        reads = one.store.reads
        await followed(one, 120, "sentiment")
        assert one.store.reads == reads

    asyncio.run(run())


def test_a_release_that_nobody_asked_for_while_it_was_announced_is_not_forgotten() -> None:
    async def run() -> None:
        one = Setting()
        for name in ("sentiment", "spam"):
            await one.release(0, name=name)
        await followed(one, 20, "sentiment", "spam")
        await one.release(1, name="spam")
        await followed(one, 50, "sentiment")
        assert one.store.announcements.made
        one.store.announcements.made = []
        await followed(one, 55, "sentiment")
        assert await one.serves("spam") == 1

    asyncio.run(run())


def test_after_a_pause_nothing_is_taken_for_granted() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        await followed(one, 20, "sentiment")
        await one.release(1)
        one.store.announcements.made = []  # long ago
        one.clock.now += LONGEST_GAP_SECONDS + 1
        assert await one.serves() == 1

    asyncio.run(run())


@pytest.mark.parametrize(("seconds", "covered"), [(5, True), (LONGEST_GAP_SECONDS - 5, False)])
def test_what_came_while_a_reading_took_long_may_be_missed(seconds: float, covered: bool) -> None:
    async def run() -> None:
        clock = Clock()
        announcements = TimedAnnouncements(AdapterStore.open("memory://")._objects, clock)
        news = News(announcements, clock)
        await news.read()
        clock.now += 10  # each reading begins soon enough after the one before
        announcements.seconds = seconds
        await news.read()
        assert news.covers(0.0) is covered
        assert news.covers(clock.now)

    asyncio.run(run())


def test_without_announcements_each_adapter_is_read() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        await followed(one, 20, "sentiment")
        one.store.announcements.failing = True
        await followed(one, 25, "sentiment")
        await one.release(1)
        one.clock.now += 2.1
        assert await one.serves() == 1
        assert one.store.announcements.reads < 30  # they are asked for once in a while, not once per request
        one.store.announcements.failing = False
        await followed(one, 70, "sentiment")
        reads = one.store.reads
        await followed(one, 80, "sentiment")
        assert one.store.reads == reads

    asyncio.run(run())


def test_a_release_that_nobody_announced_is_seen_in_the_end() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        await followed(one, 20, "sentiment")
        await one.release(1)
        one.store.announcements.made = []  # it was copied into the store
        await followed(one, 20 + REREAD_SECONDS + 1, "sentiment")
        assert await one.serves() == 1

    asyncio.run(run())


def test_old_announcements_are_swept_beside_serving() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        announcements = one.store.announcements
        announcements.made += [(one.clock.now - 100, f"old-{index}", 1) for index in range(3)]
        await followed(one, 5, "sentiment")
        assert len(announcements.made) == 4
        announcements.outdated = True
        await followed(one, 10, "sentiment")
        assert len(announcements.made) == 1

    asyncio.run(run())


def test_announcements_that_cannot_be_removed_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused() -> None:
        raise StoreUnavailable("nobody may delete here")

    async def run() -> None:
        one = Setting()
        await one.release(0)
        monkeypatch.setattr(one.store.announcements, "sweep", refused)
        await followed(one, 5, "sentiment")
        one.store.announcements.outdated = True
        await followed(one, 10, "sentiment")
        assert await one.serves() == 0

    with caplog.at_level("WARNING", logger="adapterd.catalog"):
        asyncio.run(run())
    assert "nobody may delete here" in caplog.text


def test_a_release_that_waits_for_its_versions_is_tried_at_each_poll() -> None:
    async def run() -> None:
        tries: list[float] = []

        async def prepare(*_: object) -> None:
            tries.append(one.clock.now)
            if one.clock.now < 200:
                raise StoreUnavailable("gone")

        one = Setting(prepare)
        await one.release(0)
        await followed(one, 20, "sentiment")
        await one.release(1)
        await followed(one, 100, "sentiment")
        one.store.announcements.made = []  # long ago
        await followed(one, 200, "sentiment")
        assert max(later - sooner for sooner, later in pairwise(tries)) <= 2.5
        one.clock.now += 2.5
        assert await one.serves() == 1

    asyncio.run(run())


@dataclass(frozen=True)
class Turn:
    """What happens next."""

    passes: float  # seconds
    asked: tuple[int, ...]
    released: int | None
    slow: float  # seconds from a release's announcement until it is made
    dies: bool  # before it is made
    sweeps: bool
    fails: bool  # the announcements, from here on


turns = st.builds(
    Turn,
    passes=st.sampled_from([0.0, 0.3, 0.9, 1.1, 1.9, 2.1, 5.0, 20.0, 29.0, 31.0, 61.0]),
    asked=st.lists(st.integers(0, 2), max_size=3).map(tuple),
    released=st.none() | st.integers(0, 2),
    slow=st.sampled_from([0.0, 0.0, 0.5, 3.0, 15.0]),
    dies=st.booleans(),
    sweeps=st.booleans(),
    fails=st.sampled_from([False, False, False, True]),
)


@given(st.lists(turns, min_size=3, max_size=25))
def test_whoever_asks_gets_what_was_released_a_poll_interval_ago(course: list[Turn]) -> None:
    async def run() -> None:
        one = Setting()
        names = ["a", "b", "c"]
        made: dict[str, list[float]] = {name: [0.0] for name in names}  # when each release was made
        for name in names:
            await one.release(0, name=name)

        async def ask(name: str) -> None:
            release = await one.catalog.serving(name)
            must = sum(at <= one.clock.now - 2.0 - 1e-6 for at in made[name])
            assert must <= release.number <= len(made[name]), (name, one.clock.now)

        for turn in course:
            one.store.announcements.failing = turn.fails
            one.clock.now += turn.passes
            for index in turn.asked:
                await ask(names[index])
            await settled()
            if turn.released is not None:
                name = names[turn.released]
                announced, number = one.clock.now, len(made[name]) + 1
                await one.store.announcements.add(name, number)
                for _ in range(3):  # others ask meanwhile
                    one.clock.now += turn.slow / 3
                    await ask(names[0])
                    await settled()
                if not turn.dies:
                    kept = list(one.store.announcements.made)
                    await one.store.release(name, Plan.only(VERSIONS[number % 3]), by="test")
                    # That announces it as well, later than a writer that is slow would have.
                    one.store.announcements.made = [each for each in kept if each[1:] != (name, number)]
                    one.store.announcements.made.append((announced, name, number))
                    made[name].append(one.clock.now)
                    if turn.sweeps:
                        await one.store.announcements.sweep()

    asyncio.run(run())


def test_it_knows_whom_a_version_serves() -> None:
    async def run() -> None:
        one = Setting()

        def served(version: int) -> list[str]:
            return list(one.catalog.served_by(VERSIONS[version]))

        for name in ("a", "b"):
            one.catalog.note(name, await one.release(0, name=name, shadow=(1,)))
        assert served(0) == ["a", "b"]
        assert served(1) == []  # a shadow answers nobody
        one.catalog.note("a", await one.release(1, name="a", shadow=(0,)))
        assert (served(0), served(1)) == (["b"], ["a"])
        one.catalog.note("b", await one.release(1, name="b"))
        assert (served(0), served(1)) == ([], ["a", "b"])

    asyncio.run(run())


def test_a_release_is_served_once_its_versions_are_there() -> None:
    async def run() -> None:
        loaded = asyncio.Event()

        async def prepare(*_: object) -> None:
            await loaded.wait()

        one = Setting(prepare)
        await one.release(0)
        assert await one.serves() == 0
        await one.release(1)
        one.clock.now = 1.5
        assert await one.serves() == 0
        for _ in range(100):
            await asyncio.sleep(0)
        assert await one.serves() == 0
        loaded.set()
        await settled()
        assert await one.serves() == 1

    asyncio.run(run())


@pytest.mark.parametrize("failure", [None, StoreUnavailable("gone"), CorruptVersion("damaged")])
def test_a_release_whose_versions_cannot_be_had_leaves_the_one_before_serving(
    failure: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.catalog.PREPARE_SECONDS", 0.02)

    async def run() -> None:
        mended = asyncio.Event()

        async def prepare(*_: object) -> None:
            if failure and not mended.is_set():
                raise failure
            await mended.wait()

        one = Setting(prepare)
        await one.release(0)
        assert await one.serves() == 0
        await one.release(1)
        one.clock.now = 2.1
        assert [await one.serves(), await one.serves()] == [0, 0]
        assert one.store.reads == 2  # not at each request
        mended.set()
        one.clock.now = 4.2
        assert await one.serves() == 1

    asyncio.run(run())


def test_the_own_releases_are_seen_at_once() -> None:
    async def run() -> None:
        one = Setting()
        one.catalog.note("sentiment", await one.release(0))
        assert await one.serves() == 0
        assert one.store.reads == 0

    asyncio.run(run())


def test_a_release_read_before_it_was_overtaken_does_not_win() -> None:
    async def run() -> None:
        one = Setting()
        old = await one.release(0)
        one.catalog.note("sentiment", await one.release(1))
        one.catalog.note("sentiment", old)
        assert await one.serves() == 1

    asyncio.run(run())


def test_a_version_is_retired_when_no_known_release_names_it_any_more() -> None:
    async def run() -> None:
        one = Setting()
        one.catalog.note("sentiment", await one.release(0, 1))
        one.catalog.note("spam", await one.release(0, name="spam", shadow=(2,)))
        assert one.retired == []
        one.catalog.note("sentiment", await one.release(1))
        assert one.retired == []  # the other adapter serves it
        one.catalog.note("spam", await one.release(1, name="spam"))
        assert sorted(one.retired) == sorted([VERSIONS[0], VERSIONS[2]])
        one.retired.clear()
        one.catalog.note("sentiment", await one.store.delete("sentiment", by="test"))
        assert one.retired == []
        one.catalog.note("spam", await one.store.delete("spam", by="test"))
        assert one.retired == [VERSIONS[1]]

    asyncio.run(run())


def test_no_more_names_are_remembered_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.catalog.MAX_KNOWN", 1)

    async def run() -> None:
        one = Setting()
        await one.release(0)
        await one.release(1, name="spam")
        for _ in range(2):
            assert await one.serves() == 0
            assert await one.serves("spam") == 1
        assert one.retired == [VERSIONS[0], VERSIONS[1], VERSIONS[0]]
        assert one.store.reads == 4

    asyncio.run(run())


def test_a_store_that_fails_leaves_the_known_release_serving() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        assert await one.serves() == 0
        one.store.failing = True
        one.clock.now = 100.0
        assert await one.serves() == 0
        reads = one.store.reads
        for _ in range(5):
            assert await one.serves() == 0
        assert one.store.reads == reads  # a failing store is asked once in a while, not once per request
        with pytest.raises(StoreUnavailable):
            await one.serves("spam")
        with pytest.raises(StoreUnavailable) as caught:
            await one.serves("spam")
        assert caught.value.retry_after == 1
        assert one.store.reads == reads + 1
        one.store.failing = False
        await one.release(1)
        await one.release(2, name="spam")
        one.clock.now = 200.0
        assert await one.serves() == 1
        assert await one.serves("spam") == 2

    asyncio.run(run())


def test_a_store_that_hangs_leaves_the_known_release_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.catalog.PATIENCE_SECONDS", 0.02)

    async def run() -> None:
        one = Setting()
        await one.release(0)
        assert await one.serves() == 0
        await one.release(1)
        one.store.hangs = asyncio.Event()
        one.clock.now = 100.0
        for _ in range(50):
            assert await one.serves() == 0  # only the first one waits
        assert one.store.reads == 2
        one.store.hangs.set()
        await settled()
        assert await one.serves() == 1

    asyncio.run(run())


def test_concurrent_requests_read_a_release_once() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        assert await asyncio.gather(*(one.serves() for _ in range(20))) == [0] * 20
        assert one.store.reads == 1
        with pytest.raises(UnknownAdapter):
            await one.serves("nobody")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("sentimnt", "did you mean 'sentiment'"), ("SENTIMENT", "did you mean 'sentiment'"), ("zzz", "'zzz'$")],
)
def test_unknown_names_are_answered_with_the_nearest(asked: str, hint: str) -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        await one.release(0, name="spam")
        with pytest.raises(UnknownAdapter, match=hint):
            await one.serves(asked)

    asyncio.run(run())


@pytest.mark.parametrize("asked", ["", "../spam", "a/b", "x" * 1000, "\ud800", "a\0b", "_pins"])
def test_names_that_cannot_be_are_unknown(asked: str) -> None:
    async def run() -> None:
        one = Setting()
        with pytest.raises(UnknownAdapter):
            await one.serves(asked)
        assert one.store.reads == 0

    asyncio.run(run())


def test_a_deleted_adapter_is_unknown_and_says_since_when() -> None:
    async def run() -> None:
        one = Setting()
        await one.release(0)
        await one.store.delete("sentiment", by="test")
        with pytest.raises(UnknownAdapter, match="deleted in release 2"):
            await one.serves()

    asyncio.run(run())
