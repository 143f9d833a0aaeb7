"""transformers' sequence classification heads, as whole models and PEFT store them, to ours."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.core import BackboneSpec, ClassifierSpec, Pooling
from server.errors import InvalidAdapter
from server.store.formats.reading import Checkpoint
from server.tasks.head import BIAS, NORM, WEIGHT, hidden_name


def classifier(spec: BackboneSpec, names: Mapping[str, str], root: str = "") -> ClassifierSpec:
    """The head of the backbone's family; `names` are the checkpoint's tensors without the model's prefix.

    `root` is what the file puts before the names of heads.

    Where the checkpoint brings a pooler of its own, that is part of the head, instead of the backbone's. Raises
    InvalidAdapter for a family whose head is not known, and for a head that is not whole.
    """
    if spec.classifier is None:
        raise InvalidAdapter(
            f"sequence classification heads of {spec.model_type!r} models are not known",
            param="task_type",
            code="unsupported_head",
        )
    head = spec.classifier
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


def _sibling(head: ClassifierSpec) -> str:
    """The dense layer that lives in the classifier, and is stored with it: `classifier.dense`."""
    return head.output.rpartition(".")[0] + ".dense"


def take(checkpoint: Checkpoint, head: ClassifierSpec, names: Mapping[str, str], root: str = "") -> dict[str, Any]:
    """Takes the head's tensors from the checkpoint: our options of the head."""

    def take_one(path: str, ours: str) -> None:
        checkpoint.take(names.get(path, f"{root}{path}"), ours)

    take_one(f"{head.output}.weight", WEIGHT)
    if head.bias:
        take_one(f"{head.output}.bias", BIAS)
    config: dict[str, Any] = {"pooling": head.pooling, "bias": head.bias}
    if head.dense:
        take_one(f"{head.dense}.weight", hidden_name(0, "weight"))
        if head.dense_bias:
            take_one(f"{head.dense}.bias", hidden_name(0, "bias"))
        config |= {"hidden_layers": 1, "activation": head.activation, "hidden_bias": head.dense_bias}
    if head.norm:
        take_one(f"{head.norm}.weight", f"{NORM}weight")
        config["norm_eps"] = head.norm_eps
    return config
