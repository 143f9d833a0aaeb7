"""Blocking calls away from the event loop, one at a time per key."""

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Callers that ask for the same key while a call is running share its outcome."""

    def __init__(self, executor: Executor) -> None:
        """`executor` runs the calls."""
        self._executor = executor
        self._running: dict[Hashable, asyncio.Future[T]] = {}

    async def call(self, key: Hashable, function: Callable[[], T]) -> T:
        """The outcome of `function`, or of a call for `key` that is already on its way."""
        running = self._running.get(key)
        if running is None:
            running = asyncio.get_running_loop().run_in_executor(self._executor, function)
            self._running[key] = running
            running.add_done_callback(partial(self._forget, key))
        # shielded, since a caller that gives up must not take the others' answer with it
        return await asyncio.shield(running)

    def _forget(self, key: Hashable, ended: asyncio.Future[T]) -> None:
        del self._running[key]
        if not ended.cancelled():
            ended.exception()  # marks it as seen, in case every caller has given up
