"""Single-label classification of texts: one linear layer on a pooled vector, softmax over the labels."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.states import TextStates
from server.core import BackboneSpec, LabelScore, Pooling, Prediction
from server.errors import InvalidAdapter
from server.tasks.base import HEAD, HeadConfig, Task

WEIGHT, BIAS = f"{HEAD}classifier.weight", f"{HEAD}classifier.bias"


class ClassificationConfig(HeadConfig):
    """`pooling`: the vector that the classifier reads."""

    pooling: Pooling = Pooling.MEAN


class ClassificationHead(NamedTuple):
    """A linear layer in float32, whatever the backbone's dtype: it is small, and the scores come from it."""

    pooling: Pooling
    weight: Tensor  # [labels, hidden]
    bias: Tensor  # [labels]


class Classification(Task[ClassificationConfig, ClassificationHead]):
    """One label per text."""

    name = "classification"
    Config = ClassificationConfig

    def check(self, config: ClassificationConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least two labels, and a pooling that the backbone has."""
        if len(labels) < 2:
            raise InvalidAdapter(
                f"classification needs at least 2 labels, not {len(labels)}", param="labels", code="invalid_labels"
            )
        if config.pooling not in spec.poolings:
            raise InvalidAdapter(
                f"the head reads the backbone's {config.pooling}, but the checkpoint of backbone {spec.name!r} has "
                "none, so its answers cannot be reproduced",
                param="pooling",
                code="no_pooler",
            )

    def shapes(
        self, config: ClassificationConfig, labels: Sequence[str], spec: BackboneSpec
    ) -> dict[str, tuple[int, ...]]:
        """A weight and a bias."""
        return {WEIGHT: (len(labels), spec.hidden_size), BIAS: (len(labels),)}

    def init(
        self, config: ClassificationConfig, labels: Sequence[str], spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """transformers' start for classifiers: normal(0.02) weight, zero bias."""
        weight = torch.empty(len(labels), spec.hidden_size).normal_(std=0.02, generator=generator)
        return {WEIGHT: weight, BIAS: torch.zeros(len(labels))}

    def bind(self, config: ClassificationConfig, tensors: Mapping[str, Tensor]) -> ClassificationHead:
        """The tensors as float32."""
        return ClassificationHead(config.pooling, tensors[WEIGHT].float(), tensors[BIAS].float())

    def apply(self, head: ClassificationHead, states: TextStates, start: int, end: int) -> Tensor:
        """Logits [texts, labels]."""
        return F.linear(states.pooled(head.pooling)[start:end], head.weight, head.bias)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy; `targets` [texts] are label indices."""
        return F.cross_entropy(outputs, targets)

    def decode(self, outputs: Tensor, labels: Sequence[str], top_k: int | None = None) -> list[Prediction]:
        """Softmax over [texts, labels], best label first; equal scores keep the order of the labels."""
        scores, order = outputs.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        scores, order = scores[:, :top_k], order[:, :top_k]
        return [
            [LabelScore(labels[i], score) for i, score in zip(indices, row, strict=True)]
            for indices, row in zip(order.tolist(), scores.tolist(), strict=True)
        ]
