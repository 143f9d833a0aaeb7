"""What routes are given. Coroutines, since FastAPI would hand plain functions to a thread for each request."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Self, TypeVar

from fastapi import Depends, Header, Request
from pydantic import Field
from starlette.types import Receive

from server.engine.engine import Engine
from server.errors import ClientGone
from server.metrics import Metrics
from server.settings import Settings

T = TypeVar("T")

MAX_TIMEOUT_MS = 24 * 60 * 60 * 1000

TIMEOUT_HEADER = "X-Request-Timeout-Ms"

TimeoutMs = Annotated[int, Field(ge=1, le=MAX_TIMEOUT_MS)] | None
"""What that header says, if it is there."""


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


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks a task, as far as the answer depends on it, and what answers. One dependency, for what each costs."""

    engine: Engine
    settings: Settings
    timeout_seconds: float | None
    """How long it waits, if its header says so."""
    receive: Receive
    """Tells when it hangs up. The body has been read."""

    @classmethod
    def of(cls, request: Request, timeout_ms: int | None) -> Self:
        """Who sent a request that may take so long."""
        state = request.app.state
        seconds = None if timeout_ms is None else timeout_ms / 1000
        return cls(state.engine, state.settings, seconds, request.receive)

    async def wait_for(self, work: Awaitable[T]) -> T:
        """What comes of some work, which is cancelled when the client hangs up; ClientGone then.

        Work that is done at once, as a request that is refused, is not watched at all.
        """
        working = asyncio.current_task()
        assert working is not None, "routes run in tasks"
        watching: asyncio.Task[None] | None = None
        gone = False

        def start() -> None:
            nonlocal watching
            watching = asyncio.create_task(watch())

        async def watch() -> None:
            nonlocal gone
            while (await self.receive())["type"] != "http.disconnect":
                pass
            gone = True
            working.cancel()

        starting = asyncio.get_running_loop().call_soon(start)
        try:
            return await work
        except asyncio.CancelledError:
            if gone and working.uncancel() == 0:
                raise ClientGone("the client closed the connection") from None
            raise
        finally:
            starting.cancel()
            if watching is not None:
                watching.cancel()


async def get_client(
    request: Request,
    timeout_ms: Annotated[
        TimeoutMs,
        Header(
            alias=TIMEOUT_HEADER,
            description="How long the answer may take, in milliseconds; then 504.",
        ),
    ] = None,
) -> Client:
    """The client of a route that runs tasks."""
    return Client.of(request, timeout_ms)


ClientDep = Annotated[Client, Depends(get_client)]
EngineDep = Annotated[Engine, Depends(get_engine)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
