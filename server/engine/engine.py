"""Engine: the facade of everything behind HTTP."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypedDict

from server import processors
from server.backbone.backbone import Backbone
from server.backbone.tokenizer import MAX_WINDOWS
from server.core import (
    AdapterRef,
    BackboneSpec,
    EmbedOptions,
    Encoding,
    Pooling,
    Route,
    Span,
    TaskAnswer,
    TaskRequest,
    Terms,
)
from server.engine.access import EVERYTHING, Access
from server.engine.bursts import NAP_SECONDS, Bursts
from server.engine.catalog import Catalog
from server.engine.loading import Checked, Checker, Loader
from server.engine.memory import Memory
from server.engine.pins import Pins
from server.engine.pipeline import Answered as PipelineAnswer
from server.engine.pipeline import Cut, Job, Pipeline
from server.engine.proof import Prover
from server.engine.publishing import Published, Publisher, Upload
from server.engine.quarantine import Quarantine
from server.engine.recent import RanBatch
from server.engine.residency import Residency
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.shadows import Answered, Shadows
from server.engine.warmup import WarmUp
from server.engine.worker import QueuedRow, Streams, Worker
from server.errors import (
    AdapterdError,
    AdapterQuarantined,
    CorruptVersion,
    DeadlineExceeded,
    DeviceStopped,
    InvalidRequest,
    OverBudget,
    Overloaded,
    ShuttingDown,
    StoreUnavailable,
    UnservableAdapter,
    WarmingUp,
    WrongTask,
)
from server.logs import get_logger
from server.metrics import Loaded, Metrics, Snapshot
from server.settings import Settings
from server.store.artifact import Manifest
from server.store.gc import Removed, collect
from server.store.names import check_name, check_version
from server.store.releases import Plan, Release, choose
from server.store.report import Report
from server.store.store import AdapterStore, StoredVersion
from server.tasks import TASKS
from server.tasks.adapter import Blueprint, TaskAdapter
from server.tasks.base import AnyTask
from server.tracing import OFF, Tracing, about

log = get_logger("adapterd.engine")

AT_ONCE = 32
"""Releases that a list of adapters reads at the same time."""

READING_SHARE = 4
"""One part in so many of the host's memory for adapters, beside it, is for files on their way from the store."""

UPLOADS = 4
"""Uploads at the same time. Unpacked, each may take hundreds of megabytes; and the store may hang for one of them."""

