"""What a request takes is run before the server says that it is ready: nobody waits for what happens only once.

That is kernels that are compiled or loaded when they are first run, workspaces, and threads. On a CPU, in bfloat16,
oneDNN compiles a product for each shape that has not been before, a millisecond or more in which the batch waits; CUDA
loads its kernels one by one. So small batches run through the very path that requests take: the bare backbone, a head
of each task, each method that the backbone carries, and then the sizes that batches have, small ones first.

The backbone and joined adapters keep to few sizes (see adapters/joined.py), so all of those are had. Other methods
multiply as many rows as their texts have: each number of rows that has not been before still costs two products or so.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from server.adapters import METHODS
from server.adapters.joined import JOINED_COLUMNS, ONE_PRODUCT_COLUMNS, ONE_PRODUCT_ROWS, compiles, rounded_up, width
from server.backbone.backbone import Backbone
from server.core import BackboneSpec, Encoding, Priority, Terms
from server.engine.pipeline import Job, Pipeline
from server.engine.runner import Row
from server.engine.worker import Worker
from server.errors import AdapterdError, BackboneError, InvalidAdapter, Overloaded
from server.logs import get_logger
from server.tasks import TASKS
from server.tasks.adapter import Blueprint, TaskAdapter

log = get_logger("adapterd.warm-up")

TEXTS = ("a", "adapterd runs this before anybody asks")

LARGEST_TOKENS = 256
"""Of the largest batch that is run beforehand. Larger ones are rarer, and take longer than what they compile: all
sizes up to 512 tokens would cost every start one or two seconds more, and some 80 MB."""

STEPS = 8
"""Sizes of a batch in each power of two, as the backbone rounds them."""

RANK = 8
"""Of the LoRAs that are run in each size."""

WIDTHS = sorted({width(columns) for columns in range(RANK, ONE_PRODUCT_COLUMNS + 1, RANK)})
"""Columns of the products that such LoRAs are joined into, those beyond JOINED_COLUMNS only for more rows than
ONE_PRODUCT_ROWS."""

TERMS = Terms(Priority.LOW, strict=True)
"""Requests that come before the server is ready go first."""

PAUSE_SECONDS = 0.05
"""Until a full queue is asked again."""

LABELS = (("no", "yes"), ())
"""Of the adapters that are run: a task takes either some or none."""


class WarmUp:
    """Runs everything once, beside whatever requests come meanwhile."""

    def __init__(
        self,
        backbone: Backbone,
        pipeline: Pipeline,
        worker: Worker,
        executor: Executor,
        *,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`executor` makes adapters; `max_tokens`: of a batch."""
        self._backbone = backbone
        self._pipeline = pipeline
        self._worker = worker
        self._executor = executor
        self._max_tokens = max_tokens
        self._clock = clock

    @property
    def sizes(self) -> list[int]:
        """Tokens of the batches that are run: all that the backbone rounds to where products are compiled, else few."""
        steps = STEPS if compiles(torch.empty(0, device=self._backbone.device, dtype=self._backbone.dtype)) else 1
        largest = min(LARGEST_TOKENS, self._max_tokens)
        return sorted({rounded_up(tokens, steps) for tokens in range(1, largest + 1)})

    async def run(self, seconds: float) -> None:
        """Takes no longer than this, but for the bare backbone: without it there is nothing to serve.

        What fails is logged, since requests that take it will fail or be slower, and so is what there was no time for.
        Raises BackboneError where the bare backbone fails.
        """
        started = self._clock()
        await self._bare()
        left = [*self._steps()]
        total = 1 + len(left)
        limit = asyncio.timeout(max(0.0, seconds - (self._clock() - started)))
        try:
            async with limit:
                while left:
                    await _tried(*left[0])
                    del left[0]
        except TimeoutError:
            if not limit.expired():
                raise
            log.warning(
                "warm-up cut short: the first requests for the rest are slower", left=[name for name, _ in left]
            )
        log.info("warmed up", steps=total - len(left), seconds=round(self._clock() - started, 3))

    async def _bare(self) -> None:
        try:
            await self._answer([await self._make("head_only", "embedding")])
        except Exception as error:
            raise BackboneError(f"backbone {self._backbone.spec.name!r} cannot be run: {_reason(error)}") from error

    def _steps(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """What is run after that, and how to call it."""
        for task in TASKS:
            yield f"task {task}", partial(self._adapters, "head_only", task)
        for method in METHODS:
            yield f"method {method}", partial(self._adapters, method, "classification")
        for tokens in self.sizes:
            yield f"{tokens} tokens", partial(self._batches, tokens)

    async def _adapters(self, method: str, task: str) -> None:
        """One alone and, where they may share a forward, two at once; none where the backbone does not carry them."""
        try:
            one = await self._make(method, task)
        except InvalidAdapter:
            return
        await self._answer([one])
        if not one.weights.alone:
            await self._answer([one, replace(one)])

    async def _batches(self, tokens: int) -> None:
        """Batches of so many tokens, with the products that joined adapters have."""
        try:
            adapter = await self._make("lora", "classification", r=RANK, target_modules="all-linear")
        except InvalidAdapter:
            adapter = await self._make("head_only", "classification")
        for columns in WIDTHS:
            if columns > JOINED_COLUMNS and tokens <= ONE_PRODUCT_ROWS:
                break
            adapters = [replace(adapter) for _ in range(columns // RANK)]
            texts = self._texts(tokens, len(adapters))
            rows = [Row(text, own) for text, own in zip(texts, cycle(adapters), strict=False)]
            await _admitted(partial(self._run_rows, rows))

    async def _run_rows(self, rows: Sequence[Row]) -> None:
        await self._worker.submit(rows, terms=TERMS).answers()

    def _texts(self, tokens: int, at_least: int) -> list[Encoding]:
        """Texts of so many tokens together, all of about the same length."""
        [known] = self._backbone.tokenizer.encode([TEXTS[-1]], truncate=True)
        count = max(at_least, -(-tokens // self._backbone.spec.max_tokens))
        lengths = [tokens // count + (index < tokens % count) for index in range(count)]
        return [Encoding(tuple(islice(cycle(known.ids), length)), (0,) * length, truncated=False) for length in lengths]

    async def _answer(self, adapters: Sequence[TaskAdapter]) -> None:
        """What a request for these adapters runs."""
        task = adapters[0].task
        jobs = [Job(adapter, task.options()) for adapter in adapters]
        inputs = [task.sample(text) for text in TEXTS]
        await _admitted(partial(self._pipeline.answer, jobs, inputs, terms=TERMS))

    async def _make(self, method: str, task: str, **options: Any) -> TaskAdapter:
        """An adapter as it is before any training. Raises InvalidAdapter where the backbone does not carry it."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, partial(_fresh, self._backbone, method, task, options)
        )


async def _tried(name: str, step: Callable[[], Awaitable[None]]) -> None:
    try:
        await step()
    except Exception as error:
        log.error("warm-up failed: requests like this may fail, or be slower at first", step=name, error=_reason(error))


async def _admitted(run: Callable[[], Awaitable[Any]]) -> None:
    """Runs something, once the queue takes it: what clients have filled it with goes first."""
    while True:
        try:
            await run()
            return
        except Overloaded:
            await asyncio.sleep(PAUSE_SECONDS)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, AdapterdError) else repr(error)


def _fresh(backbone: Backbone, method: str, task: str, options: dict[str, Any]) -> TaskAdapter:
    spec = backbone.spec
    if not spec.listed and "target_modules" in METHODS[method].Config.model_fields:
        options = {"target_modules": "all-linear", **options}
    config = METHODS[method].complete(options, spec)
    labels = next(one for one in LABELS if _takes(task, one, spec))
    blueprint = Blueprint.check(method=method, config=config, task=task, head={}, labels=labels, spec=spec)
    return blueprint.bind(blueprint.init(backbone, torch.Generator().manual_seed(0)), backbone)


def _takes(task: str, labels: Sequence[str], spec: BackboneSpec) -> bool:
    try:
        TASKS[task].check(TASKS[task].Config(), labels, spec)
    except InvalidAdapter as error:
        return error.param != "labels"
    return True
