"""Flow: what passes a site in one forward, cut along the rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shared = dict[Any, Tensor]


@dataclass(frozen=True, slots=True)
class Texts:
    """Where the texts of one adapter lie in its slice of the rows. In the padded layout, padding lies between them."""

    starts: Sequence[int]
    lengths: Sequence[int]
    rows: int
    """Rows of the whole slice."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over each text's rows, [rows, n] -> [texts, n]."""
        spans = zip(self.starts, self.lengths, strict=True)
        return torch.stack([values[start : start + length].mean(0) for start, length in spans])

    def spread(self, values: Tensor) -> Tensor:
        """Each text's value for all its rows, [texts, n] -> [rows, n]; padding gets that of a neighbour."""
        ends = [*self.starts[1:], self.rows]
        rows = [end - start for start, end in zip(self.starts, ends, strict=True)]
        index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
        return values.index_select(0, index.to(values.device, non_blocking=True))

    def index(self, before: int, count: int, device: torch.device) -> Tensor:
        """The rows of the `count` virtual tokens that stand before each text's token `before`, [texts * count]."""
        rows = [start + before + i for start in self.starts for i in range(count)]
        return torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)


class Gate(NamedTuple):
    """AdapterHub's gates: numbers for each text, the means of sigmoid(W x + b) over it."""

    weight: Tensor  # [numbers, size_in]
    bias: Tensor  # [numbers]

    def per_text(self, x: Tensor, texts: Texts) -> Tensor:
        """Of the rows of one adapter, [rows, size_in] -> [texts, numbers]."""
        return texts.mean(torch.sigmoid(F.linear(x, self.weight, self.bias)))

    def per_row(self, x: Tensor, texts: Texts) -> Tensor:
        """The same, for each row its text's: [rows, numbers]."""
        return texts.spread(self.per_text(x, texts))


class Flow:
    """What passes a site: the rows of one adapter, or of several adapters side by side.

    Made several times at each site of each forward, so it is plain and has slots.
    """

    __slots__ = ("_offsets", "h", "owned", "shared", "start", "texts", "whole", "x", "y")

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        texts: Sequence[Texts],
        h: Tensor | None = None,
        shared: Shared | None = None,
        *,
        owned: bool = False,
        whole: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> None:
        """See the fields. `shared` lives as long as the forward, for what is the same at all its sites."""
        self.x = x
        """What entered the site's module, [rows, size_in]. At an embedding the ids, [rows]; at a residual site the
        residual stream."""
        self.y = y
        """What goes on from here without adapters, [rows, size_out]."""
        self.texts = texts
        """Of each adapter in turn."""
        self.h = h
        """At a residual site, the sub-layer's output before it joins the stream."""
        self.shared: Shared = {} if shared is None else shared
        self.owned = owned
        """Whether `apply_run` may change y itself instead of making a piece: never while gradients are recorded."""
        self.whole = whole
        """x and y of all rows of the forward, of which this flow's begin at `start`; None where nobody may know."""
        self.start = start
        self._offsets: list[int] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each adapter."""
        return tuple([texts.rows for texts in self.texts])

    @property
    def offsets(self) -> list[int]:
        """First row of each adapter, and the end."""
        if self._offsets is None:
            self._offsets = list(accumulate(self.lengths, initial=0))
        return self._offsets

    def split(self) -> "list[Flow]":
        """One flow for each adapter."""
        return [self.cut(index, index + 1) for index in range(len(self.texts))]

    def cut(self, first: int, end: int) -> "Flow":
        """The flow of the adapters first .. end alone."""
        if first == 0 and end == len(self.texts):
            return self
        rows = slice(self.offsets[first], self.offsets[end])
        h = self.h[rows] if self.h is not None else None
        return Flow(
            self.x[rows],
            self.y[rows],
            self.texts[first:end],
            h,
            self.shared,
            owned=self.owned,
            whole=self.whole,
            start=self.start + self.offsets[first],
        )

    def per_row(self, vectors: Sequence[Tensor]) -> Tensor:
        """One vector [n] per adapter -> each row's own, [rows, n] ([n] for a single adapter: it broadcasts)."""
        if len(vectors) == 1:
            return vectors[0]
        return torch.stack(list(vectors)).index_select(0, self.owners)

    @property
    def owners(self) -> Tensor:
        """[rows]: the index of each row's adapter."""
        key = self.lengths
        if key not in self.shared:
            index = torch.repeat_interleave(torch.arange(len(key)), torch.tensor(key))
            self.shared[key] = index.to(self.y.device, non_blocking=True)
        return self.shared[key]
