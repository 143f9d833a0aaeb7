"""The documents say what the code does: every setting, series, method, route and file."""

import json
import re
from pathlib import Path

import pytest

from server.adapters import METHODS
from server.metrics import Metrics
from server.settings import Settings
from server.tasks import TASKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
METRICS = (ROOT / "docs" / "metrics.md").read_text()


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
    "document", [*sorted(path.relative_to(ROOT) for path in ROOT.glob("*/*.md")), Path("README.md")]
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


@pytest.mark.parametrize("name", ["sentiment", "spam", "language"])
def test_demo_adapters_are_small_and_have_one_release(name: str) -> None:
    folder = ROOT / "adapters_store" / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
    assert [path.name for path in (folder / "releases").iterdir()] == ["000001.json"]
    [version] = (folder / "versions").iterdir()
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["backbone"]["fingerprint"].startswith("sha256:")
    assert manifest["golden"]["texts"]
    assert manifest["training"]["data_sha256"]
