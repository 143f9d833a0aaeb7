"""The gate before a release: the newcomer has to do at least as well on labelled texts as what serves now."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import stamina

from server.backbone.tokenizer import Tokenizer
from server.core import Priority, Terms, TextInput
from server.engine.pipeline import MAX_SCORES, Job, Pipeline
from server.errors import InvalidRequest, Overloaded, RefusedRelease, TooLarge
from server.tasks.adapter import TaskAdapter
from server.tasks.dataset import Dataset, parse_dataset
from server.tasks.metrics import Report

FIELD = "eval"
MAX_BYTES = 16 * 1024 * 1024
MAX_ROWS = 20_000
MAX_CHARACTERS = 100_000
"""Of one text: tokenizing takes time and memory for all of it, though all but the beginning is cut."""

MAX_TOKENS = 2_000_000
"""Of all rows, in all windows: SQuAD's 10,570 development rows come to 1.8 million. On a CPU they take minutes."""

COUNTED = 256
"""Inputs that are tokenized at once to count them."""

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


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an upload, ready to run."""

    data: Dataset[Any]
    inputs: list[TextInput]
    owners: list[int]
    """Of each input, its row."""
    tokens: list[int]
    """Of each input, in all windows."""


def read(data: bytes, adapter: TaskAdapter, tokenizer: Tokenizer) -> Rows:
    """The rows of an upload. Takes seconds of computing where there are many.

    Raises InvalidRequest naming the line; labels have to be the adapter's.
    """
    task = adapter.task
    if len(data) > MAX_BYTES:
        raise TooLarge(f"{FIELD}: {len(data)} bytes, at most {MAX_BYTES} are taken", param=FIELD)
    with _blamed():
        task.check_measurable(adapter.labels)
    max_rows = min(MAX_ROWS, task.measured_rows or MAX_ROWS)
    dataset = parse_dataset(data, FIELD, task.example, known=adapter.labels, max_rows=max_rows)
    longest = max(map(len, dataset.texts))
    if longest > MAX_CHARACTERS:
        raise TooLarge(f"{FIELD}: a text of {longest} characters, at most {MAX_CHARACTERS} are taken", param=FIELD)
    pairs = [(row, text) for row, example in enumerate(dataset.examples) for text in example.inputs()]
    owners, inputs = [row for row, _ in pairs], [text for _, text in pairs]
    tokens: list[int] = []
    for start in range(0, len(inputs), COUNTED):
        with _blamed(f" from row {owners[start] + 1} on"):
            tokens += tokenizer.lengths(
                inputs[start : start + COUNTED],
                windowed=task.windowed,
                reserved=adapter.weights.framing.positions,
            )
        if sum(tokens) > MAX_TOKENS:
            raise TooLarge(f"{FIELD}: more than {MAX_TOKENS} tokens in all rows", param=FIELD)
    return Rows(dataset, inputs, owners, tokens)


async def measure(
    pipeline: Pipeline, adapter: TaskAdapter, rows: Rows, executor: Executor, *, max_batch_tokens: int
) -> Report:
    """Runs all rows through an adapter, beside serving: no more of them are queued at once than make a batch."""
    task = adapter.task
    job = Job(adapter, task.measured)
    kept: list[Any] = []
    max_inputs = max(1, MAX_SCORES // max(1, len(adapter.labels)))
    terms = Terms(Priority.LOW)
    for start, end in chunks(rows.tokens, max_batch_tokens, max_inputs):
        async for attempt in stamina.retry_context(on=Overloaded, attempts=None, timeout=LONGEST_WAIT_SECONDS):
            with attempt:
                with _blamed(f" from row {rows.owners[start] + 1} on"):
                    pipeline.check([None], rows.inputs[start:end], terms=terms)
                    [answered] = await pipeline.answer([job], rows.inputs[start:end], terms=terms)
                kept += map(task.kept, answered.predictions)
    return await asyncio.get_running_loop().run_in_executor(executor, partial(task.measure, rows.data.examples, kept))


def chunks(tokens: Sequence[int], max_tokens: int, max_inputs: int) -> Iterator[tuple[int, int]]:
    """First, and one past the last, of inputs that have no more than `max_tokens` together, or are one."""
    start = total = 0
    for index, own in enumerate(tokens):
        if index > start and (total + own > max_tokens or index - start == max_inputs):
            yield start, index
            start, total = index, 0
        total += own
    yield start, len(tokens)


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
