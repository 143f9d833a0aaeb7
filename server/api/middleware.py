"""Around every request: one line, one measurement, and a limit to its body."""

import time
from collections.abc import Callable

from asgi_correlation_id import correlation_id
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.logs import get_logger
from server.metrics import Metrics
from server.tracing import Tracing

log = get_logger("adapterd.access")


class Observe:
    """Logs and counts each request under its route's template, so that labels stay few whatever clients ask for; and
    tells the client which trace it is in."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and watches the answer's status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500
        self._tracing.note({"adapterd.request_id": correlation_id.get() or ""})

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if headers := self._tracing.answer_headers():
                    MutableHeaders(scope=message).update(headers)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(seconds * 1000, 1),
                key=scope.get("principal"),
            )


DRAINED_BYTES = 16 * 1024 * 1024
"""How much of a refused body is read and thrown away, so that a client that is still sending gets to read the answer
instead of a broken connection."""


class LimitBody:
    """Answers 413 to a body over its limit, whether it says so in Content-Length or not."""

    def __init__(self, app: ASGIApp, limit: Callable[[Scope], int]) -> None:
        """`limit(scope)`: the most bytes that the body of such a request may have."""
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on; the error is raised from where the body is read, and handled like any other."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope)
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                await _drain(message, receive)
                raise HTTPException(413, f"the body is over the limit of {limit} bytes")
            return message

        await self._app(scope, limited, send)


async def _drain(message: Message, receive: Receive) -> None:
    drained = 0
    while message.get("more_body", False) and drained < DRAINED_BYTES:
        message = await receive()
        drained += len(message.get("body", b""))
