"""An adapter after the encoder: W2 sigma(W1 x + b1) + b2 on each state that leaves the last layer."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from server.adapters.activations import ACTIVATIONS, ActivationName
from server.adapters.base import AdapterMethod, MethodConfig, Shape
from server.adapters.flow import Flow
from server.core import ENCODER_OUTPUT, BackboneSpec, Site, SiteSpec


class PostEncoderConfig(MethodConfig):
    """The size and shape of the network."""

    reduction_factor: float = Field(1, ge=1e-3, allow_inf_nan=False)
    """Hidden size over the size between W1 and W2."""
    non_linearity: ActivationName = "gelu"
    residual: bool = False
    """Added to x, instead of taking its place."""


class PostEncoderWeights(NamedTuple):
    """The network."""

    w1: Tensor  # [inner, hidden]
    b1: Tensor  # [inner]
    w2: Tensor  # [hidden, inner]
    b2: Tensor  # [hidden]
    non_linearity: str
    residual: bool


class PostEncoder(AdapterMethod[PostEncoderConfig, PostEncoderWeights]):
    """A two-layer network after the last layer."""

    name = "post_encoder"
    Config = PostEncoderConfig

    def sites(self, config: PostEncoderConfig, spec: BackboneSpec) -> list[Site]:
        """After the last layer."""
        return [ENCODER_OUTPUT]

    def shapes(self, config: PostEncoderConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """W1, b1, W2, b2."""
        inner = max(1, int(at.size_in // config.reduction_factor))
        return {"w1": (inner, at.size_in), "b1": (inner,), "w2": (at.size_out, inner), "b2": (at.size_out,)}

    def init(
        self, config: PostEncoderConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """torch's default for linear layers; a zero W2 where x is added."""
        params = {}
        for name, shape in self.shapes(config, site, at).items():
            value = torch.zeros(shape)
            if name == "w1" or (name == "w2" and not config.residual):
                bound = shape[1] ** -0.5
                value.uniform_(-bound, bound, generator=generator)
            params[name] = value
        return params

    def bind(
        self,
        config: PostEncoderConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> PostEncoderWeights:
        """The parameters as they are."""
        return PostEncoderWeights(
            params["w1"], params["b1"], params["w2"], params["b2"], config.non_linearity, config.residual
        )

    def apply(self, weights: PostEncoderWeights, flow: Flow) -> Tensor:
        """W2 sigma(W1 x + b1) + b2, on top of x if so configured."""
        hidden = ACTIVATIONS[weights.non_linearity](F.linear(flow.y, weights.w1, weights.b1))
        out = F.linear(hidden, weights.w2, weights.b2)
        return flow.y + out if weights.residual else out
