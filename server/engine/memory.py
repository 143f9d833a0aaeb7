"""Memory with a budget in bytes: what is in it, what is about to come, and who has to leave.

Those leave that are used least, lately (LRFU: Lee et al., "LRFU: A Spectrum of Policies that Subsumes the Least
Recently Used and Least Frequently Used Policies", IEEE Transactions on Computers, 2001): each time that a value is
asked for counts, and counts half once half as many as there are have come back that had left before. So a crawl through
thousands of adapters that nobody else wants pushes out none of those in demand, and where popularity follows Zipf's law
there are a fifth fewer loads than by recency alone. What has left is remembered for a while with its count (as the
ghosts of ARC: Megiddo and Modha, FAST 2003), and no count is above that of the last few times. Else what is in demand
today would push itself out until what was yesterday is forgotten.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator, Set
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from math import log2
from typing import Generic, TypeVar

from server.errors import MemoryFull, OverBudget
from server.metrics import Metrics

V = TypeVar("V")

HALF_LIFE = 0.5
"""Values that come back, for each that is here, until a request counts half. By Zipf's law over ten times as many
values as fit, 74 % of the requests find theirs here with 0.5, 73 % with 0.3 and 75 % with 1; 67 % by recency alone, and
76 % at best, if popularity were known. The longer it is, the longer what was popular stays once it no longer is."""

MAX_LEAD = 2
"""In half-lives, what a value may be above one that is asked for now for the first time: by then, it is like that. To
Zipf's law it makes no difference; what was asked for a million times would stay for twenty."""


class Claim(Generic[V]):
    """Memory that is about to be taken."""

    def __init__(self, memory: "Memory[V]", nbytes: int) -> None:
        self._memory = memory
        self.nbytes = nbytes

    async def settle(self, key: str, value: V, nbytes: int) -> None:
        """The value is there and really takes this much: waits for what it takes beyond the claim. Raises OverBudget or
        MemoryFull where that does not fit."""
        await self._memory.settle(self, key, value, nbytes)


MAX_STALE = 64
"""Entries of what is gone that the heap may hold, beyond as many as there are values."""


@dataclass(slots=True, eq=False)
class _Slot(Generic[V]):
    value: V
    nbytes: int
    rank: tuple[float, int]
    """See Memory._asked."""
    serial: int
    """Of several that had the same key, tells which it is."""


_Entry = tuple[tuple[float, int], int, str]
"""A slot's rank, its serial and its key."""


