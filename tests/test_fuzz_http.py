"""Requests that nobody would write, on every route: each gets an answer that the OpenAPI document describes, in the
shape of the peer that the path speaks for, and the server goes on."""

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import httpx2
import pytest
import requests
import schemathesis
from fastapi.routing import APIRoute
from hunting import MOST_FINDINGS, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import FLOATS, NUMBERS, TEXTS, changed_document, corrupt, dumped, odd_value
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
from starlette.testclient import TestClient
from test_compat import ADAPTERS, CASES, publish
from test_task_routes import pair_tokenizer, tiny_model, torch

from server.api import admin, compat, debugging, health, tasks
from server.app import create_app
from server.backbone.backbone import Backbone
from server.settings import Settings
from server.store.store import AdapterStore

ROUTES = [
    (method, route.path.replace(":path", ""))
    for router in (tasks.router, admin.router, debugging.router, health.probes, health.router, *compat.ROUTERS)
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]

FAILURES = (503, 504, 507)
"""Statuses from 500 on that a client can bring about: it asks for too much, or does not wait."""

STEADY = {"adapter": "steady", "inputs": ["w1 w2", "w9"]}


class Running(NamedTuple):
    """A server, and what its document says."""

    client: TestClient
    operations: dict[tuple[str, str], APIOperation]
    expected: Any
    """The answer to STEADY."""
    version: str

    def send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        """One request to the route of this method and path, whose answer has to be one that is documented."""
        operation = self.operations[method, path]
        answer = self.client.request(method, **request)
        documented = set(operation.definition.raw["responses"])
        status = answer.status_code
        known = {str(status), f"{status // 100}XX"} & documented
        assert known, answer.text
        assert status < 500 or status in FAILURES, answer.text
        assert answer.headers["x-request-id"]
        operation.validate_response(answer)
        if status >= 400:
            assert answer.json()["error"]
        return answer

    def is_well(self) -> None:
        """A good request is answered as ever."""
        answer = self.client.post("/classify", json=STEADY)
        assert (answer.status_code, answer.json()) == (200, self.expected)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with torch.inference_mode(False):
        backbone = Backbone(
            tiny_model("bert"), pair_tokenizer(), "tiny", device=torch.device("cpu"), dtype=torch.float32
        )
        store = AdapterStore.open("memory://")
        versions = [publish(store, backbone, name, seed) for seed, name in enumerate(ADAPTERS)]
        publish(store, backbone, "moods", 9, "steady")
    options = Settings(
        max_inputs=16,
        max_body_bytes=50_000,
        max_upload_bytes=1 << 20,
        lora_path_root=str(tmp_path_factory.mktemp("checkpoints")),
    )
    app = create_app(options, backbone=backbone, store=store)
    schema = schemathesis.openapi.from_dict(app.openapi())
    operations = {(one.ok().method.upper(), one.ok().path): one.ok() for one in schema.get_all_operations()}
    with TestClient(app, raise_server_exceptions=False) as client:
        expected = client.post("/classify", json=STEADY)
        assert expected.status_code == 200, expected.text
        yield Running(client, operations, expected.json(), versions[0])


def test_every_route_is_hunted(server: Running) -> None:
    assert set(ROUTES) == set(server.operations)


# ------------------------------------------------------------------------------------------- requests of the document

hunts = settings(max_examples=cases(3, 0.2 / len(ROUTES)), suppress_health_check=list(HealthCheck))
NAMES = st.sampled_from([*ADAPTERS, "nobody"])
TAKES_AWAY = ("DELETE", "/v1/unload_lora_adapter")


def sent(case: schemathesis.Case) -> dict[str, Any]:
    """A case as httpx sends it, byte for byte what requests would, for which it was made."""
    request = requests.Request(**case.as_transport_kwargs(base_url="http://testserver")).prepare()
    body = {} if request.body is None else {"content": request.body}
    return {"url": request.url, "headers": dict(request.headers), **body}


@cache
def strategy(operation: APIOperation, mode: GenerationMode) -> st.SearchStrategy[schemathesis.Case]:
    made: st.SearchStrategy[schemathesis.Case] = operation.as_strategy(generation_mode=mode)
    return made


@pytest.mark.parametrize(("method", "path"), ROUTES)
@hunts
@given(data=st.data())
def test_requests_made_of_the_document(method: str, path: str, server: Running, data: st.DataObject) -> None:
    operation = server.operations[method, path]
    mode = data.draw(st.sampled_from(list(GenerationMode)), "mode")
    case = data.draw(strategy(operation, mode), "case")
    if not {method, path} & set(TAKES_AWAY):  # most adapters are there
        for part, field in ((case.path_parameters, "name"), (case.path_parameters, "adapter"), (case.body, "adapter")):
            if isinstance(part, dict) and field in part and data.draw(st.booleans(), "known"):
                part[field] = data.draw(NAMES, field)
    server.send(method, path, **sent(case))
    server.is_well()


# ----------------------------------------------------------------------------------------------------- damaged bodies


