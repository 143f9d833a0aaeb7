"""Compacter (Mahabadi et al. 2021, arXiv:2106.04647): bottleneck adapters made of Kronecker products.

A projection of size [in, out] is sum_i rule_i kron W_i, with n matrices rule_i [n, n], often shared by all layers, and
W_i [in / n, out / n], often products of low rank. Names and options are those of AdapterHub's `PHMLayer`.
"""

from collections.abc import Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from server.adapters.activations import ActivationName
from server.adapters.base import Shape
from server.adapters.bottleneck import Bottleneck, BottleneckConfig
from server.core import BackboneSpec, Site, SiteSpec
from server.errors import InvalidAdapter


class CompacterConfig(BottleneckConfig):
    """A bottleneck adapter's, and AdapterHub's `phm_` options."""

    reduction_factor: float | dict[str, float] = 32.0
    """At least 0.25: a few small tensors multiply out to projections of any size."""
    non_linearity: ActivationName = "gelu"
    phm_dim: int = Field(4, ge=1, le=1024)
    """n."""
    phm_rank: int = Field(1, ge=1)
    """Rank of the W_i."""
    phm_bias: bool = True
    factorized_phm_W: bool = True  # noqa: N815 - AdapterHub's name
    """The W_i are products of low rank."""
    shared_W_phm: bool = False  # noqa: N815
    """All layers have the same W_i."""
    factorized_phm_rule: bool = False
    """The rules are products of rank 1."""
    shared_phm_rule: bool = True
    """All layers have the same rules."""

    @field_validator("reduction_factor")
    @classmethod
    def _stays_small(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        if min(value.values() if isinstance(value, dict) else (value,), default=1.0) < 0.25:
            raise ValueError("has to be at least 0.25 with phm layers")
        return value


class Compacter(Bottleneck):
    """Bottleneck adapters of parametrized hypercomplex multiplications."""

    name = "compacter"
    Config = CompacterConfig

    def projections(self, config: BottleneckConfig, hidden: int, size: int) -> dict[str, Shape]:
        """What each projection has of its own."""
        assert isinstance(config, CompacterConfig)
        shapes: dict[str, Shape] = {}
        for name, size_in, size_out in (("adapter_down", hidden, size), ("adapter_up", size, hidden)):
            _divisible(config, size_in, size_out)
            if not config.shared_phm_rule:
                shapes |= {f"{name}.{param}": shape for param, shape in _rule(config).items()}
            if not config.shared_W_phm:
                shapes |= {
                    f"{name}.{param}": shape for param, shape in _factors(config, "W", size_in, size_out).items()
                }
            if config.phm_bias:
                shapes[f"{name}.b"] = (size_out,)
        return shapes

    def shared_shapes(self, config: BottleneckConfig, spec: BackboneSpec) -> dict[str, Shape]:
        """What all layers share."""
        assert isinstance(config, CompacterConfig)
        shapes: dict[str, Shape] = _rule(config) if config.shared_phm_rule else {}
        if config.shared_W_phm:
            if isinstance(config.reduction_factor, dict):
                raise InvalidAdapter(
                    "shared_W_phm needs one reduction_factor for all layers",
                    param="reduction_factor",
                    code="unsupported_option",
                )
            hidden, size = spec.hidden_size, max(1, int(spec.hidden_size // config.reduction_factor))
            shapes |= _factors(config, "W_down", hidden, size) | _factors(config, "W_up", size, hidden)
        return shapes

    def init(
        self, config: BottleneckConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random factors; the last one of the way up is zero, so that training starts at the bare backbone."""
        return _fresh(self.shapes(config, site, at), generator)

    def init_shared(
        self, config: BottleneckConfig, spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The same for what the layers share."""
        return _fresh(self.shared_shapes(config, spec), generator)

    def matrices(
        self, config: BottleneckConfig, params: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The sums of Kronecker products, multiplied out."""
        assert isinstance(config, CompacterConfig)
        down, up = (self._matrix(config, place, params, shared) for place in ("down", "up"))
        return down, params.get("adapter_down.b"), up, params.get("adapter_up.b")

    def _matrix(
        self, config: CompacterConfig, place: str, params: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Tensor:
        own = {name.partition(".")[2]: value for name, value in params.items() if name.startswith(f"adapter_{place}.")}
        rule = _product(shared if config.shared_phm_rule else own, "phm_rule")
        weight = _product(shared, f"W_{place}") if config.shared_W_phm else _product(own, "W")
        # sum over i of rule_i kron W_i, as [out, in]
        whole = torch.einsum("iab,icd->acbd", rule, weight)
        return whole.flatten(2).flatten(0, 1).t()


def _factors(config: CompacterConfig, name: str, size_in: int, size_out: int) -> dict[str, Shape]:
    n = config.phm_dim
    if not config.factorized_phm_W:
        return {name: (n, size_in // n, size_out // n)}
    return {
        f"{name}_left": (n, size_in // n, config.phm_rank),
        f"{name}_right": (n, config.phm_rank, size_out // n),
    }


def _rule(config: CompacterConfig) -> dict[str, Shape]:
    n = config.phm_dim
    return (
        {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        if config.factorized_phm_rule
        else {"phm_rule": (n, n, n)}
    )


def _product(params: Mapping[str, Tensor], name: str) -> Tensor:
    if name in params:
        return params[name]
    return params[f"{name}_left"] @ params[f"{name}_right"]


def _fresh(shapes: Mapping[str, Shape], generator: torch.Generator) -> dict[str, Tensor]:
    params = {}
    for name, shape in shapes.items():
        value = torch.zeros(shape)
        last_of_up = name in ("adapter_up.W_right", "adapter_up.W", "W_up_right", "W_up")
        if len(shape) == 3 and not last_of_up:
            value.normal_(
                std=(1 / shape[0]) ** 0.5 if "rule" in name else (2 / (shape[1] + shape[2])) ** 0.5, generator=generator
            )
        elif ("norm" in name and name.endswith("weight")) or name == "scaling":
            value.fill_(1.0)
        elif name == "gate.weight":
            value.normal_(std=0.02, generator=generator)
        params[name] = value
    return params


def _divisible(config: CompacterConfig, *sizes: int) -> None:
    for size in sizes:
        if size % config.phm_dim:
            raise InvalidAdapter(
                f"phm_dim {config.phm_dim} does not divide the size {size} of a projection",
                param="phm_dim",
                code="unsupported_option",
            )
