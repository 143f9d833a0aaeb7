"""How often a key may ask."""

import math
from collections.abc import Callable

from server.api.access.principal import Principal
from server.errors import RateLimited

BURST_SECONDS = 10.0
"""Of its rate, what a key may use at once after a rest."""

ROUNDING = 1e-6
"""Seconds by which sums of intervals may be off."""


class Rates:
    """The generic cell rate algorithm (ITU-T I.371): one number per key, no queue and no timer.

    In any `t` seconds a key gets at most rate * t + burst requests through, where the burst is what the rate gives in
    BURST_SECONDS, and at least one.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds; only differences count."""
        self._clock = clock
        self._due: dict[str, float] = {}
        """When each key's next request would come, were they evenly spaced."""

    def spend(self, principal: Principal) -> None:
        """Counts a request. Raises RateLimited, which says when to come back, for one too many."""
        if principal.requests_per_minute is None:
            return
        interval = 60.0 / principal.requests_per_minute
        now = self._clock()
        due = max(self._due.get(principal.name, now), now) + interval
        wait = due - now - max(BURST_SECONDS, interval)
        if wait > ROUNDING:
            error = RateLimited(f"key {principal.name!r} may make {principal.requests_per_minute} requests a minute")
            error.retry_after = math.ceil(wait)
            raise error
        self._due[principal.name] = due