class Memory(Generic[V]):
    """Values by key, of which the least used leave. What is held by somebody, and what is pinned, stays.

    Nothing is taken that was not claimed before, so values and claims together never exceed the budget. Lives on one
    event loop.
    """

    def __init__(self, tier: str, max_bytes: int, *, wait_seconds: float, metrics: Metrics) -> None:
        """`tier` names it in metrics and errors; `wait_seconds` is how long a claim waits for values to be let go."""
        self._tier = tier
        self.max_bytes = max_bytes
        self._wait_seconds = wait_seconds
        self._evictions = metrics.evictions.labels(tier)
        self._slots: dict[str, _Slot[V]] = {}
        self._order: list[_Entry] = []
        """A heap. A rank only rises, so one that has, or whose slot is gone, is put right when it comes to the top."""
        self._serials = count()
        self._now = 0.0  # half-lives
        self._ghosts: OrderedDict[str, float] = OrderedDict()
        """Keys and scores of the last that left for others, no more than there are values."""
        self._held: Counter[str] = Counter()
        self._pinned: Set[str] = frozenset()
        self._retired: set[str] = set()
        self._value_bytes = 0
        self._claimed_bytes = 0
        self._waiting: set[asyncio.Future[None]] = set()  # for something to be let go
        metrics.memory_budget_bytes.labels(tier).set(max_bytes)
        # asked at a scrape: they change several times with each load
        metrics.adapters_resident.labels(tier).set_function(lambda: len(self))
        metrics.adapter_bytes.labels(tier).set_function(lambda: self._value_bytes + self._claimed_bytes)

    def __iter__(self) -> Iterator[str]:
        """The keys, the first to leave last."""
        return iter(sorted(self._slots, key=lambda key: self._slots[key].rank, reverse=True))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def capacity(self) -> int:
        """How many values fit, of the mean size of those that are here; 1 where that is not known."""
        taken = self._value_bytes + self._claimed_bytes
        return max(1, len(self) * self.max_bytes // taken) if taken else 1

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def get(self, key: str) -> V | None:
        """The value, for somebody who asks for it; None where it is not here."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        slot.rank = self._asked(slot.rank[0])
        self._retired.discard(key)  # somebody has use for it after all
        return slot.value

    def nbytes(self, key: str) -> int:
        """What a value takes; 0 where it is not here."""
        slot = self._slots.get(key)
        return slot.nbytes if slot is not None else 0

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
        if key in self._slots:
            self._retired.add(key)
            self._sweep()

    @asynccontextmanager
    async def claim(self, nbytes: int) -> AsyncIterator[Claim[V]]:
        """Memory for a value, which others leave for; what is not settled is given back.

        Raises OverBudget where it can never fit, MemoryFull where it does not fit now.
        """
        await self._make_room(nbytes)
        claim = Claim(self, nbytes)
        self._claimed_bytes += nbytes
        try:
            yield claim
        finally:
            self._claimed_bytes -= claim.nbytes
            self._wake()

    async def settle(self, claim: Claim[V], key: str, value: V, nbytes: int) -> None:
        """Puts the value where its claim was, and what was there under this key."""
        await self._make_room(nbytes, claim.nbytes, replaced=key)
        before = self._slots.get(key)
        if key in self._ghosts:  # what comes for the first time, as in a crawl, makes nobody older
            self._now += 1 / (HALF_LIFE * max(1, len(self)))
        rank = self._asked(self._ghosts.pop(key, None) if before is None else before.rank[0])
        self._drop(key)
        self._slots[key] = slot = _Slot(value, nbytes, rank, next(self._serials))
        heappush(self._order, (rank, slot.serial, key))
        if len(self._order) > 2 * len(self) + MAX_STALE:  # of most, the slots are gone
            self._order = [(slot.rank, slot.serial, key) for key, slot in self._slots.items()]
            heapify(self._order)
        self._value_bytes += nbytes
        self._claimed_bytes -= claim.nbytes
        claim.nbytes = 0

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
        missing = self._value_bytes + self._claimed_bytes + nbytes - self.max_bytes
        if replaced is not None:
            missing -= self.nbytes(replaced)
        if missing <= 0:
            return True
        staying = {*self._held, *self._pinned}
        if replaced is not None:
            staying.add(replaced)
        if missing > self._value_bytes - sum(map(self.nbytes, staying)):
            return False
        passed_over: list[_Entry] = []
        before = len(self)
        while missing > 0:
            rank, serial, key = first = self._order[0]
            slot = self._slots.get(key)
            if slot is None or slot.serial != serial:
                heappop(self._order)
            elif slot.rank > rank:
                heapreplace(self._order, (slot.rank, serial, key))
            else:
                heappop(self._order)
                if key in staying:
                    passed_over.append(first)
                else:
                    missing -= slot.nbytes
                    self._drop(key)
                    self._ghosts[key] = rank[0]
                    self._evictions.inc()
        for one in passed_over:
            heappush(self._order, one)
        while len(self._ghosts) > before:
            self._ghosts.popitem(last=False)
        return True

    def _asked(self, score: float | None) -> tuple[float, int]:
        """The rank of what is asked for now, given the score that it had, if it had one: its score, and among equal
        ones the time.

        Each request counts 2^t, t being its time in half-lives, and the score is the logarithm of the sum: so the order
        stays as time passes, and nothing grows without bounds.
        """
        now = self._now
        if score is None:
            return now, next(self._serials)
        sum_of_both = max(score, now) + log2(1 + 2 ** -abs(score - now))
        return min(sum_of_both, now + MAX_LEAD), next(self._serials)

    def _drop(self, key: str) -> None:
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._value_bytes -= slot.nbytes
        self._retired.discard(key)

    def _sweep(self) -> None:
        for key in self._retired - self._held.keys() - self._pinned:
            self._drop(key)
        self._wake()

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
