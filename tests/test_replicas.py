"""Several servers and writers on one store: what one releases the others serve, and nobody overwrites anybody."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import children
import httpx
import pytest
import torch
from helpers import make_artifact, make_blueprint, random_tensors

from benchmarks.faulty import FaultyS3, faulty_s3
from server.backbone.backbone import Backbone
from server.errors import Conflict, InvalidRequest, StoreUnavailable
from server.store.artifact import Artifact, Manifest
from server.store.gc import collect
from server.store.objects import Objects
from server.store.releases import Plan
from server.store.store import AdapterStore

POLL_SECONDS = 0.05
SLACK_SECONDS = 10.0
"""A busy machine may take that much longer."""

ROUNDS = 50


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


# ------------------------------------------------------------------------------------------------------- two servers


class Pair(NamedTuple):
    """Two servers on one store."""

    clients: tuple[httpx.Client, httpx.Client]
    uploads: list[list[tuple[str, tuple[str, bytes]]]]
    """Checkpoints, each another version."""

    def put(self, number: int, name: str, upload: int) -> dict[str, Any]:
        answer = self.clients[number].put(f"/admin/adapters/{name}", files=self.uploads[upload])
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def serves(self, number: int, name: str) -> tuple[int, str] | None:
        """Release and version that a server answers with; None where it does not know the name."""
        answer = self.clients[number].post("/classify", json={"adapter": name, "inputs": "w1 w2"})
        if answer.status_code == 404:
            return None
        assert answer.status_code == 200, answer.text
        return answer.json()["release"], answer.json()["version"]

    def wait(self, number: int, name: str, release: int) -> float:
        """Seconds until a server serves a release."""
        started = time.monotonic()
        while (served := self.serves(number, name)) is None or served[0] < release:
            assert time.monotonic() - started < POLL_SECONDS + SLACK_SECONDS
            time.sleep(0.005)
        return time.monotonic() - started

    def race(self, name: str, versions: list[str], after: int | None) -> list[httpx.Response]:
        """Two releases, asked of both servers at the same moment."""
        barrier = threading.Barrier(2)

        def release(number: int) -> httpx.Response:
            body = {"traffic": {versions[number]: 1.0}, "note": f"server {number}"}
            barrier.wait()
            return self.clients[number].post(
                f"/admin/adapters/{name}/releases", json=body | ({} if after is None else {"after": after})
            )

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(release, range(2)))

    def history(self, number: int, name: str) -> list[dict[str, Any]]:
        """All releases as a server tells them, the first one first."""
        answer = self.clients[number].get(f"/admin/adapters/{name}/releases", params={"limit": 1000})
        return list(reversed(answer.json()["releases"]))


@pytest.fixture(scope="module", params=["s3", "folder"])
def pair(
    request: pytest.FixtureRequest, s3: FaultyS3, bert: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    store = f"{s3.bucket()}/some/prefix" if request.param == "s3" else str(folder / "store")
    settings = {"store_poll_seconds": str(POLL_SECONDS), "store_timeout_seconds": "30"}
    if request.param == "s3":
        settings["store_endpoint"] = s3.url
    backbone = children.save_tiny_bert(folder / "backbone")
    blueprint = make_blueprint(bert.spec, "lora", {"r": 2})
    artifacts = [make_artifact(blueprint, random_tensors(blueprint, seed, bert)) for seed in range(2)]
    uploads = [
        [
            ("files", ("manifest.json", artifact.manifest_bytes)),
            ("files", ("adapter.safetensors", artifact.tensor_bytes)),
        ]
        for artifact in artifacts
    ]
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(2):
            (folder / str(number)).mkdir()
            servers.append(stack.enter_context(children.serving(folder / str(number), store, backbone, **settings)))
        yield Pair((servers[0].client, servers[1].client), uploads)


def test_what_one_publishes_the_other_serves_within_the_poll_interval(
    pair: Pair, record_property: Callable[[str, object], None]
) -> None:
    waits = []
    for round_ in range(ROUNDS):
        publisher, other = round_ % 2, 1 - round_ % 2
        published = pair.put(publisher, "a", round_ % 2)
        assert published["release"] == round_ + 1
        assert pair.serves(publisher, "a") == (round_ + 1, published["version"])
        waits.append(pair.wait(other, "a", round_ + 1))
        assert pair.serves(other, "a") == (round_ + 1, published["version"])
    record_property("longest_delay_seconds", round(max(waits), 3))
    record_property("mean_delay_seconds", round(sum(waits) / len(waits), 3))


def test_of_two_releases_after_the_same_one_exactly_one_is_made(pair: Pair) -> None:
    versions = [pair.put(number, "raced", number)["version"] for number in range(2)]
    last = 2
    for _ in range(ROUNDS):
        answers = pair.race("raced", versions, last)
        assert sorted(answer.status_code for answer in answers) == [201, 409]
        winner = next(number for number in range(2) if answers[number].status_code == 201)
        assert answers[1 - winner].json()["error"]["code"] == "release_conflict"
        last += 1
        assert answers[winner].json()["release"] == last
        for number in range(2):
            pair.wait(number, "raced", last)
            assert pair.serves(number, "raced") == (last, versions[winner])
    assert pair.history(0, "raced") == pair.history(1, "raced")
    assert [one["release"] for one in pair.history(0, "raced")] == list(range(1, last + 1))


def test_of_releases_after_anything_none_has_the_number_of_another(pair: Pair) -> None:
    versions = [pair.put(number, "free", number)["version"] for number in range(2)]
    made = {1: None, 2: None}
    for _ in range(ROUNDS):
        for number, answer in enumerate(pair.race("free", versions, None)):
            assert answer.status_code in (201, 409)
            if answer.status_code == 201:
                assert answer.json()["release"] not in made
                made[answer.json()["release"]] = f"server {number}"
    assert sorted(made) == list(range(1, len(made) + 1))
    assert len(made) >= ROUNDS + 2
    history = pair.history(0, "free")
    assert history == pair.history(1, "free")
    assert {one["release"]: one["note"] for one in history[2:]} == {number: made[number] for number in sorted(made)[2:]}


def test_a_deletion_and_a_roll_back_reach_the_other_server(pair: Pair) -> None:
    first = pair.put(0, "gone", 0)
    pair.wait(1, "gone", 1)
    assert pair.clients[1].delete("/admin/adapters/gone").status_code == 200
    started = time.monotonic()
    while pair.serves(0, "gone") is not None:
        assert time.monotonic() - started < POLL_SECONDS + SLACK_SECONDS
        time.sleep(0.005)
    assert pair.clients[0].post("/admin/adapters/gone/rollback").status_code == 201
    pair.wait(1, "gone", 3)
    assert pair.serves(1, "gone") == (3, first["version"])


# ---------------------------------------------------------------------------------------------------- object stores


def artifact(value: float) -> Artifact:
    """A small artifact; another value is another version."""
    manifest = Manifest(method="lora", config={}, task="classification", labels=("a", "b"), source="test")
    return Artifact.build(manifest, {"x": torch.full((300,), float(value))})


@pytest.fixture(params=["argument", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def remote(request: pytest.FixtureRequest, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> AdapterStore:
    """An empty store in a bucket."""
    if request.param == "argument":
        return AdapterStore.open(f"{s3.bucket()}/prefix", endpoint=s3.url, timeout_seconds=30)
    monkeypatch.setenv(request.param, s3.url)
    return AdapterStore.open(s3.bucket(), timeout_seconds=30)


def test_a_store_in_a_bucket_does_what_a_folder_does(remote: AdapterStore) -> None:
    async def run() -> None:
        assert await remote.names() == []
        assert await remote.current("a") is None
        versions = [await remote.put_version("a", artifact(value)) for value in range(3)]
        for version in versions:
            assert (await remote.get_version("a", version)).version == version
            assert (await remote.release("a", Plan.only(version), by="me")).main_version == version
        assert await remote.names() == ["a"]
        assert await remote.releases("a") == [1, 2, 3]
        assert await remote.releases("a", after=2) == [3]
        assert await remote.releases("a", after=3) == []
        assert {one.version for one in await remote.versions("a") if one.whole} == set(versions)
        known = await remote.get_release("a", 2)
        assert await remote.current("a", known) == await remote.get_release("a", 3)
        with pytest.raises(Conflict):
            await remote.release("a", Plan.only(versions[0]), by="me", after=2)
        assert (await remote.rollback("a", by="me")).restores == 2
        assert (await remote.delete("a", by="me")).deleted
        await remote.pin("a")
        assert await remote.pins() == ["a"]
        await remote.unpin("a")
        await remote.unpin("a")
        assert await remote.pins() == []
        await remote.release("a", Plan.only(versions[2]), by="me")
        removed = [one.version.version async for one in collect(remote, keep=1, min_age=timedelta(0))]
        assert set(removed) == set(versions[:2])
        assert [one.version for one in await remote.versions("a")] == versions[2:]

    asyncio.run(run())


@pytest.mark.soak
def test_a_bucket_takes_more_releases_than_one_listing_has(s3: FaultyS3) -> None:
    """A listing has at most a thousand keys, the rest follows in another one."""
    objects = Objects.open(s3.bucket(), endpoint=s3.url, timeout_seconds=30)
    store = AdapterStore(objects)

    async def run() -> None:
        version = await store.put_version("a", artifact(1))
        first = await store.release("a", Plan.only(version), by="me")
        for some in (range(start, min(start + 50, 1103)) for start in range(2, 1103, 50)):
            copies = {number: replace(first, number=number).file() for number in some}
            await asyncio.gather(
                *(objects.put(f"a/releases/{number:06}.json", copy) for number, copy in copies.items())
            )
        assert await store.releases("a") == list(range(1, 1103))
        assert await store.releases("a", after=1100) == [1101, 1102]
        assert (await store.release("a", Plan.only(version), by="me")).number == 1103

    asyncio.run(run())


def test_of_many_writers_to_a_bucket_one_creates(s3: FaultyS3) -> None:
    bucket = s3.bucket()
    stores = [AdapterStore.open(bucket, endpoint=s3.url, timeout_seconds=30) for _ in range(20)]

    async def run() -> None:
        version = await stores[0].put_version("a", artifact(1))
        outcomes = await asyncio.gather(
            *(store.release("a", Plan.only(version), by=str(number), after=0) for number, store in enumerate(stores)),
            return_exceptions=True,
        )
        made = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert [release.number for release in made] == [1]
        assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 19
        assert await stores[5].current("a") == made[0]
        objects = [Objects.open(bucket, endpoint=s3.url, timeout_seconds=30) for _ in range(20)]
        created = await asyncio.gather(*(one.create("k", str(number).encode()) for number, one in enumerate(objects)))
        assert sorted(created) == [False] * 19 + [True]
        assert await objects[0].get("k") == str(created.index(True)).encode()

    asyncio.run(run())


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "az://container/prefix"])
def test_a_store_that_nobody_answers_for_is_unavailable(
    s3: FaultyS3, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    store = AdapterStore.open(url, endpoint="http://127.0.0.1:1", timeout_seconds=0.2)
    for call in (store.names(), store.current("a"), store.put_version("a", artifact(1)), store.pin("a")):
        with pytest.raises(StoreUnavailable):
            asyncio.run(call)


def test_a_store_of_google_opens_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = tmp_path / "credentials.json"
    credentials.write_text(
        '{"gcs_base_url": "http://127.0.0.1:1", "disable_oauth": true, "client_email": "", "private_key": "", '
        '"private_key_id": ""}'
    )
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(credentials))
    store = AdapterStore.open("gs://bucket/prefix", timeout_seconds=0.2)
    with pytest.raises(StoreUnavailable):
        asyncio.run(store.names())


def test_a_store_without_an_account_is_refused(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidRequest, match="az://container"):
        AdapterStore.open("az://container/prefix")


def test_a_bucket_that_does_not_exist_says_so(s3: FaultyS3) -> None:
    store = AdapterStore.open("s3://nobody-has-made-this", endpoint=s3.url, timeout_seconds=30)
    with pytest.raises(StoreUnavailable):
        asyncio.run(store.names())
    with pytest.raises(StoreUnavailable):
        asyncio.run(store.put_version("a", artifact(1)))
