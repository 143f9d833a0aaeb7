"""From the store to the device: each step, away from the event loop, with the proof that an adapter is one."""

import json
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar
from weakref import ref

from torch import Tensor

from server import processors
from server.backbone.backbone import Backbone
from server.core import BackboneSpec
from server.engine.proof import Prover
from server.errors import InvalidAdapter, UnservableAdapter
from server.store.artifact import Artifact, Manifest, TrainedOn
from server.store.report import Report
from server.store.store import AdapterStore, OpenedVersion
from server.tasks.adapter import Blueprint, TaskAdapter
from server.tasks.head import HEAD
from server.together import LARGEST_TOGETHER, Together

T = TypeVar("T")

LONGEST_RECIPE = 16 * 1024
RECIPES = 256
"""Kinds of adapters, by method, options and number of labels, whose plans are kept."""

KNOWN_BYTES = 2_500_000
"""What is remembered of versions that have been loaded, of the last ones, may take so much."""

KNOWN_BYTES_OF_ONE = 480
"""What it takes, its labels aside, as tracemalloc counts."""


@dataclass(frozen=True, slots=True)
class Checked:
    """An adapter in the host's memory that is known to fit the backbone, every tensor of it used."""

    kind: Blueprint
    """What all of its kind share, whatever their labels."""
    blueprint: Blueprint
    tensors: Mapping[str, Tensor]
    nbytes: int
    """Memory that it takes in the host's: that of the file in which its tensors lie."""
    estimate: int
    """Memory that it takes on the device, as far as can be told before it is there."""
    unproven: Manifest | None = None
    """What it has still to be proven with; None: a server has run it on this backbone, in this number format."""
    digest: bytes | None = None
    """The file's, where that has been compared with the version."""


class _Known(NamedTuple):
    """What was found out of a proven version that has been here before. Of such a one, nothing but its tensors need be
    read: they are the same if their digest is."""

    kind: ref[Blueprint]
    """Gone, where no plan is kept for its kind: there may be thousands of large ones."""
    labels: tuple[str, ...]
    nbytes: int
    estimate: int
    digest: bytes

    @property
    def takes(self) -> int:
        """Bytes of memory."""
        return KNOWN_BYTES_OF_ONE + sum(map(sys.getsizeof, self.labels))

    def checked(self) -> Checked | None:
        """The same as it was checked, without its tensors."""
        kind = self.kind()
        if kind is None:
            return None
        return Checked(kind, kind.labelled(self.labels), {}, self.nbytes, self.estimate, digest=self.digest)


class Checker:
    """Artifacts against one backbone. Thread-safe."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._blueprint = lru_cache(RECIPES)(self._planned)

    def check(self, artifact: Artifact) -> Checked:
        """Raises InvalidAdapter naming what does not fit the backbone."""
        manifest, report = artifact.manifest, artifact.report
        _check_backbone(manifest.backbone, self._backbone.spec)
        also = [(part.method, part.config) for part in manifest.also]
        recipe = json.dumps([manifest.method, manifest.config, also, manifest.task, manifest.head])
        planned = self._blueprint if len(recipe) < LONGEST_RECIPE else self._planned
        kind = planned(recipe, len(manifest.labels))
        blueprint = kind.labelled(manifest.labels)
        proven = report is not None and self.covers(report)  # of these very bytes, which have been compared
        blueprint.check_tensors(artifact.tensors, finite=proven)
        return Checked(
            kind,
            blueprint,
            artifact.tensors,
            nbytes=len(artifact.tensor_bytes),
            estimate=report.memory_bytes if report is not None and proven else self._estimated(artifact.tensors),
            unproven=None if proven else manifest,
            digest=artifact.tensor_digest,
        )

    def _estimated(self, tensors: Mapping[str, Tensor]) -> int:
        return sum(
            tensor.nbytes if name.startswith(HEAD) else tensor.numel() * self._backbone.dtype.itemsize
            for name, tensor in tensors.items()
        )

    def bind(self, checked: Checked) -> TaskAdapter:
        """The adapter on the backbone's device."""
        return checked.blueprint.load(checked.tensors, self._backbone)

    def binds_quickly(self, checked: Checked) -> bool:
        """Whether that takes but a few short steps."""
        return checked.nbytes <= LARGEST_TOGETHER and checked.blueprint.loads_quickly(checked.tensors, self._backbone)

    def covers(self, report: Report) -> bool:
        """Whether what a server has found holds here."""
        return report.covers(self._backbone.spec.fingerprint, self._backbone.dtype_name)

    def _planned(self, recipe: str, labels: int) -> Blueprint:
        """Adapters come in families that were trained alike, and planning takes longer than all the rest."""
        method, config, also, task, head = json.loads(recipe)
        names = [str(index) for index in range(labels)]
        return Blueprint.check(
            method=method, config=config, also=also, task=task, head=head, labels=names, spec=self._backbone.spec
        )


