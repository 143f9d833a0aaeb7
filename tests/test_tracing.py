"""Traces: which spans a request leaves, where they hang, and that there are none unless somebody asks."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import children
import pytest
from helpers import LABELS, make_artifact, make_blueprint, random_tensors
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from benchmarks.faulty import Fault, FaultyS3, faulty_s3
from server import logs, otel, serving
from server.api.access.tokens import Tokens
from server.app import create_app
from server.backbone.backbone import Backbone
from server.engine.runner import Row, Runner
from server.errors import BadConfiguration
from server.otel import OpenTelemetry
from server.settings import Settings
from server.store.releases import Plan
from server.store.store import AdapterStore
from server.tracing import OFF, exporters, ids

CALLER = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"

SAMPLER = ParentBased(ALWAYS_ON)

PATIENCE_SECONDS = 60.0
"""Until a span that has to come has not."""

Tree = dict[str, Any]


def is_sampled(header: str) -> bool:
    """The lowest bit of a `traceparent`; the next one says that the trace's id is random."""
    return bool(int(header.rpartition("-")[2], 16) & 1)


class Traced:
    """A server over a store of its own, and its spans."""

    def __init__(self, store: str, bert: Backbone, sampler: Sampler, **settings: Any) -> None:
        self.bert = bert
        self.store = AdapterStore.open(store, endpoint=settings.get("store_endpoint"))
        self.versions: dict[str, str] = {}
        self._memory = InMemorySpanExporter()
        tracing = OpenTelemetry([SimpleSpanProcessor(self._memory)], sampler)
        options = Settings(store=store, **{"store_poll_seconds": 1e6, **settings})
        self.app = create_app(options, backbone=bert, tracing=tracing)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def publish(self, name: str, seed: int, method: str = "lora", shadow: Sequence[str] = ()) -> str:
        """Past the server."""
        blueprint = make_blueprint(self.bert.spec, method, {}, labels=LABELS[:2])
        artifact = make_artifact(blueprint, random_tensors(blueprint, seed, self.bert))

        async def run() -> str:
            version = await self.store.put_version(name, artifact)
            await self.store.release(name, Plan(traffic={version: 1.0}, shadow=tuple(shadow)), by="test")
            return version

        self.versions[name] = asyncio.run(run())
        return self.versions[name]

    def ask(self, name: str, *, text: str = "w1 w2", headers: dict[str, str] | None = None, **more: Any) -> Any:
        return self.client.post("/classify", json={"adapter": name, "inputs": text, **more}, headers=headers)

    def warm_up(self, *names: str) -> None:
        """Brings adapters into memory, and forgets the spans of that."""
        for count, name in enumerate(names, 1):
            assert self.ask(name).status_code == 200
            self.wait(lambda count=count: len(self.routes()) == count and self.all_ran())  # type: ignore[misc]
        self._memory.clear()

    def all_ran(self) -> bool:
        """Whether each request is known to have been computed: that is told once its answer is out."""
        computed = {span.context.trace_id for span in self.named("compute")}
        batches = {link.context.span_id for span in self.named("compute") for link in span.links}
        return (
            computed == {span.context.trace_id for span in self.routes()}
            and batches == {span.context.span_id for span in self.named("batch")}
            and len(self.named("compute")) == len(self.named("queue")) == len(self.named("tokenize"))
        )

    def wait(self, there: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not there():
            assert time.monotonic() < until, [span.name for span in self.spans]
            time.sleep(0.005)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """Those that are over."""
        return self._memory.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    def routes(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.kind is SpanKind.SERVER]

    def tree(self, root: ReadableSpan) -> Tree:
        """The names below a span, in the order in which they began."""
        children = [span for span in self.spans if span.parent and span.parent.span_id == root.context.span_id]
        assert {span.context.trace_id for span in children} <= {root.context.trace_id}
        return {span.name: self.tree(span) for span in sorted(children, key=lambda span: span.start_time or 0)}


@contextmanager
def traced(store: str, bert: Backbone, sampler: Sampler = SAMPLER, **settings: Any) -> Iterator[Traced]:
    server = Traced(store, bert, sampler, **settings)
    with server.client:
        yield server


@pytest.fixture
def server(tmp_path: Path, bert: Backbone, request: pytest.FixtureRequest) -> Iterator[Traced]:
    with traced(str(tmp_path / "store"), bert, **getattr(request, "param", {})) as server:
        server.publish("one", 1)
        server.publish("two", 2, "ia3")
        yield server


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Open at first; while it is closed, batches begin and do not end."""
    run, gate = Runner.run, threading.Event()

    def wait_and_run(self: Runner, rows: Sequence[Row]) -> list[Any]:
        assert gate.wait(PATIENCE_SECONDS)
        return run(self, rows)

    monkeypatch.setattr(Runner, "run", wait_and_run)
    gate.set()
    yield gate
    gate.set()


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


def test_a_request_leaves_one_tree_and_a_batch(server: Traced) -> None:
    server.warm_up("one")
    answer = server.ask("one", headers={"X-Request-ID": "r-1"})
    server.wait(lambda: bool(server.routes()) and server.all_ran())
    [request] = server.routes()
    assert request.name == "POST /classify"
    assert request.parent is None
    assert {
        "http.request.method": "POST",
        "http.route": "/classify",
        "http.response.status_code": 200,
        "url.path": "/classify",
        "adapterd.request_id": "r-1",
        "adapterd.adapters": ("one",),
        "adapterd.versions": (server.versions["one"],),
    }.items() <= dict(request.attributes or {}).items()
    assert request.status.status_code is StatusCode.UNSET
    assert server.tree(request) == {"tokenize": {}, "queue": {}, "compute": {}}
    assert server.one("tokenize").attributes == {"adapterd.texts": 1}
    assert len(server.spans) == 5  # and the batch
    batch = server.one("batch")
    assert batch.parent is None
    assert batch.context.trace_id != request.context.trace_id
    assert [link.context.span_id for link in batch.links] == [request.context.span_id]
    assert [link.context.span_id for link in server.one("compute").links] == [batch.context.span_id]
    assert batch.attributes == {
        "adapterd.adapters": ("one",),
        "adapterd.versions": (server.versions["one"],),
        "adapterd.methods": ("lora",),
        "adapterd.requests": 1,
        "adapterd.rows": 1,
        "adapterd.tokens": answer.json()["usage"]["tokens"],
    }
    assert batch.resource.attributes["service.name"] == "adapterd"
    queue, compute = server.one("queue"), server.one("compute")
    assert queue.end_time == compute.start_time == batch.start_time
    assert compute.end_time == batch.end_time


def test_a_mixed_batch_is_linked_with_all_its_requests(server: Traced, gate: threading.Event) -> None:
    server.warm_up("one", "two")
    gate.clear()
    engine = server.app.state.engine
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.ask, "one")
        server.wait(lambda: engine.snapshot().requests_running == 1)
        others = [pool.submit(server.ask, name, text="w3 w4 w5") for name in ("one", "two")]
        server.wait(lambda: engine.snapshot().requests_waiting == 2)
        gate.set()
        assert [one.result().status_code for one in (first, *others)] == [200, 200, 200]
    server.wait(lambda: len(server.routes()) == 3 and server.all_ran())
    _, mixed = sorted(server.named("batch"), key=lambda span: span.start_time or 0)
    assert mixed.attributes is not None
    assert mixed.attributes["adapterd.adapters"] == ("one", "two")
    assert mixed.attributes["adapterd.methods"] == ("ia3", "lora")
    assert mixed.attributes["adapterd.requests"] == mixed.attributes["adapterd.rows"] == 2
    linked = {link.context.span_id for link in mixed.links}
    assert len(linked) == 2
    assert linked < {span.context.span_id for span in server.routes()}
    back = [span for span in server.named("compute") if span.links[0].context.span_id == mixed.context.span_id]
    assert {span.parent.span_id for span in back if span.parent} == linked


def test_the_callers_trace_goes_on(server: Traced) -> None:
    server.warm_up("one")
    answer = server.ask("one", headers={"traceparent": f"00-{CALLER}-{SPAN}-01"})
    server.wait(lambda: bool(server.routes()) and server.all_ran())
    [request] = server.routes()
    assert request.parent is not None
    assert f"{request.context.trace_id:032x}" == CALLER
    assert f"{request.parent.span_id:016x}" == SPAN
    assert {f"{span.context.trace_id:032x}" for span in server.spans if span.name != "batch"} == {CALLER}
    assert answer.headers["traceresponse"] == f"00-{CALLER}-{request.context.span_id:016x}-01"


def test_what_the_caller_does_not_sample_leaves_nothing(server: Traced) -> None:
    server.warm_up("one")
    answer = server.ask("one", headers={"traceparent": f"00-{CALLER}-{SPAN}-00"})
    assert answer.headers["traceresponse"].startswith(f"00-{CALLER}-")
    assert not is_sampled(answer.headers["traceresponse"])
    server.ask("one")
    server.wait(lambda: bool(server.routes()) and server.all_ran())
    assert len(server.routes()) == len(server.named("batch")) == 1


def test_a_sampler_that_takes_nothing_takes_no_batches(tmp_path: Path, bert: Backbone) -> None:
    with traced(str(tmp_path / "store"), bert, ALWAYS_OFF) as server:
        server.publish("one", 1)
        assert not is_sampled(server.ask("one").headers["traceresponse"])
        server.app.state.engine.stop()  # the device's thread has told everything
        assert server.spans == ()


def test_a_batch_of_which_one_request_is_sampled_is_linked_with_that(server: Traced, gate: threading.Event) -> None:
    server.warm_up("one", "two")
    gate.clear()
    engine = server.app.state.engine
    unsampled = {"traceparent": f"00-{CALLER}-{SPAN}-00"}
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.ask, "one", headers=unsampled)]
        server.wait(lambda: engine.snapshot().requests_running == 1)
        asked += [pool.submit(server.ask, "one", headers=unsampled), pool.submit(server.ask, "two")]
        server.wait(lambda: engine.snapshot().requests_waiting == 2)
        gate.set()
        assert [one.result().status_code for one in asked] == [200, 200, 200]
    server.wait(lambda: bool(server.routes()) and server.all_ran())
    [request] = server.routes()
    assert [link.context.span_id for link in server.one("batch").links] == [request.context.span_id]
    assert (server.one("batch").attributes or {})["adapterd.requests"] == 2


def test_a_cold_adapter_is_loaded_in_the_trace_of_who_asked(s3: FaultyS3, bert: Backbone) -> None:
    with traced(s3.bucket(), bert, store_endpoint=s3.url) as server:
        version = server.publish("one", 1)
        s3.fail("GET one/versions/.*/manifest.json", Fault.REFUSE, times=1)
        assert server.ask("one").status_code == 200
        s3.heal()
        server.wait(lambda: len(server.named("compute")) == 2)  # the proof's, and the request's
        [request] = server.routes()
        load = server.one("load")
        assert load.parent is not None
        assert load.parent.span_id == request.context.span_id
        assert (load.attributes or {})["adapterd.versions"] == (version,)
        below = server.tree(load)
        assert below.keys() == {"store get", "store open", "tokenize", "queue", "compute"}
        calls = {
            str((span.attributes or {})["adapterd.store.key"]): span
            for span in server.spans
            if span.name == "store get" and span.parent and span.parent.span_id == load.context.span_id
        }
        read = calls[f"one/versions/{version}/manifest.json"]
        assert read.kind is SpanKind.CLIENT
        assert read.attributes == {
            "adapterd.store.operation": "get",
            "adapterd.store.key": f"one/versions/{version}/manifest.json",
            "adapterd.store.attempts": 2,
            "adapterd.store.outcome": "success",
        }
        tensors = calls[f"one/versions/{version}/adapter.safetensors"]
        assert (tensors.attributes or {})["adapterd.store.attempts"] == 1


def test_a_store_that_fails_is_seen_all_the_way_up(s3: FaultyS3, bert: Backbone) -> None:
    with traced(s3.bucket(), bert, store_endpoint=s3.url) as server:
        server.publish("one", 1)
        with s3.failing("GET one/versions/.*/manifest.json", Fault.REFUSE):
            assert server.ask("one").status_code == 503
        server.wait(lambda: bool(server.routes()))
        [request] = server.routes()
        [read] = [span for span in server.named("store get") if "versions" in str(span.attributes)]
        load = server.one("load")
        for span, error in ((read, "failure"), (load, "store_unavailable")):
            assert span.status.status_code is StatusCode.ERROR
            assert (span.attributes or {})["error.type"] == error
        assert request.status.status_code is StatusCode.ERROR
        assert (request.attributes or {})["http.response.status_code"] == 503
        assert "compute" not in server.tree(request)


@pytest.mark.parametrize("server", [{"streams": 1}], indirect=True)  # else another one may run it meanwhile
def test_a_request_that_never_runs_has_waited(server: Traced, gate: threading.Event) -> None:
    server.warm_up("one")
    gate.clear()
    engine = server.app.state.engine
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, "one")
        server.wait(lambda: engine.snapshot().requests_running == 1)
        assert server.ask("one", timeout_ms=500).status_code == 504
        gate.set()
        assert first.result().status_code == 200
    server.wait(lambda: len(server.routes()) == 2 and len(server.named("compute")) == 1)
    [expired] = [one for one in server.routes() if (one.attributes or {})["http.response.status_code"] == 504]
    assert server.tree(expired) == {"tokenize": {}, "queue": {}}
    [queue] = [span for span in server.named("queue") if span.context.trace_id == expired.context.trace_id]
    assert (queue.attributes or {})["error.type"] in ("cancelled", "deadline_exceeded")
    assert queue.status.status_code is StatusCode.ERROR


def test_a_batch_that_fails_says_whose_fault_it_was(server: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    server.warm_up("one")

    def fail(*_: object) -> list[Any]:
        raise RuntimeError("device lost")

    monkeypatch.setattr(Runner, "run", fail)
    assert server.ask("one").status_code == 500
    server.wait(lambda: bool(server.routes()) and server.all_ran())
    [request] = server.routes()
    assert server.tree(request) == {"tokenize": {}, "queue": {}, "compute": {}}
    assert (server.one("compute").attributes or {})["error.type"] == "internal_error"
    assert "device lost" not in str([span.to_json() for span in server.spans])


def test_shadows_belong_to_the_trace_that_they_follow(server: Traced) -> None:
    shadow = server.publish("three", 3)
    version = server.publish("three", 4, shadow=[shadow])
    assert server.ask("three").json()["version"] == version
    server.wait(lambda: bool(server.named("shadow")))
    span, [request] = server.one("shadow"), server.routes()
    assert span.parent is not None
    assert span.parent.span_id == request.context.span_id
    assert (span.attributes or {})["adapterd.versions"] == (shadow,)
    server.wait(lambda: "compute" in server.tree(span))


def test_uploads_are_traced_and_probes_are_not(server: Traced) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/v2/health/live"):
        assert "traceresponse" not in server.client.get(path).headers
    assert server.spans == ()
    assert server.client.delete("/admin/adapters/one").status_code == 200
    server.wait(lambda: bool(server.routes()))
    [request] = server.routes()
    assert request.name == "DELETE /admin/adapters/{name}"
    assert "store put" in server.tree(request)


def test_lines_of_the_log_carry_the_trace(server: Traced, caplog: pytest.LogCaptureFixture) -> None:
    assert ids() == {}
    with caplog.at_level(logging.INFO, logger="adapterd.access"):
        server.ask("nobody", headers={"traceparent": f"00-{CALLER}-{SPAN}-01"})
    [line] = [record.msg for record in caplog.records if record.name == "adapterd.access"]
    assert isinstance(line, dict)
    [request] = server.routes()
    assert (line["trace_id"], line["span_id"]) == (CALLER, f"{request.context.span_id:016x}")


def test_the_issuers_keys_are_fetched_in_the_trace() -> None:
    seen: list[str | None] = []
    memory = InMemorySpanExporter()
    tracing = OpenTelemetry([SimpleSpanProcessor(memory)], ALWAYS_ON)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["traceparent"])
            self.send_response(500)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with listening(Handler) as url:

        async def fetch() -> None:
            tokens = Tokens("issuer", "adapterd", f"{url}/keys", time.monotonic, tracing)
            with tracing.provider.get_tracer("test").start_as_current_span("request"):
                await tokens._fetch()

        asyncio.run(fetch())
    fetched, request = memory.get_finished_spans()
    assert (fetched.name, fetched.kind) == ("GET", SpanKind.CLIENT)
    assert (fetched.attributes or {})["url.full"] == f"{url}/keys"
    assert fetched.context.trace_id == request.context.trace_id
    [header] = seen
    assert header is not None
    assert header.startswith(f"00-{fetched.context.trace_id:032x}-{fetched.context.span_id:016x}-")
    assert is_sampled(header)


def test_no_password_of_an_address_is_in_a_span() -> None:
    memory = InMemorySpanExporter()
    tracing = OpenTelemetry([SimpleSpanProcessor(memory)], ALWAYS_ON)
    request = tracing.provider.get_tracer("test").start_as_current_span("request")
    with request, tracing.outgoing("GET", "https://me:secret@issuer.example:444/keys?a=b"):
        pass
    fetched, _ = memory.get_finished_spans()
    attributes = fetched.attributes or {}
    assert attributes["url.full"] == "https://issuer.example:444/keys?a=b"
    assert (attributes["server.address"], attributes["server.port"]) == ("issuer.example", 444)


# --- where spans go


OTLP = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_EXPORTER": " "}, []),
        (OTLP, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector/v1/traces"}, ["otlp"]),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ["otlp"]),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["otlp", "console"]),
        ({**OTLP, "OTEL_TRACES_EXPORTER": "console"}, ["console"]),
        ({**OTLP, "OTEL_TRACES_EXPORTER": "none"}, []),
        ({**OTLP, "OTEL_SDK_DISABLED": "TRUE"}, []),
        ({**OTLP, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, ["otlp"]),
    ],
)
def test_the_environment_says_where_spans_go(environment: dict[str, str], expected: list[str]) -> None:
    assert exporters(environment) == expected


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_TRACES_EXPORTER": "otlp,none"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[collector"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({**OTLP, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "/v1/traces"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
        ({**OTLP, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
    ],
)
def test_what_is_not_there_is_refused_by_name(environment: dict[str, str], named: str) -> None:
    with pytest.raises(BadConfiguration, match=f"^{named}: ") as error:
        exporters(environment)
    assert error.value.param == named


def test_traces_without_the_extra_end_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "server.otel")
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    assert serving.run(Settings()) == 1
    assert "pip install 'adapterd[otel]'" in capsys.readouterr().err


def test_nothing_is_loaded_or_sent_unless_asked_for(tmp_path: Path) -> None:
    code = f"""
import sys
from server.app import create_app
from server.settings import Settings
from helpers import tiny_backbone
from starlette.testclient import TestClient
with TestClient(create_app(Settings(store="memory://"), backbone=tiny_backbone("bert"))) as client:
    answer = client.post("/embed", json={{"inputs": "w1"}}, headers={{"traceparent": "00-{CALLER}-{SPAN}-01"}})
print("got", answer.status_code, answer.headers.get("traceresponse"))
unwanted = ("opentelemetry.sdk", "opentelemetry.exporter", "server.otel")
print([name for name in sys.modules if name.startswith(unwanted)])
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("got 200 None\n[]\n"), done.stdout + done.stderr


def test_a_collector_that_hangs_does_not_keep_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    exporting, healed = threading.Event(), threading.Event()

    class Hanging(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            exporting.set()
            healed.wait(PATIENCE_SECONDS)
            return SpanExportResult.SUCCESS

    monkeypatch.setattr(otel, "STOP_SECONDS", 0.01)
    tracing = OpenTelemetry([BatchSpanProcessor(Hanging())], ALWAYS_ON)
    tracing.provider.get_tracer("test").start_span("request").end()
    tracing.stop()
    assert exporting.wait(PATIENCE_SECONDS)
    assert not healed.is_set()
    healed.set()


def test_off_does_nothing() -> None:
    with OFF.span("load"), OFF.outgoing("GET", "http://nobody") as headers:
        assert headers == {}
    assert (OFF.place(), OFF.provider, OFF.answer_headers()) == (None, None, {})


# --- a collector


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of HTTP in this process, at the address that it yields."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_collector_gets_the_spans_of_a_server_at_its_end_at_the_latest(
    tmp_path: Path, bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "backbone").mkdir()
    backbone = children.save_tiny_bert(tmp_path / "backbone")
    with listening(Collector) as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "classifiers")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")  # only the end sends
        with children.serving(
            tmp_path, str(tmp_path / "store"), backbone, shutdown_delay_seconds="0", log_format="json"
        ) as server:
            answer = server.client.post(
                "/embed", json={"inputs": "w1 w2"}, headers={"traceparent": f"00-{CALLER}-{SPAN}-01"}
            )
            assert answer.status_code == 200
            assert received == []
            server.client.close()
            assert server.process.pid is not None
            os.kill(server.process.pid, signal.SIGTERM)
            server.process.join(PATIENCE_SECONDS)
            assert not server.process.is_alive()
    resources = [resource for request in received for resource in request.resource_spans]
    attributes = {one.key: one.value.string_value for one in resources[0].resource.attributes}
    assert attributes["service.name"] == "classifiers"
    assert attributes["service.version"]
    assert attributes["deployment.environment.name"] == "test"
    spans = {span.name: span for one in resources for scope in one.scope_spans for span in scope.spans}
    assert spans.keys() == {"POST /embed", "tokenize", "queue", "compute", "batch"}
    request = spans["POST /embed"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (CALLER, SPAN)
    assert answer.headers["traceresponse"] == f"00-{CALLER}-{request.span_id.hex()}-01"
    assert [link.span_id for link in spans["batch"].links] == [request.span_id]
    lines = [json.loads(line) for line in (tmp_path / "output.txt").read_text().splitlines() if line[:1] == "{"]
    [line] = [line for line in lines if line.get("path") == "/embed"]
    assert (line["trace_id"], line["span_id"]) == (CALLER, request.span_id.hex())
