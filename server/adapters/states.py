"""TextStates: what a forward pass gives to the task heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from server.core import Pooling, Span


@dataclass
class TextStates:
    """The last hidden states of a batch of texts, without padding, whatever layout produced them."""

    tokens: Tensor  # [tokens, hidden], of all texts that have been run, also of those that `select` left out
    lengths: Sequence[int]  # tokens of each text, in order, the virtual ones of its adapter included
    virtual: Sequence[tuple[int, int]]
    """Of each text, the token that virtual tokens come before, and how many they are."""
    pooler: Callable[[Tensor], Tensor] | None
    """The backbone's own pooler, [texts, hidden] -> [texts, hidden], if its checkpoint has one."""
    spans: Sequence[Sequence[Span]] = ()
    """Of each text, the marked pieces, in its own tokens; needed only by heads that read them."""
    _selected: "tuple[TextStates, Sequence[int]] | None" = None
    """The states that these are some of, and which."""
    _pooled: dict[Pooling, Tensor] = field(default_factory=dict)
    _starts: list[int] | None = None

    def pooled(self, pooling: Pooling) -> Tensor:
        """One float32 vector per text, [texts, hidden]; computed once for all texts of the batch."""
        if pooling not in self._pooled:
            if self._selected is not None:
                whole, texts = self._selected
                self._pooled[pooling] = whole.pooled(pooling)[list(texts)]
            else:
                self._pooled[pooling] = self._pool(pooling).float()
        return self._pooled[pooling]

    def own(self, text: int) -> Tensor:
        """The states of a text's own tokens, without virtual ones, [tokens, hidden]."""
        if self._selected is not None:
            whole, texts = self._selected
            return whole.own(texts[text])
        if self._starts is None:
            self._starts = list(accumulate(self.lengths, initial=0))
        states = self.tokens[self._starts[text] : self._starts[text + 1]]
        before, count = self.virtual[text]
        return torch.cat([states[:before], states[before + count :]]) if count else states

    def select(self, texts: Sequence[int]) -> "TextStates":
        """Some of the texts, in that order. Nothing is copied, and vectors are still pooled once for all texts."""
        lengths, virtual = [self.lengths[text] for text in texts], [self.virtual[text] for text in texts]
        spans = [self.spans[text] for text in texts] if self.spans else ()
        return TextStates(self.tokens, lengths, virtual, self.pooler, spans, (self, texts))

    def _pool(self, pooling: Pooling) -> Tensor:
        lengths = torch.tensor(self.lengths).to(self.tokens.device, non_blocking=True)
        if pooling is Pooling.MEAN:
            owner = torch.repeat_interleave(lengths, output_size=self.tokens.shape[0])
            # float32, since a sum over hundreds of tokens loses what bfloat16 keeps of each
            sums = torch.zeros(len(self.lengths), self.tokens.shape[1], device=self.tokens.device)
            return sums.index_add(0, owner, self.tokens.float()) / lengths[:, None]
        if pooling is Pooling.LAST:
            return self.tokens[lengths.cumsum(0) - 1]
        first = self.tokens[lengths.cumsum(0) - lengths]
        if pooling is Pooling.POOLER:
            if self.pooler is None:
                raise ValueError("this backbone has no pooler")  # checked when the adapter was loaded
            return self.pooler(first)
        return first
