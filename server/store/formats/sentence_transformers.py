"""What the files of sentence-transformers say of a text's vector: modules.json and the folder of its pooling."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.core import Pooling
from server.errors import InvalidAdapter
from server.store.formats.heads import Head
from server.store.formats.reading import read_json, read_json_list, refusal, refuse_labels

MODULES = "modules.json"
CONFIG = "1_Pooling/config.json"
"""Where it is unless modules.json says otherwise."""

PROMPTS = "config_sentence_transformers.json"

POOLINGS = {"mean": Pooling.MEAN, "cls": Pooling.CLS, "lasttoken": Pooling.LAST}

OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags that came before `pooling_mode` -> what it calls them."""

KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def describes(files: Mapping[str, bytes]) -> bool:
    """Whether the files are there."""
    return MODULES in files or CONFIG in files


def embedding(files: Mapping[str, bytes], labels: Sequence[str] | None) -> Head:
    """The task of an adapter without a head: vectors of length 1, means over the tokens unless the files differ.

    Raises InvalidAdapter naming the option for a pooling that is not known, for another kind of module and for a prompt
    before every text, and naming the file of a pooling that modules.json speaks of where it is missing.
    """
    refuse_labels(labels, "a checkpoint without a head gives vectors, which")
    options, normalize = [CONFIG] if CONFIG in files else [], True
    if MODULES in files:
        modules = [(_kind(module), module) for module in read_json_list(files, MODULES)]
        options = [f"{module.get('path')}/config.json" for kind, module in modules if kind == "Pooling"]
        normalize = any(kind == "Normalize" for kind, _ in modules)
    _refuse_prompt(read_json(files, PROMPTS) if PROMPTS in files else {})
    poolings = [_pooling(file, read_json(files, file)) for file in options]
    return Head("embedding", {"pooling": poolings[0] if poolings else Pooling.MEAN, "normalize": normalize}, ())


def _refuse_prompt(options: Mapping[str, Any]) -> None:
    """The library would put the default prompt before each text; without it the vectors are others."""
    name, prompts = options.get("default_prompt_name"), options.get("prompts")
    empty = isinstance(name, str) and isinstance(prompts, dict) and prompts.get(name) == ""
    if name is not None and not empty:
        raise refusal(PROMPTS, options, "default_prompt_name", "null, and the prompt in the request's texts")


def _kind(module: Any) -> str:
    """`Pooling` of `sentence_transformers.models.Pooling`."""
    if not isinstance(module, dict):
        raise InvalidAdapter(f"{MODULES} is not a list of modules", param=MODULES, code="bad_file")
    kind = str(module.get("type")).rpartition(".")[2]
    if kind not in KNOWN_MODULES:
        raise refusal(MODULES, module, "type", ", ".join(KNOWN_MODULES))
    return kind


def _pooling(where: str, options: Mapping[str, Any]) -> Pooling:
    if "pooling_mode" in options:
        mode = options["pooling_mode"]
        mode = mode[0] if isinstance(mode, list) and len(mode) == 1 else mode
        if not isinstance(mode, str) or mode not in POOLINGS:
            raise refusal(where, options, "pooling_mode", ", ".join(POOLINGS))
        return POOLINGS[mode]
    chosen = [flag for flag in OLD_MODES if options.get(flag)]
    for flag in chosen:
        if OLD_MODES[flag] not in POOLINGS or len(chosen) > 1:
            supported = [flag for flag, mode in OLD_MODES.items() if mode in POOLINGS]
            raise refusal(where, options, flag, f"one of {', '.join(supported)}")
    return POOLINGS[OLD_MODES[chosen[0]]] if chosen else Pooling.MEAN
