"""kill -9 at any moment: what was acknowledged is there, what was not is whole or not there at all."""

import asyncio
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import children
import httpx
import pytest
from helpers import LABELS, make_artifact, make_blueprint, random_tensors

from server.backbone.backbone import Backbone
from server.store.gc import collect
from server.store.releases import Release
from server.store.store import AdapterStore

KNOWN_FILES = re.compile(
    r"(_announced/[a-e.-]+@[0-9]+"
    r"|[a-e.-]+/(releases/[0-9]{6}\.json|versions/[0-9a-f]{64}/(manifest\.json|adapter\.safetensors)))(?P<left>#[0-9]+)?"
)
"""What a store's folder may hold. obstore writes beside an object and renames; what it left when it was killed has a
number behind it."""

MOST_STEPS = 8
LONGEST_DELAY_SECONDS = 0.003


class Acknowledged:
    """What children have told."""

    def __init__(self) -> None:
        self.versions: set[tuple[str, str]] = set()
        self.releases: dict[tuple[str, int], Release] = {}
        self.interrupted: Counter[str] = Counter()
        self._doing = "nothing"

    def note(self, kind: str, name: str, content: str = "") -> None:
        self._doing = kind if kind in ("putting", "releasing") else "nothing"
        if kind == "version":
            self.versions.add((name, content))
        if kind == "release":
            release = Release.read(content)
            self.releases[name, release.number] = release

    def ended(self) -> None:
        self.interrupted[self._doing] += 1


def run_and_kill(folder: Path, seed: int, acknowledged: Acknowledged) -> None:
    """A child works until it is killed, soon after it has begun the step that the seed says."""
    choices = random.Random(seed)
    reading, writing = children.pipe()
    child = children.start(children.publish_forever, str(folder), seed, writing)
    writing.close()
    for _ in range(2 * choices.randrange(MOST_STEPS) + 1):
        acknowledged.note(*reading.recv())
    time.sleep(choices.uniform(0, LONGEST_DELAY_SECONDS))
    child.kill()
    try:
        while True:
            acknowledged.note(*reading.recv())  # told before it died
    except EOFError:
        reading.close()
    child.join()
    acknowledged.ended()


async def check(folder: Path, acknowledged: Acknowledged) -> None:
    """The store opens, and everything that was acknowledged is in it."""
    store = AdapterStore.open(str(folder))
    assert set(await store.names()) <= set(children.NAMES)
    assert await store.pins() == []
    for name in await store.names():
        numbers = await store.releases(name)
        assert numbers == list(range(1, len(numbers) + 1))
        releases = {number: await store.get_release(name, number) for number in numbers}
        for (of, number), release in acknowledged.releases.items():
            if of == name:
                assert releases[number] == release
        whole = {one.version for one in await store.versions(name) if one.whole}
        assert {version for of, version in acknowledged.versions if of == name} <= whole
        assert {version for release in releases.values() for version in release.versions} <= whole
        current = await store.current(name)
        assert (current.number if current else 0) == len(numbers)
    assert {name for name, _ in acknowledged.versions} <= set(await store.names())


