"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): other biases for linear and normalization layers.

PEFT's `bias="all" | "lora_only"` trains the same beside LoRA.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, Shape, unsupported
from server.adapters.flow import Flow
from server.adapters.joined import row_groups, shifted
from server.adapters.targets import TargetConfig, select
from server.core import BackboneSpec, Site, SiteKind, SiteSpec
from server.errors import InvalidAdapter

KINDS = (SiteKind.LINEAR, SiteKind.NORM)


class BitfitConfig(TargetConfig):
    """`target_modules`: layers whose bias is another one."""


class BitfitWeights(NamedTuple):
    """One site."""

    delta: Tensor  # [size_out], the new bias minus the frozen one


class Bitfit(AdapterMethod[BitfitConfig, BitfitWeights]):
    """Biases."""

    name = "bitfit"
    Config = BitfitConfig

    def complete(self, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
        """Every layer that has a bias, by default."""
        biased = [site.name for site, at in spec.sites.items() if site.kind in KINDS and at.bias]
        if not biased:
            raise unsupported(self, spec, "its layers have no biases")
        return select({"target_modules": biased or None, **options}, spec, KINDS)

    def sites(self, config: BitfitConfig, spec: BackboneSpec) -> list[Site]:
        """The layers that the targets name and that have a bias."""
        sites = [site for site in config.sites(spec, KINDS) if spec.sites[site].bias]
        if not sites:
            raise InvalidAdapter("none of the target_modules has a bias", param="target_modules", code="unknown_target")
        return sites

    def shapes(self, config: BitfitConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """The whole new bias."""
        return {"bias": (at.size_out,)}

    def init(
        self, config: BitfitConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The frozen bias."""
        return {"bias": module.get_parameter("bias").detach().float().cpu().clone()}

    def bind(
        self,
        config: BitfitConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> BitfitWeights:
        """The difference, since the frozen bias is in y already."""
        return BitfitWeights(params["bias"] - module.get_parameter("bias"))

    def apply(self, weights: BitfitWeights, flow: Flow) -> Tensor:
        """y + (b' - b)."""
        return flow.y + weights.delta

    def apply_run(self, weights: Sequence[BitfitWeights], flow: Flow) -> Iterator[Tensor]:
        """Some neighbours at a time."""
        for first, end in row_groups(flow):
            part = flow.cut(first, end)
            yield shifted(part.y, [own.delta for own in weights[first:end]], part)
