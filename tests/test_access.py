"""Who may do what: keys, tokens, scopes, adapters, rates; and what is told to those who may not."""

import ast
import asyncio
import hashlib
import hmac
import inspect
import json
import logging
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import FastAPI
from helpers import Sync, make_artifact, make_blueprint, random_tensors
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from typer.testing import CliRunner

from server import serving
from server.api.access import gate as gate_module
from server.api.access import keys as keys_module
from server.api.access.gate import MAX_CREDENTIAL, Gate, route_path, scope_of
from server.api.access.keys import PREFIX, KeyEntry, Keys, KeySource, digest_of, new_key
from server.api.access.principal import ANYONE, NOBODY, Principal, Scope, acting, current
from server.api.access.rate import BURST_SECONDS, Rates
from server.api.access.tokens import KEPT_SECONDS, PAUSE_SECONDS, Tokens
from server.app import create_app
from server.backbone.backbone import Backbone
from server.cli import app as commands
from server.core import ClassifyOptions, Route, TaskRequest, TextInput
from server.engine.engine import Engine
from server.engine.publishing import Upload
from server.errors import BadConfiguration, Forbidden, IssuerUnavailable, RateLimited, Unauthorized
from server.settings import Settings
from server.store.releases import Plan
from server.store.store import AdapterStore

OURS, THEIRS = "team-a-mood", "team-b-mood"

SECRETS = {name: new_key() for name in ("infer", "admin", "metrics", "all", "a", "b", "narrow", "slow")}

ENTRIES: list[dict[str, Any]] = [
    {"name": "infer", "scopes": ["infer"]},
    {"name": "admin", "scopes": ["admin"]},
    {"name": "metrics", "scopes": ["metrics"]},
    {"name": "all", "scopes": ["infer", "admin", "metrics"]},
    {"name": "a", "scopes": ["infer", "admin", "metrics"], "adapters": ["team-a-*", "shared"]},
    {"name": "b", "scopes": ["infer", "admin", "metrics"], "adapters": ["team-b-*"]},
    {"name": "narrow", "adapters": ["b-mood"]},
    {"name": "slow", "scopes": ["infer"], "requests_per_minute": 60},
]

KEYS = json.dumps([{**entry, "sha256": digest_of(SECRETS[entry["name"]])} for entry in ENTRIES])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fill(store: AdapterStore, bert: Backbone) -> None:
    blueprint = make_blueprint(bert.spec, "lora", {"r": 2, "lora_alpha": 2})
    for seed, name in enumerate((OURS, THEIRS)):
        sync = Sync(store)
        version = sync.put_version(name, make_artifact(blueprint, random_tensors(blueprint, seed)))
        sync.release(name, Plan.only(version), by="test")


def read_keys(file: Path | None, inline: str | None) -> Keys:
    keys = KeySource(file, inline).read()
    assert keys is not None
    return keys


def settings(**options: Any) -> Settings:
    return Settings(**{"api_keys": KEYS, **options})


class Served(NamedTuple):
    client: TestClient
    app: FastAPI
    clock: Clock

    def ask(self, key: str | None, method: str, path: str, **options: Any) -> Any:
        headers = {} if key is None else {"Authorization": f"Bearer {SECRETS.get(key, key)}"}
        return self.client.request(method, path, headers=headers | options.pop("headers", {}), **options)


@contextmanager
def serving_keys(bert: Backbone) -> Iterator[Served]:
    store, clock = AdapterStore.open("memory://"), Clock()
    fill(store, bert)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gate, "load", partial(Gate.load, clock=clock))
        app = create_app(settings(), backbone=bert, store=store)
    with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
        yield Served(client, app, clock)


@pytest.fixture(scope="module")
def served(bert: Backbone) -> Iterator[Served]:
    with serving_keys(bert) as made:
        yield made


@pytest.fixture(scope="module")
def mutable(bert: Backbone) -> Iterator[Served]:
    """One whose adapters come and go: whether they are there is nothing to the tests that use it."""
    with serving_keys(bert) as made:
        yield made


# --- route by route


class Case(NamedTuple):
    takes: Scope | None
    body: Mapping[str, Any] | None = None
    names: bool = True
    """Whether it names an adapter, in its path or in its body."""
    query: str = ""


INFER, ADMIN, METRICS = Scope.INFER, Scope.ADMIN, Scope.METRICS
OPEN = Case(None, names=False)
CLASSIFY = {"adapter": OURS, "inputs": "w1"}
TENSORS = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}]}

