"""LoKr (Yeh et al. 2023, arXiv:2309.14859): y + s * x (W1 kron W2)^T, a Kronecker product.

It is never multiplied out: with x as a matrix X of the factors' sizes, (W1 kron W2) x is W1 X W2^T.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor, nn

from server.adapters import lycoris
from server.adapters.base import Shape
from server.adapters.flow import Flow
from server.adapters.lycoris import LycorisConfig, LycorisMethod
from server.core import Site, SiteSpec


class LokrConfig(LycorisConfig):
    """PEFT's names."""

    decompose_both: bool = False
    """W1 is a product of low rank too, where the rank is small for it."""
    decompose_factor: int = -1
    """Size of W1 that is aimed at; -1 for about the square root."""

    @field_validator("decompose_factor")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("has to be -1 or at least 1")
        return value


class LokrWeights(NamedTuple):
    """One site."""

    w1: Tensor  # [out1, in1]
    w2: Tensor  # [out2, in2], scaled


def factorized(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size, the smaller first: `factor` if it divides, else near it, or near the root for -1.

    Source: LyCORIS' `factorization`, as PEFT has it.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    best = (1, size)
    for small in range(2, size + 1):
        if size % small:
            continue
        large = size // small
        if small + large > sum(best) or small > limit or best[0] >= best[1]:
            break
        best = (small, large)
    return (best[0], best[1]) if best[0] <= best[1] else (best[1], best[0])


class Lokr(LycorisMethod[LokrConfig, LokrWeights]):
    """Low-rank Kronecker product."""

    name = "lokr"
    Config = LokrConfig

    def shapes(self, config: LokrConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """PEFT's names. Each factor is whole, or itself a product of rank r where that is smaller."""
        rank = config.rank(site)
        in1, in2 = factorized(at.size_in, config.decompose_factor)
        out1, out2 = factorized(at.size_out, config.decompose_factor)
        shapes: dict[str, Shape] = {}
        for name, rows, columns, whole in (
            ("lokr_w1", out1, in1, not (config.decompose_both and rank < max(out1, in1) / 2)),
            ("lokr_w2", out2, in2, rank >= max(out2, in2) / 2),
        ):
            if whole:
                shapes[name] = (rows, columns)
            else:
                shapes |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
        return shapes

    def init(
        self, config: LokrConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """PEFT's: W1, or its first factor, is zero, the rest random."""
        zero = ("lokr_w1", "lokr_w1_a")
        return {
            name: torch.zeros(shape) if name in zero else lycoris.kaiming(shape, generator)
            for name, shape in self.shapes(config, site, at).items()
        }

    def bind(
        self,
        config: LokrConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> LokrWeights:
        """Both factors whole, and the scale in the second."""
        w1, w2 = (
            params[name] if name in params else params[f"{name}_a"] @ params[f"{name}_b"]
            for name in ("lokr_w1", "lokr_w2")
        )
        return LokrWeights(w1, w2 * config.scale(site))

    def apply(self, weights: LokrWeights, flow: Flow) -> Tensor:
        """y + the rows of W1 X W2^T."""
        x = flow.x.reshape(-1, weights.w1.shape[1], weights.w2.shape[1])  # [rows, in1, in2]
        delta: Tensor = weights.w1 @ (x @ weights.w2.t())  # [rows, out1, out2]
        return flow.y + delta.flatten(1)
