"""From an upload to a release: checked, proven, compared, stored, released; each step before anything has changed."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from server.backbone.backbone import Backbone
from server.engine import gate
from server.engine.catalog import Catalog
from server.engine.gate import Comparison
from server.engine.loading import Checked, Checker
from server.engine.pipeline import Pipeline
from server.engine.proof import Prover
from server.engine.residency import Residency
from server.errors import (
    CorruptVersion,
    InvalidAdapter,
    InvalidRequest,
    NotFiniteOutput,
    OverBudget,
    UnknownVersion,
    UnservableAdapter,
)
from server.logs import get_logger
from server.metrics import Metrics
from server.store.artifact import Artifact, Manifest
from server.store.formats import read_checkpoint
from server.store.formats.files import gather
from server.store.names import check_name
from server.store.releases import Plan, Release
from server.store.report import Report
from server.store.store import AdapterStore
from server.tasks.adapter import TaskAdapter
from server.tasks.metrics import Report as Measured

log = get_logger("adapterd.publishing")

T = TypeVar("T")

BROKEN = (CorruptVersion, NotFiniteOutput, OverBudget, UnknownVersion, UnservableAdapter)
"""Why a version that serves may have no outputs: no reason against one that has."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A checkpoint, and what is to become of it."""

    files: Sequence[tuple[str, bytes]]
    """(file name, content): loose files or archives."""
    labels: Sequence[str] | None = None
    eval: bytes | None = None
    """Labelled texts, JSON Lines, on which it has to do at least as well as what serves."""
    release: bool = True
    force: bool = False
    """Release it however it does on `eval`."""
    note: str = ""
    after: int | None = None
    """The number of the release that its own has to follow, 0 for none; None: whatever was released before."""


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of an upload."""

    version: str
    manifest: Manifest
    report: Report
    release: Release | None
    """The release that serves it, if one does."""
    created: bool
    """False where the store had the version already and nothing had to be released."""
    comparison: Comparison | None


class Publisher:
    """Makes versions and releases."""

    def __init__(
        self,
        backbone: Backbone,
        store: AdapterStore,
        catalog: Catalog,
        residency: Residency,
        pipeline: Pipeline,
        checker: Checker,
        prover: Prover,
        metrics: Metrics,
        executor: Executor,
        *,
        max_upload_bytes: int,
        max_batch_tokens: int,
    ) -> None:
        """`executor` does what computes."""
        self._backbone = backbone
        self._store = store
        self._catalog = catalog
        self._residency = residency
        self._pipeline = pipeline
        self._checker = checker
        self._prover = prover
        self._metrics = metrics
        self._executor = executor
        self._max_upload_bytes = max_upload_bytes
        self._max_batch_tokens = max_batch_tokens

    async def publish(self, name: str, upload: Upload, *, by: str) -> Published:
        """Checks a checkpoint, proves that it runs, compares, stores and releases it.

        Raises InvalidAdapter naming what is wrong, or RefusedRelease, and then nothing has changed; Conflict where the
        last release is not the one that this one was to follow.
        """
        check_name(name)
        files = await self._compute(partial(gather, upload.files, self._max_upload_bytes))
        artifact: Artifact = await self._compute(partial(read_checkpoint, files, upload.labels, self._backbone))
        checked = await self._compute(partial(self._checker.check, artifact))
        version = await self._compute(lambda: artifact.version)  # a digest of all its bytes
        async with self._residency.newcomer(name, version, checked) as adapter:
            report = await self._report(artifact.manifest, checked, adapter)
            comparison = await self._compare(name, adapter, upload)
            known = await self._store.has_version(name, version)
            await self._store.put_version(name, artifact, report)
        release, made = await self._serve(name, version, upload, by) if upload.release else (None, False)
        return Published(version, artifact.manifest, report, release, made or not known, comparison)

    async def release(self, name: str, plan: Plan, *, by: str, note: str, after: int | None) -> Release:
        """Makes a release of stored versions. Each is loaded before, so that what cannot serve is not released."""
        tasks = {await self._prepare(name, version) for version in plan.versions}
        if len(tasks) > 1:
            raise InvalidRequest(f"the versions do different tasks: {', '.join(sorted(tasks))}", param="traffic")
        return self._released(name, await self._store.release(name, plan, by=by, note=note, after=after), "release")

    async def rollback(self, name: str, *, to: int | None, by: str, note: str, after: int | None) -> Release:
        """Serves again what served before; see AdapterStore.rollback_target."""
        last, target = await self._store.rollback_target(name, to)
        for version in target.versions:
            await self._prepare(name, version)
        follows = last if after is None else after
        release = await self._store.release(name, target.plan, by=by, note=note, after=follows, restores=target.number)
        return self._released(name, release, "rollback")

    async def delete(self, name: str, *, by: str, note: str, after: int | None) -> Release:
        """A release without traffic: the name answers 404 from here on, its versions and history stay."""
        return self._released(name, await self._store.delete(name, by=by, note=note, after=after), "delete")

    async def verify(self, name: str, version: str) -> Report:
        """Reads a version from the store and proves it anew, whatever is in memory."""
        artifact = await self._store.get_version(name, version)
        checked = await self._compute(partial(self._checker.check, replace(artifact, report=None)))
        async with self._residency.visitor(checked) as adapter:
            return await self._report(artifact.manifest, checked, adapter)

    async def _serve(self, name: str, version: str, upload: Upload, by: str) -> tuple[Release, bool]:
        """The release that serves a stored version, and whether it had to be made."""
        plan = Plan.only(version)
        current: Release | None = None
        with suppress(CorruptVersion):  # another release puts that right
            current = await self._store.current(name)
        if current is not None and current.plan == plan and upload.after in (None, current.number):
            self._catalog.note(name, current)
            return current, False
        release = await self._store.release(name, plan, by=by, note=upload.note or "upload", after=upload.after)
        return self._released(name, release, "publish"), True

    async def _compare(self, name: str, adapter: TaskAdapter, upload: Upload) -> Comparison | None:
        if upload.eval is None:
            return None
        rows = await self._compute(partial(gate.read, upload.eval, adapter, self._backbone.tokenizer))
        try:
            candidate = await self._measure(adapter, rows)
        except NotFiniteOutput as error:
            raise InvalidAdapter("outputs for an eval text are not finite", param="eval", code="not_finite") from error
        current = None
        try:
            serving = await self._store.current(name)
            if serving is not None and (version := serving.main_version):
                async with self._residency.lease(name, version) as other:
                    if other.task is adapter.task:
                        current = await self._measure(other, rows)
        except BROKEN as error:
            log.warning("what serves cannot be compared", adapter=name, error=error.message)
        comparison = Comparison(candidate, current, adapter.task.decisive)
        if comparison.worse and upload.release and not upload.force:
            raise gate.refusal(comparison)
        return comparison

    async def _measure(self, adapter: TaskAdapter, rows: gate.Rows) -> Measured:
        return await gate.measure(
            self._pipeline, adapter, rows, self._executor, max_batch_tokens=self._max_batch_tokens
        )

    async def _prepare(self, name: str, version: str) -> str:
        """Loads a version. The name of its task."""
        try:
            async with self._residency.lease(name, version) as adapter:
                return adapter.task.name
        except UnservableAdapter as error:
            raise InvalidAdapter(error.message, param="traffic") from error

    async def _report(self, manifest: Manifest, checked: Checked, adapter: TaskAdapter) -> Report:
        parameters = sum(tensor.numel() for tensor in checked.tensors.values())
        return await self._prover.report(manifest, len(checked.tensors), parameters, adapter)

    def _released(self, name: str, release: Release, kind: str) -> Release:
        self._catalog.note(name, release)
        self._metrics.releases.labels(kind).inc()
        log.info("released", adapter=name, release=release.number, kind=kind, traffic=release.traffic)
        return release

    async def _compute(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)
