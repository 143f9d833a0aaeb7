"""The key that commands send to a server."""

from typing import Annotated

import typer

KEY_VARIABLE = "ADAPTERD_API_KEY"


def _check(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise typer.BadParameter("a key is not empty, and has no spaces and nothing but ASCII characters")
    return key


ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar=KEY_VARIABLE,
        show_envvar=False,
        callback=_check,
        help=f"The server's key. Better in {KEY_VARIABLE}: everybody here sees command lines.",
    ),
]


def bearer(key: str | None) -> dict[str, str]:
    """The headers that carry a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