LOADER_THREADS = max(1, min(2, (os.cpu_count() or 1) // 4))
"""They bring adapters from the store to the device, beside the event loop and the device's thread. All of them need the
interpreter most of the time: on few cores, two hand it to and fro for half as much processor time again."""

UPLOAD_THREADS = 2
"""They read and check uploads, which may take seconds: loads do not wait behind them."""


@dataclass(frozen=True, slots=True)
class Described:
    """An adapter that serves."""

    name: str
    release: Release
    resident: bool
    """Whether all versions that get traffic are in memory here."""
    pinned: bool

    @property
    def version(self) -> str:
        """The version with most of the traffic."""
        version = self.release.main_version
        assert version is not None, "what serves has a version"
        return version


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the adapters."""

    adapters: list[Described]
    damaged: list[str]
    """Names whose last release cannot be read."""
    next: str | None
    """The name after which there are more."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a version of an adapter is for."""

    name: str
    version: str
    task: AnyTask
    labels: tuple[str, ...]
    """In the order of the head's outputs."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """The version that answers a request."""

    ref: AdapterRef
    shadow: Sequence[str]
    """Versions that compute it as well."""


class Engine:
    """Answers requests over one backbone and one store. Lives on one event loop, between `start` and `stop`."""

    def __init__(
        self,
        backbone: Backbone,
        store: AdapterStore,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        access: Access = EVERYTHING,
        tracing: Tracing = OFF,
    ) -> None:
        """Takes the backbone over: nobody else may run it. `access` says what the caller of a method may reach."""
        self._access = access
        self._named = settings.metrics_adapters
        self._backbone = backbone
        self._store = store
        self._metrics = metrics
        self._tracing = tracing
        self.upload_turn = asyncio.Semaphore(UPLOADS)
        """To be held from before an upload's bytes are read."""
        self._loader_pool = ThreadPoolExecutor(LOADER_THREADS, "adapterd-loader", processors.use_one)
        self._upload_pool = ThreadPoolExecutor(UPLOAD_THREADS, "adapterd-upload", processors.use_one)
        self._tokenizer_pool = ThreadPoolExecutor(settings.tokenizer_threads, "adapterd-tokenizer", processors.use_one)
        streams = Streams.of(backbone.device, settings.streams)
        scheduler = Scheduler[QueuedRow](
            max_batch_tokens=settings.max_batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
            clock=clock,
            weight=settings.weight,
            aging_seconds=settings.priority_aging_seconds,
            delay_seconds=settings.max_batch_delay_ms / 1000,
            batch_seconds=settings.max_batch_ms / 1000,
            streams=streams.count,
        )
        self._clock = clock
        self._quarantine = Quarantine(
            metrics, failures=settings.quarantine_failures, pause_seconds=settings.quarantine_seconds, clock=clock
        )
        self._worker = Worker(Runner(backbone), scheduler, metrics, self._quarantine, tracing, streams)
        # What as many texts as a request may hold come to at most, or one text of as many windows as it may have: long
        # texts, each for many adapters, would hold the device for minutes.
        self._max_request_tokens = max(settings.max_inputs, MAX_WINDOWS) * backbone.spec.max_tokens
        self._pipeline = Pipeline(backbone.tokenizer, self._worker, self._tokenizer_pool, metrics, tracing)
        prover = Prover(backbone, self._pipeline)
        checker = Checker(backbone)
        loader = Loader(store, checker, prover, self._loader_pool)
        self._residency = Residency(
            loader, **_memories(backbone, settings, metrics), metrics=metrics, clock=clock, tracing=tracing
        )
        self._catalog = Catalog(
            store,
            poll_seconds=settings.store_poll_seconds,
            clock=clock,
            prepare=self._prefetch,
            retire=self._residency.retire,
            released=self._quarantine.released,
            access=access,
        )
        self._shadows = Shadows(self._residency, self._pipeline, metrics, tracing)
        self._pins = Pins(store, self._catalog, self._residency, metrics, poll_seconds=settings.store_poll_seconds)
        self._publisher = Publisher(
            backbone,
            store,
            self._catalog,
            self._residency,
            self._pipeline,
            checker,
            prover,
            metrics,
            self._upload_pool,
            max_upload_bytes=settings.max_upload_bytes,
            max_batch_tokens=settings.max_batch_tokens,
        )
        self._bursts = Bursts(NAP_SECONDS if backbone.device.type == "cpu" else 0.0)
        self._warm_up = WarmUp(
            backbone,
            self._pipeline,
            self._worker,
            self._upload_pool,
            max_tokens=settings.max_batch_tokens,
            clock=clock,
        )
        self._warm_up_seconds = settings.warm_up_seconds
        self._warming: asyncio.Task[None] | None = None
        self._lease_turn = asyncio.Lock()
        """Of requests that take several adapters which are not all in memory."""
        self._embedders: dict[Pooling, TaskAdapter] = {}
        """The backbone alone, by what makes a vector of a text's states."""
        self._poll_seconds = settings.store_poll_seconds
        self._following: list[asyncio.Task[None]] = []
        self._limits: set[asyncio.Timeout] = set()
        """Of the requests under way."""
        self._leaving = False
        self._draining = False
        self._cut_off = False

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
        return self._backbone.dtype_name

    @property
    def layout(self) -> str:
        """How its batches lie in memory."""
        return "packed" if self._backbone.packed else "padded"

    def check_ready(self) -> None:
        """Requests should come here: they can be answered, and what they take has been run. The store is not asked:
        adapters in memory outlive it.

        Raises ShuttingDown, DeviceStopped or WarmingUp where they should not, BackboneError where the backbone cannot
        be run.
        """
        if self._leaving or not (self._worker.alive or self.crashed):
            raise ShuttingDown("the server is shutting down")
        if self.crashed:
            raise DeviceStopped("the device's thread has died; the server has to be restarted")
        if self._warming is not None:
            if not self._warming.done():
                raise WarmingUp("the server is warming up")
            self._warming.result()

    @property
    def crashed(self) -> bool:
        """Whether one of the device's threads has died: no request will ever be answered again."""
        return self._worker.crashed

    def snapshot(self) -> Snapshot:
        """What it is at, for a scrape. Names no more adapters of a kind than have series of their own."""
        load = self._worker.load()
        loaded: dict[str, Loaded] = {}
        for version, level in self._residency.loaded():
            for name in self._catalog.served_by(version):
                loaded.setdefault(name, Loaded(name, level, name in self._pins))
            if len(loaded) >= self._named:
                break
        waiting = dict.fromkeys([*load.waiting, *self._residency.loading])
        return Snapshot(
            requests_waiting=load.requests_waiting,
            requests_running=load.requests_running,
            queue_share=load.queue_share,
            running_adapters=sorted(load.running[: self._named]),
            waiting_adapters=sorted(list(waiting)[: self._named]),
            loaded=list(loaded.values())[: self._named],
            ready=self._residency.ready,
            capacity=self._residency.capacity,
            text_rows=self._backbone.text_rows,
            computed_rows=self._backbone.computed_rows,
        )

    def recent_batches(self, limit: int) -> list[RanBatch]:
        """The batches that ran last, the latest first."""
        self._access.require_all("what runs in batches")
        return self._worker.recent.newest_first(limit)

    def start(self) -> None:
        """Starts the device's threads, warming up, and following the store's pins and the releases of adapters in
        quarantine."""
        self._worker.start()
        loop = asyncio.get_running_loop()
        if self._warm_up_seconds:
            self._warming = loop.create_task(self._warm_up.run(self._warm_up_seconds))
        self._following = [loop.create_task(self._pins.follow()), loop.create_task(self._follow_quarantined())]

    async def warmed(self) -> None:
        """Waits until it is warm. Raises BackboneError where the backbone cannot be run at all."""
        if self._warming is not None:
            await asyncio.shield(self._warming)

    def leave(self) -> None:
        """Not ready any more, nor ever again; but new requests are still answered: who sends them has yet to notice."""
        self._leaving = True
        if self._warming is not None:
            self._warming.cancel()

    def drain(self) -> None:
        """New requests get ShuttingDown from here on; those under way are answered."""
        self.leave()
        self._draining = True

    def cut_off(self) -> None:
        """Requests under way get ShuttingDown as well."""
        self.drain()
        self._cut_off = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():  # such a one cannot be set again
                limit.reschedule(now)

    def stop(self) -> None:
        """Ends every request that still waits, and all threads."""
        self.leave()
        for task in self._following:
            task.cancel()
        self._shadows.stop()
        self._bursts.stop()
        self._worker.stop()
        for pool in (self._loader_pool, self._upload_pool, self._tokenizer_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _follow_quarantined(self) -> None:
        """Keeps up with the releases of adapters in quarantine, which others may have put right while nobody asks for
        them here."""
        while True:
            await asyncio.sleep(max(self._poll_seconds, 0.05))
            for name in self._quarantine.names():
                try:
                    await self._catalog.current(name)
                except AdapterdError as error:
                    log.warning(
                        "the release of an adapter in quarantine cannot be read", adapter=name, error=error.message
                    )
                except Exception:
                    log.exception("an adapter in quarantine is not followed", adapter=name)

    # ------------------------------------------------------------------------------------------------------ requests

    async def run(self, request: TaskRequest) -> list[TaskAnswer]:
        """What each adapter says to all inputs; each from one version: the one asked for, or one of its last release.

        No adapter at all is the bare backbone's answer. Raises WrongTask for an adapter that another route answers,
        DeadlineExceeded, Overloaded and AdapterQuarantined. Cancelling it gives its place in the queue up.
        """
        try:
            return await self._timed(request)
        except (Overloaded, AdapterQuarantined, ShuttingDown, DeviceStopped) as error:
            self._metrics.rejected.labels(error.error_code).inc()
            if isinstance(error, Overloaded):
                self._bursts.refused(error.wait_seconds)
            raise
        except DeadlineExceeded:
            self._metrics.expired.inc()
            raise
        except asyncio.CancelledError:
            self._metrics.cancelled.inc()
            raise

    async def _timed(self, request: TaskRequest) -> list[TaskAnswer]:
        if self._draining:
            raise ShuttingDown("the server is shutting down")
        seconds = request.timeout_seconds
        terms = Terms(request.priority, None if seconds is None else self._clock() + seconds)
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                self._limits.add(limit)
                return await self._run(request, terms)
        except TimeoutError:
            if not limit.expired():
                raise
            if self._cut_off:
                raise ShuttingDown("the server is shutting down") from None
            raise DeadlineExceeded(f"the request took longer than {seconds:g} s") from None
        finally:
            self._limits.discard(limit)

    async def _run(self, request: TaskRequest, terms: Terms) -> list[TaskAnswer]:
        self._access.require(*request.adapters)
        chosen = [await self._choose(name, request) for name in request.adapters]
        self._tracing.note(about([choice.ref for choice in chosen]))
        cut = Cut(request.truncate, request.long)
        refs: Sequence[AdapterRef | None] = [choice.ref for choice in chosen] or [None]
        self._pipeline.check(refs, request.inputs, cut, terms)  # before the store is asked for adapters
        async with AsyncExitStack() as leases:
            adapters = await self._lease(leases, chosen) if chosen else [self._bare(request)]
            for name, adapter in zip(request.adapters, adapters, strict=False):
                _check_route(name, adapter, request.route)
            names = request.adapters if len(request.adapters) > 1 else [None]
            jobs = [
                Job(adapter, request.options, ref, name)
                for ref, name, adapter in zip(refs, names, adapters, strict=True)
            ]
            for job in jobs:
                with job.blamed():
                    job.adapter.task.check_options(job.adapter.config, job.options, self.spec)
            answered = await self._pipeline.answer(
                jobs, request.inputs, cut, terms, max_tokens=self._max_request_tokens
            )
            tasks = [adapter.task for adapter in adapters]
        for choice, task, answer in zip(chosen, tasks, answered, strict=False):
            name = choice.ref.name
            self._metrics.answered.add(name, texts=len(request.inputs), tokens=answer.tokens)
            for shadow in choice.shadow:
                compared = Answered(name, request.inputs, cut, request.options, task, answer.predictions)
                self._shadows.start(compared, shadow)
        return [self._answer(ref, answer, request) for ref, answer in zip(refs, answered, strict=True)]

    def _answer(self, ref: AdapterRef | None, answer: PipelineAnswer, request: TaskRequest) -> TaskAnswer:
        return TaskAnswer(
            ref=ref,
            backbone=self.spec.name,
            predictions=answer.predictions,
            tokens=answer.tokens,
            truncated=[index for index, own in enumerate(answer.windows) if any(one.truncated for one in own)],
            windows=[[_characters(one) for one in own] for own in answer.windows] if request.long else None,
        )

    async def _choose(self, name: str, request: TaskRequest) -> _Choice:
        """The adapter's last release, and the version that answers."""
        if request.version is None:
            serving = await self._catalog.serving(name)
            version = choose(name, serving.traffic, request.routing_key)
            return _Choice(AdapterRef(name, version, serving.number), serving.shadow)
        # A version that is not released yet can be tried; one of an adapter that was deleted cannot.
        version = check_version(request.version)
        release = await self._catalog.serving(name) if await self._catalog.current(check_name(name)) else None
        await self._catalog.check_version(name, version)
        return _Choice(AdapterRef(name, version, release.number if release else None), ())

    async def _lease(self, leases: AsyncExitStack, chosen: Sequence[_Choice]) -> list[TaskAdapter]:
        """All of them. Those that are not in memory are loaded side by side.

        Raises OverBudget where they can never be in memory together.
        """
        refs = [choice.ref for choice in chosen]
        hits = sum(ref.version in self._residency for ref in refs)
        self._metrics.adapter_lookups.labels("hit").inc(hits)
        self._metrics.adapter_lookups.labels("miss").inc(len(refs) - hits)
        if len(refs) > 1:
            await self._load_all(refs)
            # Those that are all here are taken at once. Else one request at a time takes them one by one: two that
            # hold some and wait for the rest would wait for each other.
            if not all(ref.version in self._residency for ref in refs):
                async with self._lease_turn:
                    return await self._enter(leases, refs)
        return await self._enter(leases, refs)

    async def _enter(self, leases: AsyncExitStack, refs: Sequence[AdapterRef]) -> list[TaskAdapter]:
        return [await leases.enter_async_context(self._residency.lease(ref.name, ref.version)) for ref in refs]

    async def _load_all(self, refs: Sequence[AdapterRef]) -> None:
        sizes = {ref.version: self._residency.nbytes(ref.version) for ref in refs}
        cold = [ref for ref in refs if not sizes[ref.version]]
        loaded = await asyncio.gather(*(self._load(ref.name, ref.version) for ref in cold))
        sizes.update(zip((ref.version for ref in cold), loaded, strict=True))
        needed, room = sum(sizes.values()), self._residency.room(sizes.keys())
        if needed > room:
            raise OverBudget(
                f"the {len(refs)} adapters take {needed} bytes together, the memory for adapters has {room} that are "
                "not pinned to others: ask for fewer in one request",
                param="adapter",
            )

    def _bare(self, request: TaskRequest) -> TaskAdapter:
        """The backbone alone, for routes that can do without an adapter."""
        if not isinstance(request.options, EmbedOptions):
            raise InvalidRequest(f"{request.route.path} takes an adapter", param="adapter")
        pooling = request.options.pooling or Pooling.MEAN
        if pooling not in self.spec.poolings:
            raise InvalidRequest(f"the backbone has no {pooling}", param="pooling")
        if pooling not in self._embedders:
            head = {"pooling": pooling, "normalize": True}
            blueprint = Blueprint.check(
                method="head_only", config={}, task="embedding", head=head, labels=(), spec=self.spec
            )
            self._embedders[pooling] = blueprint.bind({}, self._backbone)
        return self._embedders[pooling]

    # ------------------------------------------------------------------------------------------------ administration

    async def publish(self, name: str, upload: Upload, *, by: str) -> Published:
        """See Publisher.publish."""
        self._access.require(name)
        published = await self._publisher.publish(name, upload, by=by)
        self._quarantine.lift(name)  # also where what serves was proven once more, and nothing released
        return published

    async def release(self, name: str, plan: Plan, *, by: str, note: str, after: int | None) -> Release:
        """See Publisher.release."""
        self._access.require(name)
        return await self._publisher.release(name, plan, by=by, note=note, after=after)

    async def rollback(self, name: str, *, to: int | None, by: str, note: str, after: int | None) -> Release:
        """See Publisher.rollback."""
        self._access.require(name)
        return await self._publisher.rollback(name, to=to, by=by, note=note, after=after)

    async def delete(self, name: str, *, by: str, note: str, after: int | None) -> Release:
        """See Publisher.delete."""
        self._access.require(name)
        return await self._publisher.delete(name, by=by, note=note, after=after)

    async def verify(self, name: str, version: str | None) -> tuple[str, Report]:
        """Reads a version, by default the main one, from the store and proves it anew. Raises what is wrong with it."""
        self._access.require(name)
        if version is None:
            version = self._describe(name, await self._catalog.serving(name)).version
        report = await self._publisher.verify(name, version)
        self._quarantine.lift(name)
        return version, report

    async def pin(self, name: str) -> None:
        """See Pins.pin."""
        self._access.require(name)
        await self._pins.pin(name)

    async def unpin(self, name: str) -> None:
        """See Pins.unpin."""
        self._access.require(name)
        await self._pins.unpin(name)

    async def describe(self, name: str) -> tuple[Described, Manifest, Report | None]:
        """An adapter that serves, and the manifest and report of the version with most of its traffic."""
        self._access.require(name)
        described = self._describe(name, await self._catalog.serving(name))
        return described, *await self._store.manifest(name, described.version)

    async def profile(self, name: str, version: str | None = None) -> Profile:
        """What a version, by default the one with most of the traffic, is for. Brings nothing into memory."""
        self._access.require(name)
        if version is None:
            version = self._describe(name, await self._catalog.serving(name)).version
        else:
            await self._catalog.check_version(check_name(name), check_version(version))
        if version in self._residency:
            async with self._residency.lease(name, version) as adapter:
                return Profile(name, version, adapter.task, adapter.labels)
        manifest, _ = await self._store.manifest(name, version)
        if manifest.task not in TASKS:
            raise UnservableAdapter(f"adapter {name!r} does {manifest.task!r}, which this server does not know")
        return Profile(name, version, TASKS[manifest.task], manifest.labels)

    async def collect(self, *, name: str | None, keep: int, min_age: timedelta, dry_run: bool) -> list[Removed]:
        """See gc.collect."""
        if name is None:
            self._access.require_all("collecting the garbage of all adapters")
        else:
            self._access.require(name)
        return [one async for one in collect(self._store, name=name, keep=keep, min_age=min_age, dry_run=dry_run)]

    async def versions(self, name: str) -> list[tuple[StoredVersion, bool]]:
        """What is stored of an adapter's versions, the latest first, and whether each is in memory here."""
        self._access.require(name)
        return [(one, one.version in self._residency) for one in await self._store.versions(name)]

    async def history(self, name: str, *, before: int | None, limit: int) -> list[Release]:
        """See AdapterStore.history."""
        self._access.require(name)
        return await self._store.history(name, before=before, limit=limit)

    async def page(self, *, after: str = "", limit: int) -> Page:
        """Adapters that serve and that the caller may see, by name, at most `limit` of them."""
        names = [name for name in await self._store.names() if name > after and self._access.sees(name)]
        adapters: list[Described] = []
        damaged: list[str] = []
        # One more than fits tells whether there is another page; names of deleted adapters are passed over.
        while names and len(adapters) <= limit:
            asked, names = names[:AT_ONCE], names[AT_ONCE:]
            for name, found in zip(asked, await asyncio.gather(*map(self._last, asked)), strict=True):
                if isinstance(found, AdapterdError):  # one damaged adapter must not hide the others
                    damaged.append(name)
                elif found is not None and not found.deleted:
                    adapters.append(self._describe(name, found))
        following = adapters[limit - 1].name if len(adapters) > limit else None
        here = [name for name in damaged if following is None or name <= following]
        return Page(adapters[:limit], here, following)

    async def _last(self, name: str) -> Release | AdapterdError | None:
        try:
            return await self._store.current(name)
        except (CorruptVersion, StoreUnavailable) as error:
            return error

    def _describe(self, name: str, release: Release) -> Described:
        resident = all(version in self._residency for version in release.traffic)
        return Described(name, release, resident, name in self._pins)

    async def _prefetch(self, name: str, known: Release, later: Release) -> None:
        """Brings what a later release serves into memory where what it replaces is there."""
        for version in later.traffic if any(version in self._residency for version in known.traffic) else ():
            await self._load(name, version)

    async def _load(self, name: str, version: str) -> int:
        """The bytes that it takes in memory."""
        async with self._residency.lease(name, version):
            return self._residency.nbytes(version)


def _check_route(name: str, adapter: TaskAdapter, route: Route) -> None:
    if adapter.task.route is not route:
        raise WrongTask(
            f"adapter {name!r} does {adapter.task.name}, which {adapter.task.route.path} answers, not {route.path}",
            param="adapter",
        )


def _characters(window: Encoding) -> Span:
    """Where a window of a text lies; of a pair, where the part of the second text does."""
    assert window.alignment is not None, "windows are aligned"
    last = max((part for part in window.alignment.parts if part is not None), default=0)
    places = zip(window.alignment.parts, window.alignment.offsets, strict=True)
    offsets = [offset for part, offset in places if part == last]
    return (offsets[0][0], offsets[-1][1]) if offsets else (0, 0)


class _Memories(TypedDict):
    device: Memory[TaskAdapter]
    host: Memory[Checked] | None
    reading: Memory[None]


def _memories(backbone: Backbone, settings: Settings, metrics: Metrics) -> _Memories:
    """The device's memory for adapters, the host's where that is another one, and some for files on their way."""

    def memory(tier: str, max_bytes: int) -> Memory[Any]:
        return Memory(tier, max_bytes, wait_seconds=settings.memory_wait_seconds, metrics=metrics)

    reading = memory("reading", max(settings.host_memory_bytes // READING_SHARE, 1))
    if backbone.device.type == "cpu":
        return {"device": memory("host", settings.host_memory_bytes), "host": None, "reading": reading}
    device, host = memory("device", settings.device_memory_bytes), memory("host", settings.host_memory_bytes)
    return {"device": device, "host": host, "reading": reading}
