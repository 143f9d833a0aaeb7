"""Every error as one JSON shape: {"error": {"message", "type", "param", "code", "request_id"}}; below the paths that
speak for another server, in that server's."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from server.api.schemas import ErrorAnswer, ErrorBody
from server.errors import AdapterdError, Unauthorized
from server.logs import get_logger

log = get_logger("adapterd.api")

MAX_WORDS = 1000
"""Characters of an error's message."""

MESSAGES = {"model_attributes_type": "a JSON object is needed, sent with Content-Type: application/json"}
"""For the errors whose own words tell a client nothing."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504, 507)
}
"""For the OpenAPI document."""


Shape = Callable[[int, ErrorBody], tuple[int, dict[str, Any]]]
"""An error with its status as another server would answer it: status and JSON."""


def install(app: FastAPI, shapes: Mapping[str, Shape]) -> None:
    """Makes `app` answer every exception: below a path of `shapes` in its shape, the longest such path's, else in our
    own."""
    handle = partial(_handle, shapes)
    for kind in (AdapterdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def answer(shapes: Mapping[str, Shape]) -> Callable[[Scope, Receive, Send, Exception], Awaitable[None]]:
    """For middleware, whose errors no handler sees: answers an error as `install` makes the app do it."""

    async def send_answer(scope: Scope, receive: Receive, send: Send, error: Exception) -> None:
        response = await _handle(shapes, Request(scope), error)
        await response(scope, receive, send)

    return send_answer


async def _handle(shapes: Mapping[str, Shape], request: Request, error: Exception) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error, RequestValidationError):
        status, body = 422, _validation(error)
    elif isinstance(error, HTTPException):
        status, body = error.status_code, _http(error)
        headers.update(error.headers or {})
    elif isinstance(error, AdapterdError):
        status, body = error.status, _body(error.message, error.type, error.error_code, error.param)
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
    else:
        # Caught outside all other middleware, which therefore adds nothing to this answer; and raised again, so that
        # the traceback is logged.
        status, body = 500, _body("the server failed on this request", "server_error", "internal_error")
        headers["X-Request-ID"] = body.request_id or ""
    if status >= 500 and getattr(error, "fault", True):
        log.error("request failed", status=status, code=body.code, error=str(error))
    status, content = _shape(shapes, request.scope["path"])(status, body)
    return Response(to_json(content), status, headers, "application/json")


def _shape(shapes: Mapping[str, Shape], path: str) -> Shape:
    above = [prefix for prefix in shapes if path == prefix or path.startswith(f"{prefix}/")]
    return shapes[max(above, key=len)] if above else _own


def _own(status: int, body: ErrorBody) -> tuple[int, dict[str, Any]]:
    return status, ErrorAnswer(error=body).model_dump()


def _body(message: str, type_: str, code: str, param: str | None = None) -> ErrorBody:
    return ErrorBody(
        message=_printable(message),
        type=type_,
        param=_printable(param) if param else None,
        code=code,
        request_id=correlation_id.get(),
    )


def _printable(text: str) -> str:
    """A client's words come back in errors: no more of them than helps, and only what an answer can carry."""
    return text[:MAX_WORDS].encode(errors="replace").decode()


def _validation(error: RequestValidationError) -> ErrorBody:
    """The first wrong field; where it is, is told without the part of the request it lies in."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _body(f"the body is not JSON: {first['ctx']['error']}", "invalid_request_error", "invalid_json")
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    message = MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    if "UploadFile" in message:
        message = "a file part is needed, with a file name"
    return _body(f"{param}: {message}" if param else message, "invalid_request_error", "invalid_request", param)


def _http(error: HTTPException) -> ErrorBody:
    """Errors of the framework itself: no such route, wrong method, body too large."""
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    return _body(str(error.detail), "invalid_request_error", "too_large" if error.status_code == 413 else code)
