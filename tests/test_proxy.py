"""Servers behind a real proxy, with the files of deploy/proxy: nobody notices that one goes, or only those who were
being answered when it was killed."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import children
import httpx
import kubernetes_validate
import pytest
import yaml
from helpers import LABELS, make_artifact, make_blueprint, random_tensors

from benchmarks.proxy import FILES, ROUTING_HEADER, SERVICE, Endpoints, Proxy, caddy, proxy
from benchmarks.serving import free_port
from server.backbone.backbone import Backbone
from server.settings import Settings

ADAPTERS = tuple(f"adapter-{number}" for number in range(12))
CLIENTS = 4
ENOUGH = 40
"""Answers between two events."""


class Place(NamedTuple):
    """Where servers find what they need."""

    folder: Path
    backbone: str

    @property
    def store(self) -> str:
        return str(self.folder / "store")


@pytest.fixture(scope="module")
def place(bert: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A store with adapters that have labels of their own."""
    folder = tmp_path_factory.mktemp("place")
    made = Place(folder, children.save_tiny_bert(folder / "backbone"))
    with children.serving(folder, made.store, made.backbone) as server:
        for seed, name in enumerate(ADAPTERS):
            blueprint = make_blueprint(bert.spec, "lora", {"r": 2}, labels=[f"{name}-{label}" for label in LABELS])
            artifact = make_artifact(blueprint, random_tensors(blueprint, seed, bert))
            files = [("manifest.json", artifact.manifest_bytes), ("adapter.safetensors", artifact.tensor_bytes)]
            answer = server.client.put(f"/admin/adapters/{name}", files=[("files", file) for file in files])
            assert answer.status_code == 201, answer.text
    return made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, place: Place, folder: Path, number: int = 1, **settings: Any) -> list[children.Server]:
    """Servers that are ready; they begin side by side."""
    servers = [
        stack.enter_context(
            children.serving(Path(tempfile.mkdtemp(dir=folder)), place.store, place.backbone, **settings)
        )
        for _ in range(number)
    ]
    for server in servers:
        assert server.client.get("/readyz").status_code == 200
    return servers


def address(server: children.Server) -> str:
    return str(server.client.base_url).removeprefix("http://")


def hosts(stack: ExitStack, servers: list[children.Server], folder: Path) -> Proxy:
    """The proxy that knows all addresses."""
    addresses = " ".join(map(address, servers))
    return stack.enter_context(proxy("Caddyfile", folder / "proxy", ADAPTERD_SERVERS=addresses))


