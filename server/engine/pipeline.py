"""Texts through an adapter: tokenized, queued, run, and awaited. What requests, proofs and comparisons share."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

from server.backbone.tokenizer import Tokenizer
from server.core import Encoding
from server.engine.runner import Row
from server.engine.worker import Worker
from server.errors import TooLarge
from server.tasks.adapter import TaskAdapter

MAX_SCORES = 100_000
"""Scores of one answer. Making them takes the device's thread microseconds each, in which nobody else is served: two
and a half million took 9 seconds."""


class Pipeline:
    """The way from texts to answers, for one event loop."""

    def __init__(self, tokenizer: Tokenizer, worker: Worker, executor: Executor) -> None:
        """`executor` tokenizes."""
        self._tokenizer = tokenizer
        self._worker = worker
        self._executor = executor

    async def encode(self, texts: Sequence[str], adapter: TaskAdapter, *, truncate: bool) -> list[Encoding]:
        """Tokens, with room for what the adapter adds to them. Raises TooLarge for a text that may not be cut."""
        reserved = adapter.weights.framing.positions
        encode = partial(self._tokenizer.encode, texts, truncate=truncate, reserved=reserved)
        return await asyncio.get_running_loop().run_in_executor(self._executor, encode)

    async def run(
        self, texts: Sequence[Encoding], adapter: TaskAdapter, *, top_k: int | None = None, raw: bool = False
    ) -> list[Any]:
        """An answer for each text: predictions, or the head's raw outputs.

        Raises Overloaded or ShuttingDown, and TooLarge for more scores than an answer holds.
        """
        scores = len(texts) * min(top_k or len(adapter.labels), len(adapter.labels))
        if scores > MAX_SCORES and not raw:
            raise TooLarge(
                f"{len(texts)} inputs and {len(adapter.labels)} labels make {scores} scores, at most {MAX_SCORES} fit "
                "an answer; ask for fewer labels with top_k, or send fewer inputs",
                param="top_k",
                code="too_many_scores",
            )
        rows = [Row(text, adapter, top_k, raw) for text in texts]
        return await asyncio.wrap_future(self._worker.submit(rows).future)
