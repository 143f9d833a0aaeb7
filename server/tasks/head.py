"""The layers of a head: some linear layers with activations, a norm, and the linear layer that gives the outputs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from server.adapters.activations import ACTIVATIONS, ActivationName

HEAD = "head/"
"""Prefix of a head's tensors in the neutral artifact."""

WEIGHT, BIAS = f"{HEAD}classifier.weight", f"{HEAD}classifier.bias"
NORM = f"{HEAD}norm."


class HeadConfig(BaseModel):
    """Options of a head. An unknown one is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayersConfig(HeadConfig):
    """What lies between the backbone's states and the outputs."""

    hidden_layers: int = Field(0, ge=0, le=16)
    """Linear layers [hidden, hidden] before the last one."""
    activation: ActivationName | None = "tanh"
    """After each of those."""
    norm_eps: float | None = Field(None, gt=0, le=1)
    """Epsilon of a LayerNorm without bias before the last layer; no such norm if None (ModernBERT has one)."""
    bias: bool = True
    """Whether the last layer has a bias."""
    hidden_bias: bool = True
    """Whether the others have."""


class Layers(NamedTuple):
    """A head in float32, whatever the backbone's dtype: it is small, and the scores come from it."""

    hidden: tuple[tuple[Tensor, Tensor | None], ...]  # weight [hidden, hidden] and bias [hidden]
    activation: str | None
    norm: tuple[Tensor, float] | None  # weight [hidden] and epsilon
    weight: Tensor  # [outputs, hidden]
    bias: Tensor | None  # [outputs]

    def __call__(self, states: Tensor) -> Tensor:
        """float32 states [n, hidden] -> [n, outputs]."""
        for weight, bias in self.hidden:
            states = F.linear(states, weight, bias)
            if self.activation is not None:
                states = ACTIVATIONS[self.activation](states)
        if self.norm is not None:
            states = F.layer_norm(states, states.shape[-1:], self.norm[0], eps=self.norm[1])
        return F.linear(states, self.weight, self.bias)


def shapes(config: LayersConfig, outputs: int, size: int) -> dict[str, tuple[int, ...]]:
    """Artifact tensor name -> shape; the head reads `size` numbers."""
    found: dict[str, tuple[int, ...]] = {}
    for index in range(config.hidden_layers):
        found[hidden_name(index, "weight")] = (size, size)
        if config.hidden_bias:
            found[hidden_name(index, "bias")] = (size,)
    if config.norm_eps is not None:
        found[f"{NORM}weight"] = (size,)
    found[WEIGHT] = (outputs, size)
    if config.bias:
        found[BIAS] = (outputs,)
    return found


def init(config: LayersConfig, outputs: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """transformers' start for classifiers: normal(0.02) weights, zero biases, norms of one."""
    tensors = {}
    for name, shape in shapes(config, outputs, size).items():
        tensors[name] = torch.ones(shape) if name.startswith(NORM) else torch.zeros(shape)
        if len(shape) == 2:
            tensors[name].normal_(std=0.02, generator=generator)
    return tensors


def bind(config: LayersConfig, tensors: Mapping[str, Tensor]) -> Layers:
    """The tensors as float32. Differentiable."""
    values = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(HEAD)}
    hidden: Sequence[tuple[Tensor, Tensor | None]] = [
        (values[hidden_name(index, "weight")], values.get(hidden_name(index, "bias")))
        for index in range(config.hidden_layers)
    ]
    norm = None if config.norm_eps is None else (values[f"{NORM}weight"], config.norm_eps)
    return Layers(tuple(hidden), config.activation, norm, values[WEIGHT], values.get(BIAS))


def hidden_name(index: int, param: str) -> str:
    """`head/dense.0.weight`: a tensor of a hidden layer."""
    return f"{HEAD}dense.{index}.{param}"
