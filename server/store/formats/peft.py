"""PEFT checkpoints, exactly as `save_pretrained` writes them: adapter_config.json and adapter_model.safetensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from server.adapters import METHODS
from server.adapters.base import check_tensors, tensor_name
from server.adapters.lora import Lora, LoraConfig
from server.core import BackboneSpec
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, Labels, Manifest, TrainedOn, invalid_fields, read_tensors
from server.store.formats.files import required, required_json

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
"""The whole model's config, which names the labels, if the uploader adds it."""

ROOT = "base_model.model."
"""What PEFT puts before the names of the wrapped model."""

INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields of LoraConfig that say how it was trained or loaded, and change no output."""

HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the backbone as it was. The others (PiSSA, OLoRA, LoftQ, CorDA ...) train
against a changed backbone, whose outputs the unchanged one cannot give."""


def read(files: Mapping[str, bytes], labels: Sequence[str] | None, spec: BackboneSpec) -> Artifact:
    """The artifact of a PEFT folder. Every tensor of it is consumed, or refused by the name that it has there."""
    options = _json(files, CONFIG)
    if TENSORS not in files and "adapter_model.bin" in files:
        raise InvalidAdapter(
            "adapter_model.bin is a pickle, which this server does not open; save the adapter with "
            "save_pretrained(..., safe_serialization=True)",
            param="adapter_model.bin",
            code="bad_file",
        )
    tensors = read_tensors(TENSORS, required(files, TENSORS))
    method = Lora()
    config = _config(options, spec)
    if spec.classifier_pooling is None:
        raise InvalidAdapter(
            f"sequence classification heads of {spec.model_type!r} models are not supported, only those of one linear "
            "layer",
            param="task_type",
            code="unsupported_head",
        )
    model = _json(files, MODEL_CONFIG) if MODEL_CONFIG in files else {}
    if model.get("problem_type") not in (None, "single_label_classification"):
        raise InvalidAdapter(
            f"{MODEL_CONFIG}: problem_type = {model['problem_type']!r} is not supported; supported: "
            "single_label_classification",
            param="problem_type",
            code="unsupported_option",
        )
    for field, here in (("model_type", spec.model_type), ("hidden_size", spec.hidden_size)):
        if model.get(field, here) != here:
            raise InvalidAdapter(
                f"{MODEL_CONFIG}: {field} is {model[field]!r}, the backbone's is {here!r}",
                param=field,
                code="wrong_backbone",
            )
    names = _labels(model, labels, tensors.get(f"{ROOT}classifier.weight"))

    # PEFT's name -> ours, with the shape that the backbone asks for
    inner = f"{ROOT}{spec.prefix}."
    if not any(name.startswith(inner) for name in tensors):
        inner = ROOT
    ours = {f"{ROOT}classifier.{part}": f"head/classifier.{part}" for part in ("weight", "bias")}
    shapes: dict[str, tuple[int, ...]] = {
        f"{ROOT}classifier.weight": (len(names), spec.hidden_size),
        f"{ROOT}classifier.bias": (len(names),),
    }
    for site in method.sites(config, spec):
        for param, shape in method.shapes(config, site, *spec.sites[site]).items():
            theirs = f"{inner}{site.name}.{param}.weight"
            ours[theirs] = tensor_name(site, param)
            shapes[theirs] = shape
    check_tensors(tensors, shapes)

    manifest = Manifest(
        method=method.name,
        config=config.model_dump(mode="json"),
        task="classification",
        head={"pooling": spec.classifier_pooling},
        labels=names,
        # PEFT names its base by a path at best; the backbone that this upload is proven on is what it is bound to.
        backbone=TrainedOn.on(spec),
        source=f"peft {options.get('peft_version') or 'of unknown version'}",
    )
    return Artifact.build(manifest, {ours[name]: tensor for name, tensor in tensors.items()})


def _config(options: Mapping[str, Any], spec: BackboneSpec) -> LoraConfig:
    """PEFT's options as ours. One that is set and would change the outputs is known or refused, never ignored."""

    def refuse(option: str, supported: str) -> InvalidAdapter:
        return InvalidAdapter(
            f"{CONFIG}: {option} = {options.get(option)!r} is not supported; supported: {supported}",
            param=option,
            code="unsupported_option",
        )

    if options.get("peft_type") != "LORA":
        raise refuse("peft_type", f"LORA (methods of this server: {', '.join(METHODS)})")
    if options.get("task_type") not in ("SEQ_CLS", None):
        raise refuse("task_type", "SEQ_CLS")
    if options.get("init_lora_weights", True) not in HARMLESS_INITS:
        raise refuse("init_lora_weights", "initialisations that leave the backbone as it is")
    known = set(LoraConfig.model_fields)
    for option in sorted(options.keys() - known - INERT):
        if options[option] and options[option] != "none":
            raise refuse(option, ", ".join(sorted(known)))
    targets = options.get("target_modules")
    if not isinstance(targets, list):
        raise refuse("target_modules", "a list of module names")
    # PEFT lets targets be listed that match nothing; a tensor of such a one is refused by its name later.
    paths = [target.removeprefix(f"{spec.prefix}.") for target in targets if isinstance(target, str)]
    present = [path for path in paths if any(site.is_target(path) for site in spec.sites)]
    if not present:
        raise InvalidAdapter(
            f"{CONFIG}: none of the target_modules {targets} is a linear layer of the backbone ({spec.model_type})",
            param="target_modules",
            code="unknown_target",
        )
    try:
        values = {name: options[name] for name in known & options.keys()}
        return LoraConfig.model_validate(values | {"target_modules": sorted(present)})
    except ValidationError as error:
        raise invalid_fields(CONFIG, error) from error


def _labels(model: Mapping[str, Any], labels: Sequence[str] | None, classifier: Any) -> tuple[str, ...]:
    """The uploader's labels, or those of config.json; as many as the classifier has rows."""
    by_index = model.get("id2label")
    if labels is None and isinstance(by_index, dict):
        if by_index.keys() != {str(index) for index in range(len(by_index))}:
            raise InvalidAdapter(f"{MODEL_CONFIG}: the keys of id2label are not 0, 1, 2, ...", param="id2label")
        labels = [by_index[str(index)] for index in range(len(by_index))]
    if labels is None:
        raise InvalidAdapter(
            "PEFT does not store label names; send the form field `labels`, a JSON list, or add config.json",
            param="labels",
            code="missing_labels",
        )
    try:
        checked: tuple[str, ...] = TypeAdapter(Labels).validate_python(tuple(labels))
    except ValidationError as error:
        reason = invalid_fields("labels", error).message
        raise InvalidAdapter(reason, param="labels", code="invalid_labels") from error
    if classifier is not None and classifier.ndim == 2 and len(checked) != classifier.shape[0]:
        raise InvalidAdapter(
            f"{len(checked)} labels for a classifier of {classifier.shape[0]} rows",
            param="labels",
            code="invalid_labels",
        )
    return checked


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        document = from_json(required_json(files, name))
    except ValueError as error:
        raise InvalidAdapter(f"{name} is not JSON: {error}", param=name, code="bad_file") from error
    if not isinstance(document, dict):
        raise InvalidAdapter(f"{name} is not a JSON object", param=name, code="bad_file")
    return document
