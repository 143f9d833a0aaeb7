"""What the store announces, as this process has followed it: whether what it knows of an adapter still holds."""

import math
from collections.abc import Callable

from server.store.announcements import KEPT, Announcements

LONGEST_GAP_SECONDS = KEPT.total_seconds() / 2
"""Between two readings; after a longer one, an announcement may have come and gone unread."""


class News:
    """The announcements of one store, read again and again."""

    def __init__(self, announcements: Announcements, clock: Callable[[], float]) -> None:
        """`clock` gives seconds; only differences count."""
        self._announcements = announcements
        self._clock = clock
        self._since = math.inf
        self.as_of = -math.inf
        """When the last reading was begun."""

    async def read(self) -> dict[str, int]:
        """What is announced now. Raises StoreUnavailable."""
        started = self._clock()
        numbers = await self._announcements.read()
        ended = self._clock()
        if ended - self.as_of > LONGEST_GAP_SECONDS:  # this one may itself have taken long
            self._since = max(started, ended - LONGEST_GAP_SECONDS)
        self.as_of = started
        return numbers

    def covers(self, read_at: float) -> bool:
        """Whether each release that was made after this time has been announced in one of the readings, or will be in
        the next."""
        return read_at >= self._since
