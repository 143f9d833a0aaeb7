"""Where adapters touch each architecture: the only file that names an architecture's modules."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from server.core import ENCODER_INPUT, ENCODER_OUTPUT, HeadKind, HeadSpec, Pooling, Site, SiteKind, SiteSpec

Config = Any  # a PretrainedConfig, whose fields differ by family
Heads = Callable[[Config], Mapping[HeadKind, HeadSpec]]


@dataclass(frozen=True, slots=True)
class SubLayer:
    """The attention or the feed-forward network of a layer. Paths are relative to the layer."""

    stream: str
    """A module whose input is the residual stream that the sub-layer's output is added to."""
    output: str
    """The linear layer that puts the sub-layer's output out."""
    norm: str | None = None
    """The normalization of the sum, where one follows it at once (post-LN)."""
    swapped: bool = False
    """AdapterHub's adapters take the output for the stream and the stream for the output here."""


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths of one architecture."""

    layer: str
    """Path of a layer; `{}` stands for numbers."""
    attention: SubLayer
    ffn: SubLayer
    keys_values: str
    """The module, relative to the layer, that calls transformers' attention function."""
    read: str
    """A linear layer, relative to the layer, whose input is what the attention reads."""
    embeddings: str
    """The module whose output enters the first layer."""
    targets: Mapping[str, tuple[str, ...]]
    """BackboneSpec.targets."""
    heads: Heads
    """BackboneSpec.heads."""
    positions_after_padding: bool = False
    """Position ids start after `pad_token_id` instead of at 0."""


def _heads(pooling: Pooling, dense: str | None = None, activation: str = "tanh", output: str = "classifier") -> Heads:
    """Heads that differ by family for whole texts alone."""
    return lambda config: {HeadKind.SEQUENCE: HeadSpec(pooling, output, dense, activation=activation)} | _TOKEN_HEADS


def _deberta_heads(config: Config) -> Mapping[HeadKind, HeadSpec]:
    return _heads(Pooling.CLS, "pooler.dense", config.pooler_hidden_act)(config)


def _modernbert_heads(config: Config) -> Mapping[HeadKind, HeadSpec]:
    head = HeadSpec(
        Pooling(config.classifier_pooling),
        "classifier",
        "head.dense",
        dense_bias=config.classifier_bias,
        activation=config.classifier_activation,
        norm="head.norm",
        norm_eps=config.norm_eps,
    )
    of_tokens = replace(head, pooling=None)
    return {HeadKind.SEQUENCE: head, HeadKind.TOKENS: of_tokens, HeadKind.QUESTION: of_tokens}


def _gpt2_heads(config: Config) -> Mapping[HeadKind, HeadSpec]:
    return {HeadKind.SEQUENCE: HeadSpec(Pooling.LAST, "score", bias=False)} | _TOKEN_HEADS


def _llama_heads(config: Config) -> Mapping[HeadKind, HeadSpec]:
    return {
        HeadKind.SEQUENCE: HeadSpec(Pooling.LAST, "score", bias=False),
        HeadKind.TOKENS: HeadSpec(None, "score"),
        HeadKind.QUESTION: HeadSpec(None, "qa_outputs", prefix="transformer"),
    }


_TOKEN_HEADS = {HeadKind.TOKENS: HeadSpec(None, "classifier"), HeadKind.QUESTION: HeadSpec(None, "qa_outputs")}
_POOLED = _heads(Pooling.POOLER)
_DENSE_OUT = _heads(Pooling.CLS, "classifier.dense", "tanh", "classifier.out_proj")

