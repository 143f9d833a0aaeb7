"""Pinned adapters: what they serve is in memory before anybody asks, and does not leave."""

import asyncio

from server.engine.catalog import Catalog
from server.engine.residency import Residency
from server.errors import AdapterdError, OverBudget
from server.logs import get_logger
from server.metrics import Metrics
from server.store.store import AdapterStore

log = get_logger("adapterd.pins")

SHARE = 0.75
"""Of the device's memory for adapters: the most that may be pinned. The rest is for all others."""


class Pins:
    """Follows the store's list of pinned names."""

    def __init__(
        self, store: AdapterStore, catalog: Catalog, residency: Residency, metrics: Metrics, *, poll_seconds: float
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._residency = residency
        self._metrics = metrics
        self._poll_seconds = poll_seconds
        self._turn = asyncio.Lock()
        self._names: frozenset[str] = frozenset()  # that are pinned and in memory
        self._versions: frozenset[str] = frozenset()  # what those serve

    def __contains__(self, name: str) -> bool:
        return name in self._names

    async def follow(self) -> None:
        """Keeps up with the store until it is cancelled."""
        while True:
            try:
                await self.refresh()
            except AdapterdError as error:
                log.warning("pins cannot be read", error=error.message)
            except Exception:
                log.exception("pins failed")  # and are followed all the same
            await asyncio.sleep(max(self._poll_seconds, 0.05))

    async def refresh(self) -> None:
        """Reads the list and brings into memory what is on it."""
        async with self._turn:
            await self._refresh()

    async def pin(self, name: str) -> None:
        """Brings what the name serves into memory and puts it on the list. Raises OverBudget, UnknownAdapter."""
        async with self._turn:
            release = await self._catalog.serving(name)
            nbytes = sum(map(self._residency.nbytes, self._versions))
            for version in set(release.versions) - self._versions:
                async with self._residency.lease(name, version):
                    nbytes += self._residency.nbytes(version)
            if nbytes > self._limit:
                raise self._over(name, nbytes)
            await self._store.pin(name)
            await self._refresh()

    async def unpin(self, name: str) -> None:
        """Takes the name off the list."""
        async with self._turn:
            await self._store.unpin(name)
            await self._refresh()

    async def _refresh(self) -> None:
        pinned: dict[str, int] = {}  # version -> bytes
        done: set[str] = set()
        for name in await self._store.pins():
            try:
                for version in await self._named(name):
                    async with self._residency.lease(name, version):
                        nbytes = sum(pinned.values()) + self._residency.nbytes(version)
                        if version not in pinned and nbytes > self._limit:
                            raise self._over(name, nbytes)
                        pinned[version] = self._residency.nbytes(version)
                        # At once, and beside those of the last time, which are still to be looked at.
                        self._residency.pin(self._versions | pinned.keys())
            except AdapterdError as error:
                log.warning("a pinned adapter is not in memory", adapter=name, error=error.message)
            else:
                done.add(name)
        self._names, self._versions = frozenset(done), frozenset(pinned)
        self._residency.pin(self._versions)
        self._metrics.pinned.set(len(done))

    @property
    def _limit(self) -> float:
        return SHARE * self._residency.device_budget

    def _over(self, name: str, nbytes: int) -> OverBudget:
        return OverBudget(
            f"with adapter {name!r}, {nbytes} bytes would be pinned; at most {self._limit:.0f} may be, {SHARE:.0%} of "
            "the memory for adapters",
            param="name",
        )

    async def _named(self, name: str) -> tuple[str, ...]:
        release = await self._catalog.current(name)
        return release.versions if release is not None else ()
