"""What is written in one turn of the event loop leaves in one piece."""

import asyncio
from collections.abc import Callable, Iterable

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


def sent(*turns: Callable[[Gathering, Transport], None]) -> list[bytes]:
    """What has been sent after so many turns of an event loop."""

    async def run() -> list[bytes]:
        transport = Transport()
        gathering = Gathering(transport)
        for turn in turns:
            turn(gathering, transport)
            await asyncio.sleep(0)
        return transport.sent

    return asyncio.run(run())


def test_each_turn_sends_one_piece() -> None:
    def answer(gathering: Gathering, transport: Transport) -> None:
        before = len(transport.sent)
        gathering.write(b"head ")
        gathering.write(b"body")
        assert len(transport.sent) == before

    assert sent(answer, answer) == [b"head body", b"head body"]


def test_much_is_sent_at_once() -> None:
    def answer(gathering: Gathering, transport: Transport) -> None:
        gathering.write(bytes(GATHERED_BYTES + 1))
        assert transport.sent

    assert list(map(len, sent(answer))) == [GATHERED_BYTES + 1]


def test_what_waits_is_sent_before_the_end() -> None:
    def end(gathering: Gathering, transport: Transport) -> None:
        gathering.write(b"last")
        gathering.close()
        assert transport.closed

    assert sent(end) == [b"last"]


def test_nothing_is_sent_to_who_has_gone() -> None:
    def leave(gathering: Gathering, transport: Transport) -> None:
        gathering.write(b"too late")
        transport.close()

    assert sent(leave) == []


def test_the_rest_is_the_transports() -> None:
    assert Gathering(Transport()).get_extra_info("peername") == ("127.0.0.1", 1)
