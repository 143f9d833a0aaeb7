"""Which adapters are in memory, and how the others get there while these go on serving."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from contextlib import asynccontextmanager

import torch

from server.core import AdapterRef
from server.engine.failures import Failures
from server.engine.loading import Checked, Loader
from server.engine.memory import Memory
from server.engine.once import Once
from server.errors import (
    AdapterdError,
    CorruptVersion,
    MemoryFull,
    OverBudget,
    StoreUnavailable,
    UnknownVersion,
    UnservableAdapter,
)
from server.logs import get_logger
from server.metrics import Metrics
from server.tasks.adapter import TaskAdapter
from server.together import LARGEST_TOGETHER
from server.tracing import OFF, Tracing, about

log = get_logger("adapterd.residency")

REMEMBERED = (StoreUnavailable, CorruptVersion, UnknownVersion, UnservableAdapter, OverBudget)
"""Failures of a version that the next request would only meet again."""


SMALL_BYTES = LARGEST_TOGETHER
"""A version of at most so many bytes may be read before its size is known: as much is claimed for each meanwhile."""

AT_ONCE = 8
"""Such claims for which there has to be room at the same time."""


class Residency:
    """Adapter versions in memory: on the device, ready to run, and, where the device has a memory of its own, in the
    host's memory as well, from where they come back without the store.

    Versions are named by their content, so the same content is held once, whatever it is called.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        device: Memory[TaskAdapter],
        host: Memory[Checked] | None,
        reading: Memory[None],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        tracing: Tracing = OFF,
    ) -> None:
        """`host` is None where the device's memory is the host's; `reading` is for files on their way."""
        self._loader = loader
        self._device = device
        self._host = host
        self._reading = reading
        self._metrics = metrics
        self._clock = clock
        self._tracing = tracing
        self._loads = Once[tuple[str, str], TaskAdapter]()
        self._failures = Failures[tuple[str, str]](clock)

    def __contains__(self, version: str) -> bool:
        """Whether a version is ready to run."""
        return version in self._device

    def nbytes(self, version: str) -> int:
        """What a version takes on the device; 0 where it is not there."""
        return self._device.nbytes(version)

    def loaded(self) -> Iterator[tuple[str, str]]:
        """Versions in memory and where: `gpu` where they are ready to run, though that be a CPU, else `cpu`; those
        first, the first to leave last."""
        for version in self._device:
            yield version, "gpu"
        for version in self._host or ():
            if version not in self._device:
                yield version, "cpu"

    @property
    def ready(self) -> int:
        """Versions that are ready to run."""
        return len(self._device)

    @property
    def capacity(self) -> int:
        """How many versions can be ready to run, of the mean size of those that are."""
        return self._device.capacity

    @property
    def loading(self) -> list[str]:
        """Adapters on their way into memory."""
        return [name for name, _ in self._loads]

    @property
    def device_budget(self) -> int:
        """Bytes of adapters that may be on the device."""
        return self._device.max_bytes

    def room(self, versions: Set[str]) -> int:
        """Bytes on the device that these versions may come to together: what is not pinned to others."""
        return self._device.room(versions)

    @asynccontextmanager
    async def lease(self, name: str, version: str) -> AsyncIterator[TaskAdapter]:
        """The adapter, which stays meanwhile; loaded beside serving where it is not here yet.

        Callers that want one version share its load. Raises what `Loader` does, OverBudget and MemoryFull; for a
        version that failed a moment ago, again at once.
        """
        with self._device.held(version):
            adapter = self._device.get(version)
            if adapter is None:
                # By name too: the same content under another name lies in other files, which may be whole.
                with self._tracing.span("load", about([AdapterRef(name, version, None)])):
                    adapter = await self._loads.call((name, version), lambda: self._load(name, version))
            yield adapter

    @asynccontextmanager
    async def newcomer(self, name: str, version: str, checked: Checked) -> AsyncIterator[TaskAdapter]:
        """An adapter that is not in the store yet, on the device; it leaves again if something is raised meanwhile."""
        with self._device.held(version):
            adapter = self._device.get(version)
            if adapter is not None:  # the same bytes, under another name or from an upload before
                yield adapter
                self._failures.clear((name, version))
                return
            async with self._device.claim(checked.estimate) as claim:
                adapter = await self._loader.place(checked)
                await claim.settle(version, adapter, adapter.nbytes)
            try:
                yield adapter
            except BaseException:
                self._device.retire(version)
                raise
            self._failures.clear((name, version))

    @asynccontextmanager
    async def visitor(self, checked: Checked) -> AsyncIterator[TaskAdapter]:
        """An adapter that is on the device for a while, beside whatever is there."""
        async with self._device.claim(checked.estimate):
            yield await self._loader.place(checked)

    def pin(self, versions: Set[str]) -> None:
        """From here on these versions, and no others, do not leave once they are here."""
        self._device.pin(versions)

    def retire(self, version: str) -> None:
        """No release names the version any more: it leaves with the last request that uses it."""
        self._device.retire(version)
        if self._host is not None:
            self._host.retire(version)

    async def _load(self, name: str, version: str) -> TaskAdapter:
        if error := self._failures.recent((name, version)):
            raise error
        started = self._clock()
        try:
            adapter = await self._bring(name, version)
        except AdapterdError as error:
            self._metrics.adapter_loads.labels("failure").inc()
            if isinstance(error, REMEMBERED):
                self._failures.note((name, version), error)
            raise
        except torch.OutOfMemoryError as error:
            self._metrics.adapter_loads.labels("failure").inc()
            raise MemoryFull(f"the device has no memory left for adapter {name!r}") from error
        except Exception as error:
            log.exception("an adapter cannot be loaded", adapter=name, version=version)
            self._metrics.adapter_loads.labels("failure").inc()
            failure = UnservableAdapter(f"adapter {name!r} cannot be loaded here")
            self._failures.note((name, version), failure)
            raise failure from error
        self._failures.clear((name, version))
        self._metrics.adapter_loads.labels("success").inc()
        self._metrics.adapter_load_seconds.observe(self._clock() - started)
        return adapter

    async def _bring(self, name: str, version: str) -> TaskAdapter:
        if self._host is None:
            return await self._bring_at_once(name, version)
        checked = self._host.get(version)
        if checked is None:
            opened = await self._loader.open(name, version)
            # Until its bytes are here it takes nobody's place: they may be long in coming, or never come.
            async with self._reading.claim(min(opened.size, self._reading.max_bytes)):
                checked = await self._loader.check(name, opened)
                if checked.nbytes <= self._host.max_bytes:  # else only the device is large enough
                    async with self._host.claim(checked.nbytes) as claim:
                        await claim.settle(version, checked, checked.nbytes)
        return await self._place(name, version, checked)

    async def _bring_at_once(self, name: str, version: str) -> TaskAdapter:
        """Where the host's memory is the device's. What is on its way takes twice its size: the file, and what it
        becomes."""
        at_most = min(SMALL_BYTES, self._reading.max_bytes // (2 * AT_ONCE))
        async with self._reading.claim(2 * at_most):
            made = await self._loader.bring_small(name, version, at_most)
            if made is not None:
                return await self._settle(name, version, *made)
        opened = await self._loader.open(name, version)
        async with self._reading.claim(min(2 * opened.size, self._reading.max_bytes)):
            return await self._settle(name, version, *await self._loader.bring(name, opened))

    async def _settle(self, name: str, version: str, checked: Checked, adapter: TaskAdapter) -> TaskAdapter:
        async with self._device.claim(adapter.nbytes) as claim:
            await self._loader.prove(name, checked, adapter)
            await claim.settle(version, adapter, adapter.nbytes)
            return adapter

    async def _place(self, name: str, version: str, checked: Checked) -> TaskAdapter:
        async with self._device.claim(checked.estimate) as claim:
            adapter = await self._loader.place(checked)
            await self._loader.prove(name, checked, adapter)
            await claim.settle(version, adapter, adapter.nbytes)  # which knows how large it really is
            return adapter
