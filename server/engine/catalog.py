"""Which release of each adapter serves, as of at most a poll interval ago."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rapidfuzz import process

from server.engine.access import EVERYTHING, Access
from server.engine.failures import Failures
from server.engine.news import News
from server.engine.once import Once
from server.errors import AdapterdError, UnknownAdapter, UnknownVersion
from server.logs import get_logger
from server.store.names import NAME
from server.store.releases import Release
from server.store.store import AdapterStore

log = get_logger("adapterd.catalog")

NEAREST = 3
"""Names looked at to find one to suggest."""

PATIENCE_SECONDS = 1.0
"""How long a request waits for the store while there is a known release to serve instead."""

PREPARE_SECONDS = 1.0
"""How long a reading of a later release waits for its versions to be loaded."""

REREAD_SECONDS = 600.0
"""After that, an adapter's releases are read again, beside serving, though none was announced: who copies releases into
a store by other means announces nothing. Where thousands of adapters are in use, each of them only now and then, nearly
every request would read one again that came a few minutes after the last."""

MAX_KNOWN = 20_000
"""Names whose release is remembered, the last ones asked for: some kilobytes each."""


@dataclass(frozen=True, slots=True)
class _View:
    release: Release
    read_at: float
    """Until when it is known to hold, announcements aside."""
    behind: bool
    """Whether a later one was announced, or cannot be served yet."""


_NEWS = "_announced"
"""What stands for the announcements among adapters' names; no adapter may be called so."""


