"""Which adapters get a later release: one short listing tells it of a whole store.

    _announced/<name>@<number>      before the release is made; removed after a while

A release is announced before it is made. So nobody who keeps reading the announcements misses one, and however many
adapters a server knows, it asks the store one question and not one about each. What was announced but never made, since
its writer died, costs some readings in vain.
"""

import asyncio
import math
import re
import time
from datetime import timedelta

from server.store.names import NAME, check_name
from server.store.objects import Objects

KEPT = timedelta(minutes=1)
"""How long they stay at least, by the store's clock: a reader that has not listed them for that long may have missed
some."""

_FOLDER = "_announced"
_KEY = re.compile(rf"{_FOLDER}/({NAME.pattern})@([1-9][0-9]*)")


class Announcements:
    """Those of one store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._swept_at = -math.inf  # on this process's clock

    async def add(self, name: str, number: int) -> None:
        """A release with this number is about to be made, by whomever. Raises StoreUnavailable."""
        await self._objects.put(f"{_FOLDER}/{check_name(name)}@{number}", b"\n")

    async def read(self) -> dict[str, int]:
        """Names, each with the highest number that was announced for it."""
        numbers: dict[str, int] = {}
        for entry in await self._objects.entries(_FOLDER):
            if match := _KEY.fullmatch(entry.key):
                numbers[match[1]] = max(int(match[2]), numbers.get(match[1], 0))
        return numbers

    async def sweep(self) -> None:
        """Removes old ones, now and then."""
        now = time.monotonic()
        if now - self._swept_at < KEPT.total_seconds() / 2:
            return
        self._swept_at = now
        entries = await self._objects.entries(_FOLDER)
        newest = max((entry.modified_at for entry in entries), default=None)
        old = [entry.key for entry in entries if newest is not None and newest - entry.modified_at > KEPT]
        await asyncio.gather(*map(self._objects.delete, old))
