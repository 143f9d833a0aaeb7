"""Hugging Face inference: POST /models/{name} for `huggingface_hub.InferenceClient(model=".../models/NAME")`.

Bodies and answers as in huggingface_hub's `inference/_client.py` and `_generated/types`; which of them a body is, the
adapter's task says.
"""

from collections.abc import Awaitable, Callable, Mapping
from operator import mul
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from server.api.compat import tei
from server.api.compat.common import AnyObject, ask, error_answers, parsed, refused
from server.api.deps import Client, ClientDep, EngineDep, SettingsDep
from server.api.schemas import Body, ErrorBody
from server.api.task_schemas import Questions, Text, TextItems, Texts, text_inputs
from server.core import (
    Activation,
    Aggregation,
    AnswerOptions,
    AnswerSpan,
    ClassifyOptions,
    EmbedOptions,
    Entity,
    Route,
    TagOptions,
    TextInput,
)
from server.errors import InvalidRequest


class HubError(BaseModel):
    """An error."""

    error: str


def shape(status: int, body: ErrorBody) -> tuple[int, dict[str, Any]]:
    """An error as Hugging Face's servers answer it."""
    return status, HubError(error=body.message).model_dump()


router = APIRouter(prefix="/models", tags=["Hugging Face inference"], responses=error_answers(HubError))

OUTSIDE = "O"
"""The label of tokens outside of entities."""

WINDOWS = "long texts are run in windows that overlap as this server has it"


class _Inference(Body):
    options: dict[str, Any] | None = Field(None, description="`use_cache` and the like, which mean nothing here.")


class ClassifyParameters(Body):
    """How labels are scored, and how many are wanted."""

    function_to_apply: Annotated[Activation, Field(strict=False)] | None = None
    top_k: int | None = Field(None, ge=1)


class ClassifyInference(_Inference):
    """Text classification."""

    inputs: TextItems
    parameters: ClassifyParameters | None = None


class TagParameters(Body):
    """How tokens become entities, and which are not wanted."""

    aggregation_strategy: Annotated[Aggregation, Field(strict=False)] | None = None
    ignore_labels: list[str] | None = None
    stride: Annotated[None, refused(WINDOWS)] = None


class TagInference(_Inference):
    """Token classification."""

    inputs: Texts
    parameters: TagParameters | None = None


class AnswerParameters(Body):
    """Which answers are wanted."""

    top_k: int | None = Field(None, ge=1, le=100)
    max_answer_len: int | None = Field(None, ge=1, le=512)
    handle_impossible_answer: bool | None = None
    align_to_words: Literal[True] | None = Field(None, description="Answers are whole words.")
    doc_stride: Annotated[None, refused(WINDOWS)] = None
    max_seq_len: Annotated[None, refused(WINDOWS)] = None
    max_question_len: Annotated[None, refused("questions are not cut")] = None


class AnswerInference(_Inference):
    """Question answering."""

    inputs: Questions
    parameters: AnswerParameters | None = None


class EmbedInference(_Inference):
    """Feature extraction; its parameters lie beside the inputs."""

    inputs: Texts
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] | None = Field(None, description="Texts are cut at their end.")
    prompt_name: Annotated[None, refused("adapters have no prompts: put it before the text")] = None
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float"] | None = None


class Comparison(Body):
    """A sentence, and those that it is compared with."""

    source_sentence: Text
    sentences: Annotated[list[Text], Field(min_length=1)]


class SimilarityInference(_Inference):
    """Sentence similarity."""

    inputs: Comparison
    parameters: AnyObject | None = None


Inference = Callable[[str, dict[str, Any], Client], Awaitable[Any]]


async def _classify(name: str, fields: dict[str, Any], client: Client) -> Any:
    body = parsed(ClassifyInference, fields)
    wanted = body.parameters or ClassifyParameters()
    options = ClassifyOptions(wanted.top_k, wanted.function_to_apply)
    answer = await ask(Route.CLASSIFY, name, text_inputs(body.inputs), options, client)
    # a list in a list for one text as well: the client takes the first
    return [[{"label": one.label, "score": one.score} for one in labels] for labels in answer.predictions]


