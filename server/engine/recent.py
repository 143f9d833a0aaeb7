"""The last batches, for people who want to know what runs together and what it waits for."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from server.core import AdapterRef

KEPT = 50

ANSWERED = "answered"


@dataclass(frozen=True, slots=True)
class RanRow:
    """A text in a batch, without the text."""

    adapter: str
    """Empty: the server's own work, such as proofs."""
    version: str
    tokens: int
    wait_seconds: float
    """From admission to the batch."""
    outcome: str
    """`answered`, `cancelled`, or the code of the error that its request got."""


@dataclass(frozen=True, slots=True)
class RanBatch:
    """What ran in one go, as it is noted: one entry for each row in the lists, since the device waits meanwhile."""

    started_at: float
    """Unix time."""
    seconds: float
    """On the device; where it failed, with all further tries."""
    tokens: int
    backlog: bool
    """Whether work was left waiting."""
    refs: Sequence[AdapterRef | None]
    row_tokens: Sequence[int]
    waits: Sequence[float]  # seconds
    outcomes: Sequence[str]

    @property
    def rows(self) -> list[RanRow]:
        """Its rows one by one."""
        return [
            RanRow(ref.name if ref else "", ref.version if ref else "", tokens, wait, outcome)
            for ref, tokens, wait, outcome in zip(self.refs, self.row_tokens, self.waits, self.outcomes, strict=True)
        ]


class RecentBatches:
    """A ring: the device's threads write, others read."""

    def __init__(self) -> None:
        self._batches: deque[RanBatch] = deque(maxlen=KEPT)

    def note(self, batch: RanBatch) -> None:
        """It has ended."""
        self._batches.append(batch)

    def newest_first(self, limit: int = KEPT) -> list[RanBatch]:
        """At most so many of them."""
        batches = list(self._batches.copy())  # at one go: the other thread goes on writing
        return batches[::-1][:limit]
