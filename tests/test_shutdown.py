"""SIGTERM under load, on real processes: whatever was accepted is answered."""

import asyncio
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import children
import httpx
import pytest
import uvicorn
from helpers import LABELS, make_artifact, make_blueprint, random_tensors

from server import serving
from server.app import create_app
from server.backbone.backbone import Backbone
from server.settings import Settings
from server.store.store import AdapterStore

CLIENTS = 6
ANSWERS = 60
"""Before the signal."""


class Client(threading.Thread):
    """Asks until it is refused, on a connection that it keeps."""

    def __init__(self, url: str, number: int, answered: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = {"adapter": "one", "inputs": ["w1 w2"] * (1 + number)}
        self._answered = answered
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while 503 not in self.statuses and not self.wrong:
                try:
                    answer = client.post("/classify", json=self._body)
                except httpx.ConnectError:  # refused before anything was sent
                    return
                except httpx.TransportError as error:
                    self.wrong.append(repr(error))
                    return
                self._check(answer)
                self._answered.release()

    def _check(self, answer: httpx.Response) -> None:
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            if len(answer.json()["predictions"]) != len(self._body["inputs"]):
                self.wrong.append(answer.text)
        elif (
            answer.status_code != 503
            or answer.json()["error"]["code"] != "shutting_down"
            or "retry-after" not in answer.headers
        ):
            self.wrong.append(answer.text)


def end_under_load(server: children.Server) -> Counter[int]:
    """Statuses of what was asked."""
    url = str(server.client.base_url)
    answered = threading.Semaphore(0)
    clients = [Client(url, number, answered) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for _ in range(ANSWERS):
        assert answered.acquire(timeout=60)
    assert server.process.pid is not None
    os.kill(server.process.pid, signal.SIGTERM)
    ready = Counter[int]()
    while 503 not in ready:
        ready[server.client.get("/readyz").status_code] += 1
    assert set(ready) <= {200, 503}
    for client in clients:
        client.join(60)
        assert not client.is_alive()
    server.process.join(60)
    assert server.process.exitcode in (0, -signal.SIGTERM)
    assert [client.wrong for client in clients if client.wrong] == []
    return sum((client.statuses for client in clients), Counter())


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return children.save_tiny_bert(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def files(bert: Backbone) -> list[tuple[str, tuple[str, bytes]]]:
    """An adapter, as a form has it."""
    blueprint = make_blueprint(bert.spec, "lora", {"r": 4}, labels=LABELS[:2])
    artifact = make_artifact(blueprint, random_tensors(blueprint, 0, bert))
    files = {"manifest.json": artifact.manifest_bytes, "adapter.safetensors": artifact.tensor_bytes}
    return [("files", file) for file in files.items()]


def test_a_server_that_is_told_to_end_serves_until_others_may_know(
    tmp_path: Path, backbone_folder: str, files: list[tuple[str, tuple[str, bytes]]]
) -> None:
    settings = {"shutdown_delay_seconds": "60", "shutdown_grace_seconds": "60"}
    with children.serving(tmp_path, str(tmp_path / "store"), backbone_folder, **settings) as server:
        server.client.put("/admin/adapters/one", files=files).raise_for_status()
        request = {"adapter": "one", "inputs": "w1 w2"}
        before = server.client.post("/classify", json=request)
        assert before.status_code == 200
        assert "connection" not in before.headers
        assert server.process.pid is not None
        os.kill(server.process.pid, signal.SIGTERM)
        while server.client.get("/readyz").status_code == 200:
            pass
        for _ in range(2):
            after = server.client.post("/classify", json=request)
            assert after.status_code == 200
            assert after.headers["connection"] == "close"


def test_what_requests_may_take_includes_the_delay(bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    async def shutdown(server: uvicorn.Server, _: Any = None) -> None:
        waits.append(server.config.timeout_graceful_shutdown)

    async def end(server: serving._Server) -> None:
        server._greeting = asyncio.create_task(asyncio.sleep(60))
        await server.shutdown()

    monkeypatch.setattr(uvicorn.Server, "shutdown", shutdown)
    for delay in (0.0, 0.9):
        settings = Settings(shutdown_delay_seconds=delay, shutdown_grace_seconds=0.9)
        app = create_app(settings, backbone=bert, store=AdapterStore.open("memory://"))
        asyncio.run(end(serving._Server(uvicorn.Config(app), None)))
    assert waits == [2, 1]


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_nothing_that_was_accepted_is_lost(
    tmp_path: Path, backbone_folder: str, files: list[tuple[str, tuple[str, bytes]]], times: int
) -> None:
    store = str(tmp_path / "store")
    for number in range(times):
        with children.serving(
            tmp_path, store, backbone_folder, shutdown_delay_seconds="1.5", metrics_port="0"
        ) as server:
            if not number:
                server.client.put("/admin/adapters/one", files=files).raise_for_status()
            statuses = end_under_load(server)
            assert statuses[200] >= ANSWERS - CLIENTS
            assert set(statuses) <= {200, 503}
