"""Bottleneck adapters: h + W_up sigma(W_down h + b_down) + b_up on the output h of a sub-layer.

Houlsby et al. 2019 (arXiv:1902.00751) put one after the attention and one after the feed-forward network, Pfeiffer et
al. 2020 (arXiv:2005.00247) one after the feed-forward network. Both act before the residual is added and normalized.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from server.adapters.base import AdapterMethod, MethodConfig
from server.core import BackboneSpec, Site, SiteKind
from server.errors import InvalidAdapter

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class BottleneckConfig(MethodConfig):
    """AdapterHub's names. Houlsby: both sites, swish; Pfeiffer: `mh_adapter` false, relu."""

    mh_adapter: bool = False
    """An adapter after the multi-head attention."""
    output_adapter: bool = True
    """An adapter after the feed-forward network."""
    reduction_factor: float = Field(16, ge=1e-3, allow_inf_nan=False)
    """Hidden size over bottleneck size."""
    non_linearity: Literal["relu", "gelu", "swish", "tanh"] = "relu"

    @model_validator(mode="after")
    def _acts_somewhere(self) -> "BottleneckConfig":
        if not (self.mh_adapter or self.output_adapter):
            raise ValueError("one of mh_adapter and output_adapter has to be true")
        return self


class BottleneckWeights(NamedTuple):
    """One site."""

    down: Tensor  # [bottleneck, hidden]
    down_bias: Tensor  # [bottleneck]
    up: Tensor  # [hidden, bottleneck]
    up_bias: Tensor  # [hidden]
    activation: Callable[[Tensor], Tensor]


class Bottleneck(AdapterMethod[BottleneckConfig, BottleneckWeights]):
    """A small two-layer network with a skip connection, after sub-layers."""

    name = "bottleneck"
    Config = BottleneckConfig

    def sites(self, config: BottleneckConfig, spec: BackboneSpec) -> list[Site]:
        """One or two residual sites in each layer."""
        places = [place for place, on in (("attention", config.mh_adapter), ("ffn", config.output_adapter)) if on]
        sites = [Site(SiteKind.RESIDUAL, f"{layer}.{place}") for layer in range(spec.num_layers) for place in places]
        if missing := [site for site in sites if site not in spec.sites]:
            raise InvalidAdapter(
                f"bottleneck adapters need the site {str(missing[0])!r}, which is not known for backbones of type "
                f"{spec.model_type!r}; linear methods such as lora work there",
                param="method",
                code="unsupported_method",
            )
        return sites

    def shapes(self, config: BottleneckConfig, site: Site, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
        """AdapterHub's names; the bottleneck is hidden / reduction_factor, at least 1."""
        size = max(1, int(size_out / config.reduction_factor))
        return {
            "adapter_down.weight": (size, size_out),
            "adapter_down.bias": (size,),
            "adapter_up.weight": (size_out, size),
            "adapter_up.bias": (size_out,),
        }

    def init(
        self, config: BottleneckConfig, site: Site, size_in: int, size_out: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Houlsby's near-identity start: small normal down, zero up."""
        tensors = {name: torch.zeros(shape) for name, shape in self.shapes(config, site, size_in, size_out).items()}
        tensors["adapter_down.weight"].normal_(std=0.02, generator=generator)
        return tensors

    def bind(self, config: BottleneckConfig, site: Site, params: Mapping[str, Tensor]) -> BottleneckWeights:
        """The parameters as they are, and the activation by name."""
        return BottleneckWeights(
            params["adapter_down.weight"],
            params["adapter_down.bias"],
            params["adapter_up.weight"],
            params["adapter_up.bias"],
            NON_LINEARITIES[config.non_linearity],
        )

    def apply(self, weights: BottleneckWeights, x: Tensor, y: Tensor) -> Tensor:
        """y + up(sigma(down(y)))."""
        hidden = weights.activation(F.linear(y, weights.down, weights.down_bias))
        return y + F.linear(hidden, weights.up, weights.up_bias)
