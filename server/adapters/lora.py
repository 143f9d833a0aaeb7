"""LoRA (Hu et al. 2021, arXiv:2106.09685): y + (alpha / r) * x A^T B^T at linear layers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from server.adapters.base import AdapterMethod, MethodConfig
from server.core import BackboneSpec, Site
from server.errors import InvalidAdapter


class LoraConfig(MethodConfig):
    """PEFT's names. A target matches a linear layer whose path is the target or ends in `.target`."""

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, gt=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(min_length=1, max_length=1000)


class LoraWeights(NamedTuple):
    """One site, ready for two matrix products."""

    a: Tensor  # [size_in, r]
    b: Tensor  # [r, size_out], scaled by alpha / r


class Lora(AdapterMethod[LoraConfig, LoraWeights]):
    """A low-rank addition to linear layers."""

    name = "lora"
    Config = LoraConfig

    def defaults(self, spec: BackboneSpec) -> dict[str, Any]:
        """The attention's query and value projections, as in the paper."""
        return {"target_modules": spec.default_targets} if spec.default_targets else {}

    def sites(self, config: LoraConfig, spec: BackboneSpec) -> list[Site]:
        """The linear layers that the targets name; each target has to name at least one."""
        found: dict[Site, None] = {}
        for target in config.target_modules:
            hits = [site for site in spec.sites if site.is_target(target)]
            if not hits:
                raise InvalidAdapter(
                    f"target module {target!r} is not a linear layer of the backbone ({spec.model_type})",
                    param="target_modules",
                    code="unknown_target",
                )
            found |= dict.fromkeys(hits)
        return list(found)

    def shapes(self, config: LoraConfig, site: Site, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
        """PEFT's names and orientation."""
        return {"lora_A": (config.r, size_in), "lora_B": (size_out, config.r)}

    def init(
        self, config: LoraConfig, site: Site, size_in: int, size_out: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """PEFT's default: Kaiming-uniform A, zero B, so that training starts at the bare backbone."""
        bound = 1 / math.sqrt(size_in)
        a = torch.empty(config.r, size_in).uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": torch.zeros(size_out, config.r)}

    def bind(self, config: LoraConfig, site: Site, params: Mapping[str, Tensor]) -> LoraWeights:
        """Transposes both factors and folds alpha / r into B."""
        scale = config.lora_alpha / config.r
        return LoraWeights(params["lora_A"].t().contiguous(), (params["lora_B"] * scale).t().contiguous())

    def apply(self, weights: LoraWeights, x: Tensor, y: Tensor) -> Tensor:
        """y + x A B."""
        return torch.addmm(y, x @ weights.a, weights.b)
