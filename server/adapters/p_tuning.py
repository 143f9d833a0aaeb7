"""P-tuning (Liu et al. 2021, arXiv:2103.10385): a prompt that a small network makes from an embedding.

The network steadies training and is not needed after it: PEFT stores what it puts out, a prompt as any other.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from server.adapters.base import Shape
from server.adapters.prefix_tuning import fresh_network
from server.adapters.prompt_tuning import PromptTuning, PromptTuningConfig, PromptWeights
from server.core import BackboneSpec, Site


class PTuningConfig(PromptTuningConfig):
    """PEFT's names."""

    encoder_reparameterization_type: Literal["MLP"] | None = "MLP"
    """The network; None where the prompt is stored as it came out."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Its inner size; the embedding's if None."""


class PTuning(PromptTuning):
    """Virtual tokens from a network."""

    name = "p_tuning"
    Config = PTuningConfig

    def shared_shapes(self, config: PromptTuningConfig, spec: BackboneSpec) -> dict[str, Shape]:
        """The network, under PEFT's names."""
        assert isinstance(config, PTuningConfig)
        if config.encoder_reparameterization_type is None:
            return {}
        (site,) = self.sites(config, spec)
        size = spec.sites[site].size_out
        inner = config.encoder_hidden_size or size
        layers = ((inner, size), (inner, inner), (size, inner))
        return {
            f"mlp_head.{2 * index}.{param}": shape if param == "weight" else shape[:1]
            for index, shape in enumerate(layers)
            for param in ("weight", "bias")
        }

    def init_shared(
        self, config: PromptTuningConfig, spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """torch's default for linear layers."""
        return fresh_network(self.shared_shapes(config, spec), generator)

    def bind(
        self,
        config: PromptTuningConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> PromptWeights:
        """What the network puts out."""
        weights = super().bind(config, site, params, shared, module)
        if not shared:
            return weights
        hidden = weights.prompt
        for index in (0, 2, 4):
            hidden = F.linear(
                F.relu(hidden) if index else hidden,
                shared[f"mlp_head.{index}.weight"],
                shared[f"mlp_head.{index}.bias"],
            )
        return weights._replace(prompt=hidden)
