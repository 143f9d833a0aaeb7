"""For orchestrators and scrapers: /livez /readyz /metrics; for people: /info."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.concurrency import run_in_threadpool

import server
from server.adapters import METHODS
from server.api.deps import EngineDep, MetricsDep, SettingsDep
from server.api.schemas import BackboneInfo, Info, Limits
from server.errors import DeviceStopped
from server.tasks import TASKS

probes = APIRouter(tags=["operations"])
"""What `ADAPTERD_METRICS_PORT` answers as well, without a key: nothing that changes, asks or names who asks."""

router = APIRouter(tags=["operations"])


@probes.get("/livez")
async def livez(engine: EngineDep) -> dict[str, str]:
    """The process answers; 503 where only a restart would help."""
    if engine.crashed:
        raise DeviceStopped("the device's thread has died")
    return {"status": "ok"}


@probes.get("/readyz")
async def readyz(engine: EngineDep) -> dict[str, str]:
    """Requests can be answered, and what they take has been run; 503 where not, and from the moment on that the server
    is told to end."""
    engine.check_ready()
    return {"status": "ready"}


@probes.get("/metrics", response_class=Response)
async def metrics(series: MetricsDep, engine: EngineDep) -> Response:
    """Prometheus series."""
    series.live.snapshot = engine.snapshot()  # here, on the event loop, which owns most of what it looks at
    return Response(await run_in_threadpool(series.render), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/info")
async def info(engine: EngineDep, settings: SettingsDep) -> Info:
    """What this server is and what it takes."""
    spec = engine.spec
    return Info(
        version=server.__version__,
        backbone=BackboneInfo(
            name=spec.name,
            model_type=spec.model_type,
            fingerprint=spec.fingerprint,
            hidden_size=spec.hidden_size,
            layers=spec.num_layers,
            max_tokens=spec.max_tokens,
            device=engine.device,
            dtype=engine.dtype,
            layout=engine.layout,
        ),
        methods=list(METHODS),
        tasks={name: task.route.path for name, task in TASKS.items()},
        limits=Limits(
            max_inputs=settings.max_inputs,
            max_body_bytes=settings.max_body_bytes,
            max_upload_bytes=settings.max_upload_bytes,
            max_batch_tokens=settings.max_batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
        ),
    )
