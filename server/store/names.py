"""What adapters and versions may be called."""

import re

from server.errors import InvalidRequest

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,127}")
VERSION_PATTERN = r"^[0-9a-f]{64}$"
_VERSION = re.compile(VERSION_PATTERN)


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
    """A version as a store gives it: 64 lower-case hexadecimal digits."""
    if not _VERSION.fullmatch(version):
        raise InvalidRequest(
            f"version {version[:80]!r} is not 64 hexadecimal digits", param="version", code="invalid_version"
        )
    return version
