"""A store that fails for one adapter, over S3's protocol: that adapter gets an error in time, the others notice
nothing, and once the store has healed nobody has to restart anything.
"""

import asyncio
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from children import save_tiny_bert, serving
from helpers import make_artifact, make_blueprint, random_tensors
from starlette.testclient import TestClient

from benchmarks.faulty import Fault, FaultyS3, faulty_s3
from server.app import create_app
from server.backbone.backbone import Backbone
from server.engine.engine import Engine
from server.engine.failures import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
from server.errors import StoreUnavailable
from server.settings import Settings
from server.store.artifact import Artifact
from server.store.objects import ATTEMPTS
from server.store.releases import Plan
from server.store.store import AdapterStore

POLL_SECONDS = 2.0

TIMEOUT_SECONDS = 1.0
"""Of one try. No try of a healthy request comes near it; each that hangs costs the tests as much."""

PATIENT_SECONDS = 60.0
"""The same, where nothing may be given up."""

LONGEST_ANSWER_SECONDS = 120
"""After that, a request has hung."""

STEPS = {
    "listing": "GET {name}/releases/$",
    "release": "GET {name}/releases/000001.json",
    "manifest": "GET {name}/versions/.*/manifest.json",
    "tensors": "GET {name}/versions/.*/adapter.safetensors",
}
"""What loading an adapter asks the store for, in order."""

UNAVAILABLE, CORRUPT = (503, "store_unavailable"), (500, "corrupt_version")

OUTCOMES = {
    Fault.HANG: UNAVAILABLE,
    Fault.STALL: UNAVAILABLE,
    Fault.DRIP: UNAVAILABLE,
    Fault.SLOW: (200, None),
    Fault.REFUSE: UNAVAILABLE,
    Fault.RESET: UNAVAILABLE,
    Fault.TRUNCATE: UNAVAILABLE,
    Fault.CORRUPT: CORRUPT,
    Fault.SHORTEN: CORRUPT,
}

