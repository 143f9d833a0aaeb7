"""Hugging Face's text-embeddings-inference (TEI): /predict, /embed, /info, /health below /tei.

TEI serves one model, so its clients name none: the adapter stands in their base URL (`/tei/NAME`), in the query or a
header called `adapter`, or as `model` in the body. Without any, /embed is the backbone alone. Shapes and errors as in
TEI's router/src/http/{server,types}.rs.
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Header, Response
from pydantic import BaseModel, Discriminator, Field, Tag

import server
from server.api.compat.common import ask, error_answers, refused
from server.api.deps import ClientDep, EngineDep, SettingsDep
from server.api.schemas import Body, ErrorBody
from server.api.task_schemas import Text, Texts
from server.core import Activation, ClassifyOptions, EmbedOptions, Pooling, Route, TaskAnswer, TextInput
from server.engine.engine import Engine
from server.errors import InvalidRequest
from server.settings import Settings


class TeiError(BaseModel):
    """An error."""

    error: str
    error_type: str


TYPES: Mapping[int, str] = {424: "Backend", 429: "Overloaded", 500: "Backend", 503: "Unhealthy"}
"""Status -> type, of what is not `Validation`."""


def shape(status: int, body: ErrorBody) -> tuple[int, dict[str, Any]]:
    """An error as TEI answers it: 424 where a model does something else, or fails on a text."""
    if status in (409, 507) or (status == 500 and body.code != "internal_error"):
        status = 424
    return status, TeiError(error=body.message, error_type=TYPES.get(status, "Validation")).model_dump()


router = APIRouter(prefix="/tei", tags=["text-embeddings-inference"], responses=error_answers(TeiError))


async def _named(adapter: str | None = None, header: Annotated[str | None, Header(alias="adapter")] = None) -> set[str]:
    """The adapter in the path or the query, and the one in the header."""
    return {name for name in (adapter, header) if name is not None}


NamedDep = Annotated[set[str], Depends(_named)]


def _only(named: set[str], model: str | None = None) -> str | None:
    names = named | ({model} if model is not None else set())
    if len(names) > 1:
        raise InvalidRequest(f"the request names several adapters: {', '.join(sorted(names))}", param="adapter")
    return next(iter(names), None)


class _TeiBody(Body):
    model: str | None = Field(None, description="The adapter.")
    truncate: bool | None = Field(None, description="Texts that are too long are cut, unless this is false.")
    truncation_direction: Literal["right", "Right"] = Field("Right", description="Texts are cut at their end.")


Sequence = Annotated[list[Text], Field(min_length=1, max_length=2)]
Batch = Annotated[list[Sequence], Field(min_length=1)]


def _kind(inputs: Any) -> str:
    if isinstance(inputs, str):
        return "text"
    return "pair" if isinstance(inputs, list) and inputs and isinstance(inputs[0], str) else "batch"


class PredictBody(_TeiBody):
    """Texts or pairs to classify."""

    inputs: Annotated[
        Annotated[Text, Tag("text")] | Annotated[Sequence, Tag("pair")] | Annotated[Batch, Tag("batch")],
        Discriminator(_kind),
    ] = Field(description='`"text"`, `["text", "text_pair"]`, or a list of `["text"]` and such pairs.')
    raw_scores: bool = False

    def sequences(self) -> tuple[list[TextInput], bool]:
        """The texts and pairs; and whether they came as a list of them."""
        if isinstance(self.inputs, str):
            return [TextInput(self.inputs)], False
        many = isinstance(self.inputs[0], list)
        rows = cast(list[list[str]], self.inputs if many else [self.inputs])
        return [TextInput(row[0], row[1] if len(row) > 1 else None) for row in rows], many


class EmbedBody(_TeiBody):
    """Texts to embed."""

    inputs: Texts
    normalize: bool = True
    dimensions: int | None = Field(None, ge=1)
    prompt_name: Annotated[None, refused("adapters have no prompts: put it before the text")] = None


class TeiLabel(BaseModel):
    """A label and its score."""

    score: float
    label: str


class TeiInfo(BaseModel):
    """What answers. Fields of TEI's that would mean nothing here are null or left out."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, dict[str, Any]]
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool = True
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


@router.post("/predict")
@router.post("/{adapter}/predict")
async def predict(
    body: PredictBody, named: NamedDep, client: ClientDep, response: Response
) -> list[TeiLabel] | list[list[TeiLabel]]:
    """Classify a text, a pair of texts, or a list of them."""
    started = time.perf_counter()
    adapter = _only(named, body.model)
    if adapter is None:
        raise InvalidRequest("the path, ?adapter= or model has to name an adapter", param="adapter")
    options = ClassifyOptions(activation=Activation.NONE if body.raw_scores else None)
    truncate = body.truncate is not False
    inputs, many = body.sequences()
    answer = await ask(Route.CLASSIFY, adapter, inputs, options, client, truncate=truncate)
    _tell(response, answer, started)
    labels = [[TeiLabel(score=one.score, label=one.label) for one in own] for own in answer.predictions]
    return labels if many else labels[0]


@router.post("/embed")
@router.post("/{adapter}/embed")
async def embed(body: EmbedBody, named: NamedDep, client: ClientDep, response: Response) -> list[list[float]]:
    """Make vectors of texts."""
    started = time.perf_counter()
    options = EmbedOptions(body.normalize, body.dimensions)
    inputs = list(map(TextInput, body.inputs))
    truncate = body.truncate is not False
    answer = await ask(Route.EMBED, _only(named, body.model), inputs, options, client, truncate=truncate)
    _tell(response, answer, started)
    return list(answer.predictions)


@router.get("/info")
@router.get("/{adapter}/info")
async def info(named: NamedDep, engine: EngineDep, settings: SettingsDep) -> TeiInfo:
    """What answers, and what it takes."""
    return await described(_only(named), engine, settings)


@router.get("/health", response_class=Response)
@router.get("/{adapter}/health", response_class=Response)
async def health(named: NamedDep, engine: EngineDep) -> Response:
    """200 where requests can be answered."""
    if (adapter := _only(named)) is not None:
        await engine.profile(adapter)
    return healthy(engine)


def healthy(engine: Engine) -> Response:
    """An empty answer. Raises what keeps requests from being answered."""
    engine.check_ready()
    return Response()


async def described(adapter: str | None, engine: Engine, settings: Settings) -> TeiInfo:
    """An adapter, or the backbone alone, as TEI describes its model."""
    profile = None if adapter is None else await engine.profile(adapter)
    spec = engine.spec
    kind: dict[str, dict[str, Any]] = {"embedding": {"pooling": Pooling.MEAN}}
    if profile is not None:
        kind = {profile.task.name: {}}
        if profile.task.route is Route.CLASSIFY:
            ids = {label: index for index, label in enumerate(profile.labels)}
            kind = {"classifier": {"id2label": {str(index): label for label, index in ids.items()}, "label2id": ids}}
    return TeiInfo(
        model_id=spec.name,
        model_sha=profile.version if profile else None,
        model_dtype=engine.dtype,
        served_model_name=profile.name if profile else spec.name,
        model_type=kind,
        max_input_length=spec.max_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_client_batch_size=settings.max_inputs,
        tokenization_workers=settings.tokenizer_threads,
        version=server.__version__,
    )


def _tell(response: Response, answer: TaskAnswer, started: float) -> None:
    response.headers["x-compute-tokens"] = str(answer.tokens)
    response.headers["x-total-time"] = str(round(1000 * (time.perf_counter() - started)))
