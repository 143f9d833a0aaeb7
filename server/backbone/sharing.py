"""Copies of a text in one batch run as one, up to the layer at which an adapter first makes them differ.

All rows of a batch enter the model and leave it. Before the first layer, all copies of a text but one are taken out;
before the layer at which a copy's adapter first acts, its rows come back, as they are by then. Each layer is given the
texts that it sees and the arguments that go with their rows, so the model itself notices nothing.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from server.adapters.base import AdapterWeights, Framing
from server.adapters.plan import Placement
from server.backbone.attention import PackedTexts
from server.core import Site

BEFORE_LAYERS = -1
"""The layer of a site that is passed before the first one."""

MAX_FORMS = 10_000
"""Forms of adapters whose first layer is remembered."""


class Share(NamedTuple):
    """Which text is computed for which, from a layer on."""

    layer: int
    computed: list[int]
    """For each text of the batch, the one whose rows stand for its own; itself where it has rows of its own."""


def shares(texts: Sequence[object], own_from: Sequence[int]) -> list[Share]:
    """What can be shared by texts that are one and the same object; empty if nothing can.

    `own_from[i]` is the first layer at which text i needs rows of its own, the number of layers where none does: then
    it gets them after the last. Computing each text for itself is the last of the shares.
    """
    copies: defaultdict[int, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        copies[id(text)].append(index)
    repeated = [group for group in copies.values() if len(group) > 1]
    found: list[Share] = []
    for layer in sorted({0, *(own_from[index] for group in repeated for index in group)}):
        computed = list(range(len(texts)))
        for group in repeated:
            alike = [index for index in group if own_from[index] > layer]
            for index in alike:
                computed[index] = alike[0]
        if not found or computed != found[-1].computed:
            found.append(Share(layer, computed))
    return found if len(found) > 1 else []


@dataclass(eq=False)
class Stage:
    """The rows of one share."""

    layer: int
    placement: Placement
    packed: PackedTexts
    source: Tensor
    """[rows]: where each row lies in the stage before; before the first, among all rows of the batch."""
    rows: Tensor | None
    """[rows]: where it lies among all rows of the batch; None where all of them are here."""
    _cut: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def cut(self, value: Any, size: int) -> Any:
        """An argument of a layer that was made for all rows of the batch, `size` of them, for those of the stage."""
        if self.rows is None:
            return value
        if isinstance(value, PackedTexts):
            return self.packed
        if isinstance(value, tuple):  # rotary embeddings: cosines and sines
            return tuple(self.cut(one, size) for one in value)
        if not isinstance(value, Tensor) or value.shape[:2] != (1, size):
            return value
        if id(value) not in self._cut:  # layers are given the same ones; kept, so that the id stays its own
            self._cut[id(value)] = value, value.index_select(1, self.rows)
        return self._cut[id(value)][1]


def lay_out(
    found: Sequence[Share], whole: Placement, packed: Callable[[Sequence[int]], PackedTexts], device: torch.device
) -> list[Stage]:
    """The stages of some shares of a batch that lies as `whole`; `packed` makes what the attention needs of lengths."""

    def rows(starts: Sequence[int], lengths: Sequence[int], filler: int) -> Tensor:
        """Runs of rows one after the other; the filler behind them is copied from anywhere."""
        runs = [row for start, length in zip(starts, lengths, strict=True) for row in range(start, start + length)]
        return torch.tensor(runs + [0] * filler).to(device, non_blocking=True)

    stages: list[Stage] = []
    placement, computed = whole, list(range(len(whole.lengths)))
    for share in found:
        texts = sorted(set(share.computed))
        own = [whole.lengths[text] for text in texts]
        attended = packed(own)
        before = {text: placement.offsets[index] for text, index in placement.index.items()}
        source = rows([before[computed[text]] for text in texts], own, attended.filler)
        complete = len(texts) == len(whole.lengths)
        placement = whole if complete else Placement.of(own, texts)
        among_all = None if complete else rows([whole.offsets[text] for text in texts], own, attended.filler)
        stages.append(Stage(share.layer, placement, attended, source, among_all))
        computed = share.computed
    return stages


class _Running(threading.local):
    """The forward of a thread, if it goes through stages."""

    staged: "_Staged | None" = None


class Sharing:
    """The layers of a model, for forwards in which copies of a text share some; each thread may run one at a time."""

    def __init__(self, layers: Sequence[nn.Module], layer_of: Mapping[Site, int]) -> None:
        """`layers` run once each, in this order; they are hooked until `close`. `layer_of`: the one that a site is
        passed in, see `watched`."""
        self._layers = layers
        self._layer_of = layer_of
        self._first: dict[str, int] = {}  # by form
        self._running = _Running()
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]
        self._hooks.append(layers[-1].register_forward_hook(self._leave))

    def close(self) -> None:
        """The layers are as they were."""
        for hook in self._hooks:
            hook.remove()

    def first_layer(self, adapter: AdapterWeights | None) -> int:
        """The first layer at which a text needs rows of its own for an adapter; the number of layers if none does."""
        if adapter is None:
            return len(self._layers)
        first = self._first.get(adapter.form)  # adapters of one form act at the same sites
        if first is None:
            if len(self._first) >= MAX_FORMS:
                self._first.clear()
            first = self._first[adapter.form] = self._find_first(adapter)
        return first

    def _find_first(self, adapter: AdapterWeights) -> int:
        if adapter.alone or adapter.framing != Framing():
            return 0
        layers = [self._layer_of[site] for part in adapter.parts for site in part.sites]
        return max(0, min(layers, default=len(self._layers)))

    def placed(self, stages: Sequence[Stage], whole: Placement) -> Callable[[Site], Placement]:
        """Which rows a site sees in a forward that goes through the stages."""
        last = len(self._layers)
        placements = [[stage for stage in stages if stage.layer <= layer][-1].placement for layer in range(last)]

        def at(site: Site) -> Placement:
            layer = self._layer_of[site]
            return placements[layer] if 0 <= layer < last else whole

        return at

    @contextmanager
    def running(self, stages: Sequence[Stage], size: int) -> Iterator[None]:
        """The forward within, of `size` rows, goes through the stages."""
        self._running.staged = _Staged(stages, size, len(self._layers))
        try:
            yield
        finally:
            self._running.staged = None

    def _enter(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        staged = self._running.staged
        return None if staged is None else staged.enter(index, args, kwargs)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        staged = self._running.staged
        return None if staged is None else staged.leave(output)


class _Staged:
    """A forward on its way through the stages."""

    def __init__(self, stages: Sequence[Stage], size: int, layers: int) -> None:
        self._stages = stages
        self._size = size
        self._layers = layers
        self._next = 0  # stage to come

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What layer `index` is given, of what it would be given without stages."""
        states = self._advance(index, args[0])
        stage = self._stages[self._next - 1]
        others = tuple(stage.cut(value, self._size) for value in args[1:])
        return (states, *others), {name: stage.cut(value, self._size) for name, value in kwargs.items()}

    def leave(self, output: Tensor) -> Tensor:
        """What the last layer's output becomes."""
        return self._advance(self._layers, output)

    def _advance(self, index: int, states: Tensor) -> Tensor:
        """The states [1, rows, hidden] of the stage before, in the rows of the stage that layer `index` belongs to."""
        while self._next < len(self._stages) and self._stages[self._next].layer <= index:
            states = states.index_select(1, self._stages[self._next].source)
            self._next += 1
        return states


@contextmanager
def watched(layers: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Which layers a forward has entered so far: [-1, 0, 1, ..., their number] after it if they run once each, in turn.

    The last one is the layer that runs, BEFORE_LAYERS before the first, the number of layers after the last.
    """
    entered = [BEFORE_LAYERS]

    def note(index: int) -> Callable[..., None]:
        return lambda *_: entered.append(index)

    hooks = [layer.register_forward_pre_hook(note(index)) for index, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(note(len(layers))) for layer in layers[-1:]]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()