class Catalog:
    """The store's releases as this process knows them.

    The store's announcements are read again when an adapter is asked for and they are older than the poll interval, or
    beside serving when they are older than half of it; and so is the release of an adapter for which a later one was
    announced, or of which the announcements say nothing, since they have not been followed from when it was read on. So
    nobody waits while requests keep coming, and what nobody asks for costs nothing. Where the store fails, or has a
    later release but not yet its versions, the last known release goes on serving.
    """

    def __init__(
        self,
        store: AdapterStore,
        *,
        poll_seconds: float,
        clock: Callable[[], float],
        prepare: Callable[[str, Release, Release], Awaitable[None]],
        retire: Callable[[str], None],
        released: Callable[[str, int], None],
        access: Access = EVERYTHING,
    ) -> None:
        """`clock` gives seconds; only differences count.

        `prepare(name, known, later)` is awaited before a release of another process replaces a known one;
        `retire(version)` is told when no known release names a version any more, `released(name, number)` when a
        release becomes known, whoever made it. `access` says which names may be suggested to whoever asks for another.
        """
        self._store = store
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._prepare = prepare
        self._access = access
        self._retire = retire
        self._released = released
        self._views: OrderedDict[str, _View] = OrderedDict()
        self._versions: OrderedDict[tuple[str, str], None] = OrderedDict()  # asked for by version, and there
        self._named: defaultdict[str, list[str]] = defaultdict(list)  # version -> names whose known release names it
        self._failures = Failures[str](clock)
        self._hanging: set[str] = set()  # names that a request has waited for in vain
        self._reads = Once[str, Release | None]()
        self._news = News(store.announcements, clock)
        self._news_reads = Once[str, None]()
        self._sweeps = Once[str, None]()
        self._names: tuple[float, list[str]] | None = None
        self._listing = Once[str, list[str]]()

    async def serving(self, name: str) -> Release:
        """The release that serves. Raises UnknownAdapter naming the nearest known name."""
        release = await self.current(name) if NAME.fullmatch(name) else None
        if release is None:
            raise await self._unknown(name)
        if release.deleted:
            raise UnknownAdapter(f"adapter {name!r} was deleted in release {release.number}", param="adapter")
        return release

    async def current(self, name: str) -> Release | None:
        """The last release, which may be a deletion; None for a name that was never released."""
        view = self._views.get(name)
        if view is None:
            if error := self._failures.recent(name):
                raise error
            return await self._reads.call(name, lambda: self._read(name))
        self._views.move_to_end(name)
        if (age := self._age(view)) > self._poll_seconds / 2:
            await self._hear(wait=self._told(view) and age > self._poll_seconds)
            view = self._views.get(name, view)
            age = self._age(view)
        # What the announcements tell of is read itself only where they cannot be had.
        told = self._told(view) and self._failures.recent(_NEWS) is None
        unread = self._clock() - view.read_at > max(REREAD_SECONDS, self._poll_seconds)
        if unread or age > (self._poll_seconds if told else self._poll_seconds / 2):
            await self._reread(name, wait=age > self._poll_seconds)
        return self._views[name].release if name in self._views else view.release

    async def check_version(self, name: str, version: str) -> None:
        """Raises UnknownVersion where the adapter has no such version, released or not."""
        view = self._views.get(name)
        if (view is not None and version in view.release.versions) or (name, version) in self._versions:
            return
        if not await self._store.has_version(name, version):
            raise UnknownVersion(f"adapter {name!r} has no version {version}", param="version")
        self._versions[name, version] = None
        while len(self._versions) > MAX_KNOWN:
            self._versions.popitem(last=False)

    def note(self, name: str, release: Release, read_at: float | None = None, *, last: int = 0) -> None:
        """A release that this process made, or read from the store at some time, which may have a later one, `last`.

        Reads overtake each other; the higher number is the later one.
        """
        view = self._views.pop(name, None)
        known = view.release if view else None
        later = release if known is None or release.number > known.number else known
        read_at = self._clock() if read_at is None else read_at
        self._views[name] = _View(later, read_at, last > later.number)
        if later is not known:
            for version in later.versions:
                self._named[version].append(name)
            self._forget(name, known)
            self._released(name, later.number)
        while len(self._views) > MAX_KNOWN:
            oldest, view = self._views.popitem(last=False)
            self._forget(oldest, view.release)

    def served_by(self, version: str) -> Iterator[str]:
        """Adapters that answer with a version, as far as this process knows."""
        for name in self._named.get(version, ()):
            if version in self._views[name].release.traffic:
                yield name

    def _forget(self, name: str, release: Release | None) -> None:
        for version in release.versions if release else ():
            self._named[version].remove(name)
            if not self._named[version]:
                del self._named[version]
                self._retire(version)

    def _told(self, view: _View) -> bool:
        """Whether the announcements would tell of a later release."""
        return not view.behind and self._news.covers(view.read_at)

    def _age(self, view: _View) -> float:
        """Seconds since a view was known to hold."""
        return self._clock() - (max(view.read_at, self._news.as_of) if self._told(view) else view.read_at)

    async def _hear(self, *, wait: bool) -> None:
        if self._failures.recent(_NEWS) is None:
            await self._beside(_NEWS, self._news_reads.start(_NEWS, self._read_news), wait=wait)

    async def _reread(self, name: str, *, wait: bool) -> None:
        if self._failures.recent(name) is None:
            await self._beside(name, self._reads.start(name, lambda: self._read(name)), wait=wait)

    async def _beside(self, name: str, reading: asyncio.Task[Any], *, wait: bool) -> None:
        """Waits for a reading, at most for a while; not again for one that hangs."""
        if not wait or name in self._hanging:
            return
        try:
            await asyncio.wait_for(asyncio.shield(reading), PATIENCE_SECONDS)
        except TimeoutError:
            self._hanging.add(name)
            reading.add_done_callback(lambda _: self._hanging.discard(name))
            log.warning("store hangs, serving the last known release", adapter=name)
        except AdapterdError as error:
            log.warning("store failed, serving the last known release", adapter=name, error=error.message)

    async def _read_news(self) -> None:
        before = self._news.as_of
        try:
            numbers = await self._news.read()
        except AdapterdError as error:
            self._failures.note(_NEWS, error)
            raise
        self._failures.clear(_NEWS)
        if self._store.announcements.outdated:
            self._sweeps.start(_NEWS, self._sweep)  # beside serving
        for name, number in numbers.items():
            view = self._views.get(name)
            if view is not None and number > view.release.number and not view.behind:
                held = max(view.read_at, before) if self._news.covers(view.read_at) else view.read_at
                self._views[name] = replace(view, read_at=held, behind=True)

    async def _sweep(self) -> None:
        try:
            await self._store.announcements.sweep()
        except AdapterdError as error:  # all that are left are listed each time
            log.warning("old announcements cannot be removed from the store", error=error.message)

    async def _read(self, name: str) -> Release | None:
        view = self._views.get(name)
        known = view.release if view else None
        started = self._clock()
        try:
            release = await self._store.current(name, known)
        except AdapterdError as error:
            self._failures.note(name, error)
            raise
        self._failures.clear(name)
        if release is None:
            return None
        last = release.number
        if known is not None and last > known.number:
            try:
                await asyncio.wait_for(self._prepare(name, known, release), PREPARE_SECONDS)
            except (TimeoutError, AdapterdError) as error:
                # Its versions cannot be had yet, so the one before goes on serving, and the next poll tries again.
                reason = getattr(error, "message", "it is still being loaded")
                log.warning("a release waits for its versions", adapter=name, release=last, error=reason)
                release = known
            except Exception:
                log.exception("a release cannot be served, the one before goes on", adapter=name, release=last)
                release = known
        self.note(name, release, started, last=last)
        return self._views[name].release

    async def _unknown(self, name: str) -> UnknownAdapter:
        hint = ""
        with suppress(AdapterdError):  # a store that fails now has said before that there is no such name
            if NAME.fullmatch(name) and (near := await self._nearest(name)):
                hint = f"; did you mean {near!r}?"
        return UnknownAdapter(f"no adapter is called {name[:140]!r}{hint}", param="adapter")

    async def _nearest(self, name: str) -> str | None:
        find = partial(process.extract, name, await self._all_names(), limit=NEAREST, score_cutoff=60)
        near = await asyncio.to_thread(find, processor=str.lower)  # of a hundred thousand names it takes a while
        for candidate in (one for one, _, _ in near if self._access.sees(one)):
            release = await self.current(candidate)  # names of deleted adapters stay in the store
            if release is not None and not release.deleted:
                return str(candidate)
        return None

    async def _all_names(self) -> list[str]:
        """As of at most a poll interval ago: a client that asks for thousands of wrong names lists the store once."""
        if self._names is None or self._clock() - self._names[0] > self._poll_seconds:
            self._names = self._clock(), await self._listing.call("names", self._store.names)
        return self._names[1]
