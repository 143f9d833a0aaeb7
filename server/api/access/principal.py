"""Who asks, and what they may do."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from server.errors import Forbidden

EVERYTHING = "*"


class Scope(StrEnum):
    """What a route is for."""

    INFER = "infer"
    """Asking adapters."""
    ADMIN = "admin"
    """Uploading, releasing and removing adapters; it does not include the others."""
    METRICS = "metrics"
    """Reading /metrics."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    name: str
    """For the audit log and the rate limit; never a secret."""
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] = (EVERYTHING,)
    """Patterns of the names that it may reach: `*` and `?` and `[...]`, as in a shell."""
    requests_per_minute: int | None = None

    def reaches(self, adapter: str) -> bool:
        """Whether it may know of an adapter."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    @property
    def reaches_all(self) -> bool:
        """Whether nothing is hidden from it."""
        return EVERYTHING in self.adapters


ANYONE = Principal("anyone", frozenset(Scope))
"""Where no keys are set; and the server itself, outside of requests."""

NOBODY = Principal("nobody", frozenset(), ())
"""Who has not been asked, on the routes that take no key: there is nothing for them to learn about adapters."""

_current: ContextVar[Principal] = ContextVar("principal", default=ANYONE)

_asked: ContextVar[list[str] | None] = ContextVar("asked", default=None)


def current() -> Principal:
    """Whose request this is."""
    return _current.get()


@contextmanager
def acting(principal: Principal) -> Iterator[None]:
    """Inside, and in all tasks and threads that are started there, the request is the principal's."""
    token = _current.set(principal)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def noted() -> Iterator[list[str]]:
    """Notes the adapters that are asked for inside, those out of reach as well."""
    names: list[str] = []
    token = _asked.set(names)
    try:
        yield names
    finally:
        _asked.reset(token)


def made_by() -> str:
    """Who a release says that it was made by."""
    who = current()
    return "http" if who is ANYONE else f"http {who.name}"


class CallersAccess:
    """The engine's view of the caller: see server.engine.access."""

    def require(self, *names: str) -> None:
        """Raises Forbidden for a name out of the caller's reach, whether there is such an adapter or not."""
        who, asked = current(), _asked.get()
        if asked is not None:
            asked += [name for name in names if name not in asked]
        for name in names:
            if not who.reaches(name):
                raise Forbidden(f"key {who.name!r} does not reach adapter {name[:140]!r}", param="adapter")

    def require_all(self, what: str) -> None:
        """Raises Forbidden for a caller who reaches some adapters only."""
        if not current().reaches_all:
            raise Forbidden(f"{what} takes a key that reaches all adapters")

    def sees(self, name: str) -> bool:
        """Whether the caller may know of an adapter."""
        return current().reaches(name)
