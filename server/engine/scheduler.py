"""The queue of work in front of the device, and the choice of what runs together.

Knows tokens and order, nothing of tensors, adapters or threads; the engine holds its lock around every call.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from server.errors import Overloaded


class Work(Protocol):
    """One piece of work: what it costs, and whether anybody still waits for it."""

    @property
    def tokens(self) -> int:
        """Its share of a batch's token budget."""

    @property
    def abandoned(self) -> bool:
        """True once nobody waits for the result; it is dropped instead of run."""


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(frozen=True, slots=True)
class Batch(Generic[WorkT]):
    """Work that runs in one go, oldest first, and how long each piece has waited."""

    work: list[WorkT]
    waits: list[float]  # seconds
    tokens: int


class Scheduler(Generic[WorkT]):
    """First come, first served, in batches of at most `max_batch_tokens`.

    Work-conserving: a batch is whatever waits when the device is free, so an idle server starts at once and a busy one
    batches what arrived meanwhile, with no timer to tune.
    """

    def __init__(self, *, max_batch_tokens: int, max_queue_tokens: int, clock: Callable[[], float]) -> None:
        """`clock` gives seconds; only differences count."""
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_tokens = max_queue_tokens
        self._clock = clock
        self._queue: deque[tuple[float, WorkT]] = deque()
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return self._tokens

    def admit(self, work: Sequence[WorkT]) -> None:
        """Queues the pieces of one request, all or none. Raises Overloaded where they do not fit.

        An empty queue takes anything, so that a request larger than the queue can be served at all.
        """
        tokens = sum(piece.tokens for piece in work)
        if self._queue and self._tokens + tokens > self._max_queue_tokens:
            raise Overloaded(
                f"{self._tokens} tokens are waiting and this request adds {tokens}; the server queues at most "
                f"{self._max_queue_tokens}"
            )
        now = self._clock()
        self._queue.extend((now, piece) for piece in work)
        self._tokens += tokens

    def next_batch(self) -> Batch[WorkT] | None:
        """The oldest work that fits the budget, at least one piece; None if nothing waits."""
        now = self._clock()
        work: list[WorkT] = []
        waits: list[float] = []
        total = 0
        while self._queue:
            admitted, piece = self._queue[0]
            if not piece.abandoned:
                if work and total + piece.tokens > self._max_batch_tokens:
                    break
                work.append(piece)
                waits.append(now - admitted)
                total += piece.tokens
            self._queue.popleft()
            self._tokens -= piece.tokens
        return Batch(work, waits, total) if work else None

    def drain(self) -> list[WorkT]:
        """Takes everything that waits."""
        work = [piece for _, piece in self._queue]
        self._queue.clear()
        self._tokens = 0
        return work
