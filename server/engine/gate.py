"""The gate before a release: the newcomer has to do at least as well on labelled texts as what serves now."""

from dataclasses import dataclass

import stamina

from server.core import Prediction
from server.engine.pipeline import Pipeline
from server.errors import InvalidRequest, Overloaded, RefusedRelease, TooLarge
from server.tasks.adapter import TaskAdapter
from server.tasks.dataset import Dataset, parse_dataset
from server.tasks.metrics import Report, report

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

    @property
    def worse(self) -> bool:
        """Whether the newcomer does worse by either measure."""
        if self.current is None:
            return False
        return self.candidate.accuracy < self.current.accuracy or self.candidate.macro_f1 < self.current.macro_f1


def read(data: bytes, adapter: TaskAdapter) -> Dataset:
    """The rows of an upload. Raises InvalidRequest naming the line; labels have to be the adapter's."""
    if adapter.task.name != "classification":
        raise InvalidRequest(f"an adapter for {adapter.task.name} cannot be compared this way", param=FIELD)
    if len(data) > MAX_BYTES:
        raise TooLarge(f"{FIELD}: {len(data)} bytes, at most {MAX_BYTES} are taken", param=FIELD)
    dataset = parse_dataset(data, FIELD, known=adapter.labels, max_rows=MAX_ROWS)
    longest = max(map(len, dataset.texts))
    if longest > MAX_CHARACTERS:
        raise TooLarge(f"{FIELD}: a text of {longest} characters, at most {MAX_CHARACTERS} are taken", param=FIELD)
    return dataset


async def measure(pipeline: Pipeline, adapter: TaskAdapter, data: Dataset) -> Report:
    """Runs all rows through an adapter, beside serving."""
    predicted: list[str] = []
    for start in range(0, len(data.texts), CHUNK):
        texts = await pipeline.encode(data.texts[start : start + CHUNK], adapter, truncate=True)
        answers: list[Prediction] = []
        async for attempt in stamina.retry_context(on=Overloaded, attempts=None, timeout=LONGEST_WAIT_SECONDS):
            with attempt:
                answers = await pipeline.run(texts, adapter, top_k=1)
        predicted += [answer[0].label for answer in answers]
    return report(data.labels, predicted)


def refusal(comparison: Comparison) -> RefusedRelease:
    """Why the newcomer is not released."""
    candidate, current = comparison.candidate, comparison.current
    assert current is not None
    return RefusedRelease(
        f"on {candidate.rows} texts the upload has accuracy {candidate.accuracy:.4f} and macro F1 "
        f"{candidate.macro_f1:.4f}, what serves now {current.accuracy:.4f} and {current.macro_f1:.4f}; nothing was "
        "stored, force=true releases it all the same",
        param=FIELD,
    )
