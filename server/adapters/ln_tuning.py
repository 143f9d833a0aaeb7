"""LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420): other weights and biases for normalization layers."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, Shape, unsupported
from server.adapters.flow import Flow
from server.adapters.joined import row_groups
from server.adapters.targets import TargetConfig, select
from server.core import BackboneSpec, Site, SiteKind, SiteSpec


class LnTuningConfig(TargetConfig):
    """`target_modules`: normalization layers."""


class NormWeights(NamedTuple):
    """One site."""

    module: nn.Module
    weight: Tensor  # [size]
    bias: Tensor | None  # [size]


class LnTuning(AdapterMethod[LnTuningConfig, NormWeights]):
    """Normalization layers of one's own."""

    name = "ln_tuning"
    Config = LnTuningConfig

    def complete(self, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
        """Every normalization layer, by default."""
        norms = [site.name for site in spec.sites_of(SiteKind.NORM)]
        if not norms:
            raise unsupported(self, spec, "which of its modules normalize is not known")
        return select({"target_modules": norms or None, **options}, spec, (SiteKind.NORM,))

    def sites(self, config: LnTuningConfig, spec: BackboneSpec) -> list[Site]:
        """The normalization layers that the targets name."""
        return config.sites(spec, (SiteKind.NORM,))

    def shapes(self, config: LnTuningConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """A weight, and a bias where the layer has one."""
        bias: dict[str, Shape] = {"bias": (at.size_out,)} if at.bias else {}
        return {"weight": (at.size_out,)} | bias

    def init(
        self, config: LnTuningConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The frozen ones."""
        return {
            name: module.get_parameter(name).detach().float().cpu().clone() for name in self.shapes(config, site, at)
        }

    def bind(
        self,
        config: LnTuningConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> NormWeights:
        """The parameters as they are."""
        return NormWeights(module, params["weight"], params.get("bias"))

    def apply(self, weights: NormWeights, flow: Flow) -> Tensor:
        """The layer on x again, with its new parameters."""
        module = weights.module
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(flow.x, module.normalized_shape, weights.weight, weights.bias, module.eps)
        # A copy: others run the module itself meanwhile, which torch.func.functional_call would change for a moment.
        own = copy(module)
        params = {
            name: value for name, value in (("weight", weights.weight), ("bias", weights.bias)) if value is not None
        }
        own.__dict__["_parameters"] = module._parameters | params
        y: Tensor = own(flow.x)
        return y

    def apply_run(self, weights: Sequence[NormWeights], flow: Flow) -> Iterator[Tensor]:
        """Some neighbours at a time, where the normalization itself needs none of their parameters."""
        module = weights[0].module
        if not isinstance(module, nn.LayerNorm):
            yield from super().apply_run(weights, flow)
            return
        for first, end in row_groups(flow):
            part, group = flow.cut(first, end), weights[first:end]
            y = F.layer_norm(part.x, module.normalized_shape, eps=module.eps) * part.per_row(
                [own.weight for own in group]
            )
            biases = [own.bias for own in group if own.bias is not None]
            yield y + part.per_row(biases) if biases else y
