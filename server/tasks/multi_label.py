"""Multi-label classification of texts: the same head, and for each label a probability of its own and a threshold."""

from collections.abc import Collection, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from server.core import Activation, BackboneSpec, ClassifyOptions, Encoding, LabelDecision, Route
from server.errors import InvalidAdapter
from server.tasks import metrics
from server.tasks.base import Numbers, need_labels
from server.tasks.classification import activated, ranked
from server.tasks.examples import Label, TextExample
from server.tasks.metrics import Report
from server.tasks.pooled import PooledConfig, TextTask, scored

THRESHOLD = 0.5

Probability = Annotated[float, Field(ge=0, le=1)]


class MultiLabelConfig(PooledConfig):
    """The head, and what a label's probability has to reach."""

    thresholds: tuple[Probability, ...] | None = Field(None, max_length=10_000)
    """In the order of the labels; 0.5 for each if None."""


class LabelsText(TextExample):
    """A text with any number of labels."""

    labels: tuple[Label, ...]

    def names(self) -> Collection[str]:
        """Those."""
        return self.labels


class MultiLabelClassification(TextTask[MultiLabelConfig, ClassifyOptions, LabelsText]):
    """Any number of labels per text."""

    name = "multi_label_classification"
    route = Route.CLASSIFY
    Config = MultiLabelConfig
    options = ClassifyOptions
    example = LabelsText
    prediction = list[LabelDecision]
    measured = ClassifyOptions()
    decisive = {"micro_f1": 1, "macro_f1": 1}

    def check(self, config: MultiLabelConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least one label, and as many thresholds as labels."""
        need_labels(self, labels, 1)
        if config.thresholds is not None and len(config.thresholds) != len(labels):
            raise InvalidAdapter(
                f"{len(config.thresholds)} thresholds for {len(labels)} labels",
                param="head.thresholds",
                code="invalid_labels",
            )
        super().check(config, labels, spec)

    def decode(
        self, outputs: Tensor, config: MultiLabelConfig, labels: Sequence[str], options: ClassifyOptions
    ) -> list[list[LabelDecision]]:
        """The labels of each row of [texts, labels], likeliest first; equal scores keep the order of the labels.

        Thresholds are probabilities, whatever the scores are given as.
        """
        likely = outputs.float().sigmoid() >= torch.tensor(self._thresholds(config, labels, options))
        scores, order = ranked(activated(outputs, options.activation or Activation.SIGMOID), options.top_k)
        return [
            [LabelDecision(labels[i], score, own[i]) for i, score in zip(indices, row, strict=True)]
            for indices, row, own in zip(order, scores, likely.tolist(), strict=True)
        ]

    def numbers(self, tokens: int, labels: Sequence[str], options: ClassifyOptions) -> Numbers:
        """An output of each label, and scores of those that are wanted."""
        return scored(labels, options.top_k)

    def agrees(self, one: Sequence[LabelDecision], other: Sequence[LabelDecision]) -> bool:
        """Whether the same labels reach their thresholds."""
        return _above(one) == _above(other)

    def targets(self, examples: Sequence[LabelsText], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        """0 or 1 for each text and label [texts, labels]."""
        return torch.tensor([[float(label in example.labels) for label in labels] for example in examples])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy."""
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def kept(self, prediction: Sequence[LabelDecision]) -> list[LabelDecision]:
        """The labels that the text has, of what may be thousands."""
        return [decision for decision in prediction if decision.above]

    def measure(self, examples: Sequence[LabelsText], predictions: Sequence[Sequence[LabelDecision]]) -> Report:
        """`exact`, `micro_f1` and `macro_f1`."""
        return metrics.multi_label([example.labels for example in examples], list(map(_above, predictions)))

    def _thresholds(self, config: MultiLabelConfig, labels: Sequence[str], options: ClassifyOptions) -> Sequence[float]:
        if options.threshold is not None:
            return [options.threshold] * len(labels)
        return config.thresholds or [THRESHOLD] * len(labels)


def _above(prediction: Sequence[LabelDecision]) -> set[str]:
    return {decision.label for decision in prediction if decision.above}
