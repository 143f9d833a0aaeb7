"""DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA on the weight's direction, and a magnitude learned apart from it.

The layer's weight becomes m * (W + s B A) / |W + s B A|, where the norm is taken along each row. As W, and so the norm,
is the same for all tokens, that is y * k + bias * (1 - k) + x A^T (s k B)^T, with k = m / |W + s B A|.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from server.adapters.base import Shape, frozen_weight
from server.adapters.joined import LowRank
from server.adapters.lora import Lora, LoraConfig
from server.core import Site, SiteKind, SiteSpec


class DoraConfig(LoraConfig):
    """LoRA's, without a bias of B. AdapterHub's DoRA differs from the paper's, and PEFT's, in two ways."""

    lora_bias: Literal[False] = False
    unscaled_norm: bool = False
    """AdapterHub's: the norm is that of W + B A, without s."""
    scaled_bias: bool = False
    """AdapterHub's: the frozen bias is multiplied by k as well."""


class Dora(Lora):
    """Weight-decomposed low-rank adaptation."""

    name = "dora"
    Config = DoraConfig

    def shapes(self, config: LoraConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """LoRA's, and PEFT's `lora_magnitude_vector`."""
        return super().shapes(config, site, at) | {"lora_magnitude_vector": (at.size_out,)}

    def init(
        self, config: LoraConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """LoRA's start, and the magnitude that the frozen weight has."""
        params = super().init(config, site, at, module, generator)
        weight = frozen_weight(module).float()
        return params | {"lora_magnitude_vector": weight.norm(dim=1).cpu()}

    def bind(
        self,
        config: LoraConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> LowRank:
        """Folds the magnitudes over the norms into B, a scale and a shift of y."""
        assert isinstance(config, DoraConfig)
        a, b, _, _, gate = super().bind(config, site, params, shared, module)
        assert b is not None  # LoRA always has both factors
        delta = b.t() @ a  # [size_out, size_in]
        if config.unscaled_norm:
            delta = delta / config.scale(site)
        ratio = params["lora_magnitude_vector"] / (frozen_weight(module) + delta).norm(dim=1)
        bias = getattr(module, "bias", None) if site.kind is SiteKind.LINEAR and not config.scaled_bias else None
        return LowRank(a, b * ratio, None if bias is None else bias * (1 - ratio), ratio, gate)
