"""Inputs through adapters: tokenized, queued, run, and read. What requests, proofs and comparisons share."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor

from server.backbone.tokenizer import Tokenizer, is_short
from server.core import PLAIN, AdapterRef, Encoding, Long, Options, Prediction, Terms, TextInput, WindowPooling
from server.engine.runner import Row
from server.engine.worker import Worker
from server.errors import AdapterdError, InvalidRequest, TooLarge
from server.metrics import Metrics
from server.tasks.adapter import TaskAdapter
from server.tasks.base import Window
from server.tasks.pooled import PooledTask
from server.tracing import OFF, Tracing

T = TypeVar("T")

MAX_SCORES = 100_000
"""Scores of one answer, those of all adapters together. Making them takes the device's thread microseconds each, in
which nobody else is served: two and a half million took 9 seconds."""

COUNTED_CHARACTERS = 1 << 15
"""Characters of a request whose words are counted before its texts are tokenized, which takes a tenth of a
millisecond."""

MAX_OUTPUTS = 1 << 26
"""Numbers that the heads make for one request, 256 MiB: they are in memory together until they are read."""


@dataclass(frozen=True, slots=True)
class Job:
    """An adapter, and what is wanted of it."""

    adapter: TaskAdapter
    options: Options
    ref: AdapterRef | None = None
    """In whose name it runs; None: the server's own."""
    name: str | None = None
    """What errors call it, where there are others that they could be about."""

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Errors of a request that are raised meanwhile say that they are about this adapter."""
        try:
            yield
        except AdapterdError as error:
            if self.name is None:
                raise
            raise error.about(error.param or "adapter", f"adapter {self.name!r}: {error.message}") from error


@dataclass(frozen=True, slots=True)
class Cut:
    """How inputs are made to fit the backbone."""

    truncate: bool = True
    long: Long | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """What one adapter says to all inputs."""

    predictions: list[Prediction]
    windows: list[list[Encoding]]
    """Of each input."""
    tokens: int
    """In all of them."""


class Pipeline:
    """The way from texts to answers, for one event loop."""

    def __init__(
        self, tokenizer: Tokenizer, worker: Worker, executor: Executor, metrics: Metrics, tracing: Tracing = OFF
    ) -> None:
        """`executor` tokenizes what is not short, and reads what takes more than a glance."""
        self._tokenizer = tokenizer
        self._worker = worker
        self._executor = executor
        self._metrics = metrics
        self._tracing = tracing
        [self._special] = tokenizer.lengths([""], windowed=False)

    def check(
        self, refs: Sequence[AdapterRef | None], inputs: Sequence[TextInput], cut: Cut = Cut(), terms: Terms = PLAIN
    ) -> None:
        """Raises what `Worker.check` does for these inputs through adapters of these names, before anything has been
        done for them: their adapters need not be here, and nothing is tokenized. How many tokens that will come to is
        told by `at_least`, so that nearly all that will be refused is refused here."""
        self._worker.check(refs, len(refs) * self._at_least(inputs, cut), terms)

    def _at_least(self, inputs: Sequence[TextInput], cut: Cut) -> int:
        return at_least(inputs, self._special, None if cut.long else self._tokenizer.max_tokens)

    async def answer(
        self,
        jobs: Sequence[Job],
        inputs: Sequence[TextInput],
        cut: Cut = Cut(),
        terms: Terms = PLAIN,
        *,
        max_tokens: int | None = None,
    ) -> list[Answered]:
        """All inputs through all adapters, in one go.

        Raises InvalidRequest for an input that an adapter cannot answer, TooLarge for one that may not be cut, for more
        scores than an answer holds and for more than `max_tokens` in all windows for all adapters, and whatever
        `Worker.submit` does. Who can ask `check` first, should.
        """
        for job in jobs:
            with job.blamed():
                _check(job, inputs, cut)
        shared: dict[tuple[int, bool, bool], list[list[Encoding]]] = {}  # adapters that read alike share encodings
        encoded = []
        with self._expecting(jobs, inputs, cut, terms):
            for job in jobs:
                framing = (job.adapter.weights.framing.positions, _windowed(job, cut), job.adapter.task.aligned)
                if framing not in shared:
                    shared[framing] = await self._encode(inputs, *framing, truncate=cut.truncate, max_tokens=max_tokens)
                encoded.append(shared[framing])
        sizes = [sum(len(one) for own in windows for one in own) for windows in encoded]
        tokens = sum(sizes)
        if max_tokens is not None and tokens > max_tokens:
            raise TooLarge(
                f"the inputs come to {tokens} tokens in all windows for all adapters, at most {max_tokens} are run for "
                "one request",
                param="inputs",
                code="too_many_tokens",
            )
        _check_numbers(jobs, encoded)
        rows = [_rows(job, windows) for job, windows in zip(jobs, encoded, strict=True)]
        owners = [job for job, own in zip(jobs, rows, strict=True) for _ in own]
        ticket = self._worker.submit(list(chain.from_iterable(rows)), [job.ref for job in owners], terms)
        try:
            found = await ticket.answers()
        except AdapterdError:
            failed = ticket.failed
            del ticket  # it holds the error, whose traceback holds all that is here
            if failed is None:
                raise
            with owners[failed].blamed():
                raise
        answers = iter(found)
        pooling = cut.long.pooling if cut.long else WindowPooling.MEAN
        return [
            Answered(await self._read(job, inputs, windows, [next(answers) for _ in own], pooling), windows, size)
            for job, windows, own, size in zip(jobs, encoded, rows, sizes, strict=True)
        ]

    def _expecting(
        self, jobs: Sequence[Job], inputs: Sequence[TextInput], cut: Cut, terms: Terms
    ) -> AbstractContextManager[None]:
        if _is_short(inputs):  # tokenized at once: nobody can ask meanwhile
            return nullcontext()
        return self._worker.expecting(jobs[0].ref, len(jobs) * self._at_least(inputs, cut), terms)

    async def outputs(self, texts: Sequence[str], adapter: TaskAdapter) -> list[Tensor]:
        """Raw outputs for some texts, which are cut where they are too long. `texts` are what the task makes of it.

        Raises what goes wrong with any of them, be it only where they run together.
        """
        inputs = [adapter.task.sample(text) for text in texts]
        windows = await self._encode(inputs, adapter.weights.framing.positions, False, False, truncate=True)
        ticket = self._worker.submit([Row(text, adapter) for [text] in windows], terms=Terms(strict=True))
        return await ticket.answers()

    async def _encode(
        self,
        inputs: Sequence[TextInput],
        reserved: int,
        windowed: bool,
        aligned: bool,
        *,
        truncate: bool,
        max_tokens: int | None = None,
    ) -> list[list[Encoding]]:
        def encode() -> list[list[Encoding]]:
            if windowed:
                return self._tokenizer.windows(inputs, reserved=reserved, max_tokens=max_tokens)
            encodings = self._tokenizer.encode(
                inputs, truncate=truncate, reserved=reserved, aligned=aligned, max_tokens=max_tokens
            )
            return [[encoding] for encoding in encodings]

        texts = {"adapterd.texts": len(inputs)}
        with self._metrics.tokenize_seconds.time(), self._tracing.span("tokenize", texts):
            if _is_short(inputs):
                return encode()
            return await self._compute(encode)

    async def _read(
        self,
        job: Job,
        inputs: Sequence[TextInput],
        windows: Sequence[Sequence[Encoding]],
        answers: Sequence[Any],
        pooling: WindowPooling,
    ) -> list[Prediction]:
        if _direct(job, windows):
            return list(answers)

        def read() -> list[Prediction]:
            outputs = iter(answers)
            return [
                job.adapter.read(text, [Window(one, next(outputs)) for one in own], job.options, pooling)
                for text, own in zip(inputs, windows, strict=True)
            ]

        return await self._compute(read)

    async def _compute(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)


def at_least(inputs: Sequence[TextInput], special: int, longest: int | None) -> int:
    """How many tokens some inputs come to for one adapter, or fewer: one for each word, with `special` tokens for each
    input, and no more than `longest` where inputs are cut to that.

    Words are what spaces part. Words of several tokens, writing without spaces, windows that overlap and whatever comes
    after the first COUNTED_CHARACTERS make it more. It is less only for words of which the tokenizer keeps nothing
    (accents, control characters and marks that do not show, alone), for words that only control characters part, and
    for texts that are cut for an adapter that takes positions of its own, by as many.
    """
    left, tokens = COUNTED_CHARACTERS, 0
    for one in inputs:
        text = one.text[:left] if one.pair is None else f"{one.text[:left]} {one.pair[:left]}"[:left]
        left -= len(text)
        own = special + len(text.split())
        tokens += own if longest is None else min(own, longest)
    return tokens


def _is_short(inputs: Sequence[TextInput]) -> bool:
    return is_short(part for one in inputs for part in (one.text, one.pair) if part is not None)


def _check(job: Job, inputs: Sequence[TextInput], cut: Cut) -> None:
    task = job.adapter.task
    if cut.long is not None and not task.windowable:
        raise InvalidRequest(f"long: an adapter for {task.name} needs its texts in one piece", param="long")
    for index, text in enumerate(inputs):
        try:
            task.check_input(text)
        except InvalidRequest as error:
            raise InvalidRequest(f"inputs.{index}: {error.message}", param=f"inputs.{index}.{error.param}") from error


def _check_numbers(jobs: Sequence[Job], encoded: Sequence[Sequence[Sequence[Encoding]]]) -> None:
    """Raises TooLarge for more outputs or scores than one request may have, over all inputs and adapters."""
    numbers = [
        job.adapter.task.numbers(sum(map(len, own)), job.adapter.labels, job.options)
        for job, windows in zip(jobs, encoded, strict=True)
        for own in windows
    ]
    scores, outputs = sum(one.scores for one in numbers), sum(one.outputs for one in numbers)
    if scores > MAX_SCORES:
        raise TooLarge(
            f"the labels of all inputs for all adapters make {scores} scores, at most {MAX_SCORES} fit an answer; ask "
            "for fewer labels with top_k, or send fewer inputs",
            param="top_k",
            code="too_many_scores",
        )
    if outputs > MAX_OUTPUTS:
        raise TooLarge(
            f"the labels of all tokens for all adapters make {outputs} numbers, at most {MAX_OUTPUTS} are computed for "
            "one request; send fewer inputs",
            param="inputs",
            code="too_many_outputs",
        )


def _windowed(job: Job, cut: Cut) -> bool:
    return cut.long is not None or (job.adapter.task.windowed and cut.truncate)


def _direct(job: Job, windows: Sequence[Sequence[Encoding]]) -> bool:
    """Whether each input is one row, whose output alone makes the answer: the device's thread reads it at once."""
    return isinstance(job.adapter.task, PooledTask) and all(len(own) == 1 for own in windows)


def _rows(job: Job, windows: Sequence[Sequence[Encoding]]) -> list[Row]:
    options = job.options if _direct(job, windows) else None
    return [Row(text, job.adapter, options) for own in windows for text in own]
