"""Every Prometheus series of the server, in one place. An application has its own registry, so nothing is global."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

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
        self.rejected = Counter("adapterd_rejected", "Requests refused unrun.", ["reason"], registry=registry)
        self.expired = Counter("adapterd_expired", "Requests whose deadline passed.", registry=registry)
        self.cancelled = Counter("adapterd_cancelled", "Requests whose client hung up.", registry=registry)
        self.quarantined = Gauge(
            "adapterd_quarantined_adapters", "Versions in quarantine.", ["adapter"], registry=registry
        )
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
        self._shadow_label = Bounded(adapters, (OTHER, OTHER))
        self._shadow_texts = Counter(
            "adapterd_shadow_texts",
            "Texts that a shadow version computed, or did not.",
            ["adapter", "version", "outcome"],
            registry=registry,
        )
        self.releases = Counter("adapterd_releases", "Releases made by this process.", ["kind"], registry=registry)

    def count_shadow(self, adapter: str, version: str, outcome: str, texts: int) -> None:
        """Texts of an adapter that a shadow version of it has computed, or not. Called on the event loop only."""
        self._shadow_texts.labels(*self._shadow_label((adapter, version)), outcome).inc(texts)

    def render(self) -> bytes:
        """The text exposition of all series."""
        return generate_latest(self.registry)
