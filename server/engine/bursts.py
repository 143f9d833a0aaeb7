"""In an overloaded server, what arrives is handled in bursts.

A request that is refused takes a third of a millisecond where it comes with others, and a whole one where it comes
alone, to a processor that has just computed something else; and while a CPU is the device, a batch waits for whatever
else its processors do. So where the device has work for a while anyway, the event loop naps whenever it has nothing
left to do, and then handles all that has come meanwhile. On two processors whose threads spin (see processors.py) a
tenth more is answered; where they sleep it is less, not more, so there it is not done.
"""

import asyncio
import time
from collections.abc import Callable

NAP_SECONDS = 0.02
"""What each step of a request may come later for, where requests wait for many times as long."""

BACKLOG_SECONDS = 0.3
"""Work that has to wait for the device. A server that is busy but keeps up has less, and owes everybody its haste."""

QUIET_SECONDS = 60e-6
QUIET_TURNS = 5
"""So many turns of the event loop in a row that take no longer have handled nothing, and what was handled before has no
steps left that follow at once."""


class Bursts:
    """Makes the running event loop nap while the backlog is long."""

    def __init__(
        self,
        backlog: Callable[[], float],
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`backlog` gives the seconds of work that waits for the device; it is asked in each turn, so it has to be
        quick. `sleep` blocks the thread."""
        self._backlog = backlog
        self._clock = clock
        self._sleep = sleep
        self._before = 0.0
        self._quiet = 0
        self._next: asyncio.Handle | None = None

    def start(self) -> None:
        """From here on, on the running event loop."""
        self._next = asyncio.get_running_loop().call_later(BACKLOG_SECONDS, self._turn)

    def stop(self) -> None:
        """No more naps."""
        if self._next is not None:
            self._next.cancel()

    def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if self._backlog() < BACKLOG_SECONDS:
            self._before = 0.0
            self._next = loop.call_later(BACKLOG_SECONDS, self._turn)
            return
        self._quiet = self._quiet + 1 if self._clock() - self._before < QUIET_SECONDS else 0
        if self._quiet >= QUIET_TURNS:
            self._sleep(NAP_SECONDS)
            self._quiet = 0
        self._before = self._clock()
        self._next = loop.call_soon(self._turn)
