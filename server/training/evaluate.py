"""Measures a served adapter over HTTP: what its clients get, through everything between them and the backbone."""

import time
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError
from tqdm.auto import tqdm

from server.errors import AdapterdError
from server.tasks.dataset import Dataset
from server.tasks.metrics import Report, report

CHUNK = 32
"""Texts of one request."""

BUSY = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
"""Refusals that pass: they come with Retry-After."""

RETRIES = 5
LONGEST_WAIT = 30.0
"""Seconds: the most that one Retry-After is obeyed."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well one version of a served adapter did."""

    adapter: str
    version: str
    seconds: float
    """From the first request to the last answer."""
    report: Report


class _Score(BaseModel):
    label: str


class _Answer(BaseModel):
    version: str
    predictions: list[list[_Score]]


def evaluate(client: httpx.Client, adapter: str, data: Dataset) -> Evaluation:
    """Classifies all texts with the server that the client's base URL names, and compares the labels.

    Raises AdapterdError where the server cannot be reached or refuses, with its own words, and where another version
    of the adapter was released meanwhile.
    """
    versions: set[str] = set()
    predicted: list[str] = []
    started = time.perf_counter()
    for start in tqdm(range(0, len(data.texts), CHUNK), unit="request", disable=None):
        answer = _classify(client, adapter, data.texts[start : start + CHUNK])
        versions.add(answer.version)
        predicted += [scores[0].label for scores in answer.predictions]
    seconds = time.perf_counter() - started
    if len(versions) > 1:
        raise AdapterdError(f"another version of adapter {adapter!r} was released during the evaluation; run it again")
    return Evaluation(adapter, versions.pop(), seconds, report(data.labels, predicted))


def _classify(client: httpx.Client, adapter: str, texts: tuple[str, ...]) -> _Answer:
    response = _post(client, {"adapter": adapter, "inputs": texts})
    if response.is_error:
        raise AdapterdError(f"{response.url} answered {response.status_code}: {_message(response)}")
    try:
        return _Answer.model_validate_json(response.content)
    except ValidationError as error:
        raise AdapterdError(f"{response.url} does not answer as adapterd does") from error


def _post(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    for attempt in range(RETRIES + 1):
        try:
            response = client.post("/classify", json=body)
        except httpx.TransportError as error:
            raise AdapterdError(f"{client.base_url} cannot be reached: {error}") from error
        if response.status_code not in BUSY or attempt == RETRIES:
            break
        time.sleep(_wait(response))
    return response


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