CASES: dict[str, Case] = {
    "GET /openapi.json": Case(INFER, names=False),
    "GET /docs": Case(INFER, names=False),
    "GET /docs/oauth2-redirect": Case(INFER, names=False),
    "GET /redoc": Case(INFER, names=False),
    "GET /livez": OPEN,
    "GET /readyz": OPEN,
    "GET /metrics": Case(METRICS, names=False),
    "GET /info": Case(INFER, names=False),
    "POST /classify": Case(INFER, CLASSIFY),
    "POST /tag": Case(INFER, CLASSIFY),
    "POST /answer": Case(INFER, {"adapter": OURS, "inputs": {"question": "w1", "context": "w2"}}),
    "POST /embed": Case(INFER, CLASSIFY),
    "GET /admin/adapters": Case(ADMIN, names=False),
    "POST /admin/gc": Case(ADMIN, {"adapter": OURS, "dry_run": True}),
    "PUT /admin/log-level": Case(ADMIN, {"level": "warning"}, names=False),
    "GET /admin/debug/batches": Case(ADMIN, names=False),
    "GET /admin/adapters/{name:path}/releases": Case(ADMIN),
    "POST /admin/adapters/{name:path}/releases": Case(ADMIN, {"traffic": {"0" * 64: 1.0}}),
    "POST /admin/adapters/{name:path}/rollback": Case(ADMIN, {"to": 7}),
    "GET /admin/adapters/{name:path}/versions": Case(ADMIN),
    "POST /admin/adapters/{name:path}/verify": Case(ADMIN),
    "PUT /admin/adapters/{name:path}/pin": Case(ADMIN),
    "DELETE /admin/adapters/{name:path}/pin": Case(ADMIN),
    "GET /admin/adapters/{name:path}": Case(ADMIN),
    "PUT /admin/adapters/{name:path}": Case(ADMIN),
    "DELETE /admin/adapters/{name:path}": Case(ADMIN, query="?after=7"),
    "POST /models/{name}": Case(INFER, {"inputs": "w1"}),
    "POST /models/{name}/pipeline/{pipeline}": Case(INFER, {"inputs": "w1"}),
    "GET /models/{name}/info": Case(INFER),
    "GET /models/{name}/health": Case(INFER),
    "POST /tei/predict": Case(INFER, {"model": OURS, "inputs": "w1"}),
    "POST /tei/{adapter}/predict": Case(INFER, {"inputs": "w1"}),
    "POST /tei/embed": Case(INFER, {"model": OURS, "inputs": "w1"}),
    "POST /tei/{adapter}/embed": Case(INFER, {"inputs": "w1"}),
    "GET /tei/info": Case(INFER, names=False),
    "GET /tei/{adapter}/info": Case(INFER),
    "GET /tei/health": OPEN,
    "GET /tei/{adapter}/health": Case(INFER),
    "POST /vllm/classify": Case(INFER, {"model": OURS, "input": "w1"}),
    "POST /v1/load_lora_adapter": Case(ADMIN, {"lora_name": OURS, "lora_path": "x"}),
    "POST /v1/unload_lora_adapter": Case(ADMIN, {"lora_name": OURS}),
    "POST /v1/embeddings": Case(INFER, {"model": OURS, "input": "w1"}),
    "GET /v1/models": Case(INFER, names=False),
    "GET /v1/models/{name:path}": Case(INFER),
    "GET /v2": Case(INFER, names=False),
    "GET /v2/health/live": OPEN,
    "GET /v2/health/ready": OPEN,
    "GET /v2/models/{name}": Case(INFER),
    "GET /v2/models/{name}/versions/{version}": Case(INFER),
    "GET /v2/models/{name}/ready": Case(INFER),
    "GET /v2/models/{name}/versions/{version}/ready": Case(INFER),
    "POST /v2/models/{name}/infer": Case(INFER, TENSORS),
    "POST /v2/models/{name}/versions/{version}/infer": Case(INFER, TENSORS),
}
"""Every route of the application, and what it takes."""

UPLOAD = {"files": [("files", ("adapter_config.json", b"{}"))]}


def every_route(routes: Sequence[Any]) -> Iterator[str]:
    for route in routes:
        if hasattr(route, "path"):
            yield from (f"{method} {route.path}" for method in route.methods - {"HEAD"})
        else:
            yield from every_route(route.original_router.routes)


def asked(served: Served, key: str | None, route: str) -> int:
    method, template = route.split(" ")
    path = template.replace("{name:path}", OURS).replace("{name}", OURS).replace("{adapter}", OURS)
    path = path.replace("{version}", "0" * 64).replace("{pipeline}", "text-classification")
    case = CASES[route]
    options: dict[str, Any] = {} if case.body is None else {"json": case.body}
    if route == "PUT /admin/adapters/{name:path}":
        options = UPLOAD
    status: int = served.ask(key, method, path + case.query, **options).status_code
    return status


def test_every_route_is_in_the_table(served: Served) -> None:
    assert set(every_route(served.app.router.routes)) == set(CASES)


@pytest.mark.parametrize("route", CASES)
def test_what_each_route_takes(mutable: Served, route: str) -> None:
    served = mutable
    case = CASES[route]
    method, template = route.split(" ")
    assert scope_of(method, template) is case.takes
    refused = {401, 403}
    for key in (None, f"{PREFIX}wrong"):
        assert (asked(served, key, route) == 401) is (case.takes is not None)
    for scope in Scope:
        status = asked(served, scope.value, route)
        assert status not in {401, 500}
        assert (status == 403) is (case.takes not in {None, scope}), scope
    assert asked(served, "all", route) not in refused
    if case.names:
        assert asked(served, "b", route) == 403
        assert asked(served, "a", route) not in {*refused, 500}
    if case.takes is METRICS:  # the series name all adapters
        assert asked(served, "a", route) == 403


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "//admin/adapters",
        "/admin/",
        "/admin/../classify",
        "/classify/../admin/adapters",
        "/classify/",
        "/livez/",
        "/livez/../admin/adapters",
        "/livez%0A",
        "/livez%2f..%2fadmin%2fadapters",
        "/LIVEZ",
        "/%61dmin/adapters",
        "/tei/health/",
        "/tei/health%0A",
        "/v2/repository/index",
        "/docs/anything",
    ],
)
def test_what_nobody_named_takes_admin(served: Served, path: str) -> None:
    assert served.ask(None, "GET", path).status_code == 401
    assert served.ask("infer", "GET", path).status_code == 403


@pytest.mark.parametrize("method", ["OPTIONS", "DELETE", "TRACE", "PATCH"])
def test_a_method_that_nobody_named_takes_admin(served: Served, method: str) -> None:
    for path in ("/classify", "/livez", f"/v1/models/{OURS}"):
        assert served.ask(None, method, path).status_code == 401
        assert served.ask("infer", method, path).status_code == 403


def test_head_takes_what_get_does(served: Served) -> None:
    assert served.ask(None, "HEAD", "/livez").status_code == 405
    assert served.ask(None, "HEAD", "/docs").status_code == 401
    assert served.ask("infer", "HEAD", "/docs").status_code == 200


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("", "/classify", "/classify"),
        ("/models", "/models/admin/adapters", "/admin/adapters"),
        ("/x", "/xy/classify", "/xy/classify"),
        ("/x", "/classify", "/classify"),
    ],
)
def test_a_mounted_application(root: str, path: str, found: str) -> None:
    assert route_path({"path": path, "root_path": root}) == found


def test_websockets_are_closed(served: Served) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/classify", "headers": [], "query_string": b"", "subprotocols": []}
    asyncio.run(served.app(scope, receive, send))
    assert [one["type"] for one in sent] == ["websocket.close"]


def test_what_is_about_the_whole_server_takes_a_key_that_reaches_all_adapters(served: Served) -> None:
    for key, status in (("a", 403), ("admin", 200)):
        assert served.ask(key, "PUT", "/admin/log-level", json={"level": "warning"}).status_code == status
        assert served.ask(key, "GET", "/admin/debug/batches").status_code == status


