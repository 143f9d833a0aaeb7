"""What is in deploy/ and the Dockerfile: it renders, it is valid, and it agrees with the server's code."""

import functools
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser as promql
import pytest
import yaml

import server
from server import healthcheck
from server.api.access.gate import TAKES
from server.api.access.keys import KeyEntry
from server.api.access.principal import Scope
from server.metrics import Metrics
from server.serving import LAST_ANSWERS_SECONDS
from server.settings import Settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEPLOY_PAGE = (ROOT / "docs" / "deploy.md").read_text()
SCRIPTS = Path(sysconfig.get_path("scripts"))
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
CUSTOM = {"ServiceMonitor", "PrometheusRule", "InferencePool", "HTTPRoute"}
"""Kinds that operators bring along: there are no schemas of them to check against."""
ADDED = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus adds to what it scrapes."""
OLDEST = "1.30.0"
"""The release of Kubernetes that docs/deploy.md asks for."""
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "m": 2**20, "g": 2**30}

Object = dict[str, Any]


def rendered(folder: Path) -> list[Object]:
    """What `kubectl apply --kustomize` would send."""
    command = [str(SCRIPTS / "kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def overlay(name: str) -> list[Object]:
    return rendered(KUBERNETES / "overlays" / name)


def only(objects: list[Object], kind: str, name: str = "adapterd") -> Object:
    [found] = [one for one in objects if one["kind"] == kind and re.fullmatch(f"{name}(-[a-z0-9]{{10}})?", named(one))]
    return found


def named(one: Object) -> str:
    return str(one["metadata"]["name"])


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(name of the Deployment, spec of its pods)."""
    for one in objects:
        if one["kind"] == "Deployment":
            yield named(one), one["spec"]["template"]["spec"]


def server_pod(objects: list[Object]) -> Object:
    return dict(pods(objects))["adapterd"]


def container(objects: list[Object]) -> Object:
    [only_one] = server_pod(objects)["containers"]
    return dict(only_one)


def ports(objects: list[Object]) -> dict[str, int]:
    """The server's, by their names."""
    return {port["name"]: port["containerPort"] for port in container(objects)["ports"]}


def settings(objects: list[Object]) -> dict[str, str]:
    return dict(only(objects, "ConfigMap")["data"])


def size(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", quantity).groups()
    return int(number) * UNITS.get(unit, 1)


def setting_fields(variables: dict[str, str]) -> dict[str, str]:
    """The variables that are the server's, by the names of its settings."""
    prefix = "ADAPTERD_"
    return {name.removeprefix(prefix).lower(): value for name, value in variables.items() if name.startswith(prefix)}


def read_settings(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As the server reads them, which fails for values that make no sense; names have to be the server's too."""
    assert set(setting_fields(variables)) <= set(Settings.model_fields)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Settings()


def image_environment() -> dict[str, str]:
    block = re.search(r"^ENV (.*?[^\\])\n(?!\s)", DOCKERFILE, re.M | re.S)
    assert block
    return dict(re.findall(r"([A-Z_]+)=(\S+)", block[1]))


# Kubernetes


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid(name: str, version: str) -> None:
    for one in overlay(name):
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


def test_a_field_that_is_not_there_is_found_out() -> None:
    spec = {**only(overlay("cpu"), "Service"), "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="specs"):
        kubernetes_validate.validate(spec, OLDEST, strict=True)


def test_components_go_together(tmp_path: Path) -> None:
    def reach(folder: Path) -> str:
        return os.path.relpath(folder, tmp_path)

    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "namespace": "adapterd",
                "resources": [reach(KUBERNETES / "base")],
                "components": [reach(KUBERNETES / "components" / name) for name in COMPONENTS],
                "configMapGenerator": [
                    {"name": "adapterd", "behavior": "merge", "literals": ["ADAPTERD_STORE=s3://bucket/prefix"]}
                ],
            }
        )
    )
    objects = rendered(tmp_path)
    assert {one["kind"] for one in objects} >= CUSTOM
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings(objects)["ADAPTERD_STORE"] == "s3://bucket/prefix"
    assert len(only(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]) == 2


