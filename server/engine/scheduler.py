"""The queue of work in front of the device, and the choice of what runs together.

Adapters take turns by deficit round robin (Shreedhar and Varghese, "Efficient Fair Queuing using Deficit Round Robin",
SIGCOMM 1995), in the form that lets a turn overdraw ("surplus" round robin: Adiseshu, Parulkar and Varghese, "A
Reliable and Scalable Striping Protocol", SIGCOMM 1996): at its turn an adapter is credited a quantum times its weight,
sends while its credit is above zero, and pays off what it has overdrawn with its next turns. Over any time in which two
adapters have work waiting, the tokens that they get, each divided by its weight, differ by no more than two quanta and
the two largest units; and within a round each gets its quantum. Batches are cut from that one order, so a batch has
rows of many adapters.

Who asks for little need not wait for those who always have work waiting: an adapter that had none is served before the
round, for a quantum at most, which is an advance on its turn there (the new and old queues of FQ-CoDel, RFC 8290).
While they ask for more than the round gets, further ones join it at its end.

Priorities are strict: work of a lower one fills what the higher ones leave of a batch. Aging keeps it from starving: a
priority whose oldest work has waited for too long is served first, with up to a quarter of each batch.

Admission is fair as well. A request is refused for what waits, or is about to, of its own priority and of higher ones,
which is what it would wait for; and one adapter may queue no more than three times the room that is left (dynamic
thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking, 1998), so that a hot one leaves room for all
others.

A device may run several batches side by side, its streams. While some of them are idle, what waits is dealt out to
them in smaller batches.

Knows tokens and order, nothing of tensors, adapters or threads; the engine holds its lock around every call.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Protocol, TypeVar

from server.core import Priority, Terms
from server.errors import Overloaded

QUANTUM = 256
"""Tokens of credit for a turn, times the adapter's weight. Some texts, so that rows of an adapter come together; and
an eighth of a batch, so that a newcomer waits for few batches."""

NEWCOMERS = 4 * QUANTUM
"""Tokens by which those who come before the round may be ahead of what it sends: then others join it at its end. Else a
crowd of them, each with little, would keep it waiting."""

BORROWED = 0.5
"""Of its quantum: how much an adapter may be charged ahead of its turn, for rows in requests that wait in another's
queue, while work waits in its own. The other half is left for that, whatever others ask for."""

AGED_SHARE = 0.25
"""Of a batch: how much a lower priority gets first once its oldest work has waited for too long."""

ROOM_SHARE = 3
"""How many times the room that is left one adapter may queue. Alone, it fills three quarters of the queue."""

WAIT_HEADROOM = 3
"""How many times the estimated wait has to fit into what is left until a deadline. The estimate knows what waits now; a
request that comes later for an adapter with a shorter queue runs before. And a queue that is no longer than it has to
be is gone the sooner once the crowd has left."""

RUN_HEADROOM = 1.5
"""The same of the batch that runs and of the request's own."""

FORGOTTEN = 256
"""Deadlines of work that is done which may stay until their time."""

SMOOTHING = 0.1
"""Weight of the newest batch in the estimate of the throughput."""

SPREAD_TOKENS = 128
"""What waits is dealt out to idle streams in batches of no less: below that, each costs nearly as much as a whole."""

GATHERED_TOKENS = 256
"""While one stream runs, another lets so many gather before it starts, for a while. Else clients that wait for their
answers fall into step with many small batches."""

GATHERING_SHARE = 0.5
"""Of the time that a batch should take: how long they may gather."""

SHRUNK_SECONDS = 30.0
"""How long batches stay small after the device ran out of memory; then their budget doubles, and again."""


NOTHING: Mapping[Priority, Mapping[str, int]] = {}
"""What is expected where nothing is, or where it does not count."""


class Work(Protocol):
    """One piece of work: what it costs, and who it is for."""

    @property
    def tokens(self) -> int:
        """Its share of a batch's token budget."""

    @property
    def adapter(self) -> str:
        """In whose name it runs."""


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(eq=False, slots=True)
class Unit(Generic[WorkT]):
    """Pieces that share work where they run together: one text of a request, for each of its adapters.

    It is cut only where it is larger than a whole batch.
    """

    adapter: str
    """In whose queue it waits: its first."""
    pieces: Sequence[WorkT]
    """Those that have not run."""
    tokens: int
    number: int
    terms: Terms
    admitted: float


