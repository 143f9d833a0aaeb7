"""What is written in one turn of the event loop leaves in one piece."""

import asyncio
from collections.abc import Iterable

from server.wire import GATHERED_BYTES, Gathering


class Transport(asyncio.Transport):
    """Notes what it is given to send, piece by piece."""

    def __init__(self) -> None:
        super().__init__(extra={"peername": ("127.0.0.1", 1)})
        self.sent: list[bytes] = []
        self.closed = False

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        assert not self.closed
        self.sent.append(b"".join(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def test_each_turn_sends_one_piece() -> None:
    async def scenario() -> None:
        transport = Transport()
        gathering = Gathering(transport)
        for turn in (b"one", b"two"):
            gathering.write(b"head ")
            gathering.write(turn)
            assert turn not in b"".join(transport.sent)
            await asyncio.sleep(0)
        assert transport.sent == [b"head one", b"head two"]

    asyncio.run(scenario())


def test_much_is_sent_at_once() -> None:
    async def scenario() -> None:
        transport = Transport()
        Gathering(transport).write(bytes(GATHERED_BYTES + 1))
        assert [len(one) for one in transport.sent] == [GATHERED_BYTES + 1]

    asyncio.run(scenario())


def test_what_waits_is_sent_before_the_end() -> None:
    async def scenario() -> None:
        transport = Transport()
        gathering = Gathering(transport)
        gathering.write(b"last")
        gathering.close()
        assert (transport.sent, transport.closed) == ([b"last"], True)
        await asyncio.sleep(0)
        assert transport.sent == [b"last"]

    asyncio.run(scenario())


def test_nothing_is_sent_to_who_has_gone() -> None:
    async def scenario() -> None:
        transport = Transport()
        gathering = Gathering(transport)
        gathering.write(b"too late")
        transport.close()
        await asyncio.sleep(0)
        assert transport.sent == []

    asyncio.run(scenario())


def test_the_rest_is_the_transports() -> None:
    assert Gathering(Transport()).get_extra_info("peername") == ("127.0.0.1", 1)
