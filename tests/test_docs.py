"""The documents say what the code does: every setting, series, method, route and file."""

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft_references
import pytest
from helpers import tiny_backbone

from server.adapters import METHODS
from server.backbone.sites import FAMILIES
from server.core import BackboneSpec
from server.errors import InvalidAdapter
from server.metrics import Metrics
from server.settings import Settings
from server.store.formats.peft import TYPES
from server.tasks import TASKS
from server.tasks.adapter import Blueprint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
METRICS = (ROOT / "docs" / "metrics.md").read_text()


METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text()
OTHER = "gpt_neox"
"""Stands for all families that are not listed."""


def rows(table: str) -> dict[str, str]:
    """First column -> second column, of the rows whose first column is code."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", table, re.M))


def test_every_setting_is_documented_with_its_default() -> None:
    documented = rows(SETTINGS)
    expected = {
        f"ADAPTERD_{name.upper()}": f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"
        for name, field in Settings.model_fields.items()
    }
    assert documented == expected
    assert all(field.description for field in Settings.model_fields.values())


def test_every_series_is_documented_with_its_type() -> None:
    collected = {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in Metrics().registry.collect()
    }
    assert rows(METRICS) == collected


def test_knobs_name_series_that_exist() -> None:
    series = set(rows(METRICS))
    text = SETTINGS + "".join(field.description or "" for field in Settings.model_fields.values())
    assert set(re.findall(r"`(adapterd_[a-z_]+)`", text)) <= series


@pytest.mark.parametrize("name", [*METHODS, *TASKS])
def test_methods_and_tasks_are_in_the_readme(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize(
    "document", [*sorted(path.relative_to(ROOT) for path in ROOT.glob("[!.]*/*.md")), Path("README.md")]
)
def test_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / document).parent.joinpath(target).exists(), target


def test_the_file_map_names_what_is_there() -> None:
    named = re.findall(r"^\| `(server/[^`]*|[a-z_]+/)`", README, re.M)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
    modules = {path.name for path in (ROOT / "server").iterdir() if not path.name.startswith("__")}
    assert {name for name in modules if name.rstrip("/") not in README} == set()


def test_json_in_the_readme_is_json() -> None:
    for block in re.findall(r"```json\n(.*?)```", README, re.S):
        json.loads(block)


@pytest.mark.parametrize("name", ["sentiment", "spam", "language", "intensity", "entities"])
def test_demo_adapters_are_small_and_have_one_release(name: str) -> None:
    folder = ROOT / "adapters_store" / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2_000_000
    assert [path.name for path in (folder / "releases").iterdir()] == ["000001.json"]
    [version] = (folder / "versions").iterdir()
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["backbone"]["fingerprint"].startswith("sha256:")
    assert manifest["golden"]["texts"]
    assert manifest["training"]["data_sha256"]


def trainable(method: str, spec: BackboneSpec) -> bool:
    targets = {} if spec.listed or "target_modules" not in METHODS[method].Config.model_fields else "all-linear"
    options: dict[str, Any] = {"target_modules": targets} if targets else {}
    if method == "compacter":
        options["reduction_factor"] = 4  # the default suits backbones that are not tiny
    try:
        config = METHODS[method].complete(options, spec)
        Blueprint.check(method=method, config=config, task="classification", head={}, labels=("no", "yes"), spec=spec)
    except InvalidAdapter:
        return False
    return True


def from_peft() -> Iterator[tuple[str, str]]:
    """(method, family) of every parity test against PEFT."""
    for case in peft_references.CASES:
        for family in case.families:
            config = case.config(peft_references.NAMES[family])
            method = TYPES[config.peft_type.value].method
            yield "dora" if getattr(config, "use_dora", False) else method, family
            if getattr(config, "bias", "none") != "none":
                yield "bitfit", family


def of_adapterhub(config: Mapping[str, Any]) -> Iterator[str]:
    """The methods that AdapterHub's configuration comes to."""
    match config.get("architecture"):
        case "union":
            for one in config["configs"]:
                yield from of_adapterhub(one)
        case "lora":
            scaled = config["composition_mode"] == "scale"
            yield "ia3" if scaled else "dora" if config["use_dora"] else "lora"
        case None:
            yield "compacter" if config.get("phm_layer") else "bottleneck"
            if config.get("inv_adapter") == "nice":
                yield "invertible"
        case "prefix_tuning" | "prompt_tuning" as name:
            yield name


def from_adapterhub() -> Iterator[tuple[str, str]]:
    """(method, family) of every AdapterHub checkpoint among the fixtures."""
    for path in (ROOT / "tests" / "fixtures" / "adapterhub_tiny").glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("adapter_config.json"):
                    for method in of_adapterhub(json.loads(archive.read(name))["config"]):
                        yield method, path.stem


def support_table() -> str:
    """Methods x families, in Markdown."""
    letters: defaultdict[tuple[str, str], str] = defaultdict(str)
    specs = {family: tiny_backbone(family).spec for family in (*FAMILIES, OTHER)}
    for letter, pairs in (
        ("P", from_peft()),
        ("A", from_adapterhub()),
        ("C", ((method, family) for method in ("head_only", "bitfit", "ln_tuning") for family in FAMILIES)),
        ("T", ((method, family) for method in METHODS for family in specs)),
    ):
        for method, family in dict.fromkeys(pairs):
            if trainable(method, specs[family]):
                letters[method, family] += letter
    names = [*FAMILIES, "other"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in METHODS:
        cells = [letters[method, family] or "–" for family in (*FAMILIES, OTHER)]  # noqa: RUF001
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B:UserWarning")
def test_the_table_of_methods_is_what_the_code_supports() -> None:
    assert support_table() in METHODS_PAGE, "run python tests/test_docs.py"


def test_the_options_of_every_method_are_described() -> None:
    described = re.findall(r"`([a-z0-9_]+)`", "".join(re.findall(r"^\| (`[^|]+) \|", METHODS_PAGE, re.M)))
    assert set(described) == set(METHODS)


if __name__ == "__main__":
    page = ROOT / "docs" / "methods.md"
    before, _, rest = METHODS_PAGE.partition("tests/test_docs.py -->\n\n")
    after = rest.partition("\n\n")[2]
    page.write_text(f"{before}tests/test_docs.py -->\n\n{support_table()}\n\n{after}")
