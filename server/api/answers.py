"""What engine and store give, as the answers of schemas.py: for the routes, and for the command line on a store."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.api.schemas import (
    AdapterDetail,
    AdapterSummary,
    CollectAnswer,
    CollectedVersion,
    Evaluation,
    EvaluationResult,
    ReleaseAnswer,
    ReleaseList,
    UploadAnswer,
    VersionInfo,
)
from server.store.artifact import Manifest
from server.store.gc import Removed
from server.store.releases import Release
from server.store.report import Report
from server.store.store import StoredVersion

if TYPE_CHECKING:  # the engine takes seconds to import, and most commands on a store do without it
    from server.engine.gate import Comparison
    from server.engine.publishing import Published
    from server.tasks.metrics import Report as Measured


def adapter_summary(name: str, release: Release, *, resident: bool | None, pinned: bool) -> AdapterSummary:
    """An adapter whose last release serves something."""
    version = release.main_version
    assert version is not None, "what serves has a version"
    return AdapterSummary(
        name=name,
        version=version,
        traffic=release.traffic,
        shadow=list(release.shadow),
        release=release.number,
        released_at=release.created_at,
        resident=resident,
        pinned=pinned,
    )


def adapter_detail(summary: AdapterSummary, manifest: Manifest, report: Report | None) -> AdapterDetail:
    """An adapter with what its main version says of itself."""
    from server.tasks import TASKS  # takes as long to import as torch does

    task = TASKS.get(manifest.task)
    return AdapterDetail(
        **summary.model_dump(),
        task=manifest.task,
        route=task.route.path if task else None,
        labels=list(manifest.labels),
        manifest=manifest.model_dump(mode="json", exclude_none=True),
        report=report,
    )


def version_info(version: StoredVersion, *, resident: bool | None) -> VersionInfo:
    """A stored version."""
    return VersionInfo(
        version=version.version,
        bytes=version.size,
        stored_at=version.stored_at,
        whole=version.whole,
        resident=resident,
    )


def release_answer(name: str, release: Release) -> ReleaseAnswer:
    """A release of an adapter."""
    return ReleaseAnswer(
        adapter=name,
        release=release.number,
        traffic=release.traffic,
        shadow=list(release.shadow),
        created_at=release.created_at,
        by=release.by,
        note=release.note,
        restores=release.restores,
    )


def release_list(name: str, releases: Sequence[Release], limit: int) -> ReleaseList:
    """A page of `limit` releases; one more, if there is one, tells of another page."""
    shown = releases[:limit]
    return ReleaseList(
        adapter=name,
        releases=[release_answer(name, release) for release in shown],
        next=shown[-1].number if len(releases) > limit else None,
    )


def upload_answer(name: str, published: "Published") -> UploadAnswer:
    """What became of an upload."""
    manifest = published.manifest
    return UploadAnswer(
        adapter=name,
        version=published.version,
        release=published.release.number if published.release else None,
        created=published.created,
        method=manifest.method,
        also=[part.method for part in manifest.also],
        task=manifest.task,
        labels=list(manifest.labels),
        source=manifest.source,
        report=published.report,
        evaluation=_evaluation(published.comparison),
    )


def collect_answer(removed: Sequence[Removed], *, dry_run: bool) -> CollectAnswer:
    """What a garbage collection removed."""
    return CollectAnswer(
        removed=[
            CollectedVersion(
                adapter=one.name, version=one.version.version, bytes=one.version.size, stored_at=one.version.stored_at
            )
            for one in removed
        ],
        bytes=sum(one.version.size for one in removed),
        dry_run=dry_run,
    )


def _evaluation(comparison: "Comparison | None") -> Evaluation | None:
    if comparison is None:
        return None
    current = comparison.current
    return Evaluation(candidate=_measured(comparison.candidate), current=_measured(current) if current else None)


def _measured(report: "Measured") -> EvaluationResult:
    return EvaluationResult(rows=report.rows, metrics=dict(report.metrics))
