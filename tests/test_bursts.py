"""Naps of an event loop: only with a long backlog, only when there is nothing to do, and never for long."""

import asyncio

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

    def bursts(self) -> Bursts:
        return Bursts(lambda: self.backlog, clock=lambda: self.now, sleep=self.sleep)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until_first_turn() -> None:
    await asyncio.sleep(2 * BACKLOG_SECONDS)


def test_no_naps_without_a_backlog() -> None:
    async def scenario() -> None:
        loop = Loop(BACKLOG_SECONDS / 2)
        bursts = loop.bursts()
        bursts.start()
        await until_first_turn()
        await turns(50)
        bursts.stop()
        assert loop.naps == []

    asyncio.run(scenario())


def test_an_idle_loop_naps_while_there_is_a_backlog() -> None:
    async def scenario() -> None:
        loop = Loop(2 * BACKLOG_SECONDS)
        bursts = loop.bursts()
        bursts.start()
        await until_first_turn()
        assert loop.naps
        assert set(loop.naps) == {NAP_SECONDS}
        loop.backlog = 0.0
        await turns(2)
        seen = len(loop.naps)
        await until_first_turn()
        assert len(loop.naps) == seen, "the backlog is gone"
        bursts.stop()

    asyncio.run(scenario())


def test_a_busy_loop_does_not_nap() -> None:
    async def scenario() -> None:
        loop = Loop(2 * BACKLOG_SECONDS)
        bursts = loop.bursts()
        bursts.start()
        busy = True

        async def work() -> None:
            while busy:
                loop.now += 2 * QUIET_SECONDS  # each turn takes a while
                await asyncio.sleep(0)

        working = asyncio.create_task(work())
        await until_first_turn()
        assert loop.naps == []
        busy = False
        await working
        await turns(2 * QUIET_TURNS)
        assert loop.naps, "there is nothing left to do"
        bursts.stop()

    asyncio.run(scenario())


def test_stopped_it_naps_no_more() -> None:
    async def scenario() -> None:
        loop = Loop(2 * BACKLOG_SECONDS)
        bursts = loop.bursts()
        bursts.start()
        await until_first_turn()
        bursts.stop()
        seen = len(loop.naps)
        await turns(20)
        assert len(loop.naps) == seen

    asyncio.run(scenario())
