"""What PEFT can do to a model with a head, as a table, and PEFT's own answers for each row of it."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from helpers import LABELS, random_text, tiny_model
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from server.core import Encoding

NOISE = 0.2
"""How far every trained weight is moved: no term of a method is small, and float32 still agrees with itself to 1e-5."""

TEXTS = tuple(random_text(length, seed=length) for length in (1, 2, 9, 30, 70))


@dataclass(frozen=True)
class Names:
    """What one family calls the modules that the cases below target."""

    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    """Layers whose input and output differ in size: the last one's output joins the residual stream."""
    embedding: str = "word_embeddings"
    norms: tuple[str, ...] = ("LayerNorm",)
    layers: str = "layer"
    """The list of layers."""
    head: tuple[str, ...] = ()
    """Layers of the classifier's head that PEFT saves only where they are listed. (It saves by the end of the name:
    DistilBERT's `pre_classifier` counts as `classifier`.)"""

    @property
    def extra(self) -> dict[str, Any]:
        """The options without which this family's checkpoint lacks a part of its head."""
        return {"modules_to_save": list(self.head)} if self.head else {}

    @property
    def linear(self) -> list[str]:
        return [*self.attention, *self.ffn]


BERT = Names(("query", "value"), ("intermediate.dense", "output.dense"))
LLAMA = Names(
    ("q_proj", "v_proj"),
    ("up_proj", "down_proj"),
    "embed_tokens",
    ("input_layernorm", "post_attention_layernorm", "norm"),
    "layers",
)
NAMES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "electra": BERT,
    "albert": Names(("query", "value"), ("ffn", "ffn_output"), norms=("LayerNorm", "full_layer_layer_norm")),
    "mpnet": Names(("attn.q", "attn.v"), ("intermediate.dense", "output.dense")),
    "distilbert": Names(("q_lin", "v_lin"), ("lin1", "lin2"), norms=("sa_layer_norm", "output_layer_norm")),
    "deberta-v2": Names(("query_proj", "value_proj"), ("intermediate.dense", "output.dense"), head=("pooler",)),
    "modernbert": Names(
        ("Wqkv",), ("Wi", "mlp.Wo"), "tok_embeddings", ("mlp_norm", "final_norm"), layers="layers", head=("head",)
    ),
    "gpt2": Names(("c_attn",), ("c_fc", "mlp.c_proj"), "wte", ("ln_1", "ln_2", "ln_f"), layers="h"),
    "llama": LLAMA,
    "qwen3": LLAMA,
}

EVERY = tuple(NAMES)
NO_CONV1D = tuple(family for family in EVERY if family != "gpt2")
ONE_EACH = ("bert", "gpt2", "llama")
CACHED = ("bert", "roberta", "xlm-roberta", "electra", "gpt2", "llama", "qwen3")
"""Families whose models take past_key_values."""
WHOLE_HEAD = ("bert", "roberta", "electra", "gpt2", "llama")
"""Families whose heads PEFT saves unasked, of different kinds."""
SAME_EMBEDDING = tuple(family for family in EVERY if family not in ("electra", "albert", "distilbert"))
"""Families whose word embeddings have the size that PEFT expects of virtual tokens."""


class Case(NamedTuple):
    """One way to use PEFT, and the families that it is tried on."""

    name: str
    families: tuple[str, ...]
    config: Callable[[Names], PeftConfig]


def lora(n: Names, **options: Any) -> PeftConfig:
    defaults = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": list(n.attention), **n.extra}
    return LoraConfig(task_type="SEQ_CLS", **{**defaults, **options})


def vera(n: Names, **options: Any) -> PeftConfig:
    return VeraConfig(task_type="SEQ_CLS", **{"r": 6, "target_modules": n.linear, **n.extra, **options})


def loha(n: Names, **options: Any) -> PeftConfig:
    options = {"r": 3, "alpha": 5, "target_modules": n.linear, **n.extra, **options}
    return LoHaConfig(task_type="SEQ_CLS", **options)


