"""A batch of texts, each with its adapter, to their answers. Runs on the threads that own the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from server.adapters.base import Framing
from server.adapters.plan import AdapterPlan, Segment
from server.adapters.states import TextStates
from server.backbone.backbone import Backbone
from server.core import Encoding, Options
from server.errors import NotFiniteOutput
from server.tasks.adapter import TaskAdapter
from server.tasks.base import Outputs


@dataclass(frozen=True, slots=True)
class Row:
    """One text and the adapter that answers it."""

    text: Encoding
    adapter: TaskAdapter
    options: Options | None = None
    """What is wanted of the answer; None: the head's raw outputs, for whoever reads them elsewhere."""

    @property
    def tokens(self) -> int:
        """Rows that it takes in a forward: the text's tokens and its adapter's virtual ones."""
        return len(self.text) + self.adapter.weights.framing.virtual_tokens

    @property
    def run(self) -> tuple[str, int, int]:
        """Rows with the same key run as one; adapters of one form come side by side, and so do rows read alike."""
        return self.adapter.weights.form, id(self.adapter), hash(self.options)


class Runner:
    """Sorts a batch by adapter, plans it, runs the backbone once and every adapter's head on its own texts."""

    def __init__(self, backbone: Backbone) -> None:
        """The backbone is the runner's from here on; several threads may run batches at once."""
        self._backbone = backbone

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[Any]:
        """One answer per row, in the rows' order: a prediction, or raw outputs, float32 on the CPU.

        Raises if any of them cannot be computed.
        """
        answers: list[Any] = [None] * len(rows)
        for chunk in self._backbone.chunks([row.text for row in rows], [row.adapter.weights for row in rows]):
            order = sorted(chunk, key=lambda index: rows[index].run)
            for index, answer in zip(order, self._run([rows[index] for index in order]), strict=True):
                answers[index] = answer
        return answers

    def _run(self, rows: list[Row]) -> list[Any]:
        """One forward over rows whose adapters' runs are contiguous."""
        runs: list[tuple[Row, int, int]] = []  # a row that stands for its run, first text, one past the last
        start = 0
        for _, group in groupby(rows, key=lambda row: (id(row.adapter), row.options)):
            members = list(group)
            runs.append((members[0], start, start + len(members)))
            start += len(members)
        computed, places = _distinct(rows)
        plan = AdapterPlan(_segments(computed))
        states = self._backbone.forward([row.text for row in computed], plan)
        # All heads are launched before any output is fetched, since fetching waits for the device.
        outputs = [
            row.adapter.task.apply(row.adapter.head, *_read(states, places[first:end])) for row, first, end in runs
        ]
        answers: list[Any] = []
        for (row, _, _), output in zip(runs, outputs, strict=True):
            values = _fetched(output)
            if not bool(torch.isfinite(values if isinstance(values, Tensor) else torch.cat(values)).all()):
                raise NotFiniteOutput("the adapter's outputs are not finite for this text")
            answers += list(values) if row.options is None else row.adapter.decode(values, row.options)
        return answers


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], Sequence[int]]:
    """Rows that come to different states, and for each of `rows` its place among them.

    Copies of a text, the same object, come to the same ones with the same adapter, and with any that acts nowhere.
    """
    if len({id(row.text) for row in rows}) == len(rows):
        return list(rows), range(len(rows))
    computed: list[Row] = []
    places: dict[tuple[int, int], int] = {}
    found = []
    for row in rows:
        key = id(row.text), id(row.adapter) if _acts(row.adapter) else 0
        if key not in places:
            places[key] = len(computed)
            computed.append(row)
        found.append(places[key])
    return computed, found


def _acts(adapter: TaskAdapter) -> bool:
    """Whether it is more than a head."""
    return any(part.sites or part.framing != Framing() for part in adapter.weights.parts)


def _read(states: TextStates, places: Sequence[int]) -> tuple[TextStates, int, int]:
    """States in which a run's texts lie side by side, the first and one past the last."""
    if list(places) == list(range(places[0], places[0] + len(places))):
        return states, places[0], places[-1] + 1
    return states.select(places), 0, len(places)


def _segments(rows: Sequence[Row]) -> list[Segment]:
    """One for each adapter, however its rows are decoded."""
    segments: list[Segment] = []
    for _, group in groupby(rows, key=lambda row: id(row.adapter)):
        members = list(group)
        start = segments[-1].end if segments else 0
        segments.append(Segment(members[0].adapter.weights, start, start + len(members)))
    return segments


def _fetched(outputs: Outputs) -> Outputs:
    """As float32 on the CPU."""
    return outputs.float().cpu() if isinstance(outputs, Tensor) else [text.float().cpu() for text in outputs]
