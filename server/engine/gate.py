"""The gate before a release: the newcomer has to do at least as well on labelled texts as what serves now."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import stamina

from server.core import Prediction, Priority, Terms
from server.engine.pipeline import Job, Pipeline
from server.errors import InvalidRequest, Overloaded, RefusedRelease, TooLarge
from server.tasks.adapter import TaskAdapter
from server.tasks.dataset import Dataset, parse_dataset
from server.tasks.metrics import Report

FIELD = "eval"
MAX_BYTES = 16 * 1024 * 1024
MAX_ROWS = 20_000
MAX_CHARACTERS = 100_000
"""Of one text: tokenizing takes time and memory for all of it, though all but the beginning is cut."""

CHUNK = 32
"""Texts that are queued at once, so that requests get between them."""

LONGEST_WAIT_SECONDS = 60.0
"""How long the rows wait for a full queue."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the newcomer and the version that serves did on the same texts."""

    candidate: Report
    current: Report | None
    """None where nothing serves yet, or it does another task."""

    decisive: Mapping[str, int]
    """The metrics that count; see Task.decisive."""

    @property
    def worse(self) -> bool:
        """Whether the newcomer does worse by any of them."""
        if self.current is None:
            return False
        candidate, current = self.candidate.metrics, self.current.metrics
        return any(sign * candidate[name] < sign * current[name] for name, sign in self.decisive.items())


def read(data: bytes, adapter: TaskAdapter) -> Dataset[Any]:
    """The rows of an upload. Raises InvalidRequest naming the line; labels have to be the adapter's."""
    if len(data) > MAX_BYTES:
        raise TooLarge(f"{FIELD}: {len(data)} bytes, at most {MAX_BYTES} are taken", param=FIELD)
    with _blamed():
        adapter.task.check_measurable(adapter.labels)
    dataset = parse_dataset(data, FIELD, adapter.task.example, known=adapter.labels, max_rows=MAX_ROWS)
    longest = max(map(len, dataset.texts))
    if longest > MAX_CHARACTERS:
        raise TooLarge(f"{FIELD}: a text of {longest} characters, at most {MAX_CHARACTERS} are taken", param=FIELD)
    return dataset


async def measure(pipeline: Pipeline, adapter: TaskAdapter, data: Dataset[Any]) -> Report:
    """Runs all rows through an adapter, beside serving."""
    task = adapter.task
    job = Job(adapter, task.measured)
    inputs = [text for example in data.examples for text in example.inputs()]
    predictions: list[Prediction] = []
    for start in range(0, len(inputs), CHUNK):
        async for attempt in stamina.retry_context(on=Overloaded, attempts=None, timeout=LONGEST_WAIT_SECONDS):
            with attempt:
                chunk = inputs[start : start + CHUNK]
                with _blamed(f" from row {start + 1} on"):
                    [answered] = await pipeline.answer([job], chunk, terms=Terms(Priority.LOW))
                predictions += answered.predictions
    return task.measure(data.examples, predictions)


@contextmanager
def _blamed(rows: str = "") -> Iterator[None]:
    """What is wrong with a row is wrong with the field of the upload that it came in."""
    try:
        yield
    except (InvalidRequest, TooLarge) as error:
        raise type(error)(f"{FIELD}{rows}: {error.message}", param=FIELD, code=error.error_code) from error


def refusal(comparison: Comparison) -> RefusedRelease:
    """Why the newcomer is not released."""
    candidate, current = comparison.candidate, comparison.current
    assert current is not None
    return RefusedRelease(
        f"on {candidate.rows} rows the upload has {candidate}, what serves now {current}; nothing was stored, "
        "force=true releases it all the same",
        param=FIELD,
    )
