"""Naps of an event loop: only with a long backlog, only when there is nothing to do, and never for long."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from server.engine.bursts import BACKLOG_SECONDS, NAP_SECONDS, QUIET_SECONDS, QUIET_TURNS, Bursts


class Loop:
    """What the naps see: a backlog, and a clock that moves with naps and work."""

    def __init__(self, backlog: float) -> None:
        self.backlog = backlog
        self.now = 100.0
        self.naps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds

    @contextmanager
    def napping(self) -> Iterator[None]:
        bursts = Bursts(lambda: self.backlog, clock=lambda: self.now, sleep=self.sleep)
        bursts.start()
        try:
            yield
        finally:
            bursts.stop()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until_first_turn() -> None:
    await asyncio.sleep(2 * BACKLOG_SECONDS)


def test_no_naps_without_a_backlog() -> None:
    async def scenario(loop: Loop) -> None:
        with loop.napping():
            await until_first_turn()
            await turns(50)
        assert loop.naps == []

    asyncio.run(scenario(Loop(BACKLOG_SECONDS / 2)))


def test_an_idle_loop_naps_while_there_is_a_backlog_and_until_it_is_stopped() -> None:
    async def scenario(loop: Loop) -> None:
        with loop.napping():
            await until_first_turn()
        assert loop.naps
        assert set(loop.naps) == {NAP_SECONDS}
        seen = len(loop.naps)
        await turns(5 * QUIET_TURNS)
        assert len(loop.naps) == seen

    asyncio.run(scenario(Loop(2 * BACKLOG_SECONDS)))


def test_naps_end_with_the_backlog() -> None:
    async def scenario(loop: Loop) -> None:
        with loop.napping():
            await until_first_turn()
            loop.backlog = 0.0
            await turns(2)
            seen = len(loop.naps)
            assert seen
            await until_first_turn()
            assert len(loop.naps) == seen

    asyncio.run(scenario(Loop(2 * BACKLOG_SECONDS)))


def test_a_busy_loop_does_not_nap() -> None:
    busy = True

    async def work(loop: Loop) -> None:
        while busy:
            loop.now += 2 * QUIET_SECONDS  # each turn takes a while
            await asyncio.sleep(0)

    async def scenario(loop: Loop) -> None:
        nonlocal busy
        with loop.napping():
            working = asyncio.create_task(work(loop))
            await until_first_turn()
            assert loop.naps == []
            busy = False
            await working
            await turns(2 * QUIET_TURNS)
            assert loop.naps, "there is nothing left to do"

    asyncio.run(scenario(Loop(2 * BACKLOG_SECONDS)))