def count_leftovers(folder: Path) -> int:
    """Files that writers have not finished. There are no others that a store does not know."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    matches = [KNOWN_FILES.fullmatch(file) for file in files]
    assert all(matches), files
    return sum(1 for match in matches if match and match["left"])


async def read_all(folder: Path, versions: set[tuple[str, str]]) -> None:
    store = AdapterStore.open(str(folder))
    for name, version in sorted(versions):
        assert (await store.get_version(name, version)).version == version


async def clean_up(folder: Path) -> None:
    """Garbage collection removes what nobody released, halves too, and nothing else."""
    store = AdapterStore.open(str(folder))
    assert [removed async for removed in collect(store, keep=1, min_age=timedelta(0))]
    for name in await store.names():
        current = await store.current(name)
        wanted = set(current.versions) if current else set()
        assert {one.version for one in await store.versions(name)} == wanted
        for version in wanted:
            assert (await store.get_version(name, version)).version == version


def kill_many(folder: Path, kills: int, record: Callable[[str, object], None]) -> None:
    acknowledged = Acknowledged()
    read: set[tuple[str, str]] = set()
    left = 0
    for seed in range(kills):
        run_and_kill(folder, seed, acknowledged)
        asyncio.run(check(folder, acknowledged))
        left = count_leftovers(folder)
        asyncio.run(read_all(folder, acknowledged.versions - read))
        read |= acknowledged.versions
    asyncio.run(read_all(folder, acknowledged.versions))
    asyncio.run(clean_up(folder))
    record("acknowledged_versions", len(acknowledged.versions))
    record("acknowledged_releases", len(acknowledged.releases))
    record("interrupted", dict(acknowledged.interrupted))
    record("files_left_by_the_killed", left)
    assert acknowledged.interrupted.total() == kills


def test_a_store_survives_the_death_of_its_writers(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kill_many(tmp_path / "store", 40, record_property)


@pytest.mark.soak
def test_a_store_survives_many_deaths(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    kill_many(tmp_path / "store", 200, record_property)


# ---------------------------------------------------------------------------------------------------- a whole server


class Uploader(threading.Thread):
    """Uploads one adapter after the other under one name, until the server is gone."""

    def __init__(self, server: children.Server, name: str, uploads: list[dict[str, bytes]]) -> None:
        super().__init__()
        self.acknowledged: list[dict[str, object]] = []
        self.failure: object = None
        self.several = threading.Event()
        self._server = server
        self._name = name
        self._uploads = uploads

    def run(self) -> None:
        try:
            for count in range(1_000_000):
                files = self._uploads[count % len(self._uploads)]
                answer = self._server.client.put(
                    f"/admin/adapters/{self._name}", files=[("files", file) for file in files.items()]
                )
                if answer.status_code not in (200, 201):
                    self.failure = answer.text
                    break
                self.acknowledged.append(answer.json())
                if len(self.acknowledged) >= 2:
                    self.several.set()
        except httpx.TransportError:
            pass
        self.several.set()


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.soak)])
def test_a_killed_server_has_kept_what_it_acknowledged(
    tmp_path: Path, bert: Backbone, times: int, record_property: Callable[[str, object], None]
) -> None:
    backbone = children.save_tiny_bert(tmp_path / "backbone")
    blueprint = make_blueprint(bert.spec, "lora", {"r": 4}, labels=LABELS[:2])
    artifacts = [make_artifact(blueprint, random_tensors(blueprint, seed, bert)) for seed in range(3)]
    uploads = [{"manifest.json": one.manifest_bytes, "adapter.safetensors": one.tensor_bytes} for one in artifacts]
    store = str(tmp_path / "store")
    acknowledged: dict[str, dict[int, str]] = {name: {} for name in ("one", "two", "three")}
    for seed in range(times):
        with children.serving(tmp_path, store, backbone) as server:
            check_served(server.client, acknowledged)
            uploaders = [Uploader(server, name, uploads) for name in acknowledged]
            assert server.client.get("/readyz").status_code == 200
            for uploader in uploaders:
                uploader.start()
            for uploader in uploaders:
                assert uploader.several.wait(60)
            time.sleep(random.Random(seed).uniform(0, 0.05))
            server.process.kill()
            for uploader in uploaders:
                uploader.join()
        for name, uploader in zip(acknowledged, uploaders, strict=True):
            assert uploader.failure is None
            assert len(uploader.acknowledged) >= 2
            acknowledged[name] |= {one["release"]: one["version"] for one in uploader.acknowledged}
    with children.serving(tmp_path, store, backbone) as server:
        check_served(server.client, acknowledged)
    record_property("acknowledged_uploads", sum(map(len, acknowledged.values())))


def history(client: httpx.Client, name: str) -> dict[int, dict[str, float]]:
    """All releases and their traffic."""
    found: dict[int, dict[str, float]] = {}
    while 1 not in found:
        before = {"before": min(found)} if found else {}
        page = client.get(f"/admin/adapters/{name}/releases", params={"limit": 1000, **before}).json()["releases"]
        assert page, found
        found |= {one["release"]: one["traffic"] for one in page}
    return found


def check_served(client: httpx.Client, acknowledged: dict[str, dict[int, str]]) -> None:
    for name, releases in acknowledged.items():
        if not releases:
            continue
        found = history(client, name)
        assert sorted(found) == list(range(1, len(found) + 1))
        assert {number: {version: 1.0} for number, version in releases.items()}.items() <= found.items()
        answer = client.post("/classify", json={"adapter": name, "inputs": "w1 w2"}).json()
        assert answer["release"] == max(found)
        assert {answer["version"]: 1.0} == found[max(found)]
