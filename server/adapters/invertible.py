"""Invertible adapters (Pfeiffer et al. 2020, arXiv:2005.00052, MAD-X): a coupling block on the embeddings' output.

NICE (Dinh et al. 2014, arXiv:1410.8516): with x in halves x1 and x2, y1 = x1 + F(x2) and y2 = x2 + G(y1). Its inverse
serves language model heads only.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from server.adapters.activations import ACTIVATIONS, ActivationName
from server.adapters.base import AdapterMethod, MethodConfig, Shape, unsupported
from server.adapters.flow import Flow
from server.core import ENCODER_INPUT, BackboneSpec, Site, SiteSpec


class InvertibleConfig(MethodConfig):
    """AdapterHub's names."""

    inv_adapter_reduction_factor: float = Field(2, ge=1e-3, allow_inf_nan=False)
    """Half the embedding size over the inner size of F and G."""
    non_linearity: ActivationName = "relu"


class Net(NamedTuple):
    """F or G."""

    weight_in: Tensor  # [inner, half]
    bias_in: Tensor  # [inner]
    weight_out: Tensor  # [other half, inner]
    bias_out: Tensor  # [other half]


class InvertibleWeights(NamedTuple):
    """Both nets."""

    f: Net
    g: Net
    non_linearity: str


class Invertible(AdapterMethod[InvertibleConfig, InvertibleWeights]):
    """An adapter at the embeddings."""

    name = "invertible"
    Config = InvertibleConfig

    def sites(self, config: InvertibleConfig, spec: BackboneSpec) -> list[Site]:
        """Before the first layer."""
        if ENCODER_INPUT not in spec.sites:
            raise unsupported(self, spec, "where its embeddings enter the first layer is not known")
        return [ENCODER_INPUT]

    def shapes(self, config: InvertibleConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """AdapterHub's names."""
        first = at.size_out // 2
        second = at.size_out - first
        shapes: dict[str, Shape] = {}
        for name, size_in, size_out in (("F", second, first), ("G", first, second)):
            inner = max(1, int(size_in // config.inv_adapter_reduction_factor))
            shapes |= {
                f"{name}.0.weight": (inner, size_in),
                f"{name}.0.bias": (inner,),
                f"{name}.2.weight": (size_out, inner),
                f"{name}.2.bias": (size_out,),
            }
        return shapes

    def init(
        self, config: InvertibleConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Small normal weights on the way in, zero on the way out: training starts at the bare backbone."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(config, site, at).items()}
        for name in ("F.0.weight", "G.0.weight"):
            params[name].normal_(std=0.02, generator=generator)
        return params

    def bind(
        self,
        config: InvertibleConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> InvertibleWeights:
        """The two nets."""
        f, g = (
            Net(*(params[f"{name}.{part}"] for part in ("0.weight", "0.bias", "2.weight", "2.bias")))
            for name in ("F", "G")
        )
        return InvertibleWeights(f, g, config.non_linearity)

    def apply(self, weights: InvertibleWeights, flow: Flow) -> Tensor:
        """Both halves, one after the other."""
        activation: Any = ACTIVATIONS[weights.non_linearity]

        def run(net: Net, x: Tensor) -> Tensor:
            return F.linear(activation(F.linear(x, net.weight_in, net.bias_in)), net.weight_out, net.bias_out)

        first = flow.y.shape[1] // 2
        x1, x2 = flow.y[:, :first], flow.y[:, first:]
        y1 = x1 + run(weights.f, x2)
        return torch.cat([y1, x2 + run(weights.g, y1)], dim=1)
