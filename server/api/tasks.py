"""The routes of tasks: /classify /tag /answer /embed, each with the adapter in the payload."""

from dataclasses import replace
from typing import Any, TypeVar

from asgi_correlation_id import correlation_id
from fastapi import APIRouter

from server.api.deps import Client, ClientDep
from server.api.errors import RESPONSES
from server.api.straight import StraightRoute
from server.api.task_schemas import (
    Answer,
    AnswerAnswer,
    AnswerAnswers,
    AnswerBody,
    Answers,
    ClassifyAnswer,
    ClassifyAnswers,
    ClassifyBody,
    EmbedAnswer,
    EmbedAnswers,
    EmbedBody,
    TagAnswer,
    TagAnswers,
    TagBody,
    TaskBody,
    Usage,
)
from server.core import Route, TaskAnswer, TaskRequest
from server.errors import AdapterdError, InvalidRequest, TooLarge

router = APIRouter(tags=["tasks"], responses=RESPONSES, route_class=StraightRoute)

AnswerT = TypeVar("AnswerT", bound=Answer[Any])
AnswersT = TypeVar("AnswersT", bound=Answers[Any])


@router.post(Route.CLASSIFY.path)
async def classify(body: ClassifyBody, client: ClientDep) -> ClassifyAnswer | ClassifyAnswers:
    """Classify texts, pairs of texts or marked pieces of them, or measure them, with the adapter that is named."""
    return rendered(body, await ask(body, Route.CLASSIFY, client), ClassifyAnswer, ClassifyAnswers)


@router.post(Route.TAG.path)
async def tag(body: TagBody, client: ClientDep) -> TagAnswer | TagAnswers:
    """Find entities in texts."""
    return rendered(body, await ask(body, Route.TAG, client), TagAnswer, TagAnswers)


@router.post(Route.ANSWER.path)
async def answer(body: AnswerBody, client: ClientDep) -> AnswerAnswer | AnswerAnswers:
    """Answer questions with pieces of the texts that come with them."""
    return rendered(body, await ask(body, Route.ANSWER, client), AnswerAnswer, AnswerAnswers)


@router.post(Route.EMBED.path)
async def embed(body: EmbedBody, client: ClientDep) -> EmbedAnswer | EmbedAnswers:
    """Make vectors of texts, with an adapter or with the backbone alone."""
    return rendered(body, await ask(body, Route.EMBED, client), EmbedAnswer, EmbedAnswers)


async def ask(body: TaskBody, route: Route, client: Client) -> list[TaskAnswer]:
    """What the adapters of a body say. Raises InvalidRequest, TooLarge and whatever the engine does."""
    request = TaskRequest(
        route=route,
        adapters=_adapters(body, route),
        inputs=body.items(),
        options=body.options(),
        truncate=body.truncate,
        long=body.cut(),
        version=body.version,
        routing_key=body.routing_key if body.routing_key is not None else correlation_id.get() or "",
        priority=body.priority,
        timeout_seconds=body.timeout_ms / 1000 if body.timeout_ms is not None else None,
    )
    try:
        return await run(request, client)
    except AdapterdError as error:
        if body.adapters is not None and error.param == "adapter":
            raise error.about("adapters") from error
        raise


async def run(request: TaskRequest, client: Client) -> list[TaskAnswer]:
    """The engine's answers to a request that is no larger than it may be, as long as its client waits for them."""
    settings = client.settings
    rows = len(request.inputs) * max(len(request.adapters), 1)
    if rows > settings.max_inputs:
        times = f" for {len(request.adapters)} adapters" if len(request.adapters) > 1 else ""
        raise TooLarge(
            f"{len(request.inputs)} inputs{times} in one request, at most {settings.max_inputs} are taken",
            param="inputs",
            code="too_many_inputs",
        )
    limits = (request.timeout_seconds, client.timeout_seconds, settings.request_timeout_seconds)
    request = replace(request, timeout_seconds=min(one for one in limits if one is not None))
    return await client.wait_for(client.engine.run(request))


def rendered(body: TaskBody, answers: list[TaskAnswer], one: type[AnswerT], many: type[AnswersT]) -> AnswerT | AnswersT:
    """The answer of the adapter, or of each of the adapters, that the body names."""
    made = [
        one(
            adapter=answer.ref.name if answer.ref else None,
            version=answer.ref.version if answer.ref else None,
            release=answer.ref.release if answer.ref else None,
            backbone=answer.backbone,
            predictions=list(answer.predictions),
            truncated=answer.truncated,
            windows=answer.windows,
            usage=Usage(tokens=answer.tokens),
        )
        for answer in answers
    ]
    return many(answers=made) if body.adapters is not None else made[0]


def _adapters(body: TaskBody, route: Route) -> tuple[str, ...]:
    if body.adapters is None:
        if body.adapter is None and route is not Route.EMBED:
            raise InvalidRequest("adapter: Field required", param="adapter")
        if body.adapter is None and body.version is not None:
            raise InvalidRequest("version: the backbone alone has none", param="version")
        return () if body.adapter is None else (body.adapter,)
    if body.adapter is not None:
        raise InvalidRequest("adapters: either adapter or adapters is taken, not both", param="adapters")
    if len(set(body.adapters)) < len(body.adapters):
        raise InvalidRequest("adapters: a name occurs twice", param="adapters")
    if body.version is not None:
        raise InvalidRequest("version: adapters have no version in common", param="version")
    return tuple(body.adapters)
