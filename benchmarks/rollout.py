"""Rolling updates of two servers behind a proxy under load: how many requests do they cost?

    python -m benchmarks.rollout --json

Two servers over one store, and Caddy with the files of deploy/proxy in front of them. While clients ask, each server
is replaced by a new one, `--rollouts` times, in the order in which Kubernetes does it (`maxSurge: 1`,
`maxUnavailable: 0`): the new one starts; when a probe of its /readyz succeeds it is made known; then the old one is
told to go. How the proxy learns of it differs, and both ways are rehearsed:

`endpoints`  deploy/proxy/kubernetes.Caddyfile: the proxy asks DNS for the pods of a headless Service every second. What
             a name server here answers changes `--propagation-seconds` after a pod has become ready or was told to go.
             At the moment when it is told, its preStop pause begins, `--prestop-seconds`; then it gets SIGTERM.
`health`     deploy/proxy/Caddyfile: the proxy knows all addresses and asks /readyz every second. The old server gets
             SIGTERM at once, and ADAPTERD_SHUTDOWN_DELAY_SECONDS is `--delay-seconds`.

Clients keep their connections to the proxy, never ask twice, and send about `--load` (0.3) of what both servers answer
when they are saturated: the machine has to start servers beside. The proxy repeats a request only where it could not
connect.

`failed`     requests that were not answered with 200. `wrong`: answered for another adapter, by a version that is not
             the adapter's, or with other labels. `failed_before` and `wrong_before`: of those before the rollouts.
`p99_ms`     of requests during the rollouts; `calm_p99_ms`, of those before, at the same rate.
"""

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count, cycle
from pathlib import Path
from typing import Any

import uvloop
from transformers.utils import logging

from benchmarks.proxy import SERVICE, Endpoints, Proxy, proxy, routed_request
from benchmarks.scale import Answers, make_store, zipf
from benchmarks.serving import (
    HOST,
    Clients,
    Server,
    free_port,
    make_texts,
    percentile_ms,
    print_report,
    say,
)

SERVERS = 2
TEXTS = 64
PROBE_SECONDS = 2.0
"""Between two probes, as deploy/kubernetes/base has it."""
CALIBRATION_SECONDS = 3.0
LONGEST_SECONDS = 3600.0


class Fleet(ABC):
    """The servers, and the means by which the proxy learns of them."""

    def __init__(self, store: Path, log: Path, options: argparse.Namespace) -> None:
        self.log = log
        self.options = options
        self.servers: list[Server] = []
        self._store = store
        self._over = False

    def replace(self) -> None:
        """A new server for each, one after the other."""
        for old in list(self.servers):
            new = self.start()
            self.wait_ready(new)
            self.servers.remove(old)
            self.end(old)

    @abstractmethod
    def start(self) -> Server:
        """One more server."""

    @abstractmethod
    def wait_ready(self, server: Server) -> None:
        """Until the proxy may know of it."""

    @abstractmethod
    def end(self, server: Server) -> None:
        """Tells a server to go, and returns when it is gone."""

    @abstractmethod
    def behind(self) -> AbstractContextManager[Proxy]:
        """The proxy in front, with servers that are ready; all gone at the end."""

    def stop(self) -> None:
        """Ends all at once, and no more begin."""
        self._over = True
        for server in self.servers:
            server.kill()

    def _begin(self, **settings: Any) -> Server:
        if self._over:
            raise RuntimeError("the rehearsal is over")
        server = Server(self._store, self.log, log_level="warning", **settings)
        self.servers.append(server)
        return server


class Pods(Fleet):
    """As in a cluster: addresses of their own, and the same port."""

    def __init__(self, store: Path, log: Path, options: argparse.Namespace) -> None:
        super().__init__(store, log, options)
        self._port = free_port()
        self._numbers = count(2)
        self._endpoints = Endpoints()
        self._choices = random.Random(0)

    def start(self) -> Server:
        """One more pod."""
        return self._begin(host=f"127.0.0.{next(self._numbers)}", port=self._port)

    def wait_ready(self, server: Server) -> None:
        """Until a probe succeeds, and the news is around."""
        server.wait_ready(self._choices.uniform(0, PROBE_SECONDS))
        time.sleep(self.options.propagation_seconds)
        self._endpoints.add(server.host)

    def end(self, server: Server) -> None:
        """preStop and the news that it goes begin at the same moment."""
        news = threading.Timer(self.options.propagation_seconds, self._endpoints.remove, [server.host])
        news.start()
        time.sleep(self.options.prestop_seconds)
        server.stop()
        news.join()

    @contextmanager
    def behind(self) -> Iterator[Proxy]:
        """With a name server."""
        with ExitStack() as stack:
            stack.callback(self.stop)
            names = stack.enter_context(self._endpoints.served())
            for _ in range(SERVERS):
                self.start()
            for server in self.servers:
                server.wait_ready()
                self._endpoints.add(server.host)
            variables = {
                "ADAPTERD_SERVICE": SERVICE,
                "ADAPTERD_PORT": str(self._port),
                "DNS_RESOLVERS": f"resolvers {names}",
            }
            yield stack.enter_context(proxy("kubernetes.Caddyfile", self.log.with_name("endpoints"), **variables))


