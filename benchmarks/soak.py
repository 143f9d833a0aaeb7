"""Half an hour of everything at once, on a real server whose store fails: is any answer wrong, does memory grow?

    python -m benchmarks.soak --seconds 1800 --json

Clients ask adapters of many methods for all tasks, over our own routes and those of peers, one adapter or several at
once, in windows, with deadlines that cannot be kept, with bodies that make no sense, and some hang up. Meanwhile an
administrator releases, uploads, rolls back and deletes versions, adapters come and go since half of them fit in
memory, and the store, an S3 server in this process, is slow, refuses, hangs, loses connections and damages files.

Every answer is compared with what its version said alone, in this process, in the same number format (float32), before
the load began; the answer's `version` picks it. There are three groups of adapters:

    steady    nobody releases them and the store does not fail for them, only gets slow: 200 and nothing else
    swapped   the administrator's: 200, or 404 while they are deleted
    victims   the store fails for their files: 200, or 503 `store_unavailable`, or 500 `corrupt_version`

The exit status is 1 if any answer was wrong, any status was none of those that its situation allows, an acknowledged
release was lost, or an adapter did not come back when the store had healed.

`rss_mb_per_hour` is the slope of a line through the server's memory, sampled once a second after the first quarter of
the time (two minutes at most).
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvloop
from starlette.testclient import TestClient
from transformers.utils import logging

from benchmarks.faulty import Fault, FaultyS3, faulty_s3
from benchmarks.serving import BACKBONE, HOST, Server, make_texts, print_report, say, serve
from server import logs
from server.adapters import METHODS
from server.app import create_app
from server.backbone.backbone import Backbone
from server.settings import Settings
from server.store.artifact import MANIFEST, TENSORS, Artifact, Manifest, TrainedOn
from server.store.store import AdapterStore
from server.tasks.adapter import Blueprint

TOLERANCE = 1e-4
"""Relative to 1 + the number: in float32, what else is in the batch changes the last digits."""

CLIENTS = 8
PAUSE_SECONDS = 0.02
"""Of a client between two requests, on average: one machine does it all."""

SWAP_SECONDS = 0.25
FAULT_SECONDS = (0.5, 4.0)
STORE_TIMEOUT_SECONDS = 1.0
FIT = 2
"""One adapter in so many fits in memory: few enough that they come and go, enough that those in use all fit."""

RECOVERY_SECONDS = 120.0

STEADY = [
    ("lora", {}, "classification"),
    ("dora", {}, "relation_extraction"),
    ("vera", {}, "classification"),
    ("loha", {}, "classification"),
    ("lokr", {}, "multi_label_classification"),
    ("ia3", {}, "tagging"),
    ("bottleneck", {}, "question_answering"),
    ("compacter", {}, "classification"),
    ("invertible", {}, "regression"),
    ("post_encoder", {}, "classification"),
    ("prefix_tuning", {}, "multi_label_classification"),
    ("prompt_tuning", {}, "regression"),
    ("p_tuning", {}, "classification"),
    ("ln_tuning", {}, "tagging"),
    ("bitfit", {}, "classification"),
    ("head_only", {}, "classification"),
    ("lora", {"r": 8, "target_modules": "all-linear"}, "embedding"),
    ("lora", {"r": 4}, "question_answering"),
    ("lora", {"r": 8}, "tagging"),
    *[("lora", {"r": rank}, "classification") for rank in (2, 4, 8, 8, 16) * 4],
]
SWAPPED = [
    ("lora", {}),
    ("bottleneck", {}),
    ("ia3", {}),
    ("prefix_tuning", {}),
    ("prompt_tuning", {}),
    ("lora", {"r": 4}),
]
"""Classifiers, so that their labels give a version away."""
VERSIONS = 3
VICTIMS = [("lora", {}), ("bottleneck", {}), ("ia3", {}), ("lora", {"r": 16}), ("prefix_tuning", {}), ("loha", {})]

READS = ("GET {name}/releases/", "GET {name}/versions/.*/manifest.json", "GET {name}/versions/.*/adapter.safetensors")
WRITES = ("PUT {name}/versions/", "PUT {name}/releases/")
READ_FAULTS = (Fault.HANG, Fault.STALL, Fault.REFUSE, Fault.RESET, Fault.TRUNCATE, Fault.CORRUPT, Fault.SHORTEN)
WRITE_FAULTS = (Fault.REFUSE, Fault.RESET, Fault.LOSE, Fault.HANG)

OK = {(200, "")}
GONE = {(404, "adapter_not_found")}
HURT = {(503, "store_unavailable"), (500, "corrupt_version")}
FULL = {(503, "memory_full")}
"""To uploads, which claim their place at once."""
LATE = {(504, "deadline_exceeded"), (429, "deadline_unreachable")}


# --------------------------------------------------------------------------------------------------- what can be asked


@dataclass(frozen=True, slots=True)
class Question:
    """A body without its adapter, and where it goes."""

    path: str
    body: dict[str, Any]


def questions() -> dict[str, list[Question]]:
    """By task."""
    texts = make_texts(12, seed=1)
    long = " ".join(make_texts(12, seed=2, median=60.0))
    plain = [Question("/classify", {"inputs": text}) for text in texts[:4]]
    several = [Question("/classify", {"inputs": texts[4:9]}), Question("/classify", {"inputs": long})]
    classify = [
        *plain,
        *several,
        Question("/classify", {"inputs": texts[:2], "top_k": 1}),
        Question("/classify", {"inputs": texts[9], "activation": "none", "priority": "low"}),
        Question("/classify", {"inputs": {"text": texts[0], "text_pair": texts[1]}, "priority": "high"}),
        Question("/classify", {"inputs": long, "long": "window"}),
        Question("/classify", {"inputs": [long, texts[3]], "long": "window", "window_pooling": "max"}),
    ]
    marked = [
        Question("/classify", {"inputs": {"text": text, "spans": [[0, len(text.split()[0])], [0, len(text)]]}})
        for text in texts[:4]
    ]
    return {
        "classification": classify,
        "multi_label_classification": [*plain, *several, Question("/classify", {"inputs": texts[2], "threshold": 0.3})],
        "regression": [*plain, *several],
        "relation_extraction": marked,
        "tagging": [
            *[Question("/tag", {"inputs": text, "aggregation": how}) for text in texts[:3] for how in ("none", "max")],
            Question("/tag", {"inputs": [texts[5], long]}),
        ],
        "question_answering": [
            *[Question("/answer", {"inputs": {"question": texts[0], "context": text}}) for text in texts[1:4]],
            Question("/answer", {"inputs": {"question": texts[1], "context": long}, "top_k": 3}),
        ],
        "embedding": [
            Question("/embed", {"inputs": texts[0]}),
            Question("/embed", {"inputs": texts[3:8], "dimensions": 64}),
            Question("/embed", {"inputs": [long, texts[1]], "normalize": False}),
        ],
    }


def on_peers_routes(name: str, task: str) -> list[Question]:
    """Whole requests to one adapter over the routes of other servers."""
    [text, other] = make_texts(2, seed=3)
    if task == "classification":
        infer = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]}
        return [
            Question(f"/models/{name}", {"inputs": text, "parameters": {"top_k": 2}}),
            Question(f"/tei/{name}/predict", {"inputs": [[text], [other]]}),
            Question("/vllm/classify", {"model": name, "input": [text, other]}),
            Question(f"/v2/models/{name}/infer", infer),
        ]
    if task == "embedding":
        return [
            Question("/v1/embeddings", {"model": name, "input": [text, other]}),
            Question(f"/tei/{name}/embed", {"inputs": [text, other]}),
        ]
    return [Question(f"/models/{name}", {"inputs": text})] if task == "tagging" else []


VOLATILE = {"id", "created", "release"}
"""Of an answer: what differs from one to the next."""


def differs(seen: Any, known: Any) -> bool:
    """Whether two answers say different things."""
    if isinstance(known, dict) and isinstance(seen, dict):
        return seen.keys() != known.keys() or any(
            differs(seen[key], known[key]) for key in known if key not in VOLATILE
        )
    if isinstance(known, list) and isinstance(seen, list):
        return len(seen) != len(known) or any(map(differs, _ordered(seen), _ordered(known)))
    if isinstance(known, float) and isinstance(seen, int | float):
        return not abs(seen - known) <= TOLERANCE * (1 + abs(known))
    return bool(seen != known)


def _ordered(values: list[Any]) -> list[Any]:
    """Labels in an order of their own: equal scores may come either way."""
    if all(isinstance(one, dict) and "label" in one and "start" not in one for one in values):
        return sorted(values, key=lambda one: one["label"])
    return values


# ------------------------------------------------------------------------------------------------------- the adapters


@dataclass(slots=True)
class Made:
    """An adapter of the soak: its versions, the first one released first."""

    name: str
    task: str
    versions: list[Artifact]

    def files(self, index: int) -> list[tuple[str, tuple[str, bytes]]]:
        """A version as an upload has it."""
        artifact = self.versions[index]
        return [("files", (MANIFEST, artifact.manifest_bytes)), ("files", (TENSORS, bytes(artifact.tensor_bytes)))]


def labels_of(task: str, tag: str) -> tuple[str, ...]:
    """Labels that no other version has."""
    if task in ("question_answering", "embedding"):
        return ()
    if task == "tagging":
        return "O", f"B-{tag}", f"I-{tag}"
    return tuple(f"{tag}-{name}" for name in (("value",) if task == "regression" else ("a", "b", "c")))


def make_version(backbone: Backbone, method: str, options: dict[str, Any], task: str, tag: str, seed: int) -> Artifact:
    """Random weights, as after a training."""
    config = METHODS[method].complete(options, backbone.spec)
    labels = labels_of(task, tag)
    blueprint = Blueprint.check(method=method, config=config, task=task, head={}, labels=labels, spec=backbone.spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: value + (0.5 if name.startswith("head/") else 0.03) * torch.randn(value.shape, generator=generator)
        for name, value in blueprint.init(backbone, generator).items()
    }
    manifest = Manifest(
        method=method,
        config=blueprint.config.model_dump(mode="json"),
        task=task,
        head=blueprint.head.model_dump(mode="json"),
        labels=labels,
        backbone=TrainedOn.on(backbone.spec),
        source="adapterd benchmarks",
    )
    return Artifact.build(manifest, tensors)


def make_all(backbone: Backbone) -> dict[str, list[Made]]:
    """By group."""
    seeds = iter(range(1000))

    def made(name: str, method: str, options: dict[str, Any], task: str, versions: int) -> Made:
        tags = [f"{name}.{version}" for version in range(versions)]
        return Made(name, task, [make_version(backbone, method, options, task, tag, next(seeds)) for tag in tags])

    return {
        "steady": [made(f"steady-{i}", *one, 1) for i, one in enumerate(STEADY)],
        "swapped": [made(f"swapped-{i}", *one, "classification", VERSIONS) for i, one in enumerate(SWAPPED)],
        "victims": [made(f"victim-{i}", *one, "classification", 2) for i, one in enumerate(VICTIMS)],
    }


class References:
    """What each version says alone."""

    def __init__(self, backbone: Backbone, groups: dict[str, list[Made]]) -> None:
        """Asks them all, one after the other."""
        self.by_task = questions()
        self.peers: list[tuple[Question, Any]] = []
        """Requests over peers' routes to steady adapters, and the answers."""
        self.bare: list[tuple[Question, Any]] = []
        self._known: dict[tuple[str, str, int], list[Any]] = {}
        self.memory_bytes = 0
        """Of all adapters' first versions."""
        app = create_app(Settings(warm_up_seconds=0), backbone=backbone, store=AdapterStore.open("memory://"))
        with TestClient(app) as client:
            for group, adapters in groups.items():
                for made in adapters:
                    self._ask(client, made)
                    if group == "steady":
                        for question in on_peers_routes(made.name, made.task):
                            self.peers.append((question, _checked(client.post(question.path, json=question.body))))
            for question in self.by_task["embedding"]:
                self.bare.append((question, _checked(client.post(question.path, json=question.body))))

    def _ask(self, client: TestClient, made: Made) -> None:
        for index in reversed(range(len(made.versions))):
            answer = _checked(client.put(f"/admin/adapters/{made.name}", files=made.files(index)))
            for number, question in enumerate(self.by_task[made.task]):
                body = {"adapter": made.name, "version": answer["version"], **question.body}
                said = _checked(client.post(question.path, json=body))
                self._known[made.name, answer["version"], number] = said["predictions"]
        self.memory_bytes += answer["report"]["memory_bytes"]

    def wrong(self, name: str, number: int, answer: dict[str, Any]) -> bool:
        """Whether an answer to a question of its task is not its version's."""
        known = self._known.get((name, answer["version"], number))
        return answer["adapter"] != name or known is None or differs(answer["predictions"], known)


