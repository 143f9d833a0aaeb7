"""A server is ready once everything that a request takes has been run, and not before."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import children
import httpx
import pytest
from helpers import make_artifact, make_blueprint, random_tensors, tiny_backbone
from starlette.testclient import TestClient

from server import serving
from server.adapters import METHODS
from server.api import errors
from server.app import create_app
from server.backbone.backbone import Backbone
from server.engine import warmup
from server.engine.engine import Engine
from server.engine.warmup import LARGEST_TOKENS, WarmUp
from server.engine.worker import Worker
from server.errors import BackboneError, Overloaded
from server.settings import Settings
from server.store.store import AdapterStore
from server.tasks import TASKS

LONGEST_SECONDS = 120.0
"""After that, something hangs."""

READY = ("/readyz", "/tei/health", "/v2/health/ready")


class Log:
    """What was logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: self.lines.append({"level": level, "event": event, **fields})

    def of(self, level: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["level"] == level]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log()
    monkeypatch.setattr(warmup, "log", made)
    return made


@contextmanager
def warming(backbone: Backbone, seconds: float = LONGEST_SECONDS) -> Iterator[tuple[TestClient, Engine]]:
    settings = Settings(warm_up_seconds=seconds)
    app = create_app(settings, backbone=backbone, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, app.state.engine


def wait_until_ready(client: TestClient) -> None:
    until = time.monotonic() + LONGEST_SECONDS
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_is_not_ready_before_it_is_warm(bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    rest = WarmUp._steps

    async def slow() -> None:
        await asyncio.to_thread(go_on.wait)

    monkeypatch.setattr(WarmUp, "_steps", lambda self: [("slow", slow), *rest(self)])
    try:
        with warming(bert) as (client, _):
            for path in READY:
                answer = client.get(path)
                assert answer.status_code == 503
                assert "warming_up" in answer.text or path != "/readyz"
            assert int(client.get("/readyz").headers["retry-after"]) >= 1
            assert client.get("/livez").status_code == 200
            # Who comes early is answered all the same.
            assert client.post("/embed", json={"inputs": "w1 w2"}).status_code == 200
            assert client.get("/readyz").status_code == 503
            go_on.set()
            wait_until_ready(client)
            for path in READY:
                assert client.get(path).status_code == 200
    finally:
        go_on.set()


def test_every_task_every_method_and_every_size_is_run(
    bert: Backbone, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    ran: set[str] = set()
    forward = Backbone.forward

    def spy(self: Backbone, texts: Any, plan: Any) -> Any:
        assert threading.current_thread().name.startswith("adapterd-device")
        names = {part.method.name for segment in plan._segments for part in segment.adapter.parts}
        ran.update(names, {f"{sum(map(len, texts))} tokens"})
        return forward(self, texts, plan)

    heads: set[str] = set()
    for task in TASKS.values():

        def apply(*args: Any, name: str = task.name, apply: Any = task.apply) -> Any:
            heads.add(name)
            return apply(*args)

        monkeypatch.setattr(task, "apply", apply)
    monkeypatch.setattr(Backbone, "forward", spy)
    with warming(bert) as (client, engine):
        wait_until_ready(client)
        sizes = engine._warm_up.sizes
    assert heads == set(TASKS)
    carried = {name for name in METHODS if name != "compacter"}  # whose default does not fit so small a backbone
    assert carried | {f"{size} tokens" for size in sizes} <= ran
    assert max(sizes) == LARGEST_TOKENS
    assert log.of("error") == log.of("warning") == []


def test_in_bfloat16_on_a_cpu_all_sizes_are_run() -> None:
    import torch

    half = tiny_backbone("bert", dtype=torch.bfloat16)
    with warming(half) as (client, engine):
        wait_until_ready(client)
        assert engine._warm_up.sizes == list(range(16, LARGEST_TOKENS + 1, 16))


@pytest.mark.parametrize("family", ["mpnet", "deberta-v2", "gpt2", "qwen3", "gpt_neox"])
def test_other_backbones_get_warm_as_well(backbone_of: Any, family: str, log: Log) -> None:
    with warming(backbone_of(family)) as (client, _):
        wait_until_ready(client)
    assert log.of("error") == log.of("warning") == []


def test_what_fails_is_told_and_the_rest_is_run(bert: Backbone, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    apply = METHODS["ia3"].apply_run

    def broken(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(METHODS["ia3"], "apply_run", broken)
    with warming(bert) as (client, _):
        wait_until_ready(client)
        assert client.post("/embed", json={"inputs": "w1"}).status_code == 200
    monkeypatch.setattr(METHODS["ia3"], "apply_run", apply)
    assert [line["step"] for line in log.of("error")] == ["method ia3"]
    assert log.of("info")[-1]["event"] == "warmed up"


def test_a_queue_that_is_full_is_asked_again(bert: Backbone, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    refused: list[None] = []
    submit = Worker.submit

    def refusing(self: Worker, *args: Any, **options: Any) -> Any:
        if len(refused) < 3:
            refused.append(None)
            raise Overloaded("the queue is full")
        return submit(self, *args, **options)

    monkeypatch.setattr(Worker, "submit", refusing)
    monkeypatch.setattr(warmup, "PAUSE_SECONDS", 0)
    with warming(bert) as (client, _):
        wait_until_ready(client)
    assert len(refused) == 3
    assert log.of("error") == log.of("warning") == []


@pytest.mark.parametrize("step", ["_make", "_answer"])
def test_a_backbone_that_cannot_be_run_is_told_whatever_it_fails_with(
    bert: Backbone, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def fails(self: WarmUp, *_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(WarmUp, step, fails)
    with warming(bert) as (client, engine):
        assert client.portal is not None
        with pytest.raises(BackboneError, match="no memory"):
            client.portal.call(engine.warmed)
        for _ in range(2):
            answer = client.get("/readyz")
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "backbone_error"


def test_a_server_that_leaves_warms_up_no_further(bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def ended(engine: Engine) -> bool:
        assert engine._warming is not None
        await asyncio.wait([engine._warming], timeout=LONGEST_SECONDS)
        return engine._warming.cancelled()

    monkeypatch.setattr(WarmUp, "_steps", lambda self: [("forever", forever)])
    with warming(bert) as (client, engine):
        assert client.portal is not None
        client.portal.call(engine.leave)
        assert client.portal.call(ended, engine)
        assert client.get("/readyz").json()["error"]["code"] == "shutting_down"
        assert client.post("/embed", json={"inputs": "w1"}).status_code == 200


def test_that_a_server_is_not_ready_yet_or_any_more_is_no_error_in_the_log(
    bert: Backbone, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(WarmUp, "_steps", lambda self: [("forever", forever)])
    monkeypatch.setattr(errors, "log", log)
    with warming(bert) as (client, engine):
        assert client.portal is not None
        for path in READY:
            assert client.get(path).status_code == 503
        client.portal.call(engine.drain)
        assert client.get("/readyz").status_code == 503
        assert client.post("/embed", json={"inputs": "w1"}).status_code == 503
        assert log.of("error") == []
        engine._worker.crashed = True
        assert client.get("/livez").status_code == 503
        assert [line["code"] for line in log.of("error")] == ["device_stopped"]


def test_it_ends_in_time_and_says_what_is_left(bert: Backbone, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(WarmUp, "_steps", lambda self: [("first", forever), ("second", forever)])
    with warming(bert, seconds=0.01) as (client, _):
        wait_until_ready(client)
    assert [line["left"] for line in log.of("warning")] == [["first", "second"]]


def test_a_server_whose_backbone_fails_does_not_start(
    bert: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fails(self: WarmUp) -> None:
        raise BackboneError("backbone 'tiny-bert' cannot be run: no such kernel")

    monkeypatch.setattr(WarmUp, "_bare", fails)
    monkeypatch.setattr(serving, "_limit_arenas", lambda: None)
    monkeypatch.setattr(serving, "_share_processors", lambda _: None)
    monkeypatch.setattr(serving.logs, "configure", lambda *_: None)
    monkeypatch.setattr(
        serving,
        "create_app",
        lambda settings: create_app(settings, backbone=bert, store=AdapterStore.open("memory://")),
    )
    assert serving.run(Settings(port=0, warm_up_seconds=LONGEST_SECONDS, shutdown_delay_seconds=0)) == 1
    printed = capsys.readouterr()
    assert "no such kernel" in printed.err
    assert " at http" not in printed.out


def test_no_time_at_all_turns_it_off(bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WarmUp, "run", lambda self, seconds: pytest.fail("it ran"))
    with warming(bert, seconds=0) as (client, _):
        assert client.get("/readyz").status_code == 200


# -------------------------------------------------------------------------------------------------- what is compiled


@contextmanager
def verbose_server(folder: Path, store: Path, dtype: str) -> Iterator[tuple[httpx.Client, Path]]:
    """A server that tells what oneDNN compiles, and the file that it tells it in."""
    output = folder / "output"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTERD_")}
    environment = clean | {"ONEDNN_VERBOSE": "profile_create", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--device", "cpu", "--dtype", dtype]
    command += ["--store", str(store), "--backbone", children.save_tiny_bert(folder / "backbone")]
    with output.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env=environment, cwd=Path(__file__).parent.parent
        )
    try:
        while " at http://" not in (text := output.read_text()):
            assert process.poll() is None, text[-2000:]
            time.sleep(0.05)
        url = text.partition(" at ")[2].split()[0]
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, output
    finally:
        process.kill()
        process.wait()


def compiled(output: Path, what: str) -> list[str]:
    lines = output.read_text().splitlines()
    return [line for line in lines if line.startswith("onednn_verbose") and "cache_miss" in line and what in line]


def test_requests_to_a_ready_server_compile_nothing(bert: Backbone, tmp_path: Path) -> None:
    """The bare backbone's, and those of LoRAs, whose products come in few shapes."""
    with verbose_server(tmp_path, tmp_path / "store", "bfloat16") as (client, output):
        assert client.get("/readyz").status_code == 200
        before = compiled(output, "bf16")
        if not before:
            pytest.skip("oneDNN compiles no products in bfloat16 here")
        many = [f"two-{index}" for index in range(16)]
        adapters = {"one": {"r": 4}, "two": {"r": 8}, "three": {"r": 8, "target_modules": "all-linear"}}
        for seed, (name, options) in enumerate((adapters | {key: {"r": 8} for key in many}).items()):
            blueprint = make_blueprint(bert.spec, "lora", options)
            artifact = make_artifact(blueprint, random_tensors(blueprint, seed, bert))
            files = {"manifest.json": artifact.manifest_bytes, "adapter.safetensors": artifact.tensor_bytes}
            answer = client.put(f"/admin/adapters/{name}", files=[("files", file) for file in files.items()])
            assert answer.status_code == 201, answer.text
        for count in (8, 9, 12, 13, 16):  # joined into one product each, of several widths
            answer = client.post("/classify", json={"adapters": many[:count], "inputs": "w1 " * 14})
            assert answer.status_code == 200, answer.text
        for words in (1, 5, 12, 29, 30, 61, 100, 200):
            text = " ".join(["w1"] * words)
            for path, body in (
                ("/embed", {"inputs": text}),
                ("/classify", {"adapter": "one", "inputs": text}),
                ("/classify", {"adapter": "two", "inputs": [text[: 3 * 40], "w2 w3"]}),
                ("/classify", {"adapter": "three", "inputs": text}),
                ("/classify", {"adapters": ["one", "two", "three"], "inputs": text[: 3 * 40]}),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code == 200, answer.text
        assert compiled(output, "bf16")[len(before) :] == []


def test_in_float32_nothing_is_kept_for_a_number_of_rows(tmp_path: Path) -> None:
    """There, oneDNN would compile a GELU for each, and keep it."""
    with verbose_server(tmp_path, tmp_path / "store", "float32") as (client, output):
        before = compiled(output, "")
        for words in (1, 5, 12, 29, 61):
            assert client.post("/embed", json={"inputs": "w1 " * words}).status_code == 200
        assert compiled(output, "")[len(before) :] == []
