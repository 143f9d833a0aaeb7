"""One hot adapter beside fifteen others on a server that has too much to do: what the others notice of it, over HTTP.

    python -m benchmarks.fairness --json

Sixteen adapters, eight texts a request, so that the device is what is short and not HTTP. In every other slice the
sixteenth adapter gets twenty times the load of each of the others. Calm slices and such with the hot adapter alternate,
so that a noisy machine disturbs both. There are two parts:

`saturated`   the fifteen alone fill the server: `--clients` (4) for each of them, without pauses; and twenty times as
              many for the hot one.
`open_loop`   requests come at random and do not wait for each other. The fifteen share `--load` (0.6) of the throughput
              that clients without pauses reached at the start; with the hot one, whose requests come at twenty times
              the rate of each of the others, there is more to do than the server can.

`p99_ratio` compares the fifteen's latency in all slices with the hot adapter with that in all calm ones;
`p99_ratio_of_slices` is the median over pairs of neighbouring slices. `others_ok` and `hot_ok`: shares of the requests
that were answered with 200, the hot adapter's being what its share of the server comes to.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import uvloop
from transformers.utils import logging

from benchmarks.serving import (
    BACKBONE,
    Answered,
    Arrivals,
    Clients,
    Connection,
    Server,
    Slice,
    classify_request,
    make_artifact,
    make_texts,
    percentile_ms,
    print_report,
    say,
    serve,
    upload_request,
)
from server.backbone.backbone import Backbone

OTHERS = 15
HOT = "hot"
TIMES = 20
"""The hot adapter's requests over those of each other one."""
REQUESTS = 64
TEXTS = 8
"""Of a request."""
WARM_UP_SECONDS = 4.0
SATURATED_SECONDS = 4.0


async def upload(port: int, names: Sequence[str]) -> None:
    """An adapter under each name."""
    backbone = Backbone.load(BACKBONE, device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    connection = await Connection.open(port)
    for name in names:
        artifact = make_artifact(backbone, generator, ["no", "yes"])
        answer = await connection.ask(name, upload_request(name, artifact))
        assert answer.status == 201, answer.body
    connection.close()


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    others = [f"other-{index}" for index in range(OTHERS)]
    await upload(server.port, [HOT, *others])
    texts = make_texts(REQUESTS * TEXTS)
    inputs = [json.dumps(texts[first : first + TEXTS]).encode() for first in range(0, len(texts), TEXTS)]
    requests = {name: [(name, classify_request(name, one)) for one in inputs] for name in (HOT, *others)}
    chooser = random.Random(1)

    def of_others() -> tuple[Any, bytes]:
        return chooser.choice(requests[chooser.choice(others)])

    def of_hot() -> tuple[Any, bytes]:
        return chooser.choice(requests[HOT])

    clients = Clients(server.port, OTHERS * options.clients, of_others)
    crowd = Clients(server.port, TIMES * options.clients, of_hot)
    await clients.run(WARM_UP_SECONDS)
    saturated = (await clients.run(SATURATED_SECONDS)).throughput
    say(f"{saturated:.0f} requests/s saturated")
    filled = await _compare(options, clients.run, crowd.run)
    rate = options.load * saturated
    hot_rate = rate / OTHERS * TIMES
    say(f"open loop: the others {rate:.0f}/s, the hot one {hot_rate:.0f}/s")
    quiet, hot = Arrivals(server.port, of_others, seed=2), Arrivals(server.port, of_hot, seed=3)
    arriving = await _compare(
        options, lambda seconds: quiet.run(seconds, rate), lambda seconds: hot.run(seconds, hot_rate)
    )
    quiet.close()
    hot.close()
    return {
        "saturated_rps": saturated,
        "saturated": filled,
        "open_loop": {"others_rps": rate, "hot_rps": hot_rate, "load": (rate + hot_rate) / saturated, **arriving},
    }


Load = Callable[[float], Awaitable[Slice]]
"""Loads the server for so many seconds."""


async def _compare(options: argparse.Namespace, others: Load, hot: Load) -> dict[str, Any]:
    """What becomes of the others in slices with the hot adapter and in such without."""
    seconds = options.seconds / options.slices
    calm: list[Slice] = []
    beside: list[Slice] = []
    hot_ones: list[Slice] = []
    for index in range(options.slices):
        calm.append(await others(seconds))
        disturbed, loud = await asyncio.gather(others(seconds), hot(seconds))
        beside.append(disturbed)
        hot_ones.append(loud)
        say(f"slice {index + 1} of {options.slices}: p99 {_p99(calm[-1:]):.1f} ms calm, {_p99(beside[-1:]):.1f} beside")
    return {
        "calm_p50_ms": percentile_ms(_ok(calm), 50),
        "calm_p99_ms": _p99(calm),
        "beside_p50_ms": percentile_ms(_ok(beside), 50),
        "beside_p99_ms": _p99(beside),
        "p99_ratio": _p99(beside) / _p99(calm),
        "p99_ratio_of_slices": statistics.median(
            _p99([after]) / _p99([before]) for before, after in zip(calm, beside, strict=True)
        ),
        "calm_others_rps": _throughput(calm),
        "beside_others_rps": _throughput(beside),
        "hot_rps": _throughput(hot_ones),
        "others_ok": len(_ok(beside)) / sum(len(one.answers) for one in beside),
        "calm_ok": len(_ok(calm)) / sum(len(one.answers) for one in calm),
        "hot_ok": len(_ok(hot_ones)) / sum(len(one.answers) for one in hot_ones),
        "hot_p99_ms": _p99(hot_ones),
        "statuses": {
            str(status): count
            for status, count in sorted(
                Counter(answer.status for one in (*calm, *beside, *hot_ones) for answer in one.answers).items()
            )
        },
    }


def _throughput(slices: Sequence[Slice]) -> float:
    return len(_ok(slices)) / sum(one.seconds for one in slices)


def _ok(slices: Sequence[Slice]) -> list[Answered]:
    return [answer for one in slices for answer in one.answers if answer.status == 200]


def _p99(slices: Sequence[Slice]) -> float:
    return percentile_ms(_ok(slices), 99)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of each part with the hot adapter; as many without"
    )
    parser.add_argument("--slices", type=int, default=5, help="into which the seconds are cut")
    parser.add_argument("--clients", type=int, default=4, help="of each of the fifteen, saturated")
    parser.add_argument("--load", type=float, default=0.6, help="of the fifteen, in the open loop, of the throughput")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        say("starting the server")
        with serve(Path(folder, "store"), Path(folder, "log"), log_level="warning") as server:
            figures = uvloop.run(measure(server, options))
    print_report(figures, options.json)


if __name__ == "__main__":
    main()
