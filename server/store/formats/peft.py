"""PEFT checkpoints, exactly as `save_pretrained` writes them: adapter_config.json and adapter_model.safetensors."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from server.adapters import METHODS
from server.adapters.base import Host, tensor_name
from server.adapters.targets import SELECTORS
from server.adapters.vera import Vera, VeraConfig, projections
from server.core import BackboneSpec, HeadKind, Reach, Site, SiteKind, is_target
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, read_tensors
from server.store.formats import heads, sentence_transformers
from server.store.formats.files import required
from server.store.formats.reading import (
    Checkpoint,
    configured,
    model_config,
    read_json,
    refusal,
    refuse_pickle,
)

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

ROOTS = ("base_model.model.", "base_model.")
"""What PEFT puts before the names of the wrapped model; the second with prompts and prefixes."""

ALWAYS_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "fan_in_fan_out",  # says how the frozen weight is stored
        "inference_mode",
        "modules_to_save",  # their tensors are in the checkpoint
        "monteclora_config",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Fields that say how an adapter was trained or loaded, and change no output."""

HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the backbone as it was. The others (PiSSA, OLoRA, LoftQ, CorDA ...) train
against a changed backbone, whose outputs the unchanged one cannot give."""

TASK_TYPES = {
    "SEQ_CLS": HeadKind.SEQUENCE,
    "TOKEN_CLS": HeadKind.TOKENS,
    "QUESTION_ANS": HeadKind.QUESTION,
    "FEATURE_EXTRACTION": None,
}
"""`task_type` -> the head that the model had; None: it had none."""

BIASES = ("none", "all", "lora_only", "vera_only")


@dataclass(frozen=True, slots=True)
class PeftType:
    """How a `peft_type` reads as one of our methods."""

    method: str
    options: tuple[str, ...]
    """Fields that are options of the method, under the same names."""
    inert: frozenset[str] = frozenset()
    """Fields that change no output, beside ALWAYS_INERT."""
    handled: tuple[str, ...] = ()
    """Fields that the reader itself looks at."""
    given: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda options: {}
    """Options of ours that this type means without saying so."""


_LYCORIS = frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "init_weights"})
_PROMPTED = frozenset(
    {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "encoder_hidden_size"}
)

TYPES: dict[str, PeftType] = {
    "LORA": PeftType(
        "lora",
        (*SELECTORS, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"),
        frozenset(
            {
                "corda_config",
                "eva_config",
                "loftq_config",
                "lora_dropout",
                "lora_ga_config",
                "megatron_config",
                "megatron_core",
                "qalora_group_size",
                "runtime_config",
                "velora_config",
            }
        ),
        ("use_dora", "bias", "init_lora_weights"),
    ),
    "VERA": PeftType(
        "vera",
        (*SELECTORS, "r", "projection_prng_key", "save_projection", "d_initial"),
        frozenset({"vera_dropout", "init_weights"}),
        ("bias",),
    ),
    "LOHA": PeftType("loha", (*SELECTORS, "r", "alpha", "rank_pattern", "alpha_pattern"), _LYCORIS),
    "LOKR": PeftType(
        "lokr",
        (*SELECTORS, "r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"),
        _LYCORIS,
    ),
    "IA3": PeftType(
        "ia3", ("target_modules", "exclude_modules", "feedforward_modules"), frozenset({"init_ia3_weights"})
    ),
    "LN_TUNING": PeftType("ln_tuning", ("target_modules", "exclude_modules")),
    "PREFIX_TUNING": PeftType(
        "prefix_tuning",
        ("num_virtual_tokens",),
        _PROMPTED | {"prefix_projection", "init_weights"},  # what is stored has been projected already
        given=lambda options: {"position_shift": True},
    ),
    "PROMPT_TUNING": PeftType(
        "prompt_tuning",
        ("num_virtual_tokens",),
        _PROMPTED | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    ),
    "P_TUNING": PeftType(
        "p_tuning",
        ("num_virtual_tokens",),
        _PROMPTED | {"encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"},
        given=lambda options: {"encoder_reparameterization_type": None},  # what is stored has been through it already
    ),
}
"""By `peft_type`. A field that is neither an option, nor handled, nor inert must be unset."""

SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"}
"""Parameters that PEFT names otherwise."""


def read(files: Mapping[str, bytes], labels: Sequence[str] | None, host: Host) -> Artifact:
    """The artifact of a PEFT folder. Every tensor of it is consumed, or refused by the name that it has there."""
    options = read_json(files, CONFIG)
    refuse_pickle(files, TENSORS, PICKLE, "save_pretrained(..., safe_serialization=True)")
    kind = _kind(options, files)
    spec = _wrapped(host.spec, kind)
    absent = _absent(spec, kind)
    method, config = _method(options, spec, absent)
    model = model_config(files, host)
    checkpoint = Checkpoint(read_tensors(TENSORS, required(files, TENSORS)), host)
    names = _names(checkpoint, spec)
    root = next((root for root in ROOTS if any(name.startswith(root) for name in checkpoint.tensors)), ROOTS[0])
    if kind is None:
        head = sentence_transformers.embedding(files, labels)
    else:
        head = heads.read(checkpoint, kind, files, labels, model, names, root)

    parts = [(method, config)]
    config |= _take_method(checkpoint, method, config, names, spec)
    if biases := _take_biases(checkpoint, options.get("bias", "none"), config, names, spec, absent):
        parts.append(("bitfit", {"target_modules": biases}))
    for name, theirs in names.items():
        if kind is None and name.startswith("pooler."):
            checkpoint.skip(theirs)  # no pooling that is read here goes through it
        if method == "p_tuning" and name.startswith("prompt_encoder."):
            checkpoint.skip(theirs)  # what the stored prompt has been through already
        # PEFT adds whole embeddings to a checkpoint that targets them
        if checkpoint.is_left(theirs) and checkpoint.is_frozen(theirs, name):
            checkpoint.skip(theirs)
    return checkpoint.finish(
        parts=parts,
        task=head.task,
        head=head.config,
        labels=head.labels,
        source=f"peft {str(options.get('peft_version') or 'of unknown version')[:40]}",
    )


def _kind(options: Mapping[str, Any], files: Mapping[str, bytes]) -> HeadKind | None:
    """The head of the model that was trained; None where it had none."""
    said = options.get("task_type")
    if said is None:
        return None if sentence_transformers.describes(files) else HeadKind.SEQUENCE
    if not isinstance(said, str) or said not in TASK_TYPES:
        raise refusal(CONFIG, options, "task_type", ", ".join(TASK_TYPES))
    return TASK_TYPES[said]


def _wrapped(spec: BackboneSpec, kind: HeadKind | None) -> BackboneSpec:
    """The backbone as it lies in the model that PEFT wrapped."""
    if kind is None:
        return replace(spec, prefix="")
    return replace(spec, prefix=heads.known(spec, kind).prefix or spec.prefix)


def _absent(spec: BackboneSpec, kind: HeadKind | None) -> list[str]:
    """Linear layers of the backbone that the model did not have: transformers builds no pooler for heads of tokens."""
    if kind not in (HeadKind.TOKENS, HeadKind.QUESTION):
        return []
    return [site.name for site in spec.sites_of(SiteKind.LINEAR) if spec.sites[site].reach is Reach.TEXTS]


def _method(options: Mapping[str, Any], spec: BackboneSpec, absent: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """PEFT's options as ours. One that is set and would change the outputs is known or refused, never ignored."""
    kind = TYPES.get(options["peft_type"]) if isinstance(options.get("peft_type"), str) else None
    if kind is None:
        raise refusal(CONFIG, options, "peft_type", ", ".join(TYPES))
    if options.get("init_lora_weights", True) not in HARMLESS_INITS:
        raise refusal(CONFIG, options, "init_lora_weights", ", ".join(map(str, HARMLESS_INITS)))
    if options.get("bias", "none") not in BIASES:
        raise refusal(CONFIG, options, "bias", ", ".join(BIASES))
    for option in sorted(options.keys() - set(kind.options) - kind.inert - set(kind.handled) - ALWAYS_INERT):
        if options[option] and options[option] != "none":
            raise refusal(CONFIG, options, option, ", ".join(sorted({*kind.options, *kind.handled})))
    method = "dora" if kind.method == "lora" and options.get("use_dora") else kind.method
    known = METHODS[method].Config.model_fields.keys() | set(SELECTORS)
    chosen = {name: options[name] for name in kind.options if options.get(name) not in (None, {}, []) and name in known}
    if options.get("lora_bias") and method == "dora":
        raise refusal(CONFIG, options, "lora_bias", "false together with use_dora")
    if kind.options[0] == SELECTORS[0] and "target_modules" not in chosen:
        raise refusal(CONFIG, options, "target_modules", "a list of module names or a regular expression")
    if absent and "exclude_modules" in kind.options:
        chosen["exclude_modules"] = _with(chosen.get("exclude_modules") or [], absent)
    return method, configured(CONFIG, method, chosen | kind.given(options), spec)


