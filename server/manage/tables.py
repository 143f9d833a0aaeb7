"""What people read: tables without lines, versions by their first digits, times in UTC."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from server.api.schemas import (
    AdapterDetail,
    AdapterSummary,
    CollectAnswer,
    DeleteAnswer,
    PinAnswer,
    ReleaseAnswer,
    UploadAnswer,
)
from server.manage.manager import Checked, Overview
from server.store.report import Report

SHORT = 12
"""Digits of a version that tell it from all others that anybody has."""

LABELS_SHOWN = 12

UNLIMITED = 10_000
"""Columns of what is no terminal: whoever reads a file or a pipe wants whole lines."""


class _Part(BaseModel):
    method: str


class _Made(BaseModel):
    """What is shown of a manifest."""

    method: str
    also: list[_Part] = []
    task: str
    labels: list[str]
    source: str


class Tables:
    """Prints answers to standard output."""

    def __init__(self, *, wide: bool = False) -> None:
        """With `wide`, versions have all their digits."""
        self._wide = wide
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console = Console(highlight=False, width=UNLIMITED)

    def adapters(self, adapters: Sequence[AdapterSummary]) -> None:
        """One line for each adapter."""
        if not adapters:
            self._line("no adapter serves")
            return
        rows = [
            {
                "name": one.name,
                "version": self._version(one.version),
                "traffic": "100%" if one.traffic == {one.version: 1} else self._traffic(one.traffic),
                "shadow": ", ".join(map(self._version, one.shadow)),
                "release": str(one.release),
                "released (UTC)": _time(one.released_at),
                "in memory": _known(one.resident),
                "pinned": _yes(one.pinned),
            }
            for one in adapters
        ]
        self._table(rows)

    def overview(self, name: str, known: Overview) -> None:
        """Everything about one adapter."""
        if known.adapter is None:
            self._line(f"{name} does not serve")
        else:
            self._detail(known.adapter)
        self._heading("versions")
        self._table(
            [
                {
                    "version": self._version(one.version),
                    "stored (UTC)": _time(one.stored_at),
                    "age": _age(one.stored_at),
                    "size": decimal(one.bytes),
                    "whole": _yes(one.whole),
                    "in memory": _known(one.resident),
                }
                for one in known.versions
            ]
        )
        self._heading("last releases")
        self._table(
            [
                {
                    "release": str(one.release),
                    "made (UTC)": _time(one.created_at),
                    "traffic": self._plan(one),
                    "by": one.by,
                    "note": one.note,
                }
                for one in known.releases
            ]
        )

    def answer(self, answer: BaseModel) -> None:
        """What became of a change."""
        match answer:
            case UploadAnswer():
                self._uploaded(answer)
            case ReleaseAnswer():
                self._line(f"{answer.adapter}, release {answer.release}: {self._plan(answer)}")
            case DeleteAnswer():
                self._line(f"{answer.adapter}, release {answer.release}: deleted; a rollback brings it back")
            case PinAnswer():
                self._line(f"{answer.adapter} is {'pinned' if answer.pinned else 'not pinned'}")
            case CollectAnswer():
                self._collected(answer)

    def checked(self, results: Sequence[Checked]) -> None:
        """Which versions are as they should be."""
        if not results:
            self._line("nothing to verify")
            return
        self._table(
            [
                {
                    "name": one.adapter,
                    "version": self._version(one.version or ""),
                    "result": one.error or "fine",
                }
                for one in results
            ]
        )

    def _uploaded(self, answer: UploadAnswer) -> None:
        facts = {
            "stored" if answer.created else "unchanged": f"{answer.adapter}, version {self._version(answer.version)}",
            "method": " + ".join([answer.method, *answer.also]),
            "task": answer.task,
            "labels": _some(answer.labels),
            "source": answer.source,
            "proven": _proof(answer.report),
        }
        if answer.evaluation is not None:
            candidate, current = answer.evaluation.candidate, answer.evaluation.current
            facts["measured"] = f"{_metrics(candidate.metrics)} on {candidate.rows} rows"
            if current is not None:
                facts["before"] = _metrics(current.metrics)
        facts["released"] = "no" if answer.release is None else f"release {answer.release}"
        self._facts(facts)

    def _collected(self, answer: CollectAnswer) -> None:
        self._table(
            [
                {
                    "name": one.adapter,
                    "version": self._version(one.version),
                    "stored (UTC)": _time(one.stored_at),
                    "size": decimal(one.bytes),
                }
                for one in answer.removed
            ]
        )
        count = len(answer.removed)
        done = "would be removed" if answer.dry_run else "removed"
        self._line(f"{count} version{'' if count == 1 else 's'} {done}, {decimal(answer.bytes)}")

    def _detail(self, adapter: AdapterDetail) -> None:
        made = _Made.model_validate(adapter.manifest)
        facts = {
            "name": adapter.name,
            "method": " + ".join([made.method, *(part.method for part in made.also)]),
            "task": made.task,
            "labels": _some(made.labels),
            "source": made.source,
            "release": f"{adapter.release}, {_time(adapter.released_at)} UTC",
            "traffic": self._traffic(adapter.traffic),
            "shadow": ", ".join(map(self._version, adapter.shadow)) or "none",
            "pinned": _yes(adapter.pinned),
            "proven": _proof(adapter.report) if adapter.report else "not by a server yet",
        }
        if adapter.resident is not None:
            facts["in memory"] = _yes(adapter.resident)
        self._facts(facts)

    def _plan(self, release: ReleaseAnswer) -> str:
        plan = self._traffic(release.traffic, release.shadow) if release.traffic else "deleted"
        return plan if release.restores is None else f"{plan} (as release {release.restores})"

    def _traffic(self, traffic: Mapping[str, float], shadow: Sequence[str] = ()) -> str:
        shares = sorted(traffic.items(), key=lambda item: -item[1])
        parts = [f"{self._version(version)} {100 * share:g}%" for version, share in shares]
        return ", ".join([*parts, *(f"{self._version(version)} shadow" for version in shadow)])

    def _version(self, version: str) -> str:
        return version if self._wide else version[:SHORT]

    def _facts(self, facts: Mapping[str, str]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, fact in facts.items():
            grid.add_row(name, printable(fact))
        self._print(grid)

    def _table(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Rows with the same columns; those without a word in any row are left out."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        columns = [column for column in (rows[0] if rows else ()) if any(row[column] for row in rows)]
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(printable(row[column]) for column in columns))
        if columns:
            self._print(table)

    def _heading(self, words: str) -> None:
        self._console.print()
        self._console.print(Text(words, style="bold underline"))

    def _line(self, words: str) -> None:
        self._console.print(printable(words), soft_wrap=True)

    def _print(self, what: RenderableType) -> None:
        if self._console.is_terminal:
            self._console.print(what)
            return
        with self._console.capture() as captured:
            self._console.print(what)
        for line in captured.get().splitlines():
            self._console.print(Text(line.rstrip()), soft_wrap=True)


@contextmanager
def watch_upload(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error over `total` bytes, where somebody sees it."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("uploading", total=total)

        def told(portion: int) -> None:
            progress.advance(task, portion)
            if progress.finished:
                progress.update(task, description="uploaded, being proven")

        yield told


def printable(words: str) -> Text:
    """Words of anybody on one line, without what a terminal would take for a command."""
    return Text("".join(letter if letter.isprintable() else " " for letter in words))


def _proof(report: Report) -> str:
    golden = report.golden
    tried = (
        f"golden sample of {golden.texts} texts off by {golden.difference:.1g}, {golden.tolerance:.1g} allowed"
        if golden
        else f"{report.smoke_texts} sample texts ran"
    )
    return (
        f"{_time(report.checked_at)} UTC on {report.backbone} ({report.dtype}, {report.device}): {tried}, "
        f"{report.tensors} tensors, {report.parameters:,} parameters, {decimal(report.memory_bytes)} of memory"
    )


def _some(labels: Sequence[str]) -> str:
    more = len(labels) - LABELS_SHOWN
    return ", ".join(labels[:LABELS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _known(fact: bool | None) -> str:
    return "" if fact is None else _yes(fact)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def _age(moment: datetime) -> str:
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
