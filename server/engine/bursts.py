"""While many requests are refused, the event loop handles what comes in bursts: interrupt coalescing, as network cards
do it.

Where a CPU is the device, the event loop runs on processors that compute batches, whose caches hold nothing of its own
each time it wakes up: a refusal takes three times as long as where it follows others. So it sleeps for moments that
are little beside the wait that requests are refused for, and then handles all that has come meanwhile. At five times
the peak on two cores, that saves an eighth to a third of the processor time of a refusal, for the device to use.
"""

import asyncio
import math
import time
from collections.abc import Callable

NAP_SECONDS = 0.02
"""The longest nap: what each step of a request may come later for."""

NAP_SHARE = 1 / 32
"""Of the wait that a request was refused for: how long a nap may be."""

AWAKE_SECONDS = 0.002
"""From one nap to the next; and again so long, where that has not been enough."""

BUSY_SECONDS = 0.0006
"""Of processor time meanwhile: more than that, and the loop still handles what has come."""

FEW = 2
"""Fewer refusals than that, from one nap to the next, are no burst."""


class Bursts:
    """Makes the running event loop nap while it refuses many requests."""

    def __init__(
        self,
        nap_seconds: float = NAP_SECONDS,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`nap_seconds`: the longest nap; 0: none. `sleep` blocks the thread, `clock` gives its processor time."""
        self._nap_seconds = nap_seconds
        self._sleep = sleep
        self._clock = clock
        self._refused = 0
        """Requests, since the last nap."""
        self._wait = math.inf
        """The shortest that one of them was refused for."""
        self._next: asyncio.TimerHandle | None = None

    def refused(self, wait_seconds: float) -> None:
        """A request was refused for what waits, which takes so long."""
        self._refused += 1
        self._wait = min(self._wait, wait_seconds)
        if self._next is None and self._nap_seconds:
            self._nap_in(self._nap_seconds)

    def stop(self) -> None:
        """No nap to come."""
        self._nap_seconds = 0.0
        if self._next is not None:
            self._next.cancel()

    def _nap_in(self, seconds: float) -> None:
        self._next = asyncio.get_running_loop().call_later(seconds, self._nap, self._clock())

    def _nap(self, before: float) -> None:
        if self._clock() > before + BUSY_SECONDS:
            self._nap_in(AWAKE_SECONDS)
            return
        refused, wait, self._refused, self._wait = self._refused, self._wait, 0, math.inf
        if refused < FEW or not wait:
            self._next = None
            return
        self._sleep(min(self._nap_seconds, NAP_SHARE * wait))
        self._nap_in(AWAKE_SECONDS)
