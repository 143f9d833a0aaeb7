"""What runs in processes of its own, to be killed. They are forks of one process that has imported what is heavy, so
that each is there at once.
"""

import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["server.cli", "server.app", "server.serving", "pytest", "httpx"])

NAMES = ("a", "b.c", "d-e")
LARGEST_BYTES = 2_000_000


def start(target: Any, *arguments: Any) -> BaseProcess:
    """A process that runs a function of this module, or of another one that is quickly imported."""
    process = _FORKS.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    """(reading end, writing end)"""
    return _FORKS.Pipe(duplex=False)


# ------------------------------------------------------------------------------------------------------- publishing


def publish_forever(folder: str, seed: int, told: Connection) -> None:
    """Puts versions and releases them, until it is killed. Tells (what it begins, name), and what was acknowledged:
    ("version", name, version) and ("release", name, the release as JSON)."""
    import asyncio

    asyncio.run(_publish_forever(folder, random.Random(seed), told))


async def _publish_forever(folder: str, choices: random.Random, told: Connection) -> None:
    import torch

    from server.store.artifact import Artifact, Manifest
    from server.store.releases import Plan
    from server.store.store import AdapterStore

    store = AdapterStore.open(folder)
    manifest = Manifest(method="lora", config={}, task="classification", labels=("a", "b"), source="test")
    while True:
        name = choices.choice(NAMES)
        numbers = torch.full((choices.randrange(1, LARGEST_BYTES) // 4,), choices.random())
        artifact = Artifact.build(manifest, {"x": numbers})
        told.send(("putting", name))
        version = await store.put_version(name, artifact)
        told.send(("version", name, version))
        told.send(("releasing", name))
        release = await store.release(name, Plan.only(version), by="child")
        told.send(("release", name, release.file()))


# ---------------------------------------------------------------------------------------------------------- serving


def save_tiny_bert(folder: Path) -> str:
    """A tiny random backbone with a tokenizer, as `--backbone` takes it."""
    from helpers import fast_tokenizer, tiny_model
    from transformers import PreTrainedTokenizerFast

    tiny_model("bert").save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(), unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    ).save_pretrained(folder)
    return str(folder)


def command(output: str, errors: str, arguments: list[str], environment: dict[str, str]) -> None:
    """`adapterd` in this process, with its output in files."""
    for file, stream in ((output, 1), (errors, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["adapterd", *arguments]

    from server.cli import main

    main()


def environment(settings: dict[str, str]) -> dict[str, str]:
    """The tests' own, with these settings and no others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTERD_")}
    return clean | {"HF_HUB_OFFLINE": "1"} | {f"ADAPTERD_{name.upper()}": value for name, value in settings.items()}


def run(folder: Path, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """`adapterd` with these arguments, until it ends; `folder` is for its output."""
    files = [folder / f"{uuid4().hex}.txt" for _ in range(2)]
    process = start(command, *map(str, files), list(arguments), environment(settings))
    process.join(120)
    try:
        assert process.exitcode is not None, "it does not end"
    finally:
        process.kill()
        process.join()
    return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))


class Server:
    """A process that serves."""

    def __init__(self, folder: Path, store: str, backbone: str, *, port: int = 0, **settings: str) -> None:
        """Starts it, on a free port where none is given; `folder` is for its output."""
        settings = {"warm_up_seconds": "0", **settings}
        self._output = folder / "output.txt"
        self._output.unlink(missing_ok=True)
        arguments = ["serve", "--port", str(port), "--store", store, "--backbone", backbone]
        arguments += ["--device", "cpu", "--dtype", "float32"]
        self.process = start(command, str(self._output), str(self._output), arguments, environment(settings))
        self._client: httpx.Client | None = None

    @property
    def client(self) -> httpx.Client:
        """For requests to it, once it answers."""
        if self._client is None:
            self._client = httpx.Client(base_url=self.address(), timeout=60)
        return self._client

    def address(self, before: str = " at ") -> str:
        """The one that it has printed behind these words."""
        while True:
            text = self.output
            if found := re.search(rf"{before}(https?://\S+)\n", text):
                return found[1]
            assert self.process.is_alive(), f"the server ended before it served: {text}"
            time.sleep(0.02)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text() if self._output.exists() else ""

    def kill(self) -> None:
        """As the out-of-memory killer does it."""
        self.process.kill()
        self.process.join()
        if self._client is not None:
            self._client.close()


@contextmanager
def serving(folder: Path, store: str, backbone: str, *, port: int = 0, **settings: str) -> Iterator[Server]:
    """A server that is killed in the end."""
    server = Server(folder, store, backbone, port=port, **settings)
    try:
        yield server
    finally:
        server.kill()
