"""AdapterStore: names, immutable versions, append-only releases, over any object store.

    <name>/versions/<sha256 of the content>/{manifest.json, adapter.safetensors}    immutable
    <name>/releases/<000001>.json                                                   append-only
    _pins/<name>                                                                    names to keep in memory
    _announced/<name>@<number>                                                      see Announcements

The highest release serves. A release is created with the store's create-only put, of which exactly one writer of a
number succeeds; so there is no lock, no torn write and no lost update, and the log is the audit trail.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import uuid4

from torch import Tensor

from server.blocks import BLOCKS
from server.errors import (
    AdapterdError,
    Conflict,
    CorruptVersion,
    StoreUnavailable,
    UnknownAdapter,
    UnknownVersion,
)
from server.logs import get_logger
from server.store.announcements import Announcements
from server.store.artifact import MANIFEST, TENSORS, Artifact, Manifest, digest, read_tensors
from server.store.names import NAME, check_name, check_version
from server.store.objects import Buffer, Objects, Observe
from server.store.releases import DELETED, Plan, Release
from server.store.report import Report

log = get_logger("adapterd.store")

T = TypeVar("T")

_RELEASE_FILE = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.json")
_VERSION_FILE = re.compile(rf"([0-9a-f]{{64}})/({re.escape(MANIFEST)}|{re.escape(TENSORS)})")
_PINS = "_pins"

LAST_SORTED = 100_000
"""The release file up to which all later ones sort behind it, those of seven digits too."""

PATIENCE_SECONDS = 2.0
PATIENCE_STEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version in the store."""

    version: str
    size: int  # bytes of its files
    stored_at: datetime
    whole: bool
    """False for what a writer that died has left."""


@dataclass(frozen=True, slots=True)
class OpenedVersion:
    """A version whose size is known and whose tensors have still to come."""

    version: str
    manifest_file: bytes
    size: int  # bytes of the tensors' file
    read_tensors: Callable[[], Awaitable[Buffer]]

    async def read(self) -> Callable[[], Artifact]:
        """Its bytes, as a function that makes an artifact of them and proves that they are what was stored: it
        computes, and should not do so on an event loop. Raises CorruptVersion."""
        tensors = await self.read_tensors()
        return lambda: Artifact.verify(self.version, self.manifest_file, _in_block(tensors))


