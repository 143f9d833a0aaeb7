"""Clients of other servers, on a server that really runs: the same answers as our own routes give, and errors in the
shape that each client reads."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from helpers import Sync, make_artifact
from huggingface_hub import AsyncInferenceClient, InferenceClient, close_session, constants
from huggingface_hub.errors import HfHubHTTPError
from open_inference.openapi import types as oip
from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.core.api_error import ApiError
from safetensors.torch import load_file, save_file

from server.api import compat
from server.api.deps import get_settings
from server.app import create_app
from server.backbone.backbone import Backbone
from server.core import TaskRequest
from server.engine.engine import Engine
from server.errors import AdapterdError, NotFiniteOutput, Overloaded, StoreUnavailable, WarmingUp
from server.settings import Settings
from server.store.releases import Plan
from server.store.store import AdapterStore
from server.tasks.adapter import Blueprint

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "peft_lora"

TEXTS = ["What a lovely day", "Ada Lovelace was born in London", "ok"]
CONTEXT = "Ada Lovelace was born in London and wrote the first program for a machine that was never built."
MAX_INPUTS = 8
MAX_BODY_BYTES = 50_000

ADAPTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "moods": ("classification", ("zebra", "ant", "mouse")),  # not in the alphabet's order
    "topics": ("multi_label_classification", ("news", "sport", "arts")),
    "entities": ("tagging", ("O", "B-PER", "I-PER", "B-LOC")),
    "answers": ("question_answering", ()),
    "vectors": ("embedding", ()),
}
"""name -> its task and labels."""


class Running(NamedTuple):
    url: str
    http: httpx.Client
    app: FastAPI
    store: AdapterStore
    root: Path
    """From where it may load checkpoints."""
    openai: openai.OpenAI
    oip: OpenInferenceClient

    def native(self, path: str, **body: Any) -> Any:
        answer = self.http.post(f"{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]


def publish(store: AdapterStore, minilm: Backbone, like: str, seed: int, name: str | None = None) -> str:
    """A random LoRA with a head for the task of one of ADAPTERS, released. Its version."""
    task, labels = ADAPTERS[like]
    name = name or like
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    blueprint = Blueprint.check(method="lora", config=config, task=task, head={}, labels=labels, spec=minilm.spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: 0.05 * torch.randn(shape, generator=generator) for key, shape in blueprint.shapes().items()}
    sync = Sync(store)
    version = sync.put_version(name, make_artifact(blueprint, tensors))
    sync.release(name, Plan.only(version), by="test")
    return str(version)


@pytest.fixture(scope="module", autouse=True)
def _online() -> Iterator[None]:
    """huggingface_hub asks no server at all while it is told not to ask its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
    close_session()


@pytest.fixture(scope="module")
def server(minilm: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("checkpoints")
    store = AdapterStore.open("memory://")
    for seed, name in enumerate(ADAPTERS):
        publish(store, minilm, name, seed)
    settings = Settings(max_inputs=MAX_INPUTS, max_body_bytes=MAX_BODY_BYTES, lora_path_root=str(root))
    app = create_app(settings, backbone=minilm, store=store)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        url = f"http://{host}:{port}"
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai_client,
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            yield Running(
                url, http, app, store, root, openai_client, OpenInferenceClient(base_url=url, httpx_client=http)
            )
    finally:
        server.should_exit = True
        thread.join()


# --- Hugging Face


def hub(server: Running, name: str, **options: Any) -> InferenceClient:
    return InferenceClient(model=f"{server.url}/models/{name}", token="unused", **options)


def scores(labels: Any) -> dict[str, float]:
    """label -> score, of dictionaries or of a client's objects."""
    return {one["label"]: one["score"] for one in labels}


def same(one: Any, other: Any) -> bool:
    """Whether two answers are the same but for what a batch does to the last digits."""
    if isinstance(one, list) and isinstance(one[0], dict):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == pytest.approx(other, abs=1e-5))


@pytest.mark.parametrize("name", ["moods", "topics"])
def test_hub_text_classification(server: Running, name: str) -> None:
    [native] = server.native("/classify", adapter=name, inputs=TEXTS[0])
    answer = hub(server, name).text_classification(TEXTS[0])
    assert [one.label for one in answer] == [one["label"] for one in native]
    assert same(scores(answer), scores(native))


@pytest.mark.parametrize("function", ["sigmoid", "softmax", "none"])
def test_hub_text_classification_with_its_parameters(server: Running, function: Any) -> None:
    [native] = server.native("/classify", adapter="moods", inputs=TEXTS[0], activation=function, top_k=2)
    answer = hub(server, "moods").text_classification(TEXTS[0], top_k=2, function_to_apply=function)
    assert len(answer) == 2
    assert same(scores(answer), scores(native))


def test_hub_every_way_to_name_the_url(server: Running) -> None:
    url = f"{server.url}/models/moods"
    expected = scores(hub(server, "moods").text_classification(TEXTS[0]))
    for client, options in (
        (InferenceClient(base_url=url, api_key="unused"), {}),
        (InferenceClient(token="unused"), {"model": url}),
        (InferenceClient(model=url, provider="hf-inference", token="unused"), {}),
        (InferenceClient(model=f"{url}/pipeline/text-classification", token="unused"), {}),
    ):
        assert same(scores(client.text_classification(TEXTS[0], **options)), expected)


async def _asked(url: str) -> Any:
    async with AsyncInferenceClient(model=url, token="unused") as client:
        return await client.text_classification(TEXTS[0])


def test_hub_asynchronous_client(server: Running) -> None:
    answer = asyncio.run(_asked(f"{server.url}/models/moods"))
    assert same(scores(answer), scores(hub(server, "moods").text_classification(TEXTS[0])))


