"""Where an adapter's numbers lie: all in one piece of memory, and how they get there."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from server.adapters.base import Shape, Turned, unrounded
from server.blocks import BLOCKS
from server.packed import Packing

T = TypeVar("T")

TENSOR_BYTES = 512
"""What a tensor takes beside its numbers: the object, its parts in C++, its place in a tuple or a dictionary."""

ALIGNMENT = 64
"""Bytes at whose multiples tensors begin, as torch's own."""


def memory(bound: Any) -> int:
    """Bytes of the tensors in bound weights, and of what holds them. What adapters share counts for each of them."""
    tensors = _tensors(bound)
    return _memory(tensors, map(_storage, tensors))


def _memory(tensors: Sequence[Tensor], storages: Iterable[int]) -> int:
    distinct = dict(zip(storages, tensors, strict=True))
    return sum(tensor.untyped_storage().nbytes() for tensor in distinct.values()) + TENSOR_BYTES * len(tensors)


def _storage(tensor: Tensor) -> int:
    """The same for tensors that share their memory."""
    storage = tensor.untyped_storage()
    return id(storage) if tensor.is_meta else storage.data_ptr()


def compacted(bound: T, given: Iterable[Tensor] = ()) -> tuple[T, int]:
    """The same bound weights in one piece of memory, which goes back in one piece; and their `memory`.

    In pieces of a few kilobytes, weights that come and go leave holes that cost a quarter of their memory. Parameters
    of the backbone and views stay where they are: others may have the rest of them; but not views of what was `given`,
    which nobody else keeps. Where they are all that is in it, they lie in one piece already.
    """
    tensors = _tensors(bound)
    storages = list(map(_storage, tensors))
    passing = set(map(_storage, given))
    own = {
        id(value): value
        for value, storage in zip(tensors, storages, strict=True)
        if value.is_contiguous()
        and value.numel()
        and (storage in passing or not (value._is_view() or isinstance(value, nn.Parameter)))
    }
    if not own:
        return bound, _memory(tensors, storages)
    values = list(own.values())
    if _fills_one_piece(values):
        return bound, _memory(tensors, storages)
    copies = in_one_piece(values, [value.dtype for value in values], values[0].device)
    moved = cast(T, _replaced(bound, dict(zip(own, copies, strict=True))))
    return moved, memory(moved)


def _fills_one_piece(values: Sequence[Tensor]) -> bool:
    """Whether all lie in one piece of memory, with little else in it."""
    if len(set(map(_storage, values))) > 1:
        return False
    used = sum(value.nbytes for value in values)
    return used >= values[0].untyped_storage().nbytes() - ALIGNMENT * len(values)


@torch.inference_mode()
def in_one_piece(values: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Tensor]:
    """Copies in given number formats, in one piece of memory. None of the values may be empty.

    They are inference tensors: what autograd notes of a view takes as much memory as the tensor itself.
    """
    if not values:
        return []
    layout = _layout(tuple((dtype, value.shape) for dtype, value in zip(dtypes, values, strict=True)))
    copies = _cut(layout, len(values), device)
    torch._foreach_copy_(copies, list(values))
    return copies


class _Numbers(NamedTuple):
    """The part of a piece of memory that holds one number format."""

    dtype: torch.dtype
    start: int  # bytes
    end: int
    indices: list[int | None]
    """Which value each of `like` is; None for what keeps the next one aligned."""
    like: list[Tensor]
    """Shapes, as tensors without numbers."""


