"""For people who look into a running server: how much it logs, and what ran last on its device."""

from typing import Annotated

from fastapi import APIRouter, Query

from server import logs
from server.api.access.principal import CallersAccess
from server.api.admin import PREFIX
from server.api.deps import EngineDep
from server.api.errors import RESPONSES
from server.api.schemas import BatchInfo, BatchList, LogLevelAnswer, LogLevelBody
from server.engine.recent import KEPT

router = APIRouter(prefix=PREFIX, tags=["admin"], responses=RESPONSES)


@router.put("/log-level")
async def set_log_level(body: LogLevelBody) -> LogLevelAnswer:
    """Log more or less from here on. The next start has the level of its settings again."""
    CallersAccess().require_all("how much is logged")
    return LogLevelAnswer(level=body.level, before=logs.set_level(body.level))


@router.get("/debug/batches")
async def list_batches(engine: EngineDep, limit: Annotated[int, Query(ge=1, le=KEPT)] = KEPT) -> BatchList:
    """The batches that ran last: whose rows, how long, how long they waited. No texts."""
    return BatchList(batches=[BatchInfo.model_validate(batch) for batch in engine.recent_batches(limit)])
