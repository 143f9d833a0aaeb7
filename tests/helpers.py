"""Tiny random backbones of many families, and random texts and adapters for them."""

import asyncio
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple

import safetensors.torch
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from server.adapters import METHODS
from server.adapters.base import Host
from server.adapters.plan import AdapterPlan, Segment
from server.backbone.backbone import Backbone
from server.backbone.sites import FAMILIES
from server.backbone.tokenizer import Tokenizer
from server.core import BackboneSpec, Encoding, Pooling, Site
from server.engine.loading import Checker
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, Manifest
from server.store.store import AdapterStore
from server.tasks.adapter import Blueprint, TaskAdapter

CPU = torch.device("cpu")
VOCABULARY = 64
MAX_TOKENS = 220
LABELS = ("ant", "bee", "cat", "dog", "elk")

UNLISTED = ("mistral", "gpt_neox", "opt")
"""Families that sites.py does not list."""

EVERY_FAMILY = (*FAMILIES, *UNLISTED)

FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
    "electra": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 48},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 16,
        "type_vocab_size": 0,
    },
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}
"""Options that a family needs beside the common ones. One that is not here is tried with those alone."""

ALL: dict[str, Any] = {"target_modules": "all-linear"}
EMBEDDINGS: dict[str, Any] = {"target_modules": r".*(word_embeddings|tok_embeddings|embed_tokens|embed_in|wte)"}
"""PEFT matches a text against the whole of a module's path."""

PATTERNS: dict[str, Any] = {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 3, "nothing": 9}}
"""Another rank in the first layer, another alpha in the second."""

BOTTLENECKS = [
    {"mh_adapter": True, "non_linearity": "swish", "reduction_factor": 4},  # Houlsby
    {"original_ln_before": True, "reduction_factor": 8, "non_linearity": "relu"},  # Pfeiffer
    {"mh_adapter": True, "original_ln_after": False, "reduction_factor": 4},
    {"original_ln_after": False, "original_ln_before": True, "residual_before_ln": False, "reduction_factor": 4},
    {"is_parallel": True, "mh_adapter": True, "scaling": 4.0, "reduction_factor": 2, "non_linearity": "tanh"},
    {"is_parallel": True, "scaling": "learned", "ln_after": True, "use_gating": True, "reduction_factor": 4},
    {"is_parallel": True, "scaling": "channel", "ln_before": True, "original_ln_after": False, "reduction_factor": 4},
    {"ln_before": True, "ln_after": True, "scaling": "channel", "reduction_factor": 0.5, "non_linearity": "gelu"},
    {"ln_after": True, "adapter_residual_before_ln": True, "scaling": "learned", "mh_adapter": True},
    {"mh_adapter": True, "output_adapter": False, "original_ln_before": True, "residual_before_ln": "post_add"},
    {"use_gating": True, "scaling": 0.5, "reduction_factor": {"1": 4, "default": 8}, "mh_adapter": True},
    {"leave_out": [1], "use_gating": True, "ln_before": True, "adapter_residual_before_ln": True},
    {
        "original_ln_before": True,
        "residual_before_ln": "post_add",
        "ln_before": True,
        "ln_after": True,
        "adapter_residual_before_ln": True,
        "original_ln_after": False,
        "use_gating": True,
        "scaling": "channel",
        "reduction_factor": 4,
    },
    {
        "mh_adapter": True,
        "output_adapter": False,
        "original_ln_after": False,
        "ln_before": True,
        "ln_after": True,
        "residual_before_ln": False,
        "adapter_residual_before_ln": True,
        "scaling": -1.5,
        "use_gating": True,
    },
    {"is_parallel": True, "mh_adapter": True, "output_adapter": False, "ln_before": True, "scaling": "learned"},
    {"mh_adapter": True, "output_adapter": False, "residual_before_ln": False, "scaling": "channel"},
    {"original_ln_before": True, "residual_before_ln": "post_add", "scaling": 2.0},
    {"original_ln_before": True, "residual_before_ln": False, "scaling": "learned"},
    {"original_ln_before": True, "residual_before_ln": "post_add", "scaling": "learned", "ln_after": True},
    {"is_parallel": True, "original_ln_after": False, "ln_after": True, "scaling": "learned"},
    {"is_parallel": True, "ln_after": True},
]
"""The papers' forms, and, of the options that change the order of things, every pair of values that makes sense."""

