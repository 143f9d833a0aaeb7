"""What an adapter method is.

A method is a piece of differentiable math at some sites of the backbone. It is written once, for one adapter and its
own contiguous slice of the token axis; `plan.py` runs many of them in one batch, and the trainer runs the same code.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from server.adapters.flow import Flow, Gate
from server.core import BackboneSpec, Reach, Site, SiteSpec
from server.errors import InvalidAdapter


class Host(Protocol):
    """The backbone, as far as adapters may look at it."""

    @property
    def spec(self) -> BackboneSpec:
        """What it is."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """In which number format."""

    def module(self, site: Site) -> nn.Module:
        """The frozen module at a site; at a residual site, the normalization that follows (Identity if none does)."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The frozen tensors by name."""

    def config(self) -> Mapping[str, Any]:
        """The model's own configuration, as config.json has it."""


class MethodConfig(BaseModel):
    """Hyperparameters that change a method's math. An unknown one is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=MethodConfig)
WeightsT = TypeVar("WeightsT")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Framing:
    """What an adapter does to the frame of its texts."""

    virtual_tokens: int = 0
    """Rows that join each text."""
    before: int = 0
    """The text's token that they come before."""
    positions: int = 0
    """Positions that are taken before the text's first token; a text has to be shorter by as many."""


class KeyValue(NamedTuple):
    """What a method binds at a key_value site: rows before the keys and values of each of the adapter's texts."""

    keys: Tensor  # [virtual tokens, heads * head size]
    values: Tensor  # likewise
    gate: Gate | None = None
    """One number for each text, or two, that keys and values are multiplied by."""


def unrounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that is to be computed with and then be of another number format, in the wider of the two."""
    wide = torch.promote_types(value.dtype, dtype)
    return value if value.dtype == wide else value.to(wide)


class Turned(NamedTuple):
    """How a parameter is given to `bind`: another way than it is stored."""

    transposed: bool = False
    scale: float = 1.0
    """What it is multiplied by."""

    def laid(self, value: Tensor) -> Tensor:
        """A view that lies as `bind` wants it."""
        return value.t() if self.transposed else value

    def turn(self, value: Tensor) -> Tensor:
        """The parameter as `bind` wants it. Differentiable."""
        return self.laid(value * self.scale)


class AdapterMethod(ABC, Generic[ConfigT, WeightsT]):
    """One kind of adapter. Stateless: an instance is shared by all adapters of the kind.

    `ConfigT` holds the hyperparameters, `WeightsT` whatever `apply` wants to find prepared at one site. A method says
    at which sites it acts and with which parameters; one with parameters that its sites share says so as well.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]

    def complete(self, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
        """Options as a user writes them, as `Config` takes them: what depends on the backbone is filled in."""
        return dict(options)

    @abstractmethod
    def sites(self, config: ConfigT, spec: BackboneSpec) -> list[Site]:
        """The sites this adapter acts at. Raises InvalidAdapter where a target is not in the backbone."""

    @abstractmethod
    def shapes(self, config: ConfigT, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """Parameter name -> shape, at one site."""

    def shared_shapes(self, config: ConfigT, spec: BackboneSpec) -> dict[str, Shape]:
        """Parameter name -> shape, of what all sites share."""
        return {}

    @abstractmethod
    def init(
        self, config: ConfigT, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Fresh float32 parameters of one site for training, of the shapes that `shapes` gives.

        `module` is the frozen module at the site.
        """

    def init_shared(self, config: ConfigT, spec: BackboneSpec, generator: torch.Generator) -> dict[str, Tensor]:
        """The same for what the sites share."""
        return {}

    def share(self, config: ConfigT, shared: Mapping[str, Tensor], host: Host) -> Mapping[str, Tensor]:
        """Prepares what the sites share, once for all of them: `bind` is given this. Differentiable."""
        return shared

    def turned(self, config: ConfigT, site: Site) -> dict[str, Turned]:
        """Parameters of a site that `bind` is given transposed or multiplied.

        What is said here is done while an adapter's numbers are copied to where they will lie, at little cost; what
        `bind` does itself takes calls and memory of its own.
        """
        return {}

    @abstractmethod
    def bind(
        self, config: ConfigT, site: Site, params: Mapping[str, Tensor], shared: Mapping[str, Tensor], module: nn.Module
    ) -> WeightsT:
        """Prepares the parameters of one site, turned, for `apply`. Differentiable."""

    def framing(self, config: ConfigT) -> Framing:
        """What the adapter does to the frame of its texts."""
        return Framing()

    def apply(self, weights: WeightsT, flow: Flow) -> Tensor:
        """What goes on from the site instead of `flow.y`, for one adapter's rows. Pure and differentiable.

        Returns [rows, size_out]; nothing of the flow may be written to. Not called at key_value sites, whose
        weights (`KeyValue`) the attention reads.
        """
        raise NotImplementedError(f"{self.name} is read by the attention")

    def apply_run(self, weights: Sequence[WeightsT], flow: Flow) -> Iterator[Tensor]:
        """The same for adapters whose rows lie side by side; `flow.texts` has one entry for each.

        Gives the result in pieces, in the order of the rows; a piece may cover several adapters. Where the flow owns
        its y, a piece may be y's own rows, changed in place. A method whose small products are worth joining does so
        here; this one goes slice by slice.
        """
        for own, part in zip(weights, flow.split(), strict=True):
            yield self.apply(own, part)


Method = AdapterMethod[Any, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a part acts on a backbone, and what its tensors are called there."""

    sites: Mapping[Site, Mapping[str, str]]
    """At each site, parameter name -> artifact tensor name."""
    shared: Mapping[str, str]
    """The same for what the sites share."""
    shapes: Mapping[str, Shape]
    """Artifact tensor name -> shape, for all of them."""
    turned: Mapping[str, Turned]
    """Artifact tensor name -> how it is turned, of those that are."""
    reaches_all: bool
    """Whether it acts at a site that all rows share."""


@dataclass(frozen=True, slots=True)
class Part:
    """A method with its hyperparameters. An adapter is one or several of them."""

    method: Method
    config: MethodConfig
    form: str = field(init=False, compare=False)
    """A digest of method and hyperparameters."""
    _layouts: dict[int, tuple[BackboneSpec, Layout]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        whole = f"{self.method.name} {self.config.model_dump_json()}"
        object.__setattr__(self, "form", hashlib.sha256(whole.encode()).hexdigest())

    def layout(self, spec: BackboneSpec) -> Layout:
        """Computed once: adapters that were made alike share a part. Raises InvalidAdapter where it does not fit."""
        if id(spec) not in self._layouts:
            self._layouts[id(spec)] = spec, self._lay_out(spec)  # with the spec, so that its id stays its own
        return self._layouts[id(spec)][1]

    def _lay_out(self, spec: BackboneSpec) -> Layout:
        method, config = self.method, self.config
        at = {site: method.shapes(config, site, spec.sites[site]) for site in method.sites(config, spec)}
        sites = {site: {param: tensor_name(site, param) for param in shapes} for site, shapes in at.items()}
        shared_shapes = method.shared_shapes(config, spec)
        shared = {param: f"{method.name}/{param}" for param in shared_shapes}
        shapes = {shared[param]: shape for param, shape in shared_shapes.items()}
        for site, names in sites.items():
            shapes |= {name: at[site][param] for param, name in names.items()}
        turned = {tensor_name(site, param): how for site in sites for param, how in method.turned(config, site).items()}
        return Layout(sites, shared, shapes, turned, any(spec.sites[site].reach is Reach.SHARED for site in sites))

    def sites(self, spec: BackboneSpec) -> list[Site]:
        """Where it acts."""
        return list(self.layout(spec).sites)

    def shapes(self, spec: BackboneSpec) -> Mapping[str, Shape]:
        """Artifact tensor name -> shape, for everything that it consists of."""
        return self.layout(spec).shapes

    def init(self, host: Host, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters, by artifact tensor name."""
        shared = self.method.init_shared(self.config, host.spec, generator)
        return {f"{self.method.name}/{param}": value for param, value in shared.items()} | {
            tensor_name(site, param): value
            for site in self.sites(host.spec)
            for param, value in self.method.init(
                self.config, site, host.spec.sites[site], host.module(site), generator
            ).items()
        }

    def turn(self, tensors: Mapping[str, Tensor], spec: BackboneSpec) -> dict[str, Tensor]:
        """Tensors as `bind` wants them, by the same names. Differentiable."""
        turned = self.layout(spec).turned
        return {name: turned[name].turn(tensor) if name in turned else tensor for name, tensor in tensors.items()}

    def bind(self, tensors: Mapping[str, Tensor], host: Host) -> "BoundPart":
        """Prepares its tensors, turned, at all its sites. They must have passed `check_tensors`."""
        method, config, layout = self.method, self.config, self.layout(host.spec)
        # Copied, so that what a site has of them may stay a view: it is the same at all of them.
        shared = method.share(config, {param: tensors[name].clone() for param, name in layout.shared.items()}, host)
        sites = {
            site: method.bind(
                config, site, {param: tensors[name] for param, name in names.items()}, shared, host.module(site)
            )
            for site, names in layout.sites.items()
        }
        return BoundPart(method, sites, method.framing(config))


def tensor_name(site: Site, param: str) -> str:
    """The name of a site's parameter in the neutral artifact: `linear:encoder.layer.0...query/lora_A`."""
    return f"{site}/{param}"


@dataclass(frozen=True, slots=True)
class BoundPart:
    """A method with its prepared weights by site."""

    method: Method
    sites: Mapping[Site, Any]
    framing: Framing


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter's parts, in the order in which they act where they meet."""

    parts: tuple[BoundPart, ...]
    alone: bool = False
    """Has the forward to itself: it acts at a site that all rows share."""
    form: str = ""
    """Method, and a digest of all methods and hyperparameters. Adapters of the same form, side by side, are computed
    together best; batches are sorted by it, so it is short."""
    framing: Framing = Framing()
    """What it does to the frame of its texts."""

    @classmethod
    def of(cls, parts: Sequence[Part], tensors: Mapping[str, Tensor], host: Host) -> "AdapterWeights":
        """Binds all parts of an adapter to checked tensors."""
        bound = tuple(part.bind(tensors, host) for part in parts)
        shared = any(part.layout(host.spec).reaches_all for part in parts)
        form = f"{parts[0].method.name} {hashlib.sha256(''.join(part.form for part in parts).encode()).hexdigest()}"
        # at most one part does something to it
        framing = next((part.framing for part in bound if part.framing != Framing()), Framing())
        return cls(bound, shared, form, framing)

    def at(self, sites: Sequence[Mapping[Site, Any]]) -> "AdapterWeights":
        """The same with other weights at each part's sites."""
        parts = zip(self.parts, sites, strict=True)
        bound = tuple([BoundPart(part.method, own, part.framing) for part, own in parts])
        return AdapterWeights(bound, self.alone, self.form, self.framing)

    @property
    def method(self) -> Method:
        """The method that names the adapter."""
        return self.parts[0].method


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], *, finite: bool = False) -> None:
    """Refuses a misshapen, a non-finite, an unused or a missing tensor by its name, the same one each time.

    `finite`: the values are known to be.
    """
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
        if not finite and not bool(
            torch.isfinite(tensor.float()).all()
        ):  # as it will be used, whatever it is stored in
            raise InvalidAdapter(f"tensor {name!r} has NaN or infinite values", param=name, code="not_finite")
    for name in shapes:
        if name not in tensors:
            raise InvalidAdapter(f"tensor {name!r} is missing", param=name, code="missing_tensor")


def frozen_weight(module: nn.Module) -> Tensor:
    """A module's weight as [size_out, size_in]. GPT-2's Conv1D and embeddings keep it the other way round."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.t()


def unsupported(method: Method, spec: BackboneSpec, why: str) -> InvalidAdapter:
    """The refusal of a method that this backbone has no place for."""
    return InvalidAdapter(
        f"method {method.name!r} is not supported on backbones of type {spec.model_type!r}: {why}",
        param="method",
        code="unsupported_method",
    )
