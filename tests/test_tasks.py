"""The classification task: outputs to answers, loss, and a head to train."""

import itertools

import pytest
import torch
from helpers import LABELS, make_blueprint, random_adapter, random_text, run
from torch import Tensor

from server.adapters.states import TextStates
from server.backbone.backbone import Backbone
from server.core import LabelScore, Pooling
from server.tasks import TASKS

TASK = TASKS["classification"]


def test_every_label_is_answered_best_first() -> None:
    outputs = torch.tensor([[0.0, 2.0, 1.0], [5.0, -5.0, 0.0]])
    first, second = TASK.decode(outputs, LABELS[:3])
    assert [score.label for score in first] == ["bee", "cat", "ant"]
    assert [score.label for score in second] == ["ant", "cat", "bee"]
    for row, prediction in zip(outputs, (first, second), strict=True):
        scores = dict(zip(LABELS, row.softmax(-1).tolist(), strict=False))
        assert prediction == [LabelScore(score.label, scores[score.label]) for score in prediction]
        assert sum(score.score for score in prediction) == pytest.approx(1)
        assert all(a.score >= b.score for a, b in itertools.pairwise(prediction))


def test_equal_scores_keep_the_order_of_the_labels() -> None:
    labels = [f"l{i}" for i in range(100)]
    (prediction,) = TASK.decode(torch.zeros(1, 100), labels)
    assert [score.label for score in prediction] == labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_outputs_are(dtype: torch.dtype) -> None:
    outputs = torch.tensor([[0.5, 0.25, 4.0]], dtype=dtype)
    (prediction,) = TASK.decode(outputs, LABELS[:3])
    assert sum(score.score for score in prediction) == pytest.approx(1, abs=1e-6)


def test_extreme_outputs_stay_probabilities() -> None:
    (prediction,) = TASK.decode(torch.tensor([[1e30, -1e30, 0.0]]), LABELS[:3])
    assert [score.score for score in prediction] == [1.0, 0.0, 0.0]
    assert [score.label for score in prediction] == ["ant", "bee", "cat"]


def test_no_texts_have_no_answers() -> None:
    assert TASK.decode(torch.zeros(0, 3), LABELS[:3]) == []


def test_a_head_reads_its_own_texts_and_its_own_pooling() -> None:
    tokens = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    states = TextStates(tokens, [2, 3, 4], None)
    weight, bias = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 2.0, 3.0])
    tensors = {"head/classifier.weight": weight, "head/classifier.bias": bias}
    pooled: dict[Pooling, list[Tensor]] = {
        Pooling.MEAN: [part.mean(0) for part in tokens.split([2, 3, 4])],
        Pooling.CLS: [tokens[0], tokens[2], tokens[5]],
    }
    for pooling, vectors in pooled.items():
        head = TASK.bind(TASK.Config(pooling=pooling), tensors)
        expected = torch.stack([weight @ vector + bias for vector in vectors])
        torch.testing.assert_close(TASK.apply(head, states, 0, 3), expected)
        torch.testing.assert_close(TASK.apply(head, states, 1, 2), expected[1:2])
        assert TASK.apply(head, states, 1, 1).shape == (0, 3)


def test_the_loss_falls_as_the_right_label_rises() -> None:
    targets = torch.tensor([2, 0])
    worse, better = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert TASK.loss(worse, targets) == pytest.approx(torch.tensor(3.0).log().item())
    assert TASK.loss(better, targets) < TASK.loss(worse, targets) < TASK.loss(-better, targets)


def test_a_fresh_head_learns(bert: Backbone) -> None:
    """A few steps through the code that serves, on an adapter and a head from `init`."""
    blueprint = make_blueprint(bert.spec, "lora", {}, labels=LABELS[:2])
    tensors = {
        name: tensor.requires_grad_() for name, tensor in blueprint.init(torch.Generator().manual_seed(0)).items()
    }
    texts = [random_text(length, seed=length) for length in (4, 9, 6, 12)]
    targets = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.Adam(tensors.values(), lr=0.02)
    losses = []
    for _ in range(30):
        adapter = blueprint.bind(tensors, bert.device, bert.dtype)
        answers = run(bert, [(text, adapter) for text in texts])
        loss = TASK.loss(torch.stack([answer.logits for answer in answers]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_the_memory_of_an_adapter_is_that_of_its_tensors(bert: Backbone) -> None:
    adapter = random_adapter(bert, "lora", {"r": 2, "lora_alpha": 2}, seed=0)
    assert adapter.bound.nbytes == sum(tensor.numel() * 4 for tensor in adapter.tensors.values())
