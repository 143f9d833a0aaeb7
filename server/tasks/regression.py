"""Regression: numbers that are measured of texts and of pairs of texts, such as how similar two are."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from server.core import Activation, BackboneSpec, ClassifyOptions, Encoding, LabelScore, Route
from server.errors import InvalidRequest
from server.tasks import metrics
from server.tasks.base import Numbers, Restore, need_labels
from server.tasks.classification import activated, ranked
from server.tasks.examples import TextExample
from server.tasks.head import BIAS, WEIGHT
from server.tasks.metrics import Report
from server.tasks.pooled import PooledConfig, TextTask, scored

LABEL = "score"
"""The only label of an adapter that is trained on one number."""

AGREEMENT = 0.05
"""How far two answers may be apart, relative to 1 + their size, and still agree."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class MeasuredText(TextExample):
    """A text with one number."""

    label: Number


class Regression(TextTask[PooledConfig, ClassifyOptions, MeasuredText]):
    """One or more numbers per text; a label names each."""

    name = "regression"
    route = Route.CLASSIFY
    options = ClassifyOptions
    example = MeasuredText
    prediction = list[LabelScore]
    measured = ClassifyOptions()
    decisive = {"pearson": 1, "rmse": -1}

    def check(self, config: PooledConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least one number."""
        need_labels(self, labels, 1)
        super().check(config, labels, spec)

    def decode(
        self, outputs: Tensor, config: PooledConfig, labels: Sequence[str], options: ClassifyOptions
    ) -> list[list[LabelScore]]:
        """The numbers of each row of [texts, labels], in the order of the labels; with `top_k`, highest first."""
        values = activated(outputs, options.activation or Activation.NONE)
        if options.top_k is None:
            return [[LabelScore(*pair) for pair in zip(labels, row, strict=True)] for row in values.tolist()]
        return [
            [LabelScore(labels[i], value) for i, value in zip(indices, row, strict=True)]
            for row, indices in zip(*ranked(values, options.top_k), strict=True)
        ]

    def numbers(self, tokens: int, labels: Sequence[str], options: ClassifyOptions) -> Numbers:
        """An output of each label, and scores of those that are wanted."""
        return scored(labels, options.top_k)

    def agrees(self, one: Sequence[LabelScore], other: Sequence[LabelScore]) -> bool:
        """Whether they are as many, and all are close."""
        return len(one) == len(other) and all(
            abs(a.score - b.score) <= AGREEMENT * (1 + max(abs(a.score), abs(b.score)))
            for a, b in zip(one, other, strict=True)
        )

    def check_measurable(self, labels: Sequence[str]) -> None:
        """One number."""
        if len(labels) != 1:
            raise InvalidRequest(f"rows have one number, the adapter gives {len(labels)}")

    def labels(self, examples: Sequence[MeasuredText]) -> tuple[str, ...]:
        """One."""
        return (LABEL,)

    def standardized(
        self, examples: Sequence[MeasuredText], config: PooledConfig
    ) -> tuple[Sequence[MeasuredText], Restore]:
        """Numbers of mean 0 and variance 1, whatever their unit; the last layer, being linear, takes the unit back.

        A head without a bias cannot add a mean, so there the numbers are only scaled, to a mean square of 1.
        """
        numbers = torch.tensor([example.label for example in examples], dtype=torch.float64)
        mean = numbers.mean().item() if config.bias else 0.0
        scale = (numbers - mean).square().mean().sqrt().item() or 1.0

        def restore(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            restored = tensors | {WEIGHT: tensors[WEIGHT] * scale}
            return restored | {BIAS: tensors[BIAS] * scale + mean} if config.bias else restored

        return [example.model_copy(update={"label": (example.label - mean) / scale}) for example in examples], restore

    def targets(self, examples: Sequence[MeasuredText], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        """The numbers [texts, 1]."""
        return torch.tensor([[example.label] for example in examples])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs, targets)

    def measure(self, examples: Sequence[MeasuredText], predictions: Sequence[Sequence[LabelScore]]) -> Report:
        """`pearson` and `rmse`."""
        seen = [[score.score for score in prediction] for prediction in predictions]
        return metrics.regression([[example.label] for example in examples], seen)