class AdapterStore:
    """Coroutines of one event loop, or of several one after the other."""

    def __init__(self, objects: Objects) -> None:
        """All keys are below the prefix of `objects`."""
        self._objects = objects
        self.announcements = Announcements(objects)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        endpoint: str | None = None,
        timeout_seconds: float = 5.0,
        observe: Observe | None = None,
    ) -> "AdapterStore":
        """See Objects.open."""
        return cls(Objects.open(url, endpoint=endpoint, timeout_seconds=timeout_seconds, observe=observe))

    async def names(self) -> list[str]:
        """All names that something is stored under, sorted; deleted ones included."""
        return sorted(name for name in await self._objects.folders() if NAME.fullmatch(name))

    # ------------------------------------------------------------------------------------------------------ versions

    async def put_version(self, name: str, artifact: Artifact, report: Report | None = None) -> str:
        """Stores a version and returns it. Idempotent: the key is the content's digest.

        Also over one that is there already: the same bytes do no harm, and mend one that was damaged.
        """
        version = artifact.version
        key = _version_key(name, version)
        # The manifest comes last: where it is, the version is whole.
        await self._objects.put(f"{key}/{TENSORS}", artifact.tensor_bytes)
        await self._objects.put(f"{key}/{MANIFEST}", artifact.manifest_file(report))
        # Somebody may have been removing the version meanwhile, who looks for the manifest once the tensors are gone.
        if not await self._objects.exists(f"{key}/{TENSORS}"):
            await self._objects.put(f"{key}/{TENSORS}", artifact.tensor_bytes)
        return version

    async def open_version(self, name: str, version: str) -> OpenedVersion:
        """The beginning of reading a version. Raises UnknownVersion, CorruptVersion where half of it is missing."""
        key = _version_key(name, version)
        manifest, tensors = await self._objects.get_and_open(f"{key}/{MANIFEST}", f"{key}/{TENSORS}")
        if manifest is None:
            raise _unknown(name, version)
        if tensors is None:
            raise CorruptVersion(f"adapter {name!r} has no whole version {version}")
        read = tensors.read

        async def read_tensors() -> Buffer:
            try:
                return await read()
            except FileNotFoundError as error:  # it has just been collected
                raise _unknown(name, version) from error

        return OpenedVersion(version, manifest, tensors.size, read_tensors)

    async def load_small(self, name: str, version: str, at_most: int, work: Callable[[Artifact], T]) -> T | None:
        """What `work` makes of a version: read, proven to be what was stored and worked on in one go, beside the event
        loop. Handing over to a thread and back costs as much as that, and open_version and what follows do it thrice.

        None where it cannot be had so: where the store is no folder, the version is not there or not whole, or its
        tensors take more than `at_most` bytes; open_version tells which. Raises CorruptVersion, and what `work` does.
        """
        key = _version_key(name, version)
        return await self._objects.make_of_both(
            f"{key}/{MANIFEST}",
            f"{key}/{TENSORS}",
            at_most,
            lambda manifest, tensors: work(Artifact.verify(version, manifest, _in_block(tensors))),
        )

    async def load_again(
        self, name: str, version: str, size: int, tensor_digest: bytes, work: Callable[[Mapping[str, Tensor]], T]
    ) -> T | None:
        """What `work` makes of the tensors of a version that has been read before: their file had so many bytes and
        this digest. They are compared with that and worked on in one go, as by load_small.

        None where they cannot be had so, or are not the same any more; load_small and open_version tell which.
        """

        def make(tensors: Buffer) -> T | None:
            data = _in_block(tensors)
            return work(read_tensors(TENSORS, data)) if digest(data) == tensor_digest else None

        return await self._objects.make_of(f"{_version_key(name, version)}/{TENSORS}", size, make)

    async def get_version(self, name: str, version: str) -> Artifact:
        """Reads a version and proves that its bytes are the ones that were stored."""
        opened = await self.open_version(name, version)
        return await asyncio.to_thread(await opened.read())

    async def versions(self, name: str) -> list[StoredVersion]:
        """What is stored of an adapter's versions, the latest first."""
        prefix = f"{check_name(name)}/versions"
        files: dict[str, dict[str, tuple[int, datetime]]] = {}
        for entry in await self._objects.entries(prefix):
            if match := _VERSION_FILE.fullmatch(entry.key.removeprefix(f"{prefix}/")):
                files.setdefault(match[1], {})[match[2]] = entry.size, entry.modified_at
        found = [
            StoredVersion(
                version,
                size=sum(size for size, _ in parts.values()),
                stored_at=max(stored_at for _, stored_at in parts.values()),
                whole=len(parts) == 2,
            )
            for version, parts in files.items()
        ]
        return sorted(found, key=lambda one: (one.stored_at, one.version), reverse=True)

    async def has_version(self, name: str, version: str) -> bool:
        """Whether a version is there."""
        return await self._objects.exists(f"{_version_key(name, version)}/{MANIFEST}")

    async def manifest(self, name: str, version: str) -> tuple[Manifest, Report | None]:
        """A version's manifest and what a server found when it checked it, if one did; without the tensors, so that
        nothing proves that they are what was stored. Raises UnknownVersion, CorruptVersion."""
        try:
            data = await self._objects.get(f"{_version_key(name, version)}/{MANIFEST}")
        except FileNotFoundError as error:
            raise _unknown(name, version) from error
        return Artifact.manifest_in(version, data)

    async def remove_version(
        self, name: str, version: str, keep: Callable[[], Awaitable[bool]], *, min_age: timedelta = timedelta(0)
    ) -> bool:
        """Removes a version unless `keep` says, once it can no longer be released, that it has been.

        False where it was kept, also because it has been uploaded again within `min_age`.
        """
        manifest_key, tensors_key = (f"{_version_key(name, version)}/{file}" for file in (MANIFEST, TENSORS))
        manifest, tensors = await self._if_there(manifest_key), await self._if_there(tensors_key)
        stored_at = await self._objects.modified_at(manifest_key)
        if stored_at is not None and datetime.now(UTC) - stored_at < min_age:
            return False
        kept = True
        try:
            await self._objects.delete(manifest_key)  # first: from here on, the version is not there
            kept = await keep()
        finally:
            if kept and manifest is not None:
                await self._objects.put(manifest_key, manifest)
        # Somebody may upload it again meanwhile, who looks for the tensors once the manifest is there.
        if kept or await self._objects.exists(manifest_key):
            return False
        await self._objects.delete(tensors_key)
        if tensors is not None and await self._objects.exists(manifest_key):
            await self._objects.put(tensors_key, tensors)
            return False
        return True

    async def _if_there(self, key: str) -> bytes | None:
        try:
            return await self._objects.get(key)
        except FileNotFoundError:
            return None

    async def remove_leftovers(self, min_age: timedelta) -> None:
        """Removes files that writers that died have left half-written."""
        await self._objects.remove_leftovers(min_age)

    # ------------------------------------------------------------------------------------------------------ releases

    async def releases(self, name: str, after: int = 0) -> list[int]:
        """The numbers of an adapter's releases later than `after`, ascending; none for one that was never released."""
        prefix = f"{check_name(name)}/releases"
        entries = await self._objects.entries(prefix, _listed_after(name, after))
        return _numbers([entry.key.removeprefix(f"{prefix}/") for entry in entries], after)

    async def get_release(self, name: str, number: int) -> Release:
        """One release of an adapter."""
        try:
            return _read_release(name, number, await self._objects.get(_release_key(name, number)))
        except FileNotFoundError as error:
            raise UnknownAdapter(f"adapter {name!r} has no release {number}", param="release") from error

    async def current(self, name: str, known: Release | None = None) -> Release | None:
        """The release that serves, which may be a deletion; None for a name that was never released.

        With one that is `known`, only later ones are looked for.
        """
        after = known.number if known else 0
        prefix = f"{check_name(name)}/releases"

        def last(files: list[str]) -> str | None:
            numbers = _numbers(files, after)
            return _release_file(numbers[-1]) if numbers else None

        try:
            found = await self._objects.choose(prefix, last, _listed_after(name, after))
        except FileNotFoundError as error:  # what has just been listed
            raise UnknownAdapter(
                f"adapter {name!r} has no release of those that were listed", param="release"
            ) from error
        return known if found is None else _read_release(name, int(found[0].partition(".")[0]), found[1])

    async def history(self, name: str, *, before: int | None = None, limit: int = 100) -> list[Release]:
        """Releases, the latest first. Raises UnknownAdapter where there is none, CorruptVersion for a damaged one."""
        numbers = await self.releases(name)
        if not numbers:
            raise UnknownAdapter(f"adapter {name!r} was never released", param="adapter")
        chosen = [number for number in reversed(numbers) if before is None or number < before][:limit]
        return list(await asyncio.gather(*(self.get_release(name, number) for number in chosen)))

    async def release(
        self, name: str, plan: Plan, *, by: str, note: str = "", after: int | None = None, restores: int | None = None
    ) -> Release:
        """Makes the next release.

        `after`: the number of the release that it has to follow, 0 for none. Raises UnknownVersion for a version that
        is not stored, Conflict where another release came first.
        """
        numbers = await self.releases(name)
        last = max(numbers, default=0)
        if after is not None and last != after:
            raise Conflict(f"the last release of adapter {name!r} is {last}, not {after}", param="after")
        await self._check_versions(name, plan)
        release = Release(
            number=last + 1,
            traffic=plan.traffic,
            shadow=plan.shadow,
            created_at=datetime.now(UTC),
            by=by,
            note=note,
            restores=restores,
            id=uuid4().hex,
        )
        async with self.announcements.announced(name, release.number):
            if not await self._objects.create(_release_key(name, release.number), release.file()):
                raise Conflict(f"release {release.number} of adapter {name!r} was made by somebody else just now")
        try:
            await self._check_versions(name, plan, patience=PATIENCE_SECONDS)
        except UnknownVersion:
            before = await self._readable(name, last) if last else None
            reason = f"a version of release {release.number} was removed meanwhile"
            with suppress(AdapterdError):  # somebody else has made a release since
                await self.release(name, before.plan if before else DELETED, by=by, note=reason, after=release.number)
            raise
        except StoreUnavailable:
            log.warning("a release could not be looked at again", adapter=name, release=release.number)
        with suppress(StoreUnavailable):  # it is made, whatever becomes of old announcements
            await self.announcements.sweep()
        return release

    async def _check_versions(self, name: str, plan: Plan, *, patience: float = 0.0) -> None:
        """Raises UnknownVersion for one that is not stored.

        Garbage collection takes a version away before it looks whether somebody releases it, and puts it back then:
        `patience` is how many seconds it has for that.
        """
        until = time.monotonic() + patience
        while True:
            found = await asyncio.gather(*(self.has_version(name, version) for version in plan.versions))
            if all(found):
                return
            if time.monotonic() >= until:
                version = plan.versions[found.index(False)]
                raise UnknownVersion(f"adapter {name!r} has no version {version}", param="traffic")
            await asyncio.sleep(PATIENCE_STEP_SECONDS)

    async def delete(self, name: str, *, by: str, note: str = "", after: int | None = None) -> Release:
        """A release without traffic; versions and history stay. Raises UnknownAdapter where nothing serves."""
        numbers = await self.releases(name)
        last = await self._readable(name, numbers[-1]) if numbers else None
        if not numbers or (last is not None and last.deleted):
            raise UnknownAdapter(f"no adapter {name!r} serves", param="adapter")
        return await self.release(name, DELETED, by=by, note=note, after=numbers[-1] if after is None else after)

    async def rollback(
        self, name: str, *, to: int | None = None, by: str, note: str = "", after: int | None = None
    ) -> Release:
        """Makes a release that serves what an earlier one did; see rollback_target."""
        last, target = await self.rollback_target(name, to)
        follows = last if after is None else after
        return await self.release(name, target.plan, by=by, note=note, after=follows, restores=target.number)

    async def rollback_target(self, name: str, to: int | None = None) -> tuple[int, Release]:
        """The number of the last release, and the one to go back to: `to`, or what served before.

        Rolling back again goes further back; deletions are passed over. Raises UnknownAdapter for a name or a number
        that was never released, Conflict where there is nothing to go back to.
        """
        numbers = await self.releases(name)
        if not numbers:
            raise UnknownAdapter(f"adapter {name!r} was never released", param="adapter")
        if to is not None and to not in numbers:
            raise UnknownAdapter(f"adapter {name!r} has no release {to}", param="release")
        target = await (self._before(name, numbers) if to is None else self.get_release(name, to))
        if target is None or target.deleted:
            raise Conflict(
                f"release {to} of adapter {name!r} is a deletion; delete the adapter instead"
                if target
                else f"adapter {name!r} has no earlier release that served",
                param="to",
                code="nothing_to_roll_back_to",
            )
        return numbers[-1], target

    async def _before(self, name: str, numbers: list[int]) -> Release | None:
        """The last release, before what the very last one stands for, that served something else."""
        current = await self._readable(name, numbers[-1])
        origin = current
        while origin is not None and origin.restores is not None:
            origin = await self._readable(name, origin.restores)
        limit = origin.number if origin else numbers[-1]
        for number in reversed([number for number in numbers if number < limit]):
            release = await self._readable(name, number)
            if release and not release.deleted and (current is None or release.plan != current.plan):
                return release
        return None

    async def _readable(self, name: str, number: int) -> Release | None:
        """A release, unless it is damaged: that must not stand in the way of the others."""
        try:
            return await self.get_release(name, number)
        except CorruptVersion as error:
            log.error("passed over", adapter=name, error=error.message)
            return None

    # ---------------------------------------------------------------------------------------------------------- pins

    async def pins(self) -> list[str]:
        """Names that every server keeps in memory, sorted."""
        names = (entry.key.removeprefix(f"{_PINS}/") for entry in await self._objects.entries(_PINS))
        return sorted(name for name in names if NAME.fullmatch(name))

    async def pin(self, name: str) -> None:
        """From here on every server keeps what the name serves in memory."""
        await self._objects.put(f"{_PINS}/{check_name(name)}", b"\n")

    async def unpin(self, name: str) -> None:
        """The opposite of pin."""
        await self._objects.delete(f"{_PINS}/{check_name(name)}")


