"""Spans of OpenTelemetry (extra `otel`). The only module that knows it.

Names and attributes follow OpenTelemetry's semantic conventions where they have any; ours begin with `adapterd.`. The
spans of HTTP requests are FastAPI's own, made with `provider`.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from urllib.parse import urlsplit

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server import __version__
from server.core import StoreCall
from server.errors import AdapterdError
from server.tracing import Attributes, Place, Tracing

STOP_SECONDS = 2.0
"""How long stopping waits for the collector. One that hangs must not keep the process."""

EXPORTERS = {"otlp": OTLPSpanExporter, "console": ConsoleSpanExporter}

W3C = TraceContextTextMapPropagator()


class OpenTelemetry(Tracing):
    """Makes spans and hands them to processors. Nothing of it is global."""

    def __init__(self, processors: Sequence[SpanProcessor], sampler: Sampler | None = None) -> None:
        """`sampler`: by default what OpenTelemetry's variables say."""
        # Variables win over our names, those over what the library would call us.
        resource = (
            Resource.create()
            .merge(Resource({"service.name": "adapterd", "service.version": __version__}))
            .merge(OTELResourceDetector().detect())
        )
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        # Of a batch there is a span if there is one of any request in it: chance decides of requests only.
        batches = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
        for provider in (self._provider, batches):
            for processor in processors:
                provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("adapterd", __version__)
        self._batches = batches.get_tracer("adapterd", __version__)

    @classmethod
    def exporting(cls, exporters: Sequence[str]) -> "OpenTelemetry":
        """To the exporters of these names, which read OpenTelemetry's variables for all the rest."""
        return cls([BatchSpanProcessor(EXPORTERS[name]()) for name in exporters])

    @property
    def provider(self) -> TracerProvider:
        """See Tracing."""
        return self._provider

    def note(self, attributes: Attributes) -> None:
        """See Tracing."""
        trace.get_current_span().set_attributes(attributes)

    def span(self, name: str, attributes: Attributes | None = None) -> AbstractContextManager[None]:
        """See Tracing."""
        return self._span(name, attributes)

    @contextmanager
    def outgoing(self, method: str, url: str) -> Iterator[dict[str, str]]:
        """See Tracing."""
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        attributes: Attributes = {
            "http.request.method": method,
            "url.full": parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),
            "server.address": parts.hostname or "",
            "server.port": port,
        }
        with self._span(method, attributes, SpanKind.CLIENT):
            headers: dict[str, str] = {}
            propagate.inject(headers)
            yield headers

    def answer_headers(self) -> dict[str, str]:
        """See Tracing: `traceresponse`, of the W3C's draft of Trace Context 2."""
        carrier: dict[str, str] = {}
        W3C.inject(carrier)
        return {"traceresponse": carrier["traceparent"]} if carrier else {}

    def store_call(self, call: StoreCall) -> None:
        """See Tracing."""
        if (parent := _sampled()) is None:
            return
        end = time.time_ns()
        self._past(
            f"store {call.operation}",
            parent,
            (end - _nanoseconds(call.seconds), end),
            error=call.outcome if call.failed else None,
            attributes={
                "adapterd.store.operation": call.operation,
                "adapterd.store.key": call.key,
                "adapterd.store.attempts": call.attempts,
                "adapterd.store.outcome": call.outcome,
            },
            kind=SpanKind.CLIENT,
        )

    def place(self) -> Place | None:
        """See Tracing."""
        context = _sampled()
        return None if context is None else Place(context, time.time_ns())

    def batch_ran(self, requests: Mapping[Place, str | None], seconds: float, attributes: Attributes) -> None:
        """See Tracing."""
        end = time.time_ns()
        start = end - _nanoseconds(seconds)
        links = [Link(place.context) for place in requests]
        batch = self._batches.start_span("batch", Context(), attributes=attributes, links=links, start_time=start)
        batch.end(end)
        link = Link(batch.get_span_context())
        for place, error in requests.items():
            self._past("queue", place.context, (place.since, start))
            self._past("compute", place.context, (start, end), error=error, links=[link])

    def never_ran(self, place: Place, error: str) -> None:
        """See Tracing."""
        self._past("queue", place.context, (place.since, time.time_ns()), error=error)

    def stop(self) -> None:
        """See Tracing."""
        stopping = threading.Thread(target=self._provider.shutdown, name="adapterd-last-spans", daemon=True)
        stopping.start()
        stopping.join(STOP_SECONDS)

    def _span(
        self, name: str, attributes: Attributes | None, kind: SpanKind = SpanKind.INTERNAL
    ) -> AbstractContextManager[None]:
        return nullcontext() if _sampled() is None else self._sampled_span(name, attributes, kind)

    @contextmanager
    def _sampled_span(self, name: str, attributes: Attributes | None, kind: SpanKind) -> Iterator[None]:
        # The library would note an error's words, which may be a client's.
        with self._tracer.start_as_current_span(
            name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                code = error.error_code if isinstance(error, AdapterdError) else type(error).__qualname__
                span.set_attribute("error.type", code)
                span.set_status(StatusCode.ERROR)
                raise

    def _past(
        self,
        name: str,
        parent: SpanContext,
        times: tuple[int, int],
        *,
        error: str | None = None,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
    ) -> None:
        """A span of what is over, from and until a time in nanoseconds."""
        start, end = times
        below = trace.set_span_in_context(NonRecordingSpan(parent), Context())
        span = self._tracer.start_span(
            name, below, kind=kind, attributes=attributes, links=links, start_time=min(start, end)
        )
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR)
        span.end(end)


def _sampled() -> SpanContext | None:
    """Of the current span, though it be over: what a request leaves behind belongs to its trace as well."""
    context = trace.get_current_span().get_span_context()
    return context if context.trace_flags.sampled else None


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
