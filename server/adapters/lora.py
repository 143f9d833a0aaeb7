"""LoRA (Hu et al. 2021, arXiv:2106.09685): y + (alpha / r) * x A^T B^T at linear layers and embeddings.

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales by alpha / sqrt(r) instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, Shape, Turned
from server.adapters.flow import Flow, Gate
from server.adapters.joined import LowRank, low_rank, low_rank_run
from server.adapters.targets import Rank, TargetConfig, check_paths, find_sites, per_target, select, with_default
from server.core import BackboneSpec, Site, SiteKind, SiteSpec

KINDS = (SiteKind.LINEAR, SiteKind.EMBEDDING)


class LoraConfig(TargetConfig):
    """PEFT's names."""

    r: Rank = 8
    lora_alpha: float = Field(8, gt=0, allow_inf_nan=False)
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Module paths whose rank is another one."""
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Module paths whose alpha is another one."""
    use_rslora: bool = False
    lora_bias: bool = False
    """B has a bias at linear layers."""
    use_gating: bool = False
    """AdapterHub's: the product is multiplied by a sigmoid of x, averaged over the text."""

    def rank(self, site: Site) -> int:
        """r at a site."""
        return self.rank_pattern.get(site.name, self.r)

    def scale(self, site: Site) -> float:
        """What the product is multiplied by."""
        rank = self.rank(site)
        return self.alpha_pattern.get(site.name, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


class Lora(AdapterMethod[LoraConfig, LowRank]):
    """A low-rank addition to linear layers and embeddings."""

    name = "lora"
    Config = LoraConfig

    def complete(self, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
        """PEFT's selectors and patterns resolved; the attention's query and value by default, as in the paper."""
        chosen = select(with_default(options, spec), spec, KINDS)
        if not chosen.get("target_modules"):
            return {name: value for name, value in chosen.items() if name != "target_modules"}
        paths = [site.name for site in find_sites(chosen["target_modules"], spec, KINDS)]
        for field in ("rank_pattern", "alpha_pattern"):
            if field in chosen:
                chosen[field] = per_target(chosen, field, paths, spec)
        return chosen

    def sites(self, config: LoraConfig, spec: BackboneSpec) -> list[Site]:
        """What the targets name; each has to name at least one."""
        sites = config.sites(spec, KINDS)
        check_paths("rank_pattern", config.rank_pattern, sites)
        check_paths("alpha_pattern", config.alpha_pattern, sites)
        return sites

    def shapes(self, config: LoraConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """PEFT's names and orientation."""
        rank = config.rank(site)
        if site.kind is SiteKind.EMBEDDING:
            return {"lora_embedding_A": (rank, at.size_in), "lora_embedding_B": (at.size_out, rank)}
        shapes: dict[str, Shape] = {"lora_A": (rank, at.size_in), "lora_B": (at.size_out, rank)}
        if config.lora_bias:
            shapes["lora_B_bias"] = (at.size_out,)
        if config.use_gating:
            shapes |= {"gate.weight": (1, at.size_in), "gate.bias": (1,)}
        return shapes

    def init(
        self, config: LoraConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """PEFT's default: random A (normal at embeddings) and zero B, so that training starts at the bare backbone."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(config, site, at).items()}
        bound = 1 / math.sqrt(at.size_in)
        if site.kind is SiteKind.EMBEDDING:
            # the other way round, as PEFT: only the words that occur are then moved at all
            params["lora_embedding_B"].normal_(generator=generator)
        else:
            params["lora_A"].uniform_(-bound, bound, generator=generator)
        if "gate.weight" in params:
            params["gate.weight"].normal_(std=0.02, generator=generator)
        return params

    def turned(self, config: LoraConfig, site: Site) -> dict[str, Turned]:
        """B transposed, with the scale folded in."""
        scale = config.scale(site)
        if site.kind is SiteKind.EMBEDDING:
            return {"lora_embedding_B": Turned(transposed=True, scale=scale)}
        return {"lora_B": Turned(transposed=True, scale=scale)} | (
            {"lora_B_bias": Turned(scale=scale)} if config.lora_bias else {}
        )

    def bind(
        self,
        config: LoraConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> LowRank:
        """The parameters as they are."""
        factors = ("lora_embedding_A", "lora_embedding_B") if site.kind is SiteKind.EMBEDDING else ("lora_A", "lora_B")
        a, b = (params[name] for name in factors)
        gate = Gate(params["gate.weight"], params["gate.bias"]) if "gate.weight" in params else None
        return LowRank(a.contiguous(), b.contiguous(), params.get("lora_B_bias"), gate=gate)

    def apply(self, weights: LowRank, flow: Flow) -> Tensor:
        """y + x A B."""
        return low_rank(weights, flow)

    def apply_run(self, weights: Sequence[LowRank], flow: Flow) -> Iterator[Tensor]:
        """Joins the products of neighbours."""
        return low_rank_run(weights, flow)
