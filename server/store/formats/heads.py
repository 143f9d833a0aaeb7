"""transformers' heads, as whole models and PEFT store them, to ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.core import BackboneSpec, HeadKind, HeadSpec, Pooling
from server.errors import InvalidAdapter
from server.store.formats.reading import (
    MODEL_CONFIG,
    Checkpoint,
    by_index,
    label_names,
    problem_task,
    refuse_labels,
    rows,
)
from server.tasks.head import BIAS, NORM, WEIGHT, hidden_name


@dataclass(frozen=True, slots=True)
class Head:
    """What a checkpoint's head is here."""

    task: str
    config: dict[str, Any]
    """Our options of the head."""
    labels: tuple[str, ...]


def known(spec: BackboneSpec, kind: HeadKind) -> HeadSpec:
    """The head of that kind of the backbone's family. Raises InvalidAdapter for a family whose heads are not known."""
    if kind not in spec.heads:
        raise InvalidAdapter(
            f"heads of {spec.model_type!r} models for {kind} are not known", param="task_type", code="unsupported_head"
        )
    return spec.heads[kind]


def read(
    checkpoint: Checkpoint,
    kind: HeadKind,
    files: Mapping[str, bytes],
    labels: Sequence[str] | None,
    model: Mapping[str, Any],
    names: Mapping[str, str],
    root: str = "",
) -> Head:
    """Takes the head's tensors from the checkpoint.

    `names` are its tensors without the model's prefix -> their names in the file, where `root` comes before the names
    of heads. `model` is the whole model's config.json, empty if it is not there.
    """
    head = _completed(known(checkpoint.host.spec, kind), checkpoint.host.spec, names, root)
    outputs = rows(checkpoint.tensors, names.get(f"{head.output}.weight", ""))
    if kind is HeadKind.QUESTION:
        refuse_labels(labels, "an adapter for question answering")
        return Head("question_answering", _take(checkpoint, head, names, root), ())
    task = "tagging" if kind is HeadKind.TOKENS else problem_task(model, outputs)
    texts = label_names(files, labels, by_index(model, MODEL_CONFIG), outputs)
    return Head(task, _take(checkpoint, head, names, root), texts)


def _completed(head: HeadSpec, spec: BackboneSpec, names: Mapping[str, str], root: str) -> HeadSpec:
    """Where the checkpoint brings a pooler of its own, that is part of the head, instead of the backbone's.

    Raises InvalidAdapter for a head that is not whole.
    """
    if head.pooling is Pooling.POOLER:
        own = next((path for path in ("pooler.dense", "pooler") if f"{path}.weight" in names), None)
        return replace(head, pooling=Pooling.CLS, dense=own) if own else head
    if head.dense and head.dense != _sibling(head) and f"{head.dense}.weight" not in names:
        raise InvalidAdapter(
            f"tensor '{root}{head.dense}.weight' is missing: the head of {spec.model_type!r} models goes through "
            f"{head.dense!r}, which transformers would make up at random; list it in modules_to_save when training",
            param=f"{root}{head.dense}.weight",
            code="missing_head",
        )
    return head


def _sibling(head: HeadSpec) -> str:
    """The dense layer that lives in the classifier, and is stored with it: `classifier.dense`."""
    return head.output.rpartition(".")[0] + ".dense"


def _take(checkpoint: Checkpoint, head: HeadSpec, names: Mapping[str, str], root: str) -> dict[str, Any]:
    """Takes the head's tensors: our options of the head."""

    def take_one(path: str, ours: str) -> None:
        checkpoint.take(names.get(path, f"{root}{path}"), ours)

    take_one(f"{head.output}.weight", WEIGHT)
    if head.bias:
        take_one(f"{head.output}.bias", BIAS)
    config: dict[str, Any] = {"bias": head.bias}
    if head.pooling is not None:
        config["pooling"] = head.pooling
    if head.dense:
        take_one(f"{head.dense}.weight", hidden_name(0, "weight"))
        if head.dense_bias:
            take_one(f"{head.dense}.bias", hidden_name(0, "bias"))
        config |= {"hidden_layers": 1, "activation": head.activation, "hidden_bias": head.dense_bias}
    if head.norm:
        take_one(f"{head.norm}.weight", f"{NORM}weight")
        config["norm_eps"] = head.norm_eps
    return config