def lokr(n: Names, **options: Any) -> PeftConfig:
    options = {"r": 2, "alpha": 3, "target_modules": n.linear, **n.extra, **options}
    return LoKrConfig(task_type="SEQ_CLS", **options)


def ia3(n: Names, **options: Any) -> PeftConfig:
    return IA3Config(task_type="SEQ_CLS", **{**n.extra, **options})


def norms(n: Names, **options: Any) -> PeftConfig:
    return LNTuningConfig(task_type="SEQ_CLS", **{**n.extra, **options})


def prefix(n: Names, **options: Any) -> PeftConfig:
    return PrefixTuningConfig(task_type="SEQ_CLS", **{"num_virtual_tokens": 5, **n.extra, **options})


def prompt(n: Names, **options: Any) -> PeftConfig:
    return PromptTuningConfig(task_type="SEQ_CLS", **{"num_virtual_tokens": 4, **n.extra, **options})


def p_tuning(n: Names, **options: Any) -> PeftConfig:
    return PromptEncoderConfig(
        task_type="SEQ_CLS", **{"num_virtual_tokens": 3, "encoder_hidden_size": 24, **n.extra, **options}
    )


def layer(n: Names, index: str, module: str) -> str:
    """A regex for modules in the layers whose number matches."""
    return rf".*\.{n.layers}\.{index}\..*\b{module}"


