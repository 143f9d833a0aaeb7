"""AdapterPlan: who owns which tokens of one batch, and what happens to them at each site."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class _Run:
    """Neighbouring segments of one method at one site."""

    method: Method
    start: int  # first token
    end: int  # one past the last
    weights: list[Any] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class AdapterPlan:
    """The segments of one batch. The backbone calls `apply` at its sites and knows nothing else of adapters.

    Texts are sorted by method and adapter, so each adapter owns one contiguous slice of the token axis and needs no
    gather, and a method sees its adapters side by side.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        """`segments` in the order of the texts; texts that none covers run through the bare backbone."""
        self._segments = segments
        self._runs: dict[Site, list[_Run]] = {}
        self._shared: dict[Any, Any] = {}

    def place(self, offsets: Sequence[int]) -> None:
        """Lays the segments on the token axis; `offsets[i]` is the first token of text i, the last is their sum.

        The backbone calls this with the layout it chose, packed or padded, before a forward.
        """
        self._runs = {}
        self._shared = {}
        for segment in self._segments:
            start, end = offsets[segment.start], offsets[segment.end]
            method = segment.adapter.method
            for site, weights in segment.adapter.sites.items():
                runs = self._runs.setdefault(site, [])
                if not runs or runs[-1].method is not method or runs[-1].end != start:
                    runs.append(_Run(method, start, start))
                run = runs[-1]
                run.weights.append(weights)
                run.lengths.append(end - start)
                run.end = end

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """The output of `site` after the adapters: x [tokens, size_in], y [tokens, size_out] -> [tokens, size_out]."""
        runs = self._runs.get(site)
        if runs is None:
            return y
        pieces: list[Tensor] = []
        done = 0
        for run in runs:
            if run.start > done:
                pieces.append(y[done : run.start])
            own_x, own_y = x[run.start : run.end], y[run.start : run.end]
            pieces.append(run.method.apply_run(run.weights, run.lengths, own_x, own_y, self._shared))
            done = run.end
        if done < y.shape[0]:
            pieces.append(y[done:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


NO_ADAPTERS = AdapterPlan(())
"""The bare backbone."""
