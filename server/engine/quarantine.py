"""Adapters that fail on the device again and again are left out for a while: a circuit breaker for each version.

Each failing batch costs everybody time, since it is taken apart to find out whose fault it was. So after some failures
in a row, requests for the version are refused. When a pause is over, one of them is let through; if it succeeds the
version is back, else, or if nothing is heard of it, the next one has to wait for another pause. A new release of the
adapter, whoever makes it, gives all its versions another chance.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.core import AdapterRef
from server.errors import AdapterdError, AdapterQuarantined
from server.logs import get_logger
from server.metrics import Metrics

log = get_logger("adapterd.quarantine")

MAX_REMEMBERED = 10_000

Key = tuple[str, str]
"""Name and version."""


@dataclass(slots=True)
class _Record:
    failures: int = 0
    """In a row."""
    reason: str = ""
    until: float | None = None
    """End of the pause, on the clock; None: not in quarantine."""


class Quarantine:
    """Which versions of adapters are left out. Thread-safe: the device's threads tell, requests ask."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        failures: int = 3,
        pause_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`failures`: failing batches in a row that bring a version here."""
        self._metrics = metrics
        self._failures = failures
        self._pause_seconds = pause_seconds
        self._clock = clock
        self._records: OrderedDict[Key, _Record] = OrderedDict()
        self._released: OrderedDict[str, int] = OrderedDict()  # adapter -> its last release that is known here
        self._lock = threading.Lock()

    def check(self, refs: Iterable[AdapterRef]) -> None:
        """Raises AdapterQuarantined, with the rest of the pause. Who is let through has yet to `enter`."""
        if self._records:
            with self._lock:
                self._due(refs)

    def enter(self, refs: Iterable[AdapterRef]) -> None:
        """The same for who goes to the device now: only one is let through when a pause is over."""
        if self._records:
            with self._lock:
                for record in self._due(refs):
                    record.until = self._clock() + self._pause_seconds

    def _due(self, refs: Iterable[AdapterRef]) -> list[_Record]:
        """The records of those that may be tried again; raises for one that may not."""
        due = []
        for ref in refs:
            record = self._records.get((ref.name, ref.version))
            if record is None or record.until is None:
                continue
            if (rest := record.until - self._clock()) > 0:
                raise _refusal(ref, record, rest)
            due.append(record)
        return due

    def succeeded(self, ref: AdapterRef) -> None:
        """The version has answered a text."""
        if (ref.name, ref.version) in self._records:
            self._forget([(ref.name, ref.version)])

    def failed(self, ref: AdapterRef, error: AdapterdError) -> AdapterQuarantined | None:
        """All its texts in a batch failed, each alone. What callers get from here on, if it is in quarantine now."""
        with self._lock:
            if ref.release is not None and ref.release < self._released.get(ref.name, 0):
                return None  # asked for before the release that ended its quarantine, or keeps it out of one
            key = ref.name, ref.version
            record = self._records.setdefault(key, _Record())
            self._records.move_to_end(key)
            record.failures += 1
            record.reason = error.message
            oldest = next(iter(self._records)) if len(self._records) > MAX_REMEMBERED else None
            quarantined = record.failures >= self._failures
            if quarantined:
                newly, record.until = record.until is None, self._clock() + self._pause_seconds
                if newly:
                    self._metrics.count_quarantined(ref.name, 1)
                    log.error("quarantined", adapter=ref.name, version=ref.version, reason=record.reason)
        if oldest is not None:
            self._forget([oldest])
        return _refusal(ref, record, self._pause_seconds) if quarantined else None

    def names(self) -> set[str]:
        """Adapters of which a version is in quarantine."""
        with self._lock:
            return {name for (name, _), record in self._records.items() if record.until is not None}

    def released(self, name: str, number: int) -> None:
        """The adapter's last release is this one: if it is a new one, all versions get another chance."""
        with self._lock:
            if number <= self._released.get(name, 0):
                return
            self._released[name] = number
            self._released.move_to_end(name)
            if len(self._released) > MAX_REMEMBERED:
                self._released.popitem(last=False)
        self.lift(name)

    def lift(self, name: str) -> None:
        """The adapter was proven: all its versions get another chance."""
        if self._records:
            with self._lock:
                keys = [key for key in self._records if key[0] == name]
            self._forget(keys)

    def _forget(self, keys: list[Key]) -> None:
        with self._lock:
            for key in keys:
                record = self._records.pop(key, None)
                if record is None or record.until is None:
                    continue
                log.warning("quarantine is over", adapter=key[0], version=key[1])
                self._metrics.count_quarantined(key[0], -1)


def _refusal(ref: AdapterRef, record: _Record, rest: float) -> AdapterQuarantined:
    error = AdapterQuarantined(
        f"adapter {ref.name!r} is in quarantine: its last {record.failures} batches failed ({record.reason}); a new "
        "release of it ends that",
        param="adapter",
    )
    error.retry_after = max(1, math.ceil(rest))
    return error