@dataclass(frozen=True, slots=True)
class Batch(Generic[WorkT]):
    """Work that runs in one go, in the order in which it was chosen; how long each piece has waited, and its size."""

    work: list[WorkT]
    waits: list[float]  # seconds
    sizes: list[int]  # tokens
    tokens: int
    backlog: bool
    """Whether work was left waiting."""
    alone: bool
    """Nothing else runs or waits."""


@dataclass(eq=False, slots=True)
class _Flow(Generic[WorkT]):
    """What waits for one adapter, first come, first served."""

    weight: float
    units: OrderedDict[int, Unit[WorkT]]
    tokens: int = 0
    credit: float = 0.0
    """Tokens; below zero: a debt."""
    in_turn: bool = False

    @property
    def income(self) -> float:
        """Tokens of credit for a turn."""
        return QUANTUM * self.weight


class _Round(Generic[WorkT]):
    """The adapters that have work of one priority waiting, or owe for some, in the order of their turns."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._flows: dict[str, _Flow[WorkT]] = {}
        self._new: OrderedDict[str, None] = OrderedDict()
        """Of the flows, those that had no work waiting; they come first."""
        self._old: OrderedDict[str, None] = OrderedDict()
        """The others."""
        self._ahead = 0
        """Tokens that newcomers have sent before the round, less those that it has sent since."""
        self.units: OrderedDict[int, Unit[WorkT]] = OrderedDict()
        """All that wait, the oldest first."""
        self.tokens = 0

    def queued(self, adapter: str) -> int:
        """Tokens in one adapter's queue."""
        flow = self._flows.get(adapter)
        return flow.tokens if flow else 0

    def before(self, adapter: str, tokens: int, expected: Mapping[str, int]) -> float:
        """Tokens that run before the last of `tokens` more in an adapter's queue does: what the others have, but no
        more than turns give them meanwhile. `expected`: what is about to wait as well, by adapter."""
        own = self.queued(adapter) + expected.get(adapter, 0) + tokens
        turns = own / self._weight(adapter)
        others = ((name, flow.tokens, flow.weight) for name, flow in self._flows.items())
        strangers = ((name, 0, self._weight(name)) for name in expected if name not in self._flows)
        return own + sum(
            min(queued + expected.get(name, 0), turns * weight)
            for name, queued, weight in chain(others, strangers)
            if name != adapter
        )

    def add(self, unit: Unit[WorkT]) -> None:
        """At the end of its adapter's queue."""
        flow = self._flow(unit.adapter, self._new if self._ahead < NEWCOMERS else self._old)
        flow.units[unit.number] = self.units[unit.number] = unit
        flow.tokens += unit.tokens
        self.tokens += unit.tokens

    def remove(self, unit: Unit[WorkT]) -> None:
        """Takes it out, wherever it stands."""
        del self.units[unit.number]
        flow = self._flows[unit.adapter]
        del flow.units[unit.number]
        flow.tokens -= unit.tokens
        self.tokens -= unit.tokens
        if not self.units:
            self._ahead = 0
            for flows in (self._flows, self._new, self._old):
                flows.clear()  # with nobody else waiting, nobody owes anything
        elif not flow.units and unit.adapter in self._new:
            self._grow_old(unit.adapter)
        elif not flow.units and flow.credit >= 0:
            self._forget(unit.adapter)

    def first(self) -> Unit[WorkT] | None:
        """What runs next: the oldest unit of the adapter whose turn it is."""
        while self._new:
            name = next(iter(self._new))
            flow = self._flows[name]
            if flow.credit > -flow.income:  # what it gets here is an advance on its first turn
                return next(iter(flow.units.values()))
            self._grow_old(name)
        passed = 0
        while self.units:
            name = next(iter(self._old))
            flow = self._flows[name]
            if not flow.in_turn:
                flow.in_turn = True
                flow.credit += flow.income
            if flow.units and flow.credit > 0:
                return next(iter(flow.units.values()))
            self._grow_old(name)
            if not flow.units and flow.credit >= 0:
                self._forget(name)
            passed += 1
            if passed > len(self._old):
                self._pass_rounds()
                passed = 0
        return None

    def take(self, unit: Unit[WorkT], pieces: Sequence[WorkT]) -> None:
        """Some of the first pieces of a unit run: their adapters are charged, and the rest goes on waiting."""
        owner = self._flows[unit.adapter]
        for piece in pieces:
            owner.credit -= piece.tokens - self._borrow(piece, unit.adapter)
        tokens = sum(piece.tokens for piece in pieces)
        self._ahead = max(0, self._ahead + (tokens if unit.adapter in self._new else -tokens))
        if len(pieces) == len(unit.pieces):
            self.remove(unit)
            return
        for tally in (unit, owner, self):
            tally.tokens -= tokens
        unit.pieces = unit.pieces[len(pieces) :]

    def _borrow(self, piece: WorkT, owner: str) -> float:
        """Charges an adapter for a piece in another's queue. What of it was paid that way."""
        if piece.adapter == owner:
            return 0.0
        flow = self._flow(piece.adapter, self._old)
        limit = flow.income * (BORROWED if flow.units else 1.0)
        paid = min(float(piece.tokens), max(0.0, flow.credit + limit))
        flow.credit -= paid
        return paid

    def _pass_rounds(self) -> None:
        """All adapters with work are in debt: as many rounds at once as pass until the first can send."""
        waiting = (flow for flow in self._flows.values() if flow.units)
        rounds = min(math.floor(-flow.credit / flow.income) for flow in waiting)
        for flow in self._flows.values():
            flow.credit += rounds * flow.income

    def _flow(self, adapter: str, queue: OrderedDict[str, None]) -> _Flow[WorkT]:
        """An adapter's, which joins a queue if it is in none."""
        if adapter not in self._flows:
            self._flows[adapter] = _Flow(self._weight(adapter), OrderedDict())
            queue[adapter] = None
        return self._flows[adapter]

    def _grow_old(self, adapter: str) -> None:
        """Its turn is over: it is the last of the old ones."""
        self._flows[adapter].in_turn = False
        self._new.pop(adapter, None)
        self._old[adapter] = None
        self._old.move_to_end(adapter)

    def _forget(self, adapter: str) -> None:
        del self._flows[adapter], self._old[adapter]