def _checked(answer: Any) -> Any:
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


# ----------------------------------------------------------------------------------------------------------- the load


@dataclass(slots=True)
class Findings:
    """What is wrong, and how much was done."""

    requests: Counter[str] = field(default_factory=Counter)
    """By situation."""
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    swaps: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def check(self, situation: str, answer: httpx.Response | None, allowed: set[tuple[int, str]]) -> bool:
        """Counts an answer, None where the connection was lost. Whether it is a 200."""
        status, code = (0, "connection lost") if answer is None else (answer.status_code, _code(answer))
        self.requests[situation] += 1
        self.statuses[f"{status} {code}".strip()] += 1
        if (status, code) not in allowed:
            self.count(self.unexpected, f"{situation}: {status} {code}", answer.text if answer is not None else "")
        return status in (200, 201)

    def count(self, counter: Counter[str], what: str, details: str) -> None:
        """Something that should not be."""
        counter[what] += 1
        if counter[what] <= 3:
            say(f"{time.strftime('%X')} {what}: {details[:300]}")


def _code(answer: httpx.Response) -> str:
    if answer.status_code < 400:
        return ""
    try:
        error = answer.json()["error"]
        return str(error["code"]) if isinstance(error, dict) else ""
    except (ValueError, KeyError):
        return answer.text[:40]


