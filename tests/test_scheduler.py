"""The scheduler by tables: what waits, what runs together, what is refused."""

from dataclasses import dataclass

import pytest

from server.engine.scheduler import Batch, Scheduler
from server.errors import Overloaded


@dataclass
class Piece:
    name: str
    tokens: int
    abandoned: bool = False


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def scheduler(*, batch: int = 10, queue: int = 100, clock: Clock | None = None) -> Scheduler[Piece]:
    return Scheduler(max_batch_tokens=batch, max_queue_tokens=queue, clock=clock or Clock())


def pieces(*tokens: int) -> list[Piece]:
    return [Piece(str(index), size) for index, size in enumerate(tokens)]


def batches(queue: Scheduler[Piece]) -> list[list[int]]:
    taken = []
    while (batch := queue.next_batch()) is not None:
        assert batch.tokens == sum(piece.tokens for piece in batch.work)
        taken.append([piece.tokens for piece in batch.work])
    return taken


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([3], [[3]]),
        ([3, 3, 3], [[3, 3, 3]]),
        ([5, 5, 1], [[5, 5], [1]]),
        ([5, 6], [[5], [6]]),
        ([4, 4, 4, 4, 4], [[4, 4], [4, 4], [4]]),
        ([25], [[25]]),  # larger than the budget: alone, but served
        ([1, 25, 1], [[1], [25], [1]]),
        ([10, 10], [[10], [10]]),
    ],
)
def test_batches_are_the_oldest_work_within_the_budget(tokens: list[int], expected: list[list[int]]) -> None:
    queue = scheduler()
    queue.admit(pieces(*tokens))
    assert batches(queue) == expected
    assert queue.tokens == 0


def test_idle_starts_at_once_and_what_arrives_meanwhile_is_the_next_batch() -> None:
    queue = scheduler()
    queue.admit(pieces(1))
    assert batches(queue) == [[1]]
    queue.admit(pieces(2))
    queue.admit(pieces(3))
    assert batches(queue) == [[2, 3]]


def test_waits_are_counted_from_admission() -> None:
    clock = Clock()
    queue = scheduler(clock=clock)
    queue.admit(pieces(1))
    clock.now += 2
    queue.admit(pieces(1))
    clock.now += 1
    batch = queue.next_batch()
    assert batch is not None
    assert batch.waits == [3.0, 1.0]


def test_abandoned_work_is_dropped_and_frees_its_room() -> None:
    queue = scheduler(queue=20)
    gone, kept = Piece("gone", 12), Piece("kept", 8)
    queue.admit([gone, kept])
    gone.abandoned = True
    assert queue.next_batch() == Batch([kept], [0.0], 8)
    assert queue.tokens == 0
    last = Piece("last", 1, abandoned=True)
    queue.admit([last])
    assert queue.next_batch() is None
    assert queue.tokens == 0


def test_a_request_that_does_not_fit_is_refused_whole() -> None:
    queue = scheduler(queue=10)
    queue.admit(pieces(6))
    with pytest.raises(Overloaded, match="6 tokens are waiting and this request adds 6"):
        queue.admit(pieces(3, 3))
    assert queue.tokens == 6
    queue.admit(pieces(4))
    assert batches(queue) == [[6, 4]]


def test_an_empty_queue_takes_anything() -> None:
    queue = scheduler(queue=10)
    queue.admit(pieces(30))
    with pytest.raises(Overloaded):
        queue.admit(pieces(1))


def test_drain_takes_everything() -> None:
    queue = scheduler()
    queue.admit(pieces(1, 2))
    assert [piece.tokens for piece in queue.drain()] == [1, 2]
    assert queue.tokens == 0
    assert queue.next_batch() is None
