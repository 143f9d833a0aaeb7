"""Manager straight on a store: this process does it, and servers on the store pick it up."""

import asyncio
import time
from collections.abc import Coroutine
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from server import logs
from server.api.answers import (
    adapter_detail,
    adapter_summary,
    collect_answer,
    release_answer,
    release_list,
    upload_answer,
    version_info,
)
from server.api.schemas import (
    AdapterDetail,
    AdapterList,
    AdapterSummary,
    CollectAnswer,
    CollectBody,
    DeleteAnswer,
    PinAnswer,
    ReleaseAnswer,
    ReleaseBody,
    ReleaseList,
    RollbackBody,
    UploadAnswer,
    VersionInfo,
)
from server.engine.catalog import Catalog
from server.errors import CorruptVersion, InvalidAdapter, StoreUnavailable
from server.manage.manager import Push
from server.settings import Settings
from server.store.gc import collect
from server.store.names import check_name
from server.store.objects import brief
from server.store.releases import Release
from server.store.report import Report
from server.store.store import AdapterStore

if TYPE_CHECKING:
    from server.engine.engine import Engine

T = TypeVar("T")

BY = "adapterd adapters"
"""Who a release says that it was made by."""

AT_ONCE = 64
"""Releases that a list of adapters reads at the same time."""


