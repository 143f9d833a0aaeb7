"""What shows only after a while."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers import make_artifact, make_blueprint, random_tensors
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.app import create_app
from server.backbone.backbone import Backbone
from server.settings import Settings

ADAPTERS = 12
FIT = 4
WARM_UP = 200
LOADS = 1000

MOST_GROWTH_BYTES = 20 * 1024 * 1024
"""Of the process, while adapters of 2.7 MB are loaded 800 times. Measured: 0.1 MB; it is 22 MB where one load in a
hundred leaves its adapter behind."""


def loads(client: TestClient) -> float:
    """Adapters that were loaded so far."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == "adapterd_adapter_loads_total" and sample.labels["outcome"] == "success"
    )


@pytest.mark.soak
def test_a_thousand_loads_leave_nothing_behind(
    tmp_path: Path, minilm: Backbone, record_property: Callable[[str, object], None]
) -> None:
    blueprint = make_blueprint(minilm.spec, "lora", {"r": 16, "target_modules": "all-linear"})
    artifacts = [make_artifact(blueprint, random_tensors(blueprint, seed, minilm)) for seed in range(ADAPTERS)]
    nbytes = len(artifacts[0].tensor_bytes)
    # Loading one takes its file and what it becomes.
    settings = Settings(store=str(tmp_path / "store"), host_memory_bytes=(FIT + 1) * nbytes)
    process = psutil.Process()
    with TestClient(create_app(settings, backbone=minilm)) as client:
        for number, artifact in enumerate(artifacts):
            files = {"manifest.json": artifact.manifest_bytes, "adapter.safetensors": artifact.tensor_bytes}
            answer = client.put(f"/admin/adapters/a{number}", files=[("files", file) for file in files.items()])
            assert answer.status_code == 201, answer.text
        del artifacts, artifact, files
        before, warm = loads(client), 0
        for cycle in range(LOADS):
            if cycle == WARM_UP:
                warm = process.memory_info().rss
            answer = client.post("/classify", json={"adapter": f"a{cycle % ADAPTERS}", "inputs": "a lovely day"})
            assert answer.status_code == 200, answer.text
        growth = process.memory_info().rss - warm
        assert loads(client) - before == LOADS
    record_property("adapter_bytes", nbytes)
    record_property("bytes_after_warm_up", warm)
    record_property("growth_bytes", growth)
    assert growth < MOST_GROWTH_BYTES
