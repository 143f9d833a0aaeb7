"""Extractive question answering: which piece of a context answers a question."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from server.adapters.states import TextStates
from server.core import (
    Alignment,
    AnswerOptions,
    AnswerSpan,
    BackboneSpec,
    Encoding,
    Route,
    Span,
    TextInput,
    WindowPooling,
)
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks import head as heads
from server.tasks import metrics
from server.tasks.base import LayeredTask, Numbers, Window, aligned, token_layers
from server.tasks.examples import Example, Text
from server.tasks.head import Layers, LayersConfig
from server.tasks.metrics import Report

CONTEXT = 1
"""Which part of an input the answer is looked for in."""


class Answers(BaseModel):
    """The right answers as SQuAD writes them; none at all where the context has none."""

    model_config = ConfigDict(frozen=True)

    text: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    answer_start: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """First characters."""


class AskedText(Example):
    """A question, a context, and the answers in it."""

    question: Text
    context: Text
    answers: Answers

    @model_validator(mode="after")
    def _found(self) -> Self:
        texts, starts = self.answers.text, self.answers.answer_start
        if len(texts) != len(starts):
            raise ValueError(f"answers: {len(texts)} text and {len(starts)} answer_start")
        for text, start in zip(texts, starts, strict=True):
            if self.context[start : start + len(text)] != text:
                raise ValueError(f"answers: {text!r} is not at character {start} of the context")
        return self

    def inputs(self) -> tuple[TextInput, ...]:
        """The question to the context."""
        return (TextInput(self.question, self.context),)


class _Candidate(NamedTuple):
    """A piece of a window, first and last token, and how likely it is."""

    score: float
    first: int
    last: int


class QuestionAnswering(LayeredTask[LayersConfig, Layers, AnswerOptions, AskedText]):
    """Two outputs per token: how likely an answer starts, and ends, with it.

    Training sees what fits the backbone of each context; an answer in what is cut off counts as none.
    """

    name = "question_answering"
    route = Route.ANSWER
    Config = LayersConfig
    options = AnswerOptions
    example = AskedText
    prediction = list[AnswerSpan]
    aligned = True
    windowed = True  # the answer may be anywhere
    measured = AnswerOptions(no_answer=True)
    decisive = {"exact": 1, "f1": 1}

    def check(self, config: LayersConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """No labels."""
        if labels:
            raise InvalidAdapter(f"{self.name} has no labels", param="labels", code="invalid_labels")

    def outputs(self, labels: Sequence[str]) -> int:
        """Start and end."""
        return 2

    def bind(self, config: LayersConfig, tensors: Mapping[str, Tensor]) -> Layers:
        """The tensors as float32."""
        return heads.bind(config, tensors)

    def apply(self, head: Layers, states: TextStates, start: int, end: int) -> list[Tensor]:
        """Logits [tokens, 2] of each text, of its own tokens alone."""
        return token_layers(head, states, start, end)

    def check_input(self, text: TextInput) -> None:
        """A question and a context."""
        super().check_input(text)
        if text.pair is None or not text.pair.strip():
            raise InvalidRequest(
                f"an adapter for {self.name} needs a context, and one that is not blank", param="context"
            )

    def sample(self, text: str) -> TextInput:
        """The text asked about itself."""
        return TextInput(text, text)

    def numbers(self, tokens: int, labels: Sequence[str], options: AnswerOptions) -> Numbers:
        """Two logits of each token, and the answers that are wanted."""
        return Numbers(2 * tokens, options.top_k)

    def read(
        self,
        text: TextInput,
        windows: Sequence[Window],
        config: LayersConfig,
        labels: Sequence[str],
        options: AnswerOptions,
        pooling: WindowPooling,
    ) -> list[AnswerSpan]:
        """The best answers, best first, as the QuestionAnsweringPipeline of transformers 4 finds them.

        How likely no answer is, the CLS token says; it is 0 where the tokenizer has no such token. Answers are whole
        words. The same words, in whatever place, window or case, are one answer: it has the first place, and the sum of
        the scores. Fewer than `top_k` where the context is that short.
        """
        context = text.pair or ""
        wanted = 2 * options.top_k + 10  # widened to words, some will be the same
        found: dict[str, AnswerSpan] = {}
        null = float("inf")
        for window in windows:
            alignment = aligned(window.encoding)
            words = _words(alignment)
            candidates, none = _candidates(window.output, alignment, wanted, options.max_answer_tokens)
            null = min(null, none)
            for candidate in candidates:
                start, end = words[candidate.first][0], words[candidate.last][1]
                answer = context[start:end]
                same = found.setdefault(answer.lower(), AnswerSpan(answer, 0.0, start, end))
                found[answer.lower()] = replace(same, score=same.score + candidate.score)
        answers = list(found.values())
        if options.no_answer:
            answers.append(AnswerSpan("", null, 0, 0))
        return sorted(answers, key=lambda answer: answer.score, reverse=True)[: options.top_k]

    def agrees(self, one: Sequence[AnswerSpan], other: Sequence[AnswerSpan]) -> bool:
        """Whether the best answers are the same one."""
        return [(a.start, a.end) for a in one[:1]] == [(a.start, a.end) for a in other[:1]]

    def labels(self, examples: Sequence[AskedText]) -> tuple[str, ...]:
        """None."""
        return ()

    def targets(self, examples: Sequence[AskedText], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        """First and last token of each first answer [texts, 2]. Where it is not all there, the CLS token twice; the
        first token where the tokenizer has none, as in transformers' run_qa."""
        return torch.tensor([_target(row.answers, aligned(text)) for row, text in zip(examples, texts, strict=True)])

    def loss(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Cross entropy over each text's tokens, mean of start and end."""
        # tokens that a shorter text does not have get no share of the softmax
        return F.cross_entropy(pad_sequence(list(outputs), batch_first=True, padding_value=-torch.inf), targets)

    def measure(self, examples: Sequence[AskedText], predictions: Sequence[Sequence[AnswerSpan]]) -> Report:
        """`exact` and `f1` by SQuAD's rules. What is not answered counts as no answer."""
        answers = [prediction[0].text if prediction else "" for prediction in predictions]
        return metrics.answers([example.answers.text for example in examples], answers)


def _candidates(logits: Tensor, alignment: Alignment, count: int, longest: int) -> tuple[list[_Candidate], float]:
    """The best pieces of at most `longest` tokens of a window, from its logits [tokens, 2]; and how likely none is.

    Only the context and the CLS token share the probabilities.
    """
    tokens = alignment.places(CONTEXT)
    cls = [] if alignment.cls is None else [alignment.cls]
    probabilities = logits[[*cls, *tokens]].softmax(0)
    none = float(probabilities[0].prod()) if cls else 0.0
    length = len(tokens)
    span = min(longest, length)
    if not span:
        return [], none
    start, end = probabilities[len(cls) :].unbind(1)
    # [first, last - first]: of all pairs, those that are close enough
    scores = start[:, None] * F.pad(end, (0, span - 1)).unfold(0, span, 1)
    scores[torch.arange(length)[:, None] + torch.arange(span) >= length] = -1.0  # would end after the context
    best = scores.flatten().topk(min(count, length * span - span * (span - 1) // 2))
    return [
        _Candidate(score, tokens[index // span], tokens[index // span + index % span])
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ], none


def _words(alignment: Alignment) -> dict[int, Span]:
    """The characters of the word, as far as the window has it, that each token of the context is in."""
    tokens = alignment.places(CONTEXT)
    words: dict[int | None, Span] = {}
    for token in tokens:
        start, end = alignment.offsets[token]
        first, last = words.get(alignment.words[token], (start, end))
        words[alignment.words[token]] = min(first, start), max(last, end)
    # a token of no word is by itself
    return {
        token: alignment.offsets[token] if alignment.words[token] is None else words[alignment.words[token]]
        for token in tokens
    }


def _target(answers: Answers, alignment: Alignment) -> Span:
    """transformers' run_qa: the last token that starts no later than the answer, the first that ends no earlier."""
    tokens = alignment.places(CONTEXT)
    none = alignment.cls or 0
    if not answers.text:
        return none, none
    start, end = answers.answer_start[0], answers.answer_start[0] + len(answers.text[0])
    firsts = [token for token in tokens if alignment.offsets[token][0] <= start]
    lasts = [token for token in tokens if alignment.offsets[token][1] >= end]
    return (firsts[-1], lasts[0]) if firsts and lasts else (none, none)
