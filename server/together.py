"""Work for threads, handed over together.

To hand a piece of work to a thread and its outcome back costs more than most of what is read or computed for an
adapter: both sides wait for Python's lock, and the processor for its caches. What is asked for at the same time, when a
batch of answers has gone out, goes there in one go, and comes back so.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

LARGEST_TOGETHER = 1024 * 1024
"""Bytes that a piece of work is about for it to go with others; more lets nobody wait for it."""

Work = tuple[Callable[[], Any], asyncio.Future[Any]]


def outcome(function: Callable[[], T]) -> tuple[T, None] | tuple[None, BaseException]:
    """What a function returns, or what it raises."""
    try:
        return function(), None
    except BaseException as error:  # whatever it is, it is its caller's alone
        return None, error


class Together:
    """The threads of an executor, as event loops use them."""

    def __init__(self, executor: Executor) -> None:
        """The executor stays the caller's."""
        self._executor = executor
        self._waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Work]] = WeakKeyDictionary()

    async def call(self, function: Callable[[], T], size: int = 0) -> T:
        """Does something quick on a thread, or something with so many bytes.

        What is asked for in the same turn of the event loop is done one after the other, and the outcomes come when the
        last of it is done.
        """
        loop = asyncio.get_running_loop()
        if size > LARGEST_TOGETHER:
            return await loop.run_in_executor(self._executor, function)
        waiting = self._waiting.setdefault(loop, [])
        outcome: asyncio.Future[T] = loop.create_future()
        waiting.append((function, outcome))
        if len(waiting) == 1:
            loop.call_soon(self._start, loop)
        return await outcome

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        work = deque(self._waiting.pop(loop))
        try:
            handed = self._executor.submit(_work, loop, work)
        except RuntimeError as error:  # the executor has been shut down
            _settle([(outcome, None, error) for _, outcome in work])
        else:
            handed.add_done_callback(partial(_end, loop, work))


def _work(loop: asyncio.AbstractEventLoop, work: deque[Work]) -> None:
    done = []
    while work:
        function, future = work.popleft()
        if not future.cancelled():
            done.append((future, *outcome(function)))
    with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, done)


def _end(loop: asyncio.AbstractEventLoop, work: deque[Work], handed: Future[None]) -> None:
    """Of work that has been handed over: what has not been begun never will, where the executor was shut down."""
    for _, outcome in work:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(outcome.cancel)


def _settle(done: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, value, error in done:
        if future.done():  # nobody waits any more
            continue
        if error is None:
            future.set_result(value)
        elif isinstance(error, StopIteration):  # which no future takes
            future.set_exception(RuntimeError(f"StopIteration was raised: {error}"))
        else:
            future.set_exception(error)
