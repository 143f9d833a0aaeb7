"""The threads that own the device, one for each of its streams: they take batches from the scheduler, run them, and end
every future."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch

from server import processors
from server.core import PLAIN, AdapterRef, Terms
from server.engine.quarantine import Quarantine
from server.engine.recent import ANSWERED, RanBatch, RecentBatches
from server.engine.runner import Row, Runner
from server.engine.scheduler import Batch, Scheduler, Unit
from server.errors import AdapterdError, AdapterQuarantined, DeadlineExceeded, DeviceStopped, MemoryFull, ShuttingDown
from server.logs import get_logger
from server.metrics import Metrics
from server.tracing import OFF, Attributes, Place, Tracing, about

log = get_logger("adapterd.worker")

STREAMS = 2
"""Batches side by side on a CPU that has the processors for it."""

WIDE_TOKENS = 256
"""A batch of more that has the device to itself is computed on all processors. One of less takes no longer on its
stream's own, where nobody is waited for."""

STOP_SECONDS = 3.0
"""How long stopping waits for the running batches. A device that hangs must not keep the process."""

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What torch says where the host has none, in a RuntimeError."""


class Ticket:
    """The rows of one request: gathers their answers and ends one future when all are there or any has failed.

    Once it has ended nothing of it refers back to it, so its texts and its adapter go with the last who asks for them,
    and not only when the collector comes: an adapter that has left would still be in memory.
    """

    def __init__(self, size: int, strict: bool = False, place: Place | None = None) -> None:
        """`size`: answers to wait for. `strict`: see Terms. `place`: where it stands in a trace."""
        self.future: Future[list[Any]] = Future()
        self._lock = threading.Lock()  # rows may run in several streams at once; not held while the future ends
        self._ending = False
        self._answers: list[Any] = [None] * size
        self.outcome = ANSWERED
        """What has become of it up to now; else `cancelled`, or the code of an error."""
        self.missing = size
        """Answers that are not there yet."""
        self.strict = strict
        self.place = place
        self.failed: int | None = None
        """Index of the row that ended the request; None where it was no row's fault."""
        self.withdraw: Callable[[], None] | None = None
        """Takes back what still waits; called where the request ends before all its answers are there."""

    @property
    def error(self) -> str | None:
        """Its outcome, unless it is well up to now."""
        return None if self.outcome == ANSWERED else self.outcome

    @property
    def ended(self) -> bool:
        """Nobody waits any more: answered, failed or cancelled."""
        return self.future.done()

    def put(self, index: int, answer: Any) -> None:
        """The answer to one row."""
        with self._lock:
            self._answers[index] = answer
            self.missing -= 1
        if self.missing == 0 and self._ends():
            self.withdraw = None
            self.future.set_result(self._answers)

    def fail(self, error: BaseException, index: int | None = None) -> None:
        """Ends the request with an error, because of one row if `index` says so, unless it has ended."""
        if self._ends():
            self.failed = index
            self.outcome = error.error_code if isinstance(error, AdapterdError) else AdapterdError.code
            self._withdraw()  # first: who is told may come again at once
            self.future.set_exception(error)

    def cancel(self) -> bool:
        """Gives the request up. False where it has ended."""
        if not self.future.cancel():
            return False
        self.outcome = "cancelled"
        self._withdraw()
        return True

    async def answers(self) -> list[Any]:
        """Waits on an event loop for all of them, or raises what the request failed with. Whoever is cancelled while
        waiting gives it up."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        self.future.add_done_callback(partial(_tell, loop, ended))
        try:
            await ended
        except asyncio.CancelledError:
            self.cancel()
            raise
        try:
            return self.future.result(timeout=0)
        finally:
            del self  # an error's traceback holds what is here

    def _withdraw(self) -> None:
        withdraw, self.withdraw = self.withdraw, None
        if withdraw is not None:
            withdraw()

    def _ends(self) -> bool:
        """Whether it is the caller's to end the future: the first one's, if nobody has cancelled it."""
        with self._lock:
            first, self._ending = not self._ending, True
        return first and self.future.set_running_or_notify_cancel()


def _tell(loop: asyncio.AbstractEventLoop, ended: asyncio.Future[None], _: object) -> None:
    with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
        loop.call_soon_threadsafe(_wake, ended)


def _wake(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


@dataclass(frozen=True, slots=True)
class QueuedRow:
    """A row on its way through the scheduler."""

    row: Row
    ticket: Ticket
    index: int
    ref: AdapterRef | None = None
    """Whose row it is; None: the server's own."""

    @property
    def tokens(self) -> int:
        """Its share of a batch."""
        return self.row.tokens

    @property
    def adapter(self) -> str:
        """In whose name it runs."""
        return self.ref.name if self.ref else ""


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker has to do at one moment."""

    requests_waiting: int
    """Requests of which nothing runs yet."""
    requests_running: int
    queue_share: float
    """Of the queue: how much is taken, 0 to 1."""
    running: Sequence[str]
    """Adapters in the running batches."""
    waiting: Sequence[str]
    """Adapters for which work waits, in the order of priority and arrival."""


_Outcomes = dict[AdapterRef, AdapterdError | None]
"""Of a batch that failed: adapters none of whose rows could be answered, and why; None: some could."""


@dataclass(frozen=True, slots=True)
class Streams:
    """How a device runs batches: so many side by side."""

    count: int = 1
    threads: int | None = None
    """Processors that each of them computes on; None where that is not a CPU."""
    all_threads: int | None = None
    """Those of a large batch that is the only one."""

    @classmethod
    def of(cls, device: torch.device, count: int | None) -> "Streams":
        """So many on a device, or as many as are good for most. Those of a CPU share its processors.

        Batches on few processors each do not wait for all of them after every product, of which adapters and short
        texts make many small ones, nor for whoever else keeps one of them busy. But each needs Python's lock, which
        more than a few only wait for.
        """
        if device.type != "cpu":
            return cls(count or 1)
        here = processors.count()
        count = count or min(STREAMS, here)
        return cls(count, max(1, here // count), here)

    def threads_of(self, batch: Batch[Any]) -> int | None:
        """Processors for a batch; None: not a CPU."""
        return self.all_threads if batch.alone and batch.tokens > WIDE_TOKENS else self.threads


class Worker:
    """Runs batches until it is stopped. What it is given always ends: in an answer or in an error."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler[QueuedRow],
        metrics: Metrics,
        quarantine: Quarantine | None = None,
        tracing: Tracing = OFF,
        streams: Streams = Streams(),
    ) -> None:
        """Takes the runner and the scheduler over; the runner has to bear as many callers as there are streams."""
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._tracing = tracing
        self._quarantine = quarantine or Quarantine(metrics)
        self._changed = threading.Condition()
        self._stopping = False
        self._streams = streams
        self._idle = 0
        self._running: list[Sequence[QueuedRow]] = [()] * streams.count
        """The batch of each stream."""
        self._since = [0.0] * streams.count
        """When each stream's last batch ended, or when it last stopped waiting for work."""
        self._threads = [
            threading.Thread(target=self._work, args=(stream,), name=f"adapterd-device-{stream}", daemon=True)
            for stream in range(streams.count)
        ]
        self.recent = RecentBatches()
        """Those that ran last."""
        self.crashed = False
        """A thread has died, which none ever should."""

    @property
    def alive(self) -> bool:
        """Whether it takes work."""
        return not self._stopping and all(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finishes the running batches; what still waits fails with ShuttingDown."""
        self._close(ShuttingDown("the server is shutting down"))
        until = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def check(self, refs: Sequence[AdapterRef | None], tokens: int, terms: Terms) -> None:
        """Raises what `submit` would for so many tokens, or would once what is expected has been submitted: before a
        request costs anything."""
        with self._changed:
            self._check_alive()
            first = refs[0] if refs else None
            self._scheduler.check(first.name if first else "", tokens, terms)
        self._quarantine.check(filter(None, refs))

    @contextmanager
    def expecting(self, ref: AdapterRef | None, tokens: int, terms: Terms) -> Iterator[None]:
        """Meanwhile a request for an adapter is made ready to be submitted: `check` counts its tokens."""
        name = ref.name if ref else ""
        with self._changed:
            self._scheduler.expect(name, tokens, terms.priority)
        try:
            yield
        finally:
            with self._changed:
                self._scheduler.expect(name, -tokens, terms.priority)

    def load(self) -> Load:
        """What runs and what waits now."""
        with self._changed:
            running, waiting = list(chain.from_iterable(self._running)), list(self._scheduler.waiting())
            share = self._scheduler.share
        running_tickets = {queued.ticket for queued in running}
        return Load(
            requests_waiting=len({queued.ticket for queued in waiting} - running_tickets),
            requests_running=len(running_tickets),
            queue_share=share,
            running=_names(running),
            waiting=_names(waiting),
        )

    def submit(
        self, rows: Sequence[Row], refs: Sequence[AdapterRef | None] | None = None, terms: Terms = PLAIN
    ) -> Ticket:
        """Queues the rows of one request. `refs`: whose each of them is; the server's own by default.

        Raises Overloaded, AdapterQuarantined, ShuttingDown or DeviceStopped; never blocks on the device.
        """
        ticket = Ticket(len(rows), terms.strict, self._tracing.place())
        groups: dict[int, list[QueuedRow]] = {}  # rows of one text share work
        for index, (row, ref) in enumerate(zip(rows, refs or [None] * len(rows), strict=True)):
            groups.setdefault(id(row.text), []).append(QueuedRow(row, ticket, index, ref))
        with self._changed:
            self._check_alive()
            units = self._scheduler.admit(list(groups.values()), terms)
            try:
                self._quarantine.enter(filter(None, refs or ()))
            except AdapterQuarantined:
                self._scheduler.discard(units)
                raise
            ticket.withdraw = partial(self._withdraw, ticket, units)
            self._measure_queue()
            self._changed.notify()
        return ticket

    def _withdraw(self, ticket: Ticket, units: Sequence[Unit[QueuedRow]]) -> None:
        """Of a request that was given up, or has failed: the rest of it makes room."""
        with self._changed:
            self._scheduler.discard(units)
            self._measure_queue()
            running = ticket.place is not None and any(
                queued.ticket is ticket for queued in chain.from_iterable(self._running)
            )
        if ticket.place is not None and not running:
            try:
                self._tracing.never_ran(ticket.place, ticket.outcome)
            except Exception:  # the caller may be the device's thread, which has others to answer
                log.exception("a request cannot be told of")

    def _check_alive(self) -> None:
        if self.crashed:
            raise DeviceStopped("the device's thread has died; the server has to be restarted")
        if not self.alive:
            raise ShuttingDown("the server is shutting down")

    def _close(self, reason: AdapterdError) -> None:
        """Takes no more work; what waits fails."""
        with self._changed:
            self._stopping = True
            waiting = self._scheduler.drain()
            self._measure_queue()
            self._changed.notify_all()
        _fail(waiting, reason)

    def _work(self, stream: int) -> None:
        try:
            backlog = False
            while (batch := self._next_batch(stream)) is not None:
                if (threads := self._streams.threads_of(batch)) is not None:
                    processors.use(threads)
                started = time.perf_counter()
                self._run(batch.work)
                before, ended = self._since[stream], time.perf_counter()
                if backlog and batch.backlog:  # from end to end: what happens between batches takes time as well
                    self._measure_throughput(batch.tokens, ended - before)
                self._since[stream] = ended
                self._measure(batch, ended - started)
                backlog = batch.backlog
                self._running[stream] = ()
        except BaseException as error:
            log.critical("the device's thread has died", exc_info=error)
            self.crashed = True
            reason = DeviceStopped("the device's thread has died; the server has to be restarted")
            _fail(self._running[stream], reason)
            self._close(reason)

    def _next_batch(self, stream: int) -> Batch[QueuedRow] | None:
        """Waits for work; None when stopped."""
        with self._changed:
            self._idle += 1
            try:
                while not self._stopping:
                    _fail(self._scheduler.expire(), DeadlineExceeded("the request waited until its deadline"))
                    pause = self._scheduler.pause(self._idle)
                    batch = self._scheduler.next_batch(self._idle) if pause == 0 else None
                    self._measure_queue()
                    if batch is not None:
                        self._running[stream] = batch.work
                        if batch.backlog:
                            self._changed.notify()  # the next idle stream
                        return batch
                    self._changed.wait(pause)
                    self._since[stream] = time.perf_counter()  # others may take what a batch has left waiting
                return None
            finally:
                self._idle -= 1

    def _run(self, work: Sequence[QueuedRow]) -> None:
        outcomes: _Outcomes = {}
        self._attempt(work, outcomes)
        for ref, error in outcomes.items():
            if error is None:
                self._quarantine.succeeded(ref)
            elif refusal := self._quarantine.failed(ref, error):
                with self._changed:
                    waiting = [queued for queued in self._scheduler.waiting() if _same_version(queued.ref, ref)]
                _fail(waiting, refusal)

    def _attempt(self, work: Sequence[QueuedRow], outcomes: _Outcomes) -> None:
        """Runs rows together. Where that fails they are taken apart until what cannot be answered fails alone."""
        error = self._answer(work)
        if error is None:
            outcomes.update(dict.fromkeys(queued.ref for queued in work if queued.ref))
            return
        self._metrics.batch_failures.inc()
        no_memory = _out_of_memory(error)
        if no_memory:
            with self._changed:
                self._scheduler.shrink()
        groups = _by_adapter(work)
        if len(groups) == 1:
            for queued in work:
                if queued.ticket.strict:
                    queued.ticket.fail(_failure(error), queued.index)
        # By adapter, so that a bad one fails nobody but its own callers; then halves, so that a bad text fails alone.
        parts = groups if len(groups) > 1 and not no_memory else _halves(work)
        for part in parts:
            if wanted := [queued for queued in part if not queued.ticket.ended]:
                self._attempt(wanted, outcomes)
        if not parts:
            [queued] = work
            failure = _failure(error)
            queued.ticket.fail(failure, queued.index)
            if queued.ref is not None and not no_memory:
                outcomes.setdefault(queued.ref, failure)

    def _answer(self, work: Sequence[QueuedRow]) -> Exception | None:
        """Runs rows together and hands the answers out. What went wrong, without what it holds on to: the memory of
        the forward that failed is free when this returns."""
        try:
            answers = self._runner.run([queued.row for queued in work])
        except Exception as error:
            if isinstance(error, AdapterdError):
                log.warning("batch failed", texts=len(work), error=error.message)
            else:
                log.error("batch failed", texts=len(work), exc_info=error)
            error.__context__ = error.__cause__ = None
            return error.with_traceback(None)
        for queued, answer in zip(work, answers, strict=True):
            queued.ticket.put(queued.index, answer)
        return None

    def _measure(self, batch: Batch[QueuedRow], seconds: float) -> None:
        """Tells others of a batch. It has been answered: what goes wrong here is no reason to die."""
        try:
            self._tell(batch, seconds)
        except Exception:
            log.exception("a batch cannot be told of")

    def _tell(self, batch: Batch[QueuedRow], seconds: float) -> None:
        if traced := {
            place: queued.ticket.error for queued in batch.work if (place := queued.ticket.place) is not None
        }:
            self._tracing.batch_ran(traced, seconds, _attributes(batch))
        metrics = self._metrics
        metrics.batch_seconds.observe(seconds)
        metrics.batch_texts.observe(len(batch.work))
        metrics.batch_tokens.observe(batch.tokens)
        metrics.batch_adapters.observe(len({id(queued.row.adapter) for queued in batch.work}))
        for wait in batch.waits:
            metrics.queue_seconds.observe(wait)
        metrics.batch_budget.set(self._scheduler.budget)
        self.recent.note(_record(batch, seconds))

    def _measure_throughput(self, tokens: int, seconds: float) -> None:
        with self._changed:
            self._scheduler.ran(tokens, seconds)
            self._metrics.throughput.set(self._scheduler.throughput or 0.0)

    def _measure_queue(self) -> None:
        for priority, tokens in self._scheduler.tokens.items():
            self._metrics.queue_tokens.labels(priority).set(tokens)


def _by_adapter(work: Sequence[QueuedRow]) -> list[Sequence[QueuedRow]]:
    return [list(group) for _, group in groupby(sorted(work, key=_adapter), key=_adapter)]


def _halves(work: Sequence[QueuedRow]) -> list[Sequence[QueuedRow]]:
    """Two; none of a single row."""
    middle = len(work) // 2
    return [work[:middle], work[middle:]] if middle else []


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY in str(error)
    )


def _failure(error: Exception) -> AdapterdError:
    """What the caller of a row that cannot be answered gets to see."""
    if _out_of_memory(error):
        return MemoryFull("the device has no memory left for this text")
    return error if isinstance(error, AdapterdError) else AdapterdError("this batch failed on the device")


def _names(work: Iterable[QueuedRow]) -> list[str]:
    """The adapters of rows, each once; the server's own work has none."""
    return list(dict.fromkeys(queued.ref.name for queued in work if queued.ref))


def _record(batch: Batch[QueuedRow], seconds: float) -> RanBatch:
    """What is kept of a batch: nothing that holds a text, an answer or an adapter."""
    return RanBatch(
        started_at=time.time() - seconds,
        seconds=seconds,
        tokens=batch.tokens,
        backlog=batch.backlog,
        refs=[queued.ref for queued in batch.work],
        row_tokens=batch.sizes,
        waits=batch.waits,
        outcomes=[queued.ticket.outcome for queued in batch.work],
    )


def _attributes(batch: Batch[QueuedRow]) -> Attributes:
    """What a trace tells of a batch."""
    refs = {queued.ref for queued in batch.work if queued.ref}
    weights = {id(queued.row.adapter): queued.row.adapter.weights for queued in batch.work}
    return {
        **about(sorted(refs, key=lambda ref: (ref.name, ref.version))),
        "adapterd.methods": sorted({part.method.name for own in weights.values() for part in own.parts}),
        "adapterd.requests": len({queued.ticket for queued in batch.work}),
        "adapterd.rows": len(batch.work),
        "adapterd.tokens": batch.tokens,
    }


def _same_version(one: AdapterRef | None, other: AdapterRef) -> bool:
    return one is not None and (one.name, one.version) == (other.name, other.version)


def _adapter(queued: QueuedRow) -> int:
    return id(queued.row.adapter)


def _fail(work: Iterable[QueuedRow], error: BaseException) -> None:
    for queued in work:
        queued.ticket.fail(error)