CASES = (
    Case("lora", EVERY, lora),
    Case("lora-wide", EVERY, lambda n: lora(n, r=3, lora_alpha=7, target_modules=n.linear)),
    Case("lora-dense", ("bert", "roberta", "electra", "mpnet", "deberta-v2"),
         lambda n: lora(n, target_modules=[*n.attention, "dense"])),
    Case("lora-all-linear", (*WHOLE_HEAD, "albert", "modernbert"),
         lambda n: lora(n, target_modules="all-linear")),
    Case("lora-regex", ("bert", "gpt2", "qwen3"), lambda n: lora(n, target_modules=layer(n, "[1-9]", n.attention[-1]))),
    Case("lora-paths", ("bert", "llama"),
         lambda n: lora(n, target_modules=[f"{n.layers}.0.mlp.{n.ffn[0]}", f"{n.layers}.0.{n.ffn[0]}", *n.ffn[1:]])),
    Case("lora-rslora", ONE_EACH, lambda n: lora(n, use_rslora=True)),
    Case("lora-patterns", ("bert", "distilbert", "gpt2", "qwen3"),
         lambda n: lora(
             n,
             target_modules=n.linear,
             use_rslora=n is LLAMA,
             rank_pattern={layer(n, "0", n.attention[0]): 7, n.attention[0]: 2, n.ffn[0]: 5},
             alpha_pattern={f"^{layer(n, '1', n.attention[-1])}": 3, n.attention[-1]: 20, n.ffn[-1]: 9},
         )),
    Case("lora-layers-int", ONE_EACH, lambda n: lora(n, layers_to_transform=1)),
    Case("lora-layers-list", ("bert", "qwen3"), lambda n: lora(n, layers_to_transform=[0])),
    Case("lora-layers-pattern", ONE_EACH, lambda n: lora(n, layers_to_transform=[1], layers_pattern=n.layers)),
    Case("lora-layers-patterns", ("bert", "llama"),
         lambda n: lora(n, layers_to_transform=0, layers_pattern=["blocks", n.layers])),
    Case("lora-exclude-list", ONE_EACH, lambda n: lora(n, target_modules=n.linear, exclude_modules=[n.ffn[-1]])),
    Case("lora-exclude-regex", ("bert", "gpt2", "qwen3"),
         lambda n: lora(n, target_modules=n.linear, exclude_modules=layer(n, "0", n.attention[0]))),
    Case("lora-bias-all", ("bert", "distilbert", "roberta", "gpt2", "llama"), lambda n: lora(n, bias="all")),
    Case("lora-bias-lora-only", ("bert", "electra", "gpt2"), lambda n: lora(n, bias="lora_only")),
    Case("lora-lora-bias", ("bert", "gpt2"), lambda n: lora(n, target_modules=n.linear, lora_bias=True)),
    Case("lora-fan-in-fan-out", ("gpt2",), lambda n: lora(n, target_modules=n.linear, fan_in_fan_out=True)),
    Case("lora-embedding", ("bert", "distilbert", "electra", "gpt2", "llama"),
         lambda n: lora(n, target_modules=[n.embedding])),
    Case("lora-embedding-and-linear", ("bert", "modernbert", "gpt2", "qwen3"),
         lambda n: lora(n, target_modules=[n.embedding, *n.linear], rank_pattern={n.embedding: 2})),
    Case("lora-dora", EVERY, lambda n: lora(n, target_modules=n.linear, use_dora=True)),
    Case("lora-dora-rslora-patterns", ("bert", "llama"),
         lambda n: lora(n, use_dora=True, use_rslora=True, rank_pattern={n.attention[0]: 2})),
    Case("lora-dora-embedding", ONE_EACH,
         lambda n: lora(n, target_modules=[n.embedding, *n.attention], use_dora=True)),
    Case("lora-pre-classifier", ("distilbert",),
         lambda n: lora(n, target_modules="all-linear", modules_to_save=["pre_classifier"])),
    Case("lora-pooler", ("bert", "albert"), lambda n: lora(n, modules_to_save=["pooler"])),
    Case("vera", EVERY, vera),
    Case("vera-projection-not-saved", ONE_EACH, lambda n: vera(n, save_projection=False, projection_prng_key=7)),
    Case("vera-d-initial", ("bert", "qwen3"), lambda n: vera(n, target_modules=list(n.attention), d_initial=0.7)),
    Case("vera-layers", ("bert", "llama"), lambda n: vera(n, layers_to_transform=[1])),
    Case("vera-bias", ("bert", "gpt2"), lambda n: vera(n, bias="vera_only")),
    Case("loha", NO_CONV1D, loha),
    Case("loha-patterns", ("bert", "llama"),
         lambda n: loha(n, rank_pattern={n.attention[0]: 5}, alpha_pattern={layer(n, "1", n.ffn[-1]): 2})),
    Case("lokr", NO_CONV1D, lokr),
    Case("lokr-whole", ("bert", "qwen3"), lambda n: lokr(n, r=64, alpha=64)),
    Case("lokr-both", ("bert", "llama"), lambda n: lokr(n, r=1, decompose_both=True)),
    Case("lokr-factor", ("bert", "llama"),
         lambda n: lokr(n, decompose_factor=4, rank_pattern={n.attention[0]: 1}, alpha_pattern={n.ffn[0]: 8})),
    Case("lokr-both-factor", ("bert", "qwen3"), lambda n: lokr(n, r=1, decompose_both=True, decompose_factor=8)),
    Case("ia3", ("bert", "roberta", "deberta-v2", "gpt2", "llama", "qwen3"), ia3),
    Case("ia3-lists", EVERY, lambda n: ia3(n, target_modules=n.linear, feedforward_modules=[n.ffn[-1]])),
    Case("ia3-regex", ("bert", "gpt2", "llama"),
         lambda n: ia3(n, target_modules=layer(n, r"\d", f"({n.attention[0]}|{n.ffn[-1]})"),
                       feedforward_modules=layer(n, "1", n.ffn[-1]))),
    Case("ia3-no-feedforward", ("bert", "llama"),
         lambda n: ia3(n, target_modules=list(n.attention), feedforward_modules=[])),
    Case("norms", ("gpt2", "llama", "qwen3"), norms),
    Case("norms-listed", EVERY, lambda n: norms(n, target_modules=list(n.norms))),
    Case("prefix", CACHED, prefix),
    Case("prefix-projection", ("bert", "gpt2", "llama"),
         lambda n: prefix(n, prefix_projection=True, encoder_hidden_size=24)),
    Case("prompt", SAME_EMBEDDING, prompt),
    Case("prompt-narrow", ("electra",), lambda n: prompt(n, token_dim=16)),
    Case("prompt-wide", ("albert",), lambda n: prompt(n, token_dim=128)),
    Case("prompt-all-given", ("distilbert",),
         lambda n: prompt(n, token_dim=32, num_layers=2, num_attention_heads=4)),
    Case("p-tuning-mlp", ("bert", "roberta", "gpt2", "llama"), p_tuning),
    Case("p-tuning-lstm", ("bert", "gpt2", "qwen3"),
         lambda n: p_tuning(n, encoder_reparameterization_type="LSTM")),
)  # fmt: skip

