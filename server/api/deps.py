"""What routes are given. Coroutines, since FastAPI would hand plain functions to a thread for each request."""

import asyncio
from collections.abc import AsyncIterator
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


async def while_connected(request: Request) -> AsyncIterator[None]:
    """Gives the request up when its client hangs up. For routes that change nothing.

    To be depended on with scope="function", so that it ends before the answer is sent: then the connection's end means
    nothing any more.
    """
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


MAX_TIMEOUT_MS = 24 * 60 * 60 * 1000

TimeoutDep = Annotated[
    int | None,
    Header(
        alias="X-Request-Timeout-Ms",
        ge=1,
        le=MAX_TIMEOUT_MS,
        description="How long the answer may take, in milliseconds; then 504. The body's `timeout_ms` does the same; "
        "the smaller one counts.",
    ),
]
EngineDep = Annotated[Engine, Depends(get_engine)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
