"""create_app: where everything is put together. Nothing happens at import."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import Random

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.types import Scope

import server
from server.api import admin, compat, debugging, errors, health, tasks
from server.api.access.audit import Audit
from server.api.access.gate import TAKES, Authenticate, Gate, route_path
from server.api.access.principal import CallersAccess
from server.api.access.principal import Scope as Right
from server.api.middleware import LimitBody, Observe
from server.backbone.backbone import Backbone
from server.core import StoreCall
from server.engine.engine import Engine
from server.errors import BadConfiguration
from server.metrics import Metrics
from server.settings import Settings
from server.store.store import AdapterStore
from server.tracing import OFF, Tracing, exporters

UNTRACED = frozenset(route.partition(" ")[2] for right in (None, Right.METRICS) for route in TAKES[right])
"""Probes and scrapes come every few seconds, and nobody looks at their traces."""

NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    # Of its steps there are ours; metrics go to Prometheus; its logs hold what clients send.
    "operation_spans": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
}
"""FastAPI's own, which would speak to whatever OpenTelemetry is set up in the process."""


def create_app(
    settings: Settings,
    *,
    backbone: Backbone | None = None,
    store: AdapterStore | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application over the backbone and the store of its settings, and with the traces that OpenTelemetry's
    environment variables ask for, unless others are given.

    Raises BackboneError or StoreUnavailable where one of them cannot be had, BadConfiguration where nobody is asked for
    a key though others than this machine can ask, and for traces that cannot be had.
    """
    if tracing is None:
        tracing = _tracing(exporters(os.environ))
    gate = Gate.load(settings, tracing=tracing)
    metrics = Metrics(settings.metrics_adapters)

    def observe(call: StoreCall) -> None:
        metrics.store_call(call)
        tracing.store_call(call)

    store = store or AdapterStore.open(
        settings.store,
        endpoint=settings.store_endpoint,
        timeout_seconds=settings.store_timeout_seconds,
        observe=observe,
    )
    backbone = backbone or Backbone.load(settings.backbone, device=settings.device, dtype=settings.dtype)
    engine = Engine(backbone, store, settings, metrics, access=CallersAccess(), tracing=tracing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        following = asyncio.create_task(gate.follow(metrics.keys_reread))
        yield
        following.cancel()
        engine.stop()
        await asyncio.to_thread(tracing.stop)

    app = FastAPI(
        title="adapterd",
        version=server.__version__,
        lifespan=lifespan,
        telemetry={
            **NO_TELEMETRY,
            "tracing": tracing.provider is not None,
            "tracer_provider": tracing.provider,
            "exclude": lambda scope: route_path(scope) in UNTRACED,
        },
    )
    app.state.engine = engine
    app.state.backbone = backbone
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.asks_for_keys = gate.closed
    # FastAPI looks for an included router's route twice for each request. These are the application's own: what
    # FastAPI(...) may be told to do to all routes does not reach them.
    app.router.routes.extend(tasks.router.routes)
    for router in (admin.router, debugging.router, health.probes, health.router, *compat.ROUTERS):
        app.include_router(router)
    errors.install(app, compat.SHAPES)
    app.add_middleware(LimitBody, limit=partial(_body_limit, settings))
    app.add_middleware(Authenticate, gate=gate, refuse=errors.answer(compat.SHAPES))
    app.add_middleware(Audit)
    app.add_middleware(Observe, metrics=metrics, tracing=tracing)
    # outermost, so that every line has the id
    app.add_middleware(CorrelationIdMiddleware, validator=_is_request_id, generator=_request_ids())
    return app


def create_metrics_app(app: FastAPI) -> FastAPI:
    """The series and probes of an application, for `ADAPTERD_METRICS_PORT`, where nobody is asked for a key: so it has
    these routes and no others, whatever the application learns to do."""
    beside = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, telemetry=NO_TELEMETRY)
    beside.state = app.state
    beside.include_router(health.probes)
    errors.install(beside, {})
    return beside


def _tracing(names: list[str]) -> Tracing:
    """Spans to the exporters of these names. Raises BadConfiguration where what makes them is not installed."""
    if not names:
        return OFF
    try:
        from server.otel import OpenTelemetry
    except ImportError as error:
        raise BadConfiguration(
            "traces are asked for (OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER) and need OpenTelemetry: "
            "pip install 'adapterd[otel]', or set OTEL_TRACES_EXPORTER=none",
            param="OTEL_TRACES_EXPORTER",
        ) from error
    return OpenTelemetry.exporting(names)


def _body_limit(settings: Settings, scope: Scope) -> int:
    upload = scope["method"] == "PUT" and scope["path"].startswith(f"{admin.PREFIX}/adapters/")
    return settings.max_upload_bytes if upload else settings.max_body_bytes


def _request_ids() -> Callable[[], str]:
    """Makes ids for requests that bring none. Nothing secret is in them; to ask the operating system for each would let
    go of Python's lock, and the event loop would wait until the device's thread gives it back."""
    numbers = Random(os.urandom(32))
    return lambda: f"{numbers.getrandbits(128):032x}"


def _is_request_id(value: str) -> bool:
    """A client's own X-Request-ID is kept if it can stand in a log line."""
    return len(value) <= 128 and value.isascii() and value.isprintable()