def _padded(numbers: int, dtype: torch.dtype) -> int:
    """How many numbers so many take with what keeps the next value aligned."""
    unit = ALIGNMENT // dtype.itemsize
    return -(-numbers // unit) * unit


@lru_cache(maxsize=256)
def _layout(values: tuple[tuple[torch.dtype, Shape], ...]) -> list[_Numbers]:
    """How values of these formats and shapes lie in one piece: adapters of a family lie alike."""
    layout: list[_Numbers] = []
    start = 0
    for format in dict.fromkeys(dtype for dtype, _ in values):
        indices: list[int | None] = []
        like: list[Tensor] = []
        for index, (dtype, shape) in enumerate(values):
            if dtype == format:
                indices.append(index)
                like.append(torch.empty(shape, dtype=dtype, device="meta"))
                if unused := _padded(like[-1].numel(), dtype) - like[-1].numel():
                    indices.append(None)
                    like.append(torch.empty(unused, device="meta"))
        end = start + format.itemsize * sum(one.numel() for one in like)
        layout.append(_Numbers(format, start, end, indices, like))
        start = end
    return layout


def _cut(layout: Sequence[_Numbers], count: int, device: torch.device) -> list[Tensor]:
    """A piece of memory as so many values, with anything in them."""
    piece = _piece(layout[-1].end, device, [torch.uint8])[torch.uint8]
    values: list[Tensor] = [piece] * count
    for part in layout:
        cut = torch._C._nn.unflatten_dense_tensors(piece[part.start : part.end].view(part.dtype), part.like)
        for index, place in zip(part.indices, cut, strict=True):
            if index is not None:
                values[index] = place
    return values


def _piece(nbytes: int, device: torch.device, formats: Iterable[torch.dtype]) -> dict[torch.dtype, Tensor]:
    """A piece of memory, as numbers of some formats."""
    if device.type == "cpu":
        block = BLOCKS.take(nbytes)
        return {format: torch.frombuffer(block, dtype=format) for format in formats}
    piece = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return {format: piece.view(format) for format in formats}


class _Run(NamedTuple):
    """Tensors of one shape that lie in equal steps, and go to where they lie in equal steps."""

    names: list[str]
    first: int
    """Number with which they begin."""
    step: int
    """Numbers from one to the next."""
    shape: Shape
    dtype: torch.dtype
    """In which they go."""
    how: Turned
    start: int
    """Byte with which they begin where they go."""

    @property
    def end(self) -> int:
        """Byte with which they end there."""
        return self.start + len(self.names) * _padded(math.prod(self.shape), self.dtype) * self.dtype.itemsize

    def move(self, numbers: Tensor, piece: Tensor) -> tuple[Tensor, ...]:
        """From a file's numbers to a piece of memory, which is of the format in which they go. Where they are then."""
        laid = self.shape[::-1] if self.how.transposed else self.shape
        there = piece.as_strided(
            (len(self.names), *laid),
            (_padded(math.prod(laid), self.dtype), *_strides(laid)),
            self.start // self.dtype.itemsize,
        )
        own = numbers.as_strided((len(self.names), *self.shape), (self.step, *_strides(self.shape)), self.first)
        there.copy_(own if self.how == Turned() else self._turned(own))
        return there.unbind()

    def _turned(self, own: Tensor) -> Tensor:
        """A copy for a moment, outside of malloc's memory: there, what is small and stays would be put into the hole
        that it leaves, and the next copy need another one. So it would with what torch makes by itself, where a product
        and what it is written to are of different formats."""
        wide = unrounded(own, self.dtype)
        turned = wide.mT if self.how.transposed else wide
        numbers = _piece(turned.nbytes, turned.device, [turned.dtype])[turned.dtype]
        return torch.mul(turned, self.how.scale, out=numbers.view(turned.shape))


class Moves:
    """How the tensors of files with one header get into one piece of memory, as they are used: those of one shape that
    lie in equal steps, as those of the same module in all layers do, in one go."""

    def __init__(self, packing: Packing, dtypes: Sequence[torch.dtype], turned: Mapping[str, Turned]) -> None:
        """`dtypes`: in which each is used; `turned`: how, of those that are, by name."""
        self._runs = _runs(packing, dtypes, turned)
        self._formats = list({run.dtype for run in self._runs})

    @torch.inference_mode()
    def made(self, numbers: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a file, given its numbers, by name."""
        pieces = _piece(self._runs[-1].end, device, self._formats)
        there = numbers if numbers.device == device else numbers.to(device)
        placed: dict[str, Tensor] = {}
        for run in self._runs:
            placed |= zip(run.names, run.move(there, pieces[run.dtype]), strict=True)
        return placed


def _runs(packing: Packing, dtypes: Sequence[torch.dtype], turned: Mapping[str, Turned]) -> list[_Run]:
    alike: dict[tuple[Shape, torch.dtype, Turned], list[tuple[str, int]]] = {}
    first = 0
    for (name, size), dtype in zip(packing.shapes.items(), dtypes, strict=True):
        alike.setdefault((tuple(size), dtype, turned.get(name, Turned())), []).append((name, first))
        first += size.numel()
    runs: list[_Run] = []
    for (shape, dtype, how), places in alike.items():
        while places:
            step = places[1][1] - places[0][1] if len(places) > 1 else 0
            count = next((at for at, (_, first) in enumerate(places) if first != places[0][1] + at * step), len(places))
            names = [name for name, _ in places[:count]]
            runs.append(_Run(names, places[0][1], step, shape, dtype, how, runs[-1].end if runs else 0))
            places = places[count:]
    return runs


@lru_cache(maxsize=256)
def _strides(shape: Shape) -> Shape:
    return torch.empty(shape, device="meta").stride()


_SEQUENCES = (tuple, list)
"""What weights are made of, beside mappings; named tuples too."""


def _tensors(bound: Any) -> list[Tensor]:
    """All tensors in bound weights."""
    found: list[Tensor] = []
    waiting: list[Any] = [bound]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, _SEQUENCES):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
    return found


def _replaced(value: Any, moved: Mapping[int, Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return moved.get(id(value), value)
    if isinstance(value, _SEQUENCES):
        inside = [_replaced(one, moved) for one in value]
        return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)
    return {key: _replaced(one, moved) for key, one in value.items()} if isinstance(value, dict) else value


def mould(bound: Any, tensors: Iterable[Tensor]) -> Callable[[Iterable[Tensor]], Any] | None:
    """What makes of other tensors, in the same order, what `bound` is of these; None where it has any that is none of
    these, or a part of one: then binding computes something."""
    try:
        pick = _picker(bound, {id(tensor): place for place, tensor in enumerate(tensors)})
    except KeyError:
        return None
    return lambda others: pick([*others, None])


def _picker(value: Any, places: Mapping[int, int]) -> Callable[[Sequence[Tensor | None]], Any]:
    """Makes such a value of tensors, the last of which is None. Raises KeyError for a tensor that has no place."""
    if isinstance(value, Tensor):
        return itemgetter(places[id(value)])
    if isinstance(value, _SEQUENCES):
        make = type(value)._make if hasattr(value, "_make") else type(value)
        if len(value) > 1 and all(one is None or isinstance(one, Tensor) for one in value):  # most are such ones
            pick = itemgetter(*(-1 if one is None else places[id(one)] for one in value))
            return lambda given: make(pick(given))
        inside = [_picker(one, places) for one in value]
        return lambda given: make([pick(given) for pick in inside])
    if isinstance(value, dict):
        items = [(key, _picker(one, places)) for key, one in value.items()]
        return lambda given: {key: pick(given) for key, pick in items}
    return lambda _: value