class Soak:
    """A server under everything."""

    def __init__(
        self, port: int, server: Server, s3: FaultyS3, groups: dict[str, list[Made]], known: References
    ) -> None:
        self._server = server
        self._s3 = s3
        self._steady, self._swapped, self._victims = groups["steady"], groups["swapped"], groups["victims"]
        self._known = known
        self._random = random.Random(0)
        self._client = httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=60)
        self._port = port
        self.found = Findings()
        self._released: defaultdict[str, dict[int, dict[str, float]]] = defaultdict(dict)
        """Adapter -> acknowledged release -> traffic."""
        self._answered: defaultdict[str, set[tuple[int, str]]] = defaultdict(set)
        """Adapter -> releases and versions that answers named."""

    async def set_up(self) -> None:
        """Uploads everything, the version that is to serve last."""
        for made in (*self._steady, *self._swapped, *self._victims):
            for index in reversed(range(len(made.versions))):
                await self._admin("set up", "PUT", made, files=made.files(index))

    async def run(self, seconds: float) -> None:
        """All of it for a while."""
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as together:
            for _ in range(CLIENTS):
                together.create_task(self._repeat(until, self._ask_something, PAUSE_SECONDS))
            together.create_task(self._repeat(until, self._swap, SWAP_SECONDS))
            together.create_task(self._repeat(until, self._fail, SWAP_SECONDS))
            together.create_task(self._sample(until))

    async def _repeat(self, until: float, step: Callable[[], Awaitable[None]], pause: float) -> None:
        while time.monotonic() < until:
            await step()
            await asyncio.sleep(self._random.expovariate(1 / pause))

    async def _ask_something(self) -> None:
        kinds = [
            *[self._ask_steady] * 6,
            *[self._ask_swapped] * 4,
            *[self._ask_victim] * 2,
            *[self._ask_several] * 2,
            *[self._ask_over_a_peers_route] * 2,
            self._ask_the_backbone,
            self._ask_impatiently,
            self._ask_badly,
            self._hang_up,
        ]
        await self._random.choice(kinds)()

    # ------------------------------------------------------------------------------------------------------- requests

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response | None:
        try:
            return await self._client.request(method, path, **content)
        except httpx.TransportError as error:
            say(f"{method} {path}: {error!r}")
            return None

    def _question(self, made: Made) -> tuple[int, Question]:
        return self._random.choice(list(enumerate(self._known.by_task[made.task])))

    async def _ask(self, situation: str, made: Made, allowed: set[tuple[int, str]], **more: Any) -> None:
        number, question = self._question(made)
        answer = await self._send("POST", question.path, json={"adapter": made.name, **question.body, **more})
        if self.found.check(situation, answer, allowed) and answer is not None:
            self._compare(situation, made, number, answer.json())

    def _compare(self, situation: str, made: Made, number: int, said: dict[str, Any]) -> None:
        self._answered[made.name].add((said["release"], said["version"]))
        if self._known.wrong(made.name, number, said):
            self.found.count(self.found.wrong, f"{situation}: {made.name}", json.dumps(said))

    async def _ask_steady(self) -> None:
        await self._ask("steady", self._random.choice(self._steady), OK)

    async def _ask_swapped(self) -> None:
        key = {"routing_key": str(self._random.random())}
        await self._ask("swapped", self._random.choice(self._swapped), OK | GONE, **key)

    async def _ask_victim(self) -> None:
        await self._ask("victim", self._random.choice(self._victims), OK | HURT)

    async def _ask_impatiently(self) -> None:
        timeout = self._random.choice((1, 3, 10, 30))
        await self._ask("impatient", self._random.choice(self._steady), OK | LATE, timeout_ms=timeout)

    async def _ask_several(self) -> None:
        classifiers = [made for made in self._steady if made.task == "classification"]
        chosen = self._random.sample(classifiers, 4)
        allowed, situation = OK, "several"
        if self._random.random() < 0.25:
            chosen.append(self._random.choice(self._victims))
            allowed, situation = OK | HURT, "several with a victim"
        number, question = self._question(chosen[0])
        body = {"adapters": [made.name for made in chosen], **question.body}
        answer = await self._send("POST", question.path, json=body)
        if self.found.check(situation, answer, allowed) and answer is not None:
            for made, said in zip(chosen, answer.json()["answers"], strict=True):
                self._compare(situation, made, number, said)

    async def _ask_over_a_peers_route(self) -> None:
        await self._ask_known("peer's route", *self._random.choice(self._known.peers))

    async def _ask_the_backbone(self) -> None:
        await self._ask_known("backbone", *self._random.choice(self._known.bare))

    async def _ask_known(self, situation: str, question: Question, known: Any) -> None:
        answer = await self._send("POST", question.path, json=question.body)
        if self.found.check(situation, answer, OK) and answer is not None and differs(answer.json(), known):
            self.found.count(self.found.wrong, f"{situation}: {question.path}", answer.text)

    async def _ask_badly(self) -> None:
        name = self._steady[0].name  # a classifier
        path, body, status, code = self._random.choice(
            [
                ("/classify", {"adapter": name}, 422, "invalid_request"),
                ("/classify", {"adapter": name, "inputs": []}, 422, "invalid_request"),
                ("/classify", {"adapter": name, "inputs": "  "}, 422, "invalid_request"),
                ("/classify", {"adapter": name, "inputs": "a", "nonsense": 1}, 422, "invalid_request"),
                ("/classify", {"adapter": "nobody", "inputs": "a"}, 404, "adapter_not_found"),
                ("/classify", {"adapter": name, "inputs": "a", "version": "0" * 64}, 404, "version_not_found"),
                ("/classify", {"adapter": name, "inputs": ["a"] * 1000}, 413, "too_many_inputs"),
                ("/tag", {"adapter": name, "inputs": "a"}, 409, "wrong_task"),
            ]
        )
        answer = await self._send("POST", path, json=body)
        if self.found.check("bad request", answer, {(status, code)}):
            self.found.count(self.found.wrong, "bad request: answered", json.dumps(body))

    async def _hang_up(self) -> None:
        made = self._random.choice(self._steady)
        _, question = self._question(made)
        body = json.dumps({"adapter": made.name, **question.body}).encode()
        head = f"POST {question.path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
        whole = head.encode() + b"content-length: %d\r\n\r\n%s" % (len(body), body)
        _, writer = await asyncio.open_connection(HOST, self._port)
        writer.write(whole[: self._random.choice((len(whole), len(whole), len(whole) // 2))])
        await writer.drain()
        await asyncio.sleep(self._random.choice((0, 0.002, 0.01)))
        writer.close()
        self.found.requests["hung up"] += 1

    # --------------------------------------------------------------------------------------------- the administrator

    async def _admin(
        self, way: str, method: str, made: Made, what: str = "", hurt: bool = False, **content: Any
    ) -> None:
        """A change; what it made is noted if it was acknowledged."""
        answer = await self._send(method, f"/admin/adapters/{made.name}{what}", **content)
        self.found.swaps[way] += 1
        allowed = OK | {(201, "")} | (HURT if hurt else set()) | (FULL if method == "PUT" else set())
        if self.found.check(f"admin: {way}", answer, allowed) and answer is not None:
            said = answer.json()
            traffic = said["traffic"] if "traffic" in said else {said["version"]: 1.0} if "version" in said else {}
            if said.get("release") is not None:
                self._released[made.name].setdefault(said["release"], traffic)  # it may have been there

    async def _swap(self) -> None:
        made = self._random.choice(self._swapped)
        releases = self._released[made.name]
        last = max(releases)
        versions = [artifact.version for artifact in made.versions]
        ways = ["upload", "release", "canary", "delete", "refused upload", "pin"]
        if not releases[last]:
            ways = ["rollback"] * 4 + ["upload"]
        way = self._random.choice(ways)
        if way == "upload":
            await self._admin(way, "PUT", made, files=made.files(self._random.randrange(VERSIONS)))
        elif way == "release":
            await self._admin(way, "POST", made, "/releases", json={"traffic": {self._random.choice(versions): 1.0}})
        elif way == "canary":
            first, second, third = self._random.sample(versions, 3)
            body = {"traffic": {first: 0.75, second: 0.25}, "shadow": [third]}
            await self._admin(way, "POST", made, "/releases", json=body)
        elif way == "pin":
            for method in ("PUT", "DELETE"):
                answer = await self._send(method, f"/admin/adapters/{made.name}/pin")
                self.found.check("admin: pin", answer, OK)
        elif way == "refused upload":
            files = [made.files(0)[0], ("files", (TENSORS, b"\x08" + bytes(7) + b"nonsense"))]
            answer = await self._send("PUT", f"/admin/adapters/{made.name}", files=files)
            self.found.check("admin: refused upload", answer, {(422, "bad_file")})
        else:
            method, what = ("DELETE", "") if way == "delete" else ("POST", "/rollback")
            await self._admin(way, method, made, what)

    # ------------------------------------------------------------------------------------------------------ the store

    async def _fail(self) -> None:
        """One fault for a while, and an upload meanwhile where it is one of writing."""
        made = self._random.choice(self._victims)
        kind = self._random.random()
        if kind < 0.1:
            self._s3.fail(".*", Fault.SLOW, times=20)
        elif kind < 0.3:
            pattern, fault = self._random.choice(WRITES), self._random.choice(WRITE_FAULTS)
            self._s3.fail(pattern.format(name=made.name), fault, times=self._random.choice((1, 2, None)))
            uploads = self._admin("hurt upload", "PUT", made, hurt=True, files=made.files(self._random.randrange(2)))
            await asyncio.gather(uploads, self._heal_soon())
            return
        else:
            pattern, fault = self._random.choice(READS), self._random.choice(READ_FAULTS)
            if "releases" in pattern and fault in (Fault.CORRUPT, Fault.SHORTEN):
                fault = Fault.REFUSE  # a listing that lies is no file that is damaged
            self._s3.fail(pattern.format(name=made.name), fault)
            # Only an adapter that is not in memory is read again: another release of it is not.
            await self._admin("hurt upload", "PUT", made, hurt=True, files=made.files(self._random.randrange(2)))
        await self._heal_soon()

    async def _heal_soon(self) -> None:
        await asyncio.sleep(self._random.uniform(*FAULT_SECONDS))
        self._s3.heal()

    # ------------------------------------------------------------------------------------------------------ the proof

    async def _sample(self, until: float) -> None:
        while (now := time.monotonic()) < until:
            self.found.memory.append((now, self._server.memory()))
            await asyncio.sleep(1)

    async def recovered(self) -> None:
        """The store has healed: everybody answers again, and what was acknowledged is there."""
        self._s3.heal()
        until = time.monotonic() + RECOVERY_SECONDS
        for made in (*self._steady, *self._victims):
            question = self._known.by_task[made.task][0]
            while True:
                answer = await self._send("POST", question.path, json={"adapter": made.name, **question.body})
                if (answer is not None and answer.status_code == 200) or time.monotonic() > until:
                    break
                await asyncio.sleep(0.2)
            if self.found.check("afterwards", answer, OK) and answer is not None:
                self._compare("afterwards", made, 0, answer.json())

    async def lost(self) -> int:
        """Acknowledged releases that are not in the store, or not what they were; and answers of no release."""
        lost = 0
        for made in (*self._steady, *self._swapped, *self._victims):
            history: dict[int, dict[str, float]] = {}
            before: int | None = None
            while before is None or before > 1:
                asked = {"limit": 1000} | ({"before": before} if before else {})
                page = await self._client.get(f"/admin/adapters/{made.name}/releases", params=asked)
                releases = page.raise_for_status().json()["releases"]
                history |= {one["release"]: one["traffic"] for one in releases}
                before = releases[-1]["release"] if releases else 1
            missing = [
                number for number, traffic in self._released[made.name].items() if history.get(number) != traffic
            ]
            lost += len(missing)
            if missing:
                say(f"{made.name}: acknowledged releases {missing[:5]} are lost")
            for release, version in self._answered[made.name]:
                if version not in history.get(release, {}):
                    self.found.count(self.found.wrong, f"{made.name}: not in the release", f"{release} {version}")
        return lost

    async def close(self) -> None:
        """Ends all connections."""
        await self._client.aclose()


def slope(memory: list[tuple[float, int]], warm_up: float) -> dict[str, float]:
    """Bytes over seconds: the first and the last after the warm-up, and the line through them, in MB and MB an hour."""
    settled = [(at, rss) for at, rss in memory if at - memory[0][0] >= warm_up]
    if len(settled) < 2:
        return {}
    at, rss = np.array(settled, dtype=float).T
    return {
        "rss_first_mb": rss[0] / 1e6,
        "rss_last_mb": rss[-1] / 1e6,
        "rss_most_mb": rss.max() / 1e6,
        "rss_mb_per_hour": float(np.polyfit(at - at[0], rss, 1)[0]) * 3600 / 1e6,
    }


async def measure(
    server: Server, s3: FaultyS3, groups: dict[str, list[Made]], known: References, seconds: float
) -> dict[str, Any]:
    """All figures."""
    soak = Soak(server.port, server, s3, groups, known)
    await soak.set_up()
    say(f"soaking for {seconds:.0f} s")
    before = server.counts()
    await soak.run(seconds)
    after = server.counts()
    say("waiting for everybody to come back")
    await soak.recovered()
    lost = await soak.lost()
    await soak.close()
    found = soak.found

    def gained(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(name))

    return {
        "seconds": seconds,
        "adapters": sum(map(len, groups.values())),
        "requests": found.requests.total(),
        "wrong": found.wrong.total(),
        "unexpected": found.unexpected.total(),
        "lost": lost,
        **slope(found.memory, min(120.0, seconds / 4)),
        "loads": gained("adapterd_adapter_loads_total/success"),
        "failed_loads": gained("adapterd_adapter_loads_total/failure"),
        "evictions": gained("adapterd_evictions_total"),
        "faults": sum(s3.injected.values()),
        "by_situation": dict(found.requests),
        "by_status": dict(found.statuses),
        "by_change": dict(found.swaps),
        "by_fault": dict(s3.injected),
        "wrong_answers": dict(found.wrong),
        "unexpected_statuses": dict(found.unexpected),
    }


def main() -> int:
    """Prints the figures. The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--log", type=Path, help="file for the server's log; it is thrown away by default")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logs.configure("error", "json")
    getLogger(logs.AUDIT).setLevel("ERROR")  # of the references' own server
    backbone = Backbone.load(BACKBONE, device="cpu", dtype="float32")
    groups = make_all(backbone)
    say("computing what every version says alone")
    known = References(backbone, groups)
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "host_memory_bytes": known.memory_bytes // FIT,
        "store_timeout_seconds": STORE_TIMEOUT_SECONDS,
        "store_poll_seconds": 0.5,
        "log_level": "warning",
    }
    with tempfile.TemporaryDirectory() as folder, faulty_s3() as s3:
        log = options.log or Path(folder, "log")
        with serve(s3.bucket(), log, store_endpoint=s3.url, **settings) as server:
            figures = uvloop.run(measure(server, s3, groups, known, options.seconds))
    print_report(figures, options.json)
    return 1 if figures["wrong"] or figures["unexpected"] or figures["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
