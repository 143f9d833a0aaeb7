"""How answers leave the process."""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

GATHERED_BYTES = 64 * 1024
"""What is more is sent at once, so that uvicorn hears of a client that does not read."""


class Gathering:
    """A transport that sends what is written to it in one turn of the event loop in one piece.

    uvicorn writes the head of an answer and its body one after the other. Each piece is a call of the operating system
    and a packet that wakes the client, which has no use for either alone.
    """

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._waiting: list[bytes] = []

    def write(self, data: bytes) -> None:
        """In a moment, with what else there is by then."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.append(data)
        if sum(map(len, self._waiting)) > GATHERED_BYTES:
            self._send()

    def close(self) -> None:
        """Once all has been sent."""
        self._send()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """All else is the transport's."""
        return getattr(self._transport, name)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and not self._transport.is_closing():  # the client may have gone meanwhile
            self._transport.writelines(waiting)


class Protocol(HttpToolsProtocol):
    """uvicorn's, over a transport that gathers."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        gathering = Gathering(cast(asyncio.WriteTransport, transport))
        super().connection_made(cast(asyncio.Transport, gathering))
