"""A whole adapter: a method's weights and a task's head. Serving and training both build it here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from server.adapters import METHODS
from server.adapters.base import (
    AdapterWeights,
    Framing,
    Host,
    Method,
    MethodConfig,
    Part,
    Turned,
    check_tensors,
    unrounded,
)
from server.adapters.pieces import Moves, compacted, in_one_piece, memory, mould
from server.core import BackboneSpec, Options, Prediction, SiteKind, TextInput, WindowPooling
from server.errors import InvalidAdapter
from server.packed import Packed, Packing
from server.tasks import TASKS
from server.tasks.base import AnyTask, Outputs, Window
from server.tasks.head import HEAD, HeadConfig
from server.tasks.pooled import PooledTask

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class TaskAdapter:
    """An adapter on the backbone's device, ready to run."""

    weights: AdapterWeights
    task: AnyTask
    config: HeadConfig
    """The head's options."""
    head: Any
    labels: tuple[str, ...]
    nbytes: int
    """Memory that it holds: more than the stored tensors, where those are multiplied out."""

    def decode(self, outputs: Outputs, options: Options) -> list[Any]:
        """Raw outputs [texts, outputs] as answers. Raises TypeError for a task that takes more to read its outputs."""
        if not isinstance(self.task, PooledTask) or not isinstance(outputs, Tensor):
            raise TypeError(f"outputs of {self.task.name} are read with their texts")
        return self.task.decode(outputs, self.config, self.labels, options)

    def read(self, text: TextInput, windows: Sequence[Window], options: Options, pooling: WindowPooling) -> Prediction:
        """The answer to one input from its windows."""
        return self.task.read(text, windows, self.config, self.labels, options, pooling)

    def compact(self, given: Iterable[Tensor] = ()) -> "TaskAdapter":
        """The same in one piece of memory; see pieces.compacted."""
        spread = [part.sites for part in self.weights.parts], self.head
        moved, nbytes = compacted(spread, given)
        if moved is spread:
            return replace(self, nbytes=nbytes)
        sites, head = moved
        return replace(self, weights=self.weights.at(sites), head=head, nbytes=nbytes)

    def mould(self, tensors: Iterable[Tensor]) -> "Cast | None":
        """What makes of other tensors, in the same order, an adapter like this one; see pieces.mould."""
        pick = mould(([part.sites for part in self.weights.parts], self.head), tensors)
        if pick is None:
            return None
        bare = replace(self, weights=self.weights.at([{} for _ in self.weights.parts]), head=None, labels=())

        def cast(others: Iterable[Tensor], labels: tuple[str, ...]) -> TaskAdapter:
            sites, head = pick(others)
            return TaskAdapter(bare.weights.at(sites), bare.task, bare.config, head, labels, bare.nbytes)

        return cast


Cast = Callable[[Iterable[Tensor], tuple[str, ...]], TaskAdapter]
"""Tensors and labels to an adapter."""


