"""A server of S3's protocol, in this process, that can be told which requests go wrong, and how. Tests use it too."""

import io
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from unittest import mock
from urllib.parse import parse_qs
from uuid import uuid4

import httpx
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}

SLOW_SECONDS = 0.2
DRIP_SECONDS = 0.05


class Fault(StrEnum):
    """What becomes of a request."""

    HANG = "hang"
    """No answer until it is healed; then the right one."""
    STALL = "stall"
    """The answer begins, and goes on when it is healed."""
    DRIP = "drip"
    """The answer comes a byte at a time, never silent for long; the rest of it when it is healed."""
    SLOW = "slow"
    REFUSE = "refuse"
    """Status 500."""
    RESET = "reset"
    """The connection ends before anything was done."""
    CORRUPT = "corrupt"
    """A byte of the answer is another one."""
    SHORTEN = "shorten"
    """The answer is half of what it should be, and says so: as if half a file was stored."""
    TRUNCATE = "truncate"
    """The connection ends in the middle of the answer."""
    LOSE = "lose"
    """It is done, and the connection ends before the answer."""


@dataclass
class Rule:
    """Which requests go wrong."""

    pattern: re.Pattern[str]
    """Of `METHOD key`, from the start; the key of a listing is its prefix."""
    fault: Fault
    times: int | None
    """How often; None for always."""
    healed: threading.Event = field(default_factory=threading.Event)


class FaultyS3:
    """moto's S3 behind a door. Objects of a bucket are created atomically, as S3 does it and moto does not promise."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._turn = threading.Lock()
        self._rules: list[Rule] = []
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.injected: Counter[str] = Counter()
        """Fault -> how many requests had it."""
        self.seen: Counter[str] = Counter()
        """`METHOD key` -> how many such requests came."""
        self.arrived = threading.Condition()
        """Notified of every request."""

    def start(self) -> None:
        """From here on it answers."""
        self._thread.start()

    def stop(self) -> None:
        """Answers what hangs, and no more."""
        self.heal()
        self._server.shutdown()
        self._thread.join()

    def bucket(self) -> str:
        """The URL of a new, empty bucket as a store takes it."""
        name = f"bucket-{uuid4().hex[:12]}"
        httpx.put(f"{self.url}/{name}").raise_for_status()
        return f"s3://{name}"

    def fail(self, pattern: str, fault: Fault, times: int | None = None) -> None:
        """From here on, requests whose `METHOD key` starts with the pattern go wrong; the first that fits counts."""
        self._rules.append(Rule(re.compile(pattern), fault, times))

    @contextmanager
    def failing(self, pattern: str, fault: Fault) -> Iterator[None]:
        """`fail`, and `heal` in the end."""
        self.fail(pattern, fault)
        try:
            yield
        finally:
            self.heal()

    def heal(self) -> None:
        """From here on, nothing goes wrong any more."""
        rules, self._rules = self._rules, []
        for rule in rules:
            rule.healed.set()

    def requests(self, pattern: str) -> dict[str, int]:
        """How many requests came, of each kind that matches."""
        return {request: count for request, count in list(self.seen.items()) if re.match(pattern, request)}

    def wait_for(self, pattern: str, count: int) -> None:
        """Until so many different requests have come."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests(pattern)) >= count, 60)

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # All of it before anything goes wrong, so that nobody waits for somebody who has gone away.
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        rule = self._rule(_request(environ))
        fault = rule.fault if rule else None
        if rule is not None and fault is Fault.HANG:
            rule.healed.wait()
        if fault is Fault.SLOW:
            time.sleep(SLOW_SECONDS)
        if fault is Fault.RESET:
            raise _hang_up(environ)
        if fault is Fault.REFUSE:
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        with self._turn:
            chunks, status, headers = run_wsgi_app(self._moto, environ)
            answer = b"".join(chunks)
        if fault is Fault.LOSE:
            raise _hang_up(environ)
        if fault is Fault.CORRUPT:
            answer = answer[:1] + bytes([answer[1] ^ 1]) + answer[2:]
        if fault is Fault.SHORTEN:
            answer = answer[: len(answer) // 2]
            headers["Content-Length"] = str(len(answer))
        start_response(status, list(headers))
        if rule is not None and fault is Fault.STALL:
            return _stalled(answer, rule.healed)
        if rule is not None and fault is Fault.DRIP:
            return _dripping(answer, rule.healed)
        return _broken_off(answer) if fault is Fault.TRUNCATE else [answer]

    def _rule(self, request: str) -> Rule | None:
        with self.arrived:
            self.seen[request] += 1
            rule = next((rule for rule in self._rules if rule.pattern.match(request) and rule.times != 0), None)
            if rule is not None:
                self.injected[rule.fault.value] += 1
            if rule is not None and rule.times is not None:
                rule.times -= 1
            self.arrived.notify_all()
        return rule


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    """The server, running, with credentials for it in the environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with mock.patch.dict(os.environ, clean | CREDENTIALS, clear=True):
        server = FaultyS3()
        server.start()
        try:
            yield server
        finally:
            server.stop()


class _Quiet(MotoRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def _request(environ: dict[str, Any]) -> str:
    """`METHOD key`, without the bucket."""
    _, _, key = str(environ["PATH_INFO"]).strip("/").partition("/")
    prefixes = parse_qs(str(environ["QUERY_STRING"])).get("prefix", [""])
    return f"{environ['REQUEST_METHOD']} {key or prefixes[0]}"


def _hang_up(environ: dict[str, Any]) -> ConnectionError:
    """What to raise so that the connection ends at once."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return ConnectionResetError("on purpose")


def _broken_off(answer: bytes) -> Iterator[bytes]:
    yield answer[: len(answer) // 2]
    raise ConnectionResetError("on purpose")


def _stalled(answer: bytes, healed: threading.Event) -> Iterator[bytes]:
    yield answer[: len(answer) // 2]
    healed.wait()
    yield answer[len(answer) // 2 :]


def _dripping(answer: bytes, healed: threading.Event) -> Iterator[bytes]:
    for at in range(len(answer)):
        if healed.wait(DRIP_SECONDS):
            yield answer[at:]
            return
        yield answer[at : at + 1]
