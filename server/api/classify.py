"""POST /classify: the main job."""

from asgi_correlation_id import correlation_id
from fastapi import APIRouter

from server.api.deps import EngineDep, SettingsDep
from server.api.errors import RESPONSES
from server.api.schemas import ClassifyAnswer, ClassifyBody, Usage
from server.core import ClassifyRequest
from server.errors import TooLarge

router = APIRouter(tags=["tasks"], responses=RESPONSES)


@router.post("/classify")
async def classify(body: ClassifyBody, engine: EngineDep, settings: SettingsDep) -> ClassifyAnswer:
    """Classify texts with the adapter that the request names."""
    if len(body.inputs) > settings.max_inputs:
        raise TooLarge(
            f"{len(body.inputs)} inputs in one request, at most {settings.max_inputs} are taken",
            param="inputs",
            code="too_many_inputs",
        )
    answer = await engine.classify(
        ClassifyRequest(
            body.adapter,
            tuple(body.inputs),
            body.truncate,
            body.top_k,
            body.version,
            body.routing_key if body.routing_key is not None else correlation_id.get() or "",
        )
    )
    return ClassifyAnswer(
        adapter=answer.ref.name,
        version=answer.ref.version,
        release=answer.ref.release,
        backbone=answer.backbone,
        predictions=answer.predictions,
        truncated=answer.truncated,
        usage=Usage(tokens=answer.tokens),
    )
