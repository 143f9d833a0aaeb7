"""What is compiled for each size of a product, compiled before requests need it.

On a CPU, in bfloat16, oneDNN compiles a product for each shape that has not been before: tens of milliseconds in which
the batch waits. The backbone and joined adapters keep to few sizes (see adapters/joined.py), so all of them can be had
beforehand, beside serving.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from server.adapters.joined import JOINED_COLUMNS, MIN_SIZE, compiles, rounded_up
from server.backbone.backbone import Backbone

LARGEST_ROWS = 512
"""Rows of the largest product that is compiled beforehand. Batches are rarely larger, and take as long themselves."""

STEPS = 8
"""Sizes of a batch in each power of two, as the backbone rounds them."""


class WarmUp:
    """A thread that ends when everything is compiled, or when it is stopped."""

    def __init__(self, backbone: Backbone) -> None:
        """Starts it."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, args=(products(backbone),), name="adapterd-warm-up")
        self._thread.start()

    def stop(self) -> None:
        """Ends it after the product that it is at."""
        self._stopping = True
        self._thread.join()

    @torch.inference_mode()
    def _run(self, products: Iterator[Callable[[], object]]) -> None:
        for product in products:
            if self._stopping:
                return
            product()


def products(backbone: Backbone) -> Iterator[Callable[[], object]]:
    """Those of the backbone's linear layers and of low-rank adapters at them, small ones first; none where nothing is
    compiled for its shape."""
    if not compiles(torch.empty(0, device=backbone.device, dtype=backbone.dtype)):
        return
    layers = {
        (layer.in_features, layer.out_features, layer.bias is None): layer
        for layer in backbone.model.modules()
        if isinstance(layer, nn.Linear)
    }
    sizes = sorted({rounded_up(rows, STEPS) for rows in range(1, LARGEST_ROWS + 1)})
    for rows in sizes:
        for layer in layers.values():
            yield partial(_linear, layer, rows)
        if rows == rounded_up(rows, steps=1):
            for layer in layers.values():
                for rank in (MIN_SIZE, JOINED_COLUMNS):
                    yield partial(_low_rank, layer, rows, rank)


def _linear(layer: nn.Linear, rows: int) -> None:
    F.linear(_zeros(layer, rows, layer.in_features), layer.weight, layer.bias)


def _low_rank(layer: nn.Linear, rows: int, rank: int) -> None:
    low = F.linear(_zeros(layer, rows, layer.in_features), _zeros(layer, rank, layer.in_features))
    _zeros(layer, rows, layer.out_features).addmm_(low, _zeros(layer, rank, layer.out_features))


def _zeros(like: nn.Linear, rows: int, columns: int) -> torch.Tensor:
    return like.weight.new_zeros(rows, columns)
