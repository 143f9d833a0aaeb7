"""The life of an adapter over HTTP: reports, releases, canaries, shadows, roll-backs, gates, pins, garbage."""

import asyncio
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from helpers import VOCABULARY, Sync, build, run
from starlette.testclient import TestClient
from test_http import classify, own_adapter, own_files, put, refused

from server.app import create_app
from server.backbone.backbone import Backbone
from server.engine.loading import Checker
from server.engine.runner import Runner
from server.settings import Settings
from server.store.artifact import Artifact, Golden, Training
from server.store.releases import Plan
from server.store.store import AdapterStore
from server.tasks import TASKS
from server.tasks.head import BIAS

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
TEXTS = ["w1 w2 w3", "w9", "w4 w4 w20 w33"]
ADMIN = "/admin/adapters"
TRAINING = Training(data_sha256="0" * 64, rows=1, hyperparameters={})


def version_of(backbone: Backbone, seed: int, labels: tuple[str, ...] = ("a", "b"), **manifest: Any) -> Artifact:
    """A random adapter whose labels are all given to some of the words."""
    made = own_adapter(backbone, "lora", LORA, list(labels), seed, **manifest)
    words = backbone.tokenizer.encode([f"w{index}" for index in range(VOCABULARY - 4)], truncate=True)
    adapter = build(made, backbone)
    with torch.inference_mode():
        outputs = torch.stack([answer.logits for answer in run(backbone, [(word, adapter) for word in words])])
    tensors = {**made.tensors, BIAS: made.tensors[BIAS] - outputs.median(0).values}
    return Artifact.build(made.manifest, tensors)


@pytest.fixture
def store() -> AdapterStore:
    return AdapterStore.open("memory://")


@pytest.fixture
def app(bert: Backbone, store: AdapterStore) -> FastAPI:
    return create_app(Settings(), backbone=bert, store=store)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def upload(client: TestClient, name: str, artifact: Artifact, *, query: str = "", **form: Any) -> Any:
    parts: list[Any] = [("files", part) for part in own_files(artifact).items()]
    if "eval" in form:
        parts.append(("eval", ("rows.jsonl", form.pop("eval"))))
    return client.put(f"{ADMIN}/{name}{query}", files=parts, data=form)


def uploaded(client: TestClient, name: str, backbone: Backbone, *seeds: int, **options: Any) -> list[str]:
    """Versions in the store; the last one serves."""
    answers = [upload(client, name, version_of(backbone, seed), **options) for seed in seeds]
    assert [answer.status_code for answer in answers] == [201] * len(seeds), answers[0].text
    return [answer.json()["version"] for answer in answers]


def release(client: TestClient, name: str, traffic: dict[str, float], **body: Any) -> Any:
    return client.post(f"{ADMIN}/{name}/releases", json={"traffic": traffic, **body})


def serving(client: TestClient, name: str = "x", **body: Any) -> str:
    answer = classify(client, name, TEXTS, **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["version"])