@pytest.mark.parametrize("strategy", [None, "simple", "first", "average", "max"])
def test_hub_token_classification(server: Running, strategy: Any) -> None:
    [native] = server.native("/tag", adapter="entities", inputs=TEXTS[1], aggregation=strategy or "simple")
    answer = hub(server, "entities").token_classification(TEXTS[1], aggregation_strategy=strategy)
    assert native
    assert [(one.entity_group, one.word, one.start, one.end) for one in answer] == [
        (one["label"], one["text"], one["start"], one["end"]) for one in native
    ]
    assert same([one.score for one in answer], [one["score"] for one in native])


def test_hub_tokens_one_by_one_and_labels_to_ignore(server: Running) -> None:
    [native] = server.native("/tag", adapter="entities", inputs=CONTEXT, aggregation="none")
    client = hub(server, "entities")
    labels = {one["label"] for one in native}
    assert {"O", "I-PER"} < labels, "the adapter is no good for this test"
    for ignored in (None, [], ["I-PER"]):
        answer = client.token_classification(CONTEXT, aggregation_strategy="none", ignore_labels=ignored)
        left = labels - set(["O"] if ignored is None else ignored)
        assert [one.entity for one in answer] == [one["label"] for one in native if one["label"] in left]
        assert all(one.entity_group is None for one in answer)
    kept = client.token_classification(CONTEXT, ignore_labels=["O", "PER"])
    assert [one.entity_group for one in kept] == [
        one["label"] for one in server.native("/tag", adapter="entities", inputs=CONTEXT)[0] if one["label"] != "PER"
    ]
    with pytest.raises(HfHubHTTPError, match="ignore_labels"):
        client.token_classification(CONTEXT, ignore_labels=["PER"])


def test_hub_question_answering(server: Running) -> None:
    question = {"question": "Where was she born?", "context": CONTEXT}
    client = hub(server, "answers")
    [[native]] = server.native("/answer", adapter="answers", inputs=question)
    answer = client.question_answering(**question)
    assert (answer.answer, answer.start, answer.end) == (native["text"], native["start"], native["end"])
    assert same(answer.score, native["score"])
    options = {"top_k": 3, "max_answer_tokens": 4, "no_answer": True}
    [native] = server.native("/answer", adapter="answers", inputs=question, **options)
    several = client.question_answering(
        **question, top_k=3, max_answer_len=4, handle_impossible_answer=True, align_to_words=True
    )
    assert [one.answer for one in several] == [one["text"] for one in native]
    assert len(several) == 3


def test_hub_feature_extraction(server: Running) -> None:
    native = server.native("/embed", adapter="vectors", inputs=TEXTS)
    client = hub(server, "vectors")
    np.testing.assert_allclose(client.feature_extraction(TEXTS), native, atol=1e-5)
    np.testing.assert_allclose(client.feature_extraction(TEXTS[0]), native[:1], atol=1e-5)
    [short] = server.native("/embed", adapter="vectors", inputs=TEXTS[0], normalize=False, dimensions=5)
    options = {"normalize": False, "dimensions": 5, "truncate": True, "truncation_direction": "right"}
    np.testing.assert_allclose(client.feature_extraction(TEXTS[0], **options), [short], atol=1e-5)


