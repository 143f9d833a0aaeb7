"""Tensors that lie one after the other in one piece of memory, as those of a file do."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Packing:
    """How tensors lie. One for all files with the same header, so that what follows from it can be noted of it."""

    dtype: torch.dtype
    shapes: Mapping[str, torch.Size]
    """By name, in the order in which they lie, with nothing between them; none is empty."""
    like: list[Tensor]
    """The same as tensors without numbers."""

    @classmethod
    def of(cls, dtype: torch.dtype, shapes: Mapping[str, torch.Size]) -> "Packing":
        """Tensors of these shapes, in this order."""
        return cls(dtype, shapes, [torch.empty(shape, device="meta") for shape in shapes.values()])


class Packed(Mapping[str, Tensor]):
    """Views of packed tensors by name, made when one of them is asked for."""

    def __init__(self, packing: Packing, numbers: Tensor) -> None:
        """`numbers`: those of all tensors, [as many as they have together]."""
        self.packing = packing
        self.numbers = numbers
        self._views: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._views is None:
            cut = torch._C._nn.unflatten_dense_tensors(self.numbers, self.packing.like)
            self._views = dict(zip(self.packing.shapes, cut, strict=True))
        return self._views[name]

    def __contains__(self, name: object) -> bool:
        return name in self.packing.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.packing.shapes)

    def __len__(self) -> int:
        return len(self.packing.shapes)
