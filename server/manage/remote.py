"""Manager over HTTP: a running server does it."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from server.api.schemas import (
    AdapterDetail,
    AdapterList,
    CollectAnswer,
    CollectBody,
    DeleteAnswer,
    ErrorAnswer,
    PinAnswer,
    ReleaseAnswer,
    ReleaseBody,
    ReleaseList,
    RollbackBody,
    UploadAnswer,
    VerifyAnswer,
    VersionInfo,
    VersionList,
)
from server.errors import AdapterdError, UnknownAdapter
from server.manage.manager import Push, Unreachable, WrongUse
from server.store.names import check_name
from server.store.report import Report

Answer = TypeVar("Answer", bound=BaseModel)

Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given the bytes to send: a context, in which the bytes of each portion that has gone are told."""

PAGE = 1000
"""Adapters asked for at once, the most that a server gives."""

CONNECT_SECONDS = 10.0


class Remote:
    """A server."""

    def __init__(
        self, url: str, *, timeout_seconds: float, watch_upload: Watch, headers: Mapping[str, str] | None = None
    ) -> None:
        """`timeout_seconds`: how long the server may be silent. `headers`: those that say who asks. Raises WrongUse for
        a URL that is none."""
        try:
            usable = httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
        except httpx.InvalidURL:
            usable = False
        if not usable:
            raise WrongUse(f"--url {url!r} is not an address like http://127.0.0.1:8000")
        self._url = url
        self._timeout_seconds = timeout_seconds
        self._watch_upload = watch_upload
        self._connect_seconds = min(timeout_seconds, CONNECT_SECONDS)
        timeout = httpx.Timeout(timeout_seconds, connect=self._connect_seconds)
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def close(self) -> None:
        """See Manager."""
        self._client.close()

    def adapters(self) -> AdapterList:
        """See Manager."""
        found = AdapterList(adapters=[], damaged=[], next=None)
        after: str | None = ""
        while after is not None:
            page = self._ask(AdapterList, "GET", "/admin/adapters", params={"after": after, "limit": PAGE})
            found.adapters += page.adapters
            found.damaged += page.damaged
            after = page.next
        return found

    def detail(self, name: str) -> AdapterDetail:
        """See Manager."""
        return self._ask(AdapterDetail, "GET", _path(name))

    def versions(self, name: str) -> list[VersionInfo]:
        """See Manager."""
        return self._ask(VersionList, "GET", _path(name, "/versions")).versions

    def releases(self, name: str, limit: int) -> ReleaseList:
        """See Manager."""
        return self._ask(ReleaseList, "GET", _path(name, "/releases"), params={"limit": limit})

    def push(self, name: str, push: Push) -> UploadAnswer:
        """See Manager."""
        fields = {"note": push.note} if push.note else {}
        if push.labels is not None:
            fields["labels"] = json.dumps(push.labels)
        with ExitStack() as stack:
            parts: list[Any] = [
                ("files", (file_name, stack.enter_context(file.open("rb")))) for file_name, file in push.files
            ]
            if push.eval is not None:
                parts.append(("eval", (push.eval.name, stack.enter_context(push.eval.open("rb")))))
            request = self._client.build_request(
                "PUT",
                _path(name),
                params={"release": push.release, "force": push.force},
                data=fields,
                files=parts,
            )
            told = stack.enter_context(self._watch_upload(int(request.headers["Content-Length"])))
            request.stream = _Watched(request.stream, told)
            response = self._send(request)
        return _read(UploadAnswer, response)

    def release(self, name: str, body: ReleaseBody, *, force: bool) -> ReleaseAnswer:
        """See Manager."""
        if force:
            raise WrongUse("--force goes with --store: a server tries every version before it releases it")
        return self._ask(ReleaseAnswer, "POST", _path(name, "/releases"), json=body.model_dump(mode="json"))

    def rollback(self, name: str, body: RollbackBody) -> ReleaseAnswer:
        """See Manager."""
        return self._ask(ReleaseAnswer, "POST", _path(name, "/rollback"), json=body.model_dump(mode="json"))

    def delete(self, name: str, note: str) -> DeleteAnswer:
        """See Manager."""
        return self._ask(DeleteAnswer, "DELETE", _path(name), params={"note": note})

    def pin(self, name: str) -> PinAnswer:
        """See Manager."""
        return self._ask(PinAnswer, "PUT", _path(name, "/pin"))

    def unpin(self, name: str) -> PinAnswer:
        """See Manager."""
        return self._ask(PinAnswer, "DELETE", _path(name, "/pin"))

    def collect(self, body: CollectBody) -> CollectAnswer:
        """See Manager."""
        if body.adapter is not None:
            check_name(body.adapter)
        return self._ask(CollectAnswer, "POST", "/admin/gc", json=body.model_dump(mode="json", exclude_none=True))

    def verify(self, name: str, version: str) -> Report | None:
        """See Manager: a server always proves it."""
        return self._ask(VerifyAnswer, "POST", _path(name, "/verify"), params={"version": version}).report

    def _ask(self, answer: type[Answer], method: str, path: str, **options: Any) -> Answer:
        return _read(answer, self._send(self._client.build_request(method, path, **options)))

    def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._client.send(request)
        except httpx.ConnectTimeout as error:
            raise Unreachable(
                f"{self._url} cannot be reached: no connection within {self._connect_seconds:g} s"
            ) from error
        except httpx.TimeoutException as error:
            raise Unreachable(
                f"{self._url} did not answer within {self._timeout_seconds:g} s; --timeout gives it longer, and it may "
                "still be at work"
            ) from error
        except httpx.RequestError as error:
            raise Unreachable(f"{self._url} cannot be reached: {error or type(error).__name__}") from error


class _Watched(httpx.SyncByteStream):
    """A body that tells how much of it has gone."""

    def __init__(self, stream: Any, told: Callable[[int], None]) -> None:
        self._stream = stream
        self._told = told

    def __iter__(self) -> Iterator[bytes]:
        for portion in self._stream:
            yield portion
            self._told(len(portion))


def _path(name: str, below: str = "") -> str:
    """Checked here as well: a slash in a name would be another route."""
    return f"/admin/adapters/{quote(check_name(name), safe='')}{below}"


def _read(answer: type[Answer], response: httpx.Response) -> Answer:
    """Raises the server's refusal."""
    if response.is_error:
        raise _refusal(response)
    try:
        return answer.model_validate_json(response.content)
    except ValidationError as error:
        raise Unreachable(f"{response.url} does not answer as adapterd does") from error


def _refusal(response: httpx.Response) -> AdapterdError:
    try:
        body = ErrorAnswer.model_validate_json(response.content).error
    except ValidationError:  # a proxy, say
        reason = f"{response.status_code} {response.reason_phrase}".rstrip()
        return Unreachable(f"{response.url} answered {reason}, not as adapterd does")
    kind = UnknownAdapter if body.code == UnknownAdapter.code else AdapterdError
    return kind(body.message, param=body.param, code=body.code)
