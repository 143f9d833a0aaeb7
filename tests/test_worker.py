"""The device's thread: every future ends, whatever the device does."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from server import processors
from server.adapters.base import AdapterWeights
from server.core import AdapterRef, Encoding, Priority, Terms
from server.engine.quarantine import Quarantine
from server.engine.recent import KEPT, RanBatch, RecentBatches
from server.engine.runner import Row
from server.engine.scheduler import Batch, Scheduler
from server.engine.worker import WIDE_TOKENS, QueuedRow, Streams, Ticket, Worker
from server.errors import (
    AdapterdError,
    AdapterQuarantined,
    DeadlineExceeded,
    DeviceStopped,
    MemoryFull,
    Overloaded,
    ShuttingDown,
)
from server.metrics import Metrics
from server.tasks import TASKS
from server.tasks.adapter import TaskAdapter
from server.tasks.head import LayersConfig


def adapter(label: str) -> TaskAdapter:
    return TaskAdapter(AdapterWeights(()), TASKS["classification"], LayersConfig(), None, (label,), 0)


GOOD, OTHER, BAD = adapter("good"), adapter("other"), adapter("bad")


def row(whose: TaskAdapter, tokens: int = 3) -> Row:
    return Row(Encoding((1,) * tokens, (0,) * tokens, truncated=False), whose)


def ref(whose: TaskAdapter) -> AdapterRef:
    return AdapterRef(whose.labels[0], "sha256:1", 1)


POISON = 13
"""Tokens of a text that no adapter survives."""


class FaultyRunner:
    """Fails where a batch holds the bad adapter or a poisonous text; answers with the adapter's label."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException = RuntimeError("device lost")
        self.bad = BAD
        self.fits = 1000
        """Tokens for which there is memory."""
        self.threads: list[int] = []
        """On how many processors each batch was computed."""

    def run(self, rows: Sequence[Row]) -> list[Any]:
        self.gate.wait(10)
        self.batches.append([row.adapter.labels[0] for row in rows])
        self.threads.append(torch.get_num_threads())
        if sum(row.tokens for row in rows) > self.fits:
            raise self.error
        if any(row.adapter is self.bad or row.tokens == POISON for row in rows):
            raise self.error
        return [row.adapter.labels[0] for row in rows]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def runner() -> FaultyRunner:
    return FaultyRunner()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(runner: FaultyRunner, clock: Clock) -> Iterator[Worker]:
    scheduler = Scheduler[QueuedRow](max_batch_tokens=30, max_queue_tokens=60, clock=clock)
    metrics = Metrics()
    worker = Worker(
        runner,
        scheduler,
        metrics,
        Quarantine(metrics, failures=2, pause_seconds=10, clock=clock),
    )
    worker.start()
    yield worker
    runner.gate.set()
    worker.stop()


def result(ticket: Ticket) -> list[Any]:
    return ticket.future.result(timeout=10)


def test_what_fails_after_a_batch_has_been_answered_kills_nothing(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: RanBatch) -> None:
        raise ValueError("no such series")

    monkeypatch.setattr(worker.recent, "note", broken)
    for _ in range(2):
        assert result(worker.submit([row(GOOD)], [ref(GOOD)])) == ["good"]
    assert worker.alive
    assert not worker.crashed


def waiting(worker: Worker) -> int:
    return sum(worker._scheduler.tokens.values())


def series(worker: Worker, name: str) -> dict[str, float]:
    """A series' values by its labels."""
    samples = [sample for family in worker._metrics.registry.collect() for sample in family.samples]
    return {",".join(sample.labels.values()): sample.value for sample in samples if sample.name == name}


def hold(worker: Worker, runner: FaultyRunner) -> Ticket:
    """Occupies the device until the gate is opened."""
    runner.gate.clear()
    ticket = worker.submit([row(GOOD)])
    while waiting(worker):
        time.sleep(0.001)
    return ticket