def bodies(version: str) -> dict[tuple[str, str], tuple[str, Any]]:
    """Route -> (path of a request, its body) that are good ones."""
    text = {"text": "w1 w2 w3", "text_pair": "w4", "spans": []}
    common = {"truncate": True, "long": "window", "window_pooling": "mean", "routing_key": "k"}
    native: dict[str, Any] = {
        "/classify": {"adapter": "moods", "inputs": [text, "w5"], "top_k": 2, "activation": "softmax", **common},
        "/tag": {"adapter": "entities", "inputs": ["w1 w2", "w3"], "aggregation": "simple", **common},
        "/answer": {
            "adapter": "answers",
            "inputs": [{"question": "w1", "context": "w2 w3 w4"}],
            "top_k": 2,
            "max_answer_tokens": 3,
            "no_answer": True,
            **common,
        },
        "/embed": {"adapter": "vectors", "inputs": ["w1", "w2 w3"], "normalize": True, "dimensions": 4, **common},
    }
    found: dict[tuple[str, str], tuple[str, Any]] = {("POST", path): (path, body) for path, body in native.items()}
    for path, case in CASES.items():
        places = {"name": case.adapter, "adapter": case.adapter, "pipeline": "text-classification", "version": version}
        named = {"model": case.adapter} if case.inside else {}
        found["POST", path] = (path.format(**places), case.body(["w1 w2", "w3"]) | named)
    traffic = {"traffic": {version: 1.0}, "shadow": [], "note": "n", "after": 1}
    found |= {
        ("POST", "/admin/gc"): (
            "/admin/gc",
            {"adapter": "moods", "keep": 5, "min_age_seconds": 1e6, "dry_run": True},
        ),
        ("POST", "/admin/adapters/{name}/releases"): ("/admin/adapters/moods/releases", traffic),
        ("POST", "/admin/adapters/{name}/rollback"): (
            "/admin/adapters/moods/rollback",
            {"to": 1, "note": "", "after": 1},
        ),
        ("POST", "/v1/load_lora_adapter"): ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}),
        ("POST", "/v1/unload_lora_adapter"): ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    }
    return found


def damaged(body: Any, others: list[Any], seed: int) -> tuple[bytes, dict[str, str]]:
    """A body with a few things wrong with it, and the headers that go with it."""
    rng = random.Random(seed)
    document = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 2, 4))):
        document = changed_document(document, rng, others)
    if rng.random() < 0.05 and isinstance(document, dict):
        document["inputs"] = [odd_value(rng)] * rng.choice((17, 3000))
    data = dumped(document)
    types = ("application/json",) * 20 + ("text/plain", "application/json; charset=utf-16", "multipart/form-data", "")
    return corrupt(data, rng) if rng.random() < 0.1 else data, {"content-type": rng.choice(types)}


@pytest.mark.parametrize(("method", "path"), bodies(""))
def test_damaged_bodies(
    method: str, path: str, server: Running, record_property: Callable[[str, object], None]
) -> None:
    good = bodies(server.version)
    # What takes an adapter away is not told the name of one.
    others = [] if path in TAKES_AWAY else [body for _, body in good.values()]
    url, body = good[method, path]
    found, statuses = [], Counter[int]()
    for seed in range(cases(12, 0.3 / len(good))):
        content, headers = damaged(body, others, seed)
        try:
            statuses[server.send(method, path, url=url, content=content, headers=headers).status_code] += 1
            if seed % 10 == 0:
                server.is_well()
        except Exception as error:
            if len(found) < MOST_FINDINGS:
                error.add_note(f"body {seed} for {path}: {content[:300]!r}")
                found.append(error)
    record_property("statuses", dict(statuses))
    server.is_well()
    if found:
        raise ExceptionGroup("findings", found)


def test_the_bodies_that_are_damaged_are_good_ones(server: Running) -> None:
    for (method, path), (url, body) in bodies(server.version).items():
        answer = server.send(method, path, url=url, json=body)
        if path not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):  # nothing is there to load or unload
            assert answer.status_code in (200, 201, 409), answer.text


# ------------------------------------------------------------------------------------------ values that can be smaller

odd = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS + FLOATS + TEXTS) | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize("path", ["/classify", "/tag", "/answer", "/embed"])
@settings(max_examples=cases(30, 0.005), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_of_any_field_of_a_task(path: str, server: Running, data: st.DataObject) -> None:
    _, good = bodies(server.version)["POST", path]
    body = copy.deepcopy(good)
    for field in data.draw(st.lists(st.sampled_from(sorted(body)) | st.text(max_size=5), max_size=3), "fields"):
        body[field] = data.draw(odd, field)
    if data.draw(st.booleans(), "odd inputs"):
        plain = st.text() | st.sampled_from(TEXTS)
        spans = st.lists(st.lists(st.integers(-3, 30) | st.sampled_from(NUMBERS), max_size=3), max_size=18)
        keys = {"text": plain, "text_pair": plain, "spans": spans, "question": plain, "context": plain}
        item = plain | st.fixed_dictionaries({}, optional=keys)
        body["inputs"] = data.draw(item | st.lists(item, max_size=18), "inputs")
    server.send("POST", path, url=path, content=dumped(body), headers={"content-type": "application/json"})
    server.is_well()