class Hosts(Fleet):
    """As without a cluster: addresses that are known before, one of which is free for the next server."""

    def __init__(self, store: Path, log: Path, options: argparse.Namespace) -> None:
        super().__init__(store, log, options)
        self._ports = [free_port() for _ in range(SERVERS + 1)]

    def start(self) -> Server:
        """One more, on the address that is free."""
        taken = {server.port for server in self.servers}
        port = next(port for port in self._ports if port not in taken)
        return self._begin(port=port, shutdown_delay_seconds=self.options.delay_seconds)

    def wait_ready(self, server: Server) -> None:
        """Until it is ready, and the proxy has seen that."""
        server.wait_ready()
        time.sleep(PROBE_SECONDS)

    def end(self, server: Server) -> None:
        """SIGTERM at once: only the server itself says that it goes."""
        server.stop()

    @contextmanager
    def behind(self) -> Iterator[Proxy]:
        """With all addresses."""
        with ExitStack() as stack:
            stack.callback(self.stop)
            for _ in range(SERVERS):
                self.start()
            for server in self.servers:
                server.wait_ready()
            addresses = " ".join(f"{HOST}:{port}" for port in self._ports)
            yield stack.enter_context(proxy("Caddyfile", self.log.with_name("health"), ADAPTERD_SERVERS=addresses))


WAYS: dict[str, type[Fleet]] = {"endpoints": Pods, "health": Hosts}


async def rehearse(fleet: Fleet, versions: dict[str, str], rollouts: int) -> dict[str, Any]:
    """The figures of one way."""
    options = fleet.options
    checker, earlier = Answers(versions), Answers(versions)
    texts = cycle([json.dumps(text).encode() for text in make_texts(TEXTS)])
    names = zipf(list(versions), seed=1)
    numbers = count()

    def draw() -> tuple[str, bytes]:
        name = next(names)
        return name, routed_request(name, next(texts), next(numbers))

    with fleet.behind() as front:
        clients = Clients(front.port, options.clients, draw)
        saturated = [await clients.run(CALIBRATION_SECONDS) for _ in range(2)]
        rate = options.load * saturated[-1].throughput
        calm = await clients.run(options.calm_seconds, rate)
        for before in (*saturated, calm):
            earlier.check(before.answers)
        updated = asyncio.get_running_loop().run_in_executor(None, _times, fleet, rollouts)
        updated.add_done_callback(lambda _: clients.stop())
        during = await clients.run(LONGEST_SECONDS, rate)
        await updated
    checker.check(during.answers)
    statuses = Counter(answer.status for answer in during.answers if answer.status != 200)
    return {
        "rollouts": rollouts,
        "replaced": rollouts * SERVERS,
        "seconds": during.seconds,
        "requests": checker.requests,
        "failed": checker.failed,
        "failed_by_status": {str(status): number for status, number in sorted(statuses.items())},
        "wrong": checker.wrong,
        "failed_before": earlier.failed,
        "wrong_before": earlier.wrong,
        "requests_per_second": during.throughput,
        "p50_ms": percentile_ms(during.answers, 50),
        "p99_ms": percentile_ms(during.answers, 99),
        "calm_p50_ms": percentile_ms(calm.answers, 50),
        "calm_p99_ms": percentile_ms(calm.answers, 99),
    }


def _times(fleet: Fleet, rollouts: int) -> None:
    for number in range(rollouts):
        fleet.replace()
        say(f"rollout {number + 1} of {rollouts}")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    store = folder / "store"
    versions = asyncio.run(make_store(store, options.adapters))
    figures = {}
    for way in options.ways:
        say(way)
        fleet = WAYS[way](store, folder / "log", options)
        figures[way] = uvloop.run(rehearse(fleet, versions, options.rollouts))
    return {
        "failed": sum(one["failed"] for one in figures.values()),
        "wrong": sum(one["wrong"] for one in figures.values()),
        "servers": SERVERS,
        "clients": options.clients,
        **figures,
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rollouts", type=int, default=10, help="in each way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--load", type=float, default=0.3, help="share of what both servers answer when saturated")
    parser.add_argument("--calm-seconds", type=float, default=5.0, help="before the rollouts, to compare with")
    parser.add_argument("--prestop-seconds", type=float, default=3.0)
    parser.add_argument("--propagation-seconds", type=float, default=1.0)
    parser.add_argument("--delay-seconds", type=float, default=3.5)
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), options)
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
