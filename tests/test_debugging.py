"""Looking into a running server."""

import logging
import time
from collections.abc import Iterator

import pytest
from helpers import Sync, make_artifact, make_blueprint, random_tensors
from starlette.testclient import TestClient

from server.app import create_app
from server.backbone.backbone import Backbone
from server.settings import Settings
from server.store.releases import Plan
from server.store.store import AdapterStore


@pytest.fixture(scope="module")
def client(bert: Backbone) -> Iterator[TestClient]:
    store = AdapterStore.open("memory://")
    sync, blueprint = Sync(store), make_blueprint(bert.spec, "lora", {"r": 2, "lora_alpha": 2})
    version = sync.put_version("mood", make_artifact(blueprint, random_tensors(blueprint, 0)))
    sync.release("mood", Plan.only(version), by="me")
    with TestClient(create_app(Settings(), backbone=bert, store=store)) as client:
        yield client


@pytest.fixture
def _levels() -> Iterator[None]:
    """Put back what a test has changed."""
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("_levels")
def test_how_much_is_logged_can_be_changed(client: TestClient) -> None:
    assert client.put("/admin/log-level", json={"level": "error"}).status_code == 200
    changed = client.put("/admin/log-level", json={"level": "debug"})
    assert changed.json() == {"level": "debug", "before": "error"}
    assert logging.getLogger("adapterd.engine").isEnabledFor(logging.DEBUG)
    assert not logging.getLogger("transformers").isEnabledFor(logging.INFO)  # whose own lines nobody asked for


@pytest.mark.parametrize("body", [{"level": "loud"}, {"level": "INFO"}, {}, {"level": "info", "for": "a while"}])
def test_a_level_that_there_is_not_is_refused(client: TestClient, body: dict[str, str]) -> None:
    before = logging.getLogger().level
    refused = client.put("/admin/log-level", json=body)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] in {"level", "for"}
    assert logging.getLogger().level == before


def test_the_last_batches_are_shown_without_texts(client: TestClient) -> None:
    secret = "w7 w8 w9"
    answer = client.post("/classify", json={"adapter": "mood", "inputs": [secret, "w1"]}).json()
    while True:  # a batch is noted once its answers are out
        shown = client.get("/admin/debug/batches")
        batches = [one for one in shown.json()["batches"] if any(row["adapter"] for row in one["rows"])]
        if batches:  # others are proofs
            break
        time.sleep(0.01)
    [batch] = batches
    assert batch.keys() == {"started_at", "seconds", "tokens", "backlog", "rows"}
    assert [row["adapter"] for row in batch["rows"]] == ["mood"] * 2
    assert {row["version"] for row in batch["rows"]} == {answer["version"]}
    assert {row["outcome"] for row in batch["rows"]} == {"answered"}
    assert sum(row["tokens"] for row in batch["rows"]) == batch["tokens"]
    assert all(row["wait_seconds"] >= 0 for row in batch["rows"])
    assert secret not in shown.text
    assert len(client.get("/admin/debug/batches", params={"limit": 1}).json()["batches"]) == 1
    assert client.get("/admin/debug/batches", params={"limit": 0}).status_code == 422