def test_hub_sentence_similarity(server: Running) -> None:
    vectors = np.array(server.native("/embed", adapter="vectors", inputs=TEXTS))
    cosines = hub(server, "vectors").sentence_similarity(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose(cosines, vectors[1:] @ vectors[0], atol=1e-5)


def test_hub_endpoint_info_and_health(server: Running) -> None:
    client = hub(server, "moods", provider="hf-inference")
    assert client.health_check()
    assert not hub(server, "mods", provider="hf-inference").health_check()
    assert client.get_endpoint_info() == server.http.get("/tei/moods/info").json()


@pytest.mark.parametrize("pipeline", ["", "/pipeline/text-classification"])
def test_hub_lists_of_inputs(server: Running, pipeline: str) -> None:
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    answer = server.http.post(f"/models/moods{pipeline}", json={"inputs": [*TEXTS, pair]}).json()
    native = server.native("/classify", adapter="moods", inputs=[*TEXTS, pair])
    assert same(list(map(scores, answer)), list(map(scores, native)))
    tagged = server.http.post("/models/entities", json={"inputs": TEXTS}).json()
    assert len(tagged) == len(TEXTS)
    assert all(isinstance(one, list) for one in tagged)
    asked = [{"question": text, "context": CONTEXT} for text in TEXTS]
    assert len(server.http.post("/models/answers", json={"inputs": asked}).json()) == len(TEXTS)


@pytest.mark.parametrize(
    ("name", "ask", "field"),
    [
        ("entities", lambda client: client.token_classification("a", stride=8), "stride"),
        ("answers", lambda client: client.question_answering("a", "b", doc_stride=8), "doc_stride"),
        ("answers", lambda client: client.question_answering("a", "b", max_seq_len=99), "max_seq_len"),
        ("answers", lambda client: client.question_answering("a", "b", max_question_len=9), "max_question_len"),
        ("answers", lambda client: client.question_answering("a", "b", align_to_words=False), "align_to_words"),
        ("vectors", lambda client: client.feature_extraction("a", prompt_name="query"), "prompt_name"),
        ("vectors", lambda client: client.feature_extraction("a", truncation_direction="left"), "truncation_direction"),
        ("vectors", lambda client: client.feature_extraction("a", encoding_format="base64"), "encoding_format"),
        ("moods", lambda client: client.zero_shot_classification("a", ["b", "c"]), "candidate_labels"),
        ("moods", lambda client: client.feature_extraction("a", normalize=True), "normalize"),
    ],
)
def test_hub_what_cannot_be_honoured_is_refused_by_name(
    server: Running, name: str, ask: Callable[[InferenceClient], Any], field: str
) -> None:
    with pytest.raises(HfHubHTTPError, match=field) as error:
        ask(hub(server, name))
    assert error.value.response.status_code == 422


def test_hub_an_error_reaches_the_client_with_its_words(server: Running) -> None:
    with pytest.raises(HfHubHTTPError, match="did you mean 'moods'") as error:
        hub(server, "mods").text_classification("a")
    assert error.value.response.status_code == 404
    assert error.value.request_id


# --- text-embeddings-inference


@pytest.mark.parametrize(
    ("path", "more", "headers"),
    [
        ("/tei/moods/predict", {}, {}),
        ("/tei/predict?adapter=moods", {}, {}),
        ("/tei/predict", {"model": "moods"}, {}),
        ("/tei/predict", {}, {"adapter": "moods"}),
        ("/tei/moods/predict", {"model": "moods"}, {"adapter": "moods"}),
    ],
)
def test_tei_predict(server: Running, path: str, more: dict[str, str], headers: dict[str, str]) -> None:
    native = server.native("/classify", adapter="moods", inputs=TEXTS[0])
    answer = server.http.post(f"{path}", json={"inputs": TEXTS[0], **more}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [one["label"] for one in answer.json()] == [one["label"] for one in native[0]]
    assert same(scores(answer.json()), scores(native[0]))
    assert int(answer.headers["x-compute-tokens"]) == 6
    assert int(answer.headers["x-total-time"]) >= 0


def test_tei_pairs_batches_and_raw_scores(server: Running) -> None:
    def predict(inputs: Any, **more: Any) -> Any:
        return server.http.post("/tei/moods/predict", json={"inputs": inputs, **more}).json()

    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    alone, both = server.native("/classify", adapter="moods", inputs=[TEXTS[0], pair])
    assert same(scores(predict(TEXTS[:1])), scores(alone))
    assert same(scores(predict(TEXTS[:2])), scores(both))
    assert not same(scores(alone), scores(both))
    assert same(list(map(scores, predict([TEXTS[:1], TEXTS[:2]]))), [scores(alone), scores(both)])
    assert same(list(map(scores, predict([TEXTS[:1]]))), [scores(alone)])
    [raw] = server.native("/classify", adapter="moods", inputs=TEXTS[0], activation="none")
    assert same(scores(predict(TEXTS[0], raw_scores=True, truncate=True)), scores(raw))


def test_tei_embed_with_an_adapter_and_without(server: Running) -> None:
    for path, adapter in (("/tei/embed", {}), ("/tei/vectors/embed", {"adapter": "vectors"})):
        for options in ({}, {"normalize": False}, {"dimensions": 7}):
            answer = server.http.post(f"{path}", json={"inputs": TEXTS, **options})
            native = server.native("/embed", inputs=TEXTS, **adapter, **options)
            np.testing.assert_allclose(answer.json(), native, atol=1e-5)
    assert len(server.http.post("/tei/embed", json={"inputs": TEXTS[0]}).json()) == 1


def test_tei_info_and_health(server: Running, minilm: Backbone) -> None:
    bare = server.http.get("/tei/info").json()
    assert bare["model_id"] == bare["served_model_name"] == minilm.spec.name
    assert bare["model_type"] == {"embedding": {"pooling": "mean"}}
    assert bare["max_client_batch_size"] == MAX_INPUTS
    moods = server.http.get("/tei/info?adapter=moods").json()
    assert moods["served_model_name"] == "moods"
    assert moods["model_type"]["classifier"]["id2label"] == {"0": "zebra", "1": "ant", "2": "mouse"}
    assert moods["model_type"]["classifier"]["label2id"] == {"zebra": 0, "ant": 1, "mouse": 2}
    detail = server.http.get("/admin/adapters/moods").json()
    assert moods["model_sha"] == detail["version"]
    assert server.http.get("/tei/health").status_code == 200
    assert server.http.get("/tei/moods/health").status_code == 200


def test_reading_about_an_adapter_loads_nothing(server: Running, minilm: Backbone) -> None:
    publish(server.store, minilm, "topics", seed=9, name="cold")
    for path in ("/tei/cold/info", "/tei/cold/health", "/v2/models/cold", "/v2/models/cold/ready", "/v1/models/cold"):
        assert server.http.get(path).status_code == 200
    detail = server.http.get("/admin/adapters/cold").json()
    assert not detail["resident"]
    assert server.http.get("/tei/cold/info").json()["model_type"]["classifier"]["id2label"]["2"] == "arts"
    server.native("/classify", adapter="cold", inputs="a")
    assert server.http.get("/admin/adapters/cold").json()["resident"]


def test_tei_refusals(server: Running) -> None:
    def refused(path: str, **body: Any) -> str:
        answer = server.http.post(f"{path}", json=body)
        assert answer.status_code == 422, answer.text
        assert answer.json()["error_type"] == "Validation"
        return str(answer.json()["error"])

    assert "several adapters" in refused("/tei/moods/predict", inputs="a", model="topics")
    assert "name an adapter" in refused("/tei/predict", inputs="a")
    assert "truncation_direction" in refused("/tei/moods/predict", inputs="a", truncation_direction="Left")
    assert "prompt_name" in refused("/tei/embed", inputs="a", prompt_name="query")
    assert "inputs.pair" in refused("/tei/moods/predict", inputs=["a", "b", "c"])
    assert "inputs.batch.1" in refused("/tei/moods/predict", inputs=[["a"], ["a", "b", "c"]])
    assert "inputs.batch.1" in refused("/tei/moods/predict", inputs=[["a"], "b"])


# --- vLLM


def test_vllm_classify(server: Running) -> None:
    native = server.native("/classify", adapter="moods", inputs=TEXTS)
    answer = server.http.post("/vllm/classify", json={"model": "moods", "input": TEXTS, "user": "u"}).json()
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert answer["id"].startswith("classify-")
    assert (answer["object"], answer["model"]) == ("list", "moods")
    for index, (own, labels) in enumerate(zip(answer["data"], native, strict=True)):
        assert (own["index"], own["num_classes"], own["label"]) == (index, 3, labels[0]["label"])
        assert same(dict(zip(ADAPTERS["moods"][1], own["probs"], strict=True)), scores(labels))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > len(TEXTS)
    raw = server.http.post("/vllm/classify", json={"model": "moods", "input": TEXTS[0], "use_activation": False}).json()
    [logits] = server.native("/classify", adapter="moods", inputs=TEXTS[0], activation="none")
    assert same(dict(zip(ADAPTERS["moods"][1], raw["data"][0]["probs"], strict=True)), scores(logits))


def test_vllm_long_texts_are_cut_only_where_the_request_says_so(server: Running) -> None:
    body = {"model": "moods", "input": "word " * 600}
    refused = server.http.post("/vllm/classify", json=body)
    assert refused.status_code == 400
    assert "602 tokens" in refused.json()["error"]["message"]
    assert server.http.post("/vllm/classify", json=body | {"truncate_prompt_tokens": -1}).status_code == 200


def load(server: Running, name: str, path: str | Path, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return server.http.post("/v1/load_lora_adapter", json=body)


def checkpoint(folder: Path, labels: str = '["low", "high"]') -> Path:
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    (folder / "labels.json").write_text(labels)
    (folder / ".cache").write_bytes(b"hidden")
    (folder / "empty").mkdir()
    return folder


def vllm_error(answer: httpx.Response, status: int, type_: str) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (type_, status)
    return str(error["message"])


def test_vllm_loads_replaces_and_unloads(server: Running) -> None:
    folder = checkpoint(server.root / "good")
    answer = load(server, "loaded", folder)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'loaded' added successfully.")
    assert set(scores(server.native("/classify", adapter="loaded", inputs="a")[0])) == {"low", "high"}
    assert "has already been loaded" in vllm_error(load(server, "loaded", "good"), 400, "InvalidUserInput")
    (folder / "labels.json").write_text('["no", "yes"]')
    assert load(server, "loaded", "good", load_inplace=True).status_code == 200
    assert set(scores(server.native("/classify", adapter="loaded", inputs="a")[0])) == {"no", "yes"}
    listed = {one.id: one for one in server.openai.models.list()}
    assert listed["loaded"].parent == server.app.state.engine.spec.name
    unload = {"lora_name": "loaded", "lora_int_id": 3}
    answer = server.http.post("/v1/unload_lora_adapter", json=unload)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'loaded' removed successfully.")
    vllm_error(server.http.post("/v1/unload_lora_adapter", json=unload), 404, "NotFoundError")
    assert load(server, "loaded", "good").status_code == 200  # a deleted name may come back


@pytest.mark.parametrize("other", ["the same", "another"])
def test_of_two_vllm_loads_of_one_new_name_exactly_one_succeeds(
    server: Running, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"raced-{other.split()[-1]}"
    folders = [checkpoint(server.root / f"{name}-0"), checkpoint(server.root / f"{name}-1")]
    if other == "another":
        (folders[1] / "labels.json").write_text('["no", "yes"]')
    put_version, both = server.store.put_version, asyncio.Barrier(2)

    async def put_together(*arguments: Any) -> str:
        await both.wait()  # neither has found the other's release
        return await put_version(*arguments)

    monkeypatch.setattr(server.store, "put_version", put_together)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda folder: load(server, name, folder), folders))
    monkeypatch.undo()
    [won, lost] = sorted(answers, key=lambda answer: answer.status_code)
    assert won.status_code == 200, won.text
    assert "has already been loaded" in vllm_error(lost, 400, "InvalidUserInput")
    history = server.http.get(f"/admin/adapters/{name}/releases").json()["releases"]
    assert [one["release"] for one in history] == [1]


def test_vllm_load_that_loses_to_a_deletion_says_so(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(server.root / "deleted")
    put_version = server.store.put_version

    async def put_late(name: str, *arguments: Any) -> str:
        version = await put_version(name, *arguments)
        await server.store.release(name, Plan.only(version), by="somebody else")
        await server.store.delete(name, by="somebody else")
        return version

    monkeypatch.setattr(server.store, "put_version", put_late)
    answer = load(server, "deleted", folder)
    monkeypatch.undo()
    assert "the last release of adapter 'deleted' is 2, not 0" in vllm_error(answer, 400, "BadRequestError")


def test_vllm_loads_the_configurations_of_a_folders_modules(server: Running) -> None:
    """As `adapterd adapters push` does: the pooling of sentence-transformers lies one folder deeper."""
    folder = shutil.copytree(FIXTURE, server.root / "vectors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"task_type": "FEATURE_EXTRACTION"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    tensors = load_file(folder / "adapter_model.safetensors")
    body = {name.replace(".bert.", "."): tensor for name, tensor in tensors.items() if ".lora_" in name}
    save_file(body, folder / "adapter_model.safetensors")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.bin").write_bytes(b"much")
    answer = load(server, "cls-vectors", folder)
    assert answer.status_code == 200, answer.text
    adapter = server.http.get("/admin/adapters/cls-vectors").json()
    assert (adapter["task"], adapter["manifest"]["head"]["pooling"]) == ("embedding", "cls")


def test_vllm_loads_nothing_that_lies_elsewhere(server: Running, tmp_path: Path) -> None:
    outside = checkpoint(tmp_path / "outside")
    (server.root / "link").symlink_to(outside)
    linked = checkpoint(server.root / "linked")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (server.root / "loop").symlink_to(server.root / "loop")
    sibling = checkpoint(server.root.with_name(f"{server.root.name}-sibling"))
    for path in (
        outside,
        f"{server.root}/../{tmp_path.name}/outside",
        "../outside",
        "link",
        "linked",
        "loop",
        sibling,
        server.root,
        ".",
        "",
        "/etc/passwd",
        "/no/such/folder",
        "a\0b",
        "x" * 5000,
    ):
        message = vllm_error(load(server, "stolen", path), 400, "InvalidUserInput")
        assert message.startswith("lora_path: "), message
    assert server.http.get("/admin/adapters/stolen").status_code == 404


def test_vllm_a_link_that_stays_inside_is_followed(server: Running) -> None:
    blobs = checkpoint(server.root / "blobs")
    snapshot = server.root / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert load(server, "linked", "snapshot").status_code == 200


def test_vllm_says_what_is_wrong_with_a_checkpoint(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_error(load(server, "bad", "nothing-here"), 404, "NotFoundError")
    broken = checkpoint(server.root / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "adapter_model.safetensors" in vllm_error(load(server, "bad", "broken"), 400, "BadRequestError")
    vllm_error(load(server, "not a name", checkpoint(server.root / "named")), 400, "BadRequestError")
    many = server.root / "many"
    many.mkdir()
    for index in range(300):
        (many / str(index)).touch()
    assert "files" in vllm_error(load(server, "bad", "many"), 400, "InvalidUserInput")
    settings = server.app.state.settings
    small = settings.model_copy(update={"max_upload_bytes": 1000})
    monkeypatch.setitem(server.app.dependency_overrides, get_settings, lambda: small)
    assert "1000 bytes" in vllm_error(load(server, "bad", "named"), 400, "BadRequestError")
    closed = settings.model_copy(update={"lora_path_root": None})
    monkeypatch.setitem(server.app.dependency_overrides, get_settings, lambda: closed)
    message = vllm_error(load(server, "bad", "named"), 400, "InvalidUserInput")
    assert "ADAPTERD_LORA_PATH_ROOT" in message
    assert "PUT /admin/adapters" in message


# --- OpenAI


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_openai_embeddings(server: Running, minilm: Backbone, encoding: Any) -> None:
    form = {} if encoding is None else {"encoding_format": encoding}
    for model, adapter in (("vectors", {"adapter": "vectors"}), (minilm.spec.name, {})):
        native = server.native("/embed", inputs=TEXTS, **adapter)
        answer = server.openai.embeddings.create(model=model, input=TEXTS, user="u", **form)
        assert (answer.object, answer.model) == ("list", model)
        assert [one.index for one in answer.data] == [0, 1, 2]
        vectors = [one.embedding for one in answer.data]
        if encoding == "base64":  # only then does the client leave it as it is
            vectors = [np.frombuffer(base64.b64decode(one), "<f4") for one in vectors]
        np.testing.assert_allclose(vectors, native, atol=1e-5)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_openai_one_text_and_dimensions(server: Running) -> None:
    answer = server.openai.embeddings.create(model="vectors", input=TEXTS[0], dimensions=9)
    [native] = server.native("/embed", adapter="vectors", inputs=TEXTS[0], dimensions=9)
    np.testing.assert_allclose(answer.data[0].embedding, native, atol=1e-5)
    body = {"model": "vectors", "input": TEXTS[0], "dimensions": 9, "encoding_format": None, "user": None}
    answer = server.http.post("/v1/embeddings", json=body)  # proxies put null for what was not asked
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], native, atol=1e-5)


def test_openai_models(server: Running, minilm: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {one.id: one for one in server.openai.models.list()}
    assert set(ADAPTERS) <= set(models)
    backbone = models[minilm.spec.name]
    assert (backbone.parent, backbone.root) == (None, minilm.spec.name)
    detail = server.http.get("/admin/adapters/moods").json()
    for moods in (models["moods"], server.openai.models.retrieve("moods")):
        assert (moods.parent, moods.root) == (minilm.spec.name, detail["version"])
        assert 0 <= time.time() - moods.created < 10_000
    assert server.openai.models.retrieve(minilm.spec.name).id == minilm.spec.name
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("mods")
    monkeypatch.setattr(compat.openai, "MAX_MODELS", 2)
    listed = server.http.get("/v1/models").json()
    assert (len(listed["data"]), listed["has_more"]) == (3, True)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": [1, 2, 3]}, "input: arrays of tokens"),
        ({"input": [[1, 2], [3]]}, "input: arrays of tokens"),
        ({"input": []}, "input"),
        ({"input": "word " * 600}, "602 tokens"),
        ({"input": "a", "dimensions": 385}, "dimensions"),
        ({"input": "a", "extra_body": {"late_chunking": True}}, "late_chunking"),
    ],
)
def test_openai_what_cannot_be_honoured_is_refused_by_name(server: Running, body: dict[str, Any], field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=field) as error:
        server.openai.embeddings.create(model="vectors", **body)
    assert error.value.type == "invalid_request_error"
    assert error.value.code


def test_openai_errors_are_the_clients_own(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no adapter is called") as error:
        server.openai.embeddings.create(model="nothing", input="a")
    assert error.value.code == "model_not_found"
    assert error.value.request_id
    with pytest.raises(openai.BadRequestError, match="/classify") as wrong:
        server.openai.embeddings.create(model="moods", input="a")
    assert wrong.value.code == "wrong_task"


def test_the_user_is_the_routing_key(server: Running, minilm: Backbone) -> None:
    """Of two versions that share the traffic, the one that our own route would take answers."""
    one, other = (publish(server.store, minilm, "moods", seed=seed, name="canary") for seed in (5, 6))
    Sync(server.store).release("canary", Plan(traffic={one: 0.5, other: 0.5}), by="test")
    taken = set()
    for user in map(str, range(8)):
        native = server.http.post("/classify", json={"adapter": "canary", "inputs": "a", "routing_key": user}).json()
        answer = server.http.post("/vllm/classify", json={"model": "canary", "input": "a", "user": user}).json()
        assert same(max(answer["data"][0]["probs"]), native["predictions"][0][0]["score"])
        taken.add(native["version"])
    assert len(taken) == 2


# --- Open Inference Protocol


def tensor(texts: list[str], name: str = "text", shape: list[int] | None = None) -> oip.RequestInput:
    data = oip.TensorData(__root__=texts)
    return oip.RequestInput(name=name, shape=shape or [len(texts)], datatype="BYTES", data=data)


def infer(server: Running, model: str, *inputs: oip.RequestInput, **fields: Any) -> dict[str, Any]:
    request = oip.InferenceRequest(inputs=list(inputs), **fields)
    with_client = server.oip.model_infer(model, request=request)
    assert with_client.model_name == model
    return {one.name: (one.shape, one.datatype, one.data.__root__) for one in with_client.outputs}


def test_oip_health_and_metadata(server: Running) -> None:
    client = server.oip
    client.check_server_liveness()
    client.check_server_readiness()
    assert client.read_server_metadata().name == "adapterd"
    assert client.read_server_metadata().extensions == []
    version = server.http.get("/admin/adapters/moods").json()["version"]
    client.check_model_readiness("moods")
    client.check_model_version_readiness("moods", version)
    for metadata in (client.read_model_metadata("moods"), client.read_model_version_metadata("moods", version)):
        assert (metadata.name, metadata.versions, metadata.platform) == ("moods", [version], "adapterd")
        assert [(one.name, one.datatype) for one in metadata.inputs or ()] == [
            ("text", "BYTES"),
            ("text_pair", "BYTES"),
        ]
        assert [one.name for one in metadata.outputs or ()] == ["labels", "scores"]
    with pytest.raises(ApiError) as error:
        client.check_model_readiness("mods")
    assert error.value.status_code == 404
    with pytest.raises(ApiError) as error:
        client.check_model_version_readiness("moods", "0" * 64)
    assert error.value.status_code == 404


def test_oip_classify(server: Running) -> None:
    native = server.native("/classify", adapter="moods", inputs=TEXTS, top_k=2)
    outputs = infer(server, "moods", tensor(TEXTS), parameters={"top_k": 2})
    assert outputs["labels"] == ([3, 2], "BYTES", [one["label"] for own in native for one in own])
    shape, datatype, values = outputs["scores"]
    assert (shape, datatype) == ([3, 2], "FP32")
    assert same(values, [one["score"] for own in native for one in own])
    only = infer(server, "moods", tensor(TEXTS), outputs=[oip.RequestOutput(name="scores")])
    assert list(only) == ["scores"]
    nested = server.http.post(
        "/v2/models/moods/infer",
        json={
            "id": "mine",
            "parameters": {"top_k": 2, "binary_data_output": True},
            "inputs": [{"name": "text", "shape": [3, 1], "datatype": "BYTES", "data": [[text] for text in TEXTS]}],
            "outputs": None,
        },
    ).json()
    assert nested["id"] == "mine"
    assert same(nested["outputs"][1]["data"], values)


def test_oip_every_task(server: Running) -> None:
    pairs = [{"text": TEXTS[0], "text_pair": TEXTS[1]}]
    [native] = server.native("/classify", adapter="moods", inputs=pairs)
    outputs = infer(server, "moods", tensor(TEXTS[:1]), tensor(TEXTS[1:2], "text_pair"))
    assert same(dict(zip(outputs["labels"][2], outputs["scores"][2], strict=True)), scores(native))
    found = infer(server, "entities", tensor(TEXTS), parameters={"aggregation": "none"})["entities"]
    assert found[:2] == ([3], "BYTES")
    tagged = server.native("/tag", adapter="entities", inputs=TEXTS, aggregation="none")
    assert [[one["label"] for one in json.loads(row)] for row in found[2]] == [
        [one["label"] for one in row] for row in tagged
    ]
    [answers] = server.native("/answer", adapter="answers", inputs={"question": "Who?", "context": CONTEXT}, top_k=2)
    output = infer(server, "answers", tensor(["Who?"]), tensor([CONTEXT], "text_pair"), parameters={"top_k": 2})
    assert [one["text"] for one in json.loads(output["answers"][2][0])] == [one["text"] for one in answers]
    vectors = np.array(server.native("/embed", adapter="vectors", inputs=TEXTS))
    shape, datatype, values = infer(server, "vectors", tensor(TEXTS))["embeddings"]
    assert (shape, datatype) == (list(vectors.shape), "FP32")
    np.testing.assert_allclose(np.reshape(values, shape), vectors, atol=1e-5)


def test_oip_a_version_can_be_asked(server: Running) -> None:
    version = server.http.get("/admin/adapters/moods").json()["version"]
    request = oip.InferenceRequest(inputs=[tensor(TEXTS)])
    answer = server.oip.model_version_infer("moods", version, request=request)
    assert answer.model_version == version
    with pytest.raises(ApiError) as error:
        server.oip.model_version_infer("moods", "0" * 64, request=request)
    assert error.value.status_code == 404


@pytest.mark.parametrize(
    ("model", "inputs", "fields", "words"),
    [
        ("moods", [tensor(["a", "b"], shape=[3])], {}, "shape"),
        ("moods", [tensor(["a"], "text_pair")], {}, "one text is needed"),
        ("moods", [tensor(["a"]), tensor(["b"])], {}, "one text is needed"),
        ("moods", [tensor(["a", "b"]), tensor(["c"], "text_pair")], {}, "as many texts"),
        ("answers", [tensor(["a"])], {}, "as many texts"),
        ("entities", [tensor(["a"]), tensor(["b"], "text_pair")], {}, "inputs.0"),
        ("moods", [tensor(["a"])], {"parameters": {"adapter": "topics"}}, "parameters.adapter"),
        ("moods", [tensor(["a"])], {"parameters": {"temperature": 1}}, "temperature"),
        ("moods", [tensor(["a"])], {"outputs": [oip.RequestOutput(name="logits")]}, "'logits'"),
    ],
)
def test_oip_what_cannot_be_honoured_is_refused_by_name(
    server: Running, model: str, inputs: list[oip.RequestInput], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ApiError) as error:
        infer(server, model, *inputs, **fields)
    assert error.value.status_code == 400
    assert words in error.value.body["error"]


def test_oip_requests_as_tritons_client_sends_them(server: Running) -> None:
    """Without a Content-Type, and with outputs wanted in binary, which it reads as JSON as well."""
    one = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    wanted = [{"name": "scores", "parameters": {"binary_data": True}}]
    for more in ({"parameters": {"binary_data_output": True}}, {"outputs": wanted}):
        answer = server.http.post("/v2/models/moods/infer", content=json.dumps({"inputs": [one]} | more))
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][-1]["shape"] == [1, 3]
    assert server.http.post("/vllm/classify", content=b'{"model": "moods", "input": "a"}').status_code == 400


def test_oip_binary_inputs_are_refused(server: Running) -> None:
    one = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}
    body = json.dumps({"inputs": [one]}).encode()
    answer = server.http.post(
        "/v2/models/moods/infer",
        content=body + b"\1\0\0\0a",
        headers={"Inference-Header-Content-Length": str(len(body))},
    )
    assert answer.status_code == 400
    assert "binary tensors are not taken" in answer.json()["error"]


# --- errors, over all routes


def question(text: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [len(text)], "datatype": "BYTES", "data": text}


class Asked(NamedTuple):
    """How texts are put to a route: (texts) -> body; the adapter to ask, and one of another task."""

    body: Callable[[list[str]], dict[str, Any]]
    adapter: str
    wrong: str
    inside: bool = False
    """Whether the body names the adapter."""


CASES: dict[str, Asked] = {
    "/models/{name}/pipeline/{pipeline}": Asked(lambda texts: {"inputs": texts}, "moods", "vectors"),
    "/models/{name}": Asked(lambda texts: {"inputs": texts}, "moods", ""),
    "/tei/{adapter}/predict": Asked(lambda texts: {"inputs": [[text] for text in texts]}, "moods", "vectors"),
    "/tei/predict": Asked(lambda texts: {"inputs": [[text] for text in texts]}, "moods", "vectors", inside=True),
    "/tei/{adapter}/embed": Asked(lambda texts: {"inputs": texts}, "vectors", "moods"),
    "/tei/embed": Asked(lambda texts: {"inputs": texts}, "vectors", "moods", inside=True),
    "/vllm/classify": Asked(lambda texts: {"input": texts}, "moods", "vectors", inside=True),
    "/v1/embeddings": Asked(lambda texts: {"input": texts}, "vectors", "moods", inside=True),
    "/v2/models/{name}/infer": Asked(lambda texts: {"inputs": [question(texts)]}, "moods", ""),
    "/v2/models/{name}/versions/{version}/infer": Asked(lambda texts: {"inputs": [question(texts)]}, "moods", ""),
}
"""Every route that is asked texts. Where the adapter's task decides, there is no wrong one."""

JSON = {"content-type": "application/json"}

ADMINISTRATION = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}

PATHS = [(method, route.path) for router in compat.ROUTERS for route in router.routes for method in route.methods]


def check_error(answer: httpx.Response, status: int) -> None:
    """Asserts the shape of the peer that the path belongs to, and the peer's status for one of ours."""
    path = answer.request.url.path
    body = answer.json()
    assert answer.headers["x-request-id"]
    if path.startswith("/models"):
        assert set(body) == {"error"}
        assert isinstance(body["error"], str)
    elif path.startswith("/tei"):
        status = {409: 424, 500: 424}.get(status, status)
        types = {424: "Backend", 429: "Overloaded", 503: "Unhealthy"}
        assert isinstance(body["error"], str)
        assert body == {"error": body["error"], "error_type": types.get(status, "Validation")}
    elif path.startswith("/v2"):
        status = {409: 400, 413: 400, 422: 400}.get(status, status)
        assert set(body) == {"error"}
        assert isinstance(body["error"], str)
    else:
        status = {409: 400, 413: 400, 422: 400}.get(status, status)
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["code"], str if path == "/v1/embeddings" else int)
    assert answer.status_code == status, answer.text


