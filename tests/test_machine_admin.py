"""The life of adapters as a state machine: whatever is uploaded, released, rolled back, deleted and collected, in any
order, answers come from versions that a simple model allows, also from a server that was just started on the store."""

from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import LABELS, make_artifact, make_blueprint, random_tensors
from hunting import cases
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from starlette.testclient import TestClient

from server.app import create_app
from server.backbone.backbone import Backbone
from server.settings import Settings
from server.store.artifact import Artifact
from server.store.objects import Objects
from server.store.store import AdapterStore

ADMIN = "/admin/adapters"
NAMES = ("a", "b")
SEEDS = range(5)


@dataclass
class Plan:
    """What one release says."""

    traffic: dict[str, float]
    shadow: tuple[str, ...] = ()
    restores: int | None = None

    @property
    def content(self) -> tuple[dict[str, float], tuple[str, ...]]:
        return self.traffic, self.shadow


@dataclass
class Model:
    """What is known of an adapter: its releases, from number 1 on, and the versions that are stored."""

    releases: list[Plan] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    pinned: bool | None = False
    """None where this server has yet to hear of it: it follows the store's list beside serving."""

    @property
    def last(self) -> Plan | None:
        return self.releases[-1] if self.releases else None

    @property
    def serves(self) -> bool:
        return self.last is not None and bool(self.last.traffic)

    def before(self) -> int | None:
        """The release that a roll-back goes back to: the last that served something else, before what the last one
        stands for."""
        if self.last is None:
            return None
        origin = len(self.releases)
        while (restores := self.releases[origin - 1].restores) is not None:
            origin = restores
        for number in range(origin - 1, 0, -1):
            plan = self.releases[number - 1]
            if plan.traffic and plan.content != self.last.content:
                return number
        return None

    def named(self, keep: int) -> set[str]:
        """Versions that the last releases name."""
        return {version for plan in self.releases[-keep:] for version in (*plan.traffic, *plan.shadow)}


def artifacts(bert: Backbone) -> list[Artifact]:
    """Adapters of different content, each with labels of its own."""
    made = []
    for seed in SEEDS:
        blueprint = make_blueprint(bert.spec, "lora", {"r": 2}, labels=[f"{label}{seed}" for label in LABELS[:2]])
        made.append(make_artifact(blueprint, random_tensors(blueprint, seed, bert)))
    return made


