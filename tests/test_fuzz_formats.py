"""Damaged uploads of every format: each is served or refused by name, soon and in little memory."""

import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft_references as peft
import pytest
import torch
from helpers import EVERY_VARIANT, make_artifact, make_blueprint, random_tensors, random_text, run
from hunting import MOST_FINDINGS, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import FLOATS, NUMBERS, TEXTS, Parts, Upload, dumped, mutated
from starlette.testclient import TestClient
from test_classifier_format import classifier, saved, tuned
from test_parity_adapterhub import REFUSED, checkpoints, hub_backbone
from test_parity_peft import POOLING, modules, vectors

from server.app import create_app
from server.backbone.backbone import Backbone
from server.core import HeadKind
from server.engine.loading import Checker
from server.errors import AdapterdError, InvalidAdapter
from server.settings import Settings
from server.store.artifact import Artifact
from server.store.formats import read_checkpoint
from server.store.formats.files import gather
from server.store.store import AdapterStore

LIMIT = 1 << 22
MOST_CPU_SECONDS = 20.0
"""Of one upload, which usually takes a millisecond. Of this thread alone, however busy the machine is."""

MOST_BYTES = 256 * 1024 * 1024
"""By which one upload may raise the process's memory; its files may hold LIMIT."""

TEXT = random_text(5, seed=1)
PEFT_CASES = ("lora", "lora-patterns", "lora-bias-all", "lora-layers-pattern", "lora-embedding", "lora-dora", "vera",
              "vera-d-initial", "loha-patterns", "lokr-both", "ia3-lists", "norms-listed", "prefix", "prompt",
              "p-tuning-mlp")  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of PEFT, while it makes the good ones
]


def of_peft(bert: Backbone) -> list[Upload]:
    found = [peft.trained("bert", case) for case in peft.CASES_OF["bert"] if case.name in PEFT_CASES]
    found += [peft.trained("bert", peft.CASES[0], task) for task in ("TOKEN_CLS", "QUESTION_ANS")]
    return [Upload(one.files, one.labels) for one in found]


def of_sentence_transformers(bert: Backbone) -> list[Upload]:
    kinds = modules("Transformer", "Pooling", "Normalize")
    return [
        Upload(vectors(bert)),
        Upload(vectors(bert, **{"modules.json": kinds, POOLING: {"pooling_mode": "cls"}})),
        Upload(vectors(bert, None, **{POOLING: {"pooling_mode_cls_token": True, "word_embedding_dimension": 32}})),
    ]


def of_adapterhub(bert: Backbone) -> list[Upload]:
    found = checkpoints("bert")
    return [
        Upload(one.files, one.labels)
        for case, one in sorted(found.items())
        if f"bert/{case}" not in REFUSED and "adapter.safetensors" in one.files  # the others are pickles
    ]


def of_transformers(bert: Backbone) -> list[Upload]:
    labels = ["ant", "bee", "cat"]
    probe = saved(classifier("bert", 3))
    return [
        Upload(probe, labels),
        Upload(tuned("bert", "biases and norms").files, labels),
        Upload(tuned("bert", "pooler").files),
        Upload(tuned("bert", kind=HeadKind.TOKENS).files),
        Upload(tuned("bert", kind=HeadKind.QUESTION).files),
    ]


def of_our_own(bert: Backbone) -> list[Upload]:
    made: list[Artifact] = []
    for index, (method, options, also) in enumerate(EVERY_VARIANT):
        try:
            blueprint = make_blueprint(bert.spec, method, options, also)
        except InvalidAdapter:  # nothing that this family carries
            continue
        made.append(make_artifact(blueprint, random_tensors(blueprint, index, bert, std=0.05)))
    golden = {"texts": ["w1"], "outputs": [[1, 2, 3]]}
    made.append(make_artifact(blueprint, random_tensors(blueprint, 0, bert), golden=golden))
    return [
        Upload({"manifest.json": one.manifest_bytes, "adapter.safetensors": bytes(one.tensor_bytes)}) for one in made
    ]