CASES_OF = {family: tuple(case for case in CASES if family in case.families) for family in EVERY}

UNUSUAL = (
    Case("lora-init-pissa", ("bert",), lambda n: lora(n, init_lora_weights="pissa")),
    Case("lora-positions", ("bert", "gpt2"), lambda n: lora(n, target_modules=["position_embeddings", "wpe"])),
    Case("lora-trainable-tokens", ("bert", "llama"), lambda n: lora(n, trainable_token_indices=[5, 6, 7])),
    Case("lora-parameters", ("bert",),
         lambda n: lora(n, lora_dropout=0.0, target_parameters=["intermediate.dense.weight"])),
    Case("lora-trained-norm", ("bert", "gpt2"), lambda n: lora(n, modules_to_save=[n.norms[-1]])),
    Case("lora-trained-embedding", ("bert", "llama"), lambda n: lora(n, modules_to_save=[n.embedding])),
    Case("lora-two-biases", ("bert",), lambda n: lora(n, lora_bias=True, bias="all")),
    Case("lora-bias-where-none-was", ("llama",), lambda n: lora(n, lora_bias=True)),
    Case("lora-transposed-linear", ("bert",), lambda n: lora(n, fan_in_fan_out=True)),
    Case("lora-absent-target", ("bert", "llama"), lambda n: lora(n, target_modules=["absent", *n.attention])),
    Case("lora-position-projections", ("deberta-v2",), lambda n: lora(n, target_modules="all-linear")),
    Case("vera-all-linear", ("bert", "gpt2"), lambda n: vera(n, target_modules="all-linear")),
    Case("loha-convolutions", ("bert",), lambda n: loha(n, use_effective_conv2d=True)),
    Case("norms-of-others", ("bert",), lambda n: norms(n, target_modules=["query", "token_type_embeddings"])),
    Case("p-tuning-encoder-saved", ("modernbert",), p_tuning),  # its mlp_head.* is saved for ending in "head"
)  # fmt: skip
"""What PEFT can do and hardly anybody does: a server may refuse it, but not answer otherwise than PEFT."""

WIDE_EMBEDDING = "Sizes of tensors must match"
NO_CACHE = "does not support past key values|specify `token_dim`"
NO_DEFAULT = "Please specify `target_modules`"

