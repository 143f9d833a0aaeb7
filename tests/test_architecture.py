"""Imports point one way, and importing does nothing else."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import server

ROOT = Path(server.__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(ROOT / "server")], prefix="server.")
    if not module.name.endswith("__main__")
)


def python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints, started in `folder`."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "server",
        "server.core",
        "server.errors",
        "server.settings",
        "server.metrics",
        "server.logs",
        "server.engine.scheduler",
    ],
)
def test_the_light_modules_load_no_tensors(module: str, tmp_path: Path) -> None:
    heavy = [
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "obstore",
        "server.backbone",
        "server.store",
    ]
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    assert python(code, tmp_path).strip() == "[]"


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    """No file, no thread, no log handler, no output, no network, and nothing of the tests."""
    code = f"""
import importlib, json, logging, os, signal, socket, sys, threading
def refuse(*args, **kwargs): raise AssertionError("an import opens a connection")
socket.socket.connect = refuse
handlers = {{number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}}
environment = {{name: os.environ[name] for name in os.environ}}
for module in {MODULES}:
    importlib.import_module(module)
print(json.dumps({{
    "threads": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
    "handlers": len(logging.getLogger().handlers),
    "signals": [number for number, handler in handlers.items() if signal.getsignal(number) != handler],
    "files": os.listdir("."),
    "own environment": [name for name in os.environ if name.startswith("ADAPTERD_") and name not in environment],
    "tests": [name for name in ("pytest", "hypothesis", "helpers") if name in sys.modules],
}}))
"""
    report = json.loads(python(code, tmp_path))
    assert report == {"threads": [], "handlers": 0, "signals": [], "files": [], "own environment": [], "tests": []}


def test_every_module_says_what_it_is() -> None:
    assert len(MODULES) > 20
    for module in MODULES:
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert path.read_text().startswith('"""'), f"{module} has no docstring"
