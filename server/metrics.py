"""Every Prometheus series of the server, in one place. An application has its own registry, so nothing is global."""

import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.core import StoreCall

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

ADAPTERS = 100
"""Adapters with series of their own, unless told otherwise."""

OTHER = "other"
"""The label of all adapters that have no series of their own, and of one that is called so."""

T = TypeVar("T", bound=Hashable)


class Bounded(Generic[T]):
    """Who gets series of their own: the first so many that come up. They keep them, and the others share one, so that
    no total ever goes backwards."""

    def __init__(self, limit: int, other: T) -> None:
        """`other` stands for all that come later."""
        self._limit = limit
        self._other = other
        self._own: set[T] = set()

    def __call__(self, one: T) -> T:
        """What its counts go under. Called on the event loop only."""
        if one not in self._own:
            if len(self._own) >= self._limit:
                return self._other
            self._own.add(one)
        return one


class AnsweredByAdapter(Collector):
    """Texts and tokens of each adapter, as far as adapters have series of their own."""

    def __init__(self, adapters: int) -> None:
        self._label = Bounded(adapters, OTHER)
        self._totals: dict[str, tuple[int, int]] = {}

    def add(self, adapter: str, *, texts: int, tokens: int) -> None:
        """Called on the event loop only."""
        adapter = self._label(adapter)
        known_texts, known_tokens = self._totals.get(adapter, (0, 0))
        self._totals[adapter] = known_texts + texts, known_tokens + tokens

    def collect(self) -> Iterable[Metric]:
        """The two series."""
        texts = CounterMetricFamily("adapterd_texts", "Texts answered.", labels=["adapter"])
        tokens = CounterMetricFamily("adapterd_tokens", "Tokens answered.", labels=["adapter"])
        for adapter, totals in list(self._totals.items()):
            texts.add_metric([adapter], totals[0])
            tokens.add_metric([adapter], totals[1])
        return texts, tokens


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter in memory."""

    adapter: str
    level: str
    """`gpu`: ready to run, whatever the device is; `cpu`: in the host's memory, from where it has to be copied."""
    pinned: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the engine is at when somebody looks."""

    requests_waiting: int = 0
    """Requests of which nothing runs yet."""
    requests_running: int = 0
    queue_share: float = 0.0
    """Of the queue: how much is taken, 0 to 1."""
    running_adapters: Sequence[str] = ()
    waiting_adapters: Sequence[str] = ()
    loaded: Sequence[Loaded] = ()
    ready: int = 0
    """Versions that are ready to run."""
    capacity: int = 1
    """How many fit, of the mean size of those."""
    text_rows: int = 0
    """Rows of forwards that were a text's, since the start."""
    computed_rows: int = 0
    """All of them, padding and filler included."""


class Live(Collector):
    """What is known only at the moment of a scrape. Beside two counters, it is the series by which gateways choose a
    server: vLLM's names, since the endpoint picker of the Gateway API inference extension knows those."""

    def __init__(self, load_seconds: Histogram) -> None:
        self._load_seconds = load_seconds
        self.snapshot = Snapshot()
        """What the next scrape tells."""

    def collect(self) -> Iterable[Metric]:
        """All series, each once: a gateway takes the last of several that it finds."""
        now = self.snapshot
        gauges = {
            "vllm:num_requests_waiting": ("Requests of which nothing runs yet.", now.requests_waiting),
            "vllm:num_requests_running": ("Requests in the running batch.", now.requests_running),
            "vllm:kv_cache_usage_perc": ("Share of the queue that is taken, 0 to 1.", now.queue_share),
            "vllm:num_gpu_loaded_lora_adapters": ("Adapter versions that are ready to run.", now.ready),
            "vllm:max_gpu_lora_adapters": ("How many of their mean size fit.", now.capacity),
        }
        for name, (documentation, value) in gauges.items():
            yield GaugeMetricFamily(name, documentation, value)
        requests = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters at work, as of this unix time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        # Without spaces: readers split at the comma and do not trim.
        names = [",".join(adapters) for adapters in (now.running_adapters, now.waiting_adapters)]
        requests.add_metric([str(now.capacity), *names], time.time())
        yield requests
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded", "Adapters in memory.", labels=["adapter_name", "level", "pinned"]
        )
        for one in now.loaded:
            loaded.add_metric([one.adapter, one.level, str(one.pinned).lower()], 1)
        yield loaded
        yield _renamed(self._load_seconds, "vllm:lora_adapter_load_seconds")
        yield CounterMetricFamily("adapterd_text_rows", "Rows of forwards that were a text's.", now.text_rows)
        yield CounterMetricFamily(
            "adapterd_computed_rows", "Rows of forwards, with padding and filler.", now.computed_rows
        )


def _renamed(histogram: Histogram, name: str) -> Metric:
    """The same values under another name."""
    [metric] = histogram.collect()
    renamed = Metric(name, metric.documentation, metric.type)
    renamed.samples = [
        sample._replace(name=f"{name}{sample.name.removeprefix(metric.name)}") for sample in metric.samples
    ]
    return renamed


