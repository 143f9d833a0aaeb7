"""Work that several callers want is done once."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Once(Generic[K, T]):
    """Callers that ask for the same key while work for it is under way share its outcome."""

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[T]] = {}

    def __iter__(self) -> Iterator[K]:
        """Keys for which work is under way."""
        return iter(self._running)

    def start(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """The task that does `work`, or one for `key` that is under way. Shield it before giving up on it."""
        running = self._running.get(key)
        if running is None:
            running = asyncio.get_running_loop().create_task(work())
            self._running[key] = running
            running.add_done_callback(partial(self._forget, key))
        return running

    async def call(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The outcome. A caller that gives up takes nobody else's with it."""
        return await asyncio.shield(self.start(key, work))

    def _forget(self, key: K, ended: asyncio.Task[T]) -> None:
        del self._running[key]
        if not ended.cancelled():
            ended.exception()  # marks it as seen, in case every caller has given up
