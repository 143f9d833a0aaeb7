"""API keys: secrets that are kept as digests only."""

import fcntl
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from server.api.access.principal import EVERYTHING, Principal, Scope
from server.errors import BadConfiguration

PREFIX = "adk_"
"""Of every key, so that scanners find one that has leaked."""

SECRET_BYTES = 32
"""As many random bits as the digest has: nothing that could be guessed, so one round of SHA-256 is enough."""


class KeyEntry(BaseModel):
    """A key as it is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._@-]+$")]
    """Whose it is; shown in logs. No colon, so that it is nobody's token (`jwt:...`)."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = (Scope.INFER,)
    adapters: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(min_length=1)] = (
        EVERYTHING,
    )
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None

    def principal(self) -> Principal:
        """Who asks with it."""
        return Principal(self.name, frozenset(self.scopes), self.adapters, self.requests_per_minute)


_ENTRIES = TypeAdapter(list[KeyEntry])


class Keys:
    """All keys of a server."""

    def __init__(self, entries: Sequence[KeyEntry]) -> None:
        """Raises BadConfiguration where two have one name or one secret: the audit log could not tell them apart."""
        for field in ("name", "sha256"):
            values = [getattr(entry, field) for entry in entries]
            if len(set(values)) < len(values):
                index = next(at for at, value in enumerate(values) if value in values[:at])
                raise BadConfiguration(f"API key {index}: another one has the same {field}", param="api_keys")
        self._principals = [(entry.sha256, entry.principal()) for entry in entries]

    def __len__(self) -> int:
        return len(self._principals)

    @property
    def names(self) -> frozenset[str]:
        """Whose they are."""
        return frozenset(principal.name for _, principal in self._principals)

    @classmethod
    def add(cls, file: Path, entry: KeyEntry) -> None:
        """Adds an entry to a file, which is made if there is none. Whoever reads it sees it with or without the entry.

        Raises BadConfiguration for a file that is none of keys, or that has such a name already.
        """
        file = file.resolve()
        try:
            with _locked(file.parent):
                entries = [*(_parsed(file.read_bytes(), str(file)) if file.exists() else []), entry]
                cls(entries)
                _replace(file, _ENTRIES.dump_json(entries, exclude_none=True, indent=1) + b"\n")
        except OSError as error:
            raise BadConfiguration(f"{file}: {error.strerror}", param="api_keys_file") from error

    def find(self, key: str) -> Principal | None:
        """Who asks with this key. Each kept digest is compared, in a time that says nothing about it."""
        digest = digest_of(key)
        found = None
        for known, principal in self._principals:
            if hmac.compare_digest(known, digest):
                found = principal
        return found


class KeySource:
    """Where a server's keys come from: a JSON file, which may change while the server runs, and JSON, both lists."""

    def __init__(self, file: Path | None, inline: str | None) -> None:
        self._file = file
        self._inline = inline
        self._last: bytes | str | None = None
        """What the file held at the last reading, or why it could not be read."""

    @property
    def may_change(self) -> bool:
        """Whether there is anything to look at again."""
        return self._file is not None

    def read(self) -> Keys | None:
        """All keys; None where the file is as it was at the last reading.

        Raises BadConfiguration, once for each state of the file, naming what is wrong and never a value.
        """
        if self._file is None:
            return Keys(self._beside())
        now = _contents(self._file)
        if now == self._last:
            return None
        self._last = now
        if isinstance(now, str):
            raise BadConfiguration(now, param="api_keys_file")
        return Keys([*_parsed(now, str(self._file)), *self._beside()])

    def _beside(self) -> list[KeyEntry]:
        return [] if self._inline is None else _parsed(self._inline.encode(), "ADAPTERD_API_KEYS")


def digest_of(key: str) -> str:
    """What is kept of a key: the hex SHA-256 of its bytes."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A key that nobody has yet."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def _contents(file: Path) -> bytes | str:
    """What it holds, or why it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        return f"{file}: {error.strerror}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else who asks for the same is inside at the same time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(file: Path, data: bytes) -> None:
    """Whole or not at all, and for its owner alone."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # makes it with mode 600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _parsed(data: bytes, source: str) -> list[KeyEntry]:
    try:
        return _ENTRIES.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # The last part of the place of an unknown field is its name, which a secret may have slipped into.
        place = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
        where = ".".join(map(str, place))
        reason = "no JSON list of keys" if first["type"] == "json_invalid" else first["msg"]
        raise BadConfiguration(f"{source}: {f'{where}: ' if where else ''}{reason}", param="api_keys") from None