IMPOSSIBLE = (
    ("Conv1D is no layer of LoHa", ("gpt2",), loha, "Conv1D"),
    ("Conv1D is no layer of LoKr", ("gpt2",), lokr, "Conv1D"),
    ("VeRA on embeddings", ("bert",), lambda n: vera(n, target_modules=[n.embedding]), "No layers types compatible"),
    ("LoHa on embeddings", ("bert",), lambda n: loha(n, target_modules=[n.embedding]), "Embedding.*not supported"),
    ("LoKr on embeddings", ("bert",), lambda n: lokr(n, target_modules=[n.embedding]), "Embedding.*not supported"),
    ("IA3 on embeddings", ("bert",), lambda n: ia3(n, target_modules=[n.embedding], feedforward_modules=[]),
     "Embedding.*not supported"),
    ("LoRA on norms", ("bert",), lambda n: lora(n, target_modules=list(n.norms)), "LayerNorm.*not supported"),
    ("DoRA with biases", ("bert",), lambda n: lora(n, use_dora=True, lora_bias=True), "not supported for DoRA"),
    ("biases of embeddings", ("bert",), lambda n: lora(n, target_modules=[n.embedding], lora_bias=True),
     "not supported for Embedding"),
    ("layers of a regex", ("bert",), lambda n: lora(n, target_modules=".*query", layers_to_transform=1),
     "cannot be used when `target_modules` is a str"),
    ("a pattern without layers", ("bert",), lambda n: lora(n, layers_pattern=n.layers), "must also be specified"),
    ("feed-forward modules that are no targets", ("bert",),
     lambda n: ia3(n, target_modules=["query"], feedforward_modules=["output.dense"]), "should be a subset"),
    ("models without a cache", ("albert", "mpnet", "distilbert", "deberta-v2", "modernbert"), prefix, NO_CACHE),
    ("embeddings of another size", ("electra", "albert"), prompt, WIDE_EMBEDDING),
    ("embeddings of another size", ("electra", "albert"), p_tuning, WIDE_EMBEDDING),
    ("a config without hidden_size", ("distilbert",), prompt, "specify `token_dim`"),
    ("no default targets", ("xlm-roberta", "electra", "albert", "mpnet", "distilbert", "modernbert"), ia3, NO_DEFAULT),
    ("no default targets", tuple(f for f in EVERY if f not in ("gpt2", "llama", "qwen3")), norms, NO_DEFAULT),
    ("the first layer has no norm", ("modernbert",), lambda n: norms(n, target_modules=["attn_norm"]), None),
    ("pre_classifier is of the head", ("distilbert",), lambda n: lora(n, target_modules="all-linear"),
     "modules_to_save cannot be applied"),
)  # fmt: skip
"""What PEFT itself refuses, so that no such checkpoint exists: why, where, and what it says."""

HEADLESS = (
    ("deberta-v2", r"pooler\.dense", lambda n: lora(n, modules_to_save=None)),
    ("deberta-v2", r"pooler\.dense", lambda n: prompt(n, modules_to_save=None)),
    ("modernbert", r"head\.(dense|norm)", lambda n: lora(n, modules_to_save=None)),
    ("modernbert", r"head\.(dense|norm)", lambda n: p_tuning(n, modules_to_save=None)),
)
"""Checkpoints without a layer of their head, which was random and is lost: the family, the layer, the config."""

UNSUPPORTED_TYPES = {
    "OFT": lambda n: OFTConfig(task_type="SEQ_CLS", target_modules=list(n.attention), r=4, oft_block_size=0),
    "HRA": lambda n: HRAConfig(task_type="SEQ_CLS", target_modules=list(n.attention), r=4),
    "ADALORA": lambda n: AdaLoraConfig(task_type="SEQ_CLS", target_modules=list(n.attention), total_step=10),
}
SUPPORTED_TYPES = (
    "LORA", "VERA", "LOHA", "LOKR", "IA3", "LN_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
)  # fmt: skip

UNSUPPORTED_OPTIONS = {
    "layer_replication": lambda n: lora(n, layer_replication=[(0, 2), (1, 2)]),
    "use_qalora": lambda n: lora(n, use_qalora=True, qalora_group_size=16),
    "alora_invocation_tokens": lambda n: lora(n, alora_invocation_tokens=[5]),
    "init_lora_weights": lambda n: lora(n, init_lora_weights="pissa"),
}


MODELS: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": None,  # the body alone
}
"""PEFT's task types."""

OTHER_TASKS = tuple(task for task in MODELS if task != "SEQ_CLS")

UNASKED = {("modernbert", "TOKEN_CLS"): ("head",), ("modernbert", "QUESTION_ANS"): ("head", "classifier")}
"""Layers of other heads that PEFT saves only where they are listed."""