def ask(server: Running, path: str, adapter: str, texts: list[str], **more: Any) -> httpx.Response:
    case = CASES[path]
    named = {"model": adapter} if case.inside else {}
    body = json.dumps(case.body(texts) | named | more)  # as ASCII, which halves of characters survive
    return server.http.post(url_of(server, path, adapter), content=body, headers=JSON)


def url_of(server: Running, path: str, adapter: str) -> str:
    detail = server.http.get(f"/admin/adapters/{adapter}").json()
    named = {"name": adapter, "adapter": adapter, "pipeline": "text-classification"}
    return path.replace(":path", "").format(**named, version=detail.get("version", "0" * 64))


def test_every_route_is_walked() -> None:
    assert {path for method, path in PATHS if method == "POST"} == set(CASES) | ADMINISTRATION
    assert {method for method, _ in PATHS} == {"GET", "POST"}


@pytest.mark.parametrize("path", CASES)
def test_wrong_requests_get_errors_in_the_peers_shape(server: Running, path: str) -> None:
    case = CASES[path]
    check_error(ask(server, path, "nobody", ["a"]), 404)
    if case.wrong:
        check_error(ask(server, path, case.wrong, ["a"]), 409)
    check_error(ask(server, path, case.adapter, [" "]), 422)
    check_error(ask(server, path, case.adapter, []), 422)
    check_error(ask(server, path, case.adapter, ["a\ud800"]), 422)
    check_error(ask(server, path, case.adapter, ["a"] * (MAX_INPUTS + 1)), 413)
    check_error(ask(server, path, case.adapter, ["a"], unheard_of=1), 422)
    check_error(ask(server, path, case.adapter, ["a" * MAX_BODY_BYTES]), 413)
    url = url_of(server, path, case.adapter)
    check_error(server.http.post(url, content=b'{"inputs": ', headers=JSON), 422)
    check_error(server.http.post(url, json=["a"]), 422)
    check_error(server.http.post(url, json={}), 422)
    check_error(server.http.delete(url), 405)
    assert ask(server, path, case.adapter, ["a"]).status_code == 200