CASES = [
    (step, fault)
    for step in STEPS
    for fault in OUTCOMES
    if step != "listing" or OUTCOMES[fault] != CORRUPT  # a listing that lies is no file that is damaged
]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Faulty:
    """A server over a store that can be told to fail."""

    def __init__(self, s3: FaultyS3, bert: Backbone, bucket: str, timeout_seconds: float, **settings: Any) -> None:
        self.s3 = s3
        self.clock = Clock()
        self.store = AdapterStore.open(bucket, endpoint=s3.url, timeout_seconds=PATIENT_SECONDS)
        options = Settings(
            store=bucket,
            store_endpoint=s3.url,
            store_timeout_seconds=timeout_seconds,
            store_poll_seconds=POLL_SECONDS,
            **settings,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.app.Engine", partial(Engine, clock=self.clock))
            self.client = TestClient(create_app(options, backbone=bert), raise_server_exceptions=False)

    def publish(self, **adapters: Artifact) -> None:
        """Past the server, while nothing fails."""

        async def one(name: str, artifact: Artifact) -> None:
            version = await self.store.put_version(name, artifact)
            await self.store.release(name, Plan.only(version), by="test")

        async def run() -> None:
            await asyncio.gather(*(one(name, artifact) for name, artifact in adapters.items()))

        asyncio.run(run())

    def ask(self, name: str) -> httpx2.Response:
        return self.client.post("/classify", json={"adapter": name, "inputs": "w1 w2"})

    def upload(self, name: str, artifact: Artifact) -> httpx2.Response:
        files = {"manifest.json": artifact.manifest_bytes, "adapter.safetensors": artifact.tensor_bytes}
        return self.client.put(f"/admin/adapters/{name}", files=[("files", file) for file in files.items()])

    def serves_in_the_end(self, name: str, version: str) -> None:
        """What was read beside serving, the request after it finds."""
        answers = []
        for _ in range(100):
            self.clock.now += LONGEST_PAUSE_SECONDS
            answers.append(self.ask(name).json())
            if answers[-1].get("version") == version:
                return
            time.sleep(0.05)
        raise AssertionError(answers[-1])

    def ask_all(self, pool: ThreadPoolExecutor, names: list[str]) -> list[Future[httpx2.Response]]:
        return [pool.submit(self.ask, name) for name in names]


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture
def healed(s3: FaultyS3) -> Iterator[FaultyS3]:
    """A store that fails no longer than the test."""
    yield s3
    s3.heal()


@pytest.fixture(scope="module")
def artifacts(bert: Backbone) -> list[Artifact]:
    """Adapters of different content."""
    blueprint = make_blueprint(bert.spec, "lora", {"r": 2})
    return [make_artifact(blueprint, random_tensors(blueprint, seed, bert)) for seed in range(80)]


def outcome(answer: httpx2.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"] if answer.status_code != 200 else None


# -------------------------------------------------------------------------------------- every fault, at every step


def case_name(step: str, fault: Fault) -> str:
    return f"{step}-{fault}"


class Story:
    """All faults at once, each for an adapter of its own: what was answered at first, later, and in the end."""

    def __init__(self, faulty: Faulty, artifacts: list[Artifact]) -> None:
        s3, names = faulty.s3, [case_name(*case) for case in CASES]
        faulty.publish(**dict(zip([*names, "resident", "cold"], artifacts, strict=False)))
        assert faulty.ask("resident").status_code == 200
        s3.seen.clear()
        for step, fault in CASES:
            s3.fail(STEPS[step].format(name=case_name(step, fault)), fault)
        with ThreadPoolExecutor(len(names)) as pool:
            asked = dict(zip(names, faulty.ask_all(pool, names), strict=True))
            self.others = [faulty.ask(name) for name in ("resident", "cold", "resident", "cold")]
            self.first = {name: future.result(LONGEST_ANSWER_SECONDS) for name, future in asked.items()}
        self.again = {name: [faulty.ask(name) for _ in range(10)] for name in names}
        self.most_requests = {
            name: max(s3.requests(f"GET {name}/").values()) for name in names
        }  # of one kind, for all that was asked
        faulty.clock.now += FIRST_PAUSE_SECONDS + 0.01
        with ThreadPoolExecutor(len(names)) as pool:
            asked = dict(zip(names, faulty.ask_all(pool, names), strict=True))
            self.later = {name: future.result(LONGEST_ANSWER_SECONDS) for name, future in asked.items()}
        s3.heal()
        self.unasked = {name: faulty.ask(name) for name in names}
        faulty.clock.now += LONGEST_PAUSE_SECONDS
        self.healed = {name: faulty.ask(name) for name in names}


@pytest.fixture(scope="module")
def story(s3: FaultyS3, bert: Backbone, artifacts: list[Artifact]) -> Story:
    faulty = Faulty(s3, bert, s3.bucket(), TIMEOUT_SECONDS)
    with faulty.client:
        return Story(faulty, artifacts)


@pytest.mark.parametrize(("step", "fault"), CASES, ids=lambda part: str(part))
def test_a_faulty_adapter_gets_an_error_and_is_not_asked_for_again_at_once(
    story: Story, step: str, fault: Fault
) -> None:
    name = case_name(step, fault)
    for answer in (story.first[name], *story.again[name], story.later[name]):
        assert outcome(answer) == OUTCOMES[fault]
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1
    assert story.most_requests[name] <= ATTEMPTS
    if OUTCOMES[fault] != (200, None):
        assert outcome(story.unasked[name]) == OUTCOMES[fault]
        assert int(story.unasked[name].headers["Retry-After"]) == 2 * FIRST_PAUSE_SECONDS


@pytest.mark.parametrize(("step", "fault"), CASES, ids=lambda part: str(part))
def test_a_healed_adapter_serves_without_a_restart(story: Story, step: str, fault: Fault) -> None:
    assert outcome(story.healed[case_name(step, fault)]) == (200, None)


def test_other_adapters_notice_nothing(story: Story) -> None:
    assert [outcome(answer) for answer in story.others] == [(200, None)] * 4


# ------------------------------------------------------------------------------------------------------ a hanging store


@pytest.mark.parametrize(("step", "fault"), [("listing", Fault.HANG), ("tensors", Fault.STALL)])
def test_many_that_hang_do_not_hold_up_the_others(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact], step: str, fault: Fault
) -> None:
    faulty = Faulty(healed, bert, healed.bucket(), PATIENT_SECONDS)
    names = [f"hanging-{number}" for number in range(64)]
    faulty.publish(**dict(zip([*names, "resident", "cold"], artifacts, strict=False)))
    pattern = STEPS[step].format(name="hanging-[0-9]+")
    with faulty.client, ThreadPoolExecutor(len(names)) as pool, healed.failing(pattern, fault):
        assert faulty.ask("resident").status_code == 200
        healed.seen.clear()
        asked = faulty.ask_all(pool, names)
        healed.wait_for(pattern, len(names))
        assert outcome(faulty.ask("resident")) == (200, None)
        assert outcome(faulty.ask("cold")) == (200, None)
        assert faulty.client.get("/readyz").status_code == 200
        assert not any(future.done() for future in asked)
        healed.heal()
        assert {outcome(future.result(LONGEST_ANSWER_SECONDS)) for future in asked} == {(200, None)}


def test_answers_that_stall_do_not_drive_out_what_serves(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact]
) -> None:
    """More adapters are on their way, and stay there, than fit the memory beside those that serve."""
    nbytes = len(artifacts[0].tensor_bytes)
    faulty = Faulty(
        healed, bert, healed.bucket(), PATIENT_SECONDS, host_memory_bytes=12 * nbytes, memory_wait_seconds=0.5
    )
    serving, stalled = ["one", "two", "three"], [f"stalled-{number}" for number in range(12)]
    faulty.publish(**dict(zip([*serving, *stalled], artifacts, strict=False)))
    pattern = STEPS["tensors"].format(name="stalled-[0-9]+")
    with faulty.client, ThreadPoolExecutor(len(stalled)) as pool, healed.failing(pattern, Fault.STALL):
        for name in serving:
            assert outcome(faulty.ask(name)) == (200, None)
        healed.seen.clear()
        asked = faulty.ask_all(pool, stalled)
        healed.wait_for(pattern, 1)
        for _ in range(10):
            assert [outcome(faulty.ask(name)) for name in serving] == [(200, None)] * len(serving)
            time.sleep(0.05)
        healed.heal()
        for future in asked:
            assert outcome(future.result(LONGEST_ANSWER_SECONDS)) in [(200, None), (503, "memory_full")]


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.REFUSE, Fault.CORRUPT])
def test_what_serves_goes_on_serving_its_last_known_release(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact], fault: Fault
) -> None:
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    version, later = artifacts[0].version, artifacts[1].version
    faulty.publish(a=artifacts[0])
    with faulty.client:
        assert faulty.ask("a").json()["version"] == version
        faulty.publish(a=artifacts[1])
        healed.fail("GET a/releases/0" if fault is Fault.CORRUPT else "GET ", fault)
        for _ in range(3):
            faulty.clock.now += POLL_SECONDS + 1
            for _ in range(3):
                answer = faulty.ask("a")
                assert (answer.status_code, answer.json()["version"]) == (200, version)
        healed.heal()
        faulty.serves_in_the_end("a", later)


