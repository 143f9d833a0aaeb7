"""Shadow versions: they compute what was answered already, and agree or not."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.core import AdapterRef, Options, Prediction, Priority, Terms, TextInput
from server.engine.pipeline import Cut, Job, Pipeline
from server.engine.residency import Residency
from server.errors import AdapterdError, Overloaded, TooLarge
from server.logs import get_logger
from server.metrics import Metrics
from server.tasks.base import AnyTask
from server.tracing import OFF, Tracing, about

log = get_logger("adapterd.shadows")

MAX_WAITING = 64
"""Comparisons under way. They come after requests: beyond this, and while the queue is full, they are left out."""

SHORT = 12
"""Digits of a version in a label."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that a version has answered."""

    name: str
    texts: Sequence[TextInput]
    cut: Cut
    options: Options
    task: AnyTask
    predictions: Sequence[Prediction]


class Shadows:
    """Runs shadow versions beside serving and counts how often they agree."""

    def __init__(self, residency: Residency, pipeline: Pipeline, metrics: Metrics, tracing: Tracing = OFF) -> None:
        self._residency = residency
        self._pipeline = pipeline
        self._metrics = metrics
        self._tracing = tracing
        self._waiting: set[asyncio.Task[None]] = set()

    def start(self, answered: Answered, version: str) -> None:
        """Compares later; nobody waits for it."""
        if len(self._waiting) >= MAX_WAITING:
            self._count(answered, version, "skipped", len(answered.texts))
            return
        task = asyncio.get_running_loop().create_task(self._compare(answered, version))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    def stop(self) -> None:
        """Gives up what is under way."""
        for task in self._waiting:
            task.cancel()

    async def _compare(self, answered: Answered, version: str) -> None:
        try:
            ref = AdapterRef(answered.name, version, None)
            cut, terms = replace(answered.cut, truncate=True), Terms(Priority.LOW)
            with self._tracing.span("shadow", about([ref])):
                self._pipeline.check([ref], answered.texts, cut, terms)
                async with self._residency.lease(answered.name, version) as adapter:
                    job = Job(adapter, answered.options, ref)
                    [shadow] = await self._pipeline.answer([job], answered.texts, cut, terms)
            agreed = sum(map(answered.task.agrees, answered.predictions, shadow.predictions))
        except (Overloaded, TooLarge):
            self._count(answered, version, "skipped", len(answered.texts))
        except AdapterdError as error:
            log.warning("shadow failed", adapter=answered.name, version=version, error=error.message)
            self._count(answered, version, "failed", len(answered.texts))
        except Exception:
            log.exception("shadow failed", adapter=answered.name, version=version)
            self._count(answered, version, "failed", len(answered.texts))
        else:
            self._count(answered, version, "agreed", agreed)
            self._count(answered, version, "disagreed", len(shadow.predictions) - agreed)

    def _count(self, answered: Answered, version: str, outcome: str, texts: int) -> None:
        if texts:
            self._metrics.count_shadow(answered.name, version[:SHORT], outcome, texts)