@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("error", [Overloaded("full"), StoreUnavailable("away"), NotFiniteOutput("too large")])
def test_what_happens_to_the_server_keeps_its_retry_after(
    server: Running, path: str, error: AdapterdError, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Engine, request: TaskRequest) -> Any:
        raise error

    case = CASES[path]
    monkeypatch.setattr(Engine, "run", fail)
    answer = ask(server, path, case.adapter, ["a"])
    check_error(answer, error.status)
    assert answer.headers.get("retry-after") == (None if error.retry_after is None else str(error.retry_after))


@pytest.mark.parametrize("path", [path for method, path in PATHS if method == "GET" and "{" in path])
def test_reading_of_an_unknown_adapter(server: Running, path: str) -> None:
    answer = server.http.get(url_of(server, path, "nobody"))
    assert answer.status_code == 404
    assert "error" in answer.json()


@pytest.mark.parametrize("prefix", compat.SHAPES)
def test_paths_that_are_not_there(server: Running, prefix: str) -> None:
    answer = server.http.get(f"{prefix}/no/such/path/at/all")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert isinstance(error, dict if prefix.startswith(("/v1", "/vllm")) else str)


def test_other_paths_have_errors_of_our_own(server: Running) -> None:
    for path in ("/classify", "/nothing", "/teix", "/v2x/models", "/model/moods"):
        assert "request_id" in server.http.get(f"{path}").json()["error"]


