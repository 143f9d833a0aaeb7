"""The scheduler by tables, and by a state machine against a simple model: what waits, what runs together, who gets how
much of the device, what is refused.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, combinations, cycle, groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from server.core import Priority, Terms
from server.engine.scheduler import (
    AGED_SHARE,
    BORROWED,
    GATHERED_TOKENS,
    GATHERING_SHARE,
    QUANTUM,
    ROOM_SHARE,
    RUN_HEADROOM,
    SHRUNK_SECONDS,
    SPREAD_TOKENS,
    WAIT_HEADROOM,
    Batch,
    Scheduler,
    Unit,
)
from server.errors import Overloaded

HIGH, NORMAL, LOW = Priority


@dataclass(eq=False)
class Piece:
    tokens: int
    adapter: str = "a"
    name: str = ""
    priority: Priority = Priority.NORMAL

    def __repr__(self) -> str:
        return f"{self.adapter}{self.name}:{self.tokens}"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def scheduler(
    *,
    batch: int = 10,
    queue: int = 10**9,
    clock: Clock | None = None,
    weight: Callable[[str], float] = lambda _: 1.0,
    aging: float = 1e9,
    delay: float = 0.0,
    batch_seconds: float = 1e9,
    streams: int = 1,
) -> Scheduler[Piece]:
    return Scheduler(
        max_batch_tokens=batch,
        max_queue_tokens=queue,
        clock=clock or Clock(),
        weight=weight,
        aging_seconds=aging,
        delay_seconds=delay,
        batch_seconds=batch_seconds,
        streams=streams,
    )


def admit(queue: Scheduler[Piece], *pieces: Piece, priority: Priority = NORMAL, deadline: float | None = None) -> list:
    """A request of texts, each for one adapter."""
    return queue.admit([[piece] for piece in pieces], Terms(priority, deadline))


def pieces(*tokens: int, adapter: str = "a") -> list[Piece]:
    return [Piece(size, adapter) for size in tokens]


def batch(queue: Scheduler[Piece]) -> list[Piece]:
    taken = queue.next_batch()
    assert taken is not None
    assert taken.tokens == sum(piece.tokens for piece in taken.work)
    return taken.work


def batches(queue: Scheduler[Piece]) -> list[list[int]]:
    taken = []
    while waiting(queue):
        taken.append([piece.tokens for piece in batch(queue)])
    assert queue.next_batch() is None
    return taken


def waiting(queue: Scheduler[Piece]) -> int:
    return sum(queue.tokens.values())


def served(queue: Scheduler[Piece], count: int) -> Counter[str]:
    """Tokens of each adapter in so many batches."""
    tokens: Counter[str] = Counter()
    for piece in chain.from_iterable(batch(queue) for _ in range(count)):
        tokens[piece.adapter] += piece.tokens
    return tokens


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
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
def test_batches_of_one_adapter_are_the_oldest_work_within_the_budget(
    tokens: list[int], expected: list[list[int]]
) -> None:
    queue = scheduler()
    admit(queue, *pieces(*tokens))
    assert batches(queue) == expected
    assert waiting(queue) == 0


def test_nothing_is_no_batch() -> None:
    assert scheduler().next_batch() is None
    assert scheduler().pause() is None


def test_idle_starts_at_once_and_what_arrives_meanwhile_is_the_next_batch() -> None:
    queue = scheduler()
    admit(queue, *pieces(1))
    assert queue.pause() == 0
    assert batches(queue) == [[1]]
    admit(queue, *pieces(2))
    admit(queue, *pieces(3))
    assert batches(queue) == [[2, 3]]


def test_waits_are_counted_from_admission_and_a_batch_says_whether_work_is_left() -> None:
    clock = Clock()
    queue = scheduler(clock=clock)
    admit(queue, *pieces(1))
    clock.now += 2
    admit(queue, *pieces(1, 9))
    clock.now += 1
    first, second = queue.next_batch(), queue.next_batch()
    assert isinstance(first, Batch)
    assert (first.waits, first.backlog) == ([3.0, 1.0], True)
    assert second is not None
    assert not second.backlog


def test_a_batch_that_is_not_full_waits_for_more_if_told_so() -> None:
    clock = Clock()
    queue = scheduler(clock=clock, delay=0.5)
    admit(queue, *pieces(4))
    clock.now += 0.125
    admit(queue, *pieces(4))
    assert queue.pause() == 0.375
    clock.now += 1
    assert queue.pause() == 0
    clock.now -= 1
    admit(queue, *pieces(2))  # full
    assert queue.pause() == 0


def test_drain_takes_everything() -> None:
    queue = scheduler()
    work = pieces(1, 2)
    admit(queue, *work)
    admit(queue, third := Piece(3), priority=LOW)
    assert set(queue.drain()) == {*work, third}
    assert waiting(queue) == 0
    assert queue.next_batch() is None


def test_less_memory_means_smaller_batches_for_a_while() -> None:
    clock = Clock()
    queue = scheduler(batch=8, clock=clock)
    queue.shrink()
    queue.shrink()
    assert queue.budget == 2
    admit(queue, *pieces(*[1] * 20))
    assert len(batch(queue)) == 2
    for expected in (4, 8, 8):
        clock.now += SHRUNK_SECONDS
        admit(queue, *pieces(*[1] * 20))
        assert len(batch(queue)) == expected
    for _ in range(10):
        queue.shrink()
    assert len(batch(queue)) == 1


@pytest.mark.parametrize(("throughput", "budget"), [(1e6, 5000), (20_000, 2000), (10, QUANTUM)])
def test_a_slow_device_gets_smaller_batches(throughput: float, budget: int) -> None:
    queue = scheduler(batch=5000, batch_seconds=0.1)
    admit(queue, *pieces(*[1] * 20_000))
    assert len(batch(queue)) == 5000
    queue.ran(int(throughput), 1.0)
    assert queue.budget == len(batch(queue)) == budget


# ------------------------------------------------------------------------------------------------------------- shares


def test_a_hot_adapter_does_not_hold_up_a_quiet_one() -> None:
    queue = scheduler(batch=QUANTUM)
    admit(queue, *pieces(*[8] * 10_000, adapter="hot"))
    batch(queue)
    admit(queue, quiet := Piece(8, "quiet"))
    assert any(quiet in batch(queue) for _ in range(2))


def test_a_batch_has_rows_of_many_adapters() -> None:
    queue = scheduler(batch=8 * QUANTUM)
    for adapter in "abcdefghij":
        admit(queue, *pieces(*[16] * 100, adapter=adapter))
    assert len({piece.adapter for piece in batch(queue)}) == 8


@pytest.mark.parametrize("sizes", [(16, 16, 16), (5, 100, 40)], ids=str)
def test_shares_go_by_weight(sizes: tuple[int, ...]) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    queue = scheduler(batch=1000, weight=weights.__getitem__)
    for adapter, size in zip(weights, sizes, strict=True):
        admit(queue, *pieces(*[size] * (400_000 // size), adapter=adapter))
    got = served(queue, 100)
    for adapter, weight in weights.items():
        assert got[adapter] / weight == pytest.approx(100_000 / 3.5, abs=2 * QUANTUM + 2 * 100 / 0.5)


def test_within_an_adapter_it_is_first_come_first_served() -> None:
    queue = scheduler(batch=100)
    work = [Piece(7 + index % 5, "ab"[index % 2], str(index)) for index in range(200)]
    for piece in work:
        admit(queue, piece)
    taken = [piece for _ in range(20) for piece in (batch(queue) if waiting(queue) else [])]
    for adapter in "ab":
        expected = [piece for piece in work if piece.adapter == adapter]
        assert [piece for piece in taken if piece.adapter == adapter] == expected


def test_who_had_nothing_waiting_is_served_before_those_who_had() -> None:
    queue = scheduler(batch=2 * QUANTUM)
    admit(queue, *pieces(*[16] * 1000, adapter="hot"))
    batch(queue)
    for adapter in ("first", "second"):
        admit(queue, *pieces(*[16] * 8, adapter=adapter))
    names = [piece.adapter for piece in batch(queue)]
    assert names == [*["first"] * 8, *["second"] * 8, *["hot"] * 16]


def test_who_had_nothing_waiting_is_served_first_for_a_quantum_only() -> None:
    queue = scheduler(batch=4 * QUANTUM)
    admit(queue, *pieces(*[16] * 1000, adapter="hot"))
    batch(queue)
    admit(queue, *pieces(*[16] * 1000, adapter="late"))
    turns = [(adapter, len(list(own))) for adapter, own in groupby(piece.adapter for piece in batch(queue))]
    turn = QUANTUM // 16
    assert turns == [("late", turn), ("hot", 2 * turn), ("late", turn)]


@pytest.mark.parametrize("comers", [1, 5, 20])
def test_those_who_come_again_and_again_leave_the_others_their_share(comers: int) -> None:
    queue = scheduler(batch=QUANTUM)
    admit(queue, *pieces(*[16] * 100_000, adapter="hot"))
    got: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for _ in range(60 * (comers + 1)):
        for name in map(str, range(comers)):
            if not waits[name]:  # the moment that it is served, it comes with as much as a newcomer may send
                admit(queue, *pieces(*[16] * (QUANTUM // 16), adapter=name))
                waits[name] = QUANTUM
        for piece in batch(queue):
            got[piece.adapter] += piece.tokens
            waits[piece.adapter] -= piece.tokens
    assert got["hot"] >= 58 * QUANTUM
    assert min(got[str(comer)] for comer in range(comers)) >= 58 * QUANTUM


def test_a_crowd_of_newcomers_does_not_keep_the_others_waiting() -> None:
    queue = scheduler(batch=2 * QUANTUM)
    admit(queue, *pieces(*[16] * 1000, adapter="hot"))
    batch(queue)
    got: Counter[str] = Counter()
    for turn in range(40):  # as many as the device can serve, none of them twice
        for comer in range(2 * QUANTUM // 16):
            admit(queue, *pieces(16, adapter=f"{turn} {comer}"))
        for piece in batch(queue):
            got[piece.adapter] += piece.tokens
    assert got["hot"] >= 4 * QUANTUM


# ------------------------------------------------------------------------------------------------------------ streams


def test_what_waits_is_dealt_out_to_idle_streams() -> None:
    queue = scheduler(batch=4000, streams=2)
    admit(queue, *pieces(*[16] * 40))
    taken = [queue.next_batch(idle=2), queue.next_batch(idle=1)]
    assert [one.tokens if one else None for one in taken] == [320, 320]
    assert queue.next_batch(idle=2) is None


def test_what_is_little_is_not_dealt_out() -> None:
    queue = scheduler(batch=4000, streams=4)
    admit(queue, *pieces(*[16] * (SPREAD_TOKENS // 16)))
    assert len(batch_of(queue, idle=4)) == SPREAD_TOKENS // 16


def test_a_batch_is_no_larger_for_being_dealt_out() -> None:
    queue = scheduler(batch=160, streams=2)
    admit(queue, *pieces(*[16] * 100))
    assert sum(piece.tokens for piece in batch_of(queue, idle=2)) == 160


def test_what_is_to_run_together_is_not_dealt_out() -> None:
    queue = scheduler(batch=4000, streams=2)
    queue.admit([[piece] for piece in pieces(*[16] * 40)], Terms(strict=True))
    assert len(batch_of(queue, idle=2)) == 40


def test_while_one_stream_runs_work_gathers_for_another() -> None:
    clock = Clock()
    queue = scheduler(batch=4000, clock=clock, batch_seconds=0.1, streams=2)
    admit(queue, Piece(16))
    assert queue.pause(idle=2) == 0
    assert queue.pause(idle=1) == pytest.approx(GATHERING_SHARE * 0.1)
    clock.now += 0.02
    assert queue.pause(idle=1) == pytest.approx(GATHERING_SHARE * 0.1 - 0.02)
    admit(queue, *pieces(*[16] * (GATHERED_TOKENS // 16 - 1)))
    assert queue.pause(idle=1) == 0


def test_what_is_urgent_does_not_wait_for_more() -> None:
    """The longest pause is half of what a batch should take."""
    clock = Clock()
    gathering = GATHERING_SHARE * 0.1
    for terms, pause in (
        (Terms(Priority.HIGH), 0.0),
        (Terms(deadline=clock.now + 0.9 * gathering), 0.0),
        (Terms(deadline=clock.now + 1.1 * gathering), gathering),
        (Terms(Priority.LOW), gathering),
    ):
        queue = scheduler(batch=4000, clock=clock, batch_seconds=0.1, streams=2)
        admit(queue, Piece(16))
        queue.admit([[Piece(16)]], terms)
        assert queue.pause(idle=1) == pytest.approx(pause)
    queue = scheduler(batch=4000, clock=clock, batch_seconds=0.1, streams=2)
    queue.ran(1000, 0.1)
    queue.admit([[Piece(100)]], Terms(deadline=clock.now + 1.1 * gathering))  # which takes 10 ms
    assert queue.pause(idle=1) == 0


def test_what_was_dealt_out_does_not_gather() -> None:
    clock = Clock()
    queue = scheduler(batch=4000, clock=clock, batch_seconds=0.1, streams=2)
    admit(queue, *pieces(*[16] * 12))
    assert len(batch_of(queue, idle=2)) == SPREAD_TOKENS // 16
    assert queue.pause(idle=1) == 0
    assert sum(piece.tokens for piece in batch_of(queue, idle=1)) == 12 * 16 - SPREAD_TOKENS
    admit(queue, Piece(16))  # which comes later
    assert queue.pause(idle=1) == pytest.approx(GATHERING_SHARE * 0.1)


def test_a_batch_is_alone_where_nothing_else_runs_or_waits() -> None:
    queue = scheduler(batch=4000, streams=2)

    def alone(*texts: int, idle: int) -> bool:
        admit(queue, *pieces(*texts))
        taken = queue.next_batch(idle)
        queue.drain()
        assert taken is not None
        return taken.alone

    assert alone(400, idle=2)
    assert not alone(400, idle=1)
    assert not alone(400, 400, idle=2)


def test_all_streams_together_are_as_fast_as_one_times_their_number() -> None:
    queue = scheduler(batch=4000, batch_seconds=0.1, streams=3)
    queue.ran(1000, 0.1)
    assert queue.throughput == pytest.approx(30_000)
    assert queue.budget == 1000  # of one batch, on one of them


def batch_of(queue: Scheduler[Piece], idle: int) -> list[Piece]:
    taken = queue.next_batch(idle)
    assert taken is not None
    return taken.work


def test_what_was_not_used_of_a_turn_is_not_saved_up() -> None:
    queue = scheduler(batch=10 * QUANTUM)
    for _ in range(50):
        admit(queue, Piece(1, "rare"), Piece(1, "busy"))
        batch(queue)
    for adapter in ("rare", "busy"):
        admit(queue, *pieces(*[16] * 1000, adapter=adapter))
    got = served(queue, 1)
    assert abs(got["rare"] - got["busy"]) <= 2 * QUANTUM


def fan_out(adapters: str, texts: int, tokens: int) -> list[list[Piece]]:
    return [[Piece(tokens, adapter, str(text)) for adapter in adapters] for text in range(texts)]


def test_a_text_runs_for_all_its_adapters_together() -> None:
    queue = scheduler(batch=100)
    queue.admit(fan_out("abc", texts=5, tokens=20), Terms())
    assert [[repr(piece) for piece in batch(queue)] for _ in range(2)] == [
        ["a0:20", "b0:20", "c0:20"],
        ["a1:20", "b1:20", "c1:20"],
    ]


def test_a_text_that_fills_more_than_a_batch_is_cut() -> None:
    queue = scheduler(batch=100)
    admit(queue, Piece(10, "z"))
    queue.admit(fan_out("abcdefg", texts=1, tokens=30), Terms())
    assert [[piece.adapter for piece in batch(queue)] for _ in range(4)] == [["z"], [*"abc"], [*"def"], ["g"]]
    assert waiting(queue) == 0


def test_each_adapter_of_a_request_pays_for_its_own_rows() -> None:
    """b's rows run in requests that wait in a's queue; c, alone, gets as much as either."""
    queue = scheduler(batch=1000)
    queue.admit(fan_out("ab", texts=20_000, tokens=10), Terms())
    admit(queue, *pieces(*[10] * 20_000, adapter="c"))
    got = served(queue, 100)
    assert got["a"] == got["b"]
    assert got["c"] == pytest.approx(100_000 / 3, rel=0.03)


def test_an_adapters_own_queue_goes_on_whatever_others_ask_of_it() -> None:
    """Nine adapters' requests ask b as well, more than b's share; its own queue gets at least half of that."""
    queue = scheduler(batch=1000)
    for first in "cdefghijk":
        queue.admit(fan_out(f"{first}b", texts=10_000, tokens=10), Terms())
    mine = set(own := pieces(*[10] * 20_000, adapter="b"))
    admit(queue, *own)
    admit(queue, *pieces(*[10] * 20_000, adapter="a"))
    taken = [piece for _ in range(200) for piece in batch(queue)]
    share = sum(piece.tokens for piece in taken if piece.adapter == "a")
    alone = sum(piece.tokens for piece in taken if piece in mine)
    assert share * (1 - BORROWED) * 0.95 <= alone <= share
    assert share == pytest.approx(200_000 / 11, rel=0.1)


# --------------------------------------------------------------------------------------------------------- priorities


def test_priorities_are_strict() -> None:
    queue = scheduler(batch=10)
    admit(queue, *pieces(4, 4, adapter="low"), priority=LOW)
    admit(queue, *pieces(4, 4, adapter="normal"))
    admit(queue, *pieces(6, 6, adapter="high"), priority=HIGH)
    taken = [[piece.adapter for piece in batch(queue)] for _ in range(3)]
    assert taken == [["high", "normal"], ["high", "normal"], ["low", "low"]]


def test_a_lower_priority_that_has_waited_gets_a_part_of_each_batch() -> None:
    clock = Clock()
    queue = scheduler(batch=100, clock=clock, aging=5)
    admit(queue, *pieces(*[5] * 100, adapter="low"), priority=LOW)
    admit(queue, *pieces(*[5] * 100))
    clock.now += 4
    admit(queue, *pieces(*[5] * 1000, adapter="high"), priority=HIGH)
    assert served(queue, 3) == {"high": 300}
    clock.now += 1
    share = AGED_SHARE * 100
    assert served(queue, 4) == {"low": 4 * share, "a": 4 * share, "high": 4 * (100 - 2 * share)}


def test_no_aged_text_is_too_long_for_its_part() -> None:
    clock = Clock()
    queue = scheduler(batch=100, clock=clock, aging=5)
    admit(queue, *pieces(*[90] * 3, adapter="low"), priority=LOW)
    clock.now += 1
    admit(queue, *pieces(*[90] * 3, adapter="normal"))
    clock.now += 5
    admit(queue, *pieces(*[5] * 1000, adapter="high"), priority=HIGH)
    taken = served(queue, 6)
    assert (taken["low"], taken["normal"]) == (270, 270)


# ---------------------------------------------------------------------------------------------- refused, expired, gone


def test_a_request_that_does_not_fit_is_refused_whole() -> None:
    queue = scheduler(queue=12)
    admit(queue, *pieces(6))
    with pytest.raises(Overloaded, match="6 tokens are waiting and this request adds 8") as refused:
        admit(queue, *pieces(4, 4))
    assert (refused.value.error_code, refused.value.retry_after) == ("overloaded", 1)
    assert waiting(queue) == 6
    admit(queue, *pieces(4, adapter="b"))
    assert waiting(queue) == 10


def test_an_empty_queue_takes_anything() -> None:
    queue = scheduler(queue=10)
    admit(queue, *pieces(30))
    with pytest.raises(Overloaded):
        admit(queue, *pieces(1))


def test_what_is_expected_counts_for_who_asks_and_not_for_who_comes() -> None:
    queue = scheduler(queue=100)
    queue.ran(100, 1.0)
    admit(queue, *pieces(10))
    queue.expect("c", 50, NORMAL)
    queue.check("b", 40, Terms())
    queue.check("b", 90, Terms(HIGH))  # what is less urgent is not before it
    with pytest.raises(Overloaded, match="60 tokens are waiting or about to") as refused:
        queue.check("b", 41, Terms())
    assert refused.value.wait_seconds == pytest.approx(10 / queue.throughput)  # what may never come is not waited for
    with pytest.raises(Overloaded):
        queue.check("b", 41, Terms(LOW))
    admit(queue, *pieces(90, adapter="b"))
    queue.expect("c", -50, NORMAL)
    while waiting(queue):
        batch(queue)
    queue.check("b", 1000, Terms())


def test_an_empty_queue_takes_anything_whatever_is_expected() -> None:
    queue = scheduler(queue=100)
    queue.ran(100, 1.0)
    queue.expect("a", 10**6, HIGH)
    queue.check("b", 1000, Terms(deadline=100.0 + 1000))
    admit(queue, Piece(1))
    with pytest.raises(Overloaded, match="101 tokens"):
        queue.check("b", 1, Terms())


def test_what_is_expected_of_a_hot_adapter_is_only_waited_for_by_turns() -> None:
    queue = scheduler(batch=1, queue=10**6)
    queue.ran(100, 1.0)
    admit(queue, *pieces(*[1] * 100, adapter="warm"))
    queue.expect("hot", 5000, NORMAL)
    terms = Terms(deadline=100.0 + 10)
    queue.check("quiet", 10, terms)
    with pytest.raises(Overloaded) as refused:
        queue.check("hot", 10, terms)
    assert refused.value.error_code == "deadline_unreachable"


def test_one_adapter_leaves_room_for_others() -> None:
    queue = scheduler(queue=1000)
    for _ in range(750):
        admit(queue, Piece(1, "hot"))
    with pytest.raises(Overloaded, match="waiting for adapter 'hot'") as refused:
        admit(queue, Piece(1, "hot"))
    assert refused.value.error_code == "adapter_overloaded"
    assert waiting(queue) == 1000 * ROOM_SHARE / (1 + ROOM_SHARE)
    admit(queue, *pieces(*[1] * 100, adapter="quiet"))


def test_lower_priorities_take_no_room_from_higher_ones() -> None:
    queue = scheduler(queue=100)
    admit(queue, Piece(100, "batch"), priority=LOW)
    with pytest.raises(Overloaded):
        admit(queue, Piece(1, "other"), priority=LOW)
    admit(queue, Piece(100))
    with pytest.raises(Overloaded):
        admit(queue, Piece(1, "other"))
    admit(queue, Piece(100), priority=HIGH)


def test_retry_after_is_the_time_that_the_queue_takes() -> None:
    queue = scheduler(queue=100)
    admit(queue, *pieces(100))
    for tokens, seconds, expected in ((0, 0, 1), (1000, 1, 1), (10, 2, 6)):
        if tokens:
            queue.ran(tokens, seconds)
        with pytest.raises(Overloaded) as refused:
            admit(queue, *pieces(1, adapter="b"))
        assert refused.value.retry_after == (1 if expected == 1 else -(-100 // queue.throughput))


def test_the_throughput_follows_the_batches() -> None:
    queue = scheduler()
    assert queue.throughput is None
    queue.ran(1000, 0.5)
    assert queue.throughput == 2000
    for _ in range(100):
        queue.ran(1000, 1.0)
    assert queue.throughput == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize(
    ("adapter", "priority", "seconds", "taken"),
    [
        # 1000 tokens at 100 a second are before it; a batch of 10 runs, and it has 10 itself
        ("hot", NORMAL, 10.0 * WAIT_HEADROOM + 0.19 * RUN_HEADROOM, False),
        ("hot", NORMAL, 10.0 * WAIT_HEADROOM + 0.21 * RUN_HEADROOM, True),
        # the others get no more than it does before its turn
        ("quiet", NORMAL, 0.1 * WAIT_HEADROOM + 0.19 * RUN_HEADROOM, False),
        ("quiet", NORMAL, 0.1 * WAIT_HEADROOM + 0.21 * RUN_HEADROOM, True),
        ("quiet", LOW, 10.0 * WAIT_HEADROOM, False),  # comes after all of them
        ("quiet", HIGH, 0.05, True),  # comes before all of them
    ],
)
def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    adapter: str, priority: Priority, seconds: float, taken: bool
) -> None:
    clock = Clock()
    queue = scheduler(clock=clock)
    admit(queue, *pieces(*[10] * 100, adapter="hot"))
    terms = Terms(priority, clock.now + seconds)
    queue.check(adapter, 10, terms)  # nothing is known yet of the throughput
    queue.ran(100, 1.0)
    if taken:
        queue.admit([[Piece(10, adapter)]], terms)
        return
    with pytest.raises(Overloaded, match="until the request's deadline") as refused:
        queue.admit([[Piece(10, adapter)]], terms)
    assert refused.value.error_code == "deadline_unreachable"
    assert refused.value.retry_after == (1 if priority is HIGH else 10)


def test_what_is_past_its_deadline_is_taken_out() -> None:
    clock = Clock()
    queue = scheduler(clock=clock)
    late, later, never = Piece(1), Piece(2), Piece(3)
    admit(queue, later, deadline=clock.now + 2)
    admit(queue, late, deadline=clock.now + 1, priority=HIGH)
    admit(queue, never)
    assert queue.expire() == []
    clock.now += 1
    assert queue.expire() == [late]
    clock.now += 5
    assert queue.expire() == [later]
    assert batch(queue) == [never]
    assert queue.expire() == []


def test_what_would_be_late_is_not_run_either() -> None:
    clock = Clock()
    queue = scheduler(clock=clock)
    queue.ran(10, 1.0)
    admit(queue, hopeless := Piece(5), deadline=clock.now + 0.9)
    admit(queue, Piece(5, "b"), deadline=clock.now + 5)
    assert queue.expire() == [hopeless]


def test_what_nobody_waits_for_leaves_at_once() -> None:
    queue = scheduler(queue=20)
    units = admit(queue, Piece(8), Piece(8, "b"))
    admit(queue, kept := Piece(4, "c"))
    queue.discard(units)
    assert waiting(queue) == 4
    assert batch(queue) == [kept]
    queue.discard(units)  # harmless


# ---------------------------------------------------------------------------------------------------------- the model


WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.5, "d": 1.0}
LARGEST = 300


@given(
    sizes=st.lists(st.lists(st.integers(1, LARGEST), min_size=1, max_size=5), min_size=4, max_size=4),
    budget=st.integers(LARGEST, 3000),
    count=st.integers(1, 40),
)
def test_adapters_with_work_waiting_get_their_shares(sizes: list[list[int]], budget: int, count: int) -> None:
    """The bound of the module's description, after every batch; and what follows from it: a share in each round."""
    queue = scheduler(batch=budget, weight=WEIGHTS.__getitem__)
    texts = {adapter: cycle(own) for adapter, own in zip(WEIGHTS, sizes, strict=True)}
    largest = {adapter: max(own) for adapter, own in zip(WEIGHTS, sizes, strict=True)}
    got: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for _ in range(count):
        for adapter, own in texts.items():
            while left[adapter] <= budget:
                admit(queue, piece := Piece(next(own), adapter))
                left[adapter] += piece.tokens
        for piece in batch(queue):
            got[piece.adapter] += piece.tokens
            left[piece.adapter] -= piece.tokens
        for one, other in combinations(WEIGHTS, 2):
            ahead = got[one] / WEIGHTS[one] - got[other] / WEIGHTS[other]
            assert abs(ahead) <= 2 * QUANTUM + largest[one] / WEIGHTS[one] + largest[other] / WEIGHTS[other]
    one_round = sum(QUANTUM * weight + largest[adapter] for adapter, weight in WEIGHTS.items())
    rounds = sum(got.values()) // one_round
    for adapter, weight in WEIGHTS.items():
        assert got[adapter] >= rounds * QUANTUM * weight - largest[adapter]


