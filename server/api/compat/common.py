"""What the peers' files share."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from asgi_correlation_id import correlation_id
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from server.api import tasks
from server.api.deps import Client
from server.core import Options, Route, TaskAnswer, TaskRequest, TextInput

M = TypeVar("M", bound=BaseModel)

CLIENT_ERRORS: Mapping[int, int] = {409: 400, 413: 400, 422: 400}
"""Status -> the peer's, of peers that answer 400 to whatever is wrong with a request."""


class AnyObject(BaseModel):
    """A JSON object whose fields are looked at later, when it is known what they should be."""

    model_config = ConfigDict(extra="allow")

    def fields(self) -> dict[str, Any]:
        """The object."""
        return self.model_extra or {}


def refused(reason: str) -> BeforeValidator:
    """For a field that the peer has and this server cannot honour: whatever is not null is an error that says why."""

    def check(value: Any) -> None:
        if value is not None:
            raise ValueError(reason)

    return BeforeValidator(check)


def parsed(model: type[M], fields: Mapping[str, Any]) -> M:
    """A body as `model`. Raises RequestValidationError, as if the framework had read it."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(errors) from error


def error_answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: what every error looks like."""
    return {"4XX": {"model": model}, "5XX": {"model": model}}


async def ask(
    route: Route,
    adapter: str | None,
    inputs: Sequence[TextInput],
    options: Options,
    client: Client,
    *,
    truncate: bool = True,
    routing_key: str | None = None,
) -> TaskAnswer:
    """What one adapter says, as a route of tasks answers it."""
    request = TaskRequest(
        route=route,
        adapters=() if adapter is None else (adapter,),
        inputs=tuple(inputs),
        options=options,
        truncate=truncate,
        routing_key=request_id() if routing_key is None else routing_key,
    )
    [answer] = await tasks.run(request, client)
    return answer


def request_id() -> str:
    """The id of the request in hand."""
    return correlation_id.get() or ""
