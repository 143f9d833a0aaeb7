"""Routes that read a body and write an answer without going through what FastAPI does for any route."""

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from server.api.deps import TIMEOUT_HEADER, Client, TimeoutMs
from server.errors import ClientGone

JSON = "application/json"

_TIMEOUT = TypeAdapter(TimeoutMs)


class StraightRoute(APIRoute):
    """A route whose function takes `body`, a model, and `client`, and nothing else.

    FastAPI makes objects of a body's JSON and looks at them once more, walks through all that a route might depend on,
    and validates what it answers: nearly half of the event loop's time with a request. Here pydantic reads the bytes,
    and the answer is written as it is. The OpenAPI document is FastAPI's as ever; and so is the way of whatever cannot
    be read here, so that its error says the same as everywhere else. Dependencies, another status or another class of
    response, which a decorator may ask for, are not looked at.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's place for routes with a way of their own. Raises TypeError for a function with other parameters."""
        usual = super().get_route_handler()
        function = self.endpoint
        parameters = inspect.signature(function, eval_str=True).parameters
        if list(parameters) != ["body", "client"]:
            raise TypeError(f"{function.__name__} has to take body and client")
        annotation: Any = parameters["body"].annotation
        body: TypeAdapter[Any] = TypeAdapter(annotation)

        async def handle(request: Request) -> Response:
            headers = request.headers
            if headers.get("content-type", "").partition(";")[0] != JSON:
                return await usual(request)
            try:
                sent = await request.body()
            except ClientDisconnect:
                raise ClientGone("the client closed the connection") from None
            try:
                read = body.validate_json(sent)
                timeout_ms = _TIMEOUT.validate_python(headers.get(TIMEOUT_HEADER))
            except ValidationError:
                return await usual(request)
            answer = await function(body=read, client=Client.of(request, timeout_ms))
            return Response(to_json(answer), media_type=JSON)

        return handle