class Loader:
    """Reads versions and places them on the device."""

    def __init__(self, store: AdapterStore, checker: Checker, prover: Prover, executor: Executor) -> None:
        """`executor` does what computes."""
        self._store = store
        self._checker = checker
        self._prover = prover
        self._threads = Together(executor)
        self._known: OrderedDict[str, _Known] = OrderedDict()
        """Versions, the one that was loaded last at the end."""
        self._known_bytes = 0

    async def open(self, name: str, version: str) -> OpenedVersion:
        """The version, whose size is known. Raises StoreUnavailable, UnknownVersion or CorruptVersion."""
        return await self._store.open_version(name, version)

    async def check(self, name: str, opened: OpenedVersion) -> Checked:
        """The version in the host's memory. Raises CorruptVersion, or UnservableAdapter on another backbone."""
        verify = await opened.read()
        with _servable(name):
            return await self._threads.call(lambda: self._checker.check(verify()), opened.size)

    async def bring(self, name: str, opened: OpenedVersion) -> tuple[Checked, TaskAdapter]:
        """The version in the host's memory, and placed, where that is the device's."""
        verify = await opened.read()
        with _servable(name):
            return self._whole(*await self._threads.call(lambda: self._made(verify()), opened.size))

    async def bring_small(self, name: str, version: str, at_most: int) -> tuple[Checked, TaskAdapter] | None:
        """The same from the beginning, in one go; None where it has to be opened first, see AdapterStore.load_small."""
        known = self._known.get(version)
        made: tuple[Checked, TaskAdapter | None] | None = None
        with _servable(name):
            if known is not None and known.nbytes <= at_most and (before := known.checked()) is not None:
                again = partial(self._made_again, before)
                made = await self._store.load_again(name, version, known.nbytes, known.digest, again)
            if made is None:
                made = await self._store.load_small(name, version, at_most, self._made)
            if made is None:
                return None
            checked, adapter = self._whole(*made)
        self._remember(version, checked)
        return checked, adapter

    def _remember(self, version: str, checked: Checked) -> None:
        if checked.unproven is not None or checked.digest is None:
            return
        known = _Known(ref(checked.kind), checked.blueprint.labels, checked.nbytes, checked.estimate, checked.digest)
        if version not in self._known:  # what is named by its content takes as much each time
            self._known_bytes += known.takes
        self._known[version] = known
        self._known.move_to_end(version)
        while self._known_bytes > KNOWN_BYTES:
            self._known_bytes -= self._known.popitem(last=False)[1].takes

    def _made(self, artifact: Artifact) -> tuple[Checked, TaskAdapter | None]:
        """What another thread does than the event loop's; None: `_whole` does the rest."""
        processors.use_one()  # the thread may be the store's
        return self._begun(self._checker.check(artifact))

    def _made_again(self, before: Checked, tensors: Mapping[str, Tensor]) -> tuple[Checked, TaskAdapter | None]:
        """The same from the very tensors that have been checked before."""
        processors.use_one()
        return self._begun(replace(before, tensors=tensors))

    def _begun(self, checked: Checked) -> tuple[Checked, TaskAdapter | None]:
        return checked, None if self._checker.binds_quickly(checked) else self._checker.bind(checked)

    def _whole(self, checked: Checked, adapter: TaskAdapter | None) -> tuple[Checked, TaskAdapter]:
        """On the event loop, a few short steps take a tenth of a millisecond. Each of them needs Python's lock: on one
        more thread, they would take it from the event loop and from the device's threads again and again."""
        processors.use_one()
        return checked, self._checker.bind(checked) if adapter is None else adapter

    async def place(self, checked: Checked) -> TaskAdapter:
        """The adapter on the device."""
        return await self._threads.call(partial(self._checker.bind, checked), checked.nbytes)

    async def prove(self, name: str, checked: Checked, adapter: TaskAdapter) -> None:
        """Proves an adapter that no server has proven on this backbone yet. Raises UnservableAdapter."""
        if checked.unproven is not None:
            with _servable(name):
                await self._prover.prove(checked.unproven, adapter)


@contextmanager
def _servable(name: str) -> Iterator[None]:
    try:
        yield
    except InvalidAdapter as error:  # it fitted the backbone of the server that accepted it
        raise UnservableAdapter(f"adapter {name!r} cannot be served here: {error.message}") from error


def _check_backbone(made_for: TrainedOn, spec: BackboneSpec) -> None:
    for field in ("model_type", "hidden_size", "num_layers", "fingerprint"):
        wanted, here = getattr(made_for, field), getattr(spec, field)
        if wanted is not None and wanted != here:
            raise InvalidAdapter(
                f"the adapter was made for a backbone with {field} {wanted}, this server's {spec.name!r} has {here}",
                param=f"backbone.{field}",
                code="wrong_backbone",
            )
