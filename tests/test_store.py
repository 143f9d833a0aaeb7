"""The store: immutable versions, append-only releases, and what its failures look like."""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from obstore.exceptions import GenericError

from server.errors import Conflict, CorruptVersion, InvalidRequest, StoreUnavailable, UnknownAdapter
from server.store import store as store_module
from server.store.artifact import Artifact, Manifest
from server.store.store import AdapterStore, Release, check_name


def artifact(value: float = 1.0) -> Artifact:
    """A small artifact; another value is another version."""
    manifest = Manifest(method="lora", config={}, task="classification", labels=("a", "b"), source="test")
    return Artifact.build(manifest, {"x": torch.full((3,), float(value))})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not there yet" / "store"


@pytest.fixture(params=["memory", "folder", "file"])
def store(request: pytest.FixtureRequest, folder: Path) -> AdapterStore:
    urls = {"memory": "memory://", "folder": str(folder), "file": folder.as_uri()}
    return AdapterStore.open(urls[request.param])


@pytest.fixture
def files(folder: Path) -> AdapterStore:
    return AdapterStore.open(str(folder))


# ------------------------------------------------------------------------------------------- versions and releases


def test_an_empty_store(store: AdapterStore) -> None:
    assert store.names() == []
    assert store.releases("a") == []
    assert store.current("a") is None
    with pytest.raises(UnknownAdapter) as caught:
        store.get_release("a", 1)
    assert caught.value.param == "release"


def test_a_version_comes_back_as_it_was(store: AdapterStore) -> None:
    stored = artifact()
    version = store.put_version("a", stored)
    assert version == stored.version
    read = store.get_version("a", version)
    assert (read.manifest_bytes, read.tensor_bytes) == (stored.manifest_bytes, stored.tensor_bytes)
    assert torch.equal(read.tensors["x"], stored.tensors["x"])


def test_a_version_is_stored_once_however_often_it_is_put(files: AdapterStore, folder: Path) -> None:
    versions = {files.put_version("a", artifact()) for _ in range(3)}
    assert len(versions) == 1
    assert len(list((folder / "a" / "versions").iterdir())) == 1
    files.put_version("a", artifact(2))
    assert len(list((folder / "a" / "versions").iterdir())) == 2


def test_releases_are_numbered_and_the_last_one_serves(store: AdapterStore) -> None:
    one, two = store.put_version("a", artifact(1)), store.put_version("a", artifact(2))
    for number, version in enumerate([one, two, one], start=1):
        release = store.release("a", version, by="me", note=f"note {number}")
        assert (release.number, release.version, release.by, release.note) == (number, version, "me", f"note {number}")
        assert release.traffic == {version: 1.0}
        assert release.created_at.tzinfo is not None
        assert store.current("a") == release
        assert store.get_release("a", number) == release
    assert store.releases("a") == [1, 2, 3]
    assert store.releases("b") == []


def test_a_deletion_is_a_release_and_can_be_undone(store: AdapterStore) -> None:
    version = store.put_version("a", artifact())
    store.release("a", version, by="me")
    deletion = store.release("a", None, by="me")
    assert (deletion.number, deletion.version, deletion.traffic) == (2, None, {})
    assert store.current("a") == deletion
    assert store.names() == ["a"]
    assert store.get_version("a", version).version == version
    assert store.release("a", version, by="me").number == 3
    assert store.current("a").version == version


def test_releases_are_never_rewritten(files: AdapterStore, folder: Path) -> None:
    version = files.put_version("a", artifact())
    written = {}
    for _ in range(5):
        files.release("a", version, by="me")
        now = {path.name: path.read_bytes() for path in (folder / "a" / "releases").iterdir()}
        assert now.items() > written.items()
        written = now
    assert sorted(written) == [f"{number:06}.json" for number in range(1, 6)]


