"""What routes are given. Coroutines, since FastAPI would hand plain functions to a thread for each request."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Annotated

from fastapi import Depends, Header, Request

from server.engine.engine import Engine
from server.errors import ClientGone
from server.metrics import Metrics
from server.settings import Settings


async def get_engine(request: Request) -> Engine:
    """The application's engine."""
    engine: Engine = request.app.state.engine
    return engine


async def get_settings(request: Request) -> Settings:
    """The application's settings."""
    settings: Settings = request.app.state.settings
    return settings


async def get_metrics(request: Request) -> Metrics:
    """The application's metrics."""
    metrics: Metrics = request.app.state.metrics
    return metrics


MAX_TIMEOUT_MS = 24 * 60 * 60 * 1000

_timeout_ms: ContextVar[int | None] = ContextVar("timeout_ms", default=None)


def asked_timeout() -> float | None:
    """How long the client of the request in hand waits, in seconds, if its header says so."""
    asked = _timeout_ms.get()
    return None if asked is None else asked / 1000


async def _patience(
    request: Request,
    timeout_ms: Annotated[
        int | None,
        Header(
            alias="X-Request-Timeout-Ms",
            ge=1,
            le=MAX_TIMEOUT_MS,
            description="How long the answer may take, in milliseconds; then 504.",
        ),
    ] = None,
) -> AsyncIterator[None]:
    """Notes how long the client waits, and gives the request up when it hangs up before that."""
    _timeout_ms.set(timeout_ms)
    working = asyncio.current_task()
    assert working is not None, "routes run in tasks"
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and working.uncancel() == 0:
            raise ClientGone("the client closed the connection") from None
        raise
    finally:
        watching.cancel()


PATIENCE = [Depends(_patience, scope="function")]
"""For routes that run tasks and change nothing: they end with their client's patience.

Over before the answer is sent, since the connection's end means nothing any more then.
"""

EngineDep = Annotated[Engine, Depends(get_engine)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