def _with(excluded: Any, absent: Sequence[str]) -> Any:
    """PEFT's `exclude_modules`, a list or a regular expression, with further modules."""
    if isinstance(excluded, str):
        return "|".join([f"(?:{excluded})", *(rf".*\.{re.escape(path)}" for path in absent)])
    return [*excluded, *absent] if isinstance(excluded, list) else excluded


def _names(checkpoint: Checkpoint, spec: BackboneSpec) -> dict[str, str]:
    """The tensors' names without PEFT's wrappers and the model's prefix -> their names in the file."""
    names: dict[str, str] = {}
    originals: list[str] = []
    for theirs in checkpoint.tensors:
        root = next((root for root in ROOTS if theirs.startswith(root)), "")
        name = theirs.removeprefix(root)
        if ".original_module." in name:
            originals.append(theirs)
            continue
        for wrapper in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
            name = name.replace(wrapper, ".")
        name = name.removeprefix(f"{spec.prefix}.")
        if name in names:
            checkpoint.same(theirs, names[name])
        else:
            names[name] = theirs
    for theirs in originals:  # what a module of modules_to_save was before, which PEFT stores and never runs
        before = theirs.partition(".original_module.")[0]
        if any(other.startswith(f"{before}.") for other in names.values()):
            checkpoint.skip(theirs)
    return names