BERT = Family(
    layer="encoder.layer.{}",
    attention=SubLayer("attention.self.value", "attention.output.dense", "attention.output.LayerNorm"),
    ffn=SubLayer("intermediate.dense", "output.dense", "output.LayerNorm"),
    keys_values="attention.self",
    read="attention.self.value",
    embeddings="embeddings",
    targets={
        "query": ("query",),
        "key": ("key",),
        "value": ("value",),
        "intermediate": ("intermediate.dense",),
        "output": ("output.dense",),
    },
    heads=_POOLED,
)
ROBERTA = replace(BERT, heads=_DENSE_OUT, positions_after_padding=True)
LLAMA = Family(
    layer="layers.{}",
    attention=SubLayer("input_layernorm", "self_attn.o_proj"),
    ffn=SubLayer("post_attention_layernorm", "mlp.down_proj"),
    keys_values="self_attn",
    read="self_attn.v_proj",
    embeddings="embed_tokens",
    targets={
        "query": ("q_proj",),
        "key": ("k_proj",),
        "value": ("v_proj",),
        "intermediate": ("up_proj",),
        "output": ("down_proj",),
        "adapterhub_intermediate": ("down_proj",),  # it has the two swapped
        "adapterhub_output": ("up_proj",),
    },
    heads=_llama_heads,
)

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": replace(BERT, heads=_heads(Pooling.CLS, "classifier.dense", "gelu", "classifier.out_proj")),
    "distilbert": Family(
        layer="transformer.layer.{}",
        attention=SubLayer("attention.v_lin", "attention.out_lin", "sa_layer_norm"),
        ffn=SubLayer("ffn.lin1", "ffn.lin2", "output_layer_norm"),
        keys_values="attention",
        read="attention.v_lin",
        embeddings="embeddings",
        targets={
            "query": ("q_lin",),
            "key": ("k_lin",),
            "value": ("v_lin",),
            "intermediate": ("lin1",),
            "output": ("lin2",),
        },
        heads=_heads(Pooling.CLS, "pre_classifier", "relu"),
    ),
    "albert": replace(
        BERT,
        layer="encoder.albert_layer_groups.{}.albert_layers.{}",  # run through several times
        attention=SubLayer("attention.value", "attention.dense", "attention.LayerNorm", swapped=True),
        ffn=SubLayer("ffn", "ffn_output", "full_layer_layer_norm"),
        keys_values="attention",
        read="attention.value",
        targets={
            "query": ("query",),
            "key": ("key",),
            "value": ("value",),
            "intermediate": ("ffn",),
            "output": ("ffn_output",),
        },
    ),
    "mpnet": replace(
        ROBERTA,
        attention=SubLayer("attention.attn.v", "attention.attn.o", "attention.LayerNorm"),
        keys_values="attention.attn",
        read="attention.attn.v",
        targets={
            "query": ("attn.q",),
            "key": ("attn.k",),
            "value": ("attn.v",),
            "intermediate": ("intermediate.dense",),
            "output": ("output.dense",),
        },
    ),
    "deberta-v2": replace(
        BERT,
        attention=replace(BERT.attention, stream="attention.self.value_proj"),
        read="attention.self.value_proj",
        targets={
            "query": ("query_proj",),
            "key": ("key_proj",),
            "value": ("value_proj",),
            "intermediate": ("intermediate.dense",),
            "output": ("output.dense",),
        },
        heads=_deberta_heads,
    ),
    "modernbert": Family(
        layer="layers.{}",
        attention=SubLayer("attn_norm", "attn.Wo"),
        ffn=SubLayer("mlp_norm", "mlp.Wo"),
        keys_values="attn",
        read="attn.Wqkv",
        embeddings="embeddings",
        targets={"query_key_value": ("Wqkv",), "intermediate": ("mlp.Wi",), "output": ("mlp.Wo",)},
        heads=_modernbert_heads,
    ),
    "gpt2": Family(
        layer="h.{}",
        attention=SubLayer("ln_1", "attn.c_proj"),
        ffn=SubLayer("ln_2", "mlp.c_proj"),
        keys_values="attn",
        read="attn.c_attn",
        embeddings="drop",
        targets={"query_key_value": ("c_attn",), "intermediate": ("mlp.c_fc",), "output": ("mlp.c_proj",)},
        heads=_gpt2_heads,
    ),
    "llama": LLAMA,
    "qwen3": LLAMA,
}
"""By transformers' `model_type`. A family that is not listed is served with methods that act at linear layers and
embeddings, found by the kind of module."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a site is attached to the model."""

    module: nn.Module
    """The module whose input or output passes the site; at key_value sites, the one that calls the attention."""
    spec: SiteSpec
    stream: nn.Module | None = field(default=None)
    """At a residual site, a module whose input is the residual stream; at a key_value site, one whose input is what
    the attention reads."""
    norm: nn.Module | None = field(default=None)
    """At a residual site: the normalization of the sum, if it follows at once."""
    swapped: bool = False
    """At a residual site: adapters take stream and output for each other."""


