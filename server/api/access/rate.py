"""How often a key may ask."""

from collections.abc import Callable

from server.api.access.principal import Principal
from server.errors import RateLimited

BURST_SECONDS = 10.0
"""Of its rate, what a key may use at once after a rest."""


class Rates:
    """The generic cell rate algorithm (ITU-T I.371): one number per key, no queue and no timer."""

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
        due = max(self._due.get(principal.name, now), now)
        wait = due - now - max(BURST_SECONDS, interval)
        if wait + interval > 0:
            error = RateLimited(
                f"key {principal.name!r} may make {principal.requests_per_minute} requests a minute", param=None
            )
            error.retry_after = max(1, int(-(-(wait + interval) // 1)))
            raise error
        self._due[principal.name] = due + interval