@dataclass
class Load:
    """Clients that ask, each when it has its answer, on connections that they keep; nothing is asked twice."""

    port: int
    asked: dict[int, str] = field(default_factory=dict)
    """The adapter, by the request's number."""
    answered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    failed: dict[int, str] = field(default_factory=dict)
    """By the request's number."""
    wrong: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _over: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """For some more answers."""
        for _ in range(ENOUGH):
            assert self.answered.acquire(timeout=60)

    @contextmanager
    def on(self) -> Iterator["Load"]:
        """They ask from here on; at the end all are answered."""
        clients = [threading.Thread(target=self._client, args=[number], daemon=True) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            self.wait()
            yield self
            self.wait()
        finally:
            self._over.set()
            for client in clients:
                client.join(60)
        assert self.wrong == []

    def _client(self, first: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
            turn = first
            while not self._over.is_set():
                turn += 1
                self._ask(client, ADAPTERS[turn % len(ADAPTERS)])

    def _ask(self, client: httpx.Client, name: str) -> None:
        number = next(self._numbers)
        self.asked[number] = name
        headers = {ROUTING_HEADER: name, "X-Request-ID": str(number)}
        try:
            answer = client.post("/classify", json={"adapter": name, "inputs": "w1 w2"}, headers=headers)
        except httpx.TransportError as error:
            self.failed[number] = repr(error)
            return
        if answer.status_code != 200:
            self.failed[number] = f"{answer.status_code} {answer.text}"
            return
        body = answer.json()
        labels = {one["label"] for one in body["predictions"][0]}
        if body["adapter"] != name or labels != {f"{name}-{label}" for label in LABELS}:
            self.wrong.append(answer.text)
        self.answered.release()


def end(server: children.Server, sign: signal.Signals) -> None:
    assert server.process.pid is not None
    os.kill(server.process.pid, sign)


def test_a_rolling_update_in_a_cluster_fails_nobody(place: Place, stack: ExitStack, tmp_path: Path) -> None:
    """A pod is replaced by a new one; that the old one goes the proxy hears from DNS while it serves on."""
    endpoints, port = Endpoints(), free_port()
    names = stack.enter_context(endpoints.served())
    pods: list[tuple[str, children.Server]] = []

    def add(host: str) -> None:
        [pod] = start(stack, place, tmp_path, host=host, port=port, shutdown_delay_seconds="1.5")
        pods.append((host, pod))
        endpoints.add(host)

    for host in ("127.0.0.2", "127.0.0.3"):
        add(host)
    variables = {"ADAPTERD_SERVICE": SERVICE, "ADAPTERD_PORT": str(port), "DNS_RESOLVERS": f"resolvers {names}"}
    front = stack.enter_context(proxy("kubernetes.Caddyfile", tmp_path / "proxy", **variables))
    with Load(front.port).on() as load:
        add("127.0.0.4")
        leaving, old = pods[0]
        endpoints.remove(leaving)
        endpoints.wait_until_asked()  # the preStop pause, for as long as it has to be
        end(old, signal.SIGTERM)
        load.wait()
        old.process.join(60)
    assert load.failed == {}
    asked = set(front.upstreams().values())
    assert asked == {f"127.0.0.{number}:{port}" for number in (2, 3, 4)}


def test_a_server_that_says_that_it_goes_is_left_before_it_refuses(
    place: Place, stack: ExitStack, tmp_path: Path
) -> None:
    servers = start(stack, place, tmp_path, 2, shutdown_delay_seconds="60", shutdown_grace_seconds="60")
    front = hosts(stack, servers, tmp_path)
    leaving = address(servers[0])
    with Load(front.port).on() as load:
        end(servers[0], signal.SIGTERM)
        seen = -1
        while (now := sum(upstream == leaving for upstream in front.upstreams().values())) != seen:
            seen = now
            for _ in range(3):  # 120 answers, of which it would have given half
                load.wait()
        assert servers[0].process.is_alive()  # it was left, and has not gone by itself
        servers[0].kill()
    assert load.failed == {}
    assert seen > 0


def test_a_killed_server_costs_what_it_was_answering(place: Place, stack: ExitStack, tmp_path: Path) -> None:
    servers = start(stack, place, tmp_path, 3)
    front = hosts(stack, servers, tmp_path)
    with Load(front.port).on() as load:
        victim = address(servers[0])
        end(servers[0], signal.SIGKILL)
        servers[0].process.join(60)
        dead = len(load.asked)
        load.wait()
        load.wait()
    upstreams = front.upstreams()
    moved = {load.asked[number] for number, upstream in upstreams.items() if number <= dead and upstream == victim}
    assert moved
    assert {upstreams[number] for number in load.failed} <= {victim}
    assert len(load.failed) <= 2 * CLIENTS  # under way, or sent before the proxy saw the connections end
    assert all(failure.startswith("502") for failure in load.failed.values())
    late = {number: name for number, name in load.asked.items() if number > max([dead, *load.failed])}
    assert moved <= set(late.values())


def test_an_adapter_has_its_server_and_who_names_none_asks_all(place: Place, stack: ExitStack, tmp_path: Path) -> None:
    servers = start(stack, place, tmp_path, 2)
    front = hosts(stack, servers, tmp_path)
    numbers = count(1)
    with httpx.Client(base_url=f"http://127.0.0.1:{front.port}", timeout=60) as client:

        def ask(name: str, headers: dict[str, str]) -> str:
            number = next(numbers)
            answer = client.post(
                "/classify",
                json={"adapter": name, "inputs": "w1"},
                headers=headers | {"X-Request-ID": str(number)},
            )
            assert answer.status_code == 200
            return str(number)

        named = {name: [ask(name, {ROUTING_HEADER: name}) for _ in range(4)] for name in ADAPTERS}
        unnamed = [ask(ADAPTERS[0], {}) for _ in range(4)]
    upstreams = front.upstreams()
    owners = {name: {upstreams[int(number)] for number in asked} for name, asked in named.items()}
    assert all(len(own) == 1 for own in owners.values())
    assert {upstreams[int(number)] for number in unnamed} == set(map(address, servers))


def test_a_connection_without_requests_is_kept_as_long_as_the_setting_says(
    place: Place, stack: ExitStack, tmp_path: Path
) -> None:
    [server] = start(stack, place, tmp_path, keep_alive_seconds="1")
    host, _, port = address(server).partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # less than the default
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: any\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        while connection.recv(4096):
            pass


def test_the_proxy_in_a_cluster_finds_the_pods() -> None:
    service = yaml.safe_load((FILES / "service.yaml").read_text())
    kubernetes_validate.validate(service, "1.30", strict=True)
    deployment = yaml.safe_load((FILES.parent / "kubernetes" / "base" / "deployment.yaml").read_text())
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    [port] = [port for port in container["ports"] if port["name"] == "http"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["ports"] == [
        {"name": port["name"], "port": port["containerPort"], "targetPort": port["name"]}
    ]
    assert SERVICE.partition(".")[0] == service["metadata"]["name"]
    assert (
        f"{{$ADAPTERD_SERVICE:{SERVICE}}} {{$ADAPTERD_PORT:{port['containerPort']}}}"
        in (FILES / "kubernetes.Caddyfile").read_text()
    )


@pytest.mark.parametrize("file", ["Caddyfile", "kubernetes.Caddyfile"])
def test_the_proxy_fits_the_settings(file: str) -> None:
    command = [caddy(), "adapt", "--adapter", "caddyfile", "--config", str(FILES / file), "--validate"]
    variables = os.environ | {"ADAPTERD_SERVERS": "10.0.0.1:8000 10.0.0.2:8000", "DNS_RESOLVERS": ""}
    adapted = json.loads(subprocess.run(command, env=variables, check=True, capture_output=True).stdout)
    [server] = adapted["apps"]["http"]["servers"].values()
    handlers = {one["handler"]: one for route in server["routes"] for one in route["handle"]}
    passed = handlers["reverse_proxy"]
    second = 1_000_000_000
    settings = Settings()
    assert handlers["request_body"]["max_size"] == settings.max_upload_bytes
    assert passed["transport"]["keep_alive"]["idle_timeout"] < settings.keep_alive_seconds * second
    assert passed["transport"]["response_header_timeout"] > settings.request_timeout_seconds * second
    assert "retry_match" not in passed["load_balancing"]  # so that only what was not sent is sent again
    assert passed["load_balancing"]["selection_policy"]["field"] == ROUTING_HEADER
