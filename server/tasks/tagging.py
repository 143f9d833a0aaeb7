"""Tagging: a label for each token of a text, and the entities that they make."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from server.adapters.states import TextStates
from server.core import (
    Aggregation,
    BackboneSpec,
    Encoding,
    Entity,
    Route,
    Span,
    TagOptions,
    TextInput,
    WindowPooling,
)
from server.errors import InvalidRequest
from server.tasks import head as heads
from server.tasks import spans
from server.tasks.base import LayeredTask, Numbers, Window, aligned, need_labels, token_layers
from server.tasks.examples import Example, Label
from server.tasks.head import Layers, LayersConfig
from server.tasks.metrics import Report

Scores = NDArray[np.float32]

IGNORED = -100
"""The target of a token that does not count, as torch has it."""


class TaggedTokens(Example):
    """The words of a text, and for each a label: `B-...`, `I-...` or `O`."""

    tokens: tuple[str, ...] = Field(min_length=1)
    tags: tuple[Label, ...]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.tokens) != len(self.tags):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.tags)} tags")
        if not any(word.strip() for word in self.tokens):
            raise ValueError("the tokens are blank")  # a server would refuse them
        return self

    def inputs(self) -> tuple[TextInput, ...]:
        """The words with a space between any two."""
        return (TextInput(" ".join(self.tokens)),)

    def names(self) -> Collection[str]:
        """The tags."""
        return self.tags

    def places(self) -> list[Span]:
        """The characters of each word in the text."""
        places, start = [], 0
        for word in self.tokens:
            places.append((start, start + len(word)))
            start += len(word) + 1
        return places


class _Tokens(NamedTuple):
    """The tokens of a text in order, each from the window with the most context."""

    logits: Tensor  # [tokens, labels]
    places: list[Span]
    continues: list[bool]


class _Piece(NamedTuple):
    """A token, or a word, with the label that it was given."""

    label: str
    score: float
    start: int
    end: int


class Tagging(LayeredTask[LayersConfig, Layers, TagOptions, TaggedTokens]):
    """One label per token."""

    name = "tagging"
    route = Route.TAG
    Config = LayersConfig
    options = TagOptions
    example = TaggedTokens
    prediction = list[Entity]
    aligned = True
    windowed = True  # an entity that is missing in silence is worse than a slow answer
    measured = TagOptions(Aggregation.NONE)
    decisive = {"f1": 1}

    def check(self, config: LayersConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least two labels."""
        need_labels(self, labels, 2)

    def bind(self, config: LayersConfig, tensors: Mapping[str, Tensor]) -> Layers:
        """The tensors as float32."""
        return heads.bind(config, tensors)

    def apply(self, head: Layers, states: TextStates, start: int, end: int) -> list[Tensor]:
        """Logits [tokens, labels] of each text, of its own tokens alone."""
        return token_layers(head, states, start, end)

    def check_input(self, text: TextInput) -> None:
        """One text alone."""
        super().check_input(text)
        if text.pair:
            raise InvalidRequest(f"an adapter for {self.name} reads one text, not a pair", param="text_pair")

    def numbers(self, tokens: int, labels: Sequence[str], options: TagOptions) -> Numbers:
        """A logit of each label for each token. The answer has no more entities than there are tokens."""
        return Numbers(tokens * len(labels), 0)

    def read(
        self,
        text: TextInput,
        windows: Sequence[Window],
        config: LayersConfig,
        labels: Sequence[str],
        options: TagOptions,
        pooling: WindowPooling,
    ) -> list[Entity]:
        """Entities as transformers' TokenClassificationPipeline finds them, in the text's order, with its scores.

        With aggregation `none`: each token, whatever its label. Else what is labelled `O` is left out. Of windows that
        overlap, each token is read in the one that shows most of the text on both sides of it.
        """
        tokens = _tokens(windows)
        if not tokens.places:
            return []
        rows, places = tokens.logits.softmax(-1).numpy(), tokens.places
        if options.aggregation not in (Aggregation.NONE, Aggregation.SIMPLE):
            starts = [index for index, continues in enumerate(tokens.continues) if index == 0 or not continues]
            rows = _by_word(rows, np.array(starts), options.aggregation)
            places = [(places[first][0], places[end - 1][1]) for first, end in pairwise([*starts, len(places)])]
        best = rows.argmax(-1)
        scores = rows[np.arange(len(rows)), best]
        pieces = [
            _Piece(labels[label], score, *place)
            for label, score, place in zip(best.tolist(), scores.tolist(), places, strict=True)
        ]
        if options.aggregation is not Aggregation.NONE:
            pieces = [piece for piece in _joined(pieces) if piece.label != spans.OUTSIDE]
        return [Entity(*piece, text.text[piece.start : piece.end]) for piece in pieces]

    def agrees(self, one: Sequence[Entity], other: Sequence[Entity]) -> bool:
        """Whether the entities are the same."""
        return [(e.label, e.start, e.end) for e in one] == [(e.label, e.start, e.end) for e in other]

    def targets(self, examples: Sequence[TaggedTokens], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        """Label indices [all tokens of all texts]: a word's tag for its first token, -100 for all other tokens."""
        index = {label: i for i, label in enumerate(labels)}
        targets: list[int] = []
        for example, text in zip(examples, texts, strict=True):
            row = [IGNORED] * len(text)
            alignment = aligned(text)
            tokens = alignment.places(0)
            firsts = spans.first_overlaps(example.places(), [alignment.offsets[token] for token in tokens])
            for tag, first in zip(example.tags, firsts, strict=True):
                if first is not None:  # not cut off
                    row[tokens[first]] = index[tag]
            targets += row
        return torch.tensor(targets)

    def loss(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Mean cross entropy of the tokens that count, 0 if none does; `targets` [tokens] are label indices or -100."""
        total = F.cross_entropy(torch.cat(list(outputs)), targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def measure(self, examples: Sequence[TaggedTokens], predictions: Sequence[Sequence[Entity]]) -> Report:
        """`precision`, `recall` and `f1` of entities; a word's tag is that of its first token, `O` if it has none."""
        tags = [_tags(example, tokens) for example, tokens in zip(examples, predictions, strict=True)]
        return spans.report([example.tags for example in examples], tags)


def _tokens(windows: Sequence[Window]) -> _Tokens:
    """From windows that overlap. A token's context are the tokens on the side of it that has fewer."""
    logits, offsets, continues, numbers, contexts = [], [], [], [], []
    for window in windows:
        alignment = aligned(window.encoding)
        places = alignment.places(0)
        ranks = np.arange(len(places))
        logits.append(window.output[places])
        offsets += [alignment.offsets[place] for place in places]
        continues += [alignment.continues[place] for place in places]
        numbers.append(alignment.skipped + ranks)
        contexts.append(np.minimum(ranks, ranks[::-1]))
    number = np.concatenate(numbers)
    # by number; of one number, the most context first, and else the first window
    order = np.lexsort((-np.concatenate(contexts), number))
    _, firsts = np.unique(number[order], return_index=True)
    chosen = order[firsts]
    indices = chosen.tolist()
    return _Tokens(
        torch.cat(logits)[torch.from_numpy(chosen)],
        [offsets[index] for index in indices],
        [continues[index] for index in indices],
    )


def _by_word(scores: Scores, starts: NDArray[np.int64], aggregation: Aggregation) -> Scores:
    """Scores [words, labels] from those of tokens [tokens, labels]; `starts` are the words' first tokens."""
    lengths = np.diff(starts, append=len(scores))
    rows: Scores
    if aggregation is Aggregation.AVERAGE:
        rows = np.divide(np.add.reduceat(scores, starts), lengths[:, None], dtype=np.float32)
    elif aggregation is Aggregation.FIRST:
        rows = scores[starts]
    else:
        # each word's surest token comes first, the first one of several
        order = np.lexsort((-scores.max(-1), np.repeat(np.arange(len(starts)), lengths)))
        rows = scores[order[starts]]
    return rows


def _joined(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Entities from neighbouring pieces of one type; a piece labelled `B-...` starts one."""
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups and not piece.label.startswith("B-") and _type(piece.label) == _type(groups[-1][-1].label):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    # the name is what follows the first dash, also where what precedes it is no prefix
    return [
        _Piece(group[0].label.split("-", 1)[-1], fmean(piece.score for piece in group), group[0].start, group[-1].end)
        for group in groups
    ]


def _type(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _tags(example: TaggedTokens, tokens: Sequence[Entity]) -> list[str]:
    """The label of each word's first token."""
    found = spans.first_overlaps(example.places(), [(token.start, token.end) for token in tokens])
    return [spans.OUTSIDE if index is None else tokens[index].label for index in found]
