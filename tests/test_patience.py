"""Requests and their clients' patience, over HTTP on a tiny backbone: deadlines, priorities, hang-ups, a server that is
full, is told to end, or has lost its device's thread.
"""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import LABELS, make_artifact, make_blueprint, random_tensors
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from test_http import Held, own_files, put, refused

from server.app import create_app
from server.backbone.backbone import Backbone
from server.core import Priority, TextInput
from server.engine.engine import Engine
from server.engine.runner import Row
from server.errors import NotFiniteOutput
from server.settings import Settings
from server.store.artifact import Artifact
from server.store.store import AdapterStore

QUEUE = 400
BODY = {"adapter": "one", "inputs": "w1 w2 w3"}


def make(bert: Backbone, seed: int) -> Artifact:
    blueprint = make_blueprint(bert.spec, "lora", {"r": 4}, labels=LABELS[:2])
    return make_artifact(blueprint, random_tensors(blueprint, seed, bert))


@pytest.fixture
def client(bert: Backbone) -> Iterator[TestClient]:
    settings = Settings(max_queue_tokens=QUEUE, max_batch_tokens=64, quarantine_failures=2)
    app = create_app(settings, backbone=bert, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        for seed, name in enumerate(("one", "two")):
            assert put(client, name, own_files(make(bert, seed))).status_code == 201
        yield client


def engine_of(client: TestClient) -> Engine:
    engine: Engine = client.app.state.engine
    return engine


@pytest.fixture
def held(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """A device that waits for the gate."""
    worker = engine_of(client)._worker
    held = Held(worker)
    monkeypatch.setattr(worker._runner, "run", held.run)
    yield held
    held.gate.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def ask(client: TestClient, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return client.post("/classify", json=BODY | body, headers=headers)


def version_of(client: TestClient, name: str) -> str:
    """The version that serves."""
    return str(client.get(f"/admin/adapters/{name}").json()["version"])


def busy(client: TestClient, held: Held, pool: ThreadPoolExecutor) -> Future[Any]:
    """A request that holds the device."""
    request = pool.submit(ask, client)
    held.wait_for(lambda: len(held.batches) == 1)
    return request


def series(client: TestClient, name: str) -> dict[str, float]:
    """A series' values by its labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {",".join(sample.labels.values()): sample.value for sample in samples if sample.name == name}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, {"timeout_ms": 50}),
        ({"X-Request-Timeout-Ms": "50"}, {}),
        ({"X-Request-Timeout-Ms": "50"}, {"timeout_ms": 60_000}),
        ({"X-Request-Timeout-Ms": "60000"}, {"timeout_ms": 50}),
    ],
)
def test_the_shortest_timeout_counts(
    client: TestClient, held: Held, pool: ThreadPoolExecutor, headers: dict[str, str], body: dict[str, Any]
) -> None:
    first = busy(client, held, pool)
    late = ask(client, headers, **body)
    refused(late, 504, code="deadline_exceeded")
    assert "0.05 s" in late.json()["error"]["message"]
    assert held.waiting == 0
    held.gate.set()
    assert first.result().status_code == 200
    assert len(held.batches) == 1
    assert series(client, "adapterd_expired_total") == {"": 1}


def test_a_deadline_that_passes_is_no_fault(client: TestClient, held: Held, caplog: pytest.LogCaptureFixture) -> None:
    refused(ask(client, timeout_ms=20), 504, code="deadline_exceeded")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    held.gate.set()


def test_the_servers_own_timeout_holds_for_everybody(bert: Backbone, pool: ThreadPoolExecutor) -> None:
    app = create_app(Settings(request_timeout_seconds=0.05), backbone=bert, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        held = Held(app.state.engine._worker)
        app.state.engine._worker._runner.run = held.run
        refused(client.post("/embed", json={"inputs": "w1", "timeout_ms": 60_000}), 504, code="deadline_exceeded")
        assert client.post("/v1/embeddings", json={"input": "w1", "model": bert.spec.name}).status_code == 504
        held.gate.set()


@pytest.mark.parametrize("wrong", ["0", "-1", "soon", "1e3", "100000000"])
def test_a_timeout_that_is_none(client: TestClient, wrong: str) -> None:
    refused(ask(client, {"X-Request-Timeout-Ms": wrong}), 422, "X-Request-Timeout-Ms")
    refused(ask(client, timeout_ms=-1), 422, "timeout_ms")
    refused(ask(client, priority="urgent"), 422, "priority")


def test_urgent_requests_overtake_others(client: TestClient, held: Held, pool: ThreadPoolExecutor) -> None:
    requests = [busy(client, held, pool)]
    for count, priority in enumerate(reversed(Priority), start=1):
        inputs = " ".join(["w1"] * 40)  # a batch for each
        requests.append(pool.submit(ask, client, inputs=inputs, priority=priority, top_k=count))
        held.wait_for(lambda count=count: held.waiting == count)
    assert set(series(client, "adapterd_queue_tokens").values()) == {42}
    held.gate.set()
    assert {request.result().status_code for request in requests} == {200}
    order = [row.options.top_k for [row] in held.batches[1:]]
    assert order == [3, 2, 1]


async def hang_up(client: TestClient, held: Held) -> list[Any]:
    """A request whose client hangs up once it waits. What was sent to it."""
    import asyncio

    body = json.dumps(BODY).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[Any] = []

    async def receive() -> Any:
        if message := next(messages, None):
            return message
        while not held.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/classify",
        "raw_path": b"/classify",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await client.app(scope, receive, send)
    return sent


def test_a_client_that_hangs_up_leaves_the_queue(client: TestClient, held: Held, pool: ThreadPoolExecutor) -> None:
    first = busy(client, held, pool)
    assert client.portal is not None
    sent = client.portal.call(hang_up, client, held)
    assert [message["status"] for message in sent if "status" in message] == [499]
    assert held.waiting == 0
    held.gate.set()
    assert first.result().status_code == 200
    assert len(held.batches) == 1
    assert series(client, "adapterd_cancelled_total") == {"": 1}
    assert ask(client).status_code == 200


def test_a_full_queue_says_when_to_come_back(client: TestClient, held: Held, pool: ThreadPoolExecutor) -> None:
    requests = [busy(client, held, pool)]
    long = " ".join(["w1"] * 198)
    for count, adapter in enumerate(("one", "two"), start=1):
        requests.append(pool.submit(ask, client, adapter=adapter, inputs=long))
        held.wait_for(lambda count=count: held.waiting == count)
    full = ask(client)
    refused(full, 429, code="overloaded")
    assert int(full.headers["retry-after"]) >= 1
    assert pool.submit(ask, client, priority="high") is not None  # has room of its own
    held.wait_for(lambda: held.waiting == 3)
    assert series(client, "adapterd_rejected_total") == {"overloaded": 1}
    held.gate.set()
    assert {request.result().status_code for request in requests} == {200}


def test_a_refused_request_is_not_tokenized(
    client: TestClient, held: Held, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = busy(client, held, pool)
    second = pool.submit(ask, client, adapter="two", inputs=[" ".join(["w1"] * 198)] * 3)
    held.wait_for(lambda: held.waiting == 3)
    monkeypatch.setattr(engine_of(client)._pipeline, "_encode", None)
    refused(ask(client), 429)
    held.gate.set()
    assert {first.result().status_code, second.result().status_code} == {200}


def test_a_request_is_refused_for_what_its_words_come_to(
    client: TestClient, held: Held, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = busy(client, held, pool)
    second = pool.submit(ask, client, adapter="two", inputs=" ".join(["w1"] * 198))
    held.wait_for(lambda: held.waiting == 1)
    monkeypatch.setattr(engine_of(client)._pipeline, "_encode", None)
    for inputs in (["w1 " * 65] * 3, [{"text": "w1", "text_pair": "w1 " * 65}] * 3):  # 200 tokens fit
        refused(ask(client, inputs=inputs), 429, code="overloaded")
    refused(client.post("/classify", json={"adapters": ["one", "two"], "inputs": "w1 " * 100}), 429)
    refused(ask(client, inputs="w1 " * 1000, long="window"), 429)
    monkeypatch.undo()
    held.gate.set()
    assert {first.result().status_code, second.result().status_code} == {200}


def test_nothing_is_tokenized_for_room_that_another_request_is_about_to_take(
    client: TestClient, held: Held, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = busy(client, held, pool)
    waiting = pool.submit(ask, client, adapter="two", inputs="w1 " * 150)
    held.wait_for(lambda: held.waiting == 1)
    pipeline = engine_of(client)._pipeline
    encode, tokenized = pipeline._encode, Counter[int]()
    entered, leave = threading.Event(), threading.Event()

    async def slow(inputs: Sequence[TextInput], *args: Any, **options: Any) -> Any:
        tokenized[len(inputs)] += 1
        entered.set()
        await asyncio.to_thread(leave.wait, 30)
        return await encode(inputs, *args, **options)

    monkeypatch.setattr(pipeline, "_encode", slow)
    third = pool.submit(ask, client, inputs=["w1 " * 40] * 4)
    assert entered.wait(10)
    refused(ask(client, inputs=["w1 " * 40] * 3), 429, code="overloaded")
    leave.set()
    held.wait_for(lambda: held.waiting == 5)
    assert tokenized == {4: 1}
    held.gate.set()
    assert [request.result().status_code for request in (first, waiting, third)] == [200] * 3
    assert not any(pipeline._worker._scheduler._expected.values())


def test_what_ends_while_it_is_tokenized_is_not_expected_any_more(
    client: TestClient, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = engine_of(client)._pipeline
    expected = pipeline._worker._scheduler._expected
    seen = []

    async def failing(*args: Any, **options: Any) -> Any:
        seen.append(sum(expected[Priority.NORMAL].values()))
        if len(seen) == 1:
            raise NotFiniteOutput("no")
        await asyncio.sleep(30)

    monkeypatch.setattr(pipeline, "_encode", failing)
    held.gate.set()
    for status, limit in ((500, 60_000), (504, 50)):
        assert ask(client, inputs=["w1 " * 40] * 4, timeout_ms=limit).status_code == status
        assert not any(expected.values())
    assert seen == [4 * 42] * 2


def test_refusals_are_told_with_what_they_are_for(
    client: TestClient, held: Held, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(engine_of(client)._bursts, "refused", waits.append)
    first = busy(client, held, pool)
    second = pool.submit(ask, client, adapter="two", inputs=[" ".join(["w1"] * 198)] * 3)
    held.wait_for(lambda: held.waiting == 3)
    engine_of(client)._worker._scheduler.ran(100, 1.0)
    refused(ask(client), 429)
    [wait] = waits
    assert wait > 1
    held.gate.set()
    assert {first.result().status_code, second.result().status_code} == {200}


def test_a_client_that_is_refused_at_once_is_not_watched(
    client: TestClient, held: Held, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = busy(client, held, pool)
    second = pool.submit(ask, client, inputs=[" ".join(["w1"] * 198)] * 2)
    held.wait_for(lambda: held.waiting == 2)
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "create_task", None)
        refused(ask(client), 429)
    held.gate.set()
    assert {first.result().status_code, second.result().status_code} == {200}


def test_a_refused_request_brings_no_adapter_into_memory(
    client: TestClient, held: Held, pool: ThreadPoolExecutor
) -> None:
    residency = engine_of(client)._residency
    cold = version_of(client, "two")
    assert client.portal is not None
    client.portal.call(residency.retire, cold)
    first = busy(client, held, pool)
    second = pool.submit(ask, client, inputs=[" ".join(["w1"] * 198)] * 2)
    held.wait_for(lambda: held.waiting == 2)
    refused(ask(client, adapter="two"), 429)
    assert cold not in residency
    held.gate.set()
    assert {first.result().status_code, second.result().status_code} == {200}
    assert ask(client, adapter="two").status_code == 200
    assert cold in residency


def break_adapter(client: TestClient, name: str, patched: pytest.MonkeyPatch) -> None:
    """A version in memory whose outputs are not finite."""
    version = ask(client, adapter=name).json()["version"]
    adapter = engine_of(client)._residency._device.get(version)
    runner = engine_of(client)._worker._runner
    run = runner.run

    def run_broken(rows: Sequence[Row]) -> list[Any]:
        if any(row.adapter is adapter for row in rows):
            raise NotFiniteOutput("not finite")
        return run(rows)

    patched.setattr(runner, "run", run_broken)


def bring_into_quarantine(client: TestClient, name: str, patched: pytest.MonkeyPatch) -> Any:
    """The first answer that says so."""
    break_adapter(client, name, patched)
    for _ in range(2):
        refused(ask(client, adapter=name), 500, code="not_finite_output")
    answer = ask(client, adapter=name)
    while answer.status_code == 500:  # the thread counts after it has answered
        answer = ask(client, adapter=name)
    refused(answer, 503, "adapter", code="adapter_quarantined")
    return answer


@pytest.mark.parametrize("way", ["release", "upload", "verify"])
def test_an_adapter_in_quarantine(
    client: TestClient, bert: Backbone, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = bring_into_quarantine(client, "one", monkeypatch)
    assert "not finite" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert series(client, "adapterd_quarantined_adapters") == {"one": 1}
    assert ask(client, adapter="two").status_code == 200
    monkeypatch.undo()
    refused(ask(client), 503, code="adapter_quarantined")
    version = client.get("/admin/adapters/one").json()["version"]
    if way == "verify":
        done = client.post("/admin/adapters/one/verify")
    elif way == "release":
        done = client.post("/admin/adapters/one/releases", json={"traffic": {version: 1}})
    else:
        done = put(client, "one", own_files(make(bert, seed=0)))
    assert done.status_code in (200, 201), done.text
    assert ask(client).status_code == 200
    assert series(client, "adapterd_quarantined_adapters") == {}


@pytest.mark.parametrize("way", ["the version again", "another version", "deletion"])
def test_a_release_that_another_server_makes_ends_quarantine(
    bert: Backbone, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(quarantine_failures=2, quarantine_seconds=3600, store_poll_seconds=0.05)
    apps = [create_app(settings, backbone=bert, store=AdapterStore.open(str(tmp_path))) for _ in range(2)]
    with TestClient(apps[0], raise_server_exceptions=False) as client, TestClient(apps[1]) as other:
        published = put(other, "one", own_files(make(bert, 0))).json()
        bring_into_quarantine(client, "one", monkeypatch)
        assert series(client, "adapterd_quarantined_adapters") == {"one": 1}
        if way == "the version again":
            done = other.post("/admin/adapters/one/releases", json={"traffic": {published["version"]: 1}})
        elif way == "another version":
            done = put(other, "one", own_files(make(bert, 1)))
        else:
            done = other.delete("/admin/adapters/one")
        assert done.status_code in (200, 201), done.text
        deadline = time.monotonic() + 30
        while series(client, "adapterd_quarantined_adapters"):  # though nobody asks for it here
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.undo()
        answer = ask(client)
        assert answer.status_code == (404 if way == "deletion" else 200)
        assert way == "deletion" or answer.json()["release"] == 2


def test_a_server_that_is_told_to_end(client: TestClient, held: Held, pool: ThreadPoolExecutor) -> None:
    first = busy(client, held, pool)
    second = pool.submit(ask, client)
    held.wait_for(lambda: held.waiting == 1)
    assert client.portal is not None
    client.portal.call(engine_of(client).leave)
    refused(client.get("/readyz"), 503, code="shutting_down")
    assert client.get("/livez").status_code == 200
    third = pool.submit(ask, client)
    held.wait_for(lambda: held.waiting == 2)
    client.portal.call(engine_of(client).drain)
    refused(client.get("/readyz"), 503, code="shutting_down")
    late = ask(client)
    refused(late, 503, code="shutting_down")
    assert int(late.headers["retry-after"]) >= 1
    held.gate.set()
    assert {one.result().status_code for one in (first, second, third)} == {200}


def test_what_takes_too_long_when_a_server_ends(client: TestClient, held: Held, pool: ThreadPoolExecutor) -> None:
    first = busy(client, held, pool)
    assert client.portal is not None
    client.portal.call(cut_off, engine_of(client))
    refused(first.result(), 503, code="shutting_down")
    refused(ask(client), 503, code="shutting_down")


def test_a_request_whose_time_is_just_over_keeps_no_other_from_being_cut_off(
    client: TestClient, held: Held, pool: ThreadPoolExecutor
) -> None:
    async def expired() -> asyncio.Timeout:
        with suppress(TimeoutError):
            async with asyncio.timeout(0) as limit:
                await asyncio.Event().wait()
        return limit

    engine = engine_of(client)
    first = busy(client, held, pool)
    assert client.portal is not None
    engine._limits.add(client.portal.call(expired))
    client.portal.call(cut_off, engine)  # in whatever order they are
    refused(first.result(), 503, code="shutting_down")


async def cut_off(engine: Engine) -> None:
    engine.cut_off()


class Died(BaseException):
    """Nothing that a batch may raise."""


def test_a_dead_device_is_a_dead_server(
    client: TestClient, held: Held, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = busy(client, held, pool)

    def die(rows: Any) -> Any:
        raise Died

    monkeypatch.setattr(engine_of(client)._worker._runner, "run", die)
    second = pool.submit(ask, client)
    held.wait_for(lambda: held.waiting == 1)
    held.gate.set()
    assert first.result().status_code == 200
    refused(second.result(), 503, code="device_stopped")
    refused(client.get("/livez"), 503, code="device_stopped")
    refused(client.get("/readyz"), 503)
    refused(ask(client), 503, code="device_stopped")
