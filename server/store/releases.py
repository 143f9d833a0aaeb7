"""A release: which versions of an adapter get which share of the requests, from here on."""

import hashlib
import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Self

from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from server.store.names import VERSION_PATTERN

MAX_SERVING = 16
MAX_SHADOWS = 4
SHARES_TOLERANCE = 1e-6

KEEP = 10
"""Releases of an adapter whose versions garbage collection keeps, if nobody says otherwise."""

MIN_AGE = timedelta(hours=1)
"""Younger versions it keeps as well: one that was uploaded but not released yet, or that is being uploaded now."""

_DIGEST = b',\n "sha256": "'

_STRICT = ConfigDict(extra="forbid")

Version = Annotated[str, Field(pattern=VERSION_PATTERN)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Plan:
    """Versions and their shares. Without any, the adapter is deleted."""

    traffic: dict[Version, Share] = Field(max_length=MAX_SERVING)
    """version -> share of the requests, adding up to 1; empty after a deletion."""
    shadow: Annotated[tuple[Version, ...], Field(max_length=MAX_SHADOWS)] = ()
    """Versions that compute every request as well, for comparison; their answers go to nobody."""

    @classmethod
    def only(cls, version: str) -> "Plan":
        """One version takes all requests."""
        return Plan(traffic={version: 1.0})

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = math.fsum(self.traffic.values())
        if self.traffic and abs(total - 1) > SHARES_TOLERANCE:
            raise ValueError(f"the shares of traffic add up to {total:g}, not to 1")
        if self.shadow and not self.traffic:
            raise ValueError("a shadow needs a version that serves")
        if len(set(self.versions)) < len(self.versions):
            raise ValueError("a version occurs twice in traffic and shadow")
        return self

    @property
    def versions(self) -> tuple[str, ...]:
        """All that are named."""
        return (*self.traffic, *self.shadow)


DELETED = Plan(traffic={})


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Release(Plan):
    """An entry of an adapter's log. Slots only: a server remembers those of thousands of adapters."""

    number: int = Field(ge=1)
    created_at: datetime
    by: str
    note: str = ""
    restores: int | None = None
    """The release that a roll-back took this plan from."""
    id: str = ""
    """Random, so that a writer knows its own release from another one with the same words."""

    @model_validator(mode="after")
    def _restores_an_earlier_one(self) -> Self:
        if self.restores is not None and self.restores >= self.number:
            raise ValueError("a release can restore earlier ones only")
        return self

    def file(self) -> bytes:
        """As it is stored: JSON, whose last field is a digest of the others."""
        text = _RELEASE.dump_json(self, indent=1, exclude_none=True)
        return text.removesuffix(b"\n}") + _DIGEST + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'

    @classmethod
    def read(cls, data: bytes) -> "Release":
        """The opposite of `file`; ValueError for damaged bytes. Releases of the first days have no digest."""
        before, found, digest = data.rpartition(_DIGEST)
        text = before + b"\n}" if found else data
        if found and digest != hashlib.sha256(text).hexdigest().encode() + b'"\n}\n':
            raise ValueError("the digest is not that of the release")
        return _RELEASE.validate_json(text)

    @property
    def plan(self) -> Plan:
        """What it says of the versions."""
        return Plan(traffic=self.traffic, shadow=self.shadow)

    @property
    def deleted(self) -> bool:
        """Whether the adapter serves no more."""
        return not self.traffic

    @property
    def main_version(self) -> str | None:
        """The version with the largest share, the first of equals; None where the adapter is deleted."""
        return max(self.traffic, key=self.traffic.__getitem__, default=None)


_RELEASE = TypeAdapter(Release)


def choose(name: str, traffic: Mapping[str, float], key: str) -> str:
    """The version that a request with this key gets; the same one whoever asks, while the shares stay.

    Weighted rendezvous hashing: every version draws a number from the key, -ln(u) / share, and the lowest wins. A
    version wins with the probability of its share, and when shares shift, only as many keys move as have to.
    Schindelhauer & Schomaker, "Weighted Distributed Hash Tables", SPAA 2005.
    """
    if len(traffic) == 1:
        return next(iter(traffic))

    def draw(version: str) -> float:
        digest = hashlib.sha256(f"{name}\0{version}\0{key}".encode()).digest()
        return -math.log((int.from_bytes(digest[:7], "big") + 0.5) / 2**56) / traffic[version]

    return min(sorted(traffic), key=draw)