METHOD_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"r": 4, "lora_alpha": 8},
        {"r": 3, "lora_alpha": 2, **ALL},
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "lora_bias": True, **PATTERNS},
        {"r": 2, "use_gating": True},
        {"r": 3, **EMBEDDINGS},
    ],
    "dora": [
        {"r": 3, "lora_alpha": 6},
        {"r": 2, "lora_alpha": 6, "unscaled_norm": True, "scaled_bias": True, **PATTERNS},
        {"r": 2, "use_rslora": True, "use_gating": True, **ALL},
        {"r": 2, **EMBEDDINGS},
    ],
    "vera": [
        {"r": 6},
        {"r": 6, "projection_prng_key": 3, **ALL},
        {"r": 5, "save_projection": True},
    ],
    "loha": [
        {"r": 2, "alpha": 4},  # two factors
        {"r": 6, "alpha": 4},  # the whole matrix
        {"r": 3, "alpha": 2, **PATTERNS, **ALL},
    ],
    "lokr": [
        {"r": 2},
        {"r": 32},  # both factors whole
        {"r": 1, "decompose_both": True, "decompose_factor": 8, **ALL},
        {"r": 3, "decompose_factor": 3, "decompose_both": True, **PATTERNS},
    ],
    "ia3": [
        {},
        {**ALL},
        {"use_gating": True},
        {"feedforward_modules": r".*\.1\..*", **ALL},
        {"feedforward_modules": r".*\.0\..*", "use_gating": True, **ALL},
    ],
    "bottleneck": [{"non_linearity": "gelu", **options} for options in BOTTLENECKS],  # smooth, and no unit is ever off
    "compacter": [
        {"reduction_factor": 4},
        {"reduction_factor": 4, "phm_dim": 2, "shared_W_phm": True, "mh_adapter": True},
        {"reduction_factor": 2, "phm_dim": 2, "shared_phm_rule": False, "factorized_phm_W": False, "use_gating": True},
        {
            "reduction_factor": 4,
            "shared_W_phm": True,
            "factorized_phm_W": False,
            "factorized_phm_rule": True,
            "phm_bias": False,
        },
        {
            "reduction_factor": 4,
            "shared_phm_rule": False,
            "factorized_phm_rule": True,
            "phm_rank": 2,
            "original_ln_before": True,
            "ln_before": True,
            "scaling": "learned",
        },
    ],
    "invertible": [{}, {"inv_adapter_reduction_factor": 5, "non_linearity": "tanh"}],
    "post_encoder": [{}, {"residual": True, "reduction_factor": 4, "non_linearity": "relu"}],
    "prefix_tuning": [
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 5, "prefix_projection": True},
        {"num_virtual_tokens": 2, "prefix_projection": True, "encoder_hidden_size": 7, "position_shift": True},
        {"num_virtual_tokens": 70, "leave_out": [1]},
        {"num_virtual_tokens": 3, "use_gating": True},
        {"num_virtual_tokens": 4, "use_gating": True, "shared_gating": False, "prefix_projection": True},
    ],
    "prompt_tuning": [
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 4, "placement": "states"},
        {"num_virtual_tokens": 2, "placement": "states", "combine": "prefix_after_bos"},
    ],
    "p_tuning": [
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 2, "encoder_hidden_size": 6, "placement": "states", "combine": "prefix_after_bos"},
        {"num_virtual_tokens": 2, "encoder_reparameterization_type": None},
    ],
}
"""The hyperparameters that the laws are tried with. A method that is not here is tried with its defaults."""

VARIANTS = [(name, options) for name in METHODS for options in METHOD_OPTIONS.get(name, [{}])]

Part = tuple[str, dict[str, Any]]

TARGETED = ("lora", "dora", "vera", "loha", "lokr", "ia3")
"""Methods that want to be told their targets where a family is not listed."""

COMPOSED: list[tuple[str, dict[str, Any], tuple[Part, ...]]] = [
    ("lora", {"r": 2}, (("bitfit", {}),)),
    ("ia3", {}, (("lora", {"r": 2, "use_gating": True, **ALL}), ("loha", {"r": 2}))),
    ("bottleneck", {"mh_adapter": True, "reduction_factor": 4}, (("invertible", {}),)),
    # MAM and UniPELT
    ("prefix_tuning", {"num_virtual_tokens": 3}, (("bottleneck", BOTTLENECKS[4]),)),
    (
        "bottleneck",
        {"original_ln_before": True, "use_gating": True, "reduction_factor": 4, "non_linearity": "gelu"},
        (("lora", {"r": 2, "use_gating": True}), ("prefix_tuning", {"num_virtual_tokens": 2, "use_gating": True})),
    ),
    ("prompt_tuning", {"num_virtual_tokens": 2}, (("lora", {"r": 2, **EMBEDDINGS}), ("post_encoder", {}))),
]
"""Adapters of several methods."""