def _take_method(
    checkpoint: Checkpoint, method: str, config: Mapping[str, Any], names: Mapping[str, str], spec: BackboneSpec
) -> dict[str, Any]:
    """Takes the method's own tensors; gives options that only the tensors tell."""
    kind = METHODS[method]
    parsed = kind.Config.model_validate(dict(config))
    if method == "prefix_tuning":
        _take_prefix(checkpoint, kind.sites(parsed, spec), names.get("prompt_embeddings", "prompt_embeddings"))
        return {}
    more = {}
    if isinstance(kind, Vera):
        assert isinstance(parsed, VeraConfig)
        more = _take_projections(checkpoint, kind, parsed, names)
    for site in kind.sites(parsed, spec):
        for param, shape in kind.shapes(parsed, site, spec.sites[site]).items():
            ours = tensor_name(site, param)
            path = "prompt_embeddings" if param == "prompt" else f"{site.name}.{SUFFIXES.get(param, param)}"
            if method == "ln_tuning":
                path = _first(names, f"{site.name}.ln_tuning_layers.{param}", path)
            theirs = names.get(path, _whole(path, spec))
            if param == "ia3_l":
                stored = (1, *shape) if site.kind is SiteKind.LINEAR_INPUT else (*shape, 1)
                checkpoint.take(theirs, ours, stored, lambda tensor: tensor.flatten())
            else:
                checkpoint.take(theirs, ours)
    return more


def _take_prefix(checkpoint: Checkpoint, sites: Sequence[Site], theirs: str) -> None:
    """One matrix [virtual tokens, layers * 2 * size] holds the keys and values of all layers in turn."""
    spec = checkpoint.host.spec
    sizes = [spec.sites[site].size_out for site in sites for _ in range(2)]
    tensor = checkpoint.use(theirs)
    if tensor.ndim != 2 or tensor.shape[1] != sum(sizes):
        raise InvalidAdapter(
            f"tensor {theirs!r} has shape {list(tensor.shape)}, the backbone needs keys and values of "
            f"{len(sites)} layers, {sum(sizes)} columns",
            param=theirs,
            code="wrong_shape",
        )
    pieces = torch.split(tensor, sizes, dim=1)
    for index, (site, param) in enumerate((site, param) for site in sites for param in ("key", "value")):
        checkpoint.put(tensor_name(site, param), pieces[index])


def _take_projections(
    checkpoint: Checkpoint, method: Vera, config: VeraConfig, names: Mapping[str, str]
) -> dict[str, Any]:
    """VeRA's A and B. Those that their seed gives are not kept: all adapters of that seed share them then."""
    found = {param: names[param] for param in ("vera_A", "vera_B") if param in names}
    if not found:
        return {"save_projection": False}
    sizes = method.largest(config, checkpoint.host.spec)
    known: tuple[Tensor, Tensor] = projections(config.projection_prng_key, config.r, *sizes)
    seeded = len(found) == 2 and all(
        torch.equal(checkpoint.tensors[found[param]], value)
        for param, value in zip(("vera_A", "vera_B"), known, strict=True)
    )
    for param, theirs in found.items():
        if seeded:
            checkpoint.skip(theirs)
        else:
            checkpoint.take(theirs, f"{method.name}/{param}")
    return {"save_projection": not seeded}


def _take_biases(
    checkpoint: Checkpoint,
    which: str,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    spec: BackboneSpec,
    absent: Sequence[str],
) -> list[str]:
    """Takes the biases of the backbone that were trained, all or those of the targets: the paths of their layers."""
    kinds = (SiteKind.LINEAR, SiteKind.NORM)
    sites = [site for site, at in spec.sites.items() if at.bias and site.kind in kinds and site.name not in absent]
    if which == "none":
        return []
    if which != "all":
        sites = [site for site in sites if any(is_target(site.name, one) for one in config["target_modules"])]
    for site in sites:
        path = f"{site.name}.bias"
        checkpoint.take(names.get(path, _whole(path, spec)), tensor_name(site, "bias"))
    return [site.name for site in sites]


def _first(names: Mapping[str, str], *paths: str) -> str:
    """The first path that is there; else the first."""
    return next((path for path in paths if path in names), paths[0])


def _whole(path: str, spec: BackboneSpec) -> str:
    """The name that PEFT would give a tensor."""
    if path == "prompt_embeddings":
        return path
    return f"{ROOTS[0]}{spec.prefix}.{path}" if spec.prefix else f"{ROOTS[0]}{path}"