async def _tag(name: str, fields: dict[str, Any], client: Client) -> Any:
    body = parsed(TagInference, fields)
    wanted = body.parameters or TagParameters()
    aggregation = wanted.aggregation_strategy or Aggregation.SIMPLE
    ignored = [OUTSIDE] if wanted.ignore_labels is None else wanted.ignore_labels
    if aggregation is not Aggregation.NONE and OUTSIDE not in ignored:
        raise InvalidRequest(
            f"parameters.ignore_labels: what lies outside of entities is told with aggregation_strategy none alone; "
            f"else {OUTSIDE!r} has to be among them",
            param="parameters.ignore_labels",
        )
    inputs = list(map(TextInput, body.inputs))
    answer = await ask(Route.TAG, name, inputs, TagOptions(aggregation), client)
    label = "entity" if aggregation is Aggregation.NONE else "entity_group"
    found = [[_entity(one, label) for one in own if one.label not in ignored] for own in answer.predictions]
    return found[0] if isinstance(fields["inputs"], str) else found


def _entity(entity: Entity, label: str) -> dict[str, Any]:
    place = {"start": entity.start, "end": entity.end}
    return {label: entity.label, "score": entity.score, "word": entity.text, **place}


async def _answer(name: str, fields: dict[str, Any], client: Client) -> Any:
    body = parsed(AnswerInference, fields)
    wanted = body.parameters or AnswerParameters()
    options = AnswerOptions(
        top_k=wanted.top_k or 1,
        max_answer_tokens=wanted.max_answer_len or AnswerOptions().max_answer_tokens,
        no_answer=bool(wanted.handle_impossible_answer),
    )
    answer = await ask(Route.ANSWER, name, [one.item() for one in body.inputs], options, client)
    found = [_answers(own, options.top_k) for own in answer.predictions]
    return found[0] if isinstance(fields["inputs"], dict) else found


def _answers(answers: list[AnswerSpan], top_k: int) -> Any:
    """One answer as an object, several as a list."""
    shown = [{"answer": one.text, "score": one.score, "start": one.start, "end": one.end} for one in answers]
    if top_k > 1:
        return shown
    return shown[0] if shown else {"answer": "", "score": 0.0, "start": 0, "end": 0}


async def _embed(name: str, fields: dict[str, Any], client: Client) -> Any:
    body = parsed(EmbedInference, fields)
    options = EmbedOptions(body.normalize, body.dimensions)
    inputs = list(map(TextInput, body.inputs))
    answer = await ask(Route.EMBED, name, inputs, options, client, truncate=body.truncate is not False)
    return answer.predictions


async def _compare(name: str, fields: dict[str, Any], client: Client) -> Any:
    """The cosine of the sentence with each of the others."""
    body = parsed(SimilarityInference, fields)
    inputs = list(map(TextInput, [body.inputs.source_sentence, *body.inputs.sentences]))
    answer = await ask(Route.EMBED, name, inputs, EmbedOptions(normalize=True), client)
    source, *others = answer.predictions
    return [sum(map(mul, source, other)) for other in others]


async def _embed_or_compare(name: str, fields: dict[str, Any], client: Client) -> Any:
    infer = _compare if isinstance(fields.get("inputs"), dict) else _embed
    return await infer(name, fields, client)


BY_ROUTE: Mapping[Route, Inference] = {
    Route.CLASSIFY: _classify,
    Route.TAG: _tag,
    Route.ANSWER: _answer,
    Route.EMBED: _embed_or_compare,
}

Pipeline = Literal[
    "text-classification", "token-classification", "question-answering", "feature-extraction", "sentence-similarity"
]

BY_PIPELINE: Mapping[Pipeline, Inference] = {
    "text-classification": _classify,
    "token-classification": _tag,
    "question-answering": _answer,
    "feature-extraction": _embed,
    "sentence-similarity": _compare,
}


@router.post("/{name}")
async def infer(name: str, body: AnyObject, client: ClientDep) -> Any:
    """Do what the adapter does: classify, find entities, answer, embed."""
    profile = await client.engine.profile(name)
    return await BY_ROUTE[profile.task.route](name, body.fields(), client)


@router.post("/{name}/pipeline/{pipeline}")
async def infer_as(name: str, pipeline: Pipeline, body: AnyObject, client: ClientDep) -> Any:
    """Do what the path says; what the adapter does has to be that."""
    return await BY_PIPELINE[pipeline](name, body.fields(), client)


@router.get("/{name}/info")
async def info(name: str, engine: EngineDep, settings: SettingsDep) -> tei.TeiInfo:
    """What `InferenceClient.get_endpoint_info` asks for."""
    return await tei.described(name, engine, settings)


@router.get("/{name}/health", response_class=Response)
async def health(name: str, engine: EngineDep) -> Response:
    """What `InferenceClient.health_check` asks for."""
    await engine.profile(name)
    return tei.healthy(engine)