@dataclass(slots=True)
class _Way:
    """From files that lie alike to adapters."""

    moves: Moves
    cast: Cast | None = None
    """None where it is not known yet, or where binding computes something."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Blueprint:
    """An adapter without its numbers, known to fit a backbone."""

    parts: tuple[Part, ...]
    task: AnyTask
    head: HeadConfig
    labels: tuple[str, ...]
    spec: BackboneSpec
    _fits: WeakSet[Packing] = field(default_factory=WeakSet, compare=False, repr=False)
    """Files whose tensors have the names, shapes and number formats that are needed."""
    _ways: WeakKeyDictionary[Packing, dict[torch.dtype, _Way]] = field(
        default_factory=WeakKeyDictionary, compare=False, repr=False
    )
    """How files become adapters, by the number format of the backbone."""

    @classmethod
    def check(
        cls,
        *,
        method: str,
        config: Mapping[str, Any],
        also: Sequence[tuple[str, Mapping[str, Any]]] = (),
        task: str,
        head: Mapping[str, Any],
        labels: Sequence[str],
        spec: BackboneSpec,
    ) -> "Blueprint":
        """Names and options to a blueprint. `also` are further methods of the same adapter, with their options.

        Raises InvalidAdapter naming what is unknown or does not fit.
        """
        parts = [
            Part(known := _known("method", name, METHODS), _parsed(field, known.Config, options))
            for field, name, options in (("config", method, config), *(("also", *more) for more in also))
        ]
        known_task = task_named(task)
        blueprint = cls(tuple(parts), known_task, _parsed("head", known_task.Config, head), tuple(labels), spec)
        known_task.check(blueprint.head, blueprint.labels, spec)
        names = [name for part in parts for name in part.shapes(spec)]
        if len(set(names)) < len(names):
            raise InvalidAdapter("two methods of the adapter have tensors of the same name", param="also")
        sites = [site for part in parts for site in part.sites(spec)]
        joins = [site for site in sites if site.kind is SiteKind.RESIDUAL]
        if len(set(joins)) < len(joins) or (joins and any(site.kind is SiteKind.NORM for site in sites)):
            raise InvalidAdapter(
                "two methods of the adapter act where the same sub-layer joins the residual stream, or one there and "
                "one on norms: neither would see the other",
                param="also",
                code="unsupported_option",
            )
        if sum(part.method.framing(part.config) != Framing() for part in parts) > 1:
            raise InvalidAdapter("two methods of the adapter add virtual tokens", param="also")
        return blueprint

    @property
    def method(self) -> Method:
        """The method that names the adapter."""
        return self.parts[0].method

    @property
    def config(self) -> MethodConfig:
        """Its hyperparameters."""
        return self.parts[0].config

    @property
    def framing(self) -> Framing:
        """What it does to the frame of its texts: at most one part does something."""
        framings = (part.method.framing(part.config) for part in self.parts)
        return next((framing for framing in framings if framing != Framing()), Framing())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Artifact tensor name -> shape, the head's included."""
        shapes = {name: shape for part in self.parts for name, shape in part.shapes(self.spec).items()}
        return shapes | self.task.shapes(self.head, self.labels, self.spec)

    def labelled(self, labels: Sequence[str]) -> "Blueprint":
        """The same with other labels. Raises InvalidAdapter where those make no sense."""
        self.task.check(self.head, labels, self.spec)
        if len(labels) == len(self.labels):
            return replace(self, labels=tuple(labels))
        return Blueprint(self.parts, self.task, self.head, tuple(labels), self.spec)  # of other shapes

    def check_tensors(self, tensors: Mapping[str, Tensor], *, finite: bool = False) -> None:
        """Refuses any tensor that is missing, unused, misshapen or not finite, by its name; see base.check_tensors."""
        packing = tensors.packing if isinstance(tensors, Packed) else None
        if finite and packing in self._fits:
            return
        check_tensors(tensors, self.shapes(), finite=finite)
        if packing is not None:
            self._fits.add(packing)

    def init(self, host: Host, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh float32 tensors for training."""
        tensors = {name: value for part in self.parts for name, value in part.init(host, generator).items()}
        return tensors | self.task.init(self.head, self.labels, self.spec, generator)

    def bind(self, tensors: Mapping[str, Tensor], host: Host) -> TaskAdapter:
        """Prepares checked tensors for the backbone. Differentiable.

        The head stays as precise as it was stored: its outputs are what the caller sees.
        """
        dtypes = dict(zip(tensors, self._dtypes(tensors, host), strict=True))
        placed = {name: unrounded(tensor.to(host.device), dtypes[name]) for name, tensor in tensors.items()}
        for part in self.parts:
            placed = part.turn(placed, host.spec)
        placed = {name: tensor.to(dtypes[name]) for name, tensor in placed.items()}
        bound = self._bound(placed, host)
        return replace(bound, nbytes=memory(([part.sites for part in bound.weights.parts], bound.head)))

    def load(self, tensors: Mapping[str, Tensor], host: Host) -> TaskAdapter:
        """The same of tensors that nobody trains and nobody else keeps: in one piece of memory, and in few calls."""
        if isinstance(tensors, Packed):
            return self._moved(tensors, host)
        turned = self._turned()
        placed: dict[str, Tensor] = {}
        laid: dict[str, Tensor] = {}
        dtypes: list[torch.dtype] = []
        for (name, tensor), dtype in zip(tensors.items(), self._dtypes(tensors, host), strict=True):
            if not tensor.numel():
                placed[name] = tensor.to(host.device, dtype)
                continue
            laid[name] = turned[name].turn(unrounded(tensor, dtype)) if name in turned else tensor
            dtypes.append(dtype)
        copies = in_one_piece(list(laid.values()), dtypes, host.device)
        placed |= zip(laid, copies, strict=True)
        return self._bound(placed, host).compact(copies)

    def loads_quickly(self, tensors: Mapping[str, Tensor], host: Host) -> bool:
        """Whether `load` only moves numbers: how, another file that lies alike has shown, and nothing is computed."""
        way = self._ways.get(tensors.packing, {}).get(host.dtype) if isinstance(tensors, Packed) else None
        return way is not None and way.cast is not None

    def _moved(self, tensors: Packed, host: Host) -> TaskAdapter:
        """The same of those of a file. What is found out once holds for all files that lie alike."""
        known = self._ways.setdefault(tensors.packing, {})
        if host.dtype not in known:
            known[host.dtype] = _Way(Moves(tensors.packing, self._dtypes(tensors, host), self._turned()))
        way = known[host.dtype]
        placed = way.moves.made(tensors.numbers, host.device)
        if way.cast is not None:
            return way.cast(placed.values(), self.labels)
        bound = self._bound(placed, host)
        whole = bound.compact(placed.values())
        if whole.weights is bound.weights:  # it was in one piece already
            way.cast = whole.mould(placed.values())
        return whole

    def _turned(self) -> Mapping[str, Turned]:
        """Artifact tensor name -> how it is turned before it is bound, of those that are."""
        layouts = [part.layout(self.spec).turned for part in self.parts]
        return layouts[0] if len(layouts) == 1 else {name: how for layout in layouts for name, how in layout.items()}

    def _bound(self, placed: Mapping[str, Tensor], host: Host) -> TaskAdapter:
        weights = AdapterWeights.of(self.parts, placed, host)
        return TaskAdapter(weights, self.task, self.head, self.task.bind(self.head, placed), self.labels, nbytes=0)

    def _dtypes(self, tensors: Mapping[str, Tensor], host: Host) -> list[torch.dtype]:
        """In which each of the tensors is used."""
        ours = host.dtype
        if isinstance(tensors, Packed):
            return [tensors.packing.dtype if name.startswith(HEAD) else ours for name in tensors]
        return [tensor.dtype if name.startswith(HEAD) else ours for name, tensor in tensors.items()]


def task_named(name: str) -> AnyTask:
    """The task of that name. Raises InvalidAdapter."""
    return _known("task", name, TASKS)


def _known(field: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise InvalidAdapter(
            f"{field} {name!r} is not supported; supported: {', '.join(table)}",
            param=field,
            code=f"unsupported_{field}",
        )
    return table[name]


def _parsed(field: str, model: type[M], options: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join((field, *map(str, first["loc"])))
        raise InvalidAdapter(f"{where}: {first['msg']}", param=where, code="unsupported_option") from error
