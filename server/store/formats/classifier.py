"""A whole model of transformers with a head, or a linear probe in its form: config.json and model.safetensors.

Only the head is kept. The body has to be the backbone, but for biases (BitFit) and normalization layers: what differs
in those becomes an adapter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from server.adapters.base import Host, tensor_name
from server.core import HeadKind, HeadSpec, Pooling, Site, SiteKind
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, read_tensors
from server.store.formats import heads
from server.store.formats.files import required
from server.store.formats.reading import (
    MODEL_CONFIG,
    Checkpoint,
    model_config,
    refuse_pickle,
)

TENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"

BUFFERS = (".position_ids", ".token_type_ids", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names of constants that older versions of transformers stored."""

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Ends of names that the first BERTs had."""


def read(files: Mapping[str, bytes], labels: Sequence[str] | None, host: Host) -> Artifact:
    """The artifact of a model's folder. Every tensor is the head's, the backbone's, or refused by its name."""
    model = model_config(files, host)
    kind = _kind(model)
    refuse_pickle(files, TENSORS, PICKLE)
    checkpoint = Checkpoint(read_tensors(TENSORS, required(files, TENSORS)), host)
    names = _names(checkpoint, heads.known(host.spec, kind))
    head = heads.read(checkpoint, kind, files, labels, model, _poolers(checkpoint, names))
    tuned = _take_body(checkpoint, names, pooled=head.config.get("pooling") is Pooling.POOLER)
    parts: list[tuple[str, dict[str, Any]]] = [
        (method, {"target_modules": layers}) for method, layers in tuned.items() if layers
    ]
    return checkpoint.finish(
        parts=parts or [("head_only", {})],
        task=head.task,
        head=head.config,
        labels=head.labels,
        source=f"transformers {str(model.get('transformers_version') or 'of unknown version')[:40]}",
    )


def _kind(model: Mapping[str, Any]) -> HeadKind:
    """What the model's class says that its head is for; a classifier of texts where it says nothing."""
    architectures = model.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return HeadKind.SEQUENCE
    name = str(architectures[0])
    kind = next((kind for kind in HeadKind if name.endswith(f"For{kind}")), None)
    if kind is None:
        raise InvalidAdapter(
            f"{MODEL_CONFIG}: a model of class {name[:100]} is no adapter; supported: "
            f"{', '.join(f'...For{kind}' for kind in HeadKind)}",
            param="architectures",
            code="unsupported_option",
        )
    return kind


def _names(checkpoint: Checkpoint, head: HeadSpec) -> dict[str, str]:
    """The tensors' names without the model's prefix -> their names in the file."""
    names: dict[str, str] = {}
    for theirs in checkpoint.tensors:
        name = theirs.removeprefix(f"{head.prefix or checkpoint.host.spec.prefix}.")
        if f".{name}".endswith(BUFFERS) and name not in checkpoint.host.tensors():
            checkpoint.skip(theirs)
            continue
        if head.pooling is None and name.startswith("pooler."):
            checkpoint.skip(theirs)  # older versions stored it with heads of tokens too, which do not read it
            continue
        for old, new in LEGACY.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        names[name] = theirs
    return names


def _poolers(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, str]:
    """The names without those of a pooler that is the backbone's own."""
    pooler = [name for name in names if name.startswith("pooler.")]
    if pooler and all(checkpoint.is_frozen(names[name], name) for name in pooler):
        return {name: theirs for name, theirs in names.items() if name not in pooler}
    return dict(names)


def _take_body(checkpoint: Checkpoint, names: Mapping[str, str], *, pooled: bool) -> dict[str, list[str]]:
    """Checks the body against the backbone: methods -> the layers that they replace tensors of."""
    spec = checkpoint.host.spec
    frozen = {name for name in checkpoint.host.tensors() if pooled or not name.startswith("pooler.")}
    body = {name: theirs for name, theirs in names.items() if name in frozen and checkpoint.is_left(theirs)}
    if not body:
        return {}  # a linear probe
    for name in sorted(frozen - names.keys()):
        raise InvalidAdapter(
            f"tensor {name!r} of the backbone is missing: a body is there whole, or not at all",
            param=name,
            code="missing_tensor",
        )
    norms: list[str] = []
    biases: list[str] = []
    for name, theirs in sorted(body.items()):
        path, _, param = name.rpartition(".")
        if checkpoint.is_frozen(theirs, name):
            checkpoint.skip(theirs)
        elif Site(SiteKind.NORM, path) in spec.sites and path not in norms:
            norms.append(path)
        elif Site(SiteKind.LINEAR, path) in spec.sites and param == "bias":
            biases.append(path)
        elif path not in norms:
            raise _differs(checkpoint, name, theirs)
    for path in norms:
        site = Site(SiteKind.NORM, path)
        for param in ("weight", "bias") if spec.sites[site].bias else ("weight",):
            checkpoint.take(names[f"{path}.{param}"], tensor_name(site, param))
    for path in biases:
        checkpoint.take(names[f"{path}.bias"], tensor_name(Site(SiteKind.LINEAR, path), "bias"))
    return {"bitfit": biases, "ln_tuning": norms}


def _differs(checkpoint: Checkpoint, name: str, theirs: str) -> InvalidAdapter:
    tensor: Tensor = checkpoint.tensors[theirs]
    frozen = checkpoint.host.tensors()[name].float().cpu()
    if tensor.shape != frozen.shape:
        return InvalidAdapter(
            f"tensor {theirs!r} has shape {list(tensor.shape)}, the backbone's has {list(frozen.shape)}",
            param=theirs,
            code="wrong_shape",
        )
    off = (tensor.float() - frozen).abs().max().item()
    return InvalidAdapter(
        f"tensor {theirs!r} is not the backbone's: it differs by up to {off:.3g}. Only a head may, and biases and "
        "normalization layers where adapters reach them; a classifier that was fine-tuned as a whole cannot share a "
        "backbone",
        param=theirs,
        code="other_body",
    )
