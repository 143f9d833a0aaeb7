"""The device's thread: every future ends, whatever the device does."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from server.adapters.base import AdapterWeights
from server.core import Encoding
from server.engine.runner import Row
from server.engine.scheduler import Scheduler
from server.engine.worker import QueuedRow, Ticket, Worker
from server.errors import AdapterdError, Overloaded, ShuttingDown
from server.metrics import Metrics
from server.tasks import TASKS
from server.tasks.adapter import TaskAdapter
from server.tasks.head import LayersConfig


def adapter(label: str) -> TaskAdapter:
    return TaskAdapter(AdapterWeights(()), TASKS["classification"], LayersConfig(), None, (label,), 0)


GOOD, OTHER, BAD = adapter("good"), adapter("other"), adapter("bad")


def row(whose: TaskAdapter, tokens: int = 3) -> Row:
    return Row(Encoding((1,) * tokens, (0,) * tokens, truncated=False), whose)


class FaultyRunner:
    """Fails where a batch holds the bad adapter; answers with the adapter's label and the batch's number."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception = RuntimeError("device lost")

    def run(self, rows: Sequence[Row]) -> list[Any]:
        self.gate.wait(10)
        self.batches.append([row.adapter.labels[0] for row in rows])
        if any(row.adapter is BAD for row in rows):
            raise self.error
        return [row.adapter.labels[0] for row in rows]


@pytest.fixture
def runner() -> FaultyRunner:
    return FaultyRunner()


@pytest.fixture
def worker(runner: FaultyRunner) -> Iterator[Worker]:
    scheduler = Scheduler[QueuedRow](max_batch_tokens=30, max_queue_tokens=60, clock=time.monotonic)
    worker = Worker(runner, scheduler, Metrics())  # type: ignore[arg-type]
    worker.start()
    yield worker
    runner.gate.set()
    worker.stop()


def result(ticket: Ticket) -> list[Any]:
    return ticket.future.result(timeout=10)


def hold(worker: Worker, runner: FaultyRunner) -> Ticket:
    """Occupies the device until the gate is opened."""
    runner.gate.clear()
    ticket = worker.submit([row(GOOD)])
    while worker._scheduler.tokens:
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


def test_an_error_with_a_status_keeps_it(worker: Worker, runner: FaultyRunner) -> None:
    runner.error = AdapterdError("not finite", code="not_finite_output")
    with pytest.raises(AdapterdError) as caught:
        result(worker.submit([row(BAD), row(BAD)]))
    assert caught.value.error_code == "not_finite_output"


def test_a_cancelled_request_is_not_run(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    gone, kept = worker.submit([row(OTHER)]), worker.submit([row(GOOD)])
    assert gone.future.cancel()
    runner.gate.set()
    assert result(first) == result(kept) == ["good"]
    assert ["other"] not in runner.batches


def test_cancelling_a_running_request_harms_nothing(worker: Worker, runner: FaultyRunner) -> None:
    first = hold(worker, runner)
    first.future.cancel()
    runner.gate.set()
    assert result(worker.submit([row(GOOD)])) == ["good"]


def test_a_full_queue_refuses(worker: Worker, runner: FaultyRunner) -> None:
    hold(worker, runner)
    waiting = worker.submit([row(GOOD, 50)])
    with pytest.raises(Overloaded):
        worker.submit([row(GOOD, 20)])
    assert worker._metrics.rejected._value.get() == 1
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
