"""What the server tells of a request's way, for traces. Here nothing becomes of it; `otel.py` makes spans of it."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from server.core import AdapterRef, StoreCall
from server.errors import BadConfiguration

Attributes = Mapping[str, str | int | Sequence[str]]

EXPORTER = "OTEL_TRACES_EXPORTER"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where in a trace a request stood when it joined the queue: the device's thread knows no other. Equal to itself
    only."""

    context: Any
    """Of the span that was current, as OpenTelemetry has it."""
    since: int
    """Unix time, in nanoseconds."""


class Tracing:
    """No spans at all: what every part of the server is given unless somebody asks for traces.

    Spans belong to a request whose trace is sampled. What the server does for itself has none.
    """

    @property
    def provider(self) -> Any | None:
        """OpenTelemetry's tracer provider, for the spans of HTTP requests; None: there are none."""
        return None

    def note(self, attributes: Attributes) -> None:
        """More about the current span."""

    def span(self, name: str, attributes: Attributes | None = None) -> AbstractContextManager[None]:
        """What happens meanwhile, as a span below the current one."""
        return nullcontext()

    @contextmanager
    def outgoing(self, method: str, url: str) -> Iterator[dict[str, str]]:
        """A span for a request of ours to another server: yields the headers that take the trace along."""
        yield {}

    def answer_headers(self) -> dict[str, str]:
        """What tells a client which trace its request is in."""
        return {}

    def store_call(self, call: StoreCall) -> None:
        """A call of the adapter store has just ended."""

    def place(self) -> Place | None:
        """For a request that joins the queue now; None: it is not traced."""
        return None

    def batch_ran(self, requests: Mapping[Place, str | None], seconds: float, attributes: Attributes) -> None:
        """A batch has just ended that took so long: the requests in it that are traced, each with the code of the
        error that it got. From any thread."""

    def never_ran(self, place: Place, error: str) -> None:
        """A request has just left the queue without having been in a batch. From any thread."""

    def stop(self) -> None:
        """Sends what is left. Blocks, for seconds at most."""


OFF = Tracing()


def about(refs: Iterable[AdapterRef]) -> Attributes:
    """Which adapters a span is about, in what versions."""
    named = [(ref.name, ref.version) for ref in refs]
    return {"adapterd.adapters": [name for name, _ in named], "adapterd.versions": [version for _, version in named]}


def exporters(environment: Mapping[str, str]) -> list[str]:
    """Where spans go by OpenTelemetry's variables: `otlp`, `console`; nowhere unless one of them asks for it.

    Raises BadConfiguration for what is not there.
    """

    def first(*names: str) -> tuple[str, str]:
        """The first variable with a value, and that; an empty one counts as none, says the specification."""
        return next(((name, value) for name in names if (value := environment.get(name, "").strip())), ("", ""))

    _, chosen = first(EXPORTER)
    variable, endpoint = first(*ENDPOINTS)
    if first("OTEL_SDK_DISABLED")[1].lower() == "true" or chosen == "none" or not (chosen or endpoint):
        return []
    found = [one.strip() for one in chosen.split(",")] if chosen else ["otlp"]
    for one in found:
        if one not in ("otlp", "console"):
            raise BadConfiguration(f"{EXPORTER}: {one!r} is none of otlp, console, none", param=EXPORTER)
    if "otlp" in found:
        _check_otlp(variable, endpoint, *first(*PROTOCOLS))
    return found


def _check_otlp(variable: str, endpoint: str, protocol_variable: str, protocol: str) -> None:
    if protocol not in ("", "http/protobuf"):
        raise BadConfiguration(
            f"{protocol_variable}: {protocol!r} is not spoken here; http/protobuf is, at port 4318 of most collectors",
            param=protocol_variable,
        )
    if endpoint and not _is_http(endpoint):
        raise BadConfiguration(f"{variable}: {endpoint!r} is no http:// or https:// address", param=variable)


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def ids() -> dict[str, str]:
    """`trace_id` and `span_id` of the current span, for a log line; nothing where there is none."""
    trace = sys.modules.get("opentelemetry.trace")  # who has not imported it has no span
    context = trace.get_current_span().get_span_context() if trace is not None else None
    if trace is None or context is None or not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