def test_answers_come_in_the_order_of_the_rows(worker: Worker) -> None:
    assert result(worker.submit([row(GOOD), row(OTHER), row(GOOD)])) == ["good", "other", "good"]


def test_what_arrives_while_the_device_is_busy_runs_together(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    tickets = [worker.submit([row(GOOD)]), worker.submit([row(OTHER), row(OTHER)])]
    runner.gate.set()
    assert [result(ticket) for ticket in [first, *tickets]] == [["good"], ["good"], ["other", "other"]]
    assert runner.batches == [["good"], ["good", "other", "other"]]


def test_a_request_may_be_spread_over_several_batches(worker: Worker, runner: FaultyRunner) -> None:
    assert result(worker.submit([row(GOOD, 20), row(OTHER, 20), row(GOOD, 20)])) == ["good", "other", "good"]
    assert runner.batches == [["good"], ["other"], ["good"]]


def test_a_bad_adapter_fails_nobody_but_its_own_callers(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    good, bad, other = (worker.submit([row(whose)]) for whose in (GOOD, BAD, OTHER))
    runner.gate.set()
    assert [result(ticket) for ticket in (first, good, other)] == [["good"], ["good"], ["other"]]
    with pytest.raises(AdapterdError, match="this batch failed on the device"):
        result(bad)
    assert result(worker.submit([row(GOOD)])) == ["good"]  # and the thread lives on


def test_a_request_knows_the_row_that_ended_it(worker: Worker, runner: FaultyRunner) -> None:
    failed = worker.submit([row(GOOD), row(OTHER), row(BAD), row(GOOD)])
    with pytest.raises(AdapterdError):
        result(failed)
    assert failed.failed == 2
    hold(worker, runner)
    stopped = worker.submit([row(GOOD)])
    worker._close(ShuttingDown("bye"))
    with pytest.raises(ShuttingDown):
        result(stopped)
    assert stopped.failed is None


def test_an_error_with_a_status_keeps_it(worker: Worker, runner: FaultyRunner) -> None:
    runner.error = AdapterdError("not finite", code="not_finite_output")
    with pytest.raises(AdapterdError) as caught:
        result(worker.submit([row(BAD), row(BAD)]))
    assert caught.value.error_code == "not_finite_output"


def test_a_cancelled_request_is_not_run(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    gone, kept = worker.submit([row(OTHER)]), worker.submit([row(GOOD)])
    assert gone.cancel()
    runner.gate.set()
    assert result(first) == result(kept) == ["good"]
    assert ["other"] not in runner.batches


def test_cancelling_a_running_request_harms_nothing(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    first.cancel()
    runner.gate.set()
    assert result(worker.submit([row(GOOD)])) == ["good"]


def test_a_full_queue_refuses(worker: Worker, runner: FaultyRunner) -> None:
    hold(worker, runner)
    waiting = worker.submit([row(GOOD, 50)])
    with pytest.raises(Overloaded):
        worker.submit([row(GOOD, 20)])
    runner.gate.set()
    assert result(waiting) == ["good"]


def test_stopping_finishes_the_running_batch_and_ends_the_rest(worker: Worker, runner: FaultyRunner) -> None:
    running = hold(worker, runner)
    waiting = worker.submit([row(GOOD)])
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    with pytest.raises(ShuttingDown):
        result(waiting)
    runner.gate.set()
    stopper.join(10)
    assert result(running) == ["good"]
    with pytest.raises(ShuttingDown):
        worker.submit([row(GOOD)])


def test_many_threads_get_their_own_answers(worker: Worker) -> None:
    wrong: list[object] = []

    def client(whose: TaskAdapter) -> None:
        for _ in range(50):
            if result(worker.submit([row(whose, 1)] * 2)) != [whose.labels[0]] * 2:
                wrong.append(whose)

    threads = [threading.Thread(target=client, args=(whose,)) for whose in (GOOD, OTHER) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def failure(ticket: Ticket) -> BaseException | None:
    return ticket.future.exception(timeout=10)


def test_a_poisonous_text_fails_alone(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    tickets = [worker.submit([row(GOOD, tokens)]) for tokens in (2, 3, POISON, 4, 5)]
    runner.gate.set()
    assert [failure(ticket) is None for ticket in [first, *tickets]] == [True, True, True, False, True, True]
    assert len(runner.batches) <= 1 + 1 + 2 * 3  # the first, all five, and two for each time they are halved


def test_rows_of_a_request_that_has_failed_are_not_run(worker: Worker, runner: FaultyRunner) -> None:
    assert failure(worker.submit([row(GOOD, POISON), *[row(GOOD, 2) for _ in range(8)], row(OTHER, 30)])) is not None
    assert result(worker.submit([row(GOOD)])) == ["good"]
    assert ["other"] not in runner.batches
    assert waiting(worker) == 0


def test_a_proof_fails_where_its_texts_fail_together(worker: Worker, runner: FaultyRunner) -> None:
    """Each of them alone might do."""
    runner.fits = 10
    rows = [row(GOOD, 6), row(GOOD, 6)]
    assert result(worker.submit(rows)) == ["good", "good"]
    assert failure(worker.submit(rows, terms=Terms(strict=True))) is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_memory_batches_become_smaller(error: Exception, worker: Worker, runner: FaultyRunner) -> None:
    runner.error, runner.fits = error, 12
    assert result(worker.submit([row(GOOD, 5)] * 6, [ref(GOOD)] * 6)) == ["good"] * 6
    assert worker._scheduler.budget < 30
    too_large = worker.submit([row(GOOD, 20)], [ref(GOOD)])
    assert isinstance(failure(too_large), MemoryFull)
    worker.check([ref(GOOD)], 1, Terms())  # nobody's fault


def test_a_stream_that_waits_is_not_slow(worker: Worker, runner: FaultyRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its last batch left waiting, somebody else may have taken, or given up."""
    starts: list[float] = []

    def ran(tokens: int, seconds: float) -> None:
        starts.append(time.perf_counter() - seconds)

    monkeypatch.setattr(worker._scheduler, "ran", ran)
    first = hold(worker, runner)
    last, given_up = worker.submit([row(GOOD, 30)]), worker.submit([row(GOOD, 30)])
    last.future.add_done_callback(lambda _: given_up.cancel())  # left waiting by the last batch
    runner.gate.set()
    result(first)
    result(last)
    wait_for(lambda: bool(worker._idle))
    starts.clear()
    time.sleep(0.05)
    resumed = time.perf_counter()
    result(worker.submit([row(GOOD, 30)] * 3))
    wait_for(lambda: len(starts) == 2)
    assert starts[0] >= resumed


def test_the_budget_is_measured(worker: Worker, runner: FaultyRunner) -> None:
    result(worker.submit([row(GOOD)]))
    while series(worker, "adapterd_batch_budget_tokens") != {"": 30}:
        time.sleep(0.001)


def fail(worker: Worker, times: int = 1) -> None:
    for _ in range(times):
        assert failure(worker.submit([row(BAD)], [ref(BAD)])) is not None


def quarantined(worker: Worker) -> dict[str, float]:
    return series(worker, "adapterd_quarantined_adapters")


def wait_for(condition: Callable[[], bool]) -> None:
    """What the thread does after it has ended a request."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_adapter_that_keeps_failing_is_left_out(worker: Worker, runner: FaultyRunner, clock: Clock) -> None:
    fail(worker)
    assert not quarantined(worker)
    fail(worker)
    wait_for(lambda: quarantined(worker) == {"bad": 1})
    with pytest.raises(AdapterQuarantined, match=r"'bad' is in quarantine: .* \(this batch failed") as refused:
        worker.check([ref(GOOD), ref(BAD)], 1, Terms())
    assert refused.value.retry_after == 10
    worker.check([ref(GOOD)], 1, Terms())
    worker.check([AdapterRef("bad", "sha256:2", 2)], 1, Terms())  # another version


def test_one_request_tries_an_adapter_in_quarantine(worker: Worker, runner: FaultyRunner, clock: Clock) -> None:
    fail(worker, 2)
    wait_for(lambda: bool(quarantined(worker)))
    clock.now += 10
    for _ in range(2):
        worker.check([ref(BAD)], 1, Terms())  # a request that is refused for something else uses nothing up
    held, waits = hold(worker, runner), worker.submit([row(GOOD, 30)])
    with pytest.raises(Overloaded):
        worker.submit([row(BAD, 60)], [ref(BAD)])
    tried = worker.submit([row(BAD)], [ref(BAD)])  # the one that is let through
    for refused in (lambda: worker.check([ref(BAD)], 1, Terms()), lambda: worker.submit([row(BAD)], [ref(BAD)])):
        with pytest.raises(AdapterQuarantined):
            refused()
    assert waiting(worker) == 33
    runner.gate.set()
    assert [result(held), result(waits)] == [["good"], ["good"]]
    assert failure(tried) is not None
    wait_for(lambda: worker._quarantine._records["bad", "sha256:1"].failures == 3)
    clock.now += 9
    with pytest.raises(AdapterQuarantined):
        worker.check([ref(BAD)], 1, Terms())
    clock.now += 1
    worker.check([ref(BAD)], 1, Terms())
    runner.bad = OTHER
    assert result(worker.submit([row(BAD)], [ref(BAD)])) == ["bad"]
    wait_for(lambda: not quarantined(worker))
    worker.check([ref(BAD)], 1, Terms())


def test_failures_in_a_row_are_needed(worker: Worker, runner: FaultyRunner) -> None:
    for _ in range(3):
        fail(worker)
        runner.bad = OTHER
        result(worker.submit([row(BAD)], [ref(BAD)]))
        runner.bad = BAD
    result(worker.submit([row(GOOD)], [ref(GOOD)]))
    assert not quarantined(worker)


def test_a_text_is_not_its_adapters_fault(worker: Worker, runner: FaultyRunner) -> None:
    for _ in range(4):
        first = hold(worker, runner)
        tickets = [worker.submit([row(GOOD, tokens)], [ref(GOOD)]) for tokens in (POISON, 2)]
        runner.gate.set()
        assert [failure(ticket) is None for ticket in (first, *tickets)] == [True, False, True]
    result(worker.submit([row(OTHER)], [ref(OTHER)]))
    assert not quarantined(worker)


def test_what_waits_for_an_adapter_in_quarantine_is_told_at_once(worker: Worker, runner: FaultyRunner) -> None:
    fail(worker)
    first = hold(worker, runner)
    tickets = [worker.submit([row(BAD, 20)], [ref(BAD)]) for _ in range(2)]
    runner.gate.set()
    result(first)
    assert not isinstance(failure(tickets[0]), AdapterQuarantined)
    assert isinstance(failure(tickets[1]), AdapterQuarantined)
    assert runner.batches.count(["bad"]) == 2


def test_a_later_release_ends_quarantine(worker: Worker) -> None:
    worker._quarantine.released("bad", 1)
    fail(worker, 2)
    wait_for(lambda: bool(quarantined(worker)))
    assert worker._quarantine.names() == {"bad"}
    worker._quarantine.released("good", 2)
    worker._quarantine.released("bad", 1)  # known already
    assert quarantined(worker)
    worker._quarantine.released("bad", 2)
    assert not quarantined(worker)
    assert worker._quarantine.names() == set()
    worker.check([ref(BAD)], 1, Terms())


def test_a_proof_ends_quarantine(worker: Worker) -> None:
    fail(worker, 2)
    wait_for(lambda: bool(quarantined(worker)))
    worker._quarantine.lift("good")
    assert quarantined(worker)
    worker._quarantine.lift("bad")
    assert not quarantined(worker)


def test_what_was_asked_for_before_a_release_does_not_bring_its_version_back_into_quarantine(worker: Worker) -> None:
    worker._quarantine.released("bad", 2)
    error = AdapterdError("this batch failed")
    old, new = AdapterRef("bad", "sha256:1", 1), AdapterRef("bad", "sha256:1", 2)
    assert [worker._quarantine.failed(old, error) for _ in range(3)] == [None] * 3
    assert worker._quarantine.failed(new, error) is None
    assert isinstance(worker._quarantine.failed(new, error), AdapterQuarantined)
    assert quarantined(worker) == {"bad": 1}


def test_what_is_too_late_is_not_run(worker: Worker, runner: FaultyRunner, clock: Clock) -> None:
    first = hold(worker, runner)
    late = worker.submit([row(OTHER)], terms=Terms(deadline=clock.now + 5))
    kept = worker.submit([row(GOOD)], terms=Terms(deadline=clock.now + 15))
    clock.now += 10
    runner.gate.set()
    assert result(first) == result(kept) == ["good"]
    assert isinstance(failure(late), DeadlineExceeded)
    assert ["other"] not in runner.batches


def test_a_cancelled_request_gives_its_place_up(worker: Worker, runner: FaultyRunner) -> None:
    hold(worker, runner)
    gone = worker.submit([row(GOOD, 20), row(OTHER, 20)])
    with pytest.raises(Overloaded):
        worker.submit([row(GOOD, 30)])
    gone.cancel()
    assert waiting(worker) == 0
    kept = worker.submit([row(GOOD, 30)])
    assert series(worker, "adapterd_queue_tokens") == {"high": 0, "normal": 30, "low": 0}
    runner.gate.set()
    assert result(kept) == ["good"]


def test_the_throughput_is_measured_while_work_waits(worker: Worker, runner: FaultyRunner) -> None:
    result(worker.submit([row(GOOD)]))
    first = hold(worker, runner)
    tickets = [worker.submit([row(GOOD, 20)], [ref(whose)]) for whose in (GOOD, OTHER)]
    tickets.append(worker.submit([row(BAD, 20)], terms=Terms(Priority.HIGH)))
    assert worker._scheduler.throughput is None
    runner.gate.set()
    for ticket in (first, *tickets[:2]):
        result(ticket)
    assert failure(tickets[2]) is not None
    wait_for(lambda: series(worker, "adapterd_throughput_tokens")[""] > 0)
    assert worker._scheduler.throughput == series(worker, "adapterd_throughput_tokens")[""]


class SlowRunner(FaultyRunner):
    """Notes how many run at once, each for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.together: threading.Barrier | None = None

    def run(self, rows: Sequence[Row]) -> list[Any]:
        if self.together is not None:
            self.together.wait(10)
        time.sleep(0.0005)  # so that others get to run
        return super().run(rows)


@pytest.fixture
def slow() -> SlowRunner:
    return SlowRunner()


@pytest.fixture
def streams(slow: SlowRunner) -> Iterator[Worker]:
    """A worker with three streams."""
    scheduler = Scheduler[QueuedRow](max_batch_tokens=30, max_queue_tokens=60_000, clock=time.monotonic, streams=3)
    worker = Worker(slow, scheduler, Metrics(), streams=Streams(3))
    worker.start()
    yield worker
    slow.gate.set()
    worker.stop()


def test_streams_run_side_by_side(streams: Worker, slow: SlowRunner) -> None:
    slow.together = threading.Barrier(3)  # none goes on before three are there
    tickets = [streams.submit([row(whose, 30)]) for whose in (GOOD, OTHER, GOOD)]
    assert [result(ticket) for ticket in tickets] == [["good"], ["other"], ["good"]]


def test_what_runs_in_several_streams_is_all_running(streams: Worker, slow: SlowRunner) -> None:
    slow.gate.clear()
    ticket = streams.submit([row(whose, 30) for whose in (GOOD, OTHER, GOOD, GOOD)])
    wait_for(lambda: waiting(streams) == 30)
    load = streams.load()
    assert (load.requests_running, load.requests_waiting, list(load.running)) == (1, 0, [])
    slow.gate.set()
    assert result(ticket) == ["good", "other", "good", "good"]


def test_requests_are_answered_by_whichever_streams_run_their_rows(streams: Worker) -> None:
    wanted = [[(GOOD, OTHER)[(index + n) % 2] for n in range(12)] for index in range(60)]
    tickets = [streams.submit([row(whose, 9) for whose in own]) for own in wanted]
    for own, ticket in zip(wanted, tickets, strict=True):
        assert result(ticket) == [whose.labels[0] for whose in own]


def test_rows_that_fail_in_several_streams_end_their_request_once(streams: Worker) -> None:
    tickets = [streams.submit([row(BAD, 30)] * 6) for _ in range(30)]
    for ticket in tickets:
        assert isinstance(failure(ticket), AdapterdError)
    assert result(streams.submit([row(GOOD)])) == ["good"]
    assert streams.alive


@pytest.mark.parametrize("end", ["answered", "cancelled", "failed"])
def test_what_has_ended_does_not_wait_for_the_collector(worker: Worker, runner: FaultyRunner, end: str) -> None:
    """A ticket holds its rows, and those their adapter, which may have left meanwhile."""
    runner.error = AdapterdError("not finite", code="not_finite_output")
    gc.collect()
    gc.disable()
    try:
        first = hold(worker, runner)
        ticket = worker.submit([row(BAD if end == "failed" else GOOD)])
        if end == "cancelled":
            asyncio.run(_given_up(ticket))
        runner.gate.set()
        result(first)
        if end == "answered":
            assert asyncio.run(ticket.answers()) == ["good"]
        if end == "failed":
            assert asyncio.run(_raised(ticket)) == "not_finite_output"
        result(worker.submit([row(GOOD)]))  # the worker holds another batch
        gone = weakref.ref(ticket)
        del ticket
        wait_for(lambda: gone() is None)
    finally:
        gc.enable()


async def _raised(ticket: Ticket) -> str:
    try:
        await ticket.answers()
    except AdapterdError as error:
        del ticket
        return error.error_code
    raise AssertionError("nothing was raised")


async def _given_up(ticket: Ticket) -> None:
    waiting = asyncio.create_task(ticket.answers())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ticket.future.cancelled()


def test_a_request_that_several_rows_fail_blames_the_one_whose_error_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stream's row fails while the first one's error is on its way."""
    ticket = Ticket(2)
    ends = ticket.future.set_running_or_notify_cancel

    def meanwhile() -> bool:
        ticket.fail(MemoryFull("the second"), 1)
        return ends()

    monkeypatch.setattr(ticket.future, "set_running_or_notify_cancel", meanwhile)
    ticket.fail(AdapterdError("the first"), 0)
    assert (str(failure(ticket)), ticket.failed, ticket.outcome) == ("the first", 0, AdapterdError.code)


def test_a_stream_that_dies_ends_the_others_after_their_batch(streams: Worker, slow: SlowRunner) -> None:
    slow.gate.clear()
    good = streams.submit([row(GOOD, 30)])
    wait_for(lambda: not waiting(streams))
    slow.error = Died()
    bad = streams.submit([row(BAD, 30)])
    wait_for(lambda: not waiting(streams))
    slow.gate.set()
    assert result(good) == ["good"]
    assert isinstance(failure(bad), DeviceStopped)
    wait_for(lambda: not any(thread.is_alive() for thread in streams._threads))
    assert streams.crashed


def test_streams_of_a_processor_share_it() -> None:
    here = processors.count()
    assert Streams.of(torch.device("cpu"), 1) == Streams(1, here, here)
    assert Streams.of(torch.device("cpu"), 2) == Streams(2, max(1, here // 2), here)
    assert Streams.of(torch.device("cpu"), 64) == Streams(64, max(1, here // 64), here)
    assert Streams.of(torch.device("meta"), 2) == Streams(2)


def test_there_are_two_streams_where_there_are_processors_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, count, threads in ((1, 1, 1), (2, 2, 1), (3, 2, 1), (16, 2, 8)):
        monkeypatch.setattr(processors, "count", lambda here=here: here)
        assert Streams.of(torch.device("cpu"), None) == Streams(count, threads, here)
    assert Streams.of(torch.device("meta"), None) == Streams(1)


def test_a_large_batch_that_is_alone_is_computed_on_all_processors() -> None:
    streams = Streams(2, 1, 2)

    def batch(tokens: int, alone: bool) -> Batch[QueuedRow]:
        return Batch([], [], [], tokens, backlog=False, alone=alone)

    assert streams.threads_of(batch(WIDE_TOKENS + 1, alone=True)) == 2
    assert streams.threads_of(batch(WIDE_TOKENS, alone=True)) == 1
    assert streams.threads_of(batch(WIDE_TOKENS + 1, alone=False)) == 1
    assert Streams(1).threads_of(batch(WIDE_TOKENS + 1, alone=True)) is None


def test_streams_compute_on_what_their_batches_are_given(runner: FaultyRunner) -> None:
    scheduler = Scheduler[QueuedRow](max_batch_tokens=4000, max_queue_tokens=60_000, clock=time.monotonic, streams=2)
    worker = Worker(runner, scheduler, Metrics(), streams=Streams(2, 3, 5))
    here = torch.get_num_threads()
    worker.start()
    try:
        for tokens in (WIDE_TOKENS, WIDE_TOKENS + 1, WIDE_TOKENS):
            result(worker.submit([row(GOOD, tokens)]))
            wait_for(lambda: worker._idle == 2)
    finally:
        worker.stop()
        torch.set_num_threads(here)  # for threads that compute for the first time after this
    assert runner.threads == [3, 5, 3]


class Died(BaseException):
    """Nothing that a batch may raise."""


def test_a_thread_that_dies_leaves_nobody_waiting(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    tickets = [worker.submit([row(BAD, 20)]) for _ in range(2)]
    runner.error = Died()
    runner.gate.set()
    assert result(first) == ["good"]
    for ticket in tickets:
        assert isinstance(failure(ticket), DeviceStopped)
    wait_for(lambda: not worker._threads[0].is_alive())
    assert worker.crashed
    assert not worker.alive
    with pytest.raises(DeviceStopped):
        worker.submit([row(GOOD)])


def test_the_last_batches_are_kept_without_their_texts(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    tickets = [worker.submit([row(GOOD, 4)], [ref(GOOD)]), worker.submit([row(BAD)], [ref(BAD)])]
    runner.gate.set()
    result(first)
    assert result(tickets[0]) == ["good"]
    with pytest.raises(AdapterdError):
        result(tickets[1])
    worker.stop()
    latest, before = worker.recent.newest_first()
    assert [(one.adapter, one.version, one.tokens, one.outcome) for one in latest.rows] == [
        ("good", "sha256:1", 4, "answered"),
        ("bad", "sha256:1", 3, AdapterdError.code),
    ]
    assert (latest.tokens, latest.backlog, latest.rows[0].wait_seconds) == (7, False, 0.0)
    assert latest.seconds > 0
    assert [one.adapter for one in before.rows] == [""]
    assert worker.recent.newest_first(1) == [latest]


def test_a_request_that_was_given_up_is_told_apart(worker: Worker, runner: FaultyRunner) -> None:
    given_up = hold(worker, runner)
    given_up.cancel()
    runner.gate.set()
    result(worker.submit([row(GOOD)], [ref(GOOD)]))
    worker.stop()
    assert [[one.outcome for one in batch.rows] for batch in worker.recent.newest_first()] == [
        ["answered"],
        ["cancelled"],
    ]


def test_only_so_many_batches_are_kept() -> None:
    recent = RecentBatches()
    for number in range(KEPT + 3):
        recent.note(RanBatch(float(number), 0.0, 0, False, (), (), (), ()))
    kept = [batch.started_at for batch in recent.newest_first()]
    assert kept == [float(number) for number in range(KEPT + 2, 2, -1)]