class Administration(RuleBasedStateMachine):
    """Requests of /admin against the model."""

    backbone: Backbone
    made: list[Artifact]
    """By SEEDS."""

    def __init__(self) -> None:
        super().__init__()
        self.objects = Objects.open("memory://")
        self.models = {name: Model() for name in NAMES}
        self.labels = {artifact.version: set(artifact.manifest.labels) for artifact in self.made}
        self.start()

    def start(self) -> None:
        """A server on the store."""
        app = create_app(Settings(store_poll_seconds=0), backbone=self.backbone, store=AdapterStore(self.objects))
        self.client = TestClient(app, raise_server_exceptions=False)
        self.client.__enter__()

    def teardown(self) -> None:
        self.client.__exit__(None, None, None)

    def ask(self, method: str, path: str, expected: int, **request: Any) -> Any:
        answer = self.client.request(method, path, **request)
        assert answer.status_code == expected, (method, path, request, answer.text)
        return answer.json()

    # --------------------------------------------------------------------------------------------------------- rules

    names = st.sampled_from(NAMES)
    seeds = st.sampled_from(SEEDS)
    stale = st.sampled_from([None, 0, -1])
    """`after`: not given, the right number, one too few."""

    def after(self, name: str, stale: int | None) -> tuple[dict[str, int], bool]:
        """The field as it is sent, and whether it refuses the request."""
        last = len(self.models[name].releases)
        if stale is None or last + stale < 0:
            return {}, False
        return {"after": last + stale}, stale != 0

    @rule(name=names, seed=seeds, release=st.booleans())
    def upload(self, name: str, seed: int, release: bool) -> None:
        artifact, model = self.made[seed], self.models[name]
        files = {"manifest.json": artifact.manifest_bytes, "adapter.safetensors": artifact.tensor_bytes}
        plan = Plan({artifact.version: 1.0})
        repeated = model.last is not None and model.last.content == plan.content
        created = artifact.version not in model.stored or (release and not repeated)
        answer = self.ask(
            "PUT",
            f"{ADMIN}/{name}?release={release}",
            201 if created else 200,
            files=[("files", part) for part in files.items()],
        )
        model.stored.add(artifact.version)
        if release and not repeated:
            model.releases.append(plan)
        assert (answer["version"], answer["created"]) == (artifact.version, created)
        assert answer["release"] == (len(model.releases) if release else None)
        assert set(answer["labels"]) == self.labels[artifact.version]

    @rule(
        name=names, seed=seeds, other=seeds, share=st.sampled_from([1.0, 0.5, 0.25]), shadow=st.booleans(), stale=stale
    )
    def release(self, name: str, seed: int, other: int, share: float, shadow: bool, stale: int | None) -> None:
        """One version, a canary, or a shadow."""
        model, first, second = self.models[name], self.made[seed].version, self.made[other].version
        if first == second:
            traffic, shadows = {first: 1.0}, []
        elif shadow:
            traffic, shadows = {first: 1.0}, [second]
        else:
            traffic, shadows = ({first: share, second: 1 - share} if share < 1 else {first: 1.0}), []
        after, refused = self.after(name, stale)
        missing = not {*traffic, *shadows} <= model.stored
        if missing and refused:
            return  # either is told
        status = 404 if missing else 409 if refused else 201
        body = {"traffic": traffic, "shadow": shadows, **after}
        answer = self.ask("POST", f"{ADMIN}/{name}/releases", status, json=body)
        if status == 201:
            model.releases.append(Plan(traffic, tuple(shadows)))
            assert answer["release"] == len(model.releases)

    @rule(name=names, stale=stale, to=st.none() | st.integers(1, 6))
    def rollback(self, name: str, stale: int | None, to: int | None) -> None:
        model = self.models[name]
        after, refused = self.after(name, stale)
        number = to if to is not None else model.before()
        known = bool(model.releases) and (to is None or to <= len(model.releases))
        target = model.releases[number - 1] if known and number is not None else None
        if not known:
            status = 404
        elif target is None or not target.traffic:
            status = 409
        elif not {*target.traffic, *target.shadow} <= model.stored:
            if refused:
                return  # either is told
            status = 404
        else:
            status = 409 if refused else 201
        body = after | ({} if to is None else {"to": to})
        answer = self.ask("POST", f"{ADMIN}/{name}/rollback", status, json=body)
        if status == 201:
            assert target is not None
            model.releases.append(Plan(target.traffic, target.shadow, restores=number))
            assert (answer["release"], answer["restores"]) == (len(model.releases), number)

    @rule(name=names, stale=stale)
    def delete(self, name: str, stale: int | None) -> None:
        model = self.models[name]
        after, refused = self.after(name, stale)
        status = 404 if not model.serves else 409 if refused else 200
        self.ask("DELETE", f"{ADMIN}/{name}", status, params=after)
        if status == 200:
            model.releases.append(Plan({}))

    @rule(name=st.none() | names, keep=st.integers(1, 4), dry_run=st.booleans())
    def collect(self, name: str | None, keep: int, dry_run: bool) -> None:
        body = {"adapter": name, "keep": keep, "min_age_seconds": 0, "dry_run": dry_run}
        answer = self.ask("POST", "/admin/gc", 200, json=body)
        expected = set()
        for one in NAMES if name is None else [name]:
            model = self.models[one]
            unnamed = model.stored - model.named(keep)
            expected |= {(one, version) for version in unnamed}
            if not dry_run:
                model.stored -= unnamed
        assert {(one["adapter"], one["version"]) for one in answer["removed"]} == expected

    @rule(name=names, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        answer = self.client.request("PUT" if pinned else "DELETE", f"{ADMIN}/{name}/pin")
        assert answer.status_code in (200, 404), answer.text
        if answer.status_code == 200:
            self.models[name].pinned = pinned
        else:
            assert not self.models[name].serves

    @rule(name=names, key=st.sampled_from(["k", "l", "m", "n"]), seed=st.none() | seeds)
    def classify(self, name: str, key: str, seed: int | None) -> None:
        """With a routing key, and perhaps with a version."""
        model = self.models[name]
        version = None if seed is None else self.made[seed].version
        body: dict[str, Any] = {"adapter": name, "inputs": "w1 w2", "routing_key": key}
        answer = self.client.post("/classify", json=body | ({"version": version} if version else {}))
        allowed = set(model.last.traffic) if model.last else set()
        if version is not None:
            allowed = model.stored & {version}
        if not allowed or (version is None and not model.serves):
            assert answer.status_code == 404, answer.text
            return
        assert answer.status_code == 200, answer.text
        self.check(name, answer.json(), allowed)
        again = self.client.post("/classify", json=body | ({"version": version} if version else {})).json()
        assert (again["version"], again["predictions"]) == (answer.json()["version"], answer.json()["predictions"])

    @rule(name=names, seed=seeds)
    def race(self, name: str, seed: int) -> None:
        """Two servers release on the same `after`: one of them is refused, and both serve what the other made."""
        model, version = self.models[name], self.made[seed].version
        if version not in model.stored:
            return
        last = len(model.releases)
        body = {"traffic": {version: 1.0}, "after": last}
        app = create_app(Settings(store_poll_seconds=0), backbone=self.backbone, store=AdapterStore(self.objects))
        with TestClient(app, raise_server_exceptions=False) as other:
            assert other.post(f"{ADMIN}/{name}/releases", json=body).status_code == 201
            model.releases.append(Plan({version: 1.0}))
            self.ask("POST", f"{ADMIN}/{name}/releases", 409, json=body)
            answer = other.post("/classify", json={"adapter": name, "inputs": "w1"})
            self.check(name, answer.json(), {version})
        self.classify(name, "k", None)

    @rule()
    def crash(self) -> None:
        """Another server on the same store, which knows nothing of this one; this one is not asked any more."""
        crashed = self.client
        self.start()
        for model in self.models.values():
            model.pinned = None if model.pinned else model.pinned
        crashed.__exit__(None, None, None)  # only now: nothing that it might do in the end is waited for

    # ---------------------------------------------------------------------------------------------------- invariants

    def check(self, name: str, answer: dict[str, Any], allowed: set[str]) -> None:
        """An answer comes from an allowed version, and has its labels."""
        assert answer["version"] in allowed
        assert answer["release"] in (len(self.models[name].releases), None)
        (labels,) = answer["predictions"]
        assert {one["label"] for one in labels} == self.labels[answer["version"]]

    @invariant()
    def is_listed_as_it_serves(self) -> None:
        listed = {one["name"]: one for one in self.ask("GET", "/admin/adapters", 200)["adapters"]}
        assert set(listed) == {name for name, model in self.models.items() if model.serves}
        for name, shown in listed.items():
            model = self.models[name]
            assert model.last is not None
            assert shown["release"] == len(model.releases)
            assert shown["traffic"] == model.last.traffic
            assert tuple(shown["shadow"]) == model.last.shadow
            assert model.pinned in (None, shown["pinned"])

    @invariant()
    def stores_what_it_should(self) -> None:
        for name, model in self.models.items():
            versions = self.ask("GET", f"{ADMIN}/{name}/versions", 200)["versions"]
            assert {one["version"] for one in versions} == model.stored
            assert all(one["whole"] for one in versions)


def test_any_life_of_adapters(bert: Backbone) -> None:
    with torch.inference_mode(False):
        made = artifacts(bert)
    machine = type("Administration", (Administration,), {"backbone": bert, "made": made})
    checks = list(HealthCheck)
    options = settings(max_examples=cases(5, 0.0025), stateful_step_count=25, suppress_health_check=checks)
    run_state_machine_as_test(machine, settings=options)
