"""Which release of each adapter serves, as of at most a poll interval ago."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from rapidfuzz import process

from server.engine.once import Once
from server.errors import StoreUnavailable, UnknownAdapter
from server.logs import get_logger
from server.store.store import NAME, AdapterStore, Release

log = get_logger("adapterd.catalog")

NEAREST = 3
"""Names looked at to find one to suggest."""

PATIENCE_SECONDS = 1.0
"""How long a request waits for the store while there is a known release to serve instead."""


class Catalog:
    """The store's releases as this process knows them.

    An adapter's release is read again when it is asked for and older than the poll interval; adapters nobody asks for
    cost nothing. Where the store fails, the last known release goes on serving.
    """

    def __init__(
        self, store: AdapterStore, executor: Executor, *, poll_seconds: float, clock: Callable[[], float]
    ) -> None:
        """`clock` gives seconds; only differences count."""
        self._store = store
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._known: dict[str, tuple[float, Release]] = {}
        self._releases = Once[Release | None](executor)
        self._names = Once[list[str]](executor)

    async def serving(self, name: str) -> tuple[Release, str]:
        """The release that serves and its version. Raises UnknownAdapter naming the nearest known name."""
        release = await self._current(name) if NAME.fullmatch(name) else None
        if release is None:
            raise await self._unknown(name)
        if release.version is None:
            raise UnknownAdapter(f"adapter {name!r} was deleted in release {release.number}", param="adapter")
        return release, release.version

    def note(self, name: str, release: Release) -> None:
        """A release that this process made or read. Reads overtake each other; the higher number is the later one."""
        _, known = self._known.get(name, (None, release))
        self._known[name] = (self._clock(), max(known, release, key=lambda one: one.number))

    async def names(self) -> list[str]:
        """All names in the store, sorted; deleted ones included."""
        return await self._names.call("names", self._store.names)

    async def _current(self, name: str) -> Release | None:
        read_at, known = self._known.get(name, (None, None))
        if read_at is not None and self._clock() - read_at <= self._poll_seconds:
            return known
        reading = self._releases.call(name, lambda: self._store.current(name))
        try:
            release = await asyncio.wait_for(reading, PATIENCE_SECONDS if known else None)
        except (StoreUnavailable, TimeoutError) as error:
            if known is None:
                raise
            log.warning("store failed, serving the last known release", adapter=name, error=str(error))
            release = known
        if release is not None:
            self.note(name, release)
        return self._known[name][1] if name in self._known else None

    async def _unknown(self, name: str) -> UnknownAdapter:
        hint = ""
        if NAME.fullmatch(name):  # comparing costs time for each character and each known name
            near = process.extract(name, await self.names(), limit=NEAREST, score_cutoff=60, processor=str.lower)
            for candidate, _, _ in near:
                release = await self._current(candidate)  # names of deleted adapters stay in the store
                if release is not None and release.version is not None:
                    hint = f"; did you mean {candidate!r}?"
                    break
        return UnknownAdapter(f"no adapter is called {name[:140]!r}{hint}", param="adapter")
