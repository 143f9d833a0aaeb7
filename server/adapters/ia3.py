"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): vectors that scale what leaves, or what enters, linear layers.

PEFT scales the output of keys and values and the input of the feed-forward network's second layer; AdapterHub scales
the output of its first layer, before the activation.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, Shape
from server.adapters.flow import Flow, Gate
from server.adapters.joined import row_groups, scaled
from server.adapters.targets import MAX_TARGETS, TargetConfig, check_paths, find_sites, matching, select
from server.core import BackboneSpec, Site, SiteKind, SiteSpec


class Ia3Config(TargetConfig):
    """PEFT's names. `target_modules` are all layers, `feedforward_modules` those of them whose input is scaled."""

    target_modules: tuple[str, ...] = Field(max_length=MAX_TARGETS, min_length=1)
    feedforward_modules: tuple[str, ...] = Field((), max_length=MAX_TARGETS)
    """Module paths."""
    use_gating: bool = False
    """AdapterHub's: what is scaled is also multiplied by a sigmoid of x, averaged over the text."""


class Ia3Weights(NamedTuple):
    """One site."""

    vector: Tensor  # [size]
    gate: Gate | None


class Ia3(AdapterMethod[Ia3Config, Ia3Weights]):
    """Learned scales."""

    name = "ia3"
    Config = Ia3Config

    def complete(self, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
        """PEFT's selectors resolved; by default keys, values and the feed-forward network's second layer."""
        defaults: dict[str, Any] = {}
        if "target_modules" not in options or options["target_modules"] is None:
            scaled = spec.named("key", "value") or spec.named("query_key_value")
            entering = spec.named("output")
            defaults = {"target_modules": scaled + entering or None, "feedforward_modules": entering}
        chosen = select({**defaults, **{k: v for k, v in options.items() if v is not None}}, spec)
        if "target_modules" in chosen and chosen.get("feedforward_modules"):
            paths = [site.name for site in find_sites(chosen["target_modules"], spec, (SiteKind.LINEAR,))]
            entering = chosen["feedforward_modules"]
            if isinstance(entering, list | tuple) and all(isinstance(target, str) for target in entering):
                # PEFT looks at the end of the name alone, dot or no dot
                entered = [path for path in paths if path.endswith(tuple(entering))]
            else:
                entered = matching("feedforward_modules", entering, paths, spec)
            chosen["feedforward_modules"] = tuple(entered)
        return chosen

    def sites(self, config: Ia3Config, spec: BackboneSpec) -> list[Site]:
        """A linear layer's output, or its input where it is a feed-forward module."""
        check_paths("feedforward_modules", config.feedforward_modules, config.sites(spec))
        return [
            Site(SiteKind.LINEAR_INPUT if site.name in config.feedforward_modules else SiteKind.LINEAR, site.name)
            for site in config.sites(spec)
        ]

    def shapes(self, config: Ia3Config, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """PEFT's name; one scale for each value that passes."""
        gate: dict[str, Shape] = {"gate.weight": (1, at.size_in), "gate.bias": (1,)} if config.use_gating else {}
        return {"ia3_l": (at.size_out,)} | gate

    def init(
        self, config: Ia3Config, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Ones, so that training starts at the bare backbone, and a small gate if there is one."""
        params = {"ia3_l": torch.ones(at.size_out)}
        if config.use_gating:
            weight = torch.empty(1, at.size_in).normal_(std=0.02, generator=generator)
            params |= {"gate.weight": weight, "gate.bias": torch.zeros(1)}
        return params

    def bind(
        self,
        config: Ia3Config,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> Ia3Weights:
        """The parameters as they are."""
        gate = Gate(params["gate.weight"], params["gate.bias"]) if config.use_gating else None
        return Ia3Weights(params["ia3_l"], gate)

    def apply(self, weights: Ia3Weights, flow: Flow) -> Tensor:
        """y * l, and the gate if there is one."""
        y = flow.y * weights.vector
        return y if weights.gate is None else y * weights.gate.per_row(flow.x, flow.texts[0])

    def apply_run(self, weights: Sequence[Ia3Weights], flow: Flow) -> Iterator[Tensor]:
        """Some neighbours at a time."""
        if any(own.gate is not None for own in weights):
            yield from super().apply_run(weights, flow)
            return
        for first, end in row_groups(flow):
            part = flow.cut(first, end)
            yield scaled(part.y, [own.vector for own in weights[first:end]], part)
