"""AdapterStore: names, immutable versions, append-only releases, over any object store.

    <name>/versions/<sha256 of the content>/{manifest.json, adapter.safetensors}    immutable
    <name>/releases/<000001>.json                                                   append-only

The highest release serves. A release is created with the store's create-only put, of which exactly one writer of a
number succeeds; so there is no lock, no torn write and no lost update, and the log is the audit trail.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import Conflict, CorruptVersion, InvalidRequest, StoreUnavailable, UnknownAdapter
from server.logs import get_logger
from server.store.artifact import MANIFEST, TENSORS, Artifact

log = get_logger("adapterd.store")

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,127}")
VERSION = re.compile(r"^[0-9a-f]{64}$")
_RELEASE_FILE = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.json")


def check_name(name: str) -> str:
    """An adapter's name: letters, digits and `._-`, so that it is the same in a URL, a path and a metric."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"adapter name {name[:140]!r} is not allowed: 1 to 128 letters, digits, '.', '_' or '-', starting with a "
            "letter or digit, without '..'",
            param="name",
            code="invalid_name",
        )
    return name


def check_version(version: str) -> str:
    """A version as `put_version` gives it: 64 lower-case hexadecimal digits."""
    if not VERSION.fullmatch(version):
        raise InvalidRequest(
            f"version {version[:80]!r} is not 64 hexadecimal digits", param="version", code="invalid_version"
        )
    return version


class Release(BaseModel):
    """Which version serves from here on. An adapter whose last release has no traffic is deleted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1)
    traffic: dict[Annotated[str, Field(pattern=VERSION.pattern)], float] = Field(max_length=1)
    """version -> share of the requests, adding up to 1; empty after a deletion."""
    created_at: datetime
    by: str
    note: str = ""

    @property
    def version(self) -> str | None:
        """The version that serves; None where the adapter is deleted."""
        return next(iter(self.traffic), None)


class AdapterStore:
    """Blocking calls; the engine makes them away from the event loop. Thread-safe, as obstore's stores are."""

    def __init__(self, objects: ObjectStore) -> None:
        """Any obstore store; all keys are below its prefix."""
        self._objects = objects

    @classmethod
    def open(cls, url: str) -> "AdapterStore":
        """A folder (made if it is not there), `file:///absolute/folder` or `memory://`."""
        if url == "memory://":
            return cls(MemoryStore())
        if url.startswith("file:///"):
            folder = Path(unquote(url.removeprefix("file://")))
        elif url and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
            folder = Path(url).expanduser()
        else:
            raise InvalidRequest(f"store {url!r} is neither a folder, file:///... nor memory://", param="store")
        try:
            return cls(LocalStore(folder.resolve(), mkdir=True))
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailable(f"store folder {str(folder)!r} cannot be opened: {_brief(error)}") from error

    def names(self) -> list[str]:
        """All names that something is stored under, sorted; deleted ones included."""
        with _reported():
            listing = obstore.list_with_delimiter(self._objects)
        return sorted(name for name in listing["common_prefixes"] if NAME.fullmatch(name))

    def put_version(self, name: str, artifact: Artifact) -> str:
        """Stores a version and returns it. Idempotent: the key is the content's digest."""
        version = artifact.version
        with _reported():
            # The manifest comes last: where it is, the version is whole.
            for file, data in ((TENSORS, artifact.tensor_bytes), (MANIFEST, artifact.manifest_bytes)):
                obstore.put(self._objects, f"{_version_key(name, version)}/{file}", data)
        return version

    def get_version(self, name: str, version: str) -> Artifact:
        """Reads a version and proves that its bytes are the ones that were stored."""
        with _reported():
            try:
                manifest, tensors = (
                    bytes(obstore.get(self._objects, f"{_version_key(name, version)}/{file}").bytes())
                    for file in (MANIFEST, TENSORS)
                )
            except FileNotFoundError as error:
                raise CorruptVersion(f"adapter {name!r} has no whole version {version}") from error
        return Artifact.verify(version, manifest, tensors)

    def releases(self, name: str) -> list[int]:
        """The numbers of an adapter's releases, ascending; empty for a name that was never released."""
        with _reported():
            listing = obstore.list_with_delimiter(self._objects, f"{check_name(name)}/releases")
        files = (_RELEASE_FILE.fullmatch(entry["path"].rpartition("/")[2]) for entry in listing["objects"])
        return sorted(int(match[1]) for match in files if match)

    def get_release(self, name: str, number: int) -> Release:
        """One release of an adapter."""
        try:
            with _reported():
                data = bytes(obstore.get(self._objects, _release_key(name, number)).bytes())
            return Release.model_validate_json(data)
        except FileNotFoundError as error:
            raise UnknownAdapter(f"adapter {name!r} has no release {number}", param="release") from error
        except ValidationError as error:
            raise CorruptVersion(f"release {number} of adapter {name!r} is damaged") from error

    def current(self, name: str) -> Release | None:
        """The release that serves, which may be a deletion; None for a name that was never released."""
        numbers = self.releases(name)
        return self.get_release(name, numbers[-1]) if numbers else None

    def release(self, name: str, version: str | None, *, by: str, note: str = "") -> Release:
        """Makes the next release: `version` takes all traffic, or none does. Raises Conflict if another came first."""
        number = max(self.releases(name), default=0) + 1
        release = Release(
            number=number,
            traffic={check_version(version): 1.0} if version is not None else {},
            created_at=datetime.now(UTC),
            by=by,
            note=note,
        )
        with _reported():
            try:
                data = release.model_dump_json(indent=1).encode() + b"\n"
                obstore.put(self._objects, _release_key(name, number), data, mode="create")
            except AlreadyExistsError as error:
                raise Conflict(f"release {number} of adapter {name!r} was made by somebody else just now") from error
        return release


def _version_key(name: str, version: str) -> str:
    return f"{check_name(name)}/versions/{check_version(version)}"


def _release_key(name: str, number: int) -> str:
    return f"{check_name(name)}/releases/{number:06}.json"


@contextmanager
def _reported() -> Iterator[None]:
    """The store's failures as StoreUnavailable; "not found" stays FileNotFoundError, since it is an answer."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        # The reason names paths and hosts: it is for the operator, not for clients.
        log.error("store failed", error=_brief(error))
        raise StoreUnavailable("the adapter store failed") from error


def _brief(error: Exception) -> str:
    """obstore's messages without the debugging dump that follows them."""
    return str(error).partition("\n")[0]