EVERY_VARIANT = [*((method, options, ()) for method, options in VARIANTS), *COMPOSED]


def build(artifact: Artifact, backbone: Backbone) -> TaskAdapter:
    """An adapter, ready to run. Raises InvalidAdapter naming what does not fit."""
    checker = Checker(backbone)
    return checker.bind(checker.check(artifact))


class Sync:
    """A store for tests without an event loop: its coroutines as plain functions."""

    def __init__(self, store: AdapterStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.store, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute
        return lambda *args, **options: asyncio.run(attribute(*args, **options))


def variant_id(variant: Any) -> str:
    """How a test names a variant."""
    if isinstance(variant, str):
        return variant
    if isinstance(variant, tuple):
        return "+".join(name for name, _ in variant) or "alone"
    return ",".join(f"{key}={'...' if value and isinstance(value, dict) else value}" for key, value in variant.items())


def tiny_model(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random transformer with two layers; the same seed gives the same weights."""
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            **FAMILY_OPTIONS.get(family, {}),
            **options,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config).eval()
        for parameter in model.parameters():
            # Not transformers' 0.02, under which attention and biases hardly count and a wrong one would pass.
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model


def fast_tokenizer(padding: int = 0) -> FastTokenizer:
    """Words w0, w1 ..., lower or upper, between [CLS] and [SEP]; `padding` is the id of [PAD]."""
    words = ["[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(VOCABULARY - 4))]
    words.insert(padding, "[PAD]")
    vocabulary = {word: index for index, word in enumerate(words)}
    fast = FastTokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = Whitespace()
    fast.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return fast


def tiny_backbone(
    family: str,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> Backbone:
    """A backbone over `tiny_model(family)`, or over `model`."""
    model = model or tiny_model(family, **options)
    tokenizer = Tokenizer(fast_tokenizer(model.config.pad_token_id), MAX_TOKENS)
    return Backbone(model, tokenizer, f"tiny-{family}", device=device, dtype=dtype)


def random_text(length: int, seed: int) -> Encoding:
    """A text of `length` ordinary tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
    return Encoding(tuple(ids), (0,) * length, truncated=False)


def method_config(name: str, options: Mapping[str, Any], spec: BackboneSpec) -> dict[str, Any]:
    """Options of a method, completed. Families that are not listed have no usual targets: all linear layers then."""
    config = METHODS[name].complete(options, spec)
    if name in TARGETED and not config.get("target_modules"):
        config = METHODS[name].complete({**options, **ALL}, spec)
    return config


def make_blueprint(
    spec: BackboneSpec,
    method: str,
    options: Mapping[str, Any],
    also: Sequence[Part] = (),
    *,
    labels: Sequence[str] = LABELS[:3],
    pooling: Pooling = Pooling.MEAN,
) -> Blueprint:
    """A classifier's blueprint. Raises InvalidAdapter where the backbone cannot carry the method."""
    return Blueprint.check(
        method=method,
        config=method_config(method, options, spec),
        also=[(name, method_config(name, more, spec)) for name, more in also],
        task="classification",
        head={"pooling": pooling},
        labels=labels,
        spec=spec,
    )


def random_tensors(blueprint: Blueprint, seed: int, host: Host | None = None, std: float = 0.2) -> dict[str, Tensor]:
    """Tensors as after a training, none of them zero: started on the host, or of any values where there is none."""
    generator = torch.Generator().manual_seed(seed)
    if host is None:
        tensors = {name: torch.zeros(shape) for name, shape in blueprint.shapes().items()}
    else:
        tensors = blueprint.init(host, generator)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == blueprint.shapes()
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) * (1.0 if name.startswith("head/") else std)
        for name, tensor in tensors.items()
    }


class Adapter(NamedTuple):
    """A random adapter in all its forms."""

    blueprint: Blueprint
    tensors: dict[str, Tensor]
    bound: TaskAdapter

    @property
    def sites(self) -> list[Site]:
        """Where its parts act."""
        return [site for part in self.bound.weights.parts for site in part.sites]


def random_adapter(
    backbone: Backbone, method: str, options: Mapping[str, Any], also: Sequence[Part] = (), *, seed: int, **kwargs: Any
) -> Adapter:
    """A random adapter bound to a backbone."""
    blueprint = make_blueprint(backbone.spec, method, options, also, **kwargs)
    tensors = random_tensors(blueprint, seed, backbone)
    blueprint.check_tensors(tensors)
    return Adapter(blueprint, tensors, blueprint.bind(tensors, backbone))