def series(client: TestClient, name: str) -> dict[str, float]:
    """Samples of a series, by what is in their braces."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return {line.removeprefix(name).rpartition(" ")[0].strip("{}"): float(line.rpartition(" ")[2]) for line in lines}


# ------------------------------------------------------------------------------------------------------------ reports


def test_the_report_is_in_the_answer_and_in_the_manifest(
    client: TestClient, bert: Backbone, store: AdapterStore
) -> None:
    artifact = version_of(bert, 1)
    answer = upload(client, "x", artifact).json()
    report = answer["report"]
    assert report["fingerprint"] == bert.spec.fingerprint
    assert (report["fingerprint_matched"], report["golden"], report["smoke_texts"]) == (False, None, 2)
    assert report["tensors"] == len(artifact.tensors)
    assert report["parameters"] == sum(tensor.numel() for tensor in artifact.tensors.values())
    assert report["memory_bytes"] > 0
    assert answer["version"] == artifact.version  # which the report is no part of
    detail = client.get(f"{ADMIN}/x").json()
    assert detail["report"] == report
    assert "report" not in detail["manifest"]
    stored = Sync(store).get_version("x", artifact.version)
    assert stored.report.model_dump(mode="json") == report
    assert stored.manifest_bytes == artifact.manifest_bytes


def test_the_golden_sample_is_in_the_report(client: TestClient, bert: Backbone) -> None:
    plain = version_of(bert, 1)
    version = upload(client, "plain", plain).json()["version"]
    raw = asyncio.run(outputs(client, "plain", version))
    golden = Golden(texts=tuple(TEXTS), outputs=tuple(tuple(row) for row in raw))
    report = upload(client, "x", version_of(bert, 1, golden=golden)).json()["report"]
    assert report["golden"]["texts"] == report["smoke_texts"] == len(TEXTS)
    assert report["golden"]["difference"] < 1e-6 < report["golden"]["tolerance"]


async def outputs(client: TestClient, name: str, version: str) -> list[list[float]]:
    engine: Any = client.app.state.engine
    adapter = engine._residency._device.get(version)
    return [output.tolist() for output in await engine._pipeline.outputs(TEXTS, adapter)]


def test_an_own_manifest_comes_back_with_its_report_as_the_same_version(
    client: TestClient, bert: Backbone, store: AdapterStore
) -> None:
    artifact = version_of(bert, 1)
    upload(client, "x", artifact)
    _, report = Sync(store).manifest("x", artifact.version)
    files = {"manifest.json": artifact.manifest_file(report), "adapter.safetensors": artifact.tensor_bytes}
    answer = put(client, "y", files)
    assert (answer.status_code, answer.json()["version"]) == (201, artifact.version)


def test_what_no_server_has_proven_is_proven_before_it_serves(
    client: TestClient, bert: Backbone, store: AdapterStore
) -> None:
    """Another program put it there, and its golden sample does not reproduce."""
    wrong = version_of(bert, 1, golden=Golden(texts=("w1",), outputs=((5.0, -5.0),)))
    other = Sync(store)
    other.release("x", Plan.only(other.put_version("x", wrong)), by="somebody")
    assert "golden sample" in refused(classify(client, "x", "w1"), 500, code="unservable_adapter")
    fine = version_of(bert, 2)
    other.put_version("x", fine)
    assert release(client, "x", {fine.version: 1}).status_code == 201
    assert serving(client) == fine.version
    refused(release(client, "x", {wrong.version: 1}), 422, "traffic")
    assert serving(client) == fine.version


def test_verify_reads_the_store_again(bert: Backbone, tmp_path: Path) -> None:
    app = create_app(Settings(), backbone=bert, store=AdapterStore.open(str(tmp_path)))
    with TestClient(app, raise_server_exceptions=False) as client:
        one, two = uploaded(client, "x", bert, 1, 2)
        first = client.post(f"{ADMIN}/x/verify").json()
        assert (first["version"], first["report"]["fingerprint"]) == (two, bert.spec.fingerprint)
        assert client.post(f"{ADMIN}/x/verify", params={"version": one}).json()["version"] == one
        file = tmp_path / "x" / "versions" / two / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
        assert two in refused(client.post(f"{ADMIN}/x/verify"), 500, code="corrupt_version")
        assert serving(client) == two  # what is in memory is whole
        refused(client.post(f"{ADMIN}/x/verify", params={"version": "0" * 64}), 404, "version", "version_not_found")
        refused(client.post(f"{ADMIN}/x/verify", params={"version": "zz"}), 422, "version")
        refused(client.post(f"{ADMIN}/nobody/verify"), 404)


# ----------------------------------------------------------------------------------------------------------- releases


def test_a_version_that_is_not_released_can_be_tried_and_released(client: TestClient, bert: Backbone) -> None:
    [version] = uploaded(client, "x", bert, 1, query="?release=false")
    refused(classify(client, "x", TEXTS), 404, "adapter")
    answer = classify(client, "x", TEXTS, version=version).json()
    assert (answer["version"], answer["release"]) == (version, None)
    again = upload(client, "x", version_of(bert, 1), query="?release=false")
    assert (again.status_code, again.json()["created"], again.json()["release"]) == (200, False, None)
    made = release(client, "x", {version: 1}, note="go").json()
    assert (made["release"], made["traffic"], made["note"], made["by"]) == (1, {version: 1.0}, "go", "http")
    assert serving(client) == version


def test_a_request_may_pin_a_version(client: TestClient, bert: Backbone) -> None:
    one, two = uploaded(client, "x", bert, 1, 2)
    assert [serving(client), serving(client, version=one), serving(client, version=two)] == [two, one, two]
    refused(classify(client, "x", TEXTS, version="0" * 64), 404, "version", "version_not_found")
    refused(classify(client, "x", TEXTS, version="latest"), 422, "version")
    client.delete(f"{ADMIN}/x")
    refused(classify(client, "x", TEXTS, version=one), 404, "adapter")
    refused(classify(client, "no such name", TEXTS, version=one), 422, "name")
    refused(classify(client, "nobody", TEXTS, version=one), 404, "version")


def test_canary_shares_follow_a_stable_key(client: TestClient, bert: Backbone) -> None:
    one, two = uploaded(client, "x", bert, 1, 2)
    assert release(client, "x", {one: 0.75, two: 0.25}).status_code == 201
    by_key = {f"user {index}": serving(client, routing_key=f"user {index}") for index in range(400)}
    deviation = math.sqrt(400 * 0.75 * 0.25)
    assert abs(Counter(by_key.values())[one] - 300) < 5 * deviation
    for key in list(by_key)[:20]:
        assert serving(client, routing_key=key) == by_key[key]
        headers = {"x-request-id": key}  # which decides where there is no key
        answer = client.post("/classify", json={"adapter": "x", "inputs": "w1"}, headers=headers)
        assert answer.json()["version"] == by_key[key]
    assert len({serving(client) for _ in range(100)}) == 2
    # A larger share takes requests over, and gives none away.
    release(client, "x", {two: 0.5, one: 0.5})
    assert all(serving(client, routing_key=key) == two for key, version in list(by_key.items())[:50] if version == two)


def test_a_canary_with_other_labels_answers_with_its_own(client: TestClient, bert: Backbone) -> None:
    versions = {}
    for labels in (("a", "b"), ("x", "y", "z")):
        versions[upload(client, "x", version_of(bert, 1, labels)).json()["version"]] = set(labels)
    release(client, "x", dict.fromkeys(versions, 0.5))
    for index in range(20):
        answer = classify(client, "x", TEXTS, routing_key=str(index)).json()
        for prediction in answer["predictions"]:
            assert {one["label"] for one in prediction} == versions[answer["version"]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"traffic": {}}, None),
        ({"traffic": {"ONE": 0.9}}, None),
        ({"traffic": {"ONE": 0.5, "TWO": 0.6}}, None),
        ({"traffic": {"ONE": 0}}, None),
        ({"traffic": {"ONE": -1, "TWO": 2}}, None),
        ({"traffic": {"ONE": "all"}}, None),
        ({"traffic": {"ONE": 1}, "shadow": ["ONE"]}, None),
        ({"traffic": {"ONE": 1}, "shadow": ["nothing"]}, "shadow.0"),
        ({"traffic": {"latest": 1}}, None),
        ({"traffic": ["ONE"]}, "traffic"),
        ({"traffic": {"ONE": 1}, "notes": "typo"}, "notes"),
        ({"traffic": {"ONE": 1}, "note": "x" * 3000}, "note"),
        ({"traffic": {"ONE": 1}, "after": -1}, "after"),
        ({"shadow": []}, "traffic"),
        ([], None),
    ],
)
def test_bad_releases(client: TestClient, bert: Backbone, body: Any, param: str | None) -> None:
    one, two = uploaded(client, "x", bert, 1, 2)
    written = json.loads(json.dumps(body).replace("ONE", one).replace("TWO", two))
    assert refused(client.post(f"{ADMIN}/x/releases", json=written), 422, param)
    assert serving(client) == two
    assert len(client.get(f"{ADMIN}/x/releases").json()["releases"]) == 2


def test_releases_of_what_is_not_there(client: TestClient, bert: Backbone) -> None:
    [one] = uploaded(client, "x", bert, 1)
    refused(release(client, "x", {"0" * 64: 1}), 404, code="version_not_found")
    refused(release(client, "y", {one: 1}), 404, code="version_not_found")  # versions belong to a name
    refused(release(client, "..", {one: 1}), 404)  # the client resolves the path
    refused(release(client, "a%2Fb", {one: 1}), 422, "name")
    refused(client.get(f"{ADMIN}/nobody/releases"), 404)
    refused(client.post(f"{ADMIN}/nobody/rollback"), 404)
    refused(client.post(f"{ADMIN}/nobody/releases"), 422)


def test_a_release_may_have_to_follow_another(client: TestClient, bert: Backbone) -> None:
    one, two = uploaded(client, "x", bert, 1, 2)
    assert release(client, "x", {one: 1}, after=2).json()["release"] == 3
    refused(release(client, "x", {two: 1}, after=2), 409, "after", "release_conflict")
    refused(client.post(f"{ADMIN}/x/rollback", json={"after": 2}), 409, "after")
    refused(client.delete(f"{ADMIN}/x", params={"after": 2}), 409, "after")
    refused(release(client, "x", {two: 1}, after=0), 409, "after")
    assert serving(client) == one


def test_the_history_is_paged(client: TestClient, bert: Backbone) -> None:
    one, two = uploaded(client, "x", bert, 1, 2)
    for index in range(5):
        release(client, "x", {one: 1} if index % 2 else {two: 1}, note=f"number {index}")
    seen: list[Any] = []
    following: int | None = None
    while True:
        page = client.get(
            f"{ADMIN}/x/releases", params={"limit": 3} | ({"before": following} if following else {})
        ).json()
        seen += page["releases"]
        following = page["next"]
        if following is None:
            break
    assert [one["release"] for one in seen] == [7, 6, 5, 4, 3, 2, 1]
    assert [one["note"] for one in seen][:5] == [f"number {index}" for index in range(4, -1, -1)]


def test_roll_backs_go_ever_further_back(client: TestClient, bert: Backbone) -> None:
    one, two, three = uploaded(client, "x", bert, 1, 2, 3)
    client.delete(f"{ADMIN}/x")  # release 4

    def roll_back(**body: Any) -> Any:
        return client.post(f"{ADMIN}/x/rollback", json=body)

    refused(classify(client, "x", TEXTS), 404)
    assert roll_back(note="it was needed").json()["restores"] == 3
    assert [serving(client), roll_back().json()["restores"], serving(client)] == [three, 2, two]
    assert [roll_back().json()["restores"], serving(client)] == [1, one]
    refused(roll_back(), 409, "to", "nothing_to_roll_back_to")
    refused(roll_back(to=4), 409, "to")  # a deletion
    refused(roll_back(to=99), 404, "release")
    refused(roll_back(to=0), 422, "to")
    assert [roll_back(to=3).json()["release"], serving(client)] == [8, three]
    history = client.get(f"{ADMIN}/x/releases").json()["releases"]
    assert [each["restores"] for each in history] == [3, 1, 2, 3, None, None, None, None]


def test_rolling_back_a_canary_restores_its_shares(client: TestClient, bert: Backbone) -> None:
    one, two, three = uploaded(client, "x", bert, 1, 2, 3)
    release(client, "x", {one: 0.5, two: 0.5}, shadow=[three])
    release(client, "x", {three: 1})
    back = client.post(f"{ADMIN}/x/rollback").json()
    assert (back["traffic"], back["shadow"]) == ({one: 0.5, two: 0.5}, [three])


# ------------------------------------------------------------------------------------------------------------ shadows


def shadowed(client: TestClient) -> dict[str, float]:
    engine: Any = client.app.state.engine

    async def all_compared() -> None:
        await asyncio.gather(*engine._shadows._waiting)

    client.portal.call(all_compared)
    return series(client, "adapterd_shadow_texts_total")


def same_label(one: Any, other: Any) -> bool:
    return bool(one["predictions"][0][0]["label"] == other["predictions"][0][0]["label"])


def test_a_shadow_is_compared_and_never_answered(client: TestClient, bert: Backbone) -> None:
    one, two = uploaded(client, "x", bert, 1, 2)
    same = upload(client, "x", version_of(bert, 1, training=TRAINING)).json()["version"]  # the same numbers
    release(client, "x", {one: 1}, shadow=[two, same])
    answers = [classify(client, "x", f"w{index}").json() for index in range(30)]
    assert {answer["version"] for answer in answers} == {one}
    expected = [classify(client, "x", f"w{index}", version=two).json() for index in range(30)]
    agreed = sum(map(same_label, answers, expected))
    counted = shadowed(client)
    assert 0 < agreed < 30
    assert counted == {
        f'adapter="x",outcome="agreed",version="{two[:12]}"': agreed,
        f'adapter="x",outcome="disagreed",version="{two[:12]}"': 30 - agreed,
        f'adapter="x",outcome="agreed",version="{same[:12]}"': 30,
    }
    assert series(client, "adapterd_texts_total") == {'adapter="x"': 60}  # which shadows are no part of


def test_a_shadow_that_cannot_serve_hurts_nobody(bert: Backbone, tmp_path: Path) -> None:
    app = create_app(Settings(), backbone=bert, store=AdapterStore.open(str(tmp_path)))
    with TestClient(app, raise_server_exceptions=False) as client:
        one, two = uploaded(client, "x", bert, 1, 2)
        release(client, "x", {one: 1}, shadow=[two])
    (tmp_path / "x" / "versions" / two / "adapter.safetensors").write_bytes(b"damaged")
    with TestClient(create_app(Settings(), backbone=bert, store=AdapterStore.open(str(tmp_path)))) as client:
        assert serving(client) == one
        assert shadowed(client) == {f'adapter="x",outcome="failed",version="{two[:12]}"': len(TEXTS)}


def test_a_comparison_that_fails_is_counted(
    client: TestClient, bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise ZeroDivisionError

    one, two = uploaded(client, "x", bert, 1, 2)
    release(client, "x", {one: 1}, shadow=[two])
    monkeypatch.setattr(type(TASKS["classification"]), "agrees", broken)
    assert serving(client) == one
    assert shadowed(client) == {f'adapter="x",outcome="failed",version="{two[:12]}"': len(TEXTS)}


def test_shadows_are_left_out_where_there_are_too_many(
    client: TestClient, bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.shadows.MAX_WAITING", 0)
    one, two = uploaded(client, "x", bert, 1, 2)
    release(client, "x", {one: 1}, shadow=[two])
    assert serving(client) == one
    assert shadowed(client) == {f'adapter="x",outcome="skipped",version="{two[:12]}"': len(TEXTS)}


# ----------------------------------------------------------------------------------------------------------- hot swap


def test_a_request_keeps_its_version_while_another_is_released(
    app: FastAPI, client: TestClient, bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = uploaded(client, "x", bert, 1, 2, query="?release=false")
    release(client, "x", {one: 1})
    assert serving(client) == one
    running, go_on = threading.Event(), threading.Event()
    original = Runner.run

    def run(self: Runner, rows: Any) -> Any:
        running.set()
        assert go_on.wait(30)
        return original(self, rows)

    monkeypatch.setattr(Runner, "run", run)
    answers: list[str] = []
    request = threading.Thread(target=lambda: answers.append(serving(client)))
    request.start()
    assert running.wait(30)
    assert release(client, "x", {two: 1}).status_code == 201
    engine = app.state.engine
    assert one in engine._residency  # as long as somebody uses it
    go_on.set()
    request.join(30)
    assert answers == [one]
    assert serving(client) == two
    assert one not in engine._residency
    assert series(client, "adapterd_adapters_resident")['memory="host"'] == 1


# --------------------------------------------------------------------------------------------------------------- gate


def rows(client: TestClient, version: str, flip: int = 0) -> bytes:
    """Texts with the labels that a version gives them, the first `flip` of them wrong."""
    texts = [f"w{index} w{index * 7 % 50}" for index in range(40)]
    labels = [one[0]["label"] for one in classify(client, "x", texts, version=version, top_k=1).json()["predictions"]]
    assert set(labels) == {"a", "b"}
    other = {"a": "b", "b": "a"}
    labels = [other[label] if index < flip else label for index, label in enumerate(labels)]
    return "\n".join(
        json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)
    ).encode()


def test_an_upload_that_does_worse_is_not_released(client: TestClient, bert: Backbone, store: AdapterStore) -> None:
    [one] = uploaded(client, "x", bert, 1)
    data = rows(client, one)
    message = refused(upload(client, "x", version_of(bert, 2), eval=data), 409, "eval", "evaluation_below_current")
    assert "1.0000" in message
    assert serving(client) == one
    assert [each.version for each in Sync(store).versions("x")] == [one]  # nothing was stored
    stored = upload(client, "x", version_of(bert, 2), eval=data, query="?release=false").json()
    assert stored["release"] is None
    assert stored["evaluation"]["current"] == {
        "rows": 40,
        "metrics": {"accuracy": 1.0, "macro_f1": 1.0},
    }
    forced = upload(client, "x", version_of(bert, 2), eval=data, query="?force=true").json()
    assert (forced["release"], serving(client)) == (2, forced["version"])
    assert forced["evaluation"]["candidate"]["metrics"]["accuracy"] < 1
    better = upload(client, "x", version_of(bert, 1), eval=data).json()
    assert (better["release"], serving(client)) == (3, one)
    assert better["evaluation"]["candidate"]["metrics"]["accuracy"] == 1.0


def test_the_first_upload_passes_every_gate(client: TestClient, bert: Backbone) -> None:
    [one] = uploaded(client, "x", bert, 1)
    answer = upload(client, "fresh", version_of(bert, 2), eval=rows(client, one)).json()
    assert answer["release"] == 1
    assert answer["evaluation"]["current"] is None


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"", "eval"),
        (b"not json", "eval:1"),
        (b'{"text": "w1", "label": "a"}\n\n{"text": "w1"}', "eval:3"),
        (b'{"text": "w1", "label": "zebra"}', "eval:1"),
        (b'{"text": " ", "label": "a"}', "eval:1"),
        (b"\xff\xfe", "eval:1"),
    ],
)
def test_bad_evaluation_data(client: TestClient, bert: Backbone, data: bytes, param: str) -> None:
    [one] = uploaded(client, "x", bert, 1)
    refused(upload(client, "x", version_of(bert, 2), eval=data), 422, param)
    assert serving(client) == one


# --------------------------------------------------------------------------------------------------- pins and garbage


def test_pinned_adapters_stay_in_memory(bert: Backbone, store: AdapterStore) -> None:
    with TestClient(create_app(Settings(), backbone=bert, store=store)) as client:
        names = [f"a{index}" for index in range(8)]
        answers = [upload(client, name, version_of(bert, index)).json() for index, name in enumerate(names)]
    nbytes = answers[0]["report"]["memory_bytes"]
    settings = Settings(host_memory_bytes=4 * nbytes, store_poll_seconds=0.05)
    with TestClient(create_app(settings, backbone=bert, store=store), raise_server_exceptions=False) as client:
        assert client.put(f"{ADMIN}/a0/pin").json() == {"adapter": "a0", "pinned": True}
        for name in names * 2:
            serving(client, name)
        listed = {one["name"]: one for one in client.get(ADMIN).json()["adapters"]}
        assert (listed["a0"]["resident"], listed["a0"]["pinned"]) == (True, True)
        assert sum(one["resident"] for one in listed.values()) < 5
        for name in ("a1", "a2"):
            assert client.put(f"{ADMIN}/{name}/pin").status_code == 200
        refused(client.put(f"{ADMIN}/a3/pin"), 507, "name", "over_memory_budget")
        refused(client.put(f"{ADMIN}/nobody/pin"), 404)
        [version] = uploaded(client, "a0", bert, 99)
        client.portal.call(client.app.state.engine._pins.refresh)  # until then the new version may leave
        for name in names:
            serving(client, name)
        assert client.get(f"{ADMIN}/a0").json()["resident"]
        assert client.get(f"{ADMIN}/a0").json()["version"] == version
    with TestClient(create_app(settings, backbone=bert, store=store)) as client:  # before anybody asks
        engine: Any = client.app.state.engine
        client.portal.call(engine._pins.refresh)
        listed = {one["name"]: one["resident"] for one in client.get(ADMIN).json()["adapters"]}
        assert [name for name, resident in listed.items() if resident] == ["a0", "a1", "a2"]
        assert client.delete(f"{ADMIN}/a0/pin").json() == {"adapter": "a0", "pinned": False}
        for name in names[1:5] * 3:
            serving(client, name)
        assert not client.get(f"{ADMIN}/a0").json()["resident"]


def test_an_adapter_larger_than_the_budget_is_refused_when_it_is_uploaded(bert: Backbone, store: AdapterStore) -> None:
    settings = Settings(host_memory_bytes=1000)
    with TestClient(create_app(settings, backbone=bert, store=store), raise_server_exceptions=False) as client:
        assert "1000" in refused(upload(client, "x", version_of(bert, 1)), 507, code="over_memory_budget")
        assert Sync(store).names() == []


def test_garbage_is_what_no_recent_release_names(client: TestClient, bert: Backbone) -> None:
    one, two, three = uploaded(client, "x", bert, 1, 2, 3)
    [kept] = uploaded(client, "y", bert, 4)

    def collect(**body: Any) -> Any:
        answer = client.post("/admin/gc", json=body).json()
        assert answer["bytes"] == sum(each["bytes"] for each in answer["removed"])
        return {(each["adapter"], each["version"]) for each in answer["removed"]}

    assert collect(keep=1) == set()  # too young
    assert collect(keep=3, min_age_seconds=0) == set()
    assert collect(keep=1, min_age_seconds=0, adapter="y") == set()
    assert collect(keep=2, min_age_seconds=0, dry_run=True) == {("x", one)}
    assert len(client.get(f"{ADMIN}/x/versions").json()["versions"]) == 3
    assert collect(keep=2, min_age_seconds=0) == {("x", one)}
    assert {each["version"] for each in client.get(f"{ADMIN}/x/versions").json()["versions"]} == {two, three}
    assert serving(client, "y") == kept
    refused(client.post(f"{ADMIN}/x/rollback", json={"to": 1}), 404, "version", "version_not_found")
    assert client.post(f"{ADMIN}/x/rollback").json()["traffic"] == {two: 1.0}
    refused(client.post("/admin/gc", json={"keep": 0}), 422, "keep")
    refused(client.post("/admin/gc", json={"adapter": "../x"}), 422, "name")


def test_versions_are_listed(client: TestClient, bert: Backbone) -> None:
    one, two = uploaded(client, "x", bert, 1, 2)
    listed = client.get(f"{ADMIN}/x/versions").json()
    assert {(each["version"], each["whole"], each["resident"]) for each in listed["versions"]} == {
        (one, True, False),
        (two, True, True),
    }
    assert client.get(f"{ADMIN}/nobody/versions").json() == {"adapter": "nobody", "versions": []}


# ------------------------------------------------------------------------------------------ what goes wrong elsewhere


def test_bodies_of_hundreds_of_thousands_of_entries_are_refused_at_once(client: TestClient, bert: Backbone) -> None:
    [one] = uploaded(client, "x", bert, 1)
    many = {f"{index:064x}": "x" for index in range(20_000)}
    refused(client.post(f"{ADMIN}/x/releases", json={"traffic": many}), 422, "traffic")
    refused(client.post(f"{ADMIN}/x/releases", json={"traffic": {one: 1}, "shadow": list(many)}), 422, "shadow")
    unknown = {f"field {index}": 1 for index in range(20_000)}
    refused(client.post(f"{ADMIN}/x/releases", json={"traffic": {one: 1}, **unknown}), 422, "field 0")
    refused(client.post("/admin/gc", json=unknown), 422, "field 0")
    for path in (f"{ADMIN}/x/releases", f"{ADMIN}/x/rollback", "/admin/gc"):  # the limit of uploads is for uploads
        refused(client.post(path, content=b" " * 3_000_000), 413, code="too_large")
    huge = client.post("/admin/gc", content=b'{"min_age_seconds": 1e999}', headers={"content-type": "application/json"})
    refused(huge, 422, "min_age_seconds")
    refused(client.post(f"{ADMIN}/x/rollback", json={"to": 10**30}), 404)
    assert serving(client) == one


def test_evaluation_data_has_limits(client: TestClient, bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    [one] = uploaded(client, "x", bert, 1)
    row = b'{"text": "w1", "label": "a"}\n'
    for limit, data in (("MAX_BYTES", row), ("MAX_ROWS", row * 2), ("MAX_CHARACTERS", row), ("MAX_TOKENS", row)):
        with monkeypatch.context() as patched:
            patched.setattr(f"server.engine.gate.{limit}", 1)
            refused(upload(client, "x", version_of(bert, 2), eval=data), 413, "eval")
    assert serving(client) == one


@pytest.mark.parametrize("mend", ["upload", "rollback", "delete"])
def test_a_damaged_last_release_can_be_put_right(bert: Backbone, tmp_path: Path, mend: str) -> None:
    app = create_app(Settings(store_poll_seconds=0), backbone=bert, store=AdapterStore.open(str(tmp_path)))
    with TestClient(app, raise_server_exceptions=False) as client:
        one, two = uploaded(client, "x", bert, 1, 2)
    (tmp_path / "x" / "releases" / "000002.json").write_bytes(b"damaged")
    app = create_app(Settings(store_poll_seconds=0), backbone=bert, store=AdapterStore.open(str(tmp_path)))
    with TestClient(app, raise_server_exceptions=False) as client:
        refused(classify(client, "x", TEXTS), 500, code="corrupt_version")
        assert client.get(ADMIN).json()["damaged"] == ["x"]
        if mend == "upload":
            assert upload(client, "x", version_of(bert, 2)).json()["release"] == 3
            assert serving(client) == two
        elif mend == "rollback":
            assert client.post(f"{ADMIN}/x/rollback").json()["restores"] == 1
            assert serving(client) == one
        else:
            assert client.delete(f"{ADMIN}/x").json()["release"] == 3
            refused(classify(client, "x", TEXTS), 404)


def test_an_evaluation_passes_over_what_cannot_be_compared(bert: Backbone, tmp_path: Path) -> None:
    app = create_app(Settings(), backbone=bert, store=AdapterStore.open(str(tmp_path)))
    with TestClient(app, raise_server_exceptions=False) as client:
        [one] = uploaded(client, "x", bert, 1)
        data = rows(client, one)
    (tmp_path / "x" / "versions" / one / "adapter.safetensors").write_bytes(b"damaged")
    app = create_app(Settings(), backbone=bert, store=AdapterStore.open(str(tmp_path)))
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = upload(client, "x", version_of(bert, 2), eval=data).json()
        assert (answer["release"], answer["evaluation"]["current"]) == (2, None)


def test_an_unexpected_failure_to_load_leaves_the_version_before_serving(
    bert: Backbone, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(create_app(Settings(store_poll_seconds=0), backbone=bert, store=store)) as client:
        [one] = uploaded(client, "x", bert, 1)
        assert serving(client) == one
        later, other = version_of(bert, 2), Sync(store)
        version = other.put_version("x", later)
        bind = Checker.bind

        def fails(self: Checker, checked: Any) -> Any:
            if checked.blueprint.labels == later.manifest.labels and torch.equal(
                checked.tensors[BIAS], later.tensors[BIAS]
            ):
                raise RuntimeError("a bug")
            return bind(self, checked)

        monkeypatch.setattr(Checker, "bind", fails)
        other.release("x", Plan.only(version), by="another server")
        assert [serving(client) for _ in range(3)] == [one] * 3
        monkeypatch.undo()
        deadline = time.monotonic() + 30
        while serving(client) != version:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_versions_of_different_tasks_are_not_released_together(client: TestClient, bert: Backbone) -> None:
    [one] = uploaded(client, "x", bert, 1)
    single = version_of(bert, 2)
    several = Artifact.build(single.manifest.model_copy(update={"task": "multi_label_classification"}), single.tensors)
    two = upload(client, "x", several, query="?release=false").json()["version"]
    refused(release(client, "x", {one: 0.5, two: 0.5}), 422, "traffic")
    refused(release(client, "x", {one: 1}, shadow=[two]), 422, "traffic")
    assert release(client, "x", {two: 1}).status_code == 201


def test_verifying_counts_against_the_memory(bert: Backbone, store: AdapterStore) -> None:
    with TestClient(create_app(Settings(), backbone=bert, store=store)) as client:
        nbytes = upload(client, "x", version_of(bert, 1)).json()["report"]["memory_bytes"]
    small = Settings(host_memory_bytes=nbytes, memory_wait_seconds=0.01)
    with TestClient(create_app(small, backbone=bert, store=store), raise_server_exceptions=False) as client:
        assert client.post(f"{ADMIN}/x/verify").status_code == 200
        engine: Any = client.app.state.engine
        [version] = client.get(f"{ADMIN}/x").json()["traffic"]
        with engine._residency._device.held(version):
            assert serving(client) == version
            refused(client.post(f"{ADMIN}/x/verify"), 503, code="memory_full")
        assert client.post(f"{ADMIN}/x/verify").status_code == 200
