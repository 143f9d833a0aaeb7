"""Single-label classification of texts and of pairs of texts: a head on a pooled vector, softmax over the labels."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core import Activation, BackboneSpec, ClassifyOptions, Encoding, LabelScore, Route
from server.tasks import metrics
from server.tasks.base import ConfigT, HeadT, Numbers, need_labels
from server.tasks.examples import LabelledText
from server.tasks.metrics import Report
from server.tasks.pooled import PooledConfig, PooledHead, PooledTask, TextTask, scored

ExampleT = TypeVar("ExampleT", bound=LabelledText)


class SingleLabel(PooledTask[ConfigT, HeadT, ClassifyOptions, ExampleT]):
    """One label per text, whatever the head reads: softmax over outputs [texts, labels]."""

    route = Route.CLASSIFY
    options = ClassifyOptions
    prediction = list[LabelScore]
    measured = ClassifyOptions(top_k=1)
    decisive = {"accuracy": 1, "macro_f1": 1}

    def decode(
        self, outputs: Tensor, config: ConfigT, labels: Sequence[str], options: ClassifyOptions
    ) -> list[list[LabelScore]]:
        """The labels of each row of [texts, labels], best first; equal scores keep the order of the labels."""
        scores, order = ranked(activated(outputs, options.activation or Activation.SOFTMAX), options.top_k)
        return [
            [LabelScore(labels[i], score) for i, score in zip(indices, row, strict=True)]
            for indices, row in zip(order, scores, strict=True)
        ]

    def numbers(self, tokens: int, labels: Sequence[str], options: ClassifyOptions) -> Numbers:
        """An output of each label, and scores of those that are wanted."""
        return scored(labels, options.top_k)

    def agrees(self, one: Sequence[LabelScore], other: Sequence[LabelScore]) -> bool:
        """Whether the best labels are the same one."""
        return [score.label for score in one[:1]] == [score.label for score in other[:1]]

    def targets(self, examples: Sequence[ExampleT], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        """Label indices [texts]."""
        index = {label: i for i, label in enumerate(labels)}
        return torch.tensor([index[example.label] for example in examples])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(outputs, targets)

    def measure(self, examples: Sequence[ExampleT], predictions: Sequence[Sequence[LabelScore]]) -> Report:
        """`accuracy` and `macro_f1`."""
        return metrics.single_label([example.label for example in examples], [best[0].label for best in predictions])


class Classification(
    SingleLabel[PooledConfig, PooledHead, LabelledText], TextTask[PooledConfig, ClassifyOptions, LabelledText]
):
    """One label per text, read from a pooled vector."""

    name = "classification"
    example = LabelledText

    def check(self, config: PooledConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least two labels."""
        need_labels(self, labels, 2)
        super().check(config, labels, spec)


def activated(outputs: Tensor, activation: Activation) -> Tensor:
    """Logits [texts, labels] as scores."""
    if activation is Activation.SOFTMAX:
        return outputs.float().softmax(-1)
    return outputs.float().sigmoid() if activation is Activation.SIGMOID else outputs.float()


def ranked(scores: Tensor, top_k: int | None) -> tuple[list[list[float]], list[list[int]]]:
    """The best scores of each row [texts, labels], and whose they are."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :top_k].tolist(), order[:, :top_k].tolist()
