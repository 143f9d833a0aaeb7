"""An artifact to an adapter on the device, with the proof that it is one."""

from collections.abc import Sequence

from server.backbone.backbone import Backbone
from server.core import BackboneSpec
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, Golden, TrainedOn
from server.tasks.adapter import Blueprint, TaskAdapter

GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""How far a golden output may be off, relative to 1 + the largest output. The demo adapters, trained in float32, are
off by 2e-7 when served in float32 and by up to 0.011 in bfloat16; the rest is room for other kernels and adapters."""

SMOKE_TEXTS = ("a", "adapterd checks that this adapter gives finite answers")


def build(artifact: Artifact, backbone: Backbone) -> TaskAdapter:
    """The adapter, every tensor of it consumed. Raises InvalidAdapter naming what does not fit."""
    manifest = artifact.manifest
    _check_backbone(manifest.backbone, backbone.spec)
    blueprint = Blueprint.check(
        method=manifest.method,
        config=manifest.config,
        also=[(part.method, part.config) for part in manifest.also],
        task=manifest.task,
        head=manifest.head,
        labels=manifest.labels,
        spec=backbone.spec,
    )
    blueprint.check_tensors(artifact.tensors)
    return blueprint.bind(artifact.tensors, backbone)


def check_golden(golden: Golden, outputs: Sequence[Sequence[float]], dtype: str) -> None:
    """Compares outputs computed here with those the trainer wrote down. Raises InvalidAdapter where they differ."""
    tolerance = GOLDEN_TOLERANCE[dtype]
    if [len(row) for row in golden.outputs] != [len(row) for row in outputs]:
        raise InvalidAdapter(
            "the golden sample's outputs do not have one row per text and one value per label", param="golden.outputs"
        )
    for text, expected, seen in zip(golden.texts, golden.outputs, outputs, strict=True):
        scale = 1 + max(map(abs, expected), default=0.0)
        off = max((abs(a - b) for a, b in zip(expected, seen, strict=True)), default=0.0)
        if not off <= tolerance * scale:
            raise InvalidAdapter(
                f"the golden sample does not reproduce: outputs for {text[:60]!r} are off by {off:.3g}, "
                f"{tolerance * scale:.3g} is allowed in {dtype}",
                param="golden",
                code="golden_mismatch",
            )


def _check_backbone(made_for: TrainedOn, spec: BackboneSpec) -> None:
    for field in ("model_type", "hidden_size", "num_layers", "fingerprint"):
        wanted, here = getattr(made_for, field), getattr(spec, field)
        if wanted is not None and wanted != here:
            raise InvalidAdapter(
                f"the adapter was made for a backbone with {field} {wanted}, this server's {spec.name!r} has {here}",
                param=f"backbone.{field}",
                code="wrong_backbone",
            )