# --- refusals


SHAPED = {
    "/classify": lambda body: body["error"]["message"],
    f"/models/{OURS}": lambda body: body["error"],
    f"/tei/{OURS}/predict": lambda body: body["error"],
    "/vllm/classify": lambda body: body["error"]["message"],
    "/v1/embeddings": lambda body: body["error"]["message"],
    f"/v2/models/{OURS}/infer": lambda body: body["error"],
    "/v1/load_lora_adapter": lambda body: body["error"]["message"],
}


@pytest.mark.parametrize("path", SHAPED)
def test_refusals_look_as_the_clients_know_them(served: Served, path: str) -> None:
    nobody = served.ask(None, "POST", path)
    assert nobody.status_code == 401
    assert nobody.headers["WWW-Authenticate"] == "Bearer"
    assert "key" in SHAPED[path](nobody.json())
    known = served.ask("metrics", "POST", path)
    assert known.status_code == 403
    assert "'metrics'" in SHAPED[path](known.json())
    for answer in (nobody, known):
        assert answer.headers["X-Request-ID"]
    own = served.ask(None, "POST", path, headers={"X-Request-ID": "mine"})
    assert own.headers["X-Request-ID"] == "mine"


def test_openai_and_vllm_have_their_own_words(served: Served) -> None:
    assert served.ask(None, "POST", "/v1/embeddings").json()["error"]["code"] == "invalid_api_key"
    assert served.ask(None, "POST", "/vllm/classify").json()["error"]["type"] == "AuthenticationError"
    assert served.ask("metrics", "POST", "/vllm/classify").json()["error"]["type"] == "PermissionDeniedError"


@pytest.mark.parametrize("headers", [[], [(b"authorization", f"Bearer {SECRETS['infer']}".encode())]])
def test_refused_uploads_are_not_read(served: Served, headers: list[tuple[bytes, bytes]]) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": f"/admin/adapters/{OURS}",
        "headers": [*headers, (b"content-length", b"268435456"), (b"expect", b"100-continue")],
        "query_string": b"",
    }
    asyncio.run(served.app(scope, receive, send))
    assert sent[0]["status"] == (403 if headers else 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("X-API-Key", SECRETS["infer"])], 200),
        ([("Authorization", f"bearer   {SECRETS['infer']} ")], 200),
        ([("Authorization", SECRETS["infer"])], 401),
        ([("Authorization", f"Basic {SECRETS['infer']}")], 401),
        ([("Authorization", "Bearer"), ("X-API-Key", SECRETS["infer"])], 401),
        ([("Authorization", f"Bearer {SECRETS['infer']}")] * 2, 401),
        ([("X-API-Key", SECRETS["infer"]), ("X-API-Key", "other")], 401),
        ([("Authorization", f"Bearer {SECRETS['infer']}x")], 401),
        ([("Authorization", f"Bearer {SECRETS['infer'][:-1]}")], 401),
        ([("Authorization", f"Bearer {digest_of(SECRETS['infer'])}")], 401),
        ([("Authorization", "Bearer " + "x" * (MAX_CREDENTIAL + 1))], 401),
        ([("Authorization", b"Bearer \xff\xfe\xe4")], 401),
        ([("Authorization", "Bearer a.b.c")], 401),
    ],
)
def test_ways_to_send_a_key(served: Served, headers: list[tuple[str, Any]], status: int) -> None:
    raw = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers]
    assert served.client.get("/info", headers=raw).status_code == status


def test_one_request_does_not_act_for_the_next(served: Served) -> None:
    assert served.ask("all", "GET", "/info").status_code == 200
    assert served.ask(None, "GET", "/livez").status_code == 200
    with acting(NOBODY):
        assert current() is NOBODY
    assert current() is ANYONE


# --- other tenants


def test_lists_do_not_tell_of_other_tenants(served: Served) -> None:
    for key, own, other in (("a", OURS, THEIRS), ("b", THEIRS, OURS)):
        listed = served.ask(key, "GET", "/admin/adapters").text + served.ask(key, "GET", "/v1/models").text
        assert own in listed
        assert other not in listed
    both = served.ask("all", "GET", "/admin/adapters").text
    assert OURS in both
    assert THEIRS in both


def test_suggestions_do_not_tell_of_other_tenants(served: Served) -> None:
    for key in ("infer", "a"):
        answer = served.ask(key, "POST", "/classify", json={"adapter": "team-a-moood", "inputs": "w1"})
        assert answer.status_code == 404
        assert f"did you mean '{OURS}'" in answer.json()["error"]["message"]
    everybody = served.ask("infer", "POST", "/classify", json={"adapter": "b-mood", "inputs": "w1"})
    assert f"did you mean '{THEIRS}'" in everybody.json()["error"]["message"]
    narrow = served.ask("narrow", "POST", "/classify", json={"adapter": "b-mood", "inputs": "w1"})
    assert narrow.status_code == 404
    assert "mean" not in narrow.json()["error"]["message"]


def test_an_adapter_out_of_reach_looks_like_one_that_is_not_there(served: Served) -> None:
    there, missing = (
        served.ask("b", "POST", "/classify", json={"adapter": name, "inputs": "w1"}) for name in (OURS, "team-a-none")
    )
    assert there.status_code == missing.status_code == 403
    body = there.json()["error"] | {"request_id": None}
    assert body["message"].replace(OURS, "team-a-none") == missing.json()["error"]["message"]


def test_fan_out_with_one_adapter_out_of_reach(served: Served) -> None:
    both = {"adapters": [OURS, THEIRS], "inputs": "w1"}
    assert served.ask("a", "POST", "/classify", json=both).status_code == 403
    assert served.ask("infer", "POST", "/classify", json=both).status_code == 200


def test_garbage_of_all_takes_a_key_of_all(served: Served) -> None:
    for key, status in (("a", 403), ("admin", 200)):
        assert served.ask(key, "POST", "/admin/gc", json={"dry_run": True}).status_code == status
    assert served.ask("a", "POST", "/admin/gc", json={"adapter": THEIRS, "dry_run": True}).status_code == 403


