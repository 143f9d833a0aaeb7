"""No change to the backbone at all: a linear probe, or the head of a classifier whose body is the backbone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, MethodConfig, Shape
from server.core import BackboneSpec, Site, SiteSpec


class HeadOnlyConfig(MethodConfig):
    """Nothing to set."""


class HeadOnly(AdapterMethod[HeadOnlyConfig, None]):
    """Only the task's head."""

    name = "head_only"
    Config = HeadOnlyConfig

    def sites(self, config: HeadOnlyConfig, spec: BackboneSpec) -> list[Site]:
        """None."""
        return []

    def shapes(self, config: HeadOnlyConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """None."""
        return {}

    def init(
        self, config: HeadOnlyConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """None."""
        return {}

    def bind(
        self,
        config: HeadOnlyConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> None:
        """Nothing."""