FORMATS: dict[str, Callable[[Backbone], list[Upload]]] = {
    "peft": of_peft,
    "sentence_transformers": of_sentence_transformers,
    "adapterhub": of_adapterhub,
    "transformers": of_transformers,
    "our_own": of_our_own,
}


class Bench:
    """Good uploads of a format, and the backbone that serves them."""

    def __init__(self, uploads: list[Upload], backbone: Backbone) -> None:
        self.uploads = uploads
        self.backbone = backbone
        self._checker = Checker(backbone)

    def serve(self, parts: Parts, labels: Sequence[str] | None) -> Artifact:
        """As a server reads an upload, up to an answer; raises what it raises."""
        artifact = read_checkpoint(gather(parts, LIMIT), labels, self.backbone)
        adapter = self._checker.bind(self._checker.check(artifact))
        (answer,) = run(self.backbone, [(TEXT, adapter)])
        assert answer.logits is not None
        return artifact

    def end(self, parts: Parts, labels: Sequence[str] | None) -> str:
        """`served`, or the code of the refusal."""
        try:
            artifact = self.serve(parts, labels)
        except AdapterdError as error:
            check_refusal(error)
            return error.error_code
        # What was accepted can be stored, and is the same when it is read again.
        again = Artifact.verify(artifact.version, artifact.manifest_file(), artifact.tensor_bytes)
        assert again.manifest == artifact.manifest
        assert again.tensors.keys() == artifact.tensors.keys()
        return "served"


def check_refusal(error: AdapterdError) -> None:
    """A client's fault, that names what is at fault in words that an answer can carry."""
    assert 400 <= error.status < 500, error
    assert error.param, error.message
    assert len(error.message) > 10
    (error.message + error.param).encode()


@pytest.fixture(scope="module")
def bench_of(bert: Backbone) -> Callable[[str], Bench]:
    """format -> its bench"""

    @cache
    def make(name: str) -> Bench:
        with torch.inference_mode(False):
            return Bench(FORMATS[name](bert), hub_backbone("bert") if name == "adapterhub" else bert)

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_the_uploads_that_are_damaged_are_good_ones(name: str, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of(name)
    for upload in bench.uploads:
        assert bench.end(list(upload.files.items()), upload.labels) == "served"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_damaged_uploads_are_served_or_refused(
    name: str, bench_of: Callable[[str], Bench], record_property: Callable[[str, object], None]
) -> None:
    bench, ends, slowest = bench_of(name), Counter[str](), (0.0, 0)
    found: list[Exception] = []
    for seed in range(cases(100, 1 / len(FORMATS))):
        parts, labels = mutated(bench.uploads, seed)
        peak, began = peak_bytes(), time.thread_time()
        try:
            ends[bench.end(parts, labels)] += 1
            took, more = time.thread_time() - began, peak_bytes() - peak
            assert took < MOST_CPU_SECONDS, f"{took:.0f} s"
            assert more < MOST_BYTES, f"{more >> 20} MiB"
            slowest = max(slowest, (took, seed))
        except Exception as error:
            if len(found) < MOST_FINDINGS:
                error.add_note(f"upload {seed} of {name}")
                found.append(error)
    record_property("ends", dict(ends))
    record_property("slowest", slowest)
    if found:
        raise ExceptionGroup("findings", found)
    assert ends["served"]  # some damage does no harm, and not all is refused for the same reason
    assert len(ends) > 8


# ------------------------------------------------------------------------------------- values that can be made smaller

hunts = settings(
    max_examples=cases(20, 0.01),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
odd_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS + FLOATS + TEXTS) | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("name", FORMATS)
@hunts
@given(data=st.data())
def test_any_value_at_any_place_of_any_file(name: str, bench_of: Callable[[str], Bench], data: st.DataObject) -> None:
    bench = bench_of(name)
    upload = bench.uploads[data.draw(st.integers(0, len(bench.uploads) - 1), "upload")]
    path = data.draw(st.sampled_from(sorted(path for path in upload.files if path.endswith(".json"))), "file")
    document: Any = json.loads(upload.files[path])
    place, key = document, data.draw(st.sampled_from(sorted(document) if isinstance(document, dict) else [0]), "field")
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans(), "deeper"):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)), "field")
    place[key] = data.draw(odd_values, "value")
    bench.end(list({**upload.files, path: dumped(document)}.items()), upload.labels)


