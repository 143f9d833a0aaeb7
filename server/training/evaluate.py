"""Measures a served adapter over HTTP: what its clients get, through everything between them and the backbone."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError
from tqdm.auto import tqdm

from server.errors import AdapterdError
from server.tasks.adapter import task_named
from server.tasks.base import AnyTask
from server.tasks.dataset import Dataset
from server.tasks.metrics import Report

T = TypeVar("T")
P = TypeVar("P")

CHUNK = 32
"""Inputs of one request."""

BUSY = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
"""Refusals that pass: they come with Retry-After."""

RETRIES = 5
LONGEST_WAIT = 30.0
"""Seconds: the most that one Retry-After is obeyed."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well one version of a served adapter did."""

    adapter: str
    task: str
    version: str
    seconds: float
    """From the first request to the last answer."""
    report: Report


class _Answer(BaseModel, Generic[P]):
    version: str
    predictions: list[P]


class _Detail(BaseModel):
    task: str


def served_task(client: httpx.Client, adapter: str) -> AnyTask:
    """What an adapter of the server that the client's base URL names is for. Raises as evaluate does."""
    found = _parsed(_send(client, "GET", f"/admin/adapters/{quote(adapter, safe='')}"), TypeAdapter(_Detail))
    return task_named(found.task)


def evaluate(client: httpx.Client, adapter: str, task: AnyTask, data: Dataset[Any]) -> Evaluation:
    """Asks the server that the client's base URL names for all rows, and compares the answers with what they say.

    Raises AdapterdError where the server cannot be reached or refuses, with its own words, and where another version
    of the adapter was released meanwhile.
    """
    form: Any = task.prediction  # known when it runs
    answers: TypeAdapter[_Answer[Any]] = TypeAdapter(_Answer[form])
    options = {name: value for name, value in asdict(task.measured).items() if value is not None}
    inputs = [task.route.item(text) for example in data.examples for text in example.inputs()]
    versions: set[str] = set()
    predictions: list[Any] = []
    started = time.perf_counter()
    for start in tqdm(range(0, len(inputs), CHUNK), unit="request", disable=None):
        body = {"adapter": adapter, "inputs": inputs[start : start + CHUNK], **options}
        answer = _parsed(_send(client, "POST", task.route.path, body), answers)
        versions.add(answer.version)
        predictions += answer.predictions
    seconds = time.perf_counter() - started
    if len(versions) > 1:
        raise AdapterdError(f"another version of adapter {adapter!r} was released during the evaluation; run it again")
    return Evaluation(adapter, task.name, versions.pop(), seconds, task.measure(data.examples, predictions))


def _send(client: httpx.Client, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
    """A good response. A busy server is asked again."""
    for attempt in range(RETRIES + 1):
        try:
            response = client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise AdapterdError(f"{client.base_url} cannot be reached: {error}") from error
        if response.status_code not in BUSY or attempt == RETRIES:
            break
        time.sleep(_wait(response))
    if response.is_error:
        raise AdapterdError(f"{response.url} answered {response.status_code}: {_message(response)}")
    return response


def _parsed(response: httpx.Response, form: TypeAdapter[T]) -> T:
    try:
        return form.validate_json(response.content)
    except ValidationError as error:
        raise AdapterdError(f"{response.url} does not answer as adapterd does") from error


def _wait(response: httpx.Response) -> float:
    """Seconds until the next try; a proxy may give a date instead, which is not worth parsing."""
    told = response.headers.get("Retry-After", "")
    return min(float(told), LONGEST_WAIT) if told.isdecimal() else 1.0


def _message(response: httpx.Response) -> str:
    """The server's own words, or the status's name where something else answered, say a proxy."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
