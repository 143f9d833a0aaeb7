"""From the store to the device: each step, away from the event loop, with the proof that an adapter is one."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from server.backbone.backbone import Backbone
from server.core import BackboneSpec
from server.engine.proof import Prover
from server.errors import InvalidAdapter, UnservableAdapter
from server.store.artifact import Artifact, Manifest, TrainedOn
from server.store.report import Report
from server.store.store import AdapterStore, OpenedVersion
from server.tasks.adapter import Blueprint, TaskAdapter
from server.tasks.head import HEAD

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Checked:
    """An adapter in the host's memory that is known to fit the backbone, every tensor of it used."""

    manifest: Manifest
    report: Report | None
    blueprint: Blueprint
    tensors: Mapping[str, Tensor]
    nbytes: int
    """Memory of its tensors."""
    estimate: int
    """Memory that it takes on the device, as far as can be told before it is there."""


def check(artifact: Artifact, backbone: Backbone) -> Checked:
    """Raises InvalidAdapter naming what does not fit the backbone."""
    manifest = artifact.manifest
    _check_backbone(manifest.backbone, backbone.spec)
    blueprint = Blueprint.check(
        method=manifest.method,
        config=manifest.config,
        also=[(part.method, part.config) for part in manifest.also],
        task=manifest.task,
        head=manifest.head,
        labels=manifest.labels,
        spec=backbone.spec,
    )
    blueprint.check_tensors(artifact.tensors)
    return Checked(
        manifest,
        artifact.report,
        blueprint,
        artifact.tensors,
        nbytes=sum(tensor.nbytes for tensor in artifact.tensors.values()),
        estimate=artifact.report.memory_bytes
        if artifact.report and _covers(artifact.report, backbone)
        else sum(
            tensor.nbytes if name.startswith(HEAD) else tensor.numel() * backbone.dtype.itemsize
            for name, tensor in artifact.tensors.items()
        ),
    )


class Loader:
    """Reads versions and places them on the device."""

    def __init__(self, store: AdapterStore, backbone: Backbone, prover: Prover, executor: Executor) -> None:
        """`executor` does what computes."""
        self._store = store
        self._backbone = backbone
        self._prover = prover
        self._executor = executor

    async def open(self, name: str, version: str) -> OpenedVersion:
        """The version, whose size is known. Raises StoreUnavailable, UnknownVersion or CorruptVersion."""
        return await self._store.open_version(name, version)

    async def check(self, name: str, opened: OpenedVersion) -> Checked:
        """The version in the host's memory. Raises CorruptVersion, or UnservableAdapter on another backbone."""
        verify = await opened.read()
        try:
            return await self._compute(lambda: check(verify(), self._backbone))
        except InvalidAdapter as error:  # it fitted the backbone of the server that accepted it
            raise _unservable(name, error) from error

    async def place(self, checked: Checked) -> TaskAdapter:
        """The adapter on the device."""
        return await self._compute(partial(checked.blueprint.bind, checked.tensors, self._backbone))

    async def prove(self, name: str, checked: Checked, adapter: TaskAdapter) -> None:
        """Proves an adapter that no server has proven on this backbone yet. Raises UnservableAdapter."""
        if checked.report is not None and _covers(checked.report, self._backbone):
            return
        try:
            await self._prover.prove(checked.manifest, adapter)
        except InvalidAdapter as error:
            raise _unservable(name, error) from error

    async def _compute(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)


def _covers(report: Report, backbone: Backbone) -> bool:
    return report.covers(backbone.spec.fingerprint, backbone.dtype_name)


def _unservable(name: str, error: InvalidAdapter) -> UnservableAdapter:
    return UnservableAdapter(f"adapter {name!r} cannot be served here: {error.message}")


def _check_backbone(made_for: TrainedOn, spec: BackboneSpec) -> None:
    for field in ("model_type", "hidden_size", "num_layers", "fingerprint"):
        wanted, here = getattr(made_for, field), getattr(spec, field)
        if wanted is not None and wanted != here:
            raise InvalidAdapter(
                f"the adapter was made for a backbone with {field} {wanted}, this server's {spec.name!r} has {here}",
                param=f"backbone.{field}",
                code="wrong_backbone",
            )
