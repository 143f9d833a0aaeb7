"""Pinned adapters: what is pinned stays pinned while the list is read again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.engine.pins import Pins
from server.errors import OverBudget, StoreUnavailable
from server.metrics import Metrics

SIZE = 100


class Server:
    """Stands for the store's list, the catalog and the memory behind the pins."""

    device_budget = 1000

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.failing: set[str] = set()
        self.history: list[set[str]] = []
        self.waits = asyncio.Event()
        self.waits.set()
        part: Any = self
        self.pinning = Pins(part, part, part, Metrics(), poll_seconds=1)

    async def pins(self) -> list[str]:
        listed = sorted(self.names)
        await self.waits.wait()
        return listed

    async def pin_name(self, name: str) -> None:
        self.names.append(name)

    async def unpin(self, name: str) -> None:
        self.names.remove(name)

    async def current(self, name: str) -> Any:
        await asyncio.sleep(0)
        if name in self.failing:
            raise StoreUnavailable("gone")
        return type("Release", (), {"versions": (f"v-{name}",)})()

    serving = current

    @asynccontextmanager
    async def lease(self, name: str, version: str) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        yield

    def nbytes(self, version: str) -> int:
        return SIZE

    def pin(self, what: Any) -> Any:
        """The memory's if it is given versions, the store's for a name."""
        if isinstance(what, str):
            return self.pin_name(what)
        self.history.append(set(what))
        return None


def test_what_is_pinned_stays_so_while_the_list_is_read_again() -> None:
    async def run() -> None:
        server = Server("a", "b", "c")
        await server.pinning.refresh()
        assert server.history[-1] == {"v-a", "v-b", "v-c"}
        server.history.clear()
        await server.pinning.refresh()
        assert server.history
        assert all(step == {"v-a", "v-b", "v-c"} for step in server.history)
        server.names.remove("b")
        await server.pinning.refresh()
        assert server.history[-1] == {"v-a", "v-c"}
        assert [name in server.pinning for name in "abc"] == [True, False, True]

    asyncio.run(run())


def test_one_that_fails_is_left_out_and_comes_back() -> None:
    async def run() -> None:
        server = Server("a", "b")
        server.failing.add("a")
        await server.pinning.refresh()
        assert server.history[-1] == {"v-b"}
        server.failing.clear()
        await server.pinning.refresh()
        assert server.history[-1] == {"v-a", "v-b"}

    asyncio.run(run())


def test_a_pin_is_not_undone_by_a_list_that_was_read_before_it() -> None:
    async def run() -> None:
        server = Server()
        server.waits.clear()
        following = asyncio.create_task(server.pinning.refresh())
        await asyncio.sleep(0)
        pinning = asyncio.create_task(server.pinning.pin("a"))
        await asyncio.sleep(0)
        server.waits.set()
        await asyncio.gather(following, pinning)
        assert "a" in server.pinning
        assert server.history[-1] == {"v-a"}

    asyncio.run(run())


def test_no_more_is_pinned_than_leaves_room_for_others() -> None:
    async def run() -> None:
        server = Server()
        outcomes = await asyncio.gather(*(server.pinning.pin(name) for name in "abcdefghij"), return_exceptions=True)
        assert sum(outcome is None for outcome in outcomes) == 7  # of ten that would fit
        assert all(isinstance(outcome, OverBudget) for outcome in outcomes if outcome is not None)
        assert len(server.names) == len(server.history[-1]) == 7
        with pytest.raises(OverBudget, match="75%"):
            await server.pinning.pin("z")
        await server.pinning.unpin(server.names[0])
        await server.pinning.pin("z")

    asyncio.run(run())
