"""One text through eight adapters: against one adapter, and against eight copies that share nothing.

    python -m benchmarks.fanout --json

Everything runs in one process over the engine's runner, interleaved round by round, and the medians are compared; so
the ratios hold on a noisy machine where the milliseconds do not. `copies` are equal texts of different requests, each
computed for itself.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.engine import BACKBONE, RANK, make_adapters, medians, print_table, rounded
from server.backbone.backbone import Backbone
from server.core import ClassifyOptions, Encoding
from server.engine.runner import Row, Runner
from server.tasks.adapter import TaskAdapter

ADAPTERS = 8
LENGTHS = (32, 128)
TOP_LAYERS = 2


def make_text(length: int) -> Encoding:
    """The same ids each time, as another object."""
    ids = torch.randint(1000, 30000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Encoding(tuple(ids), (0,) * length, truncated=False)


def measure(backbone: Backbone, length: int, rounds: int) -> dict[str, Any]:
    """All figures for one length of text."""
    lora = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["query", "value"]}
    top = [*range(backbone.spec.num_layers - TOP_LAYERS, backbone.spec.num_layers)]
    generator = torch.Generator().manual_seed(0)

    def adapters_of(method: str, options: dict[str, Any]) -> list[TaskAdapter]:
        return make_adapters(backbone, generator, [(method, options)], ADAPTERS)[0]

    heads = adapters_of("head_only", {})
    everywhere = adapters_of("lora", lora)
    above = adapters_of("lora", lora | {"layers_to_transform": top})
    runner = Runner(backbone)

    def fanout(adapters: list[TaskAdapter]) -> Callable[[], object]:
        text = make_text(length)
        return partial(runner.run, [Row(text, adapter, ClassifyOptions()) for adapter in adapters])

    def copies(adapters: list[TaskAdapter]) -> Callable[[], object]:
        return partial(runner.run, [Row(make_text(length), adapter, ClassifyOptions()) for adapter in adapters])

    median = medians(
        {
            "one_head": fanout(heads[:1]),
            "heads": fanout(heads),
            "lora": fanout(everywhere),
            "lora_copies": copies(everywhere),
            "top": fanout(above),
            "top_copies": copies(above),
        },
        rounds,
    )
    return {
        "heads_over_one": median["heads"] / median["one_head"],
        "lora_over_copies": median["lora"] / median["lora_copies"],
        "top_over_copies": median["top"] / median["top_copies"],
        **{f"{name}_ms": value * 1000 for name, value in median.items()},
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    report: dict[str, Any] = {"adapters": ADAPTERS, "top_layers": TOP_LAYERS, "threads": torch.get_num_threads()}
    for dtype in options.dtype or ["float32", "bfloat16"]:
        backbone = Backbone.load(BACKBONE, device=options.device, dtype=dtype)
        report[dtype] = {f"{length}_tokens": rounded(measure(backbone, length, options.rounds)) for length in LENGTHS}
    if options.json:
        print(json.dumps(report))
        return
    print_table(report)


if __name__ == "__main__":
    main()
