"""What failed a moment ago is not tried again for a while: a negative cache with growing pauses."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.errors import AdapterdError

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
MAX_REMEMBERED = 10_000

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: AdapterdError
    pause: float  # seconds
    until: float  # on the clock


class Failures(Generic[K]):
    """Keys that failed, with the error that callers get until a pause is over. Failing again soon doubles it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds; only differences count."""
        self._clock = clock
        self._failed: OrderedDict[K, _Failure] = OrderedDict()

    def note(self, key: K, error: AdapterdError) -> None:
        """`key` has failed just now."""
        before = self._failed.pop(key, None)
        again = before is not None and self._clock() - before.until < LONGEST_PAUSE_SECONDS
        pause = min(before.pause * 2, LONGEST_PAUSE_SECONDS) if before and again else FIRST_PAUSE_SECONDS
        self._failed[key] = _Failure(error, pause, self._clock() + pause)
        if len(self._failed) > MAX_REMEMBERED:
            self._failed.popitem(last=False)

    def clear(self, key: K) -> None:
        """`key` has succeeded."""
        self._failed.pop(key, None)

    def recent(self, key: K) -> AdapterdError | None:
        """The error of a key whose pause is not over, with the rest of the pause as retry_after."""
        failure = self._failed.get(key)
        rest = failure.until - self._clock() if failure else 0.0
        if failure is None or rest <= 0:
            return None
        known = failure.error
        error = type(known)(known.message, param=known.param, code=known.error_code)  # each caller raises its own
        error.retry_after = max(1, math.ceil(rest))
        return error
