"""Work that is handed to threads together."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.together import LARGEST_TOGETHER, Together


def test_what_is_asked_for_at_once_goes_to_a_thread_together() -> None:
    async def scenario() -> None:
        handed = []

        class Counting(ThreadPoolExecutor):
            def submit(self, *args, **kwargs):
                handed.append(args)
                return super().submit(*args, **kwargs)

        with Counting(2) as pool:
            threads = Together(pool)
            assert await asyncio.gather(*(threads.call(lambda i=i: i * i) for i in range(10))) == [
                i * i for i in range(10)
            ]
            assert len(handed) == 1
            await asyncio.gather(*(threads.call(threading.get_ident, LARGEST_TOGETHER + 1) for _ in range(3)))
            assert len(handed) == 4, "large work lets nobody wait"

    asyncio.run(scenario())


def test_each_gets_its_own_outcome() -> None:
    async def scenario() -> None:
        def fail() -> None:
            raise KeyError("mine")

        with ThreadPoolExecutor(1) as pool:
            threads = Together(pool)
            first, second, third = await asyncio.gather(
                threads.call(lambda: 1), threads.call(fail), threads.call(lambda: 3), return_exceptions=True
            )
        assert (first, third) == (1, 3)
        assert isinstance(second, KeyError)

    asyncio.run(scenario())


class Panic(BaseException):
    """As libraries of other languages raise it."""


def test_what_is_no_exception_is_one_callers_alone() -> None:
    def panic() -> None:
        raise Panic

    def stop() -> None:
        raise StopIteration

    async def scenario() -> None:
        with ThreadPoolExecutor(1) as pool:
            threads = Together(pool)
            work = [lambda: 1, panic, stop, lambda: 4]
            first, second, third, fourth = await asyncio.wait_for(
                asyncio.gather(*map(threads.call, work), return_exceptions=True), 5
            )
        assert (first, fourth) == (1, 4)
        assert isinstance(second, Panic)
        assert isinstance(third, RuntimeError)

    asyncio.run(scenario())


def test_who_gives_up_takes_nobody_with_it() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            threads = Together(pool)
            quitter = asyncio.create_task(threads.call(gate.wait))
            other = asyncio.create_task(threads.call(lambda: "done"))
            await asyncio.sleep(0.01)
            quitter.cancel()
            gate.set()
            assert await other == "done"
            with pytest.raises(asyncio.CancelledError):
                await quitter

    asyncio.run(scenario())


def test_nobody_waits_for_ever_for_threads_that_have_ended() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        pool = ThreadPoolExecutor(1)
        threads = Together(pool)
        running = asyncio.create_task(threads.call(gate.wait))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(threads.call(lambda: None))
        await asyncio.sleep(0.01)
        pool.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 5)
        gate.set()
        assert await running is True
        with pytest.raises(RuntimeError, match="shutdown"):
            await threads.call(lambda: None)

    asyncio.run(scenario())