@dataclass
class Waiting:
    """A text of a request, in the model."""

    unit: Unit[Piece]
    adapter: str
    priority: Priority
    tokens: int
    left: list[Piece]


class Machine(RuleBasedStateMachine):
    """Any sequence of requests, batches, deadlines and hang-ups, against lists that anybody understands."""

    BATCH = 600
    QUEUE = 5000
    AGING = 20.0

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = scheduler(
            batch=self.BATCH, queue=self.QUEUE, clock=self.clock, weight=WEIGHTS.__getitem__, aging=self.AGING
        )
        self.waiting: list[Waiting] = []  # the oldest first

    def tokens(self, *priorities: Priority) -> int:
        return sum(piece.tokens for one in self.waiting if one.priority in priorities for piece in one.left)

    @rule(
        target=requests,
        adapters=st.lists(st.sampled_from(sorted(WEIGHTS)), min_size=1, max_size=3, unique=True),
        sizes=st.lists(st.integers(1, LARGEST), min_size=1, max_size=8),
        priority=st.sampled_from(Priority),
        seconds=st.none() | st.integers(1, 30),
    )
    def admit(self, adapters: list[str], sizes: list[int], priority: Priority, seconds: int | None) -> object:
        terms = Terms(priority, None if seconds is None else self.clock.now + seconds)
        groups = [[Piece(size, adapter, priority=priority) for adapter in adapters] for size in sizes]
        ahead = self.tokens(*list(Priority)[: list(Priority).index(priority) + 1])
        try:
            units = self.queue.admit(groups, terms)
        except Overloaded:
            assert ahead, "an empty queue takes anything"
            return multiple()
        assert not ahead or ahead + len(adapters) * sum(sizes) <= self.QUEUE
        for unit, group in zip(units, groups, strict=True):
            self.waiting.append(Waiting(unit, adapters[0], priority, sum(piece.tokens for piece in group), list(group)))
        return units

    @rule(units=consumes(requests))
    def hang_up(self, units: list[Unit[Piece]]) -> None:
        self.queue.discard(units)
        self.waiting = [one for one in self.waiting if one.unit not in units]

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        late = [one for one in self.waiting if one.unit.terms.deadline is not None]
        late = [one for one in late if one.unit.terms.deadline <= self.clock.now]
        expected = {piece for one in late for piece in one.left}
        expired = self.queue.expire()
        assert len(expired) == len(expected)
        assert set(expired) == expected
        self.waiting = [one for one in self.waiting if one not in late]

    @rule()
    def run(self) -> None:
        before = list(self.waiting)
        aged = [one for one in before if self.clock.now - one.unit.admitted >= self.AGING]
        batch = self.queue.next_batch()
        if batch is None:
            assert not before
            return
        assert batch.tokens == sum(piece.tokens for piece in batch.work)
        assert batch.tokens <= self.BATCH
        assert len(batch.waits) == len(batch.work)
        self._in_order(batch.work)
        self._by_priority(batch, bool([one for one in aged if one.priority is not Priority.HIGH]))
        if aged:
            oldest = min(aged, key=lambda one: one.unit.admitted)
            assert any(piece.priority is oldest.priority for piece in batch.work)
        assert batch.backlog == bool(self.waiting)

    def _in_order(self, work: list[Piece]) -> None:
        """Texts are taken from the front of their first adapter's queue, and as a whole unless they are larger than a
        batch."""
        while work:
            one = next(one for one in self.waiting if work[0] in one.left)
            line = [other for other in self.waiting if other.priority is one.priority]
            assert next(other for other in line if other.adapter == one.adapter) is one
            taken = [piece for piece, left in zip(work, one.left, strict=False) if piece is left]
            assert work[: len(taken)] == one.left[: len(taken)] == taken
            work = work[len(taken) :]
            one.left = one.left[len(taken) :]
            if one.left:
                assert one.tokens > self.BATCH
            else:
                self.waiting.remove(one)

    def _by_priority(self, batch: Batch[Piece], aged: bool) -> None:
        """Where work of a priority is left, a lower one got only what was too little for it."""
        if aged:
            return
        order = list(Priority)
        for index, priority in enumerate(order):
            left = [sum(piece.tokens for piece in one.left) for one in self.waiting if one.priority is priority]
            lower = sum(piece.tokens for piece in batch.work if piece.priority in order[index + 1 :])
            if left and lower:
                assert batch.tokens - lower + max(left) > self.BATCH

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert self.queue.tokens == {priority: self.tokens(priority) for priority in Priority}
        there = list(self.queue.waiting())
        assert len(there) == len(set(there))
        assert set(there) == {piece for one in self.waiting for piece in one.left}
        assert (self.queue.pause() is None) == (not self.waiting)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=25)


def test_work_that_is_done_is_not_kept_until_its_deadline() -> None:
    """It holds texts, and the adapter's memory."""
    clock = Clock()
    queue = scheduler(clock=clock)
    done = []
    for number in range(2000):
        piece = Piece(1, name=str(number))
        done.append(weakref.ref(piece))
        queue.admit([[piece]], Terms(deadline=clock.now + 60))
        assert queue.next_batch() is not None
    del piece
    assert not any(reference() for reference in done)
    assert len(queue._deadlines) < 600
    late = Piece(1)
    queue.admit([[late]], Terms(deadline=clock.now + 1))
    clock.now += 2
    assert queue.expire() == [late]