def test_a_fault_of_ours_is_a_500_in_the_peers_shape(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: Engine, request: TaskRequest) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Engine, "run", fail)
    for path, body in (("/tei/embed", {"inputs": "a"}), ("/v1/embeddings", {"model": "vectors", "input": "a"})):
        answer = httpx.post(f"{server.url}{path}", json=body)  # uvicorn ends the connection with it
        assert answer.status_code == 500
        assert answer.json()["error"]


def test_not_ready_is_told(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(_: Engine) -> None:
        raise WarmingUp("the server is warming up")

    assert server.http.get("/v2/models/moods/ready").json()["ready"] is True
    monkeypatch.setattr(Engine, "check_ready", cold)
    for path in (
        "/tei/health",
        "/tei/moods/health",
        "/models/moods/health",
        "/v2/health/ready",
        "/v2/models/moods/ready",
    ):
        answer = server.http.get(path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
    assert server.http.get("/v2/health/live").status_code == 200


def test_the_openapi_document_shows_the_peers_errors(server: Running) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    for method, path in PATHS:
        shown = paths[path.replace(":path", "")][method.lower()]["responses"]
        assert set(shown) == {"200", "4XX", "5XX"}, path


# --- documents


def curl_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "compat.md").read_text(), re.S)
    assert len(blocks) >= 8
    return blocks


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_documents_curl_lines_work_word_for_word(server: Running, minilm: Backbone) -> None:
    publish(server.store, minilm, "moods", seed=3, name="sentiment")
    checkpoint(server.root / "mood")
    for line in curl_lines():
        command = line.replace("http://127.0.0.1:8000", server.url).replace("curl -s", "curl -sS --fail-with-body")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{line}{done.stdout}{done.stderr}"
        assert done.stdout


def test_the_document_names_every_prefix_and_setting() -> None:
    text = (ROOT / "docs" / "compat.md").read_text()
    for path in (*compat.SHAPES, *(path for path in CASES if path.startswith("/tei/") and "{" not in path)):
        assert path in text
    assert "ADAPTERD_LORA_PATH_ROOT" in text