def test_more_than_a_million_releases_keep_their_order(files: AdapterStore, folder: Path) -> None:
    files.release("a", None, by="me")
    last = folder / "a" / "releases" / "999999.json"
    last.write_bytes(
        (folder / "a" / "releases" / "000001.json").read_bytes().replace(b'"number": 1', b'"number": 999999')
    )
    assert files.release("a", None, by="me").number == 1_000_000
    assert files.release("a", None, by="me").number == 1_000_001
    assert files.releases("a") == [1, 999_999, 1_000_000, 1_000_001]
    assert files.current("a").number == 1_000_001


def test_names_are_sorted_and_apart(store: AdapterStore) -> None:
    names = ["b", "a", "a-b", "a.b", "A", "a1", "x" * 128]
    for name in names:
        store.release(name, None, by="me")
    assert store.names() == sorted(names)
    assert all(store.releases(name) == [1] for name in names)


def test_another_process_sees_a_release_at_once(folder: Path) -> None:
    one, other = AdapterStore.open(str(folder)), AdapterStore.open(folder.as_uri())
    version = one.put_version("a", artifact())
    assert one.release("a", version, by="one").number == 1
    assert other.current("a").by == "one"
    assert other.release("a", version, by="other").number == 2
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


def test_of_many_writers_of_a_number_one_wins(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them look before any of them writes."""
    looked = threading.Barrier(20)
    original = AdapterStore.releases

    def releases(self: AdapterStore, name: str) -> list[int]:
        numbers = original(self, name)
        looked.wait()
        return numbers

    monkeypatch.setattr(AdapterStore, "releases", releases)

    def work(index: int) -> Release | Conflict:
        try:
            return store.release("a", None, by=f"writer {index}")
        except Conflict as error:
            return error

    results = together(20, work)
    monkeypatch.undo()
    (winner,) = [result for result in results if isinstance(result, Release)]
    assert winner.number == 1
    assert store.current("a") == winner
    assert store.releases("a") == [1]


def test_writers_that_try_again_all_land_in_order(store: AdapterStore) -> None:
    version = store.put_version("a", artifact())

    def work(index: int) -> int:
        while True:
            try:
                return store.release("a", version, by=f"writer {index}").number
            except Conflict:
                continue

    numbers = together(20, work)
    assert sorted(numbers) == list(range(1, 21)) == store.releases("a")
    by = [store.get_release("a", number).by for number in range(1, 21)]
    assert [numbers.index(number) for number in range(1, 21)] == [int(writer.split()[1]) for writer in by]


def test_many_writers_of_one_version_do_not_disturb_each_other(store: AdapterStore) -> None:
    versions = together(20, lambda _: store.put_version("a", artifact()))
    assert len(set(versions)) == 1
    assert store.get_version("a", versions[0]).version == versions[0]


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def stored(files: AdapterStore, folder: Path) -> Path:
    """The folder of a stored version."""
    return folder / "a" / "versions" / files.put_version("a", artifact())


@pytest.mark.parametrize("file", ["manifest.json", "adapter.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "append", "remove"])
def test_a_damaged_version_is_found_out(file: str, damage: str, stored: Path, files: AdapterStore) -> None:
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
    with pytest.raises(CorruptVersion) as caught:
        files.get_version("a", stored.name)
    assert stored.name in caught.value.message


def test_a_whole_version_under_another_ones_name_is_found_out(stored: Path, files: AdapterStore) -> None:
    other = files.put_version("a", artifact(2))
    for file in ("manifest.json", "adapter.safetensors"):
        shutil.copy(stored.with_name(other) / file, stored / file)
    with pytest.raises(CorruptVersion, match=stored.name):
        files.get_version("a", stored.name)
    assert files.put_version("a", artifact(1)) == stored.name  # putting it again repairs it
    assert files.get_version("a", stored.name).version == stored.name


def test_a_version_that_was_never_stored(store: AdapterStore) -> None:
    with pytest.raises(CorruptVersion, match="0" * 64):
        store.get_version("a", "0" * 64)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"number": 0}', b"\xff", b'"' + b"x" * 100],
    ids=["empty", "cut", "list", "object", "fields", "bytes", "text"],
)
def test_a_damaged_release_is_named(content: bytes, files: AdapterStore, folder: Path) -> None:
    files.release("a", None, by="me")
    (folder / "a" / "releases" / "000001.json").write_bytes(content)
    with pytest.raises(CorruptVersion, match="release 1 of adapter 'a'"):
        files.current("a")


@pytest.mark.parametrize("version", ["x", f"../{'0' * 64}", f"{'0' * 64}x", "A" * 64])
def test_a_release_of_something_else_than_a_version_is_damaged(version: str, files: AdapterStore, folder: Path) -> None:
    files.release("a", None, by="me")
    path = folder / "a" / "releases" / "000001.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"traffic": {version: 1.0}}))
    with pytest.raises(CorruptVersion):
        files.current("a")


def test_stray_files_are_left_alone(files: AdapterStore, folder: Path) -> None:
    version = files.put_version("a", artifact())
    files.release("a", version, by="me")
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
    assert files.current("a").version == version
    assert files.release("a", None, by="me").number == 2


# ----------------------------------------------------------------------------------------------------------- faults


def every_call(store: AdapterStore) -> dict[str, Callable[[], object]]:
    return {
        "names": store.names,
        "put_version": lambda: store.put_version("a", artifact()),
        "get_version": lambda: store.get_version("a", artifact().version),
        "releases": lambda: store.releases("a"),
        "get_release": lambda: store.get_release("a", 1),
        "current": lambda: store.current("a"),
        "release": lambda: store.release("a", None, by="me"),
    }


CALLS = ["names", "put_version", "get_version", "releases", "get_release", "current", "release"]


@pytest.mark.parametrize("call", CALLS[1:])
def test_a_folder_that_became_a_file(call: str, files: AdapterStore, folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    with pytest.raises(StoreUnavailable) as caught:
        every_call(files)[call]()
    assert caught.value.retry_after
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [GenericError("boom\ndebug dump"), PermissionError("boom"), TimeoutError("boom")])
def test_whatever_the_object_store_raises(
    call: str, error: Exception, files: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for name in ("put", "get", "list_with_delimiter"):
        monkeypatch.setattr(store_module.obstore, name, fail)
    with pytest.raises(StoreUnavailable, match=r"^the adapter store failed$") as caught:
        every_call(files)[call]()
    assert caught.value.__cause__ is error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(files: AdapterStore, folder: Path) -> None:
    folder.chmod(0o500)
    try:
        for call in ("put_version", "release"):
            with pytest.raises(StoreUnavailable):
                every_call(files)[call]()
    finally:
        folder.chmod(0o700)


def test_a_failed_write_leaves_no_release(files: AdapterStore, folder: Path) -> None:
    version = files.put_version("a", artifact())
    (folder / "a" / "releases").write_text("in the way")
    with pytest.raises(StoreUnavailable):
        files.release("a", version, by="me")
    (folder / "a" / "releases").unlink()
    assert files.release("a", version, by="me").number == 1


def test_a_writer_that_dies_between_the_two_files_leaves_no_whole_version(
    files: AdapterStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store_module.obstore.put
    written: list[str] = []

    def dies(objects: object, path: str, data: bytes, **kwargs: object) -> object:
        if written:
            raise GenericError("power cut")
        written.append(path)
        return put(objects, path, data, **kwargs)

    monkeypatch.setattr(store_module.obstore, "put", dies)
    with pytest.raises(StoreUnavailable):
        files.put_version("a", artifact())
    monkeypatch.undo()
    assert not list(folder.rglob("manifest.json"))  # where it is, the version is whole
    with pytest.raises(CorruptVersion):
        files.get_version("a", artifact().version)
    files.put_version("a", artifact())
    assert files.get_version("a", artifact().version)


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
def test_a_bad_name_reaches_no_store(name: str, files: AdapterStore, folder: Path) -> None:
    calls = [
        lambda: check_name(name),
        lambda: files.put_version(name, artifact()),
        lambda: files.get_version(name, artifact().version),
        lambda: files.releases(name),
        lambda: files.get_release(name, 1),
        lambda: files.current(name),
        lambda: files.release(name, None, by="me"),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert (caught.value.param, caught.value.error_code) == ("name", "invalid_name")
        assert len(caught.value.message) < 1000
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "A9", "0", "a.b-c_d", "x" * 128, "a-", "a.", "v1.0"])
def test_a_good_name(name: str, store: AdapterStore) -> None:
    assert check_name(name) == name
    version = store.put_version(name, artifact())
    store.release(name, version, by="me")
    assert store.names() == [name]
    assert store.get_version(name, store.current(name).version).version == version


@pytest.mark.parametrize("version", ["", "x", "../x", "0" * 63, "0" * 65, "A" * 64, f"{'0' * 63}\n", f"{'0' * 64}\n"])
def test_a_bad_version_reaches_no_store(version: str, files: AdapterStore, folder: Path) -> None:
    for call in (lambda: files.get_version("a", version), lambda: files.release("a", version, by="me")):
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.param == "version"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://bucket",
        "gs://bucket/x",
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
        AdapterStore.open(url).release("a", None, by="me")
        assert (tmp_path / where / "a" / "releases" / "000001.json").is_file()


def test_a_url_may_have_escapes(tmp_path: Path) -> None:
    where = tmp_path / "a b" / "é"
    AdapterStore.open(where.as_uri()).release("a", None, by="me")
    assert (where / "a" / "releases" / "000001.json").is_file()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file", tmp_path / "file" / "below", "/\0"):
        with pytest.raises(StoreUnavailable) as caught:
            AdapterStore.open(str(url))
        assert caught.value.status == 503


# ------------------------------------------------------------------------------------------------------------ model

MODEL_NAMES = st.sampled_from(["a", "b", "a.b"])
ARTIFACTS = [artifact(value) for value in range(3)]


class StoreModel(RuleBasedStateMachine):
    """Any sequence of calls against what a dictionary would do."""

    @initialize(local=st.booleans())
    def open(self, local: bool) -> None:
        self.folder = tempfile.TemporaryDirectory() if local else None
        self.store = AdapterStore.open(self.folder.name if self.folder else "memory://")
        self.versions: dict[str, set[str]] = {}
        self.log: dict[str, list[str | None]] = {}

    @rule(name=MODEL_NAMES, index=st.integers(0, 2))
    def put(self, name: str, index: int) -> None:
        version = self.store.put_version(name, ARTIFACTS[index])
        assert version == ARTIFACTS[index].version
        self.versions.setdefault(name, set()).add(version)

    @precondition(lambda self: any(self.versions.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.versions)))
        version = data.draw(st.sampled_from(sorted(self.versions[name])))
        self.log.setdefault(name, []).append(version)
        assert self.store.release(name, version, by="me").number == len(self.log[name])

    @rule(name=MODEL_NAMES)
    def delete(self, name: str) -> None:
        self.log.setdefault(name, []).append(None)
        assert self.store.release(name, None, by="me").number == len(self.log[name])

    @rule()
    def reopen(self) -> None:
        if self.folder:
            self.store = AdapterStore.open(Path(self.folder.name).as_uri())

    @invariant()
    def agrees(self) -> None:
        assert self.store.names() == sorted(self.versions.keys() | self.log.keys())
        for name in ("a", "b", "a.b"):
            log = self.log.get(name, [])
            assert self.store.releases(name) == list(range(1, len(log) + 1))
            assert [self.store.get_release(name, number).version for number in range(1, len(log) + 1)] == log
            current = self.store.current(name)
            assert (current.version if current else None) == (log[-1] if log else None)
            for stored in ARTIFACTS:
                if stored.version in self.versions.get(name, ()):
                    assert self.store.get_version(name, stored.version).version == stored.version
                else:
                    with pytest.raises(CorruptVersion):
                        self.store.get_version(name, stored.version)

    def teardown(self) -> None:
        if getattr(self, "folder", None):
            self.folder.cleanup()


def test_any_sequence_of_calls() -> None:
    run_state_machine_as_test(StoreModel, settings=settings(max_examples=20, stateful_step_count=15))