def every_adapter(backbone: Backbone) -> list[Adapter]:
    """One random adapter of each variant that the backbone carries, with different labels and poolings."""
    adapters: list[Adapter] = []
    poolings = sorted(backbone.spec.poolings)
    for index, variant in enumerate(EVERY_VARIANT):
        fields = {"labels": LABELS[: 2 + index % 4], "pooling": poolings[index % len(poolings)]}
        with suppress(InvalidAdapter):
            adapters.append(random_adapter(backbone, *variant, seed=index, **fields))
    return adapters


class Answer(NamedTuple):
    """What one text came to."""

    states: Tensor  # [tokens, hidden], the virtual ones of its adapter included
    logits: Tensor | None  # [labels]; None for the bare backbone
    own: Tensor | None = None  # [tokens, hidden], without the virtual ones


def run(backbone: Backbone, rows: Sequence[tuple[Encoding, TaskAdapter | None]]) -> list[Answer]:
    """Texts, each with its adapter or without, in as few forwards as the backbone allows."""
    if backbone.packed and not any(adapter.weights.alone for _, adapter in rows if adapter):
        return forward(backbone, rows)
    answers: dict[int, Answer] = {}
    adapters = [adapter.weights if adapter else None for _, adapter in rows]
    for chunk in backbone.chunks([text for text, _ in rows], adapters):
        answers |= dict(zip(chunk, forward(backbone, [rows[index] for index in chunk]), strict=True))
    return [answers[index] for index in range(len(rows))]


def forward(backbone: Backbone, rows: Sequence[tuple[Encoding, TaskAdapter | None]]) -> list[Answer]:
    """One forward over texts, each with its adapter or without; equal neighbours share a segment."""
    segments: list[Segment] = []
    spans: list[tuple[TaskAdapter | None, int, int]] = []
    start = 0
    for _, group in groupby(rows, key=lambda row: id(row[1])):
        members = list(group)
        adapter, end = members[0][1], start + len(members)
        spans.append((adapter, start, end))
        if adapter is not None:
            segments.append(Segment(adapter.weights, start, end))
        start = end
    states = backbone.forward([text for text, _ in rows], AdapterPlan(segments))
    tokens = states.tokens.split(list(states.lengths))
    logits: list[Tensor | None] = []
    for adapter, start, end in spans:
        outputs = adapter.task.apply(adapter.head, states, start, end) if adapter else [None] * (end - start)
        logits.extend(outputs)
    own = [states.own(index) for index in range(len(rows))]
    return [Answer(*fields) for fields in zip(tokens, logits, own, strict=True)]


def make_artifact(blueprint: Blueprint, tensors: Mapping[str, Tensor], **fields: Any) -> Artifact:
    """The artifact that our own trainer would write for it."""
    manifest = Manifest(
        method=blueprint.method.name,
        config=blueprint.config.model_dump(mode="json"),
        also=[
            {"method": part.method.name, "config": part.config.model_dump(mode="json")} for part in blueprint.parts[1:]
        ],
        task=blueprint.task.name,
        head=blueprint.head.model_dump(mode="json"),
        labels=blueprint.labels,
        **{"source": "adapterd tests", **fields},
    )
    return Artifact.build(manifest, tensors)


def peft_config(**changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it for a small classifier; a change to `...` drops the key."""
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "somebody/tiny-bert",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier", "score"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        "peft_version": "0.18.0",
    }
    return {key: value for key, value in (config | changes).items() if value is not ...}


def peft_tensors(
    labels: int = 3, *, layers: int = 2, hidden: int = 32, root: str = "bert.encoder"
) -> dict[str, Tensor]:
    """The tensors that go with `peft_config()`."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "base_model.model.classifier.weight": torch.randn(labels, hidden, generator=generator),
        "base_model.model.classifier.bias": torch.randn(labels, generator=generator),
    }
    for layer in range(layers):
        for target in ("query", "value"):
            name = f"base_model.model.{root}.layer.{layer}.attention.self.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, hidden, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, 2, generator=generator)
    return tensors


def peft_files(
    config: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None, folder: str = ""
) -> dict[str, bytes]:
    """A PEFT checkpoint for the tiny BERT, as files by path."""
    return {
        f"{folder}adapter_config.json": json.dumps(peft_config() if config is None else config).encode(),
        f"{folder}adapter_model.safetensors": safetensors.torch.save(dict(tensors or peft_tensors())),
    }


def close(a: Iterable[Answer], b: Iterable[Answer], tolerance: float) -> None:
    """Asserts that two runs over the same texts agree."""
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one.states, other.states, rtol=0, atol=tolerance)
        if one.logits is not None or other.logits is not None:
            torch.testing.assert_close(one.logits, other.logits, rtol=tolerance, atol=tolerance)
