"""Packed attention: one row of tokens holds many texts, and each text sees only itself.

transformers looks attention functions up by name (AttentionInterface); `PACKED` is ours. The texts of a batch reach it
as the keyword argument `packed`, which the model passes through.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "adapterd_packed"

WINDOW_TOKENS = 64
"""Short neighbours share one attention call under a block-diagonal mask, up to this many tokens together. A call
costs about 40 us whatever its size, masked-out work grows with the square of the window; 64 was the best of 32..256
on CPU."""


class PackedTexts:
    """The lengths of the texts in a packed row, cut into windows of one attention call each."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """`lengths`: tokens of each text, in order. Masks are made on `device`, without a synchronization."""
        self._device = device
        self._windows: list[list[int]] = []
        room = 0
        for length in lengths:
            if length > room:
                self._windows.append([])
                room = WINDOW_TOKENS
            self._windows[-1].append(length)
            room -= length
        self.sizes = [sum(window) for window in self._windows]
        self._masks: dict[tuple[bool, torch.dtype], list[Tensor | None]] = {}

    def masks(self, causal: bool, dtype: torch.dtype) -> list[Tensor | None]:
        """One additive mask [size, size] per window; None where a single text sees all of itself."""
        key = (causal, dtype)
        if key not in self._masks:
            self._masks[key] = [self._mask(window, causal, dtype) for window in self._windows]
        return self._masks[key]

    def _mask(self, window: list[int], causal: bool, dtype: torch.dtype) -> Tensor | None:
        if len(window) == 1 and not causal:
            return None
        size = sum(window)
        mask = torch.full((size, size), float("-inf"), dtype=dtype, device=self._device)
        start = 0
        for length in window:
            mask[start : start + length, start : start + length] = 0
            start += length
        if causal:
            mask.masked_fill_(torch.ones(size, size, dtype=torch.bool, device=self._device).triu(1), float("-inf"))
        return mask


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

    Signature as transformers calls it; keys and values may have fewer heads (grouped queries). Raises ValueError for a
    sliding window, which short texts would not show to be missing.
    """
    if sliding_window is not None:
        raise ValueError("packed attention has no sliding windows")
    masks = packed.masks(bool(getattr(module, "is_causal", False)), query.dtype)
    windows = zip(*(torch.split(t, packed.sizes, dim=2) for t in (query, key, value)), masks, strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
        for q, k, v, mask in windows
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def register() -> None:
    """Makes `attn_implementation=PACKED` known to transformers. Idempotent."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
