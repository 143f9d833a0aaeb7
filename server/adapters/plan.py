"""AdapterPlan: who owns which rows of one batch, and what happens to them at each site."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.adapters.base import AdapterWeights, Framing, KeyValue, Method
from server.adapters.flow import Flow, Shared, Texts
from server.core import Site, SiteKind


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of neighbouring texts that belong to one adapter."""

    adapter: AdapterWeights
    start: int
    """First text of the run."""
    end: int
    """One past its last text."""


class Slice(NamedTuple):
    """Where the texts of a segment lie."""

    first: int  # text, as the rows count them
    end: int  # one past the last
    row: int  # the first
    texts: Texts


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where the texts of a batch lie in the rows, all of them or some."""

    offsets: Sequence[int]
    """The first row of each text that is there, and the number of rows."""
    lengths: Sequence[int]
    """Rows that each of them fills, padding the rest."""
    index: Mapping[int, int]
    """Text of the batch -> its place among those that are there, which are in the batch's order."""

    @classmethod
    def of(cls, lengths: Sequence[int], texts: Sequence[int] | None = None, each: int | None = None) -> "Placement":
        """Texts one after the other: the batch's first ones, or `texts`; `each` takes so many rows if given."""
        offsets = list(accumulate(lengths if each is None else [each] * len(lengths), initial=0))
        names = range(len(lengths)) if texts is None else texts
        return cls(offsets, lengths, {text: place for place, text in enumerate(names)})

    def cut(self, segment: Segment) -> Slice:
        """The slice of a segment whose texts are all there."""
        first = self.index[segment.start]
        end = first + segment.end - segment.start
        start = self.offsets[first]
        starts = [offset - start for offset in self.offsets[first:end]]
        return Slice(first, end, start, Texts(starts, self.lengths[first:end], self.offsets[end] - start))


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values that texts of a batch see before their own."""

    start: int  # first text
    end: int  # one past the last
    key_value: KeyValue
    row: int  # first row
    texts: Texts

    def opened(self, x: Tensor) -> "list[Prefix]":
        """One prefix for each text, as the gate leaves it, given all rows of what the attention reads."""
        keys, values, gate = self.key_value
        if gate is None:
            return [self]
        numbers = gate.per_text(x[self.row : self.row + self.texts.rows], self.texts)
        return [
            Prefix(text, text + 1, KeyValue(keys * own[0], values * own[-1]), self.row, self.texts)
            for text, own in enumerate(numbers, self.start)
        ]


@dataclass(slots=True)
class _Span:
    """Segments of a sequence whose rows lie side by side."""

    first: int
    last: int
    start: int
    """First row."""
    end: int
    """One past the last row."""
    texts: list[Texts]


def _spans(rows: Sequence[tuple[int, Texts]]) -> list[_Span]:
    """Of segments, given the first row and the texts of each."""
    spans: list[_Span] = []
    for index, (start, texts) in enumerate(rows):
        if not spans or spans[-1].end != start:
            spans.append(_Span(index, index, start, start, []))
        span = spans[-1]
        span.last, span.end = index, start + texts.rows
        span.texts.append(texts)
    return spans


def _one_each(count: int) -> Texts:
    """So many texts of one row."""
    return Texts(range(count), [1] * count, count)


@dataclass(slots=True)
class _Run:
    """Neighbouring segments of one method at one site."""

    method: Method
    start: int  # first row
    end: int  # one past the last
    weights: list[Any] = field(default_factory=list)
    texts: list[Texts] = field(default_factory=list)

    def apply(self, x: Tensor, y: Tensor, h: Tensor | None, shared: Shared, *, owned: bool = False) -> Iterator[Tensor]:
        """The rows of the run after its adapters, in pieces; the arguments are all rows."""
        own = slice(self.start, self.end)
        whole = (x, y) if owned else None
        flow = Flow(
            x[own],
            y[own],
            self.texts,
            h[own] if h is not None else None,
            shared,
            owned=owned,
            whole=whole,
            start=self.start,
        )
        return self.method.apply_run(self.weights, flow)


class AdapterPlan:
    """The segments of one batch. The backbone calls `apply` at its sites and knows nothing else of adapters.

    Texts are sorted by form and adapter, so each adapter owns one contiguous slice of the rows and needs no gather,
    and a method sees its adapters side by side.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        """`segments` in the order of the texts; texts that none covers run through the bare backbone."""
        self._segments = segments
        self._passes: dict[Site, list[list[_Run]]] = {}
        self._prefixes: dict[Site, list[Prefix]] = {}
        self._opened: dict[Site, list[Prefix]] = {}
        self._shared: Shared = {}

    def check(self, texts: int) -> None:
        """Raises ValueError where an adapter that needs a batch of so many texts to itself shares it."""
        for segment in self._segments:
            if segment.adapter.alone and (segment.start, segment.end) != (0, texts):
                raise ValueError("an adapter at a site that all rows share needs the forward to itself")

    def framings(self, texts: int) -> list[Framing]:
        """What the adapters do to the frame of each of so many texts."""
        framings = [Framing()] * texts
        for segment in self._segments:
            framings[segment.start : segment.end] = [segment.adapter.framing] * (segment.end - segment.start)
        return framings

    def adapters(self, texts: int) -> list[AdapterWeights | None]:
        """That of each of so many texts."""
        adapters: list[AdapterWeights | None] = [None] * texts
        for segment in self._segments:
            adapters[segment.start : segment.end] = [segment.adapter] * (segment.end - segment.start)
        return adapters

    def place(
        self, whole: Placement, per_text: Container[Site] = (), at: Callable[[Site], Placement] | None = None
    ) -> None:
        """Lays the segments on the rows of all texts, or on those that `at` says a site sees.

        `per_text` are sites that see one row per text instead. The backbone calls this with the layout it chose, packed
        or padded, before a forward.
        """
        self._passes, self._prefixes, self._opened, self._shared = {}, {}, {}, {}
        for _, group in groupby(self._segments, key=lambda segment: segment.adapter.form):
            self._place(list(group), whole, per_text, at)

    def _place(
        self,
        segments: Sequence[Segment],
        whole: Placement,
        per_text: Container[Site],
        at: Callable[[Site], Placement] | None,
    ) -> None:
        """Those of adapters of one form, which act at the same sites and lie alike at most of them."""
        cuts: dict[int, list[Slice]] = {}
        spans: dict[int, list[_Span]] = {}
        pooled = _spans([(segment.start, _one_each(segment.end - segment.start)) for segment in segments])
        for index, part in enumerate(segments[0].adapter.parts):
            own = [segment.adapter.parts[index].sites for segment in segments]
            for site in part.sites:
                placement = whole if at is None else at(site)
                key = id(placement)
                if key not in cuts:
                    cuts[key] = [placement.cut(segment) for segment in segments]
                    spans[key] = _spans([(cut.row, cut.texts) for cut in cuts[key]])
                if site.kind is SiteKind.KEY_VALUE:
                    self._prefixes.setdefault(site, []).extend(
                        Prefix(cut.first, cut.end, sites[site], cut.row, cut.texts)
                        for cut, sites in zip(cuts[key], own, strict=True)
                    )
                    continue
                weights = [sites[site] for sites in own]
                for span in pooled if site in per_text else spans[key]:
                    self._add(site, index, part.method, weights[span.first : span.last + 1], span)

    def _add(self, site: Site, index: int, method: Method, weights: Sequence[Any], span: _Span) -> None:
        """Parts of an adapter that meet at a site act one after the other: the n-th part in the n-th pass."""
        passes = self._passes.setdefault(site, [])
        while len(passes) <= index:
            passes.append([])
        runs = passes[index]
        if not runs or runs[-1].method is not method or runs[-1].end != span.start:
            runs.append(_Run(method, span.start, span.start))
        run = runs[-1]
        run.weights += weights
        run.texts += span.texts
        run.end = span.end

    def acts_at(self, site: Site) -> bool:
        """Whether anything happens at a site."""
        return site in self._passes

    def prefixes(self, site: Site) -> Sequence[Prefix]:
        """What the attention of a layer puts before keys and values."""
        return self._opened[site] if site in self._opened else self._prefixes.get(site, ())

    def observe(self, site: Site, x: Tensor) -> None:
        """Opens the gates of a layer's prefixes, given what its attention reads, [rows, size_in]."""
        prefixes = self._prefixes[site]
        if any(prefix.key_value.gate is not None for prefix in prefixes):
            self._opened[site] = [one for prefix in prefixes for one in prefix.opened(x)]

    def apply(self, site: Site, x: Tensor, y: Tensor, h: Tensor | None = None) -> Tensor:
        """What goes on from `site` after the adapters, as Flow names it: [rows, size_out].

        Nothing that is given is written to while gradients are recorded. Without them y is changed in place, which
        spares copying all rows for the sake of a few: it has to be the caller's own. It may be the same memory as x or
        h, since a row is written only after the piece that it belongs to has been computed.
        """
        for runs in self._passes.get(site, ()):
            if torch.is_grad_enabled():
                y = torch.cat(list(self._pieces(runs, x, y, h)))
                continue
            for run in runs:
                start = run.start
                for piece in run.apply(x, y, h, self._shared, owned=True):
                    target = y[start : start + piece.shape[0]]
                    if piece.data_ptr() != target.data_ptr():  # else it has been changed in place already
                        target.copy_(piece)
                    start += piece.shape[0]
        return y

    def apply_to_all(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """The same at a site that all rows share, for the only adapter of the batch: whatever the rows are."""
        texts = (Texts((0,), (y.shape[0],), y.shape[0]),)
        for runs in self._passes.get(site, ()):
            for run in runs:
                y = torch.cat(list(run.method.apply_run(run.weights, Flow(x, y, texts))))
        return y

    def _pieces(self, runs: Sequence[_Run], x: Tensor, y: Tensor, h: Tensor | None) -> Iterator[Tensor]:
        """All rows, those of the runs and those between them."""
        done = 0
        for run in runs:
            yield y[done : run.start]
            yield from run.apply(x, y, h, self._shared)
            done = run.end
        yield y[done:]


NO_ADAPTERS = AdapterPlan(())
"""The bare backbone."""
