"""Manager: what can be done with adapters, whether a server does it or this process on a store."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from server.api.schemas import (
    AdapterDetail,
    AdapterList,
    CollectAnswer,
    CollectBody,
    DeleteAnswer,
    PinAnswer,
    ReleaseAnswer,
    ReleaseBody,
    ReleaseList,
    RollbackBody,
    UploadAnswer,
    VersionInfo,
)
from server.errors import AdapterdError, UnknownAdapter, UnknownVersion
from server.store.report import Report

PREFIX = re.compile(r"[0-9a-f]{6,64}")
"""A version, or the beginning of one."""

WHOLE = 64
"""Digits of a version."""

NAMED = 4
"""Versions that an error names at most."""


_NONE_STORED = "no version of adapter {!r} is stored"


class WrongUse(AdapterdError):
    """What the command line says makes no sense."""


class Unreachable(AdapterdError):
    """Nobody answers: there is no point in asking for something else."""


@dataclass(frozen=True, slots=True)
class Push:
    """A checkpoint to upload, and what is to become of it."""

    files: Sequence[tuple[str, Path]]
    """Names and files."""
    labels: Sequence[str] | None = None
    eval: Path | None = None
    release: bool = True
    force: bool = False
    note: str = ""


class Manager(Protocol):
    """Answers as HTTP gives them. Everything raises AdapterdError, with the words of whoever refuses, and OSError for a
    file that cannot be read."""

    def close(self) -> None:
        """Ends its connections, its threads and its event loop."""

    def adapters(self) -> AdapterList:
        """All that serve, by name, on one page."""

    def detail(self, name: str) -> AdapterDetail:
        """An adapter that serves. Raises UnknownAdapter."""

    def versions(self, name: str) -> list[VersionInfo]:
        """What is stored of an adapter, the latest first; nothing for a name that nobody used."""

    def releases(self, name: str, limit: int) -> ReleaseList:
        """The last releases, the latest first. Raises UnknownAdapter for a name without any."""

    def push(self, name: str, push: Push) -> UploadAnswer:
        """Uploads, proves, stores and releases."""

    def release(self, name: str, body: ReleaseBody, *, force: bool) -> ReleaseAnswer:
        """Says what serves from here on. With `force` also what nobody has proven."""

    def rollback(self, name: str, body: RollbackBody) -> ReleaseAnswer:
        """Serves again what served before."""

    def delete(self, name: str, note: str) -> DeleteAnswer:
        """Takes an adapter out of service."""

    def pin(self, name: str) -> PinAnswer:
        """From here on every server keeps the adapter in memory."""

    def unpin(self, name: str) -> PinAnswer:
        """The opposite of pin."""

    def collect(self, body: CollectBody) -> CollectAnswer:
        """Removes versions that no recent release names."""

    def verify(self, name: str, version: str) -> Report | None:
        """Reads a stored version again and raises what is wrong with it; the report of proving it, or its old one."""


class Overview(BaseModel):
    """What is known under a name."""

    adapter: AdapterDetail | None
    """None where nothing serves."""
    versions: list[VersionInfo]
    releases: list[ReleaseAnswer]


def overview(manager: Manager, name: str, limit: int) -> Overview:
    """An adapter with its versions and its last releases. Raises UnknownAdapter where there is nothing at all."""
    adapter: AdapterDetail | None = None
    releases: list[ReleaseAnswer] = []
    missing: UnknownAdapter | None = None
    try:
        adapter = manager.detail(name)
    except UnknownAdapter as error:  # deleted, or uploaded and not released yet: the rest is worth knowing
        missing = error
    versions = manager.versions(name)
    try:
        releases = manager.releases(name, limit).releases
    except UnknownAdapter:
        if missing and not versions:
            raise missing from None
    return Overview(adapter=adapter, versions=versions, releases=releases)


def whole_version(manager: Manager, name: str, prefix: str) -> str:
    """The stored version that begins like this. Raises WrongUse for what is no prefix, or that of several versions."""
    digits = prefix.lower()
    if not PREFIX.fullmatch(digits):
        raise WrongUse(f"version {prefix!r}: the first 6 hexadecimal digits are needed, or more of the 64")
    if len(digits) == WHOLE:
        return digits  # whether there is one is for others to say, in their words
    stored = [one.version for one in manager.versions(name)]
    found = [version for version in stored if version.startswith(digits)]
    if not stored:
        raise UnknownVersion(_NONE_STORED.format(name))
    if not found:
        raise UnknownVersion(f"no version of adapter {name!r} begins with {digits}")
    if len(found) > 1:
        raise WrongUse(
            f"{len(found)} versions of adapter {name!r} begin with {digits}: {', '.join(found[:NAMED])}"
            f"{', ...' if len(found) > NAMED else ''}"
        )
    return found[0]


class Checked(BaseModel):
    """What became of verifying one version."""

    adapter: str
    version: str | None
    """None where it cannot even be told which versions there are."""
    report: Report | None
    """What proving it gave; straight on a store, what a server once found."""
    error: str | None
    """None where nothing is wrong."""


def verify(manager: Manager, names: Sequence[str], *, all_versions: bool) -> Iterator[Checked]:
    """Checks what each adapter's last release names, or everything that is stored of it; goes on where one is bad."""
    for name in names:
        try:
            versions = _versions_of(manager, name, all_versions=all_versions)
        except Unreachable:
            raise
        except AdapterdError as error:
            yield Checked(adapter=name, version=None, report=None, error=error.message)
            continue
        for version in versions:
            yield verify_one(manager, name, version)


def verify_one(manager: Manager, name: str, version: str) -> Checked:
    """Checks one version."""
    try:
        report = manager.verify(name, version)
    except Unreachable:
        raise
    except AdapterdError as error:
        return Checked(adapter=name, version=version, report=None, error=error.message)
    return Checked(adapter=name, version=version, report=report, error=None)


def _versions_of(manager: Manager, name: str, *, all_versions: bool) -> list[str]:
    if all_versions:
        stored = [one.version for one in manager.versions(name)]
        if not stored:
            raise UnknownVersion(_NONE_STORED.format(name))
        return stored
    [last] = manager.releases(name, 1).releases
    if not last.traffic:
        raise UnknownAdapter(f"adapter {name!r} was deleted in release {last.release}")
    return [*last.traffic, *last.shadow]
