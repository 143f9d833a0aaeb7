"""Packed attention: one row of tokens holds many texts, and each text sees only itself, after its adapter's prefix.

transformers looks attention functions up by name (AttentionInterface); `PACKED` is ours. The texts of a batch reach it
as the keyword argument `packed`, which the model passes through.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from server.adapters.plan import Prefix

PACKED = "adapterd_packed"

WINDOW_TOKENS = 64
"""Short neighbours share one attention call under a block-diagonal mask, up to this many tokens together. A call
costs about 40 us whatever its size, masked-out work grows with the square of the window; 64 was the best of 32..256
on CPU."""


class _Window(NamedTuple):
    """Texts of one attention call."""

    first: int
    lengths: list[int]

    @property
    def end(self) -> int:
        return self.first + len(self.lengths)


class _Visible(NamedTuple):
    """What decides a window's mask."""

    causal: bool
    sliding: int | None
    dtype: torch.dtype
    prefixes: tuple[tuple[int, int, int], ...]  # first text, one past the last, virtual tokens


class PackedTexts:
    """The texts in a packed row, cut into windows of one attention call each."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        prefixes: Callable[[nn.Module], Sequence[Prefix]] = lambda module: (),
        filler: int = 0,
    ) -> None:
        """`lengths`: tokens of each text, in order; `prefixes(module)`: what the attention of a layer puts before them.

        `filler` rows follow that belong to no text. Masks are made on `device`, without a synchronization.
        """
        self.filler = filler
        self._device = device
        self._prefixes = prefixes
        self._windows: list[_Window] = []
        room = 0
        for index, length in enumerate(lengths):
            if length > room:
                self._windows.append(_Window(index, []))
                room = WINDOW_TOKENS
            self._windows[-1].lengths.append(length)
            room -= length
        self._sizes = [sum(window.lengths) for window in self._windows]
        self._masks: dict[_Visible, list[Tensor | None]] = {}

    def cut(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, sliding: int | None
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Query, keys, values and additive mask of each window; the mask is None where everything is seen."""
        prefixes = list(self._prefixes(module))
        around = tuple((one.start, one.end, one.key_value.keys.shape[0]) for one in prefixes)
        masks = self._masked(_Visible(causal, sliding, query.dtype, around))
        own = query.shape[2] - self.filler
        parts = list(zip(*(torch.split(t[:, :, :own], self._sizes, dim=2) for t in (query, key, value)), strict=True))
        if prefixes:
            sets = [
                self._with_prefixes(window, prefixes, k, v)
                for window, (_, k, v) in zip(self._windows, parts, strict=True)
            ]
            parts = [(q, k, v) for (q, _, _), (k, v) in zip(parts, sets, strict=True)]
        return [(q, k, v, mask) for (q, k, v), mask in zip(parts, masks, strict=True)]

    def _with_prefixes(
        self, window: _Window, prefixes: Sequence[Prefix], key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Every prefix of the window's texts once, then the window's own keys and values."""
        own = [one.key_value for one in prefixes if _meets(one.start, one.end, window)]
        if not own:
            return key, value
        _, heads, _, size = key.shape

        def rows(matrix: Tensor) -> Tensor:  # [virtual, heads * size] -> [1, heads, virtual, size]
            return matrix.view(-1, heads, size).transpose(0, 1)[None]

        keys = torch.cat([*(rows(one.keys) for one in own), key], dim=2)
        return keys, torch.cat([*(rows(one.values) for one in own), value], dim=2)

    def _masked(self, visible: _Visible) -> list[Tensor | None]:
        if visible not in self._masks:
            self._masks[visible] = [self._mask(window, visible) for window in self._windows]
        return self._masks[visible]

    def _mask(self, window: _Window, visible: _Visible) -> Tensor | None:
        size = sum(window.lengths)
        # a text within the sliding window is seen whole
        sliding = visible.sliding if visible.sliding and max(window.lengths) > visible.sliding else None
        if len(window.lengths) == 1 and not visible.causal and sliding is None:
            return None
        prefixes = [one for one in visible.prefixes if _meets(one[0], one[1], window)]
        before = sum(tokens for _, _, tokens in prefixes)
        mask = torch.full((size, before + size), float("-inf"), dtype=visible.dtype, device=self._device)
        start = 0
        for text, length in enumerate(window.lengths, window.first):
            mask[start : start + length, before + start : before + start + length] = 0
            column = 0
            for first, end, tokens in prefixes:
                if first <= text < end:
                    mask[start : start + length, column : column + tokens] = 0
                column += tokens
            start += length
        own = mask[:, before:]
        if visible.causal:
            own.masked_fill_(torch.ones(size, size, dtype=torch.bool, device=self._device).triu(1), float("-inf"))
        if sliding is not None:
            places = torch.arange(size, device=self._device)
            own.masked_fill_((places[:, None] - places[None, :]).abs() >= sliding, float("-inf"))
        return mask


def _meets(first: int, end: int, window: _Window) -> bool:
    return first < window.end and window.first < end


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedTexts,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each text: query [1, heads, tokens, size], key and value likewise -> [1, tokens, heads, size].

    Signature as transformers calls it; keys and values may have fewer heads (grouped queries). With a sliding window,
    tokens see those less than `sliding_window` away.
    """
    causal = bool(getattr(module, "is_causal", False))
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
        for q, k, v, mask in packed.cut(module, query, key, value, causal=causal, sliding=sliding_window)
    ]
    if packed.filler:
        outputs.append(query[:, :, -packed.filler :])  # whatever is finite: nobody reads it
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def register() -> None:
    """Makes `attn_implementation=PACKED` known to transformers. Idempotent."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
