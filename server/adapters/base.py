"""What an adapter method is.

A method is a piece of differentiable math at some sites of the backbone. It is written once, for one adapter and its
own contiguous slice of the token axis; `plan.py` runs many of them in one batch, and the trainer runs the same code.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from server.core import BackboneSpec, Site
from server.errors import InvalidAdapter


class MethodConfig(BaseModel):
    """Hyperparameters that change a method's math. An unknown one is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=MethodConfig)
WeightsT = TypeVar("WeightsT")


class AdapterMethod(ABC, Generic[ConfigT, WeightsT]):
    """One kind of adapter. Stateless: an instance is shared by all adapters of the kind.

    `ConfigT` holds the hyperparameters, `WeightsT` whatever `apply` wants to find prepared at one site.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]

    def defaults(self, spec: BackboneSpec) -> dict[str, Any]:
        """Options of the method that training fills in from the backbone where the user gives none."""
        return {}

    @abstractmethod
    def sites(self, config: ConfigT, spec: BackboneSpec) -> list[Site]:
        """The sites this adapter acts at. Raises InvalidAdapter where a target is not in the backbone."""

    @abstractmethod
    def shapes(self, config: ConfigT, site: Site, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, at a site of these sizes."""

    @abstractmethod
    def init(
        self, config: ConfigT, site: Site, size_in: int, size_out: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Fresh float32 parameters for training, of the shapes that `shapes` gives."""

    @abstractmethod
    def bind(self, config: ConfigT, site: Site, params: Mapping[str, Tensor]) -> WeightsT:
        """Prepares the parameters of one site for `apply`. Differentiable."""

    @abstractmethod
    def apply(self, weights: WeightsT, x: Tensor, y: Tensor) -> Tensor:
        """The site's new output for one adapter's tokens. Pure and differentiable.

        `x` [tokens, size_in] is what entered the site's module, `y` [tokens, size_out] what it put out; neither may
        be written to. Returns [tokens, size_out].
        """

    def apply_run(
        self, weights: Sequence[WeightsT], lengths: list[int], x: Tensor, y: Tensor, shared: dict[Any, Any]
    ) -> Tensor:
        """The same for adapters whose tokens lie side by side: the i-th owns the next `lengths[i]` rows of x and y.

        A method whose small products are worth joining does so here; this one goes slice by slice. `shared` lives as
        long as the forward, for what is the same at all its sites.
        """
        slices = zip(weights, torch.split(x, lengths), torch.split(y, lengths), strict=True)
        # One concatenation keeps this pure, so that training can run it, and costs no more than small copies.
        return torch.cat([self.apply(own, own_x, own_y) for own, own_x, own_y in slices])


Method = AdapterMethod[Any, Any]


def tensor_name(site: Site, param: str) -> str:
    """The name of a site's parameter in the neutral artifact: `linear:encoder.layer.0...query/lora_A`."""
    return f"{site}/{param}"


def tensor_shapes(method: Method, config: MethodConfig, spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
    """Artifact tensor name -> shape, for everything that an adapter of this config consists of."""
    return {
        tensor_name(site, param): shape
        for site in method.sites(config, spec)
        for param, shape in method.shapes(config, site, *spec.sites[site]).items()
    }


def init_tensors(
    method: Method, config: MethodConfig, spec: BackboneSpec, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh parameters of a whole adapter, by artifact tensor name."""
    return {
        tensor_name(site, param): value
        for site in method.sites(config, spec)
        for param, value in method.init(config, site, *spec.sites[site], generator).items()
    }


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter's method with its prepared weights by site."""

    method: Method
    sites: Mapping[Site, Any]


def bind_tensors(
    method: Method, config: MethodConfig, tensors: Mapping[str, Tensor], spec: BackboneSpec
) -> AdapterWeights:
    """Prepares an adapter's tensors at all its sites. The tensors must have passed `check_tensors`."""
    sites = {}
    for site in method.sites(config, spec):
        params = method.shapes(config, site, *spec.sites[site])
        sites[site] = method.bind(config, site, {param: tensors[tensor_name(site, param)] for param in params})
    return AdapterWeights(method, sites)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a misshapen, a non-finite, an unused or a missing tensor by its name, the same one each time."""
    ordered = sorted(tensors.items())
    for name, tensor in ordered:
        # Shapes first: of all that differs between two backbones, sizes tell the uploader most.
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise InvalidAdapter(
                f"tensor {name!r} has shape {list(tensor.shape)}, the backbone needs {list(shapes[name])}",
                param=name,
                code="wrong_shape",
            )
    for name, tensor in ordered:
        if name not in shapes:
            raise InvalidAdapter(f"tensor {name!r} is not used by this adapter", param=name, code="unused_tensor")
        if tensor.dtype not in FLOATS:
            raise InvalidAdapter(f"tensor {name!r} holds {tensor.dtype}", param=name, code="wrong_dtype")
        if not bool(torch.isfinite(tensor.float()).all()):  # as it will be used, whatever it is stored in
            raise InvalidAdapter(f"tensor {name!r} has NaN or infinite values", param=name, code="not_finite")
    for name in shapes:
        if name not in tensors:
            raise InvalidAdapter(f"tensor {name!r} is missing", param=name, code="missing_tensor")
