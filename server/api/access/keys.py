"""API keys: secrets that are kept as digests only."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
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

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._@:-]+$")]
    """Whose it is; shown in logs."""
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
                raise BadConfiguration(f"two API keys have the same {field}", param="api_keys")
        self._principals = [(entry.sha256, entry.principal()) for entry in entries]

    def __len__(self) -> int:
        return len(self._principals)

    @classmethod
    def load(cls, file: Path | None, inline: str | None) -> "Keys":
        """From a JSON file and from JSON, both lists. Raises BadConfiguration naming what is wrong, never a value."""
        entries: list[KeyEntry] = []
        if file is not None:
            try:
                entries += _parsed(file.read_bytes(), str(file))
            except OSError as error:
                raise BadConfiguration(f"{file}: {error.strerror}", param="api_keys_file") from error
        if inline is not None:
            entries += _parsed(inline.encode(), "ADAPTERD_API_KEYS")
        return cls(entries)

    def find(self, key: str) -> Principal | None:
        """Who asks with this key. Each kept digest is compared, in a time that says nothing about it."""
        digest = digest_of(key)
        found = None
        for known, principal in self._principals:
            if hmac.compare_digest(known, digest):
                found = principal
        return found


def digest_of(key: str) -> str:
    """What is kept of a key: the hex SHA-256 of its bytes."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def new_key() -> str:
    """A key that nobody has yet."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def _parsed(data: bytes, source: str) -> list[KeyEntry]:
    try:
        return _ENTRIES.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = "no JSON list of keys" if first["type"] == "json_invalid" else first["msg"]
        raise BadConfiguration(f"{source}: {f'{where}: ' if where else ''}{reason}", param="api_keys") from None
