"""The tasks: outputs to answers, losses, heads, and one to train."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, make_blueprint, random_adapter, random_text, run
from torch import Tensor

from server.adapters.pieces import ALIGNMENT, TENSOR_BYTES
from server.adapters.states import TextStates
from server.backbone.backbone import Backbone
from server.core import Activation, ClassifyOptions, LabelScore, Pooling, TextInput, WindowPooling
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks import TASKS
from server.tasks.adapter import Blueprint
from server.tasks.base import AnyTask, Window
from server.tasks.head import LayersConfig, hidden_name

TASK = TASKS["classification"]
MULTI_LABEL = TASKS["multi_label_classification"]
REGRESSION = TASKS["regression"]
TAGGING = TASKS["tagging"]


def states_of(lengths: list[int], virtual: list[tuple[int, int]] | None = None) -> TextStates:
    """Random states [tokens, 4] of texts of these lengths."""
    tokens = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(0))
    return TextStates(tokens, lengths, virtual or [(0, 0)] * len(lengths), None)


def head_tensors(task: str, bert: Backbone, labels: int, **options: object) -> tuple[object, dict[str, Tensor]]:
    """A random head: its config and its tensors by their names in the artifact."""
    config = TASKS[task].Config(**options)
    shapes = TASKS[task].shapes(config, LABELS[:labels], bert.spec)
    generator = torch.Generator().manual_seed(1)
    return config, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def decode(task: AnyTask, outputs: Tensor, labels: Sequence[str], head: dict | None = None, **options: object) -> list:
    return task.decode(outputs, task.Config(**head or {}), labels, task.options(**options))


def test_every_label_is_answered_best_first() -> None:
    outputs = torch.tensor([[0.0, 2.0, 1.0], [5.0, -5.0, 0.0]])
    first, second = decode(TASK, outputs, LABELS[:3])
    assert [score.label for score in first] == ["bee", "cat", "ant"]
    assert [score.label for score in second] == ["ant", "cat", "bee"]
    for row, prediction in zip(outputs, (first, second), strict=True):
        scores = dict(zip(LABELS, row.softmax(-1).tolist(), strict=False))
        assert prediction == [LabelScore(score.label, scores[score.label]) for score in prediction]
        assert sum(score.score for score in prediction) == pytest.approx(1)
        assert all(a.score >= b.score for a, b in itertools.pairwise(prediction))


def test_equal_scores_keep_the_order_of_the_labels() -> None:
    labels = [f"l{i}" for i in range(100)]
    (prediction,) = decode(TASK, torch.zeros(1, 100), labels)
    assert [score.label for score in prediction] == labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_outputs_are(dtype: torch.dtype) -> None:
    outputs = torch.tensor([[0.5, 0.25, 4.0]], dtype=dtype)
    (prediction,) = decode(TASK, outputs, LABELS[:3])
    assert sum(score.score for score in prediction) == pytest.approx(1, abs=1e-6)


def test_extreme_outputs_stay_probabilities() -> None:
    (prediction,) = decode(TASK, torch.tensor([[1e30, -1e30, 0.0]]), LABELS[:3])
    assert [score.score for score in prediction] == [1.0, 0.0, 0.0]
    assert [score.label for score in prediction] == ["ant", "bee", "cat"]


def test_no_texts_have_no_answers() -> None:
    assert decode(TASK, torch.zeros(0, 3), LABELS[:3]) == []


def test_a_head_reads_its_own_texts_and_its_own_pooling() -> None:
    states = states_of([2, 3, 4])
    tokens = states.tokens
    weight, bias = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 2.0, 3.0])
    tensors = {"head/classifier.weight": weight, "head/classifier.bias": bias}
    pooled: dict[Pooling, list[Tensor]] = {
        Pooling.MEAN: [part.mean(0) for part in tokens.split([2, 3, 4])],
        Pooling.CLS: [tokens[0], tokens[2], tokens[5]],
        Pooling.LAST: [tokens[1], tokens[4], tokens[8]],
    }
    for pooling, vectors in pooled.items():
        head = TASK.bind(TASK.Config(pooling=pooling), tensors)
        expected = torch.stack([weight @ vector + bias for vector in vectors])
        torch.testing.assert_close(TASK.apply(head, states, 0, 3), expected)
        torch.testing.assert_close(TASK.apply(head, states, 1, 2), expected[1:2])
        assert TASK.apply(head, states, 1, 1).shape == (0, 3)


def test_the_mean_counts_virtual_tokens_and_the_first_may_be_one() -> None:
    """As PEFT and AdapterHub do it: what joins the text is part of it for a head that pools."""
    states = states_of([5, 3], [(0, 2), (1, 1)])
    torch.testing.assert_close(states.pooled(Pooling.MEAN)[0], states.tokens[:5].mean(0))
    torch.testing.assert_close(states.pooled(Pooling.CLS), states.tokens[[0, 5]])


@pytest.mark.parametrize("task", ["classification", "multi_label_classification", "regression", "tagging"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"hidden_layers": 1},
        {"hidden_layers": 2, "activation": "gelu_new", "bias": False},
        {"hidden_layers": 1, "activation": None, "hidden_bias": False},
        {"hidden_layers": 1, "activation": "RELU", "norm_eps": 1e-5},
        {"norm_eps": 0.1},
    ],
    ids=str,
)
def test_a_head_is_its_layers_in_order(task: str, options: dict, bert: Backbone) -> None:
    config, tensors = head_tensors(task, bert, 3, **options)
    hidden = options.get("hidden_layers", 0)
    assert len(tensors) == (
        hidden * (2 if options.get("hidden_bias", True) else 1)
        + ("norm_eps" in options)
        + 1
        + options.get("bias", True)
    )
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    expected = states
    activation = {
        "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": torch.relu, "tanh": torch.tanh, None: lambda x: x
    }[options["activation"].lower() if options.get("activation") else options.get("activation", "tanh")]  # fmt: skip
    for index in range(hidden):
        bias = tensors.get(hidden_name(index, "bias"), torch.zeros(32))
        expected = activation(expected @ tensors[hidden_name(index, "weight")].T + bias)
    if "norm_eps" in options:
        centered = expected - expected.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + options["norm_eps"]).sqrt()
        expected = centered / scale * tensors["head/norm.weight"]
    expected = expected @ tensors["head/classifier.weight"].T + tensors.get("head/classifier.bias", torch.zeros(3))
    bound = TASKS[task].bind(config, {name: tensor.double() for name, tensor in tensors.items()})
    texts = TextStates(states, [1] * 5, [(0, 0)] * 5, None)
    outputs = TASKS[task].apply(bound, texts, 0, 5)
    outputs = torch.cat(outputs) if task == "tagging" else outputs
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4)


LAYERED = [name for name, task in TASKS.items() if issubclass(task.Config, LayersConfig)]


@pytest.mark.parametrize("task", LAYERED)
@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"hidden_layers": -1}, "hidden_layers"),
        ({"hidden_layers": 17}, "hidden_layers"),
        ({"hidden_layers": 10**30}, "hidden_layers"),
        ({"activation": "prelu"}, "activation"),
        ({"activation": 3}, "activation"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_a_heads_options_are_checked(task: str, options: dict, param: str, bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        Blueprint.check(method="head_only", config={}, task=task, head=options, labels=LABELS[:2], spec=bert.spec)
    assert caught.value.param == f"head.{param}"


def test_each_label_of_many_has_a_probability_of_its_own() -> None:
    outputs = torch.tensor([[0.0, 3.0, -1.0], [100.0, -100.0, 100.0]])
    first, second = decode(MULTI_LABEL, outputs, LABELS[:3])
    assert [one.label for one in first] == ["bee", "ant", "cat"]
    assert {one.label: one.score for one in first} == pytest.approx(
        dict(zip(LABELS, outputs[0].sigmoid().tolist(), strict=False))
    )
    assert [(one.label, one.score) for one in second] == [("ant", 1.0), ("cat", 1.0), ("bee", pytest.approx(0))]
    assert [[one.label for one in labels] for labels in decode(MULTI_LABEL, outputs, LABELS[:3], top_k=1)] == [
        ["bee"],
        ["ant"],
    ]


def test_a_label_of_many_is_given_from_its_threshold_on() -> None:
    outputs = torch.tensor([[0.0, 1.0, -1.0]])  # 0.5, 0.73, 0.27
    own = {"thresholds": (0.6, 0.8, 0.2)}

    def above(head: dict | None = None, **options: object) -> dict[str, bool]:
        (prediction,) = decode(MULTI_LABEL, outputs, LABELS[:3], head, **options)
        return {one.label: one.above for one in prediction}

    assert above() == {"ant": True, "bee": True, "cat": False}
    assert above(own) == {"ant": False, "bee": False, "cat": True}
    assert above(own, threshold=0.7) == {"ant": False, "bee": True, "cat": False}
    assert above(own, activation=Activation.NONE) == above(own)


def test_thresholds_are_as_many_as_labels(bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        Blueprint.check(
            method="head_only",
            config={},
            task="multi_label_classification",
            head={"thresholds": [0.5]},
            labels=LABELS[:2],
            spec=bert.spec,
        )
    assert caught.value.param == "head.thresholds"


def test_numbers_are_answered_as_they_are() -> None:
    outputs = torch.tensor([[0.5, -3.0], [7.0, 0.0]])
    first, second = decode(REGRESSION, outputs, ["joy", "fear"])
    assert first == [LabelScore("joy", 0.5), LabelScore("fear", -3.0)]
    assert second == [LabelScore("joy", 7.0), LabelScore("fear", 0.0)]
    assert decode(REGRESSION, outputs, ["joy", "fear"], top_k=1) == [first[:1], second[:1]]
    (three,) = decode(REGRESSION, torch.tensor([[-1.0, 5.0, 2.0]]), LABELS[:3])
    assert [one.label for one in three] == ["ant", "bee", "cat"]
    (best,) = decode(REGRESSION, torch.tensor([[-1.0, 5.0, 2.0]]), LABELS[:3], top_k=2)
    assert best == [LabelScore("bee", 5.0), LabelScore("cat", 2.0)]
    (sigmoid,) = decode(REGRESSION, outputs[:1], ["joy", "fear"], activation=Activation.SIGMOID)
    assert [one.score for one in sigmoid] == pytest.approx(outputs[0].sigmoid().tolist())


@pytest.mark.parametrize("activation", Activation)
def test_a_request_chooses_what_scores_are(activation: Activation) -> None:
    outputs = torch.tensor([[0.0, 2.0, 1.0]])
    expected = {"softmax": outputs.softmax(-1), "sigmoid": outputs.sigmoid(), "none": outputs}[activation]
    for task in (TASK, MULTI_LABEL):
        (prediction,) = decode(task, outputs, LABELS[:3], activation=activation)
        assert [one.label for one in prediction] == ["bee", "cat", "ant"]
        assert [one.score for one in prediction] == pytest.approx(sorted(expected[0].tolist(), reverse=True))


@pytest.mark.parametrize("pooling", WindowPooling)
def test_windows_of_a_text_are_pooled_before_they_are_scored(pooling: WindowPooling) -> None:
    outputs = torch.tensor([[0.0, 2.0, 1.0], [4.0, -2.0, 0.0], [1.0, 0.0, 0.0]])
    windows = [Window(random_text(5, seed=0), output) for output in outputs]
    seen = TASK.read(TextInput("x"), windows, TASK.Config(), LABELS[:3], ClassifyOptions(), pooling)
    pooled = outputs.mean(0) if pooling == "mean" else outputs.max(0).values
    assert seen == decode(TASK, pooled[None], LABELS[:3])[0]


@pytest.mark.parametrize("pooling", WindowPooling)
@pytest.mark.parametrize("task", [TASK, MULTI_LABEL, REGRESSION], ids=lambda task: task.name)
def test_windows_of_huge_outputs_have_a_finite_answer(task: AnyTask, pooling: WindowPooling) -> None:
    windows = [Window(random_text(5, seed=0), torch.tensor([3e38, -3e38, 3e38]))] * 3
    for activation in (None, *Activation):
        options = ClassifyOptions(activation=activation)
        seen = task.read(TextInput("x"), windows, task.Config(), LABELS[:3], options, pooling)
        assert all(math.isfinite(one.score) for one in seen)
    seen = task.read(
        TextInput("x"), windows, task.Config(), LABELS[:3], ClassifyOptions(activation=Activation.NONE), pooling
    )
    assert {one.label: one.score for one in seen} == pytest.approx({"ant": 3e38, "bee": -3e38, "cat": 3e38})


def test_a_text_without_spans_is_asked_for() -> None:
    for task in (TASK, MULTI_LABEL, REGRESSION, TAGGING):
        task.check_input(TextInput("a", None if task is TAGGING else "b"))
        with pytest.raises(InvalidRequest, match="does not read spans"):
            task.check_input(TextInput("a", spans=((0, 1),)))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_sample_is_an_input_that_a_client_could_send(task: AnyTask) -> None:
    sample = task.sample("What a lovely day")
    task.check_input(sample)
    assert None not in list(item.values() if isinstance(item := task.route.item(sample), dict) else [item])


def test_agreement_is_about_what_the_answer_says() -> None:
    (one,), (same,), (other,) = (decode(TASK, torch.tensor([row]), LABELS[:2]) for row in ([1, 0], [9, 0], [0, 1]))
    assert TASK.agrees(one, same)
    assert not TASK.agrees(one, other)
    (one,), (same,), (other,) = (
        decode(MULTI_LABEL, torch.tensor([row]), LABELS[:2]) for row in ([1.0, -1], [9, -2.0], [1.0, 1])
    )
    assert MULTI_LABEL.agrees(one, same)
    assert not MULTI_LABEL.agrees(one, other)
    (one,), (same,), (other,) = (decode(REGRESSION, torch.tensor([[row]]), ["x"]) for row in (2.0, 2.1, 2.5))
    assert REGRESSION.agrees(one, same)
    assert not REGRESSION.agrees(one, other)
    (two,) = decode(REGRESSION, torch.tensor([[2.0, 2.0]]), ["x", "y"])
    assert not REGRESSION.agrees(one, two)
    assert not REGRESSION.agrees(two, one)


def test_rows_of_one_number_measure_adapters_of_one_number() -> None:
    REGRESSION.check_measurable(["x"])
    with pytest.raises(InvalidRequest, match="the adapter gives 2"):
        REGRESSION.check_measurable(["x", "y"])


def test_the_loss_of_many_labels_is_that_of_each() -> None:
    outputs = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    each = torch.where(targets.bool(), outputs.sigmoid(), 1 - outputs.sigmoid())
    assert MULTI_LABEL.loss(outputs, targets).item() == pytest.approx(-each.log().mean().item())


@pytest.mark.parametrize(
    ("task", "enough"),
    [("classification", 2), ("multi_label_classification", 1), ("regression", 1), ("tagging", 2)],
)
def test_tasks_want_labels_to_choose_from(task: str, enough: int, bert: Backbone) -> None:
    config = TASKS[task].Config()
    TASKS[task].check(config, LABELS[:enough], bert.spec)
    with pytest.raises(InvalidAdapter) as caught:
        TASKS[task].check(config, LABELS[: enough - 1], bert.spec)
    assert (caught.value.param, caught.value.error_code) == ("labels", "invalid_labels")


def test_tags_are_of_a_texts_own_tokens() -> None:
    states = states_of([4, 5, 3], [(0, 2), (1, 3), (0, 0)])
    own = [states.tokens[2:4], states.tokens[[4, 8]], states.tokens[9:12]]
    weight, bias = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 2.0, 3.0])
    head = TAGGING.bind(TAGGING.Config(), {"head/classifier.weight": weight, "head/classifier.bias": bias})
    outputs = TAGGING.apply(head, states, 0, 3)
    assert [text.shape for text in outputs] == [(2, 3), (2, 3), (3, 3)]
    for text, tokens in zip(outputs, own, strict=True):
        torch.testing.assert_close(text, tokens @ weight.T + bias)
    (last,) = TAGGING.apply(head, states, 2, 3)
    torch.testing.assert_close(last, outputs[2])


def test_tokens_without_a_tag_do_not_count() -> None:
    outputs = [torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([[5.0, 1.0]])]
    expected = -torch.cat(outputs).log_softmax(-1)[[0, 2], [1, 0]].mean()
    torch.testing.assert_close(TAGGING.loss(outputs, torch.tensor([1, -100, 0])), expected)


def test_the_loss_falls_as_the_right_label_rises() -> None:
    targets = torch.tensor([2, 0])
    worse, better = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert TASK.loss(worse, targets) == pytest.approx(torch.tensor(3.0).log().item())
    assert TASK.loss(better, targets) < TASK.loss(worse, targets) < TASK.loss(-better, targets)


def test_a_fresh_head_learns(bert: Backbone) -> None:
    """A few steps through the code that serves, on an adapter and a head from `init`."""
    blueprint = make_blueprint(bert.spec, "lora", {}, labels=LABELS[:2])
    tensors = {
        name: tensor.requires_grad_() for name, tensor in blueprint.init(bert, torch.Generator().manual_seed(0)).items()
    }
    texts = [random_text(length, seed=length) for length in (4, 9, 6, 12)]
    targets = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.Adam(tensors.values(), lr=0.02)
    losses = []
    for _ in range(30):
        adapter = blueprint.bind(tensors, bert)
        answers = run(bert, [(text, adapter) for text in texts])
        loss = TASK.loss(torch.stack([answer.logits for answer in answers]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_the_memory_of_an_adapter_is_that_of_its_tensors(bert: Backbone) -> None:
    adapter = random_adapter(bert, "lora", {"r": 2, "lora_alpha": 2}, seed=0)
    expected = sum(tensor.numel() * 4 + TENSOR_BYTES for tensor in adapter.tensors.values())
    assert adapter.bound.nbytes == expected
    assert adapter.bound.compact().nbytes <= expected + ALIGNMENT * len(adapter.tensors)