def test_an_unknown_name_is_told_apart_from_a_store_that_fails(healed: FaultyS3, bert: Backbone) -> None:
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    with faulty.client:
        assert outcome(faulty.ask("nobody")) == (404, "adapter_not_found")
        healed.fail("GET nobody/", Fault.REFUSE)
        assert outcome(faulty.ask("nobody")) == UNAVAILABLE


def test_a_wrong_name_like_that_of_a_faulty_adapter_is_unknown(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact]
) -> None:
    """The name that could be suggested cannot be looked up."""
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    faulty.publish(sentiment=artifacts[0])
    with faulty.client:
        healed.fail("GET sentiment/", Fault.REFUSE)
        assert outcome(faulty.ask("sentimnt")) == (404, "adapter_not_found")


def test_an_adapter_that_cannot_be_read_does_not_hide_the_others(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact]
) -> None:
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    faulty.publish(a=artifacts[0], b=artifacts[1])
    with faulty.client:
        healed.fail("GET a/releases/", Fault.REFUSE)
        listed = faulty.client.get("/admin/adapters")
        assert listed.status_code == 200, listed.text
        assert [one["name"] for one in listed.json()["adapters"]] == ["b"]


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.REFUSE])
def test_a_release_whose_version_cannot_be_had_leaves_the_one_before_serving(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact], fault: Fault
) -> None:
    """The release of another process can be read, what it releases cannot."""
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    faulty.publish(a=artifacts[0])
    with faulty.client:
        assert faulty.ask("a").json()["version"] == artifacts[0].version
        faulty.publish(a=artifacts[1])
        healed.fail(STEPS["tensors"].format(name="a"), fault)
        for _ in range(3):
            faulty.clock.now += POLL_SECONDS + 1
            answer = faulty.ask("a")
            assert outcome(answer) == (200, None)
            assert answer.json()["version"] == artifacts[0].version
        healed.heal()
        faulty.serves_in_the_end("a", artifacts[1].version)


def test_a_folder_that_is_gone_takes_no_uploads(tmp_path: Path, artifacts: list[Artifact]) -> None:
    """A mount that is lost: what is written where it was would be lost when it comes back."""
    folder = tmp_path / "store"
    store = AdapterStore.open(str(folder))
    asyncio.run(store.put_version("a", artifacts[0]))
    shutil.rmtree(folder)
    with pytest.raises(StoreUnavailable):
        asyncio.run(store.put_version("a", artifacts[1]))
    assert not folder.exists()


