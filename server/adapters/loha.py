"""LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098, FedPara): y + s * x ((W1a W1b) * (W2a W2b))^T, an elementwise product.

The elementwise product of two matrices of rank r has rank r^2 at most, with factors known in closed form: the
Khatri-Rao products of the four. So it is applied as LoRA is, unless the matrix itself is smaller.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from server.adapters import lycoris
from server.adapters.base import Shape
from server.adapters.flow import Flow
from server.adapters.joined import LowRank, low_rank, low_rank_run
from server.adapters.lycoris import LycorisConfig, LycorisMethod
from server.core import Site, SiteSpec


class LohaConfig(LycorisConfig):
    """PEFT's names."""


class Loha(LycorisMethod[LohaConfig, LowRank]):
    """Low-rank Hadamard product."""

    name = "loha"
    Config = LohaConfig

    def shapes(self, config: LohaConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """PEFT's names."""
        rank = config.rank(site)
        return {
            "hada_w1_a": (at.size_out, rank),
            "hada_w1_b": (rank, at.size_in),
            "hada_w2_a": (at.size_out, rank),
            "hada_w2_b": (rank, at.size_in),
        }

    def init(
        self, config: LohaConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """PEFT's: all random but the last, which is zero."""
        params = {name: lycoris.kaiming(shape, generator) for name, shape in self.shapes(config, site, at).items()}
        return params | {"hada_w2_b": torch.zeros_like(params["hada_w2_b"])}

    def bind(
        self,
        config: LohaConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> LowRank:
        """The factors of rank r^2, or the whole matrix where that is less."""
        w1_a, w1_b, w2_a, w2_b = (params[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        scale = config.scale(site)
        rank = w1_a.shape[1] * w2_a.shape[1]
        if rank >= min(w1_a.shape[0], w1_b.shape[1]):
            delta = (w1_a @ w1_b) * (w2_a @ w2_b) * scale
            return LowRank(delta.contiguous(), None)
        b = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1) * scale  # [size_out, r^2]
        a = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)  # [r^2, size_in]
        return LowRank(a.contiguous(), b.t().contiguous())

    def apply(self, weights: LowRank, flow: Flow) -> Tensor:
        """y + x A B."""
        return low_rank(weights, flow)

    def apply_run(self, weights: Sequence[LowRank], flow: Flow) -> Iterator[Tensor]:
        """Joins the products of neighbours."""
        return low_rank_run(weights, flow)
