"""Engine: the facade of everything behind HTTP."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.backbone.backbone import Backbone
from server.core import AdapterRef, BackboneSpec, Classification, ClassifyRequest, Encoding
from server.engine import loading
from server.engine.catalog import Catalog
from server.engine.residency import Residency
from server.engine.runner import Row, Runner
from server.engine.scheduler import Scheduler
from server.engine.worker import QueuedRow, Worker
from server.errors import CorruptVersion, InvalidAdapter, NotFiniteOutput, TooLarge, UnservableAdapter, WrongTask
from server.logs import get_logger
from server.metrics import Metrics
from server.settings import Settings
from server.store.artifact import Artifact, Manifest
from server.store.formats import read_checkpoint
from server.store.formats.files import gather
from server.store.store import AdapterStore, Release, check_name
from server.tasks.adapter import TaskAdapter

log = get_logger("adapterd.engine")

T = TypeVar("T")

MAX_SCORES = 100_000
"""Scores of one answer. Making them takes the device's thread microseconds each, in which nobody else is served: two
and a half million took 9 seconds."""

STORE_THREADS = 8
"""Store calls mostly wait, so there are more of them than cores."""


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of an upload."""

    release: Release
    version: str
    manifest: Manifest
    created: bool
    """False where this version was serving already, so that nothing had to change."""


@dataclass(frozen=True, slots=True)
class Described:
    """An adapter that serves."""

    name: str
    release: Release
    version: str
    resident: bool


