"""What LoHa and LoKr have in common: a rank, an alpha, and PEFT's patterns for both."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from server.adapters.base import AdapterMethod
from server.adapters.targets import Rank, TargetConfig, check_paths, per_target, select, with_default
from server.core import BackboneSpec, Site


class LycorisConfig(TargetConfig):
    """PEFT's names."""

    r: Rank = 8
    alpha: float = Field(8, gt=0, allow_inf_nan=False)
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Module paths whose rank is another one."""
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Module paths whose alpha is another one."""

    def rank(self, site: Site) -> int:
        """r at a site."""
        return self.rank_pattern.get(site.name, self.r)

    def scale(self, site: Site) -> float:
        """What the update is multiplied by."""
        return self.alpha_pattern.get(site.name, self.alpha) / self.rank(site)


ConfigT = TypeVar("ConfigT", bound=LycorisConfig)
WeightsT = TypeVar("WeightsT")


class LycorisMethod(AdapterMethod[ConfigT, WeightsT]):
    """What both do with targets and patterns."""

    def complete(self, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
        """PEFT's selectors and patterns resolved; the attention's query and value by default."""
        chosen = select(with_default(options, spec), spec)
        if "target_modules" in chosen:
            paths = [site.name for site in LycorisConfig(target_modules=chosen["target_modules"]).sites(spec)]
            for field in ("rank_pattern", "alpha_pattern"):
                if field in chosen:
                    chosen[field] = per_target(chosen, field, paths, spec)
        return {name: value for name, value in chosen.items() if value is not None}

    def sites(self, config: ConfigT, spec: BackboneSpec) -> list[Site]:
        """The linear layers that the targets name."""
        sites = config.sites(spec)
        check_paths("rank_pattern", config.rank_pattern, sites)
        check_paths("alpha_pattern", config.alpha_pattern, sites)
        return sites


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """torch's default for linear layers, with which PEFT starts these factors."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
