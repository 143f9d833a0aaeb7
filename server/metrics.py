"""Every Prometheus series of the server, in one place. An application has its own registry, so nothing is global."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """The series. Labels never hold what a client can invent: a route's template, a status, an adapter that exists."""

    def __init__(self) -> None:
        """Registers all of them in a registry of their own."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("adapterd_requests", "HTTP requests answered.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "adapterd_request_seconds",
            "From the request's first byte to the last of the answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.texts = Counter("adapterd_texts", "Texts answered.", ["adapter"], registry=registry)
        self.tokens = Counter("adapterd_tokens", "Tokens answered.", ["adapter"], registry=registry)
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
        self.queue_tokens = Gauge("adapterd_queue_tokens", "Tokens waiting for a batch.", registry=registry)
        self.rejected = Counter("adapterd_rejected", "Requests refused with 429.", registry=registry)
        self.adapters_resident = Gauge("adapterd_adapters_resident", "Adapter versions in memory.", registry=registry)
        self.adapter_bytes = Gauge("adapterd_adapter_bytes", "Memory of the adapters in it.", registry=registry)
        self.adapter_loads = Counter(
            "adapterd_adapter_loads", "Adapter versions read from the store.", ["outcome"], registry=registry
        )
        self.releases = Counter("adapterd_releases", "Releases made by this process.", ["kind"], registry=registry)

    def render(self) -> bytes:
        """The text exposition of all series."""
        return generate_latest(self.registry)