SPREAD = (
    "lora", "lora-dense", "lora-bias-all", "lora-exclude-regex", "lora-dora", "lora-embedding-and-linear", "vera",
    "ia3-lists", "norms-listed", "prefix", "prompt", "p-tuning-mlp",
)  # fmt: skip
OTHER_CASES = tuple(
    (task, family, case)
    for task in OTHER_TASKS
    for case in CASES
    for family in case.families
    if case.name in SPREAD
    # in the body alone, no name has a dot before the first part, which this expression wants
    and (task, case.name) != ("FEATURE_EXTRACTION", "lora-exclude-regex" if family != "bert" else "")
)
"""The cases that are tried with other heads too."""


class Trained(NamedTuple):
    """A checkpoint as PEFT saves it, and what PEFT answers with it."""

    files: dict[str, bytes]
    labels: tuple[str, ...] | None
    """None: the head has none."""
    logits: list[Tensor]
    """Of each text alone: [labels], [tokens, outputs] of a head of tokens, or the mean of the states [hidden]."""
    bare: list[Tensor]
    """The same head's on the backbone without the adapter."""


def classifier(family: str, labels: int, task: str, **options: Any) -> PreTrainedModel:
    """transformers' model with a head over the weights of the tiny backbone; that alone for vectors."""
    base = tiny_model(family, **options)
    if MODELS[task] is None:
        return base
    config = copy.deepcopy(base.config)
    config.num_labels = 2 if task == "QUESTION_ANS" else labels
    model = MODELS[task].from_config(config).eval()
    result = model.base_model.load_state_dict(base.state_dict(), strict=False)
    assert not result.missing_keys
    return model


def train(
    family: str, config: Callable[[Names], PeftConfig], *, seed: str = "", task: str = "SEQ_CLS", **options: Any
) -> Trained:
    """PEFT's model of a family, as after a training. `options` are the backbone's."""
    peft_config = config(NAMES[family])
    if task != "SEQ_CLS":
        peft_config.task_type = task
        peft_config.modules_to_save = list(UNASKED.get((family, task), ())) or None
    with torch.random.fork_rng():
        torch.manual_seed(crc32(f"{family} {seed}".encode()))
        return train_model(classifier(family, 2 + len(seed) % 4, task, **options), peft_config, TEXTS)


@torch.no_grad()
def train_model(model: PreTrainedModel, config: PeftConfig, texts: Sequence[Encoding], noise: float = NOISE) -> Trained:
    """Moves every weight that PEFT would train, saves the result and answers the texts with it."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in body:
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    bare = copy.deepcopy(model)
    tuned = get_peft_model(model, config).eval()
    for name, parameter in tuned.named_parameters():
        # PEFT starts from a copy of the head, which is random already: the adapter alone makes the difference.
        head = "modules_to_save" in name and f".{bare.base_model_prefix}." not in name
        replaced = "original_module" in name  # bias="all" saves these too
        if (parameter.requires_grad or replaced) and not head:
            parameter.add_(torch.randn(parameter.shape) * noise)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    labelled = config.task_type in ("SEQ_CLS", "TOKEN_CLS")
    return Trained(
        files,
        LABELS[: bare.config.num_labels] if labelled else None,
        [_answer(tuned, text) for text in texts],
        [_answer(bare, text) for text in texts],
    )


def _answer(model: Any, text: Encoding) -> Tensor:
    """What Trained.logits holds of a text, without its virtual tokens where there is one for each token."""
    output = model(input_ids=torch.tensor([text.ids]))
    if "start_logits" in output:
        logits = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
    else:
        logits = output.logits[0] if "logits" in output else output.last_hidden_state[0].mean(0)
    return logits[-len(text) :] if logits.ndim == 2 else logits


@cache
def trained(family: str, case: Case, task: str = "SEQ_CLS") -> Trained:
    """The case's checkpoint; made once."""
    return train(family, case.config, seed=case.name, task=task)
