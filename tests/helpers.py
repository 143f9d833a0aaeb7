"""Tiny random backbones of many families, and random texts and adapters for them."""

import json
from collections.abc import Iterable, Mapping, Sequence
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
from server.adapters.plan import AdapterPlan, Segment
from server.backbone.backbone import Backbone
from server.backbone.sites import FAMILIES
from server.backbone.tokenizer import Tokenizer
from server.core import BackboneSpec, Encoding, Pooling, SiteKind
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, Manifest
from server.tasks.adapter import Blueprint, TaskAdapter

CPU = torch.device("cpu")
VOCABULARY = 64
MAX_TOKENS = 220
LABELS = ("ant", "bee", "cat", "dog", "elk")

UNLISTED = ("llama", "qwen3", "camembert")
"""Families that sites.py does not list. CamemBERT's positions start after the padding, as RoBERTa's do."""

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
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}
"""Options that a family needs beside the common ones. One that is not here is tried with those alone."""

METHOD_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"r": 4, "lora_alpha": 8},
        {"r": 3, "lora_alpha": 2, "target_modules": "all"},
    ],
    "bottleneck": [
        {},
        {"mh_adapter": True, "reduction_factor": 4, "non_linearity": "swish"},
        {"mh_adapter": True, "output_adapter": False, "reduction_factor": 2, "non_linearity": "gelu"},
        {"reduction_factor": 0.5, "non_linearity": "tanh"},
    ],
}
"""The hyperparameters that the laws are tried with. A method that is not here is tried with its defaults."""

VARIANTS = [(name, options) for name in METHODS for options in METHOD_OPTIONS.get(name, [{}])]


def variant_id(variant: Any) -> str:
    """How a test names a variant."""
    if isinstance(variant, str):
        return variant
    return ",".join(f"{key}={value}" for key, value in variant.items()) or "defaults"


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
    """Options of a method, with targets that this backbone has where the method wants some."""
    config = dict(options)
    if "target_modules" in METHODS[name].Config.model_fields:
        linear = sorted({site.name.rpartition(".")[2] for site in spec.sites if site.kind is SiteKind.LINEAR})
        if config.get("target_modules") == "all":
            config["target_modules"] = linear
        config.setdefault("target_modules", list(spec.default_targets) or linear[-2:])
    return config


def make_blueprint(
    spec: BackboneSpec,
    method: str,
    options: Mapping[str, Any],
    *,
    labels: Sequence[str] = LABELS[:3],
    pooling: Pooling = Pooling.MEAN,
) -> Blueprint:
    """A classifier's blueprint. Raises InvalidAdapter where the backbone cannot carry the method."""
    return Blueprint.check(
        method=method,
        config=method_config(method, options, spec),
        task="classification",
        head={"pooling": pooling},
        labels=labels,
        spec=spec,
    )


def random_tensors(blueprint: Blueprint, seed: int, std: float = 0.2) -> dict[str, Tensor]:
    """Tensors as after a training: none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = blueprint.init(generator)
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


def random_adapter(backbone: Backbone, method: str, options: Mapping[str, Any], *, seed: int, **kwargs: Any) -> Adapter:
    """A random adapter bound to a backbone."""
    blueprint = make_blueprint(backbone.spec, method, options, **kwargs)
    tensors = random_tensors(blueprint, seed)
    blueprint.check_tensors(tensors)
    return Adapter(blueprint, tensors, blueprint.bind(tensors, backbone.device, backbone.dtype))


def every_adapter(backbone: Backbone) -> list[Adapter]:
    """One random adapter of each variant that the backbone carries, with different labels and poolings."""
    adapters: list[Adapter] = []
    poolings = sorted(backbone.spec.poolings)
    for index, (method, options) in enumerate(VARIANTS):
        try:
            adapters.append(
                random_adapter(
                    backbone,
                    method,
                    options,
                    seed=index,
                    labels=LABELS[: 2 + index % 4],
                    pooling=poolings[index % len(poolings)],
                )
            )
        except InvalidAdapter:
            continue
    return adapters


class Answer(NamedTuple):
    """What one text came to."""

    states: Tensor  # [tokens, hidden]
    logits: Tensor | None  # [labels]; None for the bare backbone


def run(backbone: Backbone, rows: Sequence[tuple[Encoding, TaskAdapter | None]]) -> list[Answer]:
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
    return [Answer(*pair) for pair in zip(tokens, logits, strict=True)]


def make_artifact(blueprint: Blueprint, tensors: Mapping[str, Tensor], **fields: Any) -> Artifact:
    """The artifact that our own trainer would write for it."""
    manifest = Manifest(
        method=blueprint.method.name,
        config=blueprint.config.model_dump(mode="json"),
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
            torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=tolerance)
