"""OpenAI's API: /v1/embeddings and /v1/models."""

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field

from server.api.compat.common import CLIENT_ERRORS, ask, error_answers
from server.api.deps import ClientDep, EngineDep
from server.api.schemas import Body, ErrorBody
from server.api.task_schemas import Texts
from server.core import EmbedOptions, Route, TextInput
from server.engine.engine import Described, Engine


class OpenAIErrorInfo(BaseModel):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """An error."""

    error: OpenAIErrorInfo


CODES: Mapping[str, str] = {
    "adapter_not_found": "model_not_found",
    "unauthorized": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
}
"""Our codes of errors -> OpenAI's, of those that it has another name for."""


def shape(status: int, body: ErrorBody) -> tuple[int, dict[str, Any]]:
    """An error as OpenAI answers it: 400 for whatever is wrong with a request. Its clients would try 409 again."""
    code = CODES.get(body.code, body.code)
    info = OpenAIErrorInfo(message=body.message, type=body.type, param=body.param, code=code)
    return CLIENT_ERRORS.get(status, status), OpenAIError(error=info).model_dump()


router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=error_answers(OpenAIError))

MAX_MODELS = 1000
"""Adapters in a list of models, which has no pages."""


def _no_tokens(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise ValueError("arrays of tokens are not taken, since they are another tokenizer's: send texts")
    return value


class EmbeddingsBody(Body):
    """Texts to embed."""

    model: str = Field(description="An adapter, or the backbone's name: the backbone alone.")
    input: Annotated[Texts, BeforeValidator(_no_tokens)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=1024, description="Has the same version while shares of traffic stay.")


class OpenAIEmbedding(BaseModel):
    """A vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="As base64: float32, the lowest byte first.")


class OpenAIUsage(BaseModel):
    """What the request cost."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddings(BaseModel):
    """The vectors of all texts."""

    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    """An adapter, or the backbone; with the fields that vLLM adds."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "adapterd"
    root: str = Field(description="Of an adapter: the version with most of its traffic.")
    parent: str | None = Field(description="Of an adapter: the backbone.")
    permission: list[dict[str, Any]] = []


class OpenAIModels(BaseModel):
    """The backbone and the adapters."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]
    has_more: bool = Field(description="Whether there are more adapters than a list shows: GET /admin/adapters.")


@router.post("/embeddings")
async def embeddings(body: EmbeddingsBody, client: ClientDep) -> OpenAIEmbeddings:
    """Make vectors of texts. One that is too long is an error: the answer could not say that it was cut."""
    adapter = None if body.model == client.engine.spec.name else body.model
    options = EmbedOptions(dimensions=body.dimensions)
    inputs = list(map(TextInput, body.input))
    answer = await ask(Route.EMBED, adapter, inputs, options, client, truncate=False, routing_key=body.user)
    encode = _base64 if body.encoding_format == "base64" else list
    return OpenAIEmbeddings(
        data=[OpenAIEmbedding(index=index, embedding=encode(own)) for index, own in enumerate(answer.predictions)],
        model=body.model,
        usage=OpenAIUsage(prompt_tokens=answer.tokens, total_tokens=answer.tokens),
    )


@router.get("/models")
async def models(engine: EngineDep) -> OpenAIModels:
    """The backbone, and the adapters by name."""
    page = await engine.page(limit=MAX_MODELS)
    adapters = [_adapter(one, engine) for one in page.adapters]
    return OpenAIModels(data=[_backbone(engine), *adapters], has_more=page.next is not None)


@router.get("/models/{name:path}")
async def model(name: str, engine: EngineDep) -> OpenAIModel:
    """The backbone or an adapter."""
    if name == engine.spec.name:
        return _backbone(engine)
    described, _, _ = await engine.describe(name)
    return _adapter(described, engine)


def _backbone(engine: Engine) -> OpenAIModel:
    return OpenAIModel(id=engine.spec.name, created=int(time.time()), root=engine.spec.name, parent=None)


def _adapter(described: Described, engine: Engine) -> OpenAIModel:
    return OpenAIModel(
        id=described.name,
        created=int(described.release.created_at.timestamp()),
        root=described.version,
        parent=engine.spec.name,
    )


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
