"""The chart: what it renders is what the kustomize overlays render, object by object."""

import json
import re
import subprocess
import sys
from typing import Any

import kubernetes_validate
import pytest
import yaml

import server
from tests.test_deploy import CUSTOM, KUBERNETES, OLDEST, ROOT, Object, rendered

CHART = ROOT / "deploy" / "helm" / "adapterd"
VALUES = {path.stem.removeprefix("values-"): path for path in sorted(CHART.glob("values-*.yaml"))}
RENDER = """
import json, sys
import helm_python as helm
values, name = json.loads(sys.argv[2]), sys.argv[3]
try:
    with helm.Chart.load(sys.argv[1]) as chart:
        chart.validate_schema(values)
        manifests = chart.render(values, name=name, namespace="adapterd")
    print(json.dumps([manifests, helm.lint(sys.argv[1], values, strict=True)]))
except helm.HelmError as error:
    sys.exit(str(error))
"""
"""In a process of its own: the library brings Go's run time along."""


def render(values: Object, name: str = "adapterd") -> tuple[list[Object], Object]:
    """(objects, findings of `helm lint --strict`). Raises ValueError for values that the schema refuses."""
    command = [sys.executable, "-c", RENDER, str(CHART), json.dumps(values), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    manifests, findings = json.loads(done.stdout)
    objects = [one for manifest in manifests.values() for one in yaml.safe_load_all(manifest) if one]
    return objects, findings


def values_of(*names: str) -> Object:
    """As with `-f` for each."""
    merged: Object = {}
    for name in names:
        for key, value in yaml.safe_load(VALUES[name].read_text()).items():
            merged[key] = {**merged.get(key, {}), **value}
    return merged


def plain(objects: list[Object]) -> dict[str, Object]:
    """By kind and name, without what the two ways of making them differ in: kustomize puts a hash of the settings into
    the ConfigMap's name and Helm into an annotation, so that changed settings are a rolling update; only a chart has to
    say that its volume stays."""
    text = re.sub(r"\b(adapterd(?:-picker)?)-[a-z0-9]{10}\b", r"\1", json.dumps(objects))
    found = {}
    for one in json.loads(text):
        one["metadata"].pop("namespace", None)
        one["metadata"].pop("annotations", None)
        if one["kind"] == "ConfigMap":
            one["metadata"].pop("labels", None)
        if one["kind"] == "Deployment":
            one["spec"]["template"]["metadata"].pop("annotations", None)
        found[f"{one['kind']} {one['metadata']['name']}"] = one
    return found


def same(chart: list[Object], kustomize: list[Object]) -> None:
    ours, theirs = plain(chart), plain(kustomize)
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name] == theirs[name]


def test_the_defaults_are_the_base() -> None:
    same(render({})[0], rendered(KUBERNETES / "base"))


def test_there_are_values_for_each_overlay() -> None:
    assert set(VALUES) == {path.name for path in (KUBERNETES / "overlays").iterdir()}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_overlays(name: str) -> None:
    same(render(values_of(name))[0], rendered(KUBERNETES / "overlays" / name))


@pytest.mark.parametrize("names", [(), *((name,) for name in VALUES), ("gpu", "s3", "monitoring", "gateway")])
def test_the_chart_is_clean(names: tuple[str, ...]) -> None:
    objects, findings = render(values_of(*names), "other")
    assert [one for one in findings["messages"] if one["severity"] > 1] == []
    assert findings["errors"] == []
    for one in objects:
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, OLDEST, strict=True)


def test_two_releases_do_not_meet() -> None:
    names = values_of("gpu", "s3", "monitoring", "gateway")
    first, second = (plain(render(names, name)[0]) for name in ("one", "two"))
    assert not set(first) & set(second)
    ours = [re.sub(r"\bone\b", "two", json.dumps(one)) for one in first.values()]
    assert sorted(ours) == sorted(json.dumps(one) for one in second.values())


def test_a_changed_setting_is_a_rolling_update() -> None:
    def pod(values: Object) -> Any:
        [deployment] = [one for one in render(values)[0] if one["kind"] == "Deployment"]
        return deployment["spec"]["template"]

    assert pod({}) == pod({})
    assert pod({"settings": {"ADAPTERD_LOG_LEVEL": "debug"}}) != pod({})


def test_ports_are_those_of_the_settings() -> None:
    settings = {"ADAPTERD_PORT": "7000", "ADAPTERD_METRICS_PORT": "7002"}
    objects = render({**values_of("monitoring", "gateway"), "settings": settings})[0]
    assert not re.search(r"\b800[02]\b", json.dumps(objects))


@pytest.mark.parametrize(
    "values",
    [
        {"bukcet": {"enabled": True}},
        {"settings": {"ADAPTERD_PORT": 8000}},
        {"settings": {"ADAPTERD_METRICS_PORT": None}},
        {"gpu": {"enabled": "yes"}},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(values: Object) -> None:
    with pytest.raises(ValueError, match=r"additional|string|boolean|missing"):
        render(values)


def test_the_charts_version_is_the_servers() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (server.__version__, server.__version__)
    assert OLDEST in chart["kubeVersion"]


def test_its_files_are_those_of_the_manifests() -> None:
    for path in (CHART / "files").iterdir():
        assert path.is_symlink()
        assert path.resolve().is_relative_to(ROOT / "deploy")
