"""Which adapters are in memory."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from server.engine.once import Once
from server.metrics import Metrics
from server.tasks.adapter import TaskAdapter


class Residency:
    """Adapter versions in memory, least recently used first out, within a budget in bytes.

    A request holds its adapter by reference, so one that leaves here while it is running is freed when it is done.
    """

    def __init__(
        self, load: Callable[[str, str], TaskAdapter], executor: Executor, *, max_bytes: int, metrics: Metrics
    ) -> None:
        """`load(name, version)` reads a version from the store; it runs on `executor`."""
        self._load = load
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._resident: OrderedDict[str, TaskAdapter] = OrderedDict()  # by version: the same content is held once
        self._bytes = 0
        self._loads = Once[TaskAdapter](executor)

    def __contains__(self, version: str) -> bool:
        """Whether a version is in memory."""
        return version in self._resident

    async def get(self, name: str, version: str) -> TaskAdapter:
        """The adapter, from memory or loaded beside serving; requests for one that is on its way share the load."""
        if version in self._resident:
            self._resident.move_to_end(version)
            return self._resident[version]
        adapter = await self._loads.call(version, partial(self._counted, name, version))
        self.put(version, adapter)
        return adapter

    def _counted(self, name: str, version: str) -> TaskAdapter:
        try:
            adapter = self._load(name, version)
        except Exception:
            self._metrics.adapter_loads.labels("failure").inc()
            raise
        self._metrics.adapter_loads.labels("success").inc()
        return adapter

    def put(self, version: str, adapter: TaskAdapter) -> None:
        """Keeps an adapter; the least recently used leave until the budget holds, except for this one."""
        if version in self._resident:
            return
        self._resident[version] = adapter
        self._bytes += adapter.nbytes
        while self._bytes > self._max_bytes and len(self._resident) > 1:
            _, evicted = self._resident.popitem(last=False)
            self._bytes -= evicted.nbytes
        self._metrics.adapters_resident.set(len(self._resident))
        self._metrics.adapter_bytes.set(self._bytes)