class Scheduler(Generic[WorkT]):
    """Fair shares of the device by adapter, in batches of at most `max_batch_tokens`.

    Work-conserving unless told otherwise: a batch is whatever waits when the device is free, so an idle server starts
    at once and a busy one batches what arrived meanwhile.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_queue_tokens: int,
        clock: Callable[[], float],
        weight: Callable[[str], float] = lambda _: 1.0,
        aging_seconds: float = math.inf,
        delay_seconds: float = 0.0,
        batch_seconds: float = math.inf,
        streams: int = 1,
    ) -> None:
        """`clock` gives seconds; only differences count. `weight(adapter)`: its share, above 0. `streams`: batches that
        run side by side.

        `aging_seconds`: how long a lower priority may be passed over. `delay_seconds`: how long a batch that is not
        full waits for more. `batch_seconds`: how long a batch should take while work waits; budgets are made to that
        measure, but for a quantum at least.
        """
        self._max_batch_tokens = self._affordable = max_batch_tokens
        self._batch_seconds = batch_seconds
        self._max_queue_tokens = max_queue_tokens
        self._streams = streams
        self._gathering_seconds = GATHERING_SHARE * batch_seconds if math.isfinite(batch_seconds) else 0.0
        self._clock = clock
        self._aging_seconds = aging_seconds
        self._delay_seconds = delay_seconds
        self._rounds = {priority: _Round[WorkT](weight) for priority in Priority}
        self._numbers = 0
        self._dealt = 0
        """The number of the last unit there was when work was dealt out to idle streams."""
        self._deadlines: list[tuple[float, int, Priority]] = []
        """A heap of deadlines, numbers and priorities of units; not of the units, which may be done long before."""
        self._expected: dict[Priority, dict[str, int]] = {priority: {} for priority in Priority}
        """Tokens of requests that are being made ready to be admitted, by priority and adapter."""
        self._shrunk_until = 0.0
        self._measured: tuple[float, float] | None = None  # smoothed tokens and seconds of a batch

    @property
    def tokens(self) -> dict[Priority, int]:
        """Tokens that wait, by priority."""
        return {priority: line.tokens for priority, line in self._rounds.items()}

    @property
    def share(self) -> float:
        """Of the queue: how much is taken, 0 to 1."""
        return min(1.0, sum(self.tokens.values()) / self._max_queue_tokens)

    @property
    def budget(self) -> int:
        """Tokens of a batch, for now."""
        quick = (self._speed or math.inf) * self._batch_seconds
        return int(min(self._affordable, max(QUANTUM, quick)))

    @property
    def throughput(self) -> float | None:
        """Tokens a second of all streams, by batches that left work waiting: what there is when little is to do tells
        nothing. None: there was none yet."""
        return self._speed * self._streams if self._speed else None

    @property
    def _speed(self) -> float | None:
        """The same of one stream, while the others run as well."""
        return self._measured[0] / self._measured[1] if self._measured else None

    def check(self, adapter: str, tokens: int, terms: Terms) -> None:
        """Raises Overloaded where a request of so many tokens would be refused now, or, while anything waits, once
        those that are expected wait as well."""
        self._check(adapter, tokens, terms, self._expected)

    def expect(self, adapter: str, tokens: int, priority: Priority) -> None:
        """So many tokens more, or fewer where below zero, are being made ready to be admitted: who asks meanwhile is
        told of them as well, and not made ready for nothing."""
        expected = self._expected[priority]
        expected[adapter] = expected.get(adapter, 0) + tokens
        if not expected[adapter]:
            del expected[adapter]

    def _check(
        self, adapter: str, tokens: int, terms: Terms, expected: Mapping[Priority, Mapping[str, int]] = NOTHING
    ) -> None:
        """Raises Overloaded where a request is refused for what waits and what is expected.

        An empty queue takes anything, so that a request larger than the queue can be served at all, and nobody waits
        for what may never come.
        """
        ahead = self._ahead(terms.priority)
        if not ahead:
            return
        coming = _down_to(terms.priority, {one: sum(own.values()) for one, own in expected.items()})
        coming = min(coming, self._max_queue_tokens)
        own = self._rounds[terms.priority].queued(adapter)
        room = self._max_queue_tokens - ahead - coming
        wait = "are waiting or about to" if coming else "are waiting"
        if tokens > room:
            raise self._overloaded(
                f"{ahead + coming} tokens {wait} and this request adds {tokens}; the server queues at most "
                f"{self._max_queue_tokens}",
                ahead,
            )
        if own + tokens > ROOM_SHARE * room:
            raise self._overloaded(
                f"{own} tokens are waiting for adapter {adapter!r} and this request adds {tokens}; "
                f"{ahead + coming} {wait} in all, so one adapter may queue {ROOM_SHARE * room}",
                ahead,
                "adapter_overloaded",
            )
        self._check_deadline(adapter, tokens, terms, ahead, coming, expected.get(terms.priority, {}))

    def admit(self, groups: Sequence[Sequence[WorkT]], terms: Terms) -> list[Unit[WorkT]]:
        """Queues the units of one request, all or none; each is given as its pieces. Raises Overloaded for what waits
        now; what is expected comes after it."""
        tokens = sum(piece.tokens for group in groups for piece in group)
        self._check(groups[0][0].adapter, tokens, terms)
        now = self._clock()
        units = []
        for group in groups:
            self._numbers += 1
            tokens = sum(piece.tokens for piece in group)
            unit = Unit(group[0].adapter, group, tokens, self._numbers, terms, now)
            self._rounds[terms.priority].add(unit)
            if terms.deadline is not None:
                heapq.heappush(self._deadlines, (terms.deadline, unit.number, terms.priority))
            units.append(unit)
        self._forget_deadlines()
        return units

    def discard(self, units: Iterable[Unit[WorkT]]) -> None:
        """Nobody waits for these any more: those that have not run leave, and make room."""
        for unit in units:
            line = self._rounds[unit.terms.priority]
            if (waiting := line.units.get(unit.number)) is not None:
                line.remove(waiting)

    def expire(self) -> list[WorkT]:
        """Takes what is past its deadline, or would be at the end of the next batch: before it costs anything."""
        expired: list[WorkT] = []
        ready = self._ready()
        while self._deadlines and self._deadlines[0][0] <= ready:
            _, number, priority = heapq.heappop(self._deadlines)
            line = self._rounds[priority]
            if (waiting := line.units.get(number)) is not None:
                expired += waiting.pieces
                line.remove(waiting)
        return expired

    def _forget_deadlines(self) -> None:
        """Drops the deadlines of what waits no more, once they are most of them: they may be a minute away."""
        waiting = sum(len(line.units) for line in self._rounds.values())
        if len(self._deadlines) > FORGOTTEN + 2 * waiting:
            left = [entry for entry in self._deadlines if entry[1] in self._rounds[entry[2]].units]
            heapq.heapify(left)
            self._deadlines = left

    def pause(self, idle: int = 1) -> float | None:
        """Seconds until the next batch should be taken, for more to come; None: nothing waits. `idle`: see
        `next_batch`."""
        oldest = min(filter(None, map(_oldest, self._rounds.values())), key=lambda unit: unit.number, default=None)
        if oldest is None:
            return None
        waiting = sum(self.tokens.values())
        if waiting >= self.budget:
            return 0.0
        gathers = idle < self._streams and waiting < GATHERED_TOKENS and oldest.number > self._dealt
        delay = max(self._delay_seconds, self._gathering_seconds if gathers and self._may_gather() else 0.0)
        return max(0.0, oldest.admitted + delay - self._clock())

    def _may_gather(self) -> bool:
        """Whether nothing that waits, which is little, is urgent, nor late after as long as work gathers."""
        late = self._ready(self._gathering_seconds)
        units = (unit for line in self._rounds.values() for unit in line.units.values())
        return all(
            unit.terms.priority is not Priority.HIGH and (unit.terms.deadline is None or unit.terms.deadline > late)
            for unit in units
        )

    def _ready(self, pause: float = 0.0) -> float:
        """When what runs next is done, on the queue's clock, if it is taken after a pause of so many seconds."""
        tokens = min(self.budget, sum(self.tokens.values()))
        return self._clock() + pause + self._streams * self._seconds(tokens)

    def next_batch(self, idle: int = 1) -> Batch[WorkT] | None:
        """What runs next within the budget, at least one piece; None if nothing waits. `idle`: streams that could take
        some of it, this one among them."""
        now = self._clock()
        self._grow(now)
        budget = self.budget
        waiting = sum(self.tokens.values())
        filling = _Filling[WorkT](now, max(SPREAD_TOKENS, -(-waiting // idle)) if idle > 1 else budget)
        aged = [
            (oldest.admitted, line)
            for priority, line in self._rounds.items()
            if priority is not Priority.HIGH
            and (oldest := _oldest(line)) is not None
            and now - oldest.admitted >= self._aging_seconds
        ]
        for _, line in sorted(aged, key=lambda one: one[0]):
            filling.fill(line, filling.tokens + int(AGED_SHARE * budget), budget)
        for line in self._rounds.values():
            filling.fill(line, budget, budget)
        if not filling.work:
            return None
        if idle > 1:
            self._dealt = self._numbers
        backlog = any(self.tokens.values())
        alone = idle == self._streams and not backlog
        return Batch(filling.work, filling.waits, filling.sizes, filling.tokens, backlog, alone)

    def ran(self, tokens: int, seconds: float) -> None:
        """A batch took so long, from the end of its stream's last, both of which left work waiting; without what the
        stream has waited between them."""
        if self._measured is None:
            self._measured = float(tokens), max(seconds, 1e-9)
        else:
            before_tokens, before_seconds = self._measured
            self._measured = (
                before_tokens + SMOOTHING * (tokens - before_tokens),
                before_seconds + SMOOTHING * (seconds - before_seconds),
            )

    def shrink(self) -> None:
        """The device ran out of memory: for a while, batches have half the budget that they have now."""
        self._affordable = max(1, self.budget // 2)
        self._shrunk_until = self._clock() + SHRUNK_SECONDS

    def waiting(self) -> Iterator[WorkT]:
        """Everything that waits."""
        for line in self._rounds.values():
            for unit in line.units.values():
                yield from unit.pieces

    def drain(self) -> list[WorkT]:
        """Takes everything that waits."""
        work = list(self.waiting())
        for line in self._rounds.values():
            for unit in list(line.units.values()):
                line.remove(unit)
        self._deadlines.clear()
        return work

    def _ahead(self, priority: Priority) -> int:
        """Tokens that wait of a priority and of those above it."""
        return _down_to(priority, self.tokens)

    def _check_deadline(
        self, adapter: str, tokens: int, terms: Terms, ahead: int, coming: int, expected: Mapping[str, int]
    ) -> None:
        if terms.deadline is None:
            return
        left = terms.deadline - self._clock()
        # Tokens that run now, which nobody counts, those that run beside the request's own batch, and its own.
        running = RUN_HEADROOM * self._seconds((2 * self._streams - 1) * self.budget + tokens)
        if WAIT_HEADROOM * self._seconds(ahead + coming) + running <= left:
            return
        line = self._rounds[terms.priority]
        waits = self._seconds(ahead - line.tokens + line.before(adapter, tokens, expected) - tokens)
        if (seconds := WAIT_HEADROOM * waits + running) > left:
            raise self._overloaded(
                f"the answer may take {seconds:.1f} s, {max(left, 0.0):.1f} s are left until the request's deadline",
                ahead,
                "deadline_unreachable",
            )

    def _overloaded(self, message: str, ahead: int, code: str | None = None) -> Overloaded:
        error = Overloaded(message, code=code)
        error.wait_seconds = self._seconds(ahead)
        error.retry_after = max(1, math.ceil(error.wait_seconds))
        return error

    def _seconds(self, tokens: float) -> float:
        """How long they take by the present throughput; nothing, as long as that is not known."""
        return tokens / throughput if (throughput := self.throughput) else 0.0

    def _grow(self, now: float) -> None:
        while self._affordable < self._max_batch_tokens and now >= self._shrunk_until:
            self._affordable = min(2 * self._affordable, self._max_batch_tokens)
            self._shrunk_until += SHRUNK_SECONDS


class _Filling(Generic[WorkT]):
    """A batch while it is put together."""

    def __init__(self, now: float, spread: int) -> None:
        """`spread`: tokens after which the rest is left to others, unless it is to run together."""
        self.work: list[WorkT] = []
        self.waits: list[float] = []
        self.sizes: list[int] = []
        self.tokens = 0
        self._now = now
        self._spread = spread

    def fill(self, line: _Round[WorkT], limit: int, budget: int) -> None:
        """Takes the units whose turn it is, up to `limit` tokens; where there is nothing yet, the first one anyway,
        or as much of it as `budget` holds."""
        while (unit := line.first()) is not None:
            if not self.work:
                pieces = _fitting(unit.pieces, budget)
            elif self.tokens + unit.tokens <= (limit if unit.terms.strict else min(limit, self._spread)):
                pieces = unit.pieces
            else:
                return
            line.take(unit, pieces)
            self.work += pieces
            self.waits += [self._now - unit.admitted] * len(pieces)
            sizes = [piece.tokens for piece in pieces]
            self.sizes += sizes
            self.tokens += sum(sizes)


def _down_to(priority: Priority, tokens: Mapping[Priority, int]) -> int:
    """Those of a priority and of the ones above it."""
    total = 0
    for one in Priority:
        total += tokens.get(one, 0)
        if one is priority:
            break
    return total


def _fitting(pieces: Sequence[WorkT], budget: int) -> Sequence[WorkT]:
    """The first pieces that fit, at least one."""
    total = 0
    for count, piece in enumerate(pieces):
        total += piece.tokens
        if count and total > budget:
            return pieces[:count]
    return pieces


def _oldest(line: _Round[WorkT]) -> Unit[WorkT] | None:
    return next(iter(line.units.values()), None)