def test_probes_tell_nothing_of_adapters(served: Served) -> None:
    for name in (OURS, "team-a-moood"):
        for answer in (
            served.ask(None, "GET", f"/tei/health?adapter={name}"),
            served.ask(None, "GET", "/tei/health", headers={"adapter": name}),
        ):
            assert answer.status_code == 403
            assert OURS not in answer.text or name == OURS
    assert served.ask(None, "GET", f"/tei/{OURS}/health").status_code == 401


ENTRANCES: dict[str, dict[str, Any]] = {
    "run": {
        "request": TaskRequest(
            route=Route.CLASSIFY, adapters=(OURS,), inputs=(TextInput("w1"),), options=ClassifyOptions(), routing_key=""
        )
    },
    "publish": {"name": OURS, "upload": Upload([]), "by": ""},
    "release": {"name": OURS, "plan": Plan.only("0" * 64), "by": "", "note": "", "after": None},
    "rollback": {"name": OURS, "to": None, "by": "", "note": "", "after": None},
    "delete": {"name": OURS, "by": "", "note": "", "after": None},
    "verify": {"name": OURS, "version": None},
    "pin": {"name": OURS},
    "unpin": {"name": OURS},
    "describe": {"name": OURS},
    "profile": {"name": OURS},
    "collect": {"name": None, "keep": 1, "min_age": timedelta(0), "dry_run": True},
    "versions": {"name": OURS},
    "history": {"name": OURS, "before": None, "limit": 1},
}
"""Every coroutine of the engine that is about an adapter, and what to call it with."""


def test_every_entrance_of_the_engine_asks_who_it_is(served: Served) -> None:
    methods = {name for name, _ in inspect.getmembers(Engine, inspect.iscoroutinefunction) if not name.startswith("_")}
    assert methods == {*ENTRANCES, "page", "warmed"}  # the last is about no adapter
    engine = served.app.state.engine

    async def ask(name: str) -> None:
        await getattr(engine, name)(**ENTRANCES[name])

    with acting(NOBODY):
        for name in ENTRANCES:
            with pytest.raises(Forbidden):
                asyncio.run(ask(name))
        page = asyncio.run(engine.page(limit=9))
    assert (page.adapters, page.damaged, page.next) == ([], [], None)


def test_another_tenants_version_cannot_be_released_or_asked_for(served: Served) -> None:
    asked = {"adapter": THEIRS, "inputs": "w1"}
    version = served.ask("b", "POST", "/classify", json=asked).json()["version"]  # which is in memory now
    for method, path, body in (
        ("POST", f"/admin/adapters/{OURS}/releases", {"traffic": {version: 1.0}}),
        ("POST", "/classify", {"adapter": OURS, "inputs": "w1", "version": version}),
        ("GET", f"/v2/models/{OURS}/versions/{version}", None),
    ):
        assert served.ask("a", method, path, json=body).status_code == 404
    assert served.ask("b", "POST", "/classify", json=asked | {"version": version}).status_code == 200


def test_releases_say_who_made_them(served: Served) -> None:
    assert served.ask("b", "DELETE", f"/admin/adapters/{THEIRS}?note=x").status_code == 200
    assert served.ask("b", "POST", f"/admin/adapters/{THEIRS}/rollback").json()["by"] == "http b"


# --- rates


def test_a_rate_over_http(served: Served) -> None:
    def ask() -> Any:
        return served.ask("slow", "GET", "/info")

    burst = [ask() for _ in range(11)]
    assert [one.status_code for one in burst] == [200] * 10 + [429]
    told = int(burst[-1].headers["Retry-After"])
    assert burst[-1].json()["error"]["code"] == "rate_limited"
    served.clock.now += told
    assert [ask().status_code for _ in range(2)] == [200, 429]
    served.clock.now += 5
    assert [ask().status_code for _ in range(6)] == [200] * 5 + [429]
    assert served.ask("infer", "GET", "/info").status_code == 200
    served.clock.now += 1000
    assert [ask().status_code for _ in range(11)] == [200] * 10 + [429]


def refused(rates: Rates, caller: Principal) -> int | None:
    """Asks; None, or the seconds after which to come back."""
    try:
        rates.spend(caller)
    except RateLimited as error:
        return error.retry_after
    return None


@given(
    rate=st.integers(1, 5000),
    steps=st.lists(st.one_of(st.just(0.0), st.floats(0, 0.5), st.floats(0, 90)), min_size=1, max_size=150),
)
def test_never_more_than_the_rate_and_a_burst(rate: int, steps: list[float]) -> None:
    clock = Clock()
    rates, caller = Rates(clock), Principal("x", frozenset(), requests_per_minute=rate)
    burst = max(1.0, BURST_SECONDS * rate / 60)
    passed: list[float] = []
    for step in steps:
        clock.now += step
        told = refused(rates, caller)
        if told is None:
            passed.append(clock.now)
    for first, start in enumerate(passed):
        for last in range(first, len(passed)):
            assert last - first + 1 <= (passed[last] - start) * rate / 60 + burst + 1e-3


def test_a_whole_burst_is_allowed() -> None:
    for rate in (1, 6, 59, 60, 600, 4321):
        rates, caller = Rates(Clock()), Principal("x", frozenset(), requests_per_minute=rate)
        for _ in range(max(1, int(BURST_SECONDS * rate / 60))):
            rates.spend(caller)
        with pytest.raises(RateLimited):
            rates.spend(caller)


@pytest.mark.parametrize("rate", [1, 7, 60, 600])
def test_who_comes_back_when_told_gets_through(rate: int) -> None:
    clock = Clock()
    rates, caller = Rates(clock), Principal("x", frozenset(), requests_per_minute=rate)
    for _ in range(50):
        while (told := refused(rates, caller)) is None:
            clock.now += 0.01
        clock.now += told
        assert refused(rates, caller) is None


# --- keys


