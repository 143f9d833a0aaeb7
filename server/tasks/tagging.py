"""Tagging: a label for each token of a text."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.states import TextStates
from server.core import BackboneSpec, LabelScore, Prediction
from server.errors import InvalidAdapter
from server.tasks import head as heads
from server.tasks.base import Task
from server.tasks.head import Layers, LayersConfig


class TaggingConfig(LayersConfig):
    """The head's layers."""


class Tagging(Task[TaggingConfig, Layers]):
    """One label per token."""

    name = "tagging"
    classifies = False
    Config = TaggingConfig

    def check(self, config: TaggingConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least two labels."""
        if len(labels) < 2:
            raise InvalidAdapter(
                f"tagging needs at least 2 labels, not {len(labels)}", param="labels", code="invalid_labels"
            )

    def shapes(self, config: TaggingConfig, labels: Sequence[str], spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
        """The head's layers, the last with one output per label."""
        return heads.shapes(config, len(labels), spec)

    def init(
        self, config: TaggingConfig, labels: Sequence[str], spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """transformers' start for classifiers."""
        return heads.init(config, len(labels), spec, generator)

    def bind(self, config: TaggingConfig, tensors: Mapping[str, Tensor]) -> Layers:
        """The tensors as float32."""
        return heads.bind(config, tensors)

    def apply(self, head: Layers, states: TextStates, start: int, end: int) -> list[Tensor]:
        """Logits [tokens, labels] of each text, of its own tokens alone."""
        texts = [states.own(index) for index in range(start, end)]
        lengths = [text.shape[0] for text in texts]
        return list(torch.split(head(torch.cat(texts).float()), lengths))

    def loss(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Cross entropy over all tokens; `targets` [tokens] are label indices, -100 for tokens that do not count."""
        return F.cross_entropy(torch.cat(list(outputs)), targets)

    def decode(self, outputs: Sequence[Tensor], labels: Sequence[str], top_k: int | None = None) -> list[Prediction]:
        """The best label of each token, in the text's order. `top_k` means nothing here."""
        best = [text.float().softmax(-1).max(dim=-1) for text in outputs]
        return [
            [LabelScore(labels[i], score) for score, i in zip(scores.tolist(), indices.tolist(), strict=True)]
            for scores, indices in best
        ]
