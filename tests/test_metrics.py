"""Series: what they count, and how many of them there can be."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from helpers import Sync, make_artifact, make_blueprint, random_tensors
from obstore.store import MemoryStore
from prometheus_client.parser import text_string_to_metric_families

from server.adapters.joined import rounded_up
from server.app import create_app
from server.backbone.backbone import Backbone
from server.core import Encoding
from server.engine.engine import Engine
from server.engine.runner import Row
from server.errors import StoreUnavailable
from server.metrics import OTHER, Loaded, Metrics, Snapshot
from server.settings import Settings
from server.store.objects import Objects
from server.store.releases import Plan
from server.store.store import AdapterStore


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def count(metrics: Metrics, name: str) -> int:
    """How many series of a name there are."""
    return sum(sample.name == name for family in metrics.registry.collect() for sample in family.samples)


def test_the_first_adapters_keep_their_series_and_the_rest_share_one() -> None:
    metrics = Metrics(adapters=2)
    for name in ("a", "b", "c", "d", "a", "c"):
        metrics.answered.add(name, texts=1, tokens=10)
    totals = {name: value(metrics, "adapterd_texts_total", adapter=name) for name in ("a", "b", "c", "d", OTHER)}
    assert totals == {"a": 2, "b": 1, "c": None, "d": None, OTHER: 3}
    assert value(metrics, "adapterd_tokens_total", adapter=OTHER) == 30


def test_an_adapter_called_other_makes_no_second_series() -> None:
    metrics = Metrics(adapters=1)
    for name in (OTHER, "b"):
        metrics.answered.add(name, texts=1, tokens=1)
    assert count(metrics, "adapterd_texts_total") == 1
    assert value(metrics, "adapterd_texts_total", adapter=OTHER) == 2


def test_without_series_of_their_own_all_adapters_are_summed() -> None:
    metrics = Metrics(adapters=0)
    metrics.answered.add("a", texts=3, tokens=1)
    assert value(metrics, "adapterd_texts_total", adapter=OTHER) == 3


def test_shadow_versions_are_bounded_too() -> None:
    metrics = Metrics(adapters=2)
    for version in ("1", "2", "3", "4"):
        metrics.count_shadow("a", version, "agreed", 1)
    metrics.count_shadow("a", "1", "disagreed", 1)
    assert value(metrics, "adapterd_shadow_texts_total", adapter="a", version="2", outcome="agreed") == 1
    assert value(metrics, "adapterd_shadow_texts_total", adapter="a", version="1", outcome="disagreed") == 1
    assert value(metrics, "adapterd_shadow_texts_total", adapter=OTHER, version=OTHER, outcome="agreed") == 2
    assert count(metrics, "adapterd_shadow_texts_total") == 4


def test_adapters_in_quarantine_are_bounded_and_leave_no_series() -> None:
    metrics = Metrics(adapters=1)
    name = "adapterd_quarantined_adapters"
    for adapter, change in (("a", 1), ("a", 1), ("b", 1), ("c", 1)):
        metrics.count_quarantined(adapter, change)
    assert [value(metrics, name, adapter=one) for one in ("a", "b", "c", OTHER)] == [2, None, None, 2]
    for adapter in ("a", "a", "b"):
        metrics.count_quarantined(adapter, -1)
    metrics.count_quarantined("c", 1)  # which stays where it was counted
    assert [value(metrics, name, adapter=one) for one in ("a", "b", "c", OTHER)] == [None, None, None, 2]
    for _ in range(2):
        metrics.count_quarantined("c", -1)
    assert count(metrics, name) == 0


def calls(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Store calls by operation and outcome."""
    return {
        (sample.labels["operation"], sample.labels["outcome"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "adapterd_store_seconds_count"
    }


def test_store_calls_are_timed_by_operation_and_outcome() -> None:
    metrics = Metrics()

    async def use() -> None:
        objects = Objects.open("memory://", observe=metrics.store_call)
        await objects.put("a", b"1")
        assert await objects.create("a", b"2") is False
        assert await objects.get("a") == b"1"
        assert not await objects.exists("b")
        await objects.entries("")
        await objects.delete("a")

    asyncio.run(use())
    assert calls(metrics) == {
        ("put", "success"): 1,
        ("put", "exists"): 1,
        ("get", "success"): 2,  # `create` looks whose object it is
        ("head", "missing"): 1,
        ("list", "success"): 1,
        ("delete", "success"): 1,
    }


def test_a_store_that_fails_is_counted_once_whatever_was_tried(tmp_path: Path) -> None:
    metrics = Metrics()
    objects = Objects.open(str(tmp_path / "store"), observe=metrics.store_call)
    (tmp_path / "store").rmdir()
    with pytest.raises(StoreUnavailable):
        asyncio.run(objects.put("a", b"1"))
    assert calls(metrics) == {("head", "success"): 1}  # the folder is not there: nothing was written
    objects = Objects(MemoryStore(), timeout_seconds=0, observe=metrics.store_call)
    with pytest.raises(StoreUnavailable):
        asyncio.run(objects.get("a"))
    assert calls(metrics)["get", "failure"] == 1


REQUESTS = "vllm:lora_requests_info"


def samples(metrics: Metrics, name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and value of each series of a name, read from the text that a scrape gets."""
    families = text_string_to_metric_families(metrics.render().decode())
    return [(sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name]


def test_a_gateway_finds_one_series_of_requests_whose_lists_have_no_spaces() -> None:
    metrics = Metrics()
    for running in (["a", "b"], ["c"], []):
        metrics.live.snapshot = Snapshot(running_adapters=running, waiting_adapters=["x", "y"], capacity=7)
        before = int(time.time())
        [(labels, value)] = samples(metrics, REQUESTS)
        assert labels == {
            "max_lora": "7",
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": "x,y",
        }
        assert before <= value <= time.time()


def test_an_adapter_that_has_left_memory_has_no_series() -> None:
    metrics = Metrics()
    metrics.live.snapshot = Snapshot(loaded=[Loaded("a", "gpu", True), Loaded("b", "cpu", False)], ready=1)
    assert samples(metrics, "vllm:lora_adapter_loaded") == [
        ({"adapter_name": "a", "level": "gpu", "pinned": "true"}, 1),
        ({"adapter_name": "b", "level": "cpu", "pinned": "false"}, 1),
    ]
    assert samples(metrics, "vllm:num_gpu_loaded_lora_adapters") == [({}, 1)]
    metrics.live.snapshot = Snapshot()
    assert samples(metrics, "vllm:lora_adapter_loaded") == []


def test_loads_are_told_under_both_names() -> None:
    metrics = Metrics()
    metrics.adapter_load_seconds.observe(0.03)
    for suffix in ("_count", "_sum", "_bucket"):
        ours = samples(metrics, f"adapterd_adapter_load_seconds{suffix}")
        assert samples(metrics, f"vllm:lora_adapter_load_seconds{suffix}") == ours != []


@pytest.fixture(scope="module")
def client(bert: Backbone) -> Iterator[TestClient]:
    store = AdapterStore.open("memory://")
    blueprint = make_blueprint(bert.spec, "lora", {"r": 2, "lora_alpha": 2})
    for seed, name in enumerate(("one", "two", "idle")):
        sync = Sync(store)
        sync.release(
            name, Plan.only(sync.put_version(name, make_artifact(blueprint, random_tensors(blueprint, seed)))), by="me"
        )
    with TestClient(create_app(Settings(), backbone=bert, store=store)) as client:
        yield client


def scraped(client: TestClient, name: str) -> list[tuple[dict[str, str], float]]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [(sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name]


def total(client: TestClient, name: str, **labels: str) -> float:
    return sum(value for own, value in scraped(client, name) if own.items() >= labels.items())


def classify(client: TestClient, adapter: str, inputs: list[str]) -> None:
    assert client.post("/classify", json={"adapter": adapter, "inputs": inputs}).status_code == 200


def test_a_scrape_tells_what_is_in_memory(client: TestClient) -> None:
    for name in ("one", "two"):
        classify(client, name, ["w1"])
    loaded = [labels for labels, _ in scraped(client, "vllm:lora_adapter_loaded")]
    assert loaded[:2] == [  # the last one used comes first
        {"adapter_name": name, "level": "gpu", "pinned": "false"} for name in ("two", "one")
    ]
    assert total(client, "vllm:num_gpu_loaded_lora_adapters") == len(loaded)
    assert total(client, "vllm:max_gpu_lora_adapters") > len(loaded)
    while total(client, "vllm:num_requests_running"):  # a batch ends after its answers are out
        time.sleep(0.01)
    assert total(client, "vllm:num_requests_waiting") == 0
    assert len(scraped(client, REQUESTS)) == 1


def test_lookups_count_what_was_ready(client: TestClient) -> None:
    classify(client, "one", ["w1"])
    hits, misses = (total(client, "adapterd_adapter_lookups_total", outcome=one) for one in ("hit", "miss"))
    classify(client, "one", ["w1"])
    assert total(client, "adapterd_adapter_lookups_total", outcome="hit") == hits + 1
    classify(client, "idle", ["w1"])
    assert total(client, "adapterd_adapter_lookups_total", outcome="miss") == misses + 1


def test_tokenizing_is_timed(client: TestClient) -> None:
    before = total(client, "adapterd_tokenize_seconds_count")
    classify(client, "one", ["w1", "w2"])
    assert total(client, "adapterd_tokenize_seconds_count") == before + 1


@pytest.mark.parametrize(("family", "computed"), [("bert", 9), ("mpnet", 10)])  # packed, and padded
def test_padding_is_counted_as_waste(family: str, computed: int, backbone_of: Callable[[str], Backbone]) -> None:
    backbone = backbone_of(family)
    before = backbone.text_rows, backbone.computed_rows
    backbone.forward([Encoding((5,) * length, (0,) * length, truncated=False) for length in (4, 5)])
    assert (backbone.text_rows - before[0], backbone.computed_rows - before[1]) == (9, computed)


def test_filler_is_counted_as_waste(backbone_of: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of("bert")
    monkeypatch.setattr(backbone, "_rounds", True)
    before = backbone.text_rows, backbone.computed_rows
    with torch.inference_mode():
        backbone.forward([Encoding((5,) * 100, (0,) * 100, truncated=False)])
    assert backbone.text_rows - before[0] == 100
    assert backbone.computed_rows - before[1] == rounded_up(100, steps=8) > 100


def test_the_engine_names_what_runs_and_what_waits(client: TestClient) -> None:
    """With the device held: one request runs, two wait."""
    app: Any = client.app
    engine: Engine = app.state.engine
    for name in ("one", "two"):  # loaded and proven
        classify(client, name, ["w1"])
    entered, gate = threading.Event(), threading.Event()
    run = engine._worker._runner.run

    def held(rows: Sequence[Row]) -> list[Any]:
        entered.set()
        assert gate.wait(30)
        return run(rows)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(engine._worker._runner, "run", held)
        try:
            asked = [pool.submit(classify, client, "one", ["w1", "w2"])]
            assert entered.wait(30)
            asked += [pool.submit(classify, client, "two", ["w1"]) for _ in range(2)]
            while total(client, "vllm:num_requests_waiting") < 2:
                time.sleep(0.01)
            [(labels, _)] = scraped(client, REQUESTS)
            assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("one", "two")
            assert total(client, "vllm:num_requests_running") == 1
            assert 0 < total(client, "vllm:kv_cache_usage_perc") < 1
        finally:
            gate.set()
        for one in asked:
            one.result()