GOOD = {"name": "x", "sha256": "0" * 64}
SECRET = "adk_this-is-a-secret"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (SECRET, "no JSON list"),
        (f'["{SECRET}"]', "0: "),
        (f'{{"{SECRET}": ["infer"]}}', "array"),
        (json.dumps([GOOD, {"name": "y"}]), "1.sha256: "),
        (json.dumps([{**GOOD, "sha256": SECRET}]), "0.sha256: "),
        (json.dumps([{**GOOD, "name": f"{SECRET} "}]), "0.name: "),
        (json.dumps([{**GOOD, "name": "jwt:x"}]), "0.name: "),
        (json.dumps([{**GOOD, "scopes": [SECRET]}]), "0.scopes.0: "),
        (json.dumps([{**GOOD, "scopes": []}]), "0.scopes: "),
        (json.dumps([{**GOOD, "adapters": []}]), "0.adapters: "),
        (json.dumps([{**GOOD, "requests_per_minute": 0}]), "0.requests_per_minute: "),
        (json.dumps([{**GOOD, SECRET: SECRET}]), "0: "),
        (json.dumps([GOOD, {**GOOD, "sha256": "1" * 64}]), "API key 1: another one has the same name"),
        (json.dumps([GOOD, {**GOOD, "name": "y"}]), "API key 1: another one has the same sha256"),
    ],
)
def test_wrong_keys_are_named_by_place_and_never_by_value(tmp_path: Path, text: str, place: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    for load in (lambda: read_keys(file, None), lambda: read_keys(None, text)):
        with pytest.raises(BadConfiguration) as error:
            load()
        assert place in error.value.message
        assert SECRET not in error.value.message


def test_a_keys_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match=r"keys\.json"):
        read_keys(tmp_path / "keys.json", None)


def test_keys_of_file_and_environment_together(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    one, two = new_key(), new_key()
    file.write_text(json.dumps([{"name": "one", "sha256": digest_of(one)}]))
    keys = read_keys(file, json.dumps([{"name": "two", "sha256": digest_of(two)}]))
    assert [keys.find(key).name for key in (one, two)] == ["one", "two"]
    assert keys.find(new_key()) is None


def test_digests_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    keys = Keys([KeyEntry(name=str(index), sha256=digest_of(str(index))) for index in range(3)])
    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    assert keys.find("0") is not None
    assert len(compared) == 3, "all are compared, also behind the one that fits"
    source = ast.parse(Path(keys_module.__file__).read_text())
    [find] = [node for node in ast.walk(source) if isinstance(node, ast.FunctionDef) and node.name == "find"]
    assert not any(isinstance(node, ast.Eq) for node in ast.walk(find))


# --- the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands, list(arguments))


def test_a_key_and_its_entry() -> None:
    options = ["--scope", "infer", "--scope", "admin", "--adapters", "team-a-*", "--requests-per-minute", "600"]
    done = run("key", "bob", *options)
    secret, entry = done.stdout.splitlines()
    assert json.loads(entry) == {
        "name": "bob",
        "sha256": digest_of(secret),
        "scopes": ["infer", "admin"],
        "adapters": ["team-a-*"],
        "requests_per_minute": 600,
    }
    who = read_keys(None, f"[{entry}]").find(secret)
    assert who == Principal("bob", frozenset({Scope.INFER, Scope.ADMIN}), ("team-a-*",), 600)


def test_a_key_added_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secrets = [run("key", name, "--file", str(file)).stdout.strip() for name in ("ann", "bob")]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]
    keys = read_keys(file, None)
    assert [keys.find(secret).name for secret in secrets] == ["ann", "bob"]
    assert not any(secret in file.read_text() for secret in secrets)
    before = file.read_bytes()
    again = run("key", "bob", "--file", str(file))
    assert again.exit_code == 1
    assert PREFIX not in again.output
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a b"], "name"),
        (["x", "--scope", "root"], "scopes.0"),
        (["x", "--requests-per-minute", "-1"], "requests_per_minute"),
        (["x", "--requests-per-minute", "0"], "requests_per_minute"),
    ],
)
def test_a_key_that_makes_no_sense(arguments: list[str], said: str) -> None:
    done = run("key", *arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert PREFIX not in done.output


def test_a_file_that_is_none_of_keys_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not keys")
    assert run("key", "x", "--file", str(file)).exit_code == 1
    assert file.read_text() == "not keys"
    assert run("key", "x", "--file", str(tmp_path / "none" / "keys.json")).exit_code == 1


@pytest.mark.parametrize("key", ["", "a b", "ä", "a\nb"])
def test_a_clients_key_that_cannot_be_sent_is_not_echoed(key: str) -> None:
    done = run("adapters", "list", "--url", "http://127.0.0.1:1", "--api-key", key)
    assert done.exit_code == 2
    assert not key.strip() or key not in done.output


@pytest.mark.parametrize("by", ["option", "environment"])
@pytest.mark.parametrize(("command", "status"), [("adapters list", 0), ("evaluate --adapter x --data", 1)])
def test_commands_send_the_key(
    by: str, command: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command.split()
    if arguments[-1] == "--data":
        data = tmp_path / "rows.jsonl"
        data.write_text('{"text": "w1", "label": "ant"}\n')
        arguments.append(str(data))
    sent: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"adapters": [], "damaged": [], "next": null}')

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    if by == "environment":
        monkeypatch.setenv("ADAPTERD_API_KEY", SECRETS["admin"])
    more = ["--api-key", SECRETS["admin"]] if by == "option" else []
    done = run(*arguments, "--url", f"http://127.0.0.1:{server.server_port}", *more)
    thread.join()
    server.server_close()
    assert (done.exit_code, sent) == (status, [f"Bearer {SECRETS['admin']}"])
    assert SECRETS["admin"] not in done.output


# --- start


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start leaves the tests' logging alone."""
    monkeypatch.setattr(serving.logs, "configure", lambda *_: None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
@pytest.mark.usefixtures("quiet")
def test_an_open_server_listens_to_this_machine_alone(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadConfiguration, match="ADAPTERD_API_KEYS_FILE"):
        Gate.load(Settings(host=host))
    assert not Gate.load(Settings(host=host, insecure=True)).closed
    assert Gate.load(settings(host=host)).closed
    assert serving.run(Settings(host=host, backbone="/nowhere", store="memory://")) == 1
    assert "ADAPTERD_INSECURE=true" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"api_keys": "[]"}, {"api_keys": ""}, {"api_keys_file": ""}])