def _in_block(data: Buffer) -> memoryview:
    """Bytes of some size, where they may be written to: torch takes no others as they are."""
    if isinstance(data, memoryview):
        return data
    block = BLOCKS.take(len(data))
    block[:] = memoryview(data).cast("B")
    return block


def _unknown(name: str, version: str) -> UnknownVersion:
    return UnknownVersion(f"adapter {name!r} has no version {version}", param="version")


def _version_key(name: str, version: str) -> str:
    return f"{check_name(name)}/versions/{check_version(version)}"


def _release_key(name: str, number: int) -> str:
    return f"{check_name(name)}/releases/{_release_file(number)}"


def _release_file(number: int) -> str:
    return f"{number:06}.json"


def _listed_after(name: str, number: int) -> str | None:
    """The key from which on a listing has all later releases."""
    return _release_key(name, number) if 0 < number <= LAST_SORTED else None


def _numbers(files: list[str], after: int) -> list[int]:
    """The releases later than `after`, ascending."""
    matches = (_RELEASE_FILE.fullmatch(file) for file in files)
    return sorted(number for match in matches if match and (number := int(match[1])) > after)


def _read_release(name: str, number: int, data: bytes) -> Release:
    try:
        return Release.read(data)
    except ValueError as error:
        raise CorruptVersion(f"release {number} of adapter {name!r} is damaged") from error
