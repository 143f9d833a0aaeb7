"""Structured logs: one configuration, libraries' own logs through the same pipe, and the ids of the request and of its
trace in every line that a request causes on the event loop."""

import logging
import sys

import stamina.instrumentation
import structlog
from asgi_correlation_id import correlation_id
from structlog.typing import EventDict, WrappedLogger

from server import tracing

AUDIT = "adapterd.audit"
"""The logger that tells who did what to the adapters. Its lines come out whatever the level."""


def _ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if (request_id := correlation_id.get()) is not None:
        event["request_id"] = request_id
    event.update(tracing.ids())
    return event


def configure(level: str, style: str) -> None:
    """Logs to standard error, as `console` or `json`; `auto` decides by whether a person is looking."""
    if style == "auto":
        style = "console" if sys.stderr.isatty() else "json"
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _ids,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]  # rich prints tensors
        if style == "console"
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        # what is not logged costs nothing more than to find that out
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    set_level(level)
    for name, quiet in (("uvicorn.access", logging.WARNING), ("httpx", logging.WARNING)):
        logging.getLogger(name).setLevel(quiet)  # our own access line has the route, the time and the request id
    logging.getLogger(AUDIT).setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "transformers", "huggingface_hub"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    stamina.instrumentation.set_on_retry_hooks([])  # who tries again logs the last failure, without debugging dumps


def set_level(level: str) -> str:
    """From here on, the least severe line logged; audit lines come out at any. Returns the level before."""
    root = logging.getLogger()
    before = logging.getLevelName(root.level).lower()
    root.setLevel(level.upper())
    logging.getLogger("transformers").setLevel(max(logging.WARNING, root.level))
    return str(before)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that takes keyword arguments as fields."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
