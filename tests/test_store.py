"""The store: immutable versions, append-only releases, what its failures look like, and what garbage is."""

import asyncio
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import FrozenInstanceError, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import Sync
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from obstore.exceptions import (
    GenericError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, MemoryStore, S3Store
from pydantic import TypeAdapter, ValidationError

from server.core import StoreCall
from server.errors import (
    Conflict,
    CorruptVersion,
    InvalidAdapter,
    InvalidRequest,
    StoreUnavailable,
    UnknownAdapter,
    UnknownVersion,
)
from server.store import objects as objects_module
from server.store.announcements import Announcements
from server.store.artifact import Artifact, Golden, Manifest, TrainedOn, read_tensors
from server.store.gc import Removed, collect
from server.store.objects import ATTEMPTS, PORTION_BYTES, Objects
from server.store.releases import DELETED, MAX_SERVING, MAX_SHADOWS, SHARES_TOLERANCE, Plan, Release, choose
from server.store.report import GoldenCheck, Report
from server.store.store import LAST_SORTED, AdapterStore, StoredVersion, check_name, check_version

REPORT = Report(
    backbone="tiny",
    fingerprint="sha256:00",
    fingerprint_matched=True,
    device="cpu",
    dtype="float32",
    tensors=1,
    parameters=3,
    memory_bytes=12,
    golden=GoldenCheck(texts=2, difference=1e-7, tolerance=1e-3),
    smoke_texts=3,
    server="adapterd tests",
    checked_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)
MISSING = "0" * 64
"""A version that nobody stored."""


def artifact(value: float = 1.0) -> Artifact:
    """A small artifact; another value is another version."""
    manifest = Manifest(method="lora", config={}, task="classification", labels=("a", "b"), source="test")
    return Artifact.build(manifest, {"x": torch.full((3,), float(value))})


ARTIFACTS = [artifact(value) for value in range(3)]


def versions(count: int) -> list[str]:
    """Versions in order; nobody stored them."""
    return [f"{index:064x}" for index in range(1, count + 1)]


def removed(store: Sync | Sync, **options: Any) -> list[Removed]:
    """What a collection removes, or would."""

    async def every() -> list[Removed]:
        return [one async for one in collect(store.store if isinstance(store, Sync) else store, **options)]

    return asyncio.run(every())


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further tries come at once."""
    for name in ("FIRST_WAIT_SECONDS", "LONGEST_WAIT_SECONDS"):
        monkeypatch.setattr(objects_module, name, 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not there yet" / "store"


@pytest.fixture(params=["memory", "folder", "file"])
def store(request: pytest.FixtureRequest, folder: Path) -> Sync:
    urls = {"memory": "memory://", "folder": str(folder), "file": folder.as_uri()}
    return Sync(AdapterStore.open(urls[request.param]))


@pytest.fixture
def files(folder: Path) -> Sync:
    return Sync(AdapterStore.open(str(folder)))


# ------------------------------------------------------------------------------------------- versions and releases


def test_an_empty_store(store: Sync) -> None:
    assert store.names() == []
    assert store.releases("a") == []
    assert store.current("a") is None
    assert store.versions("a") == []
    assert store.pins() == []
    assert not store.has_version("a", MISSING)
    with pytest.raises(UnknownAdapter) as caught:
        store.get_release("a", 1)
    assert caught.value.param == "release"
    for call in (store.history, store.rollback_target):
        with pytest.raises(UnknownAdapter, match="'a' was never released"):
            call("a")
    with pytest.raises(UnknownAdapter, match="no adapter 'a' serves"):
        store.delete("a", by="me")


def test_a_version_comes_back_as_it_was(store: Sync) -> None:
    stored = artifact()
    version = store.put_version("a", stored)
    assert version == stored.version
    read = store.get_version("a", version)
    assert (read.manifest_bytes, read.tensor_bytes) == (stored.manifest_bytes, stored.tensor_bytes)
    assert torch.equal(read.tensors["x"], stored.tensors["x"])


def test_a_version_is_stored_once_however_often_it_is_put(files: Sync, folder: Path) -> None:
    versions = {files.put_version("a", artifact()) for _ in range(3)}
    assert len(versions) == 1
    assert len(list((folder / "a" / "versions").iterdir())) == 1
    files.put_version("a", artifact(2))
    assert len(list((folder / "a" / "versions").iterdir())) == 2


def test_releases_are_numbered_and_the_last_one_serves(store: Sync) -> None:
    one, two = store.put_version("a", artifact(1)), store.put_version("a", artifact(2))
    for number, version in enumerate([one, two, one], start=1):
        release = store.release("a", Plan.only(version), by="me", note=f"note {number}")
        assert (release.number, release.by, release.note) == (number, "me", f"note {number}")
        assert release.plan == Plan(traffic={version: 1.0})
        assert (release.versions, release.main_version, release.deleted) == ((version,), version, False)
        assert release.created_at.tzinfo is not None
        assert store.current("a") == release
        assert store.get_release("a", number) == release
    assert store.releases("a") == [1, 2, 3]
    assert store.releases("b") == []


def test_looking_for_a_release_after_a_known_one_is_a_single_call(folder: Path) -> None:
    calls: list[StoreCall] = []
    store = Sync(AdapterStore.open(str(folder), observe=calls.append))
    known = store.release("a", Plan.only(store.put_version("a", artifact())), by="me")
    calls.clear()
    assert store.current("a", known) == known
    assert [call.operation for call in calls] == ["list"]


def test_a_deletion_is_a_release_and_can_be_undone(store: Sync) -> None:
    version = store.put_version("a", artifact())
    store.release("a", Plan.only(version), by="me")
    deletion = store.delete("a", by="me")
    assert (deletion.number, deletion.main_version, deletion.plan) == (2, None, DELETED)
    assert deletion.deleted
    assert store.current("a") == deletion
    assert store.names() == ["a"]
    assert store.get_version("a", version).version == version
    assert store.release("a", Plan.only(version), by="me").number == 3
    assert store.current("a").main_version == version


def test_releases_are_never_rewritten(files: Sync, folder: Path) -> None:
    version = files.put_version("a", artifact())
    written = {}
    for _ in range(5):
        files.release("a", Plan.only(version), by="me")
        now = {path.name: path.read_bytes() for path in (folder / "a" / "releases").iterdir()}
        assert now.items() > written.items()
        written = now
    assert sorted(written) == [f"{number:06}.json" for number in range(1, 6)]


def test_more_than_a_million_releases_keep_their_order(files: Sync, folder: Path) -> None:
    files.release("a", DELETED, by="me")
    last = folder / "a" / "releases" / "999999.json"
    last.write_bytes(
        (folder / "a" / "releases" / "000001.json").read_bytes().replace(b'"number": 1', b'"number": 999999')
    )
    assert files.release("a", DELETED, by="me").number == 1_000_000
    assert files.release("a", DELETED, by="me").number == 1_000_001
    assert files.releases("a") == [1, 999_999, 1_000_000, 1_000_001]
    assert files.current("a").number == 1_000_001
    for known in (1, 999_999, 1_000_000, 1_000_001):
        assert files.current("a", replace(files.get_release("a", 1_000_001), number=known)).number == (1_000_001)
    assert files.releases("a", 1) == [999_999, 1_000_000, 1_000_001]
    assert files.releases("a", 999_999) == [1_000_000, 1_000_001]


@pytest.mark.parametrize("after", [LAST_SORTED - 1, LAST_SORTED, LAST_SORTED + 1, 123_456, 999_999, 1_000_000])
def test_later_releases_are_found_however_many_digits_they_have(after: int, files: Sync, folder: Path) -> None:
    files.release("a", DELETED, by="me")
    releases = folder / "a" / "releases"
    numbers = [1, 99_999, 100_000, 100_001, 123_456, 999_999, 1_000_000, 1_000_001, 1_234_560, 10_000_000]
    for number in numbers:
        shutil.copy(releases / "000001.json", releases / f"{number:06}.json.new")
        (releases / f"{number:06}.json.new").rename(releases / f"{number:06}.json")
    assert files.releases("a", after) == [number for number in numbers if number > after]


def test_names_are_sorted_and_apart(store: Sync) -> None:
    names = ["b", "a", "a-b", "a.b", "A", "a1", "x" * 128]
    for name in names:
        store.release(name, DELETED, by="me")
    assert store.names() == sorted(names)
    assert all(store.releases(name) == [1] for name in names)


def test_another_process_sees_a_release_at_once(folder: Path) -> None:
    one, other = Sync(AdapterStore.open(str(folder))), Sync(AdapterStore.open(folder.as_uri()))
    version = one.put_version("a", artifact())
    assert one.release("a", Plan.only(version), by="one").number == 1
    assert other.current("a").by == "one"
    assert other.release("a", Plan.only(version), by="other").number == 2
    assert one.current("a").by == "other"


# ------------------------------------------------------------------------------------------------------ concurrency


def together(count: int, work: Callable[[int], object]) -> list:
    """Runs work(0..count-1) in as many threads, started at the same moment; results in order."""
    barrier = threading.Barrier(count)

    def start(index: int) -> object:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def look_together(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], Awaitable[object] | object]) -> None:
    """All writers of a release look before any of them writes."""
    original = AdapterStore.releases

    async def releases(self: AdapterStore, name: str, after: int = 0) -> list[int]:
        numbers = await original(self, name, after)
        waiting = wait()
        if isinstance(waiting, Awaitable):
            await waiting
        return numbers

    monkeypatch.setattr(AdapterStore, "releases", releases)


def one_won(store: Sync, results: list[Release | BaseException]) -> None:
    (winner,) = [result for result in results if isinstance(result, Release)]
    assert all(isinstance(result, Conflict) for result in results if result is not winner)
    assert winner.number == 1
    assert store.current("a") == winner
    assert store.releases("a") == [1]


def test_of_many_writers_of_a_number_one_wins(store: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Barrier(20)
    with monkeypatch.context() as patched:
        look_together(patched, looked.wait)

        def work(index: int) -> Release | BaseException:
            try:
                return store.release("a", DELETED, by=f"writer {index}")
            except Conflict as error:
                return error

        results = together(20, work)
    one_won(store, results)


def test_of_many_writers_of_a_number_in_one_loop_one_wins(store: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> list[Release | BaseException]:
        looked = asyncio.Barrier(20)
        with monkeypatch.context() as patched:
            look_together(patched, looked.wait)
            tasks = (store.store.release("a", DELETED, by="me") for _ in range(20))  # in the same words
            return await asyncio.gather(*tasks, return_exceptions=True)

    one_won(store, asyncio.run(work()))


def test_of_many_writers_after_a_release_one_wins(store: Sync) -> None:
    """Whether they look at the same time or one after the other."""
    version = store.put_version("a", artifact())
    store.release("a", Plan.only(version), by="me")

    async def work() -> list[Release | BaseException]:
        tasks = (store.store.release("a", DELETED, by="me", after=1) for _ in range(20))
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(work())
    assert [result.number for result in results if isinstance(result, Release)] == [2]
    assert sum(isinstance(result, Conflict) for result in results) == 19
    assert store.releases("a") == [1, 2]


def landed(store: Sync, numbers: list[int]) -> None:
    assert sorted(numbers) == list(range(1, 21)) == store.releases("a")
    by = [store.get_release("a", number).by for number in range(1, 21)]
    assert [numbers.index(number) for number in range(1, 21)] == [int(writer.split()[1]) for writer in by]


def test_writers_that_try_again_all_land_in_order(store: Sync) -> None:
    plan = Plan.only(store.put_version("a", artifact()))

    def work(index: int) -> int:
        while True:
            try:
                return store.release("a", plan, by=f"writer {index}").number
            except Conflict:
                continue

    landed(store, together(20, work))


def test_writers_in_one_loop_that_try_again_all_land_in_order(store: Sync) -> None:
    plan = Plan.only(store.put_version("a", artifact()))

    async def work(index: int) -> int:
        while True:
            try:
                return (await store.store.release("a", plan, by=f"writer {index}")).number
            except Conflict:
                continue

    async def every() -> list[int]:
        return await asyncio.gather(*map(work, range(20)))

    landed(store, asyncio.run(every()))


def test_many_writers_of_one_version_do_not_disturb_each_other(store: Sync) -> None:
    stored = together(20, lambda _: store.put_version("a", artifact()))
    assert len(set(stored)) == 1
    assert store.get_version("a", stored[0]).version == stored[0]


def test_many_writers_of_one_version_in_one_loop_do_not_disturb_each_other(store: Sync) -> None:
    async def every() -> list[str]:
        return await asyncio.gather(*(store.store.put_version("a", artifact()) for _ in range(20)))

    stored = asyncio.run(every())
    assert len(set(stored)) == 1
    assert store.get_version("a", stored[0]).version == stored[0]


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def stored(files: Sync, folder: Path) -> Path:
    """The folder of a stored version."""
    return folder / "a" / "versions" / files.put_version("a", artifact())


@pytest.mark.parametrize("file", ["manifest.json", "adapter.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "append", "remove"])
def test_a_damaged_version_is_found_out(file: str, damage: str, stored: Path, files: Sync) -> None:
    path = stored / file
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "append":
        path.write_bytes(data + b"\n")
    else:
        path.unlink()  # what a writer that died half-way leaves, or a careless cleanup
    # Where the manifest is not, there is no version.
    error = UnknownVersion if (file, damage) == ("manifest.json", "remove") else CorruptVersion
    with pytest.raises(error) as caught:
        files.get_version("a", stored.name)
    assert stored.name in caught.value.message
    assert [one.whole for one in files.versions("a")] == [damage != "remove"]


def test_a_whole_version_under_another_ones_name_is_found_out(stored: Path, files: Sync) -> None:
    other = files.put_version("a", artifact(2))
    for file in ("manifest.json", "adapter.safetensors"):
        shutil.copy(stored.with_name(other) / file, stored / file)
    with pytest.raises(CorruptVersion, match=stored.name):
        files.get_version("a", stored.name)
    assert files.put_version("a", artifact(1)) == stored.name  # putting it again repairs it
    assert files.get_version("a", stored.name).version == stored.name


def test_a_version_that_was_never_stored(store: Sync) -> None:
    for call in (store.get_version, store.open_version, store.manifest):
        with pytest.raises(UnknownVersion, match=f"'a' has no version {MISSING}") as caught:
            call("a", MISSING)
        assert caught.value.param == "version"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"number": 0}', b"\xff", b'"' + b"x" * 100],
    ids=["empty", "cut", "list", "object", "fields", "bytes", "text"],
)
def test_a_damaged_release_is_named(content: bytes, files: Sync, folder: Path) -> None:
    files.release("a", DELETED, by="me")
    (folder / "a" / "releases" / "000001.json").write_bytes(content)
    with pytest.raises(CorruptVersion, match="release 1 of adapter 'a'"):
        files.current("a")


WRONG_VERSIONS = ["x", f"../{'0' * 64}", f"{'0' * 64}x", "A" * 64, f"{'0' * 64}\n"]


@pytest.mark.parametrize(
    "fields",
    [
        *({"traffic": {version: 1.0}} for version in WRONG_VERSIONS),
        *({"traffic": {MISSING: 1.0}, "shadow": [version]} for version in WRONG_VERSIONS),
        {"traffic": {MISSING: 0.5}},
        {"traffic": {MISSING: None}},
        {"shadow": [MISSING]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_release_of_something_else_than_a_plan_is_damaged(fields: dict[str, Any], files: Sync, folder: Path) -> None:
    files.release("a", DELETED, by="me")
    path = folder / "a" / "releases" / "000001.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))
    with pytest.raises(CorruptVersion):
        files.current("a")


def test_stray_files_are_left_alone(files: Sync, folder: Path) -> None:
    version = files.put_version("a", artifact())
    files.release("a", Plan.only(version), by="me")
    for name in ("README.md", ".gitignore", "a b", "ü", "a#1", "x%20y"):
        (folder / name).write_text("stray")
    for name in (".git", "a..b", "-x", "a b c", "ä", "_", "x%20", "y" * 129):
        (folder / name).mkdir()
        (folder / name / "releases").mkdir()
    releases = folder / "a" / "releases"
    for name in ("README.md", "000009.txt", "000009.json.tmp", "x000009.json", "9.json", "0000009.json", "١٢٣٤٥٦.json"):
        (releases / name).write_text("stray")
    (releases / "000007.json#1").write_text("what a writer that died half-way leaves")
    (releases / "000008.json").mkdir()
    (folder / "a" / "versions" / "README.md").write_text("stray")
    assert files.names() == ["a"]
    assert files.releases("a") == [1]
    assert files.current("a").main_version == version
    assert [stored.version for stored in files.versions("a")] == [version]
    assert files.release("a", DELETED, by="me").number == 2


# ----------------------------------------------------------------------------------------------------------- faults


async def never() -> bool:
    """Nobody has released a version in the meantime."""
    return False


CALLS: dict[str, Callable[[Sync], object]] = {
    "names": lambda store: store.names(),
    "put_version": lambda store: store.put_version("a", artifact()),
    "open_version": lambda store: store.open_version("a", MISSING),
    "get_version": lambda store: store.get_version("a", MISSING),
    "has_version": lambda store: store.has_version("a", MISSING),
    "manifest": lambda store: store.manifest("a", MISSING),
    "remove_version": lambda store: store.remove_version("a", MISSING, never),
    "versions": lambda store: store.versions("a"),
    "releases": lambda store: store.releases("a"),
    "later releases": lambda store: store.releases("a", 1),
    "get_release": lambda store: store.get_release("a", 1),
    "current": lambda store: store.current("a"),
    "history": lambda store: store.history("a"),
    "release": lambda store: store.release("a", DELETED, by="me"),
    "delete": lambda store: store.delete("a", by="me"),
    "rollback": lambda store: store.rollback("a", by="me"),
    "pins": lambda store: store.pins(),
    "pin": lambda store: store.pin("a"),
    "unpin": lambda store: store.unpin("a"),
    "collect": lambda store: removed(store),
    "collect one": lambda store: removed(store, name="a"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

LISTINGS = (
    "names",
    "versions",
    "releases",
    "later releases",
    "current",
    "history",
    "release",
    "delete",
    "rollback",
    "pins",
    "collect",
    "collect one",
)

SERVER_CALLS = ("put_async", "get_async", "head_async", "delete_async", "list", "list_with_delimiter_async")
"""What the store calls of obstore."""


@every_call
def test_a_folder_that_became_a_file(call: Callable[[Sync], object], files: Sync, folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    with pytest.raises(StoreUnavailable) as caught:
        call(files)
    assert caught.value.retry_after
    assert "\n" not in caught.value.message
    assert str(folder) not in caught.value.message


@pytest.mark.parametrize("call", LISTINGS)
def test_a_folder_that_vanished_is_not_an_empty_one(call: str, files: Sync, folder: Path) -> None:
    version = files.put_version("a", artifact())
    files.release("a", Plan.only(version), by="me")
    shutil.rmtree(folder)
    with pytest.raises(StoreUnavailable, match="folder is gone"):
        CALLS[call](files)
    assert not folder.exists()


@every_call
@pytest.mark.parametrize(
    "error",
    [GenericError("boom\ndebug dump"), PermissionError("boom"), TimeoutError("boom"), PermissionDeniedError("boom")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_the_object_store_raises(
    call: Callable[[Sync], object], error: Exception, files: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for name in SERVER_CALLS:
        monkeypatch.setattr(objects_module.obstore, name, fail)
    monkeypatch.setattr(objects_module._Folder, "call", fail)
    with pytest.raises(StoreUnavailable, match=r"^the adapter store failed$") as caught:
        call(files)
    assert caught.value.__cause__ is error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(files: Sync, folder: Path) -> None:
    folder.chmod(0o500)
    try:
        for call in ("put_version", "release", "pin"):
            with pytest.raises(StoreUnavailable):
                CALLS[call](files)
    finally:
        folder.chmod(0o700)


def test_a_failed_write_leaves_no_release(files: Sync, folder: Path) -> None:
    version = files.put_version("a", artifact())
    (folder / "a" / "releases").write_text("in the way")
    with pytest.raises(StoreUnavailable):
        files.release("a", Plan.only(version), by="me")
    (folder / "a" / "releases").unlink()
    assert files.release("a", Plan.only(version), by="me").number == 1


def test_a_writer_that_dies_between_the_two_files_leaves_no_whole_version(
    files: Sync, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = objects_module.obstore.put_async
    written: list[str] = []

    async def dies(objects: Any, path: str, data: bytes, **kwargs: Any) -> object:
        if written:
            raise GenericError("power cut")
        written.append(path)
        return await put(objects, path, data, **kwargs)

    version = artifact().version
    with monkeypatch.context() as patched:
        patched.setattr(objects_module.obstore, "put_async", dies)
        with pytest.raises(StoreUnavailable):
            files.put_version("a", artifact())
    assert not list(folder.rglob("manifest.json"))  # where it is, the version is whole
    assert not files.has_version("a", version)
    assert [(one.version, one.whole) for one in files.versions("a")] == [(version, False)]
    with pytest.raises(UnknownVersion):
        files.get_version("a", version)
    with pytest.raises(UnknownVersion):
        files.release("a", Plan.only(version), by="me")
    files.put_version("a", artifact())
    assert files.get_version("a", version)
    assert [one.whole for one in files.versions("a")] == [True]


# ---------------------------------------------------------------------------------------------------- names and URLs

BAD_NAMES = [
    "",
    ".",
    "..",
    "a/b",
    "../a",
    "/a",
    "a\\b",
    "a..b",
    ".a",
    "-a",
    "_a",
    "a b",
    "a\n",
    "a\0",
    "ä",
    "\u0430",  # the Cyrillic letter that looks like an a
    "\uff11",  # a full-width digit
    "a%2fb",
    "a#1",
    "x" * 129,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_reaches_no_store(name: str, files: Sync, folder: Path) -> None:
    calls = [
        lambda: check_name(name),
        lambda: files.put_version(name, artifact()),
        lambda: files.open_version(name, MISSING),
        lambda: files.get_version(name, MISSING),
        lambda: files.load_small(name, MISSING, 1, str),
        lambda: files.has_version(name, MISSING),
        lambda: files.manifest(name, MISSING),
        lambda: files.remove_version(name, MISSING, never),
        lambda: files.versions(name),
        lambda: files.releases(name),
        lambda: files.releases(name, 1),
        lambda: files.get_release(name, 1),
        lambda: files.current(name),
        lambda: files.history(name),
        lambda: files.release(name, DELETED, by="me"),
        lambda: files.delete(name, by="me"),
        lambda: files.rollback(name, by="me"),
        lambda: files.rollback_target(name),
        lambda: files.pin(name),
        lambda: files.unpin(name),
        lambda: removed(files, name=name),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert (caught.value.param, caught.value.error_code) == ("name", "invalid_name")
        assert len(caught.value.message) < 1000
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "A9", "0", "a.b-c_d", "x" * 128, "a-", "a.", "v1.0"])
def test_a_good_name(name: str, store: Sync) -> None:
    assert check_name(name) == name
    version = store.put_version(name, artifact())
    store.release(name, Plan.only(version), by="me")
    assert store.names() == [name]
    assert store.get_version(name, store.current(name).main_version).version == version
    store.pin(name)
    assert store.pins() == [name]


@pytest.mark.parametrize("version", ["", "x", "../x", "0" * 63, "0" * 65, "A" * 64, f"{'0' * 63}\n", f"{'0' * 64}\n"])
def test_a_bad_version_reaches_no_store(version: str, files: Sync, folder: Path) -> None:
    calls = [
        lambda: check_version(version),
        lambda: files.open_version("a", version),
        lambda: files.get_version("a", version),
        lambda: files.load_small("a", version, 1, str),
        lambda: files.has_version("a", version),
        lambda: files.manifest("a", version),
        lambda: files.remove_version("a", version, never),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert (caught.value.param, caught.value.error_code) == ("version", "invalid_version")
    for fields in ({"traffic": {version: 1.0}}, {"traffic": {MISSING: 1.0}, "shadow": [version]}):
        with pytest.raises(ValidationError):
            TypeAdapter(Plan).validate_python(fields)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://",
        "s3:///prefix",
        "gs:///prefix",
        "az://",
        "s3:bucket",
        "http://host/x",
        "file://host/x",
        "file://",
        "file:x",
        "file://[",
        "memory:",
        "memory://x",
    ],
)
def test_a_bad_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest) as caught:
        AdapterStore.open(url)
    assert caught.value.param == "store"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_relative_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for url, where in (("./s", "s"), ("~/s", "home/s"), ("with space#and?more", "with space#and?more")):
        Sync(AdapterStore.open(url)).release("a", DELETED, by="me")
        assert (tmp_path / where / "a" / "releases" / "000001.json").is_file()


def test_a_url_may_have_escapes(tmp_path: Path) -> None:
    where = tmp_path / "a b" / "é"
    Sync(AdapterStore.open(where.as_uri())).release("a", DELETED, by="me")
    assert (where / "a" / "releases" / "000001.json").is_file()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file", tmp_path / "file" / "below", "/\0"):
        with pytest.raises(StoreUnavailable) as caught:
            AdapterStore.open(str(url))
        assert caught.value.status == 503


# --------------------------------------------------------------------------------------------- what a release may say


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=MAX_SERVING), shadows=st.integers(0, MAX_SHADOWS))
def test_any_shares_that_add_up_are_a_plan(weights: list[float], shadows: int) -> None:
    names = versions(len(weights) + shadows)
    traffic = {name: weight / math.fsum(weights) for name, weight in zip(names, weights, strict=False)}
    plan = Plan(traffic=traffic, shadow=tuple(names[len(weights) :]))
    assert plan.versions == tuple(names)
    stored = TypeAdapter(Plan)
    assert stored.validate_json(stored.dump_json(plan)) == plan


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=MAX_SERVING),
    total=st.floats(0.5, 1.5) | st.floats(1 - 3 * SHARES_TOLERANCE, 1 + 3 * SHARES_TOLERANCE),
)
def test_shares_have_to_add_up(weights: list[float], total: float) -> None:
    shares = [weight / math.fsum(weights) * total for weight in weights]
    assume(max(shares) <= 1)
    traffic = dict(zip(versions(len(shares)), shares, strict=True))
    if abs(math.fsum(shares) - 1) <= SHARES_TOLERANCE:
        assert Plan(traffic=traffic).traffic == traffic
    else:
        with pytest.raises(ValidationError, match="the shares of traffic add up to"):
            Plan(traffic=traffic)


A, B, C, *MORE = versions(40)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "traffic\n  Field required"),
        ({"traffic": {A: 0.5}}, "the shares of traffic add up to 0.5, not to 1"),
        ({"traffic": {A: 0.5, B: 0.51}}, "the shares of traffic add up to 1.01, not to 1"),
        ({"traffic": {A: 1.0, B: 0.0}}, "greater than 0"),
        ({"traffic": {A: 1.5, B: -0.5}}, "less than or equal to 1"),
        ({"traffic": {A: math.nan}}, "traffic"),
        ({"traffic": {A: math.inf}}, "less than or equal to 1"),
        ({"traffic": {A: None}}, "valid number"),
        ({"traffic": [A]}, "valid dictionary"),
        ({"traffic": {A: 1.0}, "shadow": (A,)}, "a version occurs twice in traffic and shadow"),
        ({"traffic": {A: 1.0}, "shadow": (B, B)}, "a version occurs twice in traffic and shadow"),
        ({"traffic": {}, "shadow": (A,)}, "a shadow needs a version that serves"),
        ({"traffic": {A: 1.0}, "shadow": MORE[: MAX_SHADOWS + 1]}, "at most 4 items"),
        ({"traffic": dict.fromkeys(MORE[: MAX_SERVING + 1], 1 / (MAX_SERVING + 1))}, "at most 16 items"),
        ({"traffic": {A: 1.0}, "mirror": ()}, "Unexpected keyword argument"),
    ],
)
def test_what_is_no_plan(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Plan).validate_python(fields)
    assert message in str(caught.value)


def test_as_many_as_a_plan_may_name() -> None:
    plan = Plan(
        traffic=dict.fromkeys(MORE[:MAX_SERVING], 1 / MAX_SERVING),
        shadow=MORE[MAX_SERVING : MAX_SERVING + MAX_SHADOWS],
    )
    assert len(plan.versions) == MAX_SERVING + MAX_SHADOWS


def test_a_plan_stays_as_it_is() -> None:
    plan = Plan.only(A)
    with pytest.raises(FrozenInstanceError):
        plan.shadow = (B,)
    assert plan == Plan(traffic={A: 1.0}, shadow=())
    assert DELETED.versions == ()


def test_the_main_version_is_the_first_of_the_largest() -> None:
    release = Release(number=1, created_at=datetime.now(UTC), by="me", traffic={B: 0.25, C: 0.375, A: 0.375})
    assert release.main_version == C
    assert release.plan == Plan(traffic={A: 0.375, B: 0.25, C: 0.375})


# --------------------------------------------------------------------------------------------- who gets which version

KEYS = [f"request {index}" for index in range(20_000)]
DEVIATIONS = 5
"""Standard deviations that a count may be off: one in some millions is, and the keys are always the same."""

SPLITS = [
    {A: 0.5, B: 0.5},
    {A: 0.99, B: 0.01},
    {A: 0.6, B: 0.3, C: 0.1},
    dict.fromkeys(MORE[:MAX_SERVING], 1 / MAX_SERVING),
]


def close_to(count: int, of: int, share: float) -> bool:
    """Whether a binomial draw may well have come to that."""
    return abs(count - of * share) <= DEVIATIONS * math.sqrt(of * share * (1 - share)) + 1


@pytest.mark.parametrize("traffic", SPLITS, ids=len)
def test_requests_are_split_by_the_shares(traffic: dict[str, float]) -> None:
    counts = Counter(choose("a", traffic, key) for key in KEYS)
    assert all(close_to(counts[version], len(KEYS), share) for version, share in traffic.items())
    assert counts.keys() <= traffic.keys()


@given(key=st.text(), split=st.sampled_from(SPLITS), order=st.randoms())
def test_a_key_gets_the_same_version_whatever_the_order(key: str, split: dict[str, float], order: Any) -> None:
    shuffled = list(split.items())
    order.shuffle(shuffled)
    assert choose("a", dict(shuffled), key) == choose("a", split, key)


def test_a_key_gets_the_same_version_in_every_process() -> None:
    """Other servers, and later versions of this one, have to agree."""
    traffic = {A: 0.5, B: 0.3, C: 0.2}
    chosen = "".join("ABC"[[A, B, C].index(choose("a", traffic, f"{index}"))] for index in range(24))
    assert chosen == "AABCAABABCCAABABCCCBCAAB"


def test_a_single_version_gets_everything() -> None:
    assert {choose("a", {A: share}, key) for share in (1.0, 0.999_999_9) for key in KEYS[:100]} == {A}


def test_adapters_are_split_apart() -> None:
    """Else the same users were always the first ones to get something new."""
    traffic = {A: 0.5, B: 0.5}
    same = sum(choose("a", traffic, key) == choose("b", traffic, key) for key in KEYS)
    assert close_to(same, len(KEYS), 0.5)


def moved(before: dict[str, float], after: dict[str, float]) -> Counter[tuple[str, str]]:
    """How many keys go from one version to another."""
    pairs = Counter((choose("a", before, key), choose("a", after, key)) for key in KEYS)
    return Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})


@pytest.mark.parametrize(("before", "after"), [(0.01, 0.05), (0.05, 0.5), (0.5, 0.3), (0.9, 1 - 1e-9)])
def test_when_a_share_grows_only_what_it_grows_by_moves(before: float, after: float) -> None:
    moves = moved({A: 1 - before, B: before}, {A: 1 - after, B: after})
    ((pair, count),) = moves.items()
    assert pair == ((A, B) if after > before else (B, A))
    assert close_to(count, len(KEYS), abs(after - before))


def test_what_joins_or_leaves_moves_no_key_between_the_others() -> None:
    without, joined = {A: 0.6, B: 0.4}, {A: 0.54, B: 0.36, C: 0.1}
    assert {new for _, new in moved(without, joined)} == {C}
    assert {old for old, _ in moved(joined, without)} == {C}


@settings(max_examples=20)
@given(weights=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=2, max_size=5))
def test_keys_move_only_to_what_gained_more(weights: list[tuple[int, int]]) -> None:
    before, after = (
        {name: weight / sum(one) for name, weight in zip(MORE, one, strict=False)} for one in zip(*weights, strict=True)
    )
    for key in KEYS[:300]:
        old, new = choose("a", before, key), choose("a", after, key)
        assert old == new or after[new] / before[new] > after[old] / before[old]


def test_the_smallest_share_is_a_share() -> None:
    assert {choose("a", {A: 1.0, B: 5e-324}, key) for key in KEYS[:100]} == {A}


# ------------------------------------------------------------------------------------------------ releases of versions


@pytest.fixture
def three(store: Sync) -> list[str]:
    """Three stored versions of adapter `a`."""
    return [store.put_version("a", one) for one in ARTIFACTS]


def test_a_release_of_shares_and_shadows_comes_back(store: Sync, three: list[str]) -> None:
    plan = Plan(traffic={three[1]: 0.9, three[0]: 0.1}, shadow=(three[2],))
    release = store.release("a", plan, by="me", note="ünïcode")
    assert release.plan == plan
    assert release.versions == (three[1], three[0], three[2])
    assert store.current("a") == release
    assert list(store.current("a").traffic) == [three[1], three[0]]


@pytest.mark.parametrize("place", ["only", "traffic", "shadow"])
def test_what_is_not_stored_is_not_released(place: str, store: Sync, three: list[str]) -> None:
    store.put_version("b", artifact(7))
    foreign = artifact(7).version  # of another adapter
    plan = {
        "only": Plan.only(foreign),
        "traffic": Plan(traffic={three[0]: 0.5, foreign: 0.5}),
        "shadow": Plan(traffic={three[0]: 1.0}, shadow=(foreign,)),
    }[place]
    with pytest.raises(UnknownVersion, match=f"'a' has no version {foreign}") as caught:
        store.release("a", plan, by="me")
    assert caught.value.param == "traffic"
    assert store.releases("a") == []


def test_a_release_may_name_the_one_that_it_follows(store: Sync, three: list[str]) -> None:
    plan = Plan.only(three[0])
    with pytest.raises(Conflict, match="the last release of adapter 'a' is 0, not 1") as caught:
        store.release("a", plan, by="me", after=1)
    assert caught.value.param == "after"
    assert store.release("a", plan, by="me", after=0).number == 1
    for after in (0, 2):
        for call in (
            lambda after=after: store.release("a", plan, by="me", after=after),
            lambda after=after: store.delete("a", by="me", after=after),
        ):
            with pytest.raises(Conflict, match=f"the last release of adapter 'a' is 1, not {after}"):
                call()
    assert store.delete("a", by="me", after=1).number == 2
    with pytest.raises(Conflict):
        store.rollback("a", by="me", after=1)
    assert store.rollback("a", by="me", after=2).number == 3


def test_what_was_deleted_cannot_be_deleted(store: Sync, three: list[str]) -> None:
    store.release("a", Plan.only(three[0]), by="me")
    store.delete("a", by="me")
    with pytest.raises(UnknownAdapter, match="no adapter 'a' serves"):
        store.delete("a", by="me")
    assert store.releases("a") == [1, 2]


def test_history_is_read_in_pages(store: Sync, three: list[str]) -> None:
    made = [store.release("a", Plan.only(three[number % 3]), by="me", note=f"{number}") for number in range(7)]
    latest_first = made[::-1]
    assert store.history("a") == latest_first
    assert store.history("a", limit=3) == latest_first[:3]
    assert store.history("a", before=5, limit=2) == latest_first[3:5]
    assert store.history("a", before=2) == latest_first[6:]
    assert store.history("a", before=1) == []
    assert store.history("a", before=100) == latest_first


def rolled_back(store: Sync, **options: Any) -> tuple[str | None, int | None]:
    release = store.rollback("a", by="me", **options)
    assert store.current("a") == release
    return release.main_version, release.restores


def test_rolling_back_again_goes_further_back(store: Sync, three: list[str]) -> None:
    one, two, three_ = three
    for version in (one, one, two, three_):
        store.release("a", Plan.only(version), by="me")
    store.delete("a", by="me")
    assert rolled_back(store) == (three_, 4)
    assert rolled_back(store) == (two, 3)
    assert rolled_back(store) == (one, 2)
    with pytest.raises(Conflict, match="has no earlier release that served") as caught:
        store.rollback("a", by="me")
    assert caught.value.error_code == "nothing_to_roll_back_to"
    assert store.releases("a") == list(range(1, 9))


def test_a_new_release_is_what_the_next_roll_back_starts_from(store: Sync, three: list[str]) -> None:
    one, two, three_ = three
    for version in (one, two):
        store.release("a", Plan.only(version), by="me")
    assert rolled_back(store) == (one, 1)
    store.release("a", Plan.only(three_), by="me")
    assert rolled_back(store) == (one, 3)
    with pytest.raises(Conflict):  # that stood for release 1
        store.rollback("a", by="me")
    assert rolled_back(store, to=2) == (two, 2)
    assert rolled_back(store) == (one, 1)


def test_a_roll_back_passes_over_deletions(store: Sync, three: list[str]) -> None:
    store.release("a", Plan.only(three[0]), by="me")
    store.delete("a", by="me")
    store.release("a", Plan.only(three[1]), by="me")
    assert rolled_back(store) == (three[0], 1)


def test_rolling_back_brings_back_shares_and_shadows(store: Sync, three: list[str]) -> None:
    plan = Plan(traffic={three[0]: 0.75, three[1]: 0.25}, shadow=(three[2],))
    store.release("a", plan, by="me")
    store.release("a", Plan(traffic={three[0]: 0.5, three[1]: 0.5}), by="me")
    assert store.rollback("a", by="me").plan == plan


def test_a_roll_back_to_a_release(store: Sync, three: list[str]) -> None:
    store.release("a", Plan.only(three[0]), by="me")
    store.delete("a", by="me")
    with pytest.raises(Conflict, match="release 2 of adapter 'a' is a deletion; delete the adapter instead") as caught:
        store.rollback("a", to=2, by="me")
    assert (caught.value.param, caught.value.error_code) == ("to", "nothing_to_roll_back_to")
    for number in (0, 3):
        with pytest.raises(UnknownAdapter, match=f"'a' has no release {number}"):
            store.rollback("a", to=number, by="me")
    assert rolled_back(store, to=1) == (three[0], 1)
    assert rolled_back(store, to=3) == (three[0], 3)  # what serves, once more


def test_a_roll_back_to_what_was_collected(store: Sync, three: list[str]) -> None:
    for version in three[:2]:
        store.release("a", Plan.only(version), by="me")
    removed(store, keep=1, min_age=timedelta(0))
    with pytest.raises(UnknownVersion, match=three[0]):
        store.rollback("a", by="me")
    assert store.current("a").main_version == three[1]


def test_a_release_is_announced_before_it_is_made(store: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    async def announced() -> dict[str, int]:
        return await store.store.announcements.read()

    assert asyncio.run(announced()) == {}
    version = store.put_version("a.b", artifact())
    for number in (1, 2):
        store.release("a.b", Plan.only(version), by="me")
        assert asyncio.run(announced()) == {"a.b": number}
    store.put_version("c", artifact())
    create, order = Objects.create, []

    async def lost(objects: Objects, key: str, data: bytes) -> bool:
        order.append((key, await announced()))
        raise StoreUnavailable("gone")

    monkeypatch.setattr(Objects, "create", lost)
    with pytest.raises(StoreUnavailable):
        store.release("c", Plan.only(version), by="me")
    assert order == [("c/releases/000001.json", {"a.b": 2, "c": 1})]
    assert store.current("c") is None
    monkeypatch.setattr(Objects, "create", create)
    store.delete("a.b", by="me")
    assert asyncio.run(announced()) == {"a.b": 3, "c": 1}


def test_a_release_that_cannot_be_announced_is_not_made(store: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    version = store.put_version("a", artifact())

    async def fails(*_: object) -> None:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(Announcements, "add", fails)
    with pytest.raises(StoreUnavailable):
        store.release("a", Plan.only(version), by="me")
    assert store.current("a") is None


def test_old_announcements_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    async def run() -> None:
        store = AdapterStore.open(str(tmp_path))
        for name, age in (("a", 300), ("b", 70), ("c", 50), ("d", 0)):
            await store.announcements.add(name, 7)
            at = time.time() - age
            os.utime(tmp_path / "_announced" / f"{name}@7", (at, at))
        (tmp_path / "_announced" / "not one").touch()
        await store.announcements.sweep()
        assert await store.announcements.read() == {"c": 7, "d": 7}
        os.utime(tmp_path / "_announced" / "c@7", (0, 0))
        await store.announcements.sweep()  # so soon, it does not look again
        assert "c" in await store.announcements.read()
        another = AdapterStore.open(str(tmp_path))
        version = await another.put_version("e", artifact())
        await another.release("e", Plan.only(version), by="me")
        assert await another.announcements.read() == {"d": 7, "e": 1}

    asyncio.run(run())


def test_who_reads_announcements_removes_old_ones_though_nobody_makes_another(store: Sync) -> None:
    async def run() -> None:
        now, objects = [0.0], store.store._objects
        announcements = Announcements(objects, lambda: now[0])
        for index in range(5):
            await announcements.add(f"a{index}", 1)
        for now[0] in (0.0, 30.0, 58.0):
            assert len(await announcements.read()) == 5
            assert not announcements.outdated
        now[0] = 70.0
        assert len(await announcements.read()) == 5
        assert announcements.outdated
        await objects.delete("_announced/a2@1")  # by another reader
        await announcements.sweep()
        assert await announcements.read() == {}
        assert not announcements.outdated

    asyncio.run(run())


def test_one_announcement_of_the_future_makes_others_old_only_while_it_is_there(tmp_path: Path) -> None:
    async def run() -> None:
        now = [0.0]
        announcements = Announcements(AdapterStore.open(str(tmp_path))._objects, lambda: now[0])
        await announcements.add("ahead", 1)
        at = time.time() + 300
        os.utime(tmp_path / "_announced" / "ahead@1", (at, at))
        await announcements.read()
        (tmp_path / "_announced" / "ahead@1").unlink()
        now[0] = 18_000.0
        await announcements.add("a", 1)
        assert await announcements.read() == {"a": 1}
        assert not announcements.outdated
        await announcements.sweep()
        assert await announcements.read() == {"a": 1}

    asyncio.run(run())


@pytest.mark.parametrize(("seconds", "stays"), [(10, False), (100, True)])
def test_a_release_that_was_long_in_the_making_is_announced_again(
    store: Sync, monkeypatch: pytest.MonkeyPatch, seconds: int, stays: bool
) -> None:
    """Somebody may have read and removed what was announced before."""
    version = store.put_version("a", artifact())
    now, objects = [0.0], store.store._objects
    create = objects.create

    async def late(key: str, data: bytes) -> bool:
        assert await store.store.announcements.read() == {"a": 1}
        await objects.delete("_announced/a@1")
        now[0] += seconds
        return await create(key, data)

    monkeypatch.setattr(store.store, "announcements", Announcements(objects, lambda: now[0]))
    monkeypatch.setattr(objects, "create", late)
    store.release("a", Plan.only(version), by="me")
    assert (asyncio.run(store.store.announcements.read()) == {"a": 1}) is stays


def test_a_store_that_refuses_to_remove_announcements_is_left_alone_for_a_while(
    store: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        now, tries, objects = [0.0], [], store.store._objects
        announcements = Announcements(objects, lambda: now[0])
        await announcements.add("a", 1)
        await announcements.read()

        async def refuses(_: Objects, keys: list[str]) -> None:
            tries.append(now[0])
            raise StoreUnavailable("no")

        monkeypatch.setattr(Objects, "delete_all", refuses)
        for now[0] in range(70, 1000, 10):
            await announcements.read()
            if announcements.outdated:
                with pytest.raises(StoreUnavailable):
                    await announcements.sweep()
        assert tries == [70, 670]
        assert await announcements.read() == {"a": 1}

    asyncio.run(run())


def test_some_of_many_objects_are_gone_already(store: Sync) -> None:
    async def run() -> None:
        objects = store.store._objects
        for key in ("folder/a", "folder/c", "folder/d"):
            await objects.put(key, b"")
        await objects.delete_all(["folder/a", "folder/b", "folder/c"])
        assert [entry.key for entry in await objects.entries("folder")] == ["folder/d"]

    asyncio.run(run())


def test_a_release_stands_though_old_announcements_cannot_be_removed(
    store: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.put_version("a", artifact())

    async def fails(*_: object) -> None:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(Announcements, "sweep", fails)
    assert store.release("a", Plan.only(version), by="me").number == 1


def test_pins(store: Sync) -> None:
    for name in ("b", "a", "a"):
        store.pin(name)
    assert store.pins() == ["a", "b"]
    assert store.names() == []
    for _ in range(2):
        store.unpin("a")
    assert store.pins() == ["b"]


# -------------------------------------------------------------------------------------------------------- the report


def test_a_version_comes_back_with_its_report(store: Sync) -> None:
    version = store.put_version("a", artifact(), REPORT)
    assert version == artifact().version
    assert store.manifest("a", version) == (artifact().manifest, REPORT)
    assert store.get_version("a", version).report == REPORT
    later = REPORT.model_copy(update={"device": "cuda", "golden": None})
    assert store.put_version("a", artifact(), later) == version
    assert store.manifest("a", version)[1] == later


def test_a_version_without_a_report(store: Sync) -> None:
    version = store.put_version("a", artifact())
    assert store.manifest("a", version)[1] is None
    assert store.get_version("a", version).report is None


SEPARATORS = [
    ',\n "report": ',
    "\n}\n",
    '"report": ',
    '{"report": {}}',
    "\\n",
    "\n",
    '"',
    "\\",
    "}",
    ",",
    "\u2028",
    "é",
]
"""What the report is told from the manifest by, in parts."""

texts = (
    st.lists(st.one_of(st.sampled_from(SEPARATORS), st.text(max_size=3)), min_size=1, max_size=4)
    .map("".join)
    .filter(bool)
)
values = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=2))
options = st.dictionaries(st.sampled_from(["report", "a"]) | texts, values, max_size=3)


@st.composite
def artifacts(draw: st.DrawFn) -> Artifact:
    """Artifacts whose words are taken for a report wherever that can be."""
    golden = draw(st.lists(texts, min_size=1, max_size=3))
    manifest = Manifest(
        method="lora",
        config=draw(options),
        head={"report": draw(options)},
        task="classification",
        labels=tuple(draw(st.lists(texts, min_size=1, max_size=3, unique=True))),
        backbone=TrainedOn(name=draw(texts)),
        source=draw(texts),
        golden=draw(st.none() | st.just(Golden(texts=tuple(golden), outputs=((0.5,),) * len(golden)))),
    )
    return Artifact.build(manifest, {"x": torch.ones(1)})


@st.composite
def reports(draw: st.DrawFn) -> Report:
    return REPORT.model_copy(update={"backbone": draw(texts), "server": draw(texts), "golden": None})


@given(stored=artifacts(), report=st.none() | reports())
def test_no_words_are_taken_for_a_report(stored: Artifact, report: Report | None) -> None:
    file = stored.manifest_file(report)
    read = Artifact.verify(stored.version, file, stored.tensor_bytes)
    assert (read.version, read.manifest_bytes) == (stored.version, stored.manifest_bytes)
    assert (read.manifest, read.report) == (stored.manifest, report)
    assert Artifact.manifest_in(stored.version, file)[1] == report
    assert read.manifest_file(read.report) == file
    fields = json.loads(file)  # it is JSON all the same
    assert ("report" in fields) == (report is not None)


@given(stored=artifacts(), foreign=reports().map(lambda report: report.model_dump(mode="json")) | values)
def test_a_foreign_report_is_not_believed(stored: Artifact, foreign: Any) -> None:
    fields = json.loads(stored.manifest_file())
    for uploaded in (fields, fields | {"report": foreign}, {"report": foreign, **fields}):
        read = Artifact.uploaded(uploaded, stored.tensor_bytes)
        assert (read.version, read.manifest_bytes, read.report) == (stored.version, stored.manifest_bytes, None)


@pytest.mark.parametrize("report", [None, REPORT], ids=["plain", "reported"])
def test_a_changed_byte_of_a_manifest_is_harmless_or_found_out(report: Report | None) -> None:
    stored = artifact()
    file = stored.manifest_file(report)
    for index in range(len(file)):
        for change in (1, 2, 4, 0x10, 0x20, 0x80):
            damaged = file[:index] + bytes([file[index] ^ change]) + file[index + 1 :]
            harmless_or_found_out(stored, damaged, may_be_harmless=index >= len(stored.manifest_bytes) - 3)


@pytest.mark.parametrize("report", [None, REPORT], ids=["plain", "reported"])
def test_a_cut_manifest_is_harmless_or_found_out(report: Report | None) -> None:
    stored = artifact()
    file = stored.manifest_file(report)
    for end in range(len(file)):
        harmless_or_found_out(
            stored, file[:end], may_be_harmless=report is not None and len(file) - 3 <= end < len(file) - 1
        )
        harmless_or_found_out(stored, file[:end] + file[end + 1 :], may_be_harmless=True)
    for more in (b"\n", b" ", b"{}", file, REPORT.model_dump_json().encode()):
        harmless_or_found_out(stored, file + more)


def harmless_or_found_out(stored: Artifact, file: bytes, *, may_be_harmless: bool = False) -> None:
    """Reads a damaged manifest."""
    with suppress(CorruptVersion):
        read = Artifact.verify(stored.version, file, stored.tensor_bytes)
        assert may_be_harmless
        assert (read.version, read.manifest_bytes) == (stored.version, stored.manifest_bytes)
        assert read.report == Artifact.manifest_in(stored.version, file)[1]


@pytest.mark.parametrize("report", ["", "{", "{}", "null", "[]", '{"backbone": 1}', "\ud800"])
def test_a_damaged_report_is_found_out(report: str, files: Sync, folder: Path) -> None:
    version = files.put_version("a", artifact())
    path = folder / "a" / "versions" / version / "manifest.json"
    damaged = path.read_bytes().removesuffix(b"\n}\n") + b',\n "report": ' + report.encode(errors="surrogatepass")
    path.write_bytes(damaged + b"\n}\n")
    for call in (files.manifest, files.get_version):
        with pytest.raises(CorruptVersion, match=f"the report of version {version} is damaged"):
            call("a", version)
    assert files.put_version("a", artifact()) == version  # putting it again repairs it
    assert files.get_version("a", version).report is None


# ----------------------------------------------------------------------------------------------------- object stores


@dataclass
class Fake:
    """A function of obstore that first does what it is told."""

    original: Callable[..., Any]
    plan: list[Callable[..., Any]]
    calls: int = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return (self.plan.pop(0) if self.plan else self.original)(*args, **options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """name, what it does -> that function of obstore, faked."""

    def make(name: str, *plan: Callable[..., Any]) -> Fake:
        faked = Fake(getattr(objects_module.obstore, name), list(plan))
        monkeypatch.setattr(objects_module.obstore, name, faked)
        return faked

    return make


def fails(error: Exception) -> Callable[..., Any]:
    """A call that fails."""

    async def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


async def hangs(*_: Any, **__: Any) -> Any:
    """A call that is never answered."""
    await asyncio.Event().wait()


async def loses_the_answer(*args: Any, **options: Any) -> Any:
    """A call that does what it should and does not come back."""
    await PUT(*args, **options)
    raise TimeoutError


PUT = objects_module.obstore.put_async
PASSING = [GenericError("reset"), TimeoutError("slow"), ConnectionResetError("reset"), OSError("no route")]
HOPELESS = [
    PermissionError("no"),
    PermissionDeniedError("no"),
    UnauthenticatedError("who?"),
    InvalidPathError("what?"),
    NotSupportedError("how?"),
]


@pytest.fixture
def objects() -> Objects:
    return Objects(MemoryStore())


def impatient(objects: Objects) -> Objects:
    """The same objects, given up at once."""
    return Objects(objects._objects, timeout_seconds=0.001)


OBJECT_CALLS: dict[str, tuple[str, Callable[[Objects], Awaitable[object]], object]] = {
    "get": ("get_async", lambda objects: objects.get("there"), b"old"),
    "put": ("put_async", lambda objects: objects.put("new", b"data"), None),
    "create": ("put_async", lambda objects: objects.create("new", b"data"), True),
    "exists": ("head_async", lambda objects: objects.exists("there"), True),
    "delete": ("delete_async", lambda objects: objects.delete("there"), None),
    "folders": ("list_with_delimiter_async", lambda objects: objects.folders(), ["folder"]),
}
every_object_call = pytest.mark.parametrize(("function", "call", "answer"), OBJECT_CALLS.values(), ids=OBJECT_CALLS)


async def fill(objects: Objects) -> None:
    await objects.put("there", b"old")
    await objects.put("folder/there", b"old")


@every_object_call
@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_a_passing_failure_is_tried_again(
    function: str, call: Any, answer: object, error: Exception, objects: Objects, fake: Callable[..., Fake]
) -> None:
    asyncio.run(fill(objects))
    faked = fake(function, fails(error), fails(error))
    assert asyncio.run(call(objects)) == answer
    assert faked.calls == ATTEMPTS == 3


@every_object_call
def test_a_failure_that_does_not_pass_is_given_up(
    function: str, call: Any, answer: object, objects: Objects, fake: Callable[..., Fake]
) -> None:
    asyncio.run(fill(objects))
    faked = fake(function, *[fails(GenericError("down"))] * ATTEMPTS)
    with pytest.raises(StoreUnavailable, match=r"^the adapter store failed$"):
        asyncio.run(call(objects))
    assert faked.calls == ATTEMPTS


@every_object_call
@pytest.mark.parametrize("error", HOPELESS, ids=lambda error: type(error).__name__)
def test_a_hopeless_failure_is_not_tried_again(
    function: str, call: Any, answer: object, error: Exception, objects: Objects, fake: Callable[..., Fake]
) -> None:
    asyncio.run(fill(objects))
    faked = fake(function, fails(error))
    with pytest.raises(StoreUnavailable):
        asyncio.run(call(objects))
    assert faked.calls == 1


@every_object_call
def test_a_call_that_is_not_answered_is_given_up(
    function: str, call: Any, answer: object, objects: Objects, fake: Callable[..., Fake]
) -> None:
    asyncio.run(fill(objects))
    faked = fake(function, *[hangs] * ATTEMPTS)
    with pytest.raises(StoreUnavailable) as caught:
        asyncio.run(call(impatient(objects)))
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert faked.calls == ATTEMPTS


def test_a_call_that_is_not_answered_once_is_tried_again(
    objects: Objects, fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    faked = fake("put_async", hangs)
    deadlines = [0.001, None]
    timeout = asyncio.timeout
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "timeout", lambda _: timeout(deadlines.pop(0)))
        asyncio.run(objects.put("new", b"data"))
    assert faked.calls == 2
    assert asyncio.run(objects.get("new")) == b"data"


def test_a_listing_is_tried_again(objects: Objects, fake: Callable[..., Fake]) -> None:
    class Pages:
        def __init__(self, call: Callable[..., Any]) -> None:
            self.collect_async = call

    asyncio.run(fill(objects))
    errors = [lambda *_, **__: Pages(fails(GenericError("reset"))), lambda *_, **__: Pages(fails(TimeoutError()))]
    faked = fake("list", *errors)
    assert [entry.key for entry in asyncio.run(objects.entries("folder"))] == ["folder/there"]
    assert faked.calls == 3
    fake("list", *[lambda *_, **__: Pages(hangs)] * ATTEMPTS)
    with pytest.raises(StoreUnavailable):
        asyncio.run(impatient(objects).entries("folder"))


def test_more_data_gets_more_time(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float] = []
    timeout = asyncio.timeout

    def spy(seconds: float) -> asyncio.Timeout:
        allowed.append(seconds)
        return timeout(seconds)

    async def calls() -> None:
        data = bytes(3 * objects_module.SLOWEST_BYTES_PER_SECOND)
        await objects.put("large", data)
        await objects.create("also", data)
        opened = await objects.open_object("large")
        assert opened.size == len(data)
        assert await opened.read() == data

    monkeypatch.setattr(asyncio, "timeout", spy)
    asyncio.run(calls())
    assert allowed == [8.0, 8.0, 5.0, 8.0]


def test_an_opened_object_is_opened_again_when_its_bytes_do_not_come(
    objects: Objects, fake: Callable[..., Fake]
) -> None:
    class Broken:
        meta = {"size": 3}
        bytes_async = staticmethod(fails(GenericError("reset")))

    async def broken(*_: Any, **__: Any) -> Broken:
        return Broken()

    async def read() -> bytes:
        await fill(objects)
        opened = await objects.open_object("there")
        return await opened.read()

    faked = fake("get_async", broken, fails(GenericError("reset")))
    assert asyncio.run(read()) == b"old"
    assert faked.calls == 3


def test_an_opened_object_can_be_read_again(objects: Objects) -> None:
    async def read() -> list[bytes]:
        await fill(objects)
        opened = await objects.open_object("there")
        return [await opened.read(), await opened.read()]

    assert asyncio.run(read()) == [b"old", b"old"]


def test_what_is_not_there(objects: Objects) -> None:
    async def calls() -> None:
        for call in (objects.get, objects.open_object):
            with pytest.raises(FileNotFoundError):
                await call("nothing")
        assert not await objects.exists("nothing")
        await objects.delete("nothing")
        assert await objects.entries("nothing") == []
        assert await objects.folders() == []

    asyncio.run(calls())


def test_one_of_several_creates_an_object(objects: Objects) -> None:
    async def calls() -> None:
        assert await objects.create("new", b"mine")
        assert not await objects.create("new", b"another's")
        assert await objects.get("new") == b"mine"

    asyncio.run(calls())


def test_whoever_created_an_object_knows_it_though_the_answer_was_lost(
    objects: Objects, fake: Callable[..., Fake]
) -> None:
    faked = fake("put_async", loses_the_answer, loses_the_answer)
    assert asyncio.run(objects.create("new", b"mine"))
    assert faked.calls == 2  # the second one found it there
    assert asyncio.run(objects.get("new")) == b"mine"


def test_another_one_was_first_while_the_answer_was_lost(objects: Objects, fake: Callable[..., Fake]) -> None:
    async def another(*args: Any, **options: Any) -> Any:
        await PUT(args[0], args[1], b"another's")
        raise TimeoutError

    fake("put_async", another)
    assert not asyncio.run(objects.create("new", b"mine"))
    assert asyncio.run(objects.get("new")) == b"another's"


def test_a_release_whose_answer_was_lost_was_made_once(store: Sync, fake: Callable[..., Fake]) -> None:
    fake("put_async", loses_the_answer)
    release = store.release("a", DELETED, by="me")
    assert (release.number, store.releases("a"), store.current("a")) == (1, [1], release)


def test_a_release_whose_try_was_lost_and_overtaken_is_a_conflict(store: Sync, fake: Callable[..., Fake]) -> None:
    """Also where the other one says the very same."""

    async def overtaken(*_: Any, **__: Any) -> Any:
        await store.store.release("a", DELETED, by="me")
        raise TimeoutError

    fake("put_async", overtaken)
    with pytest.raises(Conflict, match="release 1 of adapter 'a' was made by somebody else just now"):
        store.release("a", DELETED, by="me")
    assert store.releases("a") == [1]


@pytest.mark.parametrize(("url", "kind"), [("s3://bucket/prefix", S3Store), ("gs://bucket", GCSStore)])
def test_a_cloud_is_opened_without_asking_it(url: str, kind: type) -> None:
    opened = Objects.open(url)
    assert isinstance(opened._objects, kind)


def test_a_folder_of_nobody() -> None:
    with pytest.raises((InvalidRequest, StoreUnavailable)):
        AdapterStore.open("~nobody of this name/store")


def missing(*_: Any, **__: Any) -> Any:
    raise FileNotFoundError("NoSuchBucket")


@pytest.mark.parametrize("call", ["put_version", "pin", *LISTINGS])
def test_a_bucket_that_is_not_there(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server answers every call with 404, which obstore gives as FileNotFoundError."""
    for name in SERVER_CALLS:
        monkeypatch.setattr(objects_module.obstore, name, missing)
    with pytest.raises(StoreUnavailable):
        CALLS[call](Sync(AdapterStore.open("memory://")))


def test_a_version_that_is_collected_while_it_is_read(store: Sync) -> None:
    version = store.put_version("a", artifact())

    async def read() -> None:
        opened = await store.store.open_version("a", version)
        await opened.read()
        await store.store.remove_version("a", version, never)
        await opened.read()

    with pytest.raises(UnknownVersion):
        asyncio.run(read())


@pytest.mark.parametrize("half", ["manifest.json", "adapter.safetensors"])
def test_a_version_half_of_which_cannot_be_read_is_not_said_to_be_damaged(
    half: str, store: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other half is not there; what is the matter is known when the store answers."""
    original = objects_module.obstore.get_async

    async def get(objects: Any, key: str, **options: Any) -> Any:
        if key.endswith(half):
            raise PermissionError("no")
        return await original(objects, key, **options)

    def of_a_folder(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def call(folder: Any, key: str) -> Any:
            if key.endswith(half):
                raise PermissionError("no")
            return original(folder, key)

        return call

    monkeypatch.setattr(objects_module.obstore, "get_async", get)
    for name in ("read", "size"):
        monkeypatch.setattr(objects_module._Folder, name, of_a_folder(getattr(objects_module._Folder, name)))
    with pytest.raises(StoreUnavailable):
        store.get_version("a", MISSING)


FOLDER_READS: dict[str, Callable[[Objects], Awaitable[object]]] = {
    "get": lambda objects: objects.get("folder/there"),
    "choose": lambda objects: objects.choose("folder", min),
    "get_and_open": lambda objects: objects.get_and_open("folder/there", "folder/there"),
    "make_of_both": lambda objects: objects.make_of_both("folder/there", "folder/there", 10, lambda *both: both),
}


@pytest.mark.parametrize("call", FOLDER_READS.values(), ids=FOLDER_READS)
def test_a_folder_that_hangs_is_asked_again(
    call: Callable[[Objects], Awaitable[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "there").write_bytes(b"old")
    original, plan = objects_module._Folder.call, [fails(TimeoutError()), fails(OSError("stale file handle"))]

    async def faked(folder: Any, function: Callable[[], Any], size: int = 0) -> Any:
        return await (plan.pop(0)(function) if plan else original(folder, function, size))

    monkeypatch.setattr(objects_module._Folder, "call", faked)
    assert asyncio.run(call(Objects.open(str(tmp_path))))
    assert not plan
    plan += [hangs] * ATTEMPTS
    with pytest.raises(StoreUnavailable):
        asyncio.run(call(Objects.open(str(tmp_path), timeout_seconds=0.001)))
    assert not plan


def test_the_object_that_is_chosen(store: Sync) -> None:
    objects = store.store._objects

    async def calls() -> None:
        for key in ("folder/1", "folder/2", "folders/3"):
            await objects.put(key, key.encode())
        assert await objects.choose("folder", max) == ("2", b"folder/2")
        assert await objects.choose("folder", lambda names: None) is None
        assert await objects.choose("nothing", lambda names: max(names, default=None)) is None
        with pytest.raises(FileNotFoundError):
            await objects.choose("folder", lambda names: "gone")

    asyncio.run(calls())


def test_a_small_version_of_a_folder_is_loaded_in_one_go(stored: Path, files: Sync) -> None:
    size = (stored / "adapter.safetensors").stat().st_size

    def load(version: str = stored.name, at_most: int = size) -> tuple[str, str] | None:
        return files.load_small("a", version, at_most, lambda found: (found.version, threading.current_thread().name))

    loaded = load()
    assert loaded is not None
    assert loaded[0] == stored.name
    assert loaded[1].startswith("adapterd-store")
    assert load(at_most=size - 1) is None
    assert load(MISSING) is None
    (stored / "adapter.safetensors").write_bytes(b"spam")
    with pytest.raises(CorruptVersion, match=stored.name):
        load()
    for file in ("adapter.safetensors", "manifest.json"):
        (stored / file).unlink()
        assert load() is None


def test_a_version_that_is_known_is_loaded_again_by_its_tensors_alone(stored: Path, files: Sync) -> None:
    whole = (stored / "adapter.safetensors").read_bytes()
    known = len(whole), hashlib.sha256(whole).digest()

    def load(name: str = "a") -> list[str] | None:
        return files.load_again(name, stored.name, *known, lambda tensors: sorted(tensors))

    (stored / "manifest.json").unlink()
    assert load() == sorted(artifact().tensors)
    assert load("b") is None
    for other in (b"", whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + bytes([whole[-1] ^ 1])):
        (stored / "adapter.safetensors").write_bytes(other)
        assert load() is None
    (stored / "adapter.safetensors").unlink()
    assert load() is None


def test_elsewhere_a_version_is_opened_first() -> None:
    store = Sync(AdapterStore.open("memory://"))
    version = store.put_version("a", artifact())
    assert store.load_small("a", version, 1 << 20, str) is None


def test_what_fails_in_the_work_with_a_version_is_no_failure_of_the_store(folder: Path) -> None:
    calls: list[StoreCall] = []
    store = Sync(AdapterStore.open(str(folder), observe=calls.append))
    version = store.put_version("a", artifact())
    calls.clear()

    def work(_: Artifact) -> None:
        raise OSError("not the store's")

    with pytest.raises(OSError, match="not the store's"):
        store.load_small("a", version, 1 << 20, work)
    assert [(call.outcome, call.attempts) for call in calls] == [("success", 1)]


@pytest.mark.parametrize("nbytes", [0, 1, PORTION_BYTES - 1, PORTION_BYTES, PORTION_BYTES + 1, 3 * PORTION_BYTES + 7])
def test_an_object_of_any_size_comes_back_whole(store: Sync, nbytes: int) -> None:
    objects, data = store.store._objects, os.urandom(nbytes)

    async def calls() -> None:
        await objects.put("folder/data", data)
        assert await objects.get("folder/data") == data
        _, opened = await objects.get_and_open("folder/data", "folder/data")
        assert opened is not None
        assert opened.size == nbytes
        assert bytes(await opened.read()) == data

    asyncio.run(calls())


def test_a_file_that_shrinks_or_grows_as_it_is_read(tmp_path: Path) -> None:
    objects, file = Objects.open(str(tmp_path)), tmp_path / "data"

    async def calls() -> None:
        file.write_bytes(b"spam eggs")
        _, opened = await objects.get_and_open("data", "data")
        assert opened is not None
        for now, read in ((b"spam", b"spam"), (b"spam eggs and ham", b"spam eggs"), (b"", b"")):
            file.write_bytes(now)
            assert bytes(await opened.read()) == read  # whose digest tells what it is

    asyncio.run(calls())


# ------------------------------------------------------------------------------------------------------- collection


def test_a_removed_version_is_gone(store: Sync) -> None:
    version = store.put_version("a", artifact(), REPORT)
    assert store.remove_version("a", version, never)
    assert store.versions("a") == []
    assert not store.has_version("a", version)
    for call in (store.get_version, store.open_version, store.manifest):
        with pytest.raises(UnknownVersion):
            call("a", version)
    with pytest.raises(UnknownVersion):
        store.release("a", Plan.only(version), by="me")
    assert store.put_version("a", artifact()) == version
    assert store.get_version("a", version)


def test_what_a_dead_writer_left_is_removed(stored: Path, files: Sync) -> None:
    (stored / "manifest.json").unlink()
    assert files.remove_version("a", stored.name, never)
    assert files.versions("a") == []


def test_a_version_that_is_released_while_it_is_removed_is_kept(store: Sync) -> None:
    """Until it is known to be kept it cannot be released by anybody else."""
    version = store.put_version("a", artifact(), REPORT)

    async def released() -> bool:
        with pytest.raises(UnknownVersion):
            await store.store.release("a", Plan.only(version), by="late")
        return True

    assert not store.remove_version("a", version, released)
    read = store.get_version("a", version)
    assert (read.version, read.report) == (version, REPORT)
    assert store.release("a", Plan.only(version), by="me").number == 1


@pytest.mark.parametrize(
    "error", [StoreUnavailable("boom"), CorruptVersion("boom"), asyncio.CancelledError()], ids=repr
)
def test_a_version_is_kept_where_nobody_can_say(error: BaseException, store: Sync) -> None:
    version = store.put_version("a", artifact(), REPORT)

    async def fail() -> bool:
        raise error

    with pytest.raises(type(error)):
        store.remove_version("a", version, fail)
    assert store.get_version("a", version).report == REPORT


def test_collecting_keeps_what_recent_releases_name(store: Sync, three: list[str]) -> None:
    four = store.put_version("a", artifact(9))
    store.put_version("b", artifact())
    plans = [Plan.only(three[0]), Plan(traffic={three[1]: 1.0}, shadow=(three[2],)), Plan.only(three[1]), DELETED]
    for plan in plans:
        store.release("a", plan, by="me")
    age = {"name": "a", "min_age": timedelta(0)}
    before = store.versions("a")
    for keep, gone in [(4, {four}), (3, {four, three[0]}), (2, {four, three[0], three[2]})]:
        found = removed(store, keep=keep, dry_run=True, **age)
        assert {one.version.version for one in found} == gone
        assert {one.name for one in found} == {"a"}
        assert all(one.version in before for one in found)
    assert store.versions("a") == before
    assert {one.version.version for one in removed(store, keep=3, **age)} == {four, three[0]}
    assert removed(store, keep=3, **age) == []
    assert {one.version for one in store.versions("a")} == {three[1], three[2]}
    assert store.releases("a") == [1, 2, 3, 4]
    assert len(removed(store, keep=1, min_age=timedelta(0))) == 3  # of all adapters
    assert store.versions("a") == store.versions("b") == []


def test_collecting_leaves_what_is_young(files: Sync, folder: Path) -> None:
    old, young = (files.put_version("a", artifact(value)) for value in (1, 2))
    for path in (folder / "a" / "versions" / old).iterdir():
        os.utime(path, (0, 0))
    assert [one.version.version for one in removed(files)] == [old]
    assert [one.version for one in files.versions("a")] == [young]


def test_a_version_is_as_young_as_its_last_file(stored: Path, files: Sync) -> None:
    """It is being uploaded again."""
    os.utime(stored / "manifest.json", (0, 0))
    assert removed(files) == []


def test_nothing_is_collected_of_an_adapter_with_a_damaged_release(files: Sync, folder: Path, stored: Path) -> None:
    files.release("a", Plan.only(stored.name), by="me")
    (folder / "a" / "releases" / "000001.json").write_bytes(b"{")
    files.put_version("b", artifact())
    assert [one.name for one in removed(files, min_age=timedelta(0))] == ["b"]
    assert files.get_version("a", stored.name)


def test_what_is_released_after_it_was_listed_is_kept(
    store: Sync, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.release("a", Plan.only(three[0]), by="me")
    original = AdapterStore.versions

    async def listed(self: AdapterStore, name: str) -> Any:
        found = await original(self, name)
        await self.release("a", Plan.only(three[1]), by="me")
        return found

    monkeypatch.setattr(AdapterStore, "versions", listed)
    assert {one.version.version for one in removed(store, keep=2, min_age=timedelta(0))} == {three[2]}
    assert store.get_version("a", store.current("a").main_version)


def test_a_release_never_names_what_was_collected_meanwhile(
    store: Sync, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release has looked for its version and is not written yet when the collection comes by."""
    store.release("a", Plan.only(three[0]), by="me")
    original = Objects.create

    async def create(self: Objects, key: str, data: bytes) -> bool:
        with monkeypatch.context() as undone:
            undone.setattr(Objects, "create", original)
            async for _ in collect(store.store, min_age=timedelta(0)):
                pass
        return await original(self, key, data)

    monkeypatch.setattr(Objects, "create", create)
    with suppress(UnknownVersion, Conflict):
        store.release("a", Plan.only(three[1]), by="me")
    monkeypatch.undo()
    assert store.get_version("a", store.current("a").main_version)


def test_what_is_uploaded_again_while_it_is_removed_is_whole_or_gone(store: Sync) -> None:
    version = store.put_version("a", artifact())

    async def again() -> bool:
        await store.store.put_version("a", artifact())
        return False

    store.remove_version("a", version, again)
    if store.has_version("a", version):
        assert store.get_version("a", version)


# ------------------------------------------------------------------------------------------------------------ model

MODEL_NAMES = st.sampled_from(["a", "b", "a.b"])
MODEL_VERSIONS = [one.version for one in ARTIFACTS]


@dataclass
class Logged:
    """A release in the model."""

    plan: Plan
    stands_for: int
    """Where a roll-back from here starts: its own place, or that of the release it brought back."""


class StoreModel(RuleBasedStateMachine):
    """Any sequence of calls against what dictionaries would do."""

    @initialize(local=st.booleans())
    def open(self, local: bool) -> None:
        self.folder = tempfile.TemporaryDirectory() if local else None
        self.store = Sync(AdapterStore.open(self.folder.name if self.folder else "memory://"))
        self.versions: dict[str, dict[str, Report | None]] = {"a": {}, "b": {}, "a.b": {}}
        self.log: dict[str, list[Logged]] = {"a": [], "b": [], "a.b": []}
        self.pinned: set[str] = set()
        self.touched: set[str] = set()  # a folder stays when its last file goes

    def plans(self, name: str) -> st.SearchStrategy[Plan]:
        """Plans of stored versions."""
        return st.permutations(sorted(self.versions[name])).flatmap(
            lambda order: st.builds(
                lambda serving, shadows, weights: Plan(
                    traffic={
                        version: weight / sum(weights[:serving])
                        for version, weight in zip(order[:serving], weights, strict=False)
                    },
                    shadow=tuple(order[serving : serving + shadows]),
                ),
                st.integers(1, len(order)),
                st.integers(0, 2),
                st.lists(st.integers(1, 9), min_size=len(order), max_size=len(order)),
            )
        )

    def logged(self, name: str, release: Release, plan: Plan, stands_for: int | None = None) -> None:
        log = self.log[name]
        log.append(Logged(plan, len(log) if stands_for is None else stands_for))
        assert (release.number, release.plan, release.by) == (len(log), plan, "me")

    @rule(name=MODEL_NAMES, index=st.integers(0, 2), report=st.sampled_from([None, REPORT]))
    def put(self, name: str, index: int, report: Report | None) -> None:
        version = self.store.put_version(name, ARTIFACTS[index], report)
        assert version == MODEL_VERSIONS[index]
        self.versions[name][version] = report
        self.touched.add(name)

    @precondition(lambda self: any(self.versions.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, stored in self.versions.items() if stored]))
        plan = data.draw(self.plans(name))
        last = len(self.log[name])
        after = data.draw(st.sampled_from([None, last, last + 1]))
        if after == last + 1:
            with pytest.raises(Conflict):
                self.store.release(name, plan, by="me", after=after)
        else:
            self.logged(name, self.store.release(name, plan, by="me", after=after), plan)

    @rule(name=MODEL_NAMES, version=st.sampled_from(MODEL_VERSIONS))
    def release_what_is_not_there(self, name: str, version: str) -> None:
        if version not in self.versions[name]:
            with pytest.raises(UnknownVersion):
                self.store.release(name, Plan.only(version), by="me")

    @rule(name=MODEL_NAMES)
    def delete(self, name: str) -> None:
        log = self.log[name]
        if log and log[-1].plan != DELETED:
            self.logged(name, self.store.delete(name, by="me"), DELETED)
        else:
            with pytest.raises(UnknownAdapter):
                self.store.delete(name, by="me")

    @rule(name=MODEL_NAMES)
    def roll_back(self, name: str) -> None:
        log = self.log[name]
        if not log:
            with pytest.raises(UnknownAdapter):
                self.store.rollback(name, by="me")
            return
        current = log[-1]
        earlier = [
            place
            for place in range(current.stands_for)
            if log[place].plan != DELETED and log[place].plan != current.plan
        ]
        if not earlier:
            with pytest.raises(Conflict):
                self.store.rollback(name, by="me")
        else:
            self.restore(name, earlier[-1], None)

    @precondition(lambda self: any(self.log.values()))
    @rule(data=st.data())
    def roll_back_to(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, log in self.log.items() if log]))
        number = data.draw(st.integers(1, len(self.log[name]) + 1))
        if number > len(self.log[name]):
            with pytest.raises(UnknownAdapter):
                self.store.rollback(name, to=number, by="me")
        elif self.log[name][number - 1].plan == DELETED:
            with pytest.raises(Conflict):
                self.store.rollback(name, to=number, by="me")
        else:
            self.restore(name, number - 1, number)

    def restore(self, name: str, place: int, to: int | None) -> None:
        target = self.log[name][place]
        if not set(target.plan.versions) <= self.versions[name].keys():
            with pytest.raises(UnknownVersion):
                self.store.rollback(name, to=to, by="me")
            return
        release = self.store.rollback(name, to=to, by="me")
        assert release.restores == place + 1
        self.logged(name, release, target.plan, target.stands_for)

    @rule(name=st.none() | MODEL_NAMES, keep=st.integers(1, 4), dry_run=st.booleans())
    def collect(self, name: str | None, keep: int, dry_run: bool) -> None:
        expected = {
            (one, version)
            for one in ([name] if name else self.versions)
            for version in self.versions[one].keys()
            - {v for entry in self.log[one][-keep:] for v in entry.plan.versions}
        }
        found = removed(self.store, name=name, keep=keep, min_age=timedelta(0), dry_run=dry_run)
        assert len(found) == len(expected)
        assert {(one.name, one.version.version) for one in found} == expected
        if not dry_run:
            for one, version in expected:
                del self.versions[one][version]

    @rule(name=MODEL_NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        (self.store.pin if pinned else self.store.unpin)(name)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    @rule(name=MODEL_NAMES, before=st.none() | st.integers(1, 8), limit=st.integers(1, 4))
    def page(self, name: str, before: int | None, limit: int) -> None:
        log = self.log[name]
        if not log:
            with pytest.raises(UnknownAdapter):
                self.store.history(name, before=before, limit=limit)
            return
        numbers = [number for number in range(len(log), 0, -1) if before is None or number < before][:limit]
        found = self.store.history(name, before=before, limit=limit)
        assert [release.number for release in found] == numbers
        assert [release.plan for release in found] == [log[number - 1].plan for number in numbers]

    @rule()
    def reopen(self) -> None:
        if self.folder:
            self.store = Sync(AdapterStore.open(Path(self.folder.name).as_uri()))

    @invariant()
    def agrees(self) -> None:
        asyncio.run(self.compare(self.store.store))

    async def compare(self, store: AdapterStore) -> None:
        with_files = {name for name in self.log if self.versions[name] or self.log[name]}
        assert await store.names() == sorted(self.touched if self.folder else with_files)
        assert await store.pins() == sorted(self.pinned)
        for name, log in self.log.items():
            assert await store.releases(name) == list(range(1, len(log) + 1))
            made = [await store.get_release(name, number) for number in range(1, len(log) + 1)]
            assert [release.plan for release in made] == [entry.plan for entry in log]
            for known in (None, *made):  # however long ago somebody looked
                assert await store.current(name, known) == (made[-1] if made else None)
                later = known.number if known else 0
                assert await store.releases(name, later) == list(range(later + 1, len(log) + 1))
            assert {one.version for one in await store.versions(name)} == self.versions[name].keys()
            for version in MODEL_VERSIONS:
                there = version in self.versions[name]
                assert await store.has_version(name, version) == there
                if there:
                    read = await store.get_version(name, version)
                    assert (read.version, read.report) == (version, self.versions[name][version])
                else:
                    with pytest.raises(UnknownVersion):
                        await store.get_version(name, version)

    def teardown(self) -> None:
        if getattr(self, "folder", None):
            self.folder.cleanup()


def test_any_sequence_of_calls() -> None:
    run_state_machine_as_test(StoreModel, settings=settings(max_examples=20, stateful_step_count=20))


def test_what_is_uploaded_again_while_garbage_is_collected_stays(memory_store: Sync) -> None:
    """It was old when the versions were listed."""
    store = memory_store.store
    version = memory_store.put_version("a", artifact(1))
    listed = memory_store.versions("a")

    async def again() -> list[Removed]:
        async def versions(name: str) -> list[StoredVersion]:
            return [replace(one, stored_at=datetime(2000, 1, 1, tzinfo=UTC)) for one in listed]

        store.versions = versions
        return [one async for one in collect(store, min_age=timedelta(hours=1))]

    assert asyncio.run(again()) == []
    assert memory_store.get_version("a", version).version == version


# ------------------------------------------------------------------------------------------------- tensors in memory


def layouts() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of a file that is read where it lies, and of some that are not."""
    return {
        "one format": {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([7.0])},
        "two formats": {"b": torch.arange(6.0), "a": torch.arange(3, dtype=torch.bfloat16)},
        "an empty one": {"b": torch.arange(6.0), "a": torch.empty(0, 4)},
    }


@pytest.mark.parametrize("tensors", layouts().values(), ids=layouts())
def test_tensors_in_memory_are_those_of_the_file(tensors: dict[str, torch.Tensor]) -> None:
    data = safetensors.torch.save(tensors)
    for _ in range(2):  # the second time, the header is known
        read = read_tensors("file", memoryview(bytearray(data)))
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
    for damaged in (data[:-1], data + b"x", data[:7], b"", b"\xff" * 100):
        with pytest.raises(InvalidAdapter, match="not a whole safetensors file"):
            read_tensors("file", memoryview(bytearray(damaged)))