def find_sites(model: nn.Module, config: PretrainedConfig) -> dict[Site, Attachment]:
    """Every place of a model that may be a site, in the model's order; ENCODER_OUTPUT is no module's."""
    family = FAMILIES.get(config.model_type)
    sites: dict[Site, Attachment] = {}
    for name, module in model.named_modules():
        sites |= {Site(kind, name): Attachment(module, spec) for kind, spec in _kinds(module, norms=family is not None)}
    if family is not None:
        sites |= _of_family(family, model, config)
    return sites


def _kinds(module: nn.Module, *, norms: bool) -> Iterator[tuple[SiteKind, SiteSpec]]:
    """What a single module is a site of."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear | Conv1D):
        size_in, size_out = module.weight.shape[::-1] if isinstance(module, nn.Linear) else module.weight.shape
        yield SiteKind.LINEAR, SiteSpec(size_in, size_out, bias)
        yield SiteKind.LINEAR_INPUT, SiteSpec(size_in, size_in)
    elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:  # takes ids
        yield SiteKind.EMBEDDING, SiteSpec(module.num_embeddings, module.embedding_dim)
    elif norms and (isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")):
        (size,) = module.get_parameter("weight").shape
        yield SiteKind.NORM, SiteSpec(size, size, bias)


def _of_family(family: Family, model: nn.Module, config: Config) -> dict[Site, Attachment]:
    hidden = SiteSpec(config.hidden_size, config.hidden_size)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys_values = SiteSpec(config.hidden_size, heads * head_size)
    sites: dict[Site, Attachment] = {}
    for index, path in enumerate(layer_paths(model, config)):
        layer = model.get_submodule(path)
        for place, sub in (("attention", family.attention), ("ffn", family.ffn)):
            sites[Site(SiteKind.RESIDUAL, f"{index}.{place}")] = Attachment(
                layer.get_submodule(sub.output),
                hidden,
                stream=layer.get_submodule(sub.stream),
                norm=layer.get_submodule(sub.norm) if sub.norm else None,
                swapped=sub.swapped,
            )
        sites[Site(SiteKind.KEY_VALUE, str(index))] = Attachment(
            layer.get_submodule(family.keys_values), keys_values, stream=layer.get_submodule(family.read)
        )
    size = getattr(config, "embedding_size", None) or config.hidden_size
    sites[ENCODER_INPUT] = Attachment(model.get_submodule(family.embeddings), SiteSpec(size, size))
    return sites


def layer_paths(model: nn.Module, config: PretrainedConfig) -> tuple[str, ...]:
    """The paths of a listed family's layers, in order."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return ()
    pattern = re.compile(re.escape(family.layer).replace(r"\{\}", r"\d+"))
    return tuple(name for name, _ in model.named_modules() if pattern.fullmatch(name))


def encoder_output(config: PretrainedConfig) -> tuple[Site, SiteSpec]:
    """The states that leave the last layer: a site of every family."""
    return ENCODER_OUTPUT, SiteSpec(config.hidden_size, config.hidden_size)


def first_position(config: PretrainedConfig) -> int:
    """The position id of a text's first token."""
    family = FAMILIES.get(config.model_type)
    return config.pad_token_id + 1 if family is not None and family.positions_after_padding else 0