@pytest.mark.parametrize("name", OVERLAYS)
def test_settings_are_the_servers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = overlay(name)
    read = read_settings(settings(objects), monkeypatch)
    assert ports(objects) == {"http": read.port, "metrics": read.metrics_port}
    assert read.metrics_address == read.host
    assert not read.insecure
    # A Service named like the prefix of the settings would set them, ADAPTERD_PORT=tcp://...
    assert server_pod(objects)["enableServiceLinks"] is False
    [keys] = [mount for mount in container(objects)["volumeMounts"] if mount["name"] == "keys"]
    assert Path(read.api_keys_file or "").parent == Path(keys["mountPath"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_ask_routes_that_need_no_key(name: str) -> None:
    server_container = container(overlay(name))
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        asked = server_container[probe]["httpGet"]
        assert asked == {"path": path, "port": "metrics"}  # which TLS on the other one leaves as it is
        assert f"GET {path}" in TAKES[None]


@pytest.mark.parametrize(
    ("name", "let_in"),
    [
        *((name, []) for name in OVERLAYS if name not in ("gateway", "monitoring")),
        ("gateway", [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "adapterd-picker"}}}]),
        ("monitoring", [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]),
    ],
)
def test_few_reach_the_port_that_asks_for_no_key(name: str, let_in: list[Object]) -> None:
    rules = only(overlay(name), "NetworkPolicy")["spec"]["ingress"]
    assert all(rule["from"] and [port["protocol"] for port in rule["ports"]] == ["TCP"] for rule in rules)
    by_port: dict[str, list[Object]] = {}
    for rule in rules:
        by_port.setdefault(rule["ports"][0]["port"], []).extend(rule["from"])
    assert by_port.pop("metrics", []) == let_in
    assert set(by_port) == {"http"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_slow_start_is_not_a_death(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The startup probe waits three minutes for the backbone, the rollout for the warm-up as well; the liveness probe
    is more patient than the other."""
    one = container(overlay(name))
    starting, living, ready = (one[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness"))
    patience = starting["periodSeconds"] * starting["failureThreshold"]
    assert patience >= 180
    rollout = only(overlay(name), "Deployment")["spec"]
    warm_up = read_settings(settings(overlay(name)), monkeypatch).warm_up_seconds
    assert patience + warm_up + rollout["minReadySeconds"] < rollout["progressDeadlineSeconds"]
    assert living["periodSeconds"] * living["failureThreshold"] > ready["periodSeconds"] * ready["failureThreshold"]
    for asked in (starting, living, ready):
        assert asked["timeoutSeconds"] <= asked["periodSeconds"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_has_time_to_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = overlay(name)
    read = read_settings(settings(objects), monkeypatch)
    waits = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    takes = waits + read.shutdown_grace_seconds + LAST_ANSWERS_SECONDS
    assert takes < server_pod(objects)["terminationGracePeriodSeconds"]
    # A pod that leaves still serves for as long as others may not know it.
    assert waits > container(objects)["readinessProbe"]["periodSeconds"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_are_restricted(name: str) -> None:
    for _, pod in pods(overlay(name)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in pod["containers"]:
            context = one["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pods_user_is_the_images(name: str) -> None:
    [user] = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.M)
    context = server_pod(overlay(name))["securityContext"]
    assert {context[field] for field in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}
    assert int(user) > 0


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_gets_no_token(name: str) -> None:
    assert server_pod(overlay(name))["automountServiceAccountToken"] is False
    assert only(overlay(name), "ServiceAccount")["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", OVERLAYS)
def test_memory_is_enough_for_the_budgets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = overlay(name)
    read = read_settings(settings(objects), monkeypatch)
    resources = container(objects)["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    reading = read.host_memory_bytes // 4
    backbone_and_batches = 2**30
    assert size(resources["limits"]["memory"]) >= read.host_memory_bytes + reading + backbone_and_batches
    [spool] = [volume["emptyDir"] for volume in server_pod(objects)["volumes"] if volume["name"] == "tmp"]
    assert size(spool["sizeLimit"]) >= 4 * read.max_upload_bytes
    assert size(resources["limits"]["ephemeral-storage"]) > size(spool["sizeLimit"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_container_has_limits(name: str) -> None:
    for _, pod in pods(overlay(name)):
        for one in pod["containers"]:
            assert {"cpu", "memory"} <= set(one["resources"]["limits"])
            assert {"cpu", "memory"} <= set(one["resources"]["requests"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_select_the_servers_pods(name: str) -> None:
    objects = overlay(name)
    deployment = only(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert only(objects, "Service")["spec"]["selector"] == labels
    assert only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    for constraint in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"] == labels
    target = only(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", named(deployment))
    assert "replicas" not in deployment["spec"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_one_can_always_be_replaced(name: str) -> None:
    objects = overlay(name)
    rollout = only(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert rollout == {"maxSurge": 1, "maxUnavailable": 0}
    lowest = only(objects, "HorizontalPodAutoscaler")["spec"]["minReplicas"]
    assert lowest > only(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_are_pinned_and_secrets_are_elsewhere(name: str) -> None:
    for _, pod in pods(overlay(name)):
        for one in pod["containers"]:
            tag = one["image"].rpartition(":")[2]
            assert re.match(r"v?\d+\.\d+", tag), one["image"]
            for variable in one.get("env", []):
                assert "value" not in variable
    assert [one for one in overlay(name) if one["kind"] == "Secret"] == []
    assert not [key for key in settings(overlay(name)) if re.search("KEY$|SECRET|PASSWORD|TOKEN$", key)]


def test_the_example_has_the_secrets_that_are_asked_for() -> None:
    secrets = list(yaml.safe_load_all((KUBERNETES / "secrets.example.yaml").read_text()))
    for one in secrets:
        kubernetes_validate.validate(one, OLDEST, strict=True)
    values = {named(one): one["stringData"] for one in secrets}
    assert set(values) == set(re.findall(r"create secret generic (\S+)", DEPLOY_PAGE))
    entries = [KeyEntry.model_validate(entry) for entry in json.loads(values["adapterd-api-keys"]["keys.json"])]
    assert {scope for entry in entries for scope in entry.scopes} == set(Scope)
    # Nobody can know a secret with these digests.
    assert {entry.sha256 for entry in entries} == {"0" * 64}


def test_the_image_tag_is_the_version() -> None:
    assert container(overlay("cpu"))["image"] == f"adapterd:{server.__version__}"
    assert container(overlay("gpu"))["image"] == f"adapterd:{server.__version__}-cuda"


def test_the_folder_that_replicas_share_is_theirs() -> None:
    objects = overlay("cpu")
    [mount] = [mount for mount in container(objects)["volumeMounts"] if mount["name"] == "store"]
    assert mount["mountPath"] == settings(objects)["ADAPTERD_STORE"] == image_environment()["ADAPTERD_STORE"]
    assert only(objects, "PersistentVolumeClaim", "adapterd-store")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_bucket_needs_no_folder() -> None:
    objects = overlay("s3")
    assert settings(objects)["ADAPTERD_STORE"].startswith("s3://")
    assert "PersistentVolumeClaim" not in {one["kind"] for one in objects}
    assert {volume["name"] for volume in server_pod(objects)["volumes"]} == {"keys", "tmp"}
    assert {mount["name"] for mount in container(objects)["volumeMounts"]} == {"keys", "tmp"}
    assert [source["secretRef"]["name"] for source in container(objects)["envFrom"] if "secretRef" in source] == [
        "adapterd-store"
    ]
    open_ports = {rule["port"] for out in only(objects, "NetworkPolicy")["spec"]["egress"] for rule in out["ports"]}
    assert open_ports == {53, 443}


def test_a_gpu_is_asked_for() -> None:
    objects = overlay("gpu")
    assert settings(objects)["ADAPTERD_DEVICE"] == "cuda"
    assert server_pod(objects)["runtimeClassName"] == "nvidia"
    resources = container(objects)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    assert "cpu" in resources["limits"]


def test_the_queue_that_scales_is_a_series(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = overlay("monitoring")
    [metric] = [one["pods"] for one in only(objects, "HorizontalPodAutoscaler")["spec"]["metrics"] if "pods" in one]
    name = metric["metric"]["name"]
    assert name in SERIES
    read = read_settings(settings(objects), monkeypatch)
    assert int(metric["target"]["averageValue"]) < read.max_queue_tokens
    [rule] = yaml.safe_load((DEPLOY / "prometheus" / "adapter.yaml").read_text())["rules"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(name)


def test_the_monitor_scrapes_the_service() -> None:
    objects = overlay("monitoring")
    [endpoint] = only(objects, "ServiceMonitor")["spec"]["endpoints"]
    service = only(objects, "Service")
    assert only(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    targets = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    assert targets[endpoint["port"]] == "metrics"
    assert f"GET {endpoint['path']}" in TAKES[Scope.METRICS]
    assert "authorization" not in endpoint
    assert [port["name"] for port in only(overlay("cpu"), "Service")["spec"]["ports"]] == ["http"]


def test_gateways_reach_routes_that_ask_adapters_only() -> None:
    objects = overlay("gateway")
    [rule] = only(objects, "HTTPRoute")["spec"]["rules"]
    routes = {route.split()[1] for route in TAKES[Scope.INFER]}
    assert {match["path"]["type"] for match in rule["matches"]} == {"Exact"}
    assert {match["path"]["value"] for match in rule["matches"]} <= routes
    pool = only(objects, "InferencePool")
    assert [backend["name"] for backend in rule["backendRefs"]] == [named(pool)]
    assert pool["spec"]["selector"] == only(objects, "Deployment")["spec"]["selector"]
    assert pool["spec"]["targetPorts"] == [{"number": ports(objects)["http"]}]


def test_the_picker_is_where_the_pool_says() -> None:
    objects = overlay("gateway")
    picker = only(objects, "InferencePool")["spec"]["endpointPickerRef"]
    service = only(objects, "Service", picker["name"])
    assert picker["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
    binding = only(objects, "RoleBinding", "adapterd-picker")
    assert [subject["namespace"] for subject in binding["subjects"]] == [binding["metadata"]["namespace"]]
    [one] = dict(pods(objects))["adapterd-picker"]["containers"]
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in one["args"])
    assert arguments["pool-name"] == named(only(objects, "InferencePool"))
    assert int(arguments["model-server-metrics-port"]) == ports(objects)["metrics"]
    assert set(re.findall(r"adapterd_\w+", arguments["total-queued-requests-metric"])) <= SERIES
    config = yaml.safe_load(only(objects, "ConfigMap", "adapterd-picker")["data"]["picker-config.yaml"])
    [profile] = config["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} == {plugin["type"] for plugin in config["plugins"]}


def test_the_worked_example_renders(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", DEPLOY_PAGE, re.S)
    (tmp_path / "production").mkdir()
    (tmp_path / "adapterd").symlink_to(ROOT)
    (tmp_path / "production" / "kustomization.yaml").write_text(example)
    objects = rendered(tmp_path / "production")
    assert container(objects)["image"] == f"registry.example/adapterd:{server.__version__}"
    assert settings(objects)["ADAPTERD_STORE"] == "s3://our-bucket/adapters"
    assert {one["metadata"].get("namespace") for one in objects} == {"adapterd"}
    wanted = {volume["secret"]["secretName"] for volume in server_pod(objects)["volumes"] if "secret" in volume}
    wanted |= {source["secretRef"]["name"] for source in container(objects)["envFrom"] if "secretRef" in source}
    assert set(re.findall(r"create secret generic (\S+)", DEPLOY_PAGE)) == wanted


def test_the_page_says_what_the_manifests_have() -> None:
    assert f"Kubernetes {OLDEST.removesuffix('.0')} or later" in DEPLOY_PAGE
    grace = server_pod(overlay("cpu"))["terminationGracePeriodSeconds"]
    assert f"`terminationGracePeriodSeconds`: {grace}" in DEPLOY_PAGE
    assert set(re.findall(r"`components/(\w+)`", DEPLOY_PAGE)) == set(COMPONENTS)
    named_settings = {name.lower() for name in re.findall(r"`ADAPTERD_([A-Z_]+)[`=]", DEPLOY_PAGE)}
    assert named_settings <= set(Settings.model_fields)
    assert set(re.findall(r"^\| `([A-Z_]+)`", DEPLOY_PAGE, re.M)) | {"REVISION"} == set(
        re.findall(r"^ARG (\w+)", DOCKERFILE, re.M)
    )
    assert set(re.findall(r"adapterd_[a-z_]+", DEPLOY_PAGE)) <= SERIES


# Prometheus and Grafana


def series() -> dict[str, set[str]]:
    """Name -> labels, of everything that /metrics may say."""
    found: dict[str, set[str]] = {}
    metrics = Metrics()
    labels = {one._name: set(one._labelnames) for one in vars(metrics).values() if hasattr(one, "_labelnames")}
    for family in metrics.registry.collect():
        own = labels.get(family.name, {"adapter"})
        match family.type:
            case "counter":
                found[f"{family.name}_total"] = own
            case "histogram":
                found |= {f"{family.name}_{part}": own for part in ("sum", "count")}
                found[f"{family.name}_bucket"] = own | {"le"}
            case _:
                found[family.name] = own
    return found


SERIES_LABELS = series() | {"up": set()}
SERIES = set(SERIES_LABELS)
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana" / "adapterd.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def nodes(expression: promql.Expr) -> Iterator[promql.Expr]:
    yield expression
    for field in ("lhs", "rhs", "expr", "param", "vector_selector"):
        if isinstance(inner := getattr(expression, field, None), promql.Expr):
            yield from nodes(inner)
    for argument in getattr(expression, "args", []):
        yield from nodes(argument)


def check(expression: str) -> None:
    """Names series and labels that there are. Raises for what Prometheus would not parse."""
    parsed = list(nodes(promql.parse(expression)))
    selectors = [node for node in parsed if isinstance(node, promql.VectorSelector)]
    assert selectors
    labels = set[str]().union(ADDED)
    for selector in selectors:
        assert selector.name in SERIES, selector.name
        own = SERIES_LABELS[selector.name] | ADDED
        assert {matcher.name for matcher in selector.matchers.matchers} <= own, expression
        labels |= own
    for node in parsed:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= labels, expression


def test_a_name_that_is_not_there_is_found_out() -> None:
    for expression in ("adapterd_queue", "sum by (adaptor) (adapterd_texts_total)", 'adapterd_queue_tokens{le="1"}'):
        with pytest.raises(AssertionError):
            check(expression)
    with pytest.raises(ValueError, match="parenthesis"):
        check("sum by (job (adapterd_queue_tokens)")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alerts_ask_for_series_that_there_are(alert: Object) -> None:
    check(alert["expr"])
    assert alert["labels"]["severity"] in {"critical", "warning"}
    shown = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
    modifiers = [n.modifier for n in nodes(promql.parse(alert["expr"])) if isinstance(n, promql.AggregateExpr)]
    if modifiers:
        assert shown <= set(modifiers[0].labels)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alerts_are_in_the_runbook(alert: Object) -> None:
    document, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^##+ (\w+)$", (ROOT / document).read_text(), re.M)
    assert alert["alert"] in headings
    assert anchor == alert["alert"].lower()


def test_the_runbook_has_no_alerts_of_the_past() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^### (Adapterd\w+)$", text, re.M)) == {alert["alert"] for alert in ALERTS}
    assert set(re.findall(r"`(adapterd_[a-z_]+)`", text)) <= SERIES | {name.removesuffix("_bucket") for name in SERIES}
    assert {name.lower() for name in re.findall(r"`ADAPTERD_([A-Z_]+)`", text)} <= set(Settings.model_fields)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here")
def test_prometheus_takes_its_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_operator_gets_the_same_rules() -> None:
    assert only(overlay("monitoring"), "PrometheusRule")["spec"] == RULES


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_show_series_that_there_are(panel: Object) -> None:
    for target in panel["targets"]:
        check(target["expr"].replace("$__rate_interval", "1m"))


def test_the_dashboard_shows_every_series() -> None:
    words = {word for panel in PANELS for target in panel["targets"] for word in re.findall(r"[\w:]+", target["expr"])}
    shown = words & SERIES
    families = {re.sub("_(sum|count|bucket)$", "", name) for name in SERIES - {"up"}}
    assert {re.sub("_(sum|count|bucket)$", "", name) for name in shown} == families
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"} == variables
    [query] = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    assert set(re.findall(r"adapterd_\w+", query)) <= SERIES


# Compose

COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def test_compose_starts_the_server_that_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SERVICES["adapterd"]
    variables = {name: value for name, value in one["environment"].items() if name.startswith("ADAPTERD_")}
    read = read_settings(image_environment() | variables, monkeypatch)
    assert one["ports"] == [f"127.0.0.1:{read.port}:{read.port}"]
    assert (read.store_endpoint or "").startswith("http://minio:")
    assert one["image"] == f"adapterd:{server.__version__}"
    assert (DEPLOY / "compose" / one["build"]["context"]).resolve() == ROOT
    assert one["read_only"] is True
    assert float(one["stop_grace_period"].removesuffix("s")) > read.shutdown_grace_seconds + LAST_ANSWERS_SECONDS


@pytest.mark.parametrize("name", SERVICES)
def test_compose_is_for_this_machine_only(name: str) -> None:
    one = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in one.get("ports", []))
    assert re.search(r":(v?\d+\.\d+|RELEASE\.\d{4})", one["image"]), one["image"]
    for variable, value in one.get("environment", {}).items():
        if re.search("KEY|USER|PASSWORD", variable):
            assert re.fullmatch(r"\$\{\w+:\?.*\}", value), variable


@pytest.mark.parametrize("name", SERVICES)
def test_compose_mounts_what_there_is(name: str) -> None:
    for mount in SERVICES[name].get("volumes", []):
        source = mount.split(":")[0]
        assert source in COMPOSE["volumes"] or (DEPLOY / "compose" / source).exists(), source


def test_compose_asks_for_what_the_example_has() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose" / "compose.yaml").read_text()))
    example = (DEPLOY / "compose" / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=", example, re.M)) == asked
    assert not re.search(r"PASSWORD=\S", example)


def test_compose_scrapes_the_server() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = prometheus["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in SERVICES
    assert port == image_environment()["ADAPTERD_PORT"]
    jobs = set(re.findall(r'job="(\w+)"', json.dumps(RULES).replace('\\"', '"')))
    assert jobs == {job["job_name"]}
    mounted = {mount.split(":")[1] for mount in SERVICES["prometheus"]["volumes"] if mount.startswith("..")}
    assert mounted == {f"/etc/prometheus/{name}" for name in ("prometheus.yml", *prometheus["rule_files"])}


def test_compose_brings_the_dashboard() -> None:
    provisioning = DEPLOY / "compose" / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "adapterd.yml").read_text())["providers"]
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    assert mounts["../grafana"] == provider["options"]["path"]


# The image


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [str(SCRIPTS / "hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_stage_has_the_base_image() -> None:
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.M) == ["${BASE_IMAGE}"] * 2
    assert re.findall(r"^ARG BASE_IMAGE=(\S+)", DOCKERFILE, re.M) == ["python:3.11-slim-bookworm"]


def test_the_image_names_its_version_and_its_packages() -> None:
    assert f"ARG VERSION={server.__version__}\n" in DOCKERFILE
    assert DOCKERFILE.count("--constraint constraints.txt") == 3
    project = (ROOT / "pyproject.toml").read_text()
    [extras] = re.findall(r"^ARG EXTRAS=(\S+)", DOCKERFILE, re.M)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = ", project, re.M)
    [backbone] = re.findall(r"^ARG BACKBONE_PACKAGE=(\S+)", DOCKERFILE, re.M)
    assert backbone == Settings.model_fields["backbone"].default
    assert re.search(rf"^{backbone}==", (ROOT / "constraints.txt").read_text(), re.M)


def test_the_images_environment_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {name: value for name, value in image_environment().items() if name.startswith("ADAPTERD_")}
    read = read_settings(environment, monkeypatch)
    assert re.findall(r"^EXPOSE (\d+)", DOCKERFILE, re.M) == [str(read.port)]
    assert f'VOLUME ["{read.store}"]' in DOCKERFILE
    assert not read.insecure


def test_the_health_check_asks_a_route_that_needs_no_key() -> None:
    [command] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.M)
    assert json.loads(command) == ["adapterd", "healthcheck"]
    assert f"GET {healthcheck.PATH}" in TAKES[None]
    [seconds] = re.findall(r"^HEALTHCHECK .*--timeout=(\d+)s", DOCKERFILE, re.M)
    starts = 3  # seconds for the command itself, where processors are throttled
    assert int(seconds) >= starts + healthcheck.TIMEOUT_SECONDS
    probe = container(overlay("cpu"))["startupProbe"]
    [patience] = re.findall(r"^HEALTHCHECK .*--start-period=(\d+)s", DOCKERFILE, re.M)
    assert int(patience) == probe["periodSeconds"] * probe["failureThreshold"]


def test_the_command_is_run_without_a_shell() -> None:
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[0]) == ["adapterd"]
    assert json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.M)[0]) == ["serve"]


def test_the_image_has_the_demo_adapters_and_no_others() -> None:
    taken = re.findall(r"^!adapters_store/(\w+)$", (ROOT / ".dockerignore").read_text(), re.M)
    kept = re.findall(r"^!/adapters_store/(\w+)/$", (ROOT / ".gitignore").read_text(), re.M)
    assert taken == kept
    loop = re.search(r"for adapter in ([a-z ]+); do", (DEPLOY / "compose" / "compose.yaml").read_text())
    assert loop
    assert loop[1].split() == taken
