"""Which adapters the caller of the engine may know of. Who that is, and why, is the business of what is above."""

from typing import Protocol


class Access(Protocol):
    """Asked at every entrance of the engine, in the context of the request."""

    def require(self, *names: str) -> None:
        """Raises Forbidden for an adapter out of reach, whether it exists or not."""

    def require_all(self, what: str) -> None:
        """Raises Forbidden where anything is out of reach."""

    def sees(self, name: str) -> bool:
        """Whether an adapter may be listed."""


class _Everything:
    """All may be reached."""

    def require(self, *names: str) -> None:
        """Nothing is out of reach."""

    def require_all(self, what: str) -> None:
        """Nothing is out of reach."""

    def sees(self, name: str) -> bool:
        """Yes."""
        return True


EVERYTHING: Access = _Everything()
