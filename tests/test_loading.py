"""How a version gets from the store's files to the device: on which thread, and in whose memory."""

import asyncio
import gc
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import make_artifact, make_blueprint, random_tensors, tiny_backbone

from server.backbone.backbone import Backbone
from server.engine import loading
from server.engine.loading import KNOWN_BYTES_OF_ONE, Checked, Checker, Loader
from server.errors import CorruptVersion
from server.store.artifact import Artifact
from server.store.report import Report
from server.store.store import AdapterStore
from server.tasks.adapter import TaskAdapter

LOOP = "event loop"
BESIDE = "another thread"


@pytest.fixture(scope="module")
def half() -> Backbone:
    """A tiny BERT in bfloat16."""
    return tiny_backbone("bert", dtype=torch.bfloat16)


class Watched(Checker):
    """Notes who binds."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.binding: list[str] = []

    def bind(self, checked: Checked) -> TaskAdapter:
        self.binding.append(
            LOOP if threading.current_thread() is threading.main_thread() else BESIDE,
        )
        return super().bind(checked)


def artifact(backbone: Backbone, method: str, options: Mapping[str, Any], seed: int) -> Artifact:
    blueprint = make_blueprint(backbone.spec, method, options)
    return make_artifact(blueprint, random_tensors(blueprint, seed, backbone))


def proof_of(backbone: Backbone) -> Report:
    """What a server would have found."""
    return Report(
        backbone=backbone.spec.name, fingerprint=backbone.spec.fingerprint, fingerprint_matched=True, device="cpu",
        dtype=backbone.dtype_name, tensors=1, parameters=1, memory_bytes=1, golden=None, smoke_texts=1,
        server="tests", checked_at=datetime.now(UTC),
    )  # fmt: skip


@pytest.mark.parametrize("in_one_go", [True, False])
@pytest.mark.parametrize(
    ("method", "options", "second"),
    [
        ("lora", {"r": 8}, LOOP),
        ("dora", {"r": 8}, BESIDE),  # binding computes
        ("lora", {"r": 2, "target_modules": "all-linear"}, LOOP),
    ],
)
def test_what_computes_does_so_beside_the_event_loop(
    method: str, options: dict[str, Any], second: str, in_one_go: bool, half: Backbone, tmp_path: Path
) -> None:
    async def bound_by() -> list[str]:
        store, checker = AdapterStore.open(str(tmp_path)), Watched(half)
        with ThreadPoolExecutor(1) as pool:
            nobody: Any = None  # proves what is only brought
            loader = Loader(store, checker, nobody, pool)
            for seed in range(3):
                made = artifact(half, method, options, seed)
                version = await store.put_version("a", made)
                if in_one_go:
                    brought = await loader.bring_small("a", version, 1 << 20)
                else:
                    brought = await loader.bring("a", await loader.open("a", version))
                assert brought is not None
                checked, adapter = brought
                assert adapter.nbytes == checker.bind(checked).nbytes
                checker.binding.pop()
        return checker.binding

    assert asyncio.run(bound_by()) == [BESIDE, second, second]


@torch.inference_mode()
def test_a_load_leaves_no_hole_in_mallocs_memory(half: Backbone) -> None:
    """What torch takes for a moment is filled with small things that stay."""
    checker = Checker(half)
    checked = []
    for seed in range(2):
        made = artifact(half, "lora", {"r": 8}, seed)
        data = memoryview(bytearray(made.tensor_bytes))
        checked.append(checker.check(Artifact.verify(made.version, made.manifest_bytes, data)))
    checker.bind(checked[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        adapter = checker.bind(checked[1])
    taken = {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}
    assert sum(size for size in taken.values() if size > 0) < 64, taken
    assert adapter.nbytes > 4096


def test_what_was_in_memory_before_is_the_same_again_and_no_damage_is_served(half: Backbone, tmp_path: Path) -> None:
    async def run() -> None:
        store, checker = AdapterStore.open(str(tmp_path)), Watched(half)
        with ThreadPoolExecutor(1) as pool:
            nobody: Any = None
            loader = Loader(store, checker, nobody, pool)
            made = artifact(half, "lora", {"r": 8}, 0)
            version = await store.put_version("a", made, proof_of(half))
            first = await loader.bring_small("a", version, 1 << 20)
            manifest = tmp_path / "a" / "versions" / version / "manifest.json"
            manifest.rename(tmp_path / "aside")
            second = await loader.bring_small("a", version, 1 << 20)
            (tmp_path / "aside").rename(manifest)
            assert first is not None
            assert second is not None
            assert all(torch.equal(second[0].tensors[name], tensor) for name, tensor in first[0].tensors.items())
            assert second[1].labels == first[1].labels
            file = tmp_path / "a" / "versions" / version / "adapter.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"?")
            with pytest.raises(CorruptVersion, match=version):
                await loader.bring_small("a", version, 1 << 20)

    asyncio.run(run())


def test_what_is_remembered_stays_in_its_budget_and_keeps_no_plans(
    half: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "RECIPES", 2)
    monkeypatch.setattr(loading, "KNOWN_BYTES", 4 * (KNOWN_BYTES_OF_ONE + 200))

    async def run() -> None:
        store, nobody = AdapterStore.open(str(tmp_path)), cast(Any, None)
        with ThreadPoolExecutor(1) as pool:
            loader = Loader(store, Checker(half), nobody, pool)
            made = {alpha: artifact(half, "lora", {"r": 8, "lora_alpha": alpha}, alpha) for alpha in range(1, 9)}
            versions = {alpha: await store.put_version("a", one, proof_of(half)) for alpha, one in made.items()}
            for version in (*versions.values(), *versions.values()):
                assert await loader.bring_small("a", version, 1 << 20) is not None
            assert list(loader._known) == list(versions.values())[4:]
            assert loader._known_bytes == sum(known.takes for known in loader._known.values())
            gc.collect()
            kept = [known.checked() is not None for known in loader._known.values()]
            assert kept == [False, False, True, True]

    asyncio.run(run())