ROOM_BYTES = 64 * 1024
"""That a file may have while the disk is full; the server's own output is less."""


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's")
def test_a_full_disk_takes_no_uploads_until_there_is_room(tmp_path: Path, bert: Backbone) -> None:
    """The operating system refuses to write on, in the middle of a file, to a server that runs."""
    blueprint = make_blueprint(bert.spec, "lora", {"r": 64, "target_modules": "all-linear"})
    small, large, other = (
        {"manifest.json": made.manifest_bytes, "adapter.safetensors": made.tensor_bytes}
        for made in (
            make_artifact(kind, random_tensors(kind, seed, bert, std=0.01))
            for seed, kind in enumerate((make_blueprint(bert.spec, "lora", {"r": 2}), blueprint, blueprint))
        )
    )
    assert len(large["adapter.safetensors"]) > 2 * ROOM_BYTES
    folder = tmp_path / "store"

    def upload(name: str, files: dict[str, bytes]) -> httpx.Response:
        return server.client.put(f"/admin/adapters/{name}", files=[("files", file) for file in files.items()])

    def ask(name: str) -> int:
        return server.client.post("/classify", json={"adapter": name, "inputs": "w1 w2"}).status_code

    def stored() -> list[str]:
        """All files but those that are half-written."""
        return sorted(str(path) for path in folder.rglob("*") if path.is_file() and "#" not in path.name)

    with serving(tmp_path, str(folder), save_tiny_bert(tmp_path / "tiny-bert")) as server:
        assert upload("a", small).status_code == 201
        before = stored()
        pid, limit = server.process.pid, resource.RLIMIT_FSIZE
        assert pid is not None
        _, most = room = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (ROOM_BYTES, most))
        for _ in range(2):
            answer = upload("b", large)
            assert (answer.status_code, answer.json()["error"]["code"]) == UNAVAILABLE
            assert int(answer.headers["Retry-After"]) >= 1
            assert stored() == before
            assert (ask("a"), ask("b")) == (200, 404)
        assert upload("c", small).status_code == 201  # what there is room for
        resource.prlimit(pid, limit, room)
        for name, files in (("b", large), ("d", other)):
            assert upload(name, files).status_code == 201
            assert ask(name) == 200


# ------------------------------------------------------------------------------------------------------- lost answers


@pytest.mark.parametrize("key", ["a/releases/000001.json", "a/versions/.*/adapter.safetensors", "a/versions/.*/manif"])
def test_an_upload_whose_answers_are_lost_is_done_once(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact], key: str
) -> None:
    """The store does what it is told, and the connection ends before it says so; the server asks again."""
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    with faulty.client:
        healed.seen.clear()
        healed.fail(f"PUT {key}", Fault.LOSE, times=ATTEMPTS - 1)
        answer = faulty.upload("a", artifacts[0])
        assert answer.status_code == 201, answer.text
        assert answer.json()["release"] == 1
        assert sum(healed.requests(f"PUT {key}").values()) == ATTEMPTS
        assert faulty.ask("a").json()["version"] == artifacts[0].version
    assert asyncio.run(faulty.store.releases("a")) == [1]
    assert asyncio.run(faulty.store.get_version("a", artifacts[0].version)).version == artifacts[0].version


def test_an_upload_that_never_heard_of_its_release_finds_it(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact]
) -> None:
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    with faulty.client:
        healed.fail("PUT a/releases/", Fault.LOSE, times=ATTEMPTS)
        answer = faulty.upload("a", artifacts[0])
        assert outcome(answer) == UNAVAILABLE
        again = faulty.upload("a", artifacts[0])
        assert again.status_code == 200, again.text
        assert again.json()["release"] == 1
        assert faulty.ask("a").json()["release"] == 1
    assert asyncio.run(faulty.store.releases("a")) == [1]


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("versions/.*/adapter.safetensors", Fault.HANG),
        ("versions/.*/adapter.safetensors", Fault.RESET),
        ("versions/.*/manifest.json", Fault.REFUSE),
        ("releases/", Fault.HANG),
        ("releases/", Fault.REFUSE),
        ("releases/", Fault.RESET),
    ],
)
def test_an_upload_that_cannot_be_stored_says_so_and_can_be_repeated(
    healed: FaultyS3, bert: Backbone, artifacts: list[Artifact], key: str, fault: Fault
) -> None:
    faulty = Faulty(healed, bert, healed.bucket(), TIMEOUT_SECONDS)
    with faulty.client:
        healed.fail(f"PUT a/{key}", fault)
        answer = faulty.upload("a", artifacts[0])
        assert outcome(answer) == UNAVAILABLE
        assert int(answer.headers["Retry-After"]) >= 1
        assert asyncio.run(faulty.store.releases("a")) == []
        assert outcome(faulty.ask("a")) == (404, "adapter_not_found")
        assert faulty.upload("b", artifacts[1]).status_code == 201
        healed.heal()
        # 200 where what hung has been done after all.
        assert faulty.upload("a", artifacts[0]).status_code in ((200, 201) if fault is Fault.HANG else (201,))
        answer = faulty.ask("a").json()
        assert (answer["version"], answer["release"]) == (artifacts[0].version, 1)
    assert asyncio.run(faulty.store.releases("a")) == [1]
