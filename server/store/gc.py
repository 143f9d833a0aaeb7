"""Garbage collection: versions that no recent release of an adapter names."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from server.errors import CorruptVersion, InvalidRequest
from server.logs import get_logger
from server.store.releases import KEEP, MIN_AGE
from server.store.store import AdapterStore, StoredVersion

log = get_logger("adapterd.gc")


@dataclass(frozen=True, slots=True)
class Removed:
    """A version that went, or would."""

    name: str
    version: StoredVersion


async def collect(
    store: AdapterStore,
    *,
    name: str | None = None,
    keep: int = KEEP,
    min_age: timedelta = MIN_AGE,
    dry_run: bool = False,
) -> AsyncIterator[Removed]:
    """Removes versions that none of the last `keep` releases of their adapter names, of one adapter or of all.

    Releases are the audit trail and stay. A version that is released again in the very moment is kept, and so is
    everything of an adapter one of whose last releases is damaged: nobody knows what it named.
    """
    if keep < 1:
        raise InvalidRequest(f"keep: {keep} is not at least 1", param="keep")
    if not dry_run:
        await store.remove_leftovers(min_age)
    for one in [name] if name is not None else await store.names():
        try:
            async for removed in _collect(store, one, keep, min_age, dry_run=dry_run):
                yield removed
        except CorruptVersion as error:
            log.error("nothing is collected", adapter=one, error=error.message)


async def _collect(
    store: AdapterStore, name: str, keep: int, min_age: timedelta, *, dry_run: bool
) -> AsyncIterator[Removed]:
    named = await _named(store, name, keep)
    for version in await store.versions(name):
        if version.version in named or datetime.now(UTC) - version.stored_at < min_age:
            continue
        again = partial(_is_named, store, name, keep, version.version)
        if dry_run or await store.remove_version(name, version.version, again, min_age=min_age):
            yield Removed(name, version)


async def _named(store: AdapterStore, name: str, keep: int) -> set[str]:
    numbers = (await store.releases(name))[-keep:]
    releases = [await store.get_release(name, number) for number in numbers]
    return {version for release in releases for version in release.versions}


async def _is_named(store: AdapterStore, name: str, keep: int, version: str) -> bool:
    return version in await _named(store, name, keep)
