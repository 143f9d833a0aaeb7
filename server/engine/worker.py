"""The one thread that owns the device: takes batches from the scheduler, runs them, and ends every future."""

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from server.engine.runner import Row, Runner
from server.engine.scheduler import Batch, Scheduler
from server.errors import AdapterdError, Overloaded, ShuttingDown
from server.logs import get_logger
from server.metrics import Metrics

log = get_logger("adapterd.worker")


class Ticket:
    """The rows of one request: gathers their answers and ends one future when all are there or any has failed."""

    def __init__(self, size: int) -> None:
        """`size`: answers to wait for."""
        self.future: Future[list[Any]] = Future()
        self._answers: list[Any] = [None] * size
        self._missing = size

    @property
    def ended(self) -> bool:
        """Nobody waits any more: answered, failed or cancelled."""
        return self.future.done()

    def put(self, index: int, answer: Any) -> None:
        """The answer to one row."""
        self._answers[index] = answer
        self._missing -= 1
        if self._missing == 0 and self.future.set_running_or_notify_cancel():
            self.future.set_result(self._answers)

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error, if it has not ended yet."""
        if not self.ended and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class QueuedRow:
    """A row on its way through the scheduler."""

    row: Row
    ticket: Ticket
    index: int

    @property
    def tokens(self) -> int:
        """Its share of a batch."""
        return self.row.tokens

    @property
    def abandoned(self) -> bool:
        """The request has ended."""
        return self.ticket.ended


class Worker:
    """Runs batches until it is stopped. What it is given always ends: in an answer or in an error."""

    def __init__(self, runner: Runner, scheduler: Scheduler[QueuedRow], metrics: Metrics) -> None:
        """Takes the runner and the scheduler over."""
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="adapterd-device", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it takes work."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finishes the running batch; what still waits fails with ShuttingDown."""
        with self._changed:
            self._stopping = True
            waiting = self._scheduler.drain()
            self._changed.notify()
        _fail(waiting, ShuttingDown("the server is shutting down"))
        self._thread.join()

    def submit(self, rows: Sequence[Row]) -> Ticket:
        """Queues the rows of one request. Raises Overloaded or ShuttingDown; never blocks on the device."""
        ticket = Ticket(len(rows))
        with self._changed:
            if not self.alive:
                raise ShuttingDown("the server is shutting down")
            try:
                self._scheduler.admit([QueuedRow(row, ticket, index) for index, row in enumerate(rows)])
            except Overloaded:
                self._metrics.rejected.inc()
                raise
            self._metrics.queue_tokens.set(self._scheduler.tokens)
            self._changed.notify()
        return ticket

    def _loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            started = time.perf_counter()
            self._run(batch.work)
            self._measure(batch, time.perf_counter() - started)

    def _next_batch(self) -> Batch[QueuedRow] | None:
        """Waits for work; None when stopped."""
        with self._changed:
            while True:
                if self._stopping:
                    return None
                batch = self._scheduler.next_batch()
                self._metrics.queue_tokens.set(self._scheduler.tokens)
                if batch is not None:
                    return batch
                self._changed.wait()

    def _run(self, work: list[QueuedRow]) -> None:
        try:
            answers = self._runner.run([queued.row for queued in work])
        except Exception as error:
            self._metrics.batch_failures.inc()
            self._isolate(work, error)
            return
        for queued, answer in zip(work, answers, strict=True):
            queued.ticket.put(queued.index, answer)

    def _isolate(self, work: list[QueuedRow], error: Exception) -> None:
        """A failed batch is run again adapter by adapter, so that a bad one fails nobody but its own callers."""
        if isinstance(error, AdapterdError):
            log.warning("batch failed", texts=len(work), error=error.message)
        else:
            log.error("batch failed", texts=len(work), exc_info=error)
        by_adapter = sorted(work, key=_adapter)
        groups = [list(group) for _, group in groupby(by_adapter, key=_adapter)]
        if len(groups) > 1:
            for group in groups:
                self._run(group)
        else:
            failure = error if isinstance(error, AdapterdError) else AdapterdError("this batch failed on the device")
            _fail(work, failure)

    def _measure(self, batch: Batch[QueuedRow], seconds: float) -> None:
        metrics = self._metrics
        metrics.batch_seconds.observe(seconds)
        metrics.batch_texts.observe(len(batch.work))
        metrics.batch_tokens.observe(batch.tokens)
        metrics.batch_adapters.observe(len({_adapter(queued) for queued in batch.work}))
        for wait in batch.waits:
            metrics.queue_seconds.observe(wait)


def _adapter(queued: QueuedRow) -> int:
    return id(queued.row.adapter)


def _fail(work: Iterable[QueuedRow], error: BaseException) -> None:
    for queued in work:
        queued.ticket.fail(error)
