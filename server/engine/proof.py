"""The proof that an adapter does what its trainer saw: its golden sample, or at least a smoke test, through the very
path that requests take.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from server import __version__
from server.backbone.backbone import Backbone
from server.engine.pipeline import Pipeline
from server.errors import InvalidAdapter, NotFiniteOutput
from server.store.artifact import Golden, Manifest
from server.store.report import GoldenCheck, Report
from server.tasks.adapter import TaskAdapter

GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""How far a golden output may be off, relative to 1 + the largest output. The demo adapters, trained in float32, are
off by 2e-7 when served in float32 and by up to 0.011 in bfloat16; the rest is room for other kernels and adapters."""

SMOKE_TEXTS = ("a", "adapterd checks that this adapter gives finite answers")


class Prover:
    """Proves adapters on one backbone."""

    def __init__(self, backbone: Backbone, pipeline: Pipeline) -> None:
        self._backbone = backbone
        self._pipeline = pipeline

    async def prove(self, manifest: Manifest, adapter: TaskAdapter) -> GoldenCheck | None:
        """Runs the adapter. Raises InvalidAdapter where its outputs are not finite or not what the manifest says."""
        golden = manifest.golden
        texts = golden.texts if golden else SMOKE_TEXTS
        try:
            outputs = await self._pipeline.outputs(texts, adapter)
        except NotFiniteOutput as error:
            raise InvalidAdapter(
                "the adapter's weights are too large: its outputs are not finite", param="files", code="not_finite"
            ) from error
        if golden is None:
            return None
        return check_golden(golden, [output.flatten().tolist() for output in outputs], self._backbone.dtype_name)

    async def report(
        self,
        manifest: Manifest,
        tensors: int,
        parameters: int,
        adapter: TaskAdapter,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Report:
        """Proves an adapter whose tensors have been checked, and writes down what was found."""
        golden = await self.prove(manifest, adapter)
        spec = self._backbone.spec
        return Report(
            backbone=spec.name,
            fingerprint=spec.fingerprint,
            fingerprint_matched=manifest.backbone.fingerprint is not None,
            device=str(self._backbone.device),
            dtype=self._backbone.dtype_name,
            tensors=tensors,
            parameters=parameters,
            memory_bytes=adapter.nbytes,
            golden=golden,
            smoke_texts=golden.texts if golden else len(SMOKE_TEXTS),
            server=f"adapterd {__version__}",
            checked_at=clock(),
        )


def check_golden(golden: Golden, outputs: Sequence[Sequence[float]], dtype: str) -> GoldenCheck:
    """Compares outputs computed here with those the trainer wrote down. Raises InvalidAdapter where they differ."""
    tolerance = GOLDEN_TOLERANCE[dtype]
    if [len(row) for row in golden.outputs] != [len(row) for row in outputs]:
        raise InvalidAdapter(
            "the golden sample's outputs do not have one row per text and one value per label", param="golden.outputs"
        )
    largest = 0.0
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
        largest = max(largest, off / scale)
    return GoldenCheck(texts=len(golden.texts), difference=largest, tolerance=tolerance)