def test_no_keys_at_all_do_not_open_the_server(options: dict[str, str]) -> None:
    with pytest.raises(BadConfiguration):
        Gate.load(Settings(**options))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_an_open_server_on_the_loopback(host: str) -> None:
    assert not Gate.load(Settings(host=host)).closed


def test_without_keys_everybody_may_do_everything(bert: Backbone) -> None:
    store = AdapterStore.open("memory://")
    fill(store, bert)
    with TestClient(create_app(Settings(), backbone=bert, store=store)) as client:
        assert client.get("/admin/adapters", headers={"Authorization": "Bearer whatever"}).status_code == 200
        assert client.post("/classify", json=CLASSIFY).status_code == 200
        assert client.get(f"/tei/{OURS}/health").status_code == 200
        deleted = client.delete(f"/admin/adapters/{OURS}")
        assert deleted.status_code == 200
        assert client.get(f"/admin/adapters/{OURS}/releases").json()["releases"][0]["by"] == "http"


# --- tokens


class Issuer:
    """An OpenID Connect issuer's keys, over HTTP."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.fetches = 0
        self.broken = False
        self.kid = "one"
        self.more: list[dict[str, Any]] = []
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                public = jwt.algorithms.RSAAlgorithm.to_jwk(issuer.key.public_key(), as_dict=True)
                body = json.dumps({"keys": [{**public, "kid": issuer.kid, "use": "sig", "alg": "RS256"}, *issuer.more]})
                self.send_response(500 if issuer.broken else 200)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def token(self, *, headers: Mapping[str, Any] | None = None, key: Any = None, **changes: Any) -> str:
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": "adapterd",
            "sub": "alice",
            "exp": now + 600,
            "iat": now,
            "scope": "openid adapterd:infer",
        } | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, key or self.key, algorithm="RS256", headers={"kid": self.kid, **(headers or {})})


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def tokens(issuer: Issuer, clock: Clock) -> Tokens:
    return Tokens(issuer.url, "adapterd", f"{issuer.url}/.well-known/jwks.json", clock)


def ask(tokens: Tokens, token: str) -> Principal:
    return asyncio.run(tokens.principal(token))


def test_a_token_says_who_and_what(issuer: Issuer) -> None:
    checker = tokens(issuer, Clock())
    assert ask(checker, issuer.token()) == Principal("jwt:alice", frozenset({Scope.INFER}), ("*",))
    more = issuer.token(scope=None, scp=["adapterd:admin", "adapterd:metrics"], adapterd_adapters=["team-a-*"])
    assert ask(checker, more) == Principal("jwt:alice", frozenset({Scope.ADMIN, Scope.METRICS}), ("team-a-*",))
    assert ask(checker, issuer.token(scope=None)).scopes == frozenset()
    assert ask(checker, issuer.token(scope={"adapterd:admin": 1})).scopes == frozenset()
    assert not ask(checker, issuer.token(adapterd_adapters=[])).reaches(OURS)
    assert issuer.fetches == 1


def signed_with_secret(issuer: Issuer, secret: bytes, **header: str) -> str:
    """HMAC, whatever the header says."""
    payload = issuer.token().split(".")[1]
    first = jwt.utils.base64url_encode(json.dumps(header).encode()).decode()
    signature = hmac.new(secret, f"{first}.{payload}".encode(), hashlib.sha256).digest()
    return f"{first}.{payload}.{jwt.utils.base64url_encode(signature).decode()}"


def public_key_as_secret(issuer: Issuer) -> str:
    pem = issuer.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return signed_with_secret(issuer, pem, alg="HS256", kid=issuer.kid)


def unsigned(issuer: Issuer) -> str:
    claims = {"iss": issuer.url, "aud": "adapterd", "sub": "alice", "exp": int(time.time()) + 600}
    return jwt.encode(claims, None, algorithm="none", headers={"kid": issuer.kid})


def other_key(issuer: Issuer) -> str:
    return issuer.token(key=rsa.generate_private_key(public_exponent=65537, key_size=2048))


BAD_TOKENS = {
    "expired": lambda issuer: issuer.token(exp=int(time.time()) - 60),
    "never expires": lambda issuer: issuer.token(exp=None),
    "not yet": lambda issuer: issuer.token(nbf=int(time.time()) + 600),
    "another audience": lambda issuer: issuer.token(aud="other"),
    "no audience": lambda issuer: issuer.token(aud=None),
    "another issuer": lambda issuer: issuer.token(iss="https://other.example"),
    "no sub": lambda issuer: issuer.token(sub=None),
    "empty sub": lambda issuer: issuer.token(sub=""),
    "sub of two lines": lambda issuer: issuer.token(sub="alice\nbob"),
    "long sub": lambda issuer: issuer.token(sub="x" * 1000),
    "adapters are no list": lambda issuer: issuer.token(adapterd_adapters="*"),
    "unknown kid": lambda issuer: issuer.token(headers={"kid": "other"}),
    "no kid": lambda issuer: issuer.token(headers={"kid": ""}),
    "another key": other_key,
    "alg none": unsigned,
    "public key as secret": public_key_as_secret,
    "a changed claim": lambda issuer: issuer.token().replace(".", ".e", 1),
    "no token": lambda issuer: "a.b.c",
}


@pytest.mark.parametrize("bad", BAD_TOKENS)
def test_bad_tokens(issuer: Issuer, bad: str) -> None:
    with pytest.raises(Unauthorized) as error:
        ask(tokens(issuer, Clock()), BAD_TOKENS[bad](issuer))
    assert "alice" not in error.value.message


@pytest.mark.parametrize("said", ["HS256", "RS256"])
def test_shared_secrets_of_an_issuer_are_not_used(issuer: Issuer, said: str) -> None:
    secret = b"a secret that an issuer should not have published"
    known = jwt.utils.base64url_encode(secret).decode()
    issuer.more = [{"kty": "oct", "kid": "shared", "k": known, "alg": "HS256"}]
    with pytest.raises(Unauthorized):
        ask(tokens(issuer, Clock()), signed_with_secret(issuer, secret, alg=said, kid="shared"))


def test_unknown_keys_do_not_make_the_server_ask_each_time(issuer: Issuer) -> None:
    clock = Clock()
    checker = tokens(issuer, clock)
    for index in range(5):
        with pytest.raises(Unauthorized):
            ask(checker, issuer.token(headers={"kid": f"made-up-{index}"}))
    assert issuer.fetches == 1
    issuer.kid = "two"  # the issuer has a new key
    with pytest.raises(Unauthorized):
        ask(checker, issuer.token())
    clock.now += PAUSE_SECONDS
    assert ask(checker, issuer.token()).name == "jwt:alice"
    assert issuer.fetches == 2


def test_an_issuer_that_is_down(issuer: Issuer) -> None:
    clock = Clock()
    checker, issuer.broken = tokens(issuer, clock), True
    for _ in range(3):
        with pytest.raises(IssuerUnavailable):
            ask(checker, issuer.token())
    assert issuer.fetches == 1
    issuer.broken = False
    clock.now += PAUSE_SECONDS
    assert ask(checker, issuer.token()).name == "jwt:alice"
    issuer.broken = True
    clock.now += KEPT_SECONDS
    assert ask(checker, issuer.token()).name == "jwt:alice", "old keys are good while there are no others"
    assert issuer.fetches == 3


def test_a_key_that_the_issuer_withdrew(issuer: Issuer) -> None:
    clock = Clock()
    checker, old = tokens(issuer, clock), issuer.token()
    assert ask(checker, old).name == "jwt:alice"
    issuer.kid = "two"
    clock.now += KEPT_SECONDS
    with pytest.raises(Unauthorized):
        ask(checker, old)


def test_tokens_over_http(issuer: Issuer, bert: Backbone) -> None:
    store = AdapterStore.open("memory://")
    fill(store, bert)
    options = Settings(jwt_issuer=issuer.url, jwt_audience="adapterd", host="0.0.0.0")
    with TestClient(create_app(options, backbone=bert, store=store), raise_server_exceptions=False) as client:

        def status(**claims: Any) -> int:
            headers = {"Authorization": f"Bearer {issuer.token(**claims)}"}
            return client.post("/classify", json=CLASSIFY, headers=headers).status_code

        assert client.post("/classify", json=CLASSIFY).status_code == 401
        assert status() == 200
        assert status(scope="adapterd:admin") == 403
        assert status(adapterd_adapters=["team-b-*"]) == 403
        assert status(exp=1) == 401


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jwt_issuer": "https://a.example"}, "ADAPTERD_JWT_AUDIENCE"),
        ({"jwt_audience": "x"}, "ADAPTERD_JWT_ISSUER"),
        ({"jwt_issuer": "http://a.example", "jwt_audience": "x"}, "https"),
        ({"jwt_issuer": "https://a.example", "jwt_audience": "x", "jwt_jwks_url": "file:///etc/passwd"}, "https"),
    ],
)
def test_an_issuer_that_cannot_be_trusted(options: dict[str, str], said: str) -> None:
    with pytest.raises(BadConfiguration, match=said):
        Gate.load(settings(**options))


# --- logs


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, logger: str) -> list[dict[str, Any]]:
        return [record.msg for record in self.records if record.name == logger and isinstance(record.msg, dict)]

    @property
    def text(self) -> str:
        return "\n".join(f"{vars(record)} {record.getMessage()}" for record in self.records)


@pytest.fixture
def lines() -> Iterator[Lines]:
    root, handler = logging.getLogger(), Lines()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.setLevel(level)
    root.removeHandler(handler)


def test_every_admin_action_has_a_line(served: Served, lines: Lines) -> None:
    note = "a note that nobody needs in a log"
    asked = {"headers": {"X-Request-ID": "r-1"}}
    served.ask("b", "POST", f"/admin/adapters/{THEIRS}/rollback", json={"to": 1, "note": note}, **asked)
    served.ask("b", "DELETE", f"/admin/adapters/{OURS}", **asked)
    served.ask("infer", "GET", "/admin/adapters", **asked)
    served.ask(None, "POST", "/v1/unload_lora_adapter", json={"lora_name": OURS}, **asked)
    served.ask("a", "POST", "/v1/unload_lora_adapter", json={"lora_name": THEIRS}, **asked)
    served.ask("b", "POST", "/classify", json={"adapter": THEIRS, "inputs": "w1"}, **asked)
    audited = lines.of("adapterd.audit")
    fields = ("method", "path", "adapters", "key", "outcome", "status")
    assert [tuple(one[field] for field in fields) for one in audited] == [
        ("POST", f"/admin/adapters/{THEIRS}/rollback", [THEIRS], "b", "done", 201),
        ("DELETE", f"/admin/adapters/{OURS}", [OURS], "b", "refused", 403),
        ("GET", "/admin/adapters", [], "infer", "refused", 403),
        ("POST", "/v1/unload_lora_adapter", [], None, "refused", 401),
        ("POST", "/v1/unload_lora_adapter", [THEIRS], "a", "refused", 403),
    ]
    assert audited[0]["route"] == "/admin/adapters/{name:path}/rollback"
    assert {one["request_id"] for one in audited} == {"r-1"}
    assert note not in lines.text
    assert [one["key"] for one in lines.of("adapterd.access")] == ["b", "b", "infer", None, "a", "b"]


def test_the_audit_log_does_not_depend_on_the_level(served: Served) -> None:
    assert logging.getLogger("adapterd.audit").isEnabledFor(logging.INFO)


def test_logs_carry_no_secrets_and_no_texts(served: Served, lines: Lines, issuer: Issuer, bert: Backbone) -> None:
    text = "w1 w2 confidential"
    wrong = new_key()
    for key in (*SECRETS, wrong):
        served.ask(key, "POST", "/classify", json={"adapter": OURS, "inputs": text})
        served.ask(key, "POST", "/classify", json={"adapter": OURS, "inputs": [text, 7]})
        served.ask(key, "POST", "/tag", json={"adapter": OURS, "inputs": text})
        served.ask(key, "PUT", f"/admin/adapters/{OURS}", **UPLOAD)
        served.ask(key, "GET", "/admin/adapters", headers={"X-API-Key": SECRETS["all"]})
        served.ask(key, "GET", "/nothing")
    checker, token = tokens(issuer, Clock()), issuer.token()
    ask(checker, token)
    for bad in (issuer.token(exp=1), issuer.token(aud="x")):
        with pytest.raises(Unauthorized):
            ask(checker, bad)
        assert bad.split(".")[2] not in lines.text
    assert len(lines.of("adapterd.access")) > len(SECRETS)
    for secret in (*SECRETS.values(), wrong, token.split(".")[2], "confidential", "Bearer", "authorization"):
        assert secret not in lines.text
    for secret in SECRETS.values():
        assert digest_of(secret) not in lines.text


def test_settings_do_not_show_keys() -> None:
    shown = repr(settings(ssl_certfile="x", ssl_keyfile_password="hunter2"))
    assert "sha256" not in shown
    assert "hunter2" not in shown


# --- keys that change while the server runs


def entries(*names: str) -> str:
    return json.dumps(
        [{**entry, "sha256": digest_of(SECRETS[entry["name"]])} for entry in ENTRIES if entry["name"] in names]
    )


def put_in_place(folder: Path, text: str) -> None:
    """As Kubernetes changes a volume of a Secret: the file is a link into a folder that is swapped."""
    revision = folder / f"..{uuid4().hex}"
    revision.mkdir()
    (revision / "keys.json").write_text(text)
    (folder / "..next").symlink_to(revision.name)
    (folder / "..next").replace(folder / "..data")
    if not (folder / "keys.json").is_symlink():
        (folder / "keys.json").symlink_to("..data/keys.json")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_each_state_of_the_keys_file_is_told_once(tmp_path: Path) -> None:
    source = KeySource(tmp_path / "keys.json", json.dumps([{**GOOD, "name": "beside"}]))
    for text in (None, "[", entries("a"), "[]", None, entries("a", "b")):
        (tmp_path / "keys.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "keys.json").write_text(text)
        if text is None or text == "[":
            with pytest.raises(BadConfiguration, match=r"keys\.json"):
                source.read()
        else:
            keys = source.read()
            assert keys is not None
            assert keys.names == {"beside", *(entry["name"] for entry in json.loads(text))}
        assert source.read() is None


def test_keys_of_the_environment_do_not_change() -> None:
    assert KeySource(Path("keys.json"), None).may_change
    assert not KeySource(None, KEYS).may_change


@pytest.fixture
def changing(tmp_path: Path, bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Its keys, of which `all` is in the environment, are in tmp_path."""
    put_in_place(tmp_path, entries("infer", "slow"))
    monkeypatch.setattr(gate_module, "FOLLOW_SECONDS", 0.005)
    clock = Clock()
    monkeypatch.setattr(Gate, "load", partial(Gate.load, clock=clock))
    given = settings(api_keys=entries("all"), api_keys_file=str(tmp_path / "keys.json"))
    app = create_app(given, backbone=bert, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Served(client, app, clock)


def lets_in(served: Served) -> set[str]:
    """The keys that may ask for something."""
    statuses = {key: served.ask(key, "GET", "/info").status_code for key in ("infer", "all", "a", "narrow")}
    assert set(statuses.values()) <= {200, 401}
    return {key for key, status in statuses.items() if status == 200}


def usable(served: Served) -> bool:
    return "\nadapterd_api_keys_last_reload_successful 1.0\n" in served.ask("all", "GET", "/metrics").text


def test_keys_come_and_go_with_their_file(changing: Served, tmp_path: Path) -> None:
    assert lets_in(changing) == {"infer", "all"}
    put_in_place(tmp_path, entries("a", "slow"))
    wait_until(lambda: lets_in(changing) == {"a", "all"})
    assert usable(changing)


@pytest.mark.parametrize("broken", ["[", "", "{}", json.dumps([{"name": "a"}]), None])
def test_a_keys_file_that_breaks_leaves_the_keys_as_they_were(
    changing: Served, lines: Lines, tmp_path: Path, broken: str | None
) -> None:
    if broken is None:
        (tmp_path / "..data").unlink()
    else:
        put_in_place(tmp_path, broken)
    wait_until(lambda: not usable(changing))
    assert lets_in(changing) == {"infer", "all"}
    [told] = [line for line in lines.of("adapterd.access") if "those from before stay" in line["event"]]
    assert "keys.json" in told["error"]
    put_in_place(tmp_path, entries("narrow"))
    wait_until(lambda: usable(changing))
    assert lets_in(changing) == {"narrow", "all"}


def test_a_server_whose_last_key_is_withdrawn_is_closed(
    tmp_path: Path, bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(tmp_path, entries("all"))
    monkeypatch.setattr(gate_module, "FOLLOW_SECONDS", 0.005)
    given = Settings(api_keys_file=str(tmp_path / "keys.json"))
    app = create_app(given, backbone=bert, store=AdapterStore.open("memory://"))
    with TestClient(app) as client:
        served = Served(client, app, Clock())
        assert lets_in(served) == {"all"}
        put_in_place(tmp_path, "[]")
        wait_until(lambda: lets_in(served) == set())
        assert client.get("/info").status_code == 401
        assert client.get("/livez").status_code == 200
        put_in_place(tmp_path, entries("narrow"))
        wait_until(lambda: lets_in(served) == {"narrow"})


def test_a_key_that_stays_keeps_its_rate(changing: Served, tmp_path: Path) -> None:
    asked = [changing.ask("slow", "GET", "/info").status_code for _ in range(11)]
    assert asked == [200] * 10 + [429]
    put_in_place(tmp_path, entries("a", "slow"))
    wait_until(lambda: "a" in lets_in(changing))
    assert changing.ask("slow", "GET", "/info").status_code == 429
    changing.clock.now += 1
    assert changing.ask("slow", "GET", "/info").status_code == 200


# --- TLS


def test_tls_options_without_a_certificate() -> None:
    with pytest.raises(ValueError, match="ADAPTERD_SSL_KEYFILE"):
        Settings(ssl_keyfile="x")


@pytest.mark.usefixtures("quiet")
def test_a_certificate_that_is_not_there(bert: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(serving, "create_app", lambda _: FastAPI())
    assert serving.run(Settings(ssl_certfile="/nowhere.pem")) == 1
    assert "ssl_certfile" in capsys.readouterr().err
