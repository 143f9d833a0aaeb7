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
from server.tasks.adapter import TaskAdapter


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
        """An answer for each text: predictions, or the head's raw outputs. Raises Overloaded or ShuttingDown."""
        rows = [Row(text, adapter, top_k, raw) for text in texts]
        return await asyncio.wrap_future(self._worker.submit(rows).future)
