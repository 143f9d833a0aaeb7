"""Naps of an event loop: only where many are refused, never longer than the wait allows, and not for long after."""

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

import pytest

from server.engine.bursts import AWAKE_SECONDS, BUSY_SECONDS, FEW, NAP_SECONDS, NAP_SHARE, Bursts

LONG_WAIT = 10.0


class Refusing:
    """Bursts whose naps are noted and not slept, on a loop that seems to have nothing else to do."""

    def __init__(self, nap_seconds: float = NAP_SECONDS) -> None:
        self.naps: list[float] = []
        self.worked = 0.0
        self.busy = False
        self.bursts = Bursts(nap_seconds, sleep=self.naps.append, clock=self.clock)

    def clock(self) -> float:
        self.worked += 1.1 * BUSY_SECONDS * self.busy
        return self.worked

    def refuse(self, *waits: float) -> None:
        for wait in waits:
            self.bursts.refused(wait)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def for_naps(count: int) -> None:
    """As long as it takes to begin, and to nap and be awake so many times; sleeping is not slept here."""
    await asyncio.sleep(2 * NAP_SECONDS + 3 * count * AWAKE_SECONDS)


@pytest.mark.parametrize(
    ("waits", "nap"),
    [
        ([LONG_WAIT] * FEW, NAP_SECONDS),
        ([LONG_WAIT, 0.1 * NAP_SECONDS / NAP_SHARE], 0.1 * NAP_SECONDS),  # who waits least counts
    ],
)
def test_a_nap_is_short_beside_the_wait(waits: list[float], nap: float) -> None:
    async def scenario() -> None:
        refusing = Refusing()
        refusing.refuse(*waits)
        assert refusing.naps == []  # whoever is being answered is answered first
        await for_naps(1)
        assert refusing.naps == [nap]

    run(scenario())


@pytest.mark.parametrize("waits", [[0.0] * FEW, [LONG_WAIT, 0.0]])
def test_no_nap_where_nothing_is_waited_for(waits: list[float]) -> None:
    async def scenario() -> None:
        refusing = Refusing()
        refusing.refuse(*waits)
        await for_naps(1)
        assert refusing.naps == []

    run(scenario())


def test_few_refusals_are_no_reason_to_nap() -> None:
    async def scenario() -> None:
        refusing = Refusing()
        for _ in range(3):
            refusing.refuse(*[LONG_WAIT] * (FEW - 1))
            await for_naps(1)
        assert refusing.naps == []

    run(scenario())


def test_naps_go_on_while_requests_are_refused_and_begin_again() -> None:
    async def scenario() -> None:
        refusing = Refusing()
        for _ in range(2):
            seen = len(refusing.naps)
            while len(refusing.naps) < seen + 3:
                refusing.refuse(*[LONG_WAIT] * FEW)
                await asyncio.sleep(0)
            await for_naps(1)
            over = len(refusing.naps)
            await for_naps(3)
            assert len(refusing.naps) == over

    run(scenario())


def test_what_has_come_is_handled_first() -> None:
    async def scenario() -> None:
        refusing = Refusing()
        refusing.refuse(*[LONG_WAIT] * FEW)
        refusing.busy = True
        await for_naps(5)
        assert refusing.naps == []
        refusing.busy = False
        await for_naps(1)
        assert refusing.naps == [NAP_SECONDS]

    run(scenario())


def test_without_a_longest_nap_there_are_none() -> None:
    async def scenario() -> None:
        refusing = Refusing(nap_seconds=0.0)
        refusing.refuse(*[LONG_WAIT] * 10 * FEW)
        await for_naps(1)
        assert refusing.naps == []

    run(scenario())


def test_no_nap_follows_the_end() -> None:
    async def scenario() -> None:
        refusing = Refusing()
        refusing.refuse(*[math.inf] * FEW)
        refusing.bursts.stop()
        await for_naps(1)
        assert refusing.naps == []

    run(scenario())