class Metrics:
    """The series. Labels never hold what a client can invent: a route's template, a status, an adapter that exists."""

    def __init__(self, adapters: int = ADAPTERS) -> None:
        """Registers all of them in a registry of their own. `adapters`: how many get series of their own."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("adapterd_requests", "HTTP requests answered.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "adapterd_request_seconds",
            "From the request's first byte to the last of the answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.answered = AnsweredByAdapter(adapters)
        registry.register(self.answered)
        self.batch_texts = Histogram("adapterd_batch_texts", "Texts in a batch.", buckets=SIZES, registry=registry)
        self.batch_tokens = Histogram("adapterd_batch_tokens", "Tokens in a batch.", buckets=TOKENS, registry=registry)
        self.batch_adapters = Histogram(
            "adapterd_batch_adapters", "Different adapters in a batch.", buckets=SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "adapterd_batch_seconds", "Time of a batch on the device.", buckets=SECONDS, registry=registry
        )
        self.batch_failures = Counter(
            "adapterd_batch_failures", "Batches that ended in an exception.", registry=registry
        )
        self.queue_seconds = Histogram(
            "adapterd_queue_seconds", "Wait of a text from admission to its batch.", buckets=SECONDS, registry=registry
        )
        self.queue_tokens = Gauge(
            "adapterd_queue_tokens", "Tokens waiting for a batch.", ["priority"], registry=registry
        )
        self.throughput = Gauge(
            "adapterd_throughput_tokens", "Tokens a second while work waits, smoothed.", registry=registry
        )
        self.batch_budget = Gauge("adapterd_batch_budget_tokens", "Token budget of a batch now.", registry=registry)
        self.tokenize_seconds = Histogram(
            "adapterd_tokenize_seconds",
            "Tokenizing the inputs of a request, the wait for a thread included.",
            buckets=SECONDS,
            registry=registry,
        )
        self.store_seconds = Histogram(
            "adapterd_store_seconds",
            "Calls of the adapter store, further tries included.",
            ["operation", "outcome"],
            buckets=SECONDS,
            registry=registry,
        )
        self.adapter_lookups = Counter(
            "adapterd_adapter_lookups",
            "Adapters that requests asked for, by whether they were ready to run.",
            ["outcome"],
            registry=registry,
        )
        self.rejected = Counter("adapterd_rejected", "Requests refused unrun.", ["reason"], registry=registry)
        self.expired = Counter("adapterd_expired", "Requests whose deadline passed.", registry=registry)
        self.cancelled = Counter("adapterd_cancelled", "Requests whose client hung up.", registry=registry)
        self._quarantined_gauge = Gauge(
            "adapterd_quarantined_adapters", "Versions in quarantine.", ["adapter"], registry=registry
        )
        self._quarantined: dict[str, tuple[str, int]] = {}  # adapter -> its label, versions
        self._adapters = adapters
        self.adapters_resident = Gauge(
            "adapterd_adapters_resident", "Adapter versions in memory.", ["memory"], registry=registry
        )
        self.adapter_bytes = Gauge(
            "adapterd_adapter_bytes", "Memory of the adapters in it, and on their way.", ["memory"], registry=registry
        )
        self.memory_budget_bytes = Gauge(
            "adapterd_memory_budget_bytes", "Memory that adapters may take.", ["memory"], registry=registry
        )
        self.evictions = Counter(
            "adapterd_evictions", "Adapter versions that left to make room.", ["memory"], registry=registry
        )
        self.pinned = Gauge("adapterd_pinned_adapters", "Adapters pinned and in memory.", registry=registry)
        self.adapter_loads = Counter(
            "adapterd_adapter_loads", "Adapter versions loaded for requests.", ["outcome"], registry=registry
        )
        self.adapter_load_seconds = Histogram(
            "adapterd_adapter_load_seconds",
            "From a request for an adapter that is not in memory until it is.",
            buckets=SECONDS,
            registry=registry,
        )
        self.live = Live(self.adapter_load_seconds)
        registry.register(self.live)
        self._shadow_label = Bounded(adapters, (OTHER, OTHER))
        self._shadow_texts = Counter(
            "adapterd_shadow_texts",
            "Texts that a shadow version computed, or did not.",
            ["adapter", "version", "outcome"],
            registry=registry,
        )
        self._keys_reread = Gauge(
            "adapterd_api_keys_last_reload_successful",
            "1, or 0 where the file of API keys has changed to what cannot be used.",
            registry=registry,
        )
        self._keys_reread.set(1)
        self.releases = Counter("adapterd_releases", "Releases made by this process.", ["kind"], registry=registry)

    def store_call(self, call: StoreCall) -> None:
        """A call of the adapter store has ended. From any thread."""
        self.store_seconds.labels(call.operation, call.outcome).observe(call.seconds)

    def count_quarantined(self, adapter: str, change: int) -> None:
        """One version of an adapter more in quarantine, or one less. The caller holds a lock.

        A label stays with an adapter as long as it is there; nobody's series is there any more.
        """
        label, versions = self._quarantined.get(adapter) or (self._free_label(adapter), 0)
        self._quarantined_gauge.labels(label).inc(change)
        if versions + change:
            self._quarantined[adapter] = label, versions + change
            return
        del self._quarantined[adapter]
        if all(label != other for other, _ in self._quarantined.values()):
            self._quarantined_gauge.remove(label)

    def _free_label(self, adapter: str) -> str:
        own = sum(label != OTHER for label, _ in self._quarantined.values())
        return adapter if own < self._adapters else OTHER

    def keys_reread(self, usable: bool) -> None:
        """The file of API keys has been read anew."""
        self._keys_reread.set(usable)

    def count_shadow(self, adapter: str, version: str, outcome: str, texts: int) -> None:
        """Texts of an adapter that a shadow version of it has computed, or not. Called on the event loop only."""
        self._shadow_texts.labels(*self._shadow_label((adapter, version)), outcome).inc(texts)

    def render(self) -> bytes:
        """The text exposition of all series."""
        return generate_latest(self.registry)
