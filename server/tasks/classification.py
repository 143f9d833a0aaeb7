"""Single-label classification of texts: a head on a pooled vector, softmax over the labels."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.states import TextStates
from server.core import BackboneSpec, LabelScore, Pooling, Prediction
from server.errors import InvalidAdapter
from server.tasks import head as heads
from server.tasks.base import Task
from server.tasks.head import Layers, LayersConfig


class ClassificationConfig(LayersConfig):
    """`pooling`: the vector that the head reads."""

    pooling: Pooling = Pooling.MEAN


class ClassificationHead(NamedTuple):
    """What is read, and what is made of it."""

    pooling: Pooling
    layers: Layers


class Classification(Task[ClassificationConfig, ClassificationHead]):
    """One label per text."""

    name = "classification"
    Config = ClassificationConfig
    min_labels = 2

    def check(self, config: ClassificationConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """Enough labels, and a pooling that the backbone has."""
        if len(labels) < self.min_labels:
            raise InvalidAdapter(
                f"{self.name} needs at least {self.min_labels} labels, not {len(labels)}",
                param="labels",
                code="invalid_labels",
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
        """The head's layers, the last with one output per label."""
        return heads.shapes(config, len(labels), spec)

    def init(
        self, config: ClassificationConfig, labels: Sequence[str], spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """transformers' start for classifiers."""
        return heads.init(config, len(labels), spec, generator)

    def bind(self, config: ClassificationConfig, tensors: Mapping[str, Tensor]) -> ClassificationHead:
        """The tensors as float32."""
        return ClassificationHead(config.pooling, heads.bind(config, tensors))

    def apply(self, head: ClassificationHead, states: TextStates, start: int, end: int) -> Tensor:
        """Logits [texts, labels]."""
        return head.layers(states.pooled(head.pooling)[start:end])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy; `targets` [texts] are label indices."""
        return F.cross_entropy(outputs, targets)

    def scores(self, outputs: Tensor) -> Tensor:
        """Logits [texts, labels] as probabilities."""
        return outputs.float().softmax(-1)

    def decode(self, outputs: Tensor, labels: Sequence[str], top_k: int | None = None) -> list[Prediction]:
        """The labels of each row of [texts, labels], best first; equal scores keep the order of the labels."""
        scores, order = self.scores(outputs).sort(dim=-1, descending=True, stable=True)
        scores, order = scores[:, :top_k], order[:, :top_k]
        return [
            [LabelScore(labels[i], score) for i, score in zip(indices, row, strict=True)]
            for indices, row in zip(order.tolist(), scores.tolist(), strict=True)
        ]
