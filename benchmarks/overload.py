"""Five times more requests than a server can answer, over HTTP: what comes of those that it takes, and how it recovers.

    python -m benchmarks.overload --json

Sixteen texts a request, so that the device is what is short and not HTTP, for eight adapters. First the throughput of
clients without pauses, the peak; then `--seconds` (60) of open loop at `--times` (5) that rate, each request with a
deadline of `--deadline-ms` (2000); then open loop at half the peak; then the peak once more, since a machine that is
shared with others is not the same a minute later.

`goodput_ratio`      requests answered with 200 a second under overload, over the mean of the peaks before and after.
`p99_ratio`          of the 200s under overload, from the moment at which a request was due: p99 over the deadline.
`other_5xx`          answers that are neither 200, 429, 503 nor 504, and lost connections.
`rss_growth_mb`      the server's resident memory at the end of the overload, less that after its first third.
`recovery_seconds`   from the end of the overload until the last request that was not answered with 200, or took longer
                     than `RECOVERED` times the median before the overload and than any then; 0 where there was none.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from transformers.utils import logging

from benchmarks.fairness import upload
from benchmarks.serving import (
    Answered,
    Arrivals,
    Clients,
    Server,
    http_request,
    make_texts,
    percentile_ms,
    print_report,
    say,
    serve,
)

ADAPTERS = 8
REQUESTS = 64
TEXTS = 16
CLIENTS = 32
WARM_UP_SECONDS = 4.0
PEAK_SECONDS = 8.0
CALM_SECONDS = 5.0
RECOVERY_SECONDS = 8.0
CALM_LOAD = 0.5
RECOVERED = 5.0
"""Times the calm median: longer than that, and than whatever was calm, is still disturbed."""


def drawing(names: list[str], deadline_ms: int | None) -> Callable[[], tuple[Any, bytes]]:
    """Requests at random; with a deadline."""
    texts = make_texts(REQUESTS * TEXTS)
    limit = {} if deadline_ms is None else {"timeout_ms": deadline_ms}
    requests = [
        (name, http_request("POST", "/classify", json.dumps({"adapter": name, "inputs": inputs, **limit}).encode()))
        for name in names
        for inputs in (texts[first : first + TEXTS] for first in range(0, len(texts), TEXTS))
    ]
    chooser = random.Random(1)
    return lambda: chooser.choice(requests)


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    names = [f"adapter-{index}" for index in range(ADAPTERS)]
    await upload(server.port, names)
    clients = Clients(server.port, CLIENTS, drawing(names, None))
    await clients.run(WARM_UP_SECONDS)
    peak = (await clients.run(PEAK_SECONDS)).throughput
    say(f"{peak:.1f} requests/s at the peak")
    patient = Arrivals(server.port, drawing(names, None), seed=2)
    calm = await patient.run(CALM_SECONDS, CALM_LOAD * peak)
    calm_median = percentile_ms(calm.answers, 50)
    pressing = Arrivals(server.port, drawing(names, options.deadline_ms), seed=3)
    first = await pressing.run(options.seconds / 3, options.times * peak)
    early = server.memory()
    rest = await pressing.run(options.seconds * 2 / 3, options.times * peak)
    late = server.memory()
    say(f"{len(first.answers) + len(rest.answers)} requests in overload")
    after = await patient.run(RECOVERY_SECONDS, CALM_LOAD * peak)
    peak_after = (await clients.run(PEAK_SECONDS)).throughput
    counts = server.counts()
    for one in (patient, pressing):
        one.close()
    answers = first.answers + rest.answers
    good = [answer for answer in answers if answer.status == 200]
    refused = Counter(_code(answer) for answer in answers if answer.status != 200)
    return {
        "peak_rps": peak,
        "peak_after_rps": peak_after,
        "offered_rps": len(answers) / options.seconds,
        "goodput_rps": len(good) / options.seconds,
        "goodput_ratio": len(good) / options.seconds / ((peak + peak_after) / 2),
        "deadline_ms": options.deadline_ms,
        "p50_ms": percentile_ms(good, 50),
        "p99_ms": percentile_ms(good, 99),
        "p99_ratio": percentile_ms(good, 99) / options.deadline_ms,
        "refused_p99_ms": percentile_ms([answer for answer in answers if answer.status == 429], 99),
        "other_5xx": sum(answer.status not in (200, 429, 503, 504) for answer in answers),
        "answers": {str(status): count for status, count in sorted(Counter(one.status for one in answers).items())},
        "refused": dict(refused),
        "rss_mb": late / 2**20,
        "rss_growth_mb": (late - early) / 2**20,
        "throughput_tokens": counts["adapterd_throughput_tokens"],
        "calm_median_ms": calm_median,
        "after_median_ms": percentile_ms(after.answers, 50),
        "recovery_seconds": _recovery(
            after.answers, max(RECOVERED * calm_median, percentile_ms(calm.answers, 100)) / 1000
        ),
    }


def _code(answer: Answered) -> str:
    return str(json.loads(answer.body)["error"]["code"]) if answer.body else "lost"


def _recovery(answers: list[Answered], limit: float) -> float:
    """Seconds from the first to the last that was not answered as before."""
    start = min(answer.sent for answer in answers)
    disturbed = [answer.sent - start for answer in answers if answer.status != 200 or answer.seconds > limit]
    return max(disturbed, default=0.0)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--times", type=float, default=5.0, help="the peak")
    parser.add_argument("--deadline-ms", type=int, default=2000)
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        say("starting the server")
        with serve(Path(folder, "store"), Path(folder, "log"), log_level="error") as server:
            figures = uvloop.run(measure(server, options))
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
