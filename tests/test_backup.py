"""A store is copied while others write, with the commands that docs/deploy.md has, and comes back."""

import asyncio
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import children
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from benchmarks.faulty import CREDENTIALS, FaultyS3, faulty_s3
from server.cli import app
from server.store.artifact import Artifact, Manifest
from server.store.releases import Plan, Release
from server.store.store import AdapterStore

DOCS = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text()
SECTION = DOCS.partition("\n## Backup and restore\n")[2].partition("\n## ")[0]
BUCKET, BUCKET_BACK, FOLDER, FOLDER_BACK, VERIFY = (
    block.splitlines() for block in re.findall(r"```sh\n(.*?)```", SECTION, re.S)
)
STEPS = 40
"""Of a writer, before it is stopped."""


@dataclass
class Place:
    """A store, a place for its copy, and what copies: takes a line of the document."""

    store: str
    backup: str
    copy: Callable[[str], None]
    backup_lines: list[str]
    restore_lines: list[str]
    empty: Callable[[], None]
    """Loses what is in the store."""
    endpoint: str | None = None

    def publish(self, name: str, value: float) -> str:
        """A version that is released."""

        async def run() -> str:
            store = AdapterStore.open(self.store, **self.opened)
            manifest = Manifest(method="lora", config={}, task="classification", labels=("a", "b"), source="test")
            version = await store.put_version(name, Artifact.build(manifest, {"x": torch.full((300,), value)}))
            await store.release(name, Plan.only(version), by="me")
            return version

        return asyncio.run(run())

    def content(self, url: str) -> dict[str, tuple[int, str]]:
        """Adapter -> its last release and that one's version, whose bytes are what they should be."""

        async def run() -> dict[str, tuple[int, str]]:
            store = AdapterStore.open(url, **self.opened)
            found = {}
            for name in await store.names():
                if release := await store.current(name):
                    [version] = release.traffic
                    await store.get_version(name, version)
                    found[name] = (release.number, version)
            return found

        return asyncio.run(run())

    def pin(self, name: str) -> None:
        asyncio.run(AdapterStore.open(self.store, **self.opened).pin(name))

    def pins(self, url: str) -> list[str]:
        return asyncio.run(AdapterStore.open(url, **self.opened).pins())

    @property
    def opened(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint, "timeout_seconds": 30} if self.endpoint else {}

    def verify(self, url: str) -> Result:
        """`adapterd adapters verify`, as the document has it."""
        [line] = VERIFY
        arguments = shlex.split(line.replace("/backup", url))
        assert arguments[0] == "adapterd"
        return CliRunner().invoke(app, arguments[1:], env={"AWS_ENDPOINT_URL": self.endpoint or ""})


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3: FaultyS3) -> Place:
    if request.param == "folder":
        return folder_place(tmp_path)
    store, backup = s3.bucket(), s3.bucket()
    client = boto3.client(
        "s3",
        endpoint_url=s3.url,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_REGION"],
    )
    addresses = {"s3://b/adapters": store, "s3://copy/adapters": backup}

    def copy(line: str) -> None:
        program, group, command, source, target, *filters = shlex.split(line)
        assert (program, group, command) == ("aws", "s3", "sync")
        sync(client, addresses[source], addresses[target], filters)

    def empty() -> None:
        bucket = store.removeprefix("s3://")
        for one in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=one["Key"])

    return Place(store, backup, copy, BUCKET, BUCKET_BACK, empty, s3.url)


def folder_place(tmp_path: Path) -> Place:
    store, backup = tmp_path / "store", tmp_path / "backup"
    store.mkdir()
    backup.mkdir()

    def copy(line: str) -> None:
        command = ["bash", "-c", line.replace("/backup", str(backup))]
        subprocess.run(command, cwd=store, check=True, capture_output=True)

    def empty() -> None:
        shutil.rmtree(store)
        store.mkdir()

    return Place(str(store), str(backup), copy, FOLDER, FOLDER_BACK, empty)


def sync(client: Any, source: str, target: str, filters: list[str]) -> None:
    """What `aws s3 sync` does with its filters: the last one that fits a key counts."""
    rules = list(zip(filters[::2], filters[1::2], strict=True))
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=source.removeprefix("s3://")):
        for one in page.get("Contents", ()):
            key = one["Key"]
            fitting = [kind for kind, pattern in rules if fnmatchcase(key, pattern)]
            if fitting[-1] == "--include":
                origin = {"Bucket": source.removeprefix("s3://"), "Key": key}
                client.copy_object(Bucket=target.removeprefix("s3://"), Key=key, CopySource=origin)


def test_a_copy_has_what_its_releases_name(place: Place) -> None:
    first = {"a": (1, place.publish("a", 1)), "versions": (1, place.publish("versions", 2))}
    place.pin("a")
    for number, line in enumerate(place.backup_lines):
        if number:
            place.publish("a", 3)
            place.publish("new", 4)
        place.copy(line)
    assert place.content(place.backup) == first
    assert place.pins(place.backup) == ["a"]
    checked = place.verify(place.backup)
    assert checked.exit_code == 0, checked.output


def test_in_the_other_order_a_copy_may_lack_versions_and_verify_says_so(place: Place) -> None:
    place.publish("a", 1)
    for number, line in enumerate(reversed(place.backup_lines)):
        if number:
            missing = place.publish("a", 2)
        place.copy(line)
    checked = place.verify(place.backup)
    assert checked.exit_code == 1
    assert missing[:12] in checked.output


def test_no_release_comes_back_before_its_version(place: Place) -> None:
    expected = {"a": (2, (place.publish("a", 1), place.publish("a", 2))[1]), "b": (1, place.publish("b", 3))}
    place.pin("b")
    for line in place.backup_lines:
        place.copy(line)
    place.empty()
    assert place.content(place.store) == {}
    versions, rest = place.restore_lines
    place.copy(versions)
    assert place.content(place.store) == {}
    place.copy(rest)
    assert place.content(place.store) == expected
    assert place.pins(place.store) == ["b"]
    assert place.verify(place.store).exit_code == 0


def test_a_folder_is_copied_while_another_process_writes(tmp_path: Path) -> None:
    place = folder_place(tmp_path)
    reading, writing = children.pipe()
    child = children.start(children.publish_forever, place.store, 1, writing)
    writing.close()
    released: dict[str, int] = {}
    try:
        for line in (None, *place.backup_lines):
            before = dict(released)
            if line is not None:
                place.copy(line)
            for _ in range(STEPS):  # the writer waits for who reads, where it is far ahead
                kind, name, *content = reading.recv()
                if kind == "release":
                    released[name] = Release.read(*content).number
            if line == place.backup_lines[0]:
                known = before
    finally:
        child.kill()
        child.join()
        reading.close()
    copied = place.content(place.backup)
    assert known
    assert all(copied[name][0] >= number for name, number in known.items())
    assert place.verify(place.backup).exit_code == 0