@hunts
@given(data=st.data())
def test_any_header_of_tensors(bench_of: Callable[[str], Bench], data: st.DataObject) -> None:
    bench = bench_of("our_own")
    upload = bench.uploads[0]
    whole = upload.files["adapter.safetensors"]
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    entry = header[data.draw(st.sampled_from(sorted(header)), "tensor")]
    sizes = st.integers(-2, 40) | st.sampled_from(NUMBERS)
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]), "field")
    entry[field] = data.draw(
        odd_values | (st.sampled_from(["F64", "F16", "BF16", "I8", "BOOL"]) if field == "dtype" else st.lists(sizes))
    )
    document = dumped(header)
    changed = len(document).to_bytes(8, "little") + document + whole[end:]
    bench.end(list({**upload.files, "adapter.safetensors": changed}.items()), None)


# ----------------------------------------------------------------------------------------------------------- over HTTP


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_uploads_over_http(name: str, bench_of: Callable[[str], Bench], tmp_path: Path) -> None:
    """What is refused leaves the store as it was, byte for byte; and whoever is served goes on."""
    bench, ends = bench_of(name), Counter[int]()
    folder = tmp_path / "store"
    app = create_app(
        Settings(store=str(folder), max_upload_bytes=LIMIT),
        backbone=bench.backbone,
        store=AdapterStore.open(str(folder)),
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        good = bench.uploads[0]
        answer = client.put("/admin/adapters/good", **form(list(good.files.items()), good.labels))
        assert answer.status_code == 201, answer.text
        version = answer.json()["version"]
        before = contents(folder)
        for seed in range(cases(15, 0.05 / len(FORMATS))):
            parts, labels = mutated(bench.uploads, seed)
            answer = client.put("/admin/adapters/bad", **form(parts, labels))
            ends[answer.status_code] += 1
            assert answer.status_code in (200, 201, 400, 413, 422), (seed, answer.text)
            if answer.status_code in (400, 413, 422):
                # a file's name may break the form itself, of which nothing can be named then
                assert answer.json()["error"]["param"] or answer.status_code == 400, (seed, answer.text)
                assert contents(folder) == before, seed
            else:
                served(client, "bad", answer.json())
                before = contents(folder)
            if seed % 10 == 0:
                assert served(client, "good", {**client.get("/admin/adapters/good").json()}) == version
    assert ends[422]
    assert ends[201]


def form(parts: Parts, labels: Sequence[str] | None) -> dict[str, Any]:
    """As httpx takes an upload; a multipart form holds no half characters in a file's name."""
    files = [("files", (name.encode(errors="replace").decode() or "x", data)) for name, data in parts]
    return {"files": files or [("files", ("x", b""))], "data": {} if labels is None else {"labels": json.dumps(labels)}}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BODIES = {"/answer": {"question": "w1", "context": "w2 w3"}}


def served(client: TestClient, name: str, shown: dict[str, Any]) -> str:
    """Asks an adapter for an answer, which has to come from the version that is shown to serve."""
    route = client.get(f"/admin/adapters/{name}").json()["route"]
    answer = client.post(route, json={"adapter": name, "inputs": BODIES.get(route, "w1 w2")})
    # Of one whose weights are too large for this text, the server says so.
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "not_finite_output", answer.text
    if answer.status_code == 200:
        assert answer.json()["version"] == shown["version"]
    return str(shown["version"])
