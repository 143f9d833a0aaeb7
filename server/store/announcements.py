"""Which adapters get a later release: one short listing tells it of a whole store.

    _announced/<name>@<number>      before the release is made; removed after a while

A release is announced before it is made. So nobody who keeps reading the announcements misses one, and however many
adapters a server knows, it asks the store one question and not one about each. What was announced but never made, since
its writer died, costs some readings in vain.
"""

import math
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta

from server.errors import StoreUnavailable
from server.store.names import NAME, check_name
from server.store.objects import Entry, Objects

KEPT = timedelta(minutes=1)
"""How long they stay at least, by the store's clock: a reader that has not listed them for that long may have missed
some."""

LONGEST_MAKING_SECONDS = KEPT.total_seconds() / 4
"""How long a release may take from its announcement until it is made, without another one."""

AT_ONCE = 100
"""Announcements that are removed together: some stores remove one after the other, and have to be done in time."""

REFUSED_SECONDS = 600.0
"""How long nothing is removed after the store has refused to."""

_FOLDER = "_announced"
_KEY = re.compile(rf"{_FOLDER}/({NAME.pattern})@([1-9][0-9]*)")


class Announcements:
    """Those of one store."""

    outdated = False
    """Whether there were old ones at the last reading, and it is time to remove them."""

    def __init__(self, objects: Objects, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds; only differences count."""
        self._objects = objects
        self._clock = clock
        self._sweep_at = -math.inf
        self._newest: tuple[datetime, float] | None = None
        """Of those that are there, and when this was listed first: the store's clock has come as far since."""

    async def add(self, name: str, number: int) -> None:
        """A release with this number is about to be made, by whomever; again, it stays as long again. Raises
        StoreUnavailable."""
        await self._objects.put(f"{_FOLDER}/{check_name(name)}@{number}", b"\n")

    @asynccontextmanager
    async def announced(self, name: str, number: int) -> AsyncIterator[None]:
        """Makes a release inside. One that was long in the making is announced once more: what was announced before may
        be read and removed by then. Raises StoreUnavailable before it is made."""
        await self.add(name, number)
        began = self._clock()
        yield
        if self._clock() - began > LONGEST_MAKING_SECONDS:
            with suppress(StoreUnavailable):
                await self.add(name, number)

    async def read(self) -> dict[str, int]:
        """Names, each with the highest number that was announced for it."""
        entries = await self._objects.entries(_FOLDER)
        numbers: dict[str, int] = {}
        for entry in entries:
            if match := _KEY.fullmatch(entry.key):
                numbers[match[1]] = max(int(match[2]), numbers.get(match[1], 0))
        self.outdated = self._clock() >= self._sweep_at and bool(self._old(entries))
        return numbers

    async def sweep(self) -> None:
        """Removes old ones, now and then. Raises StoreUnavailable."""
        if self._clock() < self._sweep_at:
            return
        self._sweep_at = self._clock() + KEPT.total_seconds() / 2
        old = self._old(await self._objects.entries(_FOLDER))
        try:
            for first in range(0, len(old), AT_ONCE):
                await self._objects.delete_all(old[first : first + AT_ONCE])
        except StoreUnavailable:
            self._sweep_at = self._clock() + REFUSED_SECONDS
            raise

    def _old(self, entries: list[Entry]) -> list[str]:
        """Their keys. However long ago the last one was made: thousands that are left would be listed every second."""
        if not entries:
            return []
        newest, now = max(entry.modified_at for entry in entries), self._clock()
        if self._newest is None or newest != self._newest[0]:  # earlier, where one is gone that was of the future
            self._newest = newest, now
        oldest = newest + timedelta(seconds=now - self._newest[1]) - KEPT
        return [entry.key for entry in entries if entry.modified_at < oldest]
