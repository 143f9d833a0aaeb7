"""Memory with a budget in bytes: what is in it, what is about to come, and who has to leave.

The least recently used leave, in two segments (segmented LRU: Karedla, Love and Wherry, "Caching Strategies to Improve
Disk System Performance", IEEE Computer, 1994): first those on probation, which were asked for once, then the protected
ones, which were asked for again. So a crawl through thousands of adapters that nobody else wants pushes out few of
those in demand, and where popularity follows Zipf's law there are a seventh fewer loads. The keys of what has left are
remembered for a while (the ghosts of ARC: Megiddo and Modha, FAST 2003): who comes back is protected at once. Else
what was in demand yesterday would stay, and what is in demand today push itself out for ever.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator, Set
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from typing import Generic, TypeVar

from server.errors import MemoryFull, OverBudget
from server.metrics import Metrics

V = TypeVar("V")

PROTECTED_SHARE = 0.8
"""Of the budget: how much may be protected. By Zipf's law over ten times as many values as fit, 0.8 and 0.9 are equally
good, 0.5 halves the gain."""


class Claim(Generic[V]):
    """Memory that is about to be taken."""

    def __init__(self, memory: "Memory[V]", nbytes: int) -> None:
        self._memory = memory
        self.nbytes = nbytes

    async def settle(self, key: str, value: V, nbytes: int) -> None:
        """The value is there and really takes this much: waits for what it takes beyond the claim. Raises OverBudget or
        MemoryFull where that does not fit."""
        await self._memory.settle(self, key, value, nbytes)


class Memory(Generic[V]):
    """Values by key, of which the least recently used leave. What is held by somebody, and what is pinned, stays.

    Nothing is taken that was not claimed before, so values and claims together never exceed the budget. Lives on one
    event loop.
    """

    def __init__(self, tier: str, max_bytes: int, *, wait_seconds: float, metrics: Metrics) -> None:
        """`tier` names it in metrics and errors; `wait_seconds` is how long a claim waits for values to be let go."""
        self._tier = tier
        self.max_bytes = max_bytes
        self._wait_seconds = wait_seconds
        self._resident_gauge = metrics.adapters_resident.labels(tier)
        self._bytes_gauge = metrics.adapter_bytes.labels(tier)
        self._evictions = metrics.evictions.labels(tier)
        self._values: dict[str, tuple[V, int]] = {}
        self._probation: OrderedDict[str, None] = OrderedDict()
        """Keys of what was asked for once, and of what has lost its protection."""
        self._protected: OrderedDict[str, None] = OrderedDict()
        """Keys of the others."""
        self._protected_bytes = 0
        self._ghosts: OrderedDict[str, None] = OrderedDict()
        """Keys of the last that left for others, no more than there are values."""
        self._held: Counter[str] = Counter()
        self._pinned: Set[str] = frozenset()
        self._retired: set[str] = set()
        self._bytes = 0  # of values and claims
        self._waiting: set[asyncio.Future[None]] = set()  # for something to be let go
        metrics.memory_budget_bytes.labels(tier).set(max_bytes)

    def __iter__(self) -> Iterator[str]:
        """The keys, the first to leave last."""
        return chain(reversed(self._protected), reversed(self._probation))

    def __len__(self) -> int:
        return len(self._values)

    @property
    def capacity(self) -> int:
        """How many values fit, of the mean size of those that are here; 1 where that is not known."""
        return max(1, len(self) * self.max_bytes // self._bytes) if self._bytes else 1

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> V | None:
        """The value, the most recently used one from here on, and protected; None where it is not here."""
        if key not in self._values:
            return None
        self._protect(key)
        self._retired.discard(key)  # somebody has use for it after all
        return self._values[key][0]

    def nbytes(self, key: str) -> int:
        """What a value takes; 0 where it is not here."""
        return self._values[key][1] if key in self._values else 0

    def room(self, keys: Set[str]) -> int:
        """Bytes that the values of these keys may come to together: what is not pinned to others."""
        return self.max_bytes - sum(map(self.nbytes, self._pinned - keys))

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        """Meanwhile the key, here already or on its way, does not leave."""
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                if key in self._retired:
                    self._sweep()
                self._wake()

    def pin(self, keys: Set[str]) -> None:
        """From here on these keys, and no others, do not leave."""
        self._pinned = frozenset(keys)
        self._sweep()

    def retire(self, key: str) -> None:
        """The value is of no further use: it leaves as soon as nobody holds it."""
        if key in self._values:
            self._retired.add(key)
            self._sweep()

    @asynccontextmanager
    async def claim(self, nbytes: int) -> AsyncIterator[Claim[V]]:
        """Memory for a value, which others leave for; what is not settled is given back.

        Raises OverBudget where it can never fit, MemoryFull where it does not fit now.
        """
        await self._make_room(nbytes)
        claim = Claim(self, nbytes)
        self._bytes += nbytes
        self._measure()
        try:
            yield claim
        finally:
            self._bytes -= claim.nbytes
            self._measure()
            self._wake()

    async def settle(self, claim: Claim[V], key: str, value: V, nbytes: int) -> None:
        """Puts the value where its claim was, and what was there under this key."""
        await self._make_room(nbytes, claim.nbytes, replaced=key)
        known = key in self._protected or key in self._ghosts
        self._ghosts.pop(key, None)
        self._drop(key)
        self._values[key] = value, nbytes
        self._probation[key] = None
        self._bytes += nbytes - claim.nbytes
        claim.nbytes = 0
        if known:
            self._protect(key)
        self._measure()

    async def _make_room(self, nbytes: int, claimed: int = 0, replaced: str | None = None) -> None:
        """For so many bytes, some of which are claimed; `replaced` will be gone."""
        if nbytes > self.max_bytes:
            raise self._full(nbytes)
        if self._evict(nbytes - claimed, replaced):
            return
        try:
            async with asyncio.timeout(self._wait_seconds):
                while not self._evict(nbytes - claimed, replaced):
                    await self._wait()
        except TimeoutError:
            raise self._full(nbytes) from None

    async def _wait(self) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._waiting.add(woken)
        try:
            await woken
        finally:
            self._waiting.discard(woken)

    def _full(self, nbytes: int) -> OverBudget | MemoryFull:
        if nbytes > self.max_bytes:
            return OverBudget(
                f"the adapter takes {nbytes} bytes, {self._tier} memory has {self.max_bytes} for adapters"
            )
        return MemoryFull(f"{nbytes} bytes do not fit the {self._tier} memory now: what it holds is in use or pinned")

    def _evict(self, nbytes: int, replaced: str | None) -> bool:
        """Frees that much beside what is claimed, from the first to leave on; False, and nothing, if it cannot."""
        missing = self._bytes + nbytes - self.max_bytes - (self.nbytes(replaced) if replaced is not None else 0)
        leaving: list[str] = []
        for key in chain(self._probation, self._protected):
            if missing <= 0:
                break
            if key != replaced and key not in self._held and key not in self._pinned:
                leaving.append(key)
                missing -= self.nbytes(key)
        if missing > 0:
            return False
        for key in leaving:
            self._drop(key)
            self._ghosts[key] = None
            self._evictions.inc()
        while len(self._ghosts) > len(self._values) + len(leaving):
            self._ghosts.popitem(last=False)
        return True

    def _protect(self, key: str) -> None:
        if key in self._protected:
            self._protected.move_to_end(key)
            return
        limit = PROTECTED_SHARE * self.max_bytes
        if self.nbytes(key) > limit:
            self._probation.move_to_end(key)
            return
        del self._probation[key]
        self._protected[key] = None
        self._protected_bytes += self.nbytes(key)
        while self._protected_bytes > limit:
            longest, _ = self._protected.popitem(last=False)
            self._protected_bytes -= self.nbytes(longest)
            self._probation[longest] = None

    def _drop(self, key: str) -> None:
        if key in self._values:
            nbytes = self._values.pop(key)[1]
            self._bytes -= nbytes
            if key in self._protected:
                del self._protected[key]
                self._protected_bytes -= nbytes
            else:
                del self._probation[key]
        self._retired.discard(key)

    def _sweep(self) -> None:
        for key in self._retired - self._held.keys() - self._pinned:
            self._drop(key)
        self._measure()
        self._wake()

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def _measure(self) -> None:
        self._resident_gauge.set(len(self._values))
        self._bytes_gauge.set(self._bytes)