class Local:
    """A store, and an engine over it once something has to be proven."""

    def __init__(self, settings: Settings, *, make: bool = False) -> None:
        """Opens the store of the settings; with `make`, a folder that is not there is made.

        Raises InvalidRequest, StoreUnavailable.
        """
        logs.configure("critical", "console")  # what goes wrong is told once, as the command's error
        if not make:
            _check_there(settings.store)
        self._settings = settings
        self._store = AdapterStore.open(
            settings.store, endpoint=settings.store_endpoint, timeout_seconds=settings.store_timeout_seconds
        )
        self._catalog = Catalog(
            self._store,
            poll_seconds=0,
            clock=time.monotonic,
            prepare=_prepare_nothing,
            retire=lambda _: None,
            released=lambda _, __: None,
        )
        self._engine: Engine | None = None
        self._runner = asyncio.Runner()

    def close(self) -> None:
        """See Manager."""
        if self._engine is not None:
            self._runner.run(_stop(self._engine))
        self._runner.close()

    def adapters(self) -> AdapterList:
        """See Manager."""
        return self._run(self._adapters())

    def detail(self, name: str) -> AdapterDetail:
        """See Manager."""
        return self._run(self._detail(name))

    def versions(self, name: str) -> list[VersionInfo]:
        """See Manager."""
        stored = self._run(self._store.versions(name))
        return [version_info(one, resident=None) for one in stored]

    def releases(self, name: str, limit: int) -> ReleaseList:
        """See Manager."""
        return release_list(name, self._run(self._store.history(name, limit=limit + 1)), limit)

    def push(self, name: str, push: Push) -> UploadAnswer:
        """See Manager."""
        from server.engine.publishing import Upload

        upload = Upload(
            files=[(file_name, file.read_bytes()) for file_name, file in push.files],
            labels=push.labels,
            eval=None if push.eval is None else push.eval.read_bytes(),
            release=push.release,
            force=push.force,
            note=push.note,
        )
        check_name(name)
        engine = self._started()
        return upload_answer(name, self._run(engine.publish(name, upload, by=BY)))

    def release(self, name: str, body: ReleaseBody, *, force: bool) -> ReleaseAnswer:
        """See Manager."""
        return release_answer(name, self._run(self._release(name, body, force=force)))

    def rollback(self, name: str, body: RollbackBody) -> ReleaseAnswer:
        """See Manager."""
        made = self._store.rollback(name, to=body.to, by=BY, note=body.note, after=body.after)
        return release_answer(name, self._run(made))

    def delete(self, name: str, note: str) -> DeleteAnswer:
        """See Manager."""
        made = self._run(self._store.delete(name, by=BY, note=note or "delete"))
        return DeleteAnswer(adapter=name, release=made.number)

    def pin(self, name: str) -> PinAnswer:
        """See Manager."""
        self._run(self._pin(name))
        return PinAnswer(adapter=name, pinned=True)

    def unpin(self, name: str) -> PinAnswer:
        """See Manager."""
        self._run(self._store.unpin(name))
        return PinAnswer(adapter=name, pinned=False)

    def collect(self, body: CollectBody) -> CollectAnswer:
        """See Manager."""
        return self._run(self._collect(body))

    def verify(self, name: str, version: str) -> Report | None:
        """See Manager: the bytes are read and compared with the version's digest, nothing runs."""
        return self._run(self._store.get_version(name, version)).report

    async def _adapters(self) -> AdapterList:
        pinned = set(await self._store.pins())
        names = await self._store.names()
        found = AdapterList(adapters=[], damaged=[], next=None)
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            for name, last in zip(some, await asyncio.gather(*map(self._last, some)), strict=True):
                if isinstance(last, CorruptVersion):  # one damaged adapter must not hide the others
                    found.damaged.append(name)
                elif last is not None and not last.deleted:
                    found.adapters.append(_summary(name, last, pinned))
        return found

    async def _last(self, name: str) -> Release | CorruptVersion | None:
        try:
            return await self._store.current(name)
        except CorruptVersion as error:
            return error

    async def _detail(self, name: str) -> AdapterDetail:
        release = await self._catalog.serving(check_name(name))
        summary = _summary(name, release, set(await self._store.pins()))
        return adapter_detail(summary, *await self._store.manifest(name, summary.version))

    async def _release(self, name: str, body: ReleaseBody, *, force: bool) -> Release:
        plan = body.plan()
        for version in () if force else plan.versions:
            if (await self._store.manifest(name, version))[1] is None:
                raise InvalidAdapter(
                    f"no server has proven version {version} of adapter {name!r}; --force releases it all the same"
                )
        return await self._store.release(name, plan, by=BY, note=body.note, after=body.after)

    async def _pin(self, name: str) -> None:
        await self._catalog.serving(check_name(name))
        await self._store.pin(name)

    async def _collect(self, body: CollectBody) -> CollectAnswer:
        removing = collect(
            self._store,
            name=None if body.adapter is None else check_name(body.adapter),
            keep=body.keep,
            min_age=timedelta(seconds=body.min_age_seconds),
            dry_run=body.dry_run,
        )
        return collect_answer([one async for one in removing], dry_run=body.dry_run)

    def _started(self) -> "Engine":
        """The engine: loading the backbone takes seconds, once."""
        if self._engine is None:
            from transformers.utils.logging import disable_progress_bar

            from server.backbone.backbone import Backbone
            from server.engine.engine import Engine
            from server.metrics import Metrics

            disable_progress_bar()
            settings = self._settings
            backbone = Backbone.load(settings.backbone, device=settings.device, dtype=settings.dtype)
            self._engine = self._runner.run(_start(Engine(backbone, self._store, settings, Metrics())))
        return self._engine

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(call)
        except StoreUnavailable as error:
            # To a server's clients the reason would tell too much. Here it is the operator who asks.
            reason = brief(error.__cause__) if isinstance(error.__cause__, Exception) else ""
            raise StoreUnavailable(f"{error.message}: {reason}" if reason else error.message) from error


class Proving(Local):
    """A store whose versions are run over the backbone when they are verified."""

    def verify(self, name: str, version: str) -> Report | None:
        """See Manager."""
        return self._run(self._started().verify(name, version))[1]


async def _start(engine: "Engine") -> "Engine":
    engine.start()
    return engine


async def _stop(engine: "Engine") -> None:
    engine.stop()


async def _prepare_nothing(name: str, known: Release, later: Release) -> None:
    """Nothing is in memory here."""


def _summary(name: str, release: Release, pinned: set[str]) -> AdapterSummary:
    return adapter_summary(name, release, resident=None, pinned=name in pinned)


def _check_there(url: str) -> None:
    """Opening makes a folder that is not there, which a mistyped one should not become."""
    scheme, separator, rest = url.partition("://")
    folder = Path(unquote(rest)) if separator else Path(url).expanduser()
    if (not separator or scheme == "file") and not folder.exists():
        raise StoreUnavailable(f"there is no store at {url}")
