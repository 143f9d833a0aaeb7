"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): y + b * (B (d * (A x))) with random A and B shared by all sites.

Only the vectors b and d are learned. A and B come from a seed, so that all adapters of the same seed, rank and sizes
have the same ones: they are held once, and multiplied once for all of a batch's neighbours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, Host, Shape, frozen_weight
from server.adapters.flow import Flow
from server.adapters.targets import TargetConfig, select, with_default
from server.core import BackboneSpec, Site, SiteSpec


class VeraConfig(TargetConfig):
    """PEFT's names."""

    r: int = Field(256, ge=1, le=4096)
    projection_prng_key: int = Field(0, ge=0, lt=2**63)
    """Seed of A and B."""
    save_projection: bool = False
    """A and B are stored with the adapter, instead of being made from the seed."""
    d_initial: float = Field(0.1, allow_inf_nan=False)
    """What d starts from in training."""


class VeraWeights(NamedTuple):
    """One site. A and B are views of the shared ones."""

    a: Tensor  # [r, size_in]
    b: Tensor  # [size_out, r]
    lambda_d: Tensor  # [r]
    lambda_b: Tensor  # [size_out]


def projections(seed: int, r: int, size_in: int, size_out: int) -> tuple[Tensor, Tensor]:
    """A [r, size_in] and B [size_out, r] as PEFT makes them: Kaiming-uniform over the sizes of the largest targets."""
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(6 / size_in)
    a = torch.empty(r, size_in).uniform_(-bound, bound, generator=generator)
    bound = math.sqrt(6 / r)
    return a, torch.empty(size_out, r).uniform_(-bound, bound, generator=generator)


@lru_cache(maxsize=8)
def _placed(
    seed: int, r: int, size_in: int, size_out: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for training too
        a, b = projections(seed, r, size_in, size_out)
        return a.to(device, dtype), b.to(device, dtype)


class Vera(AdapterMethod[VeraConfig, VeraWeights]):
    """Vector-based random matrix adaptation."""

    name = "vera"
    Config = VeraConfig

    def complete(self, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
        """PEFT's selectors resolved; the attention's query and value by default."""
        return select(with_default(options, spec), spec)

    def sites(self, config: VeraConfig, spec: BackboneSpec) -> list[Site]:
        """The linear layers that the targets name."""
        return config.sites(spec)

    def shapes(self, config: VeraConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """PEFT's names."""
        return {"vera_lambda_b": (at.size_out,), "vera_lambda_d": (config.r,)}

    def shared_shapes(self, config: VeraConfig, spec: BackboneSpec) -> dict[str, Shape]:
        """A and B, where they are stored."""
        if not config.save_projection:
            return {}
        size_in, size_out = self.largest(config, spec)
        return {"vera_A": (config.r, size_in), "vera_B": (size_out, config.r)}

    def largest(self, config: VeraConfig, spec: BackboneSpec) -> tuple[int, int]:
        """The largest input and the largest output of all targets: the sizes of the shared A and B."""
        sizes = [spec.sites[site] for site in self.sites(config, spec)]
        return max(at.size_in for at in sizes), max(at.size_out for at in sizes)

    def init(
        self, config: VeraConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The paper's: zero b, constant d."""
        return {"vera_lambda_b": torch.zeros(at.size_out), "vera_lambda_d": torch.full((config.r,), config.d_initial)}

    def init_shared(self, config: VeraConfig, spec: BackboneSpec, generator: torch.Generator) -> dict[str, Tensor]:
        """A and B from the seed, where they are to be stored."""
        if not config.save_projection:
            return {}
        a, b = projections(config.projection_prng_key, config.r, *self.largest(config, spec))
        return {"vera_A": a.clone(), "vera_B": b.clone()}

    def share(self, config: VeraConfig, shared: Mapping[str, Tensor], host: Host) -> Mapping[str, Tensor]:
        """A and B, from the seed where they are not stored."""
        if config.save_projection:
            return shared
        sizes = self.largest(config, host.spec)
        a, b = _placed(config.projection_prng_key, config.r, *sizes, host.device, host.dtype)
        return {"vera_A": a, "vera_B": b}

    def bind(
        self,
        config: VeraConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> VeraWeights:
        """Takes from A and B what the site's sizes need."""
        lambda_b, lambda_d = params["vera_lambda_b"], params["vera_lambda_d"]
        a, b = shared["vera_A"], shared["vera_B"]
        return VeraWeights(a[:, : frozen_weight(module).shape[1]], b[: lambda_b.shape[0]], lambda_d, lambda_b)

    def apply(self, weights: VeraWeights, flow: Flow) -> Tensor:
        """y + b * (B (d * (A x)))."""
        return next(self.apply_run([weights], flow))

    def apply_run(self, weights: Sequence[VeraWeights], flow: Flow) -> Iterator[Tensor]:
        """Multiplies by A and B once for neighbours that share them."""
        if any(not _same(one.a, other.a) for one, other in pairwise(weights)):
            yield from super().apply_run(weights, flow)
            return
        low = (flow.x @ weights[0].a.t()) * flow.per_row([own.lambda_d for own in weights])
        yield flow.y + (low @ weights[0].b.t()) * flow.per_row([own.lambda_b for own in weights])


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two are views of one tensor."""
    return one.shape == other.shape and one.untyped_storage()._cdata == other.untyped_storage()._cdata