class Engine:
    """Answers requests over one backbone and one store. Lives on one event loop, between `start` and `stop`."""

    def __init__(self, backbone: Backbone, store: AdapterStore, settings: Settings, metrics: Metrics) -> None:
        """Takes the backbone over: nobody else may run it."""
        self._backbone = backbone
        self._store = store
        self._metrics = metrics
        self._max_upload_bytes = settings.max_upload_bytes
        self.upload_turn = asyncio.Lock()
        """Uploads come one after the other: unpacked, each may take hundreds of megabytes and a store thread."""
        # Pools of their own, so that a store that hangs holds up neither tokenization nor the event loop's own calls.
        self._store_pool = ThreadPoolExecutor(STORE_THREADS, "adapterd-store")
        self._tokenizer_pool = ThreadPoolExecutor(settings.tokenizer_threads, "adapterd-tokenizer")
        self._catalog = Catalog(store, self._store_pool, poll_seconds=settings.store_poll_seconds, clock=time.monotonic)
        self._residency = Residency(
            self._load, self._store_pool, max_bytes=settings.adapter_memory_bytes, metrics=metrics
        )
        scheduler = Scheduler[QueuedRow](
            max_batch_tokens=settings.max_batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
            clock=time.monotonic,
        )
        self._worker = Worker(Runner(backbone), scheduler, metrics)

    @property
    def spec(self) -> BackboneSpec:
        """What the backbone is."""
        return self._backbone.spec

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self._backbone.device)

    @property
    def dtype(self) -> str:
        """In which number format."""
        return str(self._backbone.dtype).removeprefix("torch.")

    @property
    def layout(self) -> str:
        """How its batches lie in memory."""
        return "packed" if self._backbone.packed else "padded"

    @property
    def ready(self) -> bool:
        """Whether requests can be answered. The store is not asked: adapters in memory outlive it."""
        return self._worker.alive

    def start(self) -> None:
        """Starts the device's thread."""
        self._worker.start()

    def stop(self) -> None:
        """Ends every request that still waits, and all threads."""
        self._worker.stop()
        for pool in (self._store_pool, self._tokenizer_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    async def classify(self, request: ClassifyRequest) -> Classification:
        """One prediction per input, from the version that serves when the request arrives."""
        release, version = await self._catalog.serving(request.adapter)
        adapter = await self._residency.get(request.adapter, version)
        if not adapter.task.classifies:
            raise WrongTask(
                f"adapter {request.adapter!r} does {adapter.task.name}, which /classify does not answer",
                param="adapter",
            )
        scores = len(request.inputs) * min(request.top_k or len(adapter.labels), len(adapter.labels))
        if scores > MAX_SCORES:
            raise TooLarge(
                f"{len(request.inputs)} inputs and {len(adapter.labels)} labels make {scores} scores, at most "
                f"{MAX_SCORES} fit an answer; ask for fewer labels with top_k, or send fewer inputs",
                param="top_k",
                code="too_many_scores",
            )
        texts = await self._tokenize(request.inputs, adapter, truncate=request.truncate)
        predictions = await self._run([Row(text, adapter, request.top_k) for text in texts])
        tokens = sum(map(len, texts))
        self._metrics.texts.labels(request.adapter).inc(len(texts))
        self._metrics.tokens.labels(request.adapter).inc(tokens)
        return Classification(
            ref=AdapterRef(request.adapter, version, release.number),
            backbone=self.spec.name,
            predictions=predictions,
            tokens=tokens,
            truncated=[index for index, text in enumerate(texts) if text.truncated],
        )

    async def publish(
        self, name: str, uploads: Sequence[tuple[str, bytes]], labels: Sequence[str] | None, *, by: str, note: str
    ) -> Published:
        """Checks a checkpoint, proves that it runs, stores it and makes it serve.

        `uploads` are (file name, content) pairs, loose files or archives. Raises InvalidAdapter naming what is wrong,
        and then nothing has changed.
        """
        check_name(name)
        files = await self._in_store_pool(partial(gather, uploads, self._max_upload_bytes))
        artifact = await self._in_store_pool(partial(read_checkpoint, files, labels, self._backbone))
        adapter = await self._in_store_pool(partial(loading.build, artifact, self._backbone))
        await self._prove(artifact, adapter)
        version = artifact.version
        # Also where it serves already: the same bytes do no harm, and mend a version that was damaged.
        await self._in_store_pool(partial(self._store.put_version, name, artifact))
        current = await self._in_store_pool(partial(self._store.current, name))
        if current is not None and current.version == version:
            self._catalog.note(name, current)
            return Published(current, version, artifact.manifest, created=False)
        release = await self._release(name, version, by=by, note=note, kind="publish")
        self._residency.put(version, adapter)
        return Published(release, version, artifact.manifest, created=True)

    async def delete(self, name: str, *, by: str, note: str) -> Release:
        """A release without traffic: the name answers 404 from here on, its versions and history stay."""
        await self._catalog.serving(name)
        return await self._release(name, None, by=by, note=note, kind="delete")

    async def describe(self, name: str) -> tuple[Described, Manifest]:
        """An adapter that serves, and its manifest."""
        release, version = await self._catalog.serving(name)
        artifact = await self._in_store_pool(partial(self._store.get_version, name, version))
        return Described(name, release, version, version in self._residency), artifact.manifest

    async def page(self, *, after: str = "", limit: int) -> tuple[list[Described], str | None]:
        """Adapters that serve, by name, and the name to go on after, if there are more."""
        names = [name for name in await self._catalog.names() if name > after]
        described: list[Described] = []
        # One more than fits tells whether there is another page; names of deleted adapters are passed over.
        while names and len(described) <= limit:
            missing = limit + 1 - len(described)
            some, names = names[:missing], names[missing:]
            described += [one for one in await asyncio.gather(*map(self._described, some)) if one is not None]
        return described[:limit], described[limit - 1].name if len(described) > limit else None

    async def _described(self, name: str) -> Described | None:
        try:
            release = await self._in_store_pool(partial(self._store.current, name))
        except CorruptVersion as error:  # one damaged adapter must not hide the others
            log.error("left out of the list", adapter=name, error=error.message)
            return None
        if release is None or release.version is None:
            return None
        return Described(name, release, release.version, release.version in self._residency)

    async def _release(self, name: str, version: str | None, *, by: str, note: str, kind: str) -> Release:
        release = await self._in_store_pool(partial(self._store.release, name, version, by=by, note=note))
        self._catalog.note(name, release)
        self._metrics.releases.labels(kind).inc()
        log.info("released", adapter=name, release=release.number, version=version, kind=kind)
        return release

    async def _prove(self, artifact: Artifact, adapter: TaskAdapter) -> None:
        """Runs the golden sample, or at least a smoke test, through the very path that requests take."""
        golden = artifact.manifest.golden
        texts = await self._tokenize(golden.texts if golden else loading.SMOKE_TEXTS, adapter, truncate=True)
        try:
            outputs = await self._run([Row(text, adapter, raw=True) for text in texts])
        except NotFiniteOutput as error:
            raise InvalidAdapter(
                "the adapter's weights are too large: its outputs are not finite", param="files", code="not_finite"
            ) from error
        if golden:
            loading.check_golden(golden, outputs, self.dtype)

    async def _run(self, rows: list[Row]) -> list[Any]:
        return await asyncio.wrap_future(self._worker.submit(rows).future)

    async def _tokenize(self, texts: Sequence[str], adapter: TaskAdapter, *, truncate: bool) -> list[Encoding]:
        reserved = adapter.weights.framing.positions
        encode = partial(self._backbone.tokenizer.encode, texts, truncate=truncate, reserved=reserved)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_pool, encode)

    async def _in_store_pool(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._store_pool, function)

    def _load(self, name: str, version: str) -> TaskAdapter:
        try:
            return loading.build(self._store.get_version(name, version), self._backbone)
        except InvalidAdapter as error:  # it fitted the backbone of the server that accepted it
            raise UnservableAdapter(f"adapter {name!r} cannot be served here: {error.message}") from error
