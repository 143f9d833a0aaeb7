"""Tagging: a label for each token of a text, and the entities that they make."""

from collections.abc import Collection, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from server.adapters.states import TextStates
from server.core import Aggregation, BackboneSpec, Encoding, Entity, Route, TagOptions, TextInput, WindowPooling
from server.tasks import head as heads
from server.tasks.base import LayeredTask, Window, need_labels, token_layers
from server.tasks.examples import Example, Label
from server.tasks.head import Layers, LayersConfig
from server.tasks.metrics import Report

IGNORED = -100
"""The target of a token that does not count, as torch has it."""


class TaggedTokens(Example):
    """The words of a text, and for each a label: `B-...`, `I-...` or `O`."""

    tokens: tuple[str, ...] = Field(min_length=1)
    tags: tuple[Label, ...]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.tokens) != len(self.tags):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.tags)} tags")
        return self

    def inputs(self) -> tuple[TextInput, ...]:
        """The words with a space between any two."""
        return (TextInput(" ".join(self.tokens)),)

    def names(self) -> Collection[str]:
        """The tags."""
        return self.tags


class Tagging(LayeredTask[LayersConfig, Layers, TagOptions, TaggedTokens]):
    """One label per token."""

    name = "tagging"
    route = Route.TAG
    Config = LayersConfig
    options = TagOptions
    example = TaggedTokens
    prediction = list[Entity]
    aligned = True
    measured = TagOptions(Aggregation.NONE)
    decisive = {"f1": 1}

    def check(self, config: LayersConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least two labels."""
        need_labels(self, labels, 2)

    def bind(self, config: LayersConfig, tensors: Mapping[str, Tensor]) -> Layers:
        """The tensors as float32."""
        return heads.bind(config, tensors)

    def apply(self, head: Layers, states: TextStates, start: int, end: int) -> list[Tensor]:
        """Logits [tokens, labels] of each text, of its own tokens alone."""
        return token_layers(head, states, start, end)

    def read(
        self,
        text: TextInput,
        windows: Sequence[Window],
        config: LayersConfig,
        labels: Sequence[str],
        options: TagOptions,
        pooling: WindowPooling,
    ) -> list[Entity]:
        raise NotImplementedError

    def agrees(self, one: Sequence[Entity], other: Sequence[Entity]) -> bool:
        """Whether the entities are the same."""
        return [(e.label, e.start, e.end) for e in one] == [(e.label, e.start, e.end) for e in other]

    def targets(self, examples: Sequence[TaggedTokens], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def loss(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Cross entropy over all tokens; `targets` [tokens] are label indices, -100 for tokens that do not count."""
        return F.cross_entropy(torch.cat(list(outputs)), targets)

    def measure(self, examples: Sequence[TaggedTokens], predictions: Sequence[Sequence[Entity]]) -> Report:
        raise NotImplementedError
