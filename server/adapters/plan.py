"""AdapterPlan: who owns which tokens of one batch, and what happens to them at each site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.base import AdapterWeights, Method
from server.core import Site


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of neighbouring texts that belong to one adapter."""

    adapter: AdapterWeights
    start: int
    """First text of the run."""
    end: int
    """One past its last text."""


class AdapterPlan:
    """The segments of one batch. The backbone calls `apply` at its sites and knows nothing else of adapters.

    Texts are sorted by adapter, so each adapter owns one contiguous slice of the token axis and needs no gather.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        """`segments` in the order of the texts; texts that none covers run through the bare backbone."""
        self._segments = segments
        # site -> (method, weights, first token, one past the last token), in token order
        self._parts: dict[Site, list[tuple[Method, Any, int, int]]] = {}

    def place(self, offsets: Sequence[int]) -> None:
        """Lays the segments on the token axis; `offsets[i]` is the first token of text i, the last is their sum.

        The backbone calls this with the layout it chose, packed or padded, before a forward.
        """
        self._parts = {}
        for segment in self._segments:
            start, end = offsets[segment.start], offsets[segment.end]
            for site, weights in segment.adapter.sites.items():
                self._parts.setdefault(site, []).append((segment.adapter.method, weights, start, end))

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """The output of `site` after the adapters: x [tokens, size_in], y [tokens, size_out] -> [tokens, size_out]."""
        parts = self._parts.get(site)
        if parts is None:
            return y
        pieces: list[Tensor] = []
        done = 0
        for method, weights, start, end in parts:
            if start > done:
                pieces.append(y[done:start])
            pieces.append(method.apply(weights, x[start:end], y[start:end]))
            done = end
        if done < y.shape[0]:
            pieces.append(y[done:])
        # One concatenation keeps `apply` pure, so that training can run it, and costs no more than 64 small copies.
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


NO_ADAPTERS = AdapterPlan(())
"""The bare backbone."""
