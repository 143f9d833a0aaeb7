"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): learned vectors that join each text as tokens do.

PEFT puts them before the words' embeddings, so that positions are added and the norm is applied to them as to words;
AdapterHub puts them after all that, before the first token or after it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, Framing, MethodConfig, Shape, unsupported
from server.adapters.flow import Flow
from server.adapters.prefix_tuning import check_room
from server.core import ENCODER_INPUT, BackboneSpec, Site, SiteKind, SiteSpec


class PromptTuningConfig(MethodConfig):
    """PEFT's and AdapterHub's names."""

    num_virtual_tokens: int = Field(10, ge=1)
    placement: Literal["words", "states"] = "words"
    """Among the words' embeddings (PEFT), or among the states that enter the first layer (AdapterHub)."""
    combine: Literal["prefix", "prefix_after_bos"] = "prefix"
    """Before the first token, or after it."""

    @model_validator(mode="after")
    def _can_be_placed(self) -> "PromptTuningConfig":
        if self.placement == "words" and self.combine != "prefix":
            raise ValueError("combine 'prefix_after_bos' needs placement 'states'")
        return self


class PromptWeights(NamedTuple):
    """The virtual tokens."""

    prompt: Tensor  # [virtual tokens, size]
    before: int


class PromptTuning(AdapterMethod[PromptTuningConfig, PromptWeights]):
    """Virtual tokens."""

    name = "prompt_tuning"
    Config = PromptTuningConfig

    def sites(self, config: PromptTuningConfig, spec: BackboneSpec) -> list[Site]:
        """The words' embeddings, or the input of the first layer."""
        check_room(config.num_virtual_tokens, spec)
        among_words = config.placement == "words"
        site = Site(SiteKind.EMBEDDING, spec.word_embeddings) if among_words else ENCODER_INPUT
        if site not in spec.sites:
            raise unsupported(self, spec, f"where it takes {config.placement} in is not known")
        return [site]

    def shapes(self, config: PromptTuningConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """One vector for each virtual token."""
        return {"prompt": (config.num_virtual_tokens, at.size_out)}

    def init(
        self, config: PromptTuningConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As PEFT's default, a fresh embedding: normal."""
        return {"prompt": torch.empty(config.num_virtual_tokens, at.size_out).normal_(generator=generator)}

    def bind(
        self,
        config: PromptTuningConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> PromptWeights:
        """The vectors as they are."""
        return PromptWeights(params["prompt"], self.framing(config).before)

    def framing(self, config: PromptTuningConfig) -> Framing:
        """Rows of its own in each text; among words they take positions too."""
        tokens = config.num_virtual_tokens
        return Framing(
            virtual_tokens=tokens,
            before=1 if config.combine == "prefix_after_bos" else 0,
            positions=tokens if config.placement == "words" else 0,
        )

    def apply(self, weights: PromptWeights, flow: Flow) -> Tensor:
        """The rows of the virtual tokens replaced."""
        return next(self.apply_run([weights], flow))

    def apply_run(self, weights: Sequence[PromptWeights], flow: Flow) -> Iterator[Tensor]:
        """All neighbours' at once."""
        rows, start = [], 0
        for own, texts in zip(weights, flow.texts, strict=True):
            rows.append(texts.index(own.before, own.prompt.shape[0], flow.y.device) + start)
            start += texts.rows
        values = [own.prompt.repeat(len(texts.starts), 1) for own, texts in zip(weights, flow.texts, strict=True)]
        yield flow.y.index_copy(0, torch.cat(rows), torch.cat(values))
