import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import Sync, build
from pydantic import TypeAdapter
from starlette.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, MistralConfig, PreTrainedConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from server.adapters import METHODS
from server.app import create_app
from server.backbone.backbone import Backbone, fingerprint
from server.cli import app
from server.errors import AdapterdError, InvalidAdapter, InvalidRequest
from server.settings import Settings
from server.store.artifact import Artifact
from server.store.releases import Plan
from server.store.store import AdapterStore
from server.tasks import TASKS
from server.tasks.adapter import Blueprint
from server.tasks.base import AnyTask
from server.tasks.dataset import Dataset, read_dataset
from server.tasks.examples import LabelledText
from server.tasks.metrics import Report, single_label
from server.training import trainer
from server.training.evaluate import CHUNK, RETRIES, evaluate, served_task
from server.training.options import TrainOptions
from server.training.trainer import TrainResult, fit, outputs, train

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
FILLERS = ["the", "film", "phone", "was", "and", "food", "this", "a"]
MARKERS = {"negative": ["bad", "awful", "poor"], "positive": ["good", "great", "fine"]}
WORDS = [*SPECIAL, *FILLERS, *MARKERS["negative"], *MARKERS["positive"]]

BERT = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=32,
)
MISTRAL = MistralConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)


def save_backbone(folder: Path, config: PreTrainedConfig) -> str:
    """A random model, the same each time, with a tokenizer of one token a word."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_backbone(tmp_path_factory.mktemp("bert"), BERT)


def write_rows(path: Path, rows: int, seed: int, *, marker_last: bool = False) -> Path:
    """Texts of two halves: words that tell nothing, and words that tell the label."""
    rng = random.Random(seed)
    lines = []
    for i in range(rows):
        label = sorted(MARKERS)[i % 2]
        words = [*rng.choices(FILLERS, k=8 if marker_last else 2), *rng.choices(MARKERS[label], k=3)]
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def options(folder: str, tmp_path: Path) -> dict[str, Any]:
    """A training of a second."""
    return {
        "data": write_rows(tmp_path / "toy.train.jsonl", 64, seed=1),
        "eval": write_rows(tmp_path / "toy.test.jsonl", 32, seed=2),
        "backbone": folder,
        "device": "cpu",
        "epochs": 5,
        "learning_rate": 3e-2,
        "batch_size": 8,
    }


def golden_outputs(artifact: Artifact, folder: str) -> torch.Tensor:
    """The golden texts through an adapter that went over the store's bytes, as a server would load it."""
    loaded = Artifact.verify(artifact.version, artifact.manifest_bytes, artifact.tensor_bytes)
    manifest = loaded.manifest
    backbone = Backbone.load(folder, device="cpu", dtype="float32")
    adapter = build(loaded, backbone)
    assert manifest.golden is not None
    with torch.inference_mode():
        return outputs(backbone, adapter, backbone.tokenizer.encode(manifest.golden.texts, truncate=True))


def assert_golden_reproduces(result: TrainResult, folder: str) -> None:
    golden = result.artifact.manifest.golden
    assert golden is not None
    torch.testing.assert_close(
        golden_outputs(result.artifact, folder), torch.tensor(golden.outputs), atol=1e-5, rtol=1e-5
    )


# What the toys above are too small or too quick for.
SLOWER: dict[str, dict[str, Any]] = {
    "compacter": {"config": {"reduction_factor": 4}},
    "prompt_tuning": {"epochs": 15},
    "p_tuning": {"epochs": 15},
}


class TestTrain:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_learns_a_separable_set(self, options: dict[str, Any], method: str) -> None:
        result = train(TrainOptions(**options | SLOWER.get(method, {}), method=method))
        assert len(result.losses) == SLOWER.get(method, options).get("epochs", options["epochs"])
        assert result.losses[-1] < 0.5 * result.losses[0]
        assert result.report is not None
        assert result.report.metrics["accuracy"] == 1.0
        assert_golden_reproduces(result, options["backbone"])

    def test_the_seed_decides_the_version(self, options: dict[str, Any]) -> None:
        options |= {"epochs": 1}
        torch.manual_seed(1)
        first = train(TrainOptions(**options, seed=7)).artifact
        torch.manual_seed(2)
        second = train(TrainOptions(**options, seed=7)).artifact
        other = train(TrainOptions(**options, seed=8)).artifact
        assert first.version == second.version
        assert first.tensor_bytes != other.tensor_bytes

    def test_the_backbone_stays_as_it_is(self, options: dict[str, Any]) -> None:
        backbone = Backbone.load(options["backbone"], device="cpu", dtype="float32")
        data = read_dataset(options["data"], LabelledText)
        blueprint = Blueprint.check(
            method="bottleneck",
            config={"mh_adapter": True},
            task="classification",
            head={},
            labels=("negative", "positive"),
            spec=backbone.spec,
        )
        tensors, _ = fit(backbone, blueprint, data, TrainOptions(**options))
        assert fingerprint(backbone.model.state_dict()) == backbone.spec.fingerprint
        assert all(parameter.grad is None for parameter in backbone.model.parameters())
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    def test_the_manifest_tells_how_and_not_where(self, options: dict[str, Any], tmp_path: Path) -> None:
        result = train(TrainOptions(**options, config={"r": 2}, head={"pooling": "cls"}))
        manifest = result.artifact.manifest
        config = METHODS["lora"].Config(r=2, target_modules=["query", "value"])
        assert manifest.config == config.model_dump(mode="json")
        assert manifest.head == TASKS["classification"].Config(pooling="cls").model_dump(mode="json")
        assert manifest.labels == ("negative", "positive")
        assert manifest.backbone.fingerprint == Backbone.load(options["backbone"], device="cpu").spec.fingerprint
        assert manifest.training is not None
        assert manifest.training.rows == 64
        assert manifest.training.data_sha256 == read_dataset(options["data"], LabelledText).sha256
        assert manifest.training.hyperparameters["epochs"] == 5
        assert manifest.training.metrics == {"accuracy": 1.0, "macro_f1": 1.0}
        assert str(tmp_path).encode() not in result.artifact.manifest_bytes
        assert options["backbone"].encode() not in result.artifact.manifest_bytes

    def test_outputs_are_recorded_in_float32_whatever_it_was_trained_in(self, options: dict[str, Any]) -> None:
        result = train(TrainOptions(**options, dtype="bfloat16"))
        assert result.report is not None
        assert result.report.metrics["accuracy"] == 1.0
        assert_golden_reproduces(result, options["backbone"])

    def test_publishing_releases_each_time(self, options: dict[str, Any], tmp_path: Path) -> None:
        options |= {"epochs": 1, "name": "toy", "store": str(tmp_path / "store")}
        first = train(TrainOptions(**options))
        assert first.release is not None
        assert first.release.number == 1
        second = train(TrainOptions(**options | {"eval": None}))
        assert second.report is None
        store = Sync(AdapterStore.open(options["store"]))
        release = store.current("toy")
        assert release is not None
        assert (release.number, release.plan) == (2, Plan.only(second.artifact.version))
        assert release.note == "lora, trained on toy.train.jsonl"
        assert store.get_version("toy", second.artifact.version).manifest == second.artifact.manifest

    def test_max_tokens_cuts_training_texts(self, options: dict[str, Any], tmp_path: Path) -> None:
        options |= {"data": write_rows(tmp_path / "long.jsonl", 64, seed=3, marker_last=True)}
        assert train(TrainOptions(**options)).losses[-1] < 0.1
        assert train(TrainOptions(**options, max_tokens=8)).losses[-1] > 0.4

    def test_a_family_without_usual_targets_wants_them_named(self, options: dict[str, Any], tmp_path: Path) -> None:
        options |= {"backbone": save_backbone(tmp_path / "mistral", MISTRAL), "epochs": 1}
        with pytest.raises(InvalidAdapter, match=r"config\.target_modules: Field required"):
            train(TrainOptions(**options))
        result = train(TrainOptions(**options, config={"target_modules": ["q_proj", "v_proj"]}))
        assert result.artifact.manifest.config["target_modules"] == ["q_proj", "v_proj"]

    def test_a_loss_that_is_no_number_ends_the_training(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forward = outputs
        monkeypatch.setattr(trainer, "outputs", lambda *args: forward(*args) * float("nan"))
        with pytest.raises(InvalidRequest, match="the loss became nan in epoch 1; try a lower learning rate"):
            train(TrainOptions(**options))

    @pytest.mark.parametrize(
        ("wrong", "error", "message"),
        [
            ({"method": "lorra"}, InvalidAdapter, "method 'lorra' is not supported; supported: lora"),
            ({"config": {"rank": 8}}, InvalidAdapter, "config.rank: Extra inputs are not permitted"),
            ({"config": {"target_modules": ["qurey"]}}, InvalidAdapter, r"none of the target_modules \['qurey'\]"),
            ({"name": "../toy", "store": "memory://"}, InvalidRequest, "adapter name '../toy' is not allowed"),
        ],
    )
    def test_wrong_options_are_named(
        self, options: dict[str, Any], wrong: dict[str, Any], error: type[AdapterdError], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            train(TrainOptions(**options | wrong))


def toy_row(task: str, rng: random.Random) -> dict[str, Any]:
    """A row of a task that marker words decide."""
    kind = rng.choice(sorted(MARKERS))
    markers = rng.choices(MARKERS[kind], k=3)
    fillers = rng.choices(FILLERS, k=4)
    text = " ".join([*fillers, *markers])
    match task:
        case "classification":
            return {"text": text, "label": kind}
        case "multi_label_classification":
            kinds = [kind for kind in MARKERS if rng.random() < 0.5]
            return {"text": " ".join(fillers + [rng.choice(MARKERS[kind]) for kind in kinds]), "labels": kinds}
        case "regression":  # far from 0, and far apart
            return {"text": text, "label": 1000.0 + (300.0 if kind == "positive" else -300.0)}
        case "relation_extraction":
            return {
                "text": f"{markers[0]} film {text}",
                "spans": [[0, len(markers[0])], [len(markers[0]) + 1, len(markers[0]) + 5]],
                "label": kind,
            }
        case "tagging":
            words = [*fillers, *markers[:2], "the"]
            return {"tokens": words, "tags": ["O"] * 4 + [f"B-{kind}", f"I-{kind}", "O"]}
        case "question_answering":
            before = " ".join(fillers)
            found = {"text": [markers[0]], "answer_start": [len(before) + 1]}
            return {"question": "was the film", "context": f"{before} {markers[0]} the a", "answers": found}
        case "embedding":
            words = rng.sample(WORDS[len(SPECIAL) :], k=4)
            return {"text": " ".join(words), "text_pair": " ".join(rng.sample(words, k=4))}
    raise AssertionError(f"no rows for {task}")


def write_toy(path: Path, task: str, rows: int, seed: int) -> Path:
    rng = random.Random(seed)
    path.write_text("".join(json.dumps(toy_row(task, rng)) + "\n" for _ in range(rows)))
    return path


def assert_same(one: Any, other: Any) -> None:
    """Numbers to 1e-5, everything else exactly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == (pytest.approx(other, abs=1e-5, rel=1e-5) if isinstance(one, float) else other)


class TestTasks:
    @pytest.mark.parametrize("name", TASKS)
    def test_what_is_trained_is_what_is_served(
        self, options: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = TASKS[name]
        test = write_toy(tmp_path / "test.jsonl", name, 40, seed=2)
        options |= {"data": write_toy(tmp_path / "train.jsonl", name, 96, seed=1), "eval": test, "task": name}
        options |= {"name": "toy", "store": str(tmp_path / "store")}
        seen: list[Any] = []
        measure = type(task).measure

        def spy(self: AnyTask, examples: Any, predictions: Any) -> Report:
            seen.append(TypeAdapter(list[task.prediction]).dump_python(list(predictions), mode="json"))
            return measure(self, examples, predictions)

        monkeypatch.setattr(type(task), "measure", spy)
        result = train(TrainOptions(**options))
        assert result.losses[-1] < 0.7 * result.losses[0]
        manifest = result.artifact.manifest
        assert (manifest.task, manifest.training.rows) == (name, 96)
        assert set(task.decisive) <= set(manifest.training.metrics)

        backbone = Backbone.load(options["backbone"], device="cpu", dtype="float32")
        with TestClient(create_app(Settings(), backbone=backbone, store=AdapterStore.open(options["store"]))) as http:
            assert served_task(http, "toy") is task
            served = evaluate(http, "toy", task, read_dataset(test, task.example))
            files = {
                "manifest.json": result.artifact.manifest_bytes,
                "adapter.safetensors": result.artifact.tensor_bytes,
            }
            upload = http.put("/admin/adapters/again", files=[("files", file) for file in files.items()]).json()
        assert served.version == result.artifact.version
        assert_same(*seen)
        assert upload["report"]["golden"]["difference"] < 1e-5
        assert served.report.metrics == pytest.approx(result.report.metrics, abs=1e-5)

    def test_numbers_of_any_size_are_learnt_alike(self, options: dict[str, Any], tmp_path: Path) -> None:
        path = write_toy(tmp_path / "rows.jsonl", "regression", 64, seed=3)
        shifted = tmp_path / "shifted.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        shifted.write_text("".join(json.dumps(row | {"label": row["label"] / 1000 - 7}) + "\n" for row in rows))
        reports = []
        for data in (path, shifted):
            result = train(TrainOptions(**options | {"task": "regression", "data": data, "eval": data}))
            reports.append(result.report.metrics)
            assert result.report.metrics["pearson"] > 0.95
        assert reports[0]["rmse"] == pytest.approx(1000 * reports[1]["rmse"], rel=1e-3)

    @pytest.mark.parametrize("head", [{"bias": False}, {"hidden_layers": 1}], ids=str)
    def test_heads_take_the_unit_back(self, options: dict[str, Any], tmp_path: Path, head: dict[str, Any]) -> None:
        data = write_toy(tmp_path / "rows.jsonl", "regression", 64, seed=3)
        result = train(TrainOptions(**options | {"task": "regression", "data": data, "eval": data, "head": head}))
        assert result.report.metrics["rmse"] < 100

    def test_an_unknown_task_is_named(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidAdapter, match="task 'taging' is not supported; supported: classification"):
            train(TrainOptions(**options, task="taging"))

    @pytest.mark.parametrize("file", ["data", "eval"])
    def test_what_is_cut_off_is_named_before_training(
        self, options: dict[str, Any], tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = write_toy(tmp_path / "rows.jsonl", "relation_extraction", 16, seed=1)
        cut = tmp_path / "cut.jsonl"
        row = {"text": "the " * 40 + "film", "spans": [[0, 3], [160, 164]], "label": "positive"}
        cut.write_text(rows.read_text() + json.dumps(row) + "\n")
        options |= {"data": rows, "eval": rows, "task": "relation_extraction"} | {file: cut}
        monkeypatch.setattr(trainer, "outputs", lambda *_: pytest.fail("it was trained"))
        with pytest.raises(
            InvalidRequest, match=r"cut\.jsonl: inputs\.16\.spans\.1: characters 160 to 164 hold no token"
        ):
            train(TrainOptions(**options))

    def test_nothing_to_train_is_said(self, options: dict[str, Any], tmp_path: Path) -> None:
        data = write_toy(tmp_path / "rows.jsonl", "embedding", 8, seed=1)
        with pytest.raises(InvalidRequest, match="head_only has nothing to train for embedding"):
            train(TrainOptions(**options | {"data": data, "eval": None, "task": "embedding", "method": "head_only"}))

    @pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
    def test_virtual_tokens_leave_texts_less_room(self, options: dict[str, Any], tmp_path: Path, method: str) -> None:
        data = write_rows(tmp_path / "long.jsonl", 16, seed=3, marker_last=True)
        data.write_text(data.read_text().replace('"text": "', '"text": "' + "the " * 40))
        assert train(TrainOptions(**options | {"data": data, "eval": data, "epochs": 1, "method": method})).report


class TestData:
    def test_reads_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "toy.jsonl"
        path.write_text('{"text": "zwei\u2028Zeilen", "label": "b"}\n\n{"text": "x", "label": "a", "id": 1}\n')
        data = read_dataset(path, LabelledText)
        assert data.texts == ["zwei\u2028Zeilen", "x"]
        assert [row.label for row in data.examples] == ["b", "a"]
        assert TASKS["classification"].labels(data.examples) == ("a", "b")
        assert len(data.sha256) == 64

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "toy.jsonl: no rows"),
            (b'{"text": "a", "label": "x"}\n{"text": "b"}', "toy.jsonl:2: label: Field required"),
            (b'{"text": "a", "label": 1}', "toy.jsonl:1: label: Input should be a valid string"),
            (b'\n{"text": " ", "label": "x"}', "toy.jsonl:2: text: the text is blank"),
            (b"[]", "toy.jsonl:1: Input should be an object"),
            (b'{"text": "a"', "toy.jsonl:1: Invalid JSON: EOF while parsing an object at column 12"),
            (b'{"text": "\xff", "label": "x"}', "toy.jsonl:1: Invalid JSON: invalid unicode"),
            (b'{"text": "a", "label": "z"}', "toy.jsonl:1: label 'z' is none of x, y"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "toy.jsonl"
        path.write_bytes(content)
        with pytest.raises(InvalidRequest) as caught:
            read_dataset(path, LabelledText, known=("x", "y"))
        assert caught.value.message.startswith(f"{tmp_path}/{message}")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match=r"none\.jsonl: No such file or directory"):
            read_dataset(tmp_path / "none.jsonl", LabelledText)


class TestReport:
    def test_by_hand(self) -> None:
        measured = single_label(["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "a", "d"])
        # a: 2 hits of 3 expected and 3 predicted; b: 1 of 2 and 2; c and d: none
        assert measured.f1 == {"a": pytest.approx(2 / 3), "b": 0.5, "c": 0.0, "d": 0.0}
        assert measured.rows == 6
        assert measured.metrics == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 0.5) / 4)}
        assert str(measured) == "accuracy 0.5000, macro_f1 0.2917"

    def test_perfect(self) -> None:
        assert single_label(["a", "b"], ["a", "b"]).metrics == {"accuracy": 1.0, "macro_f1": 1.0}

    def test_nothing_or_uneven(self) -> None:
        with pytest.raises(ValueError, match="nothing to compare"):
            single_label([], [])
        with pytest.raises(ValueError, match="zip"):
            single_label(["a"], [])


VERSION = "ab" * 32
CLASSIFICATION = TASKS["classification"]


def answer(request: httpx.Request, version: str = VERSION) -> httpx.Response:
    """A server whose adapter knows texts that name their label."""
    inputs = json.loads(request.content)["inputs"]
    predictions = [[{"label": text.split()[0], "score": 0.9}] for text in inputs]
    return httpx.Response(200, json={"adapter": "toy", "version": version, "predictions": predictions})


def client(handler: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler), base_url="http://server/prefix")


def labelled(labels: str) -> Dataset[LabelledText]:
    """Texts that name a, b, a, b ..., with these labels."""
    rows = [LabelledText(text=f"{'ab'[i % 2]} text {i}", label=label) for i, label in enumerate(labels)]
    return Dataset(tuple(rows), "0" * 64)


class TestEvaluate:
    data = labelled("ab" * 35)

    def test_chunks_and_report(self) -> None:
        seen: list[int] = []

        def handler(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)
            assert (request.method, request.url.path, body["adapter"]) == ("POST", "/prefix/classify", "toy")
            assert body["top_k"] == 1
            seen.append(len(body["inputs"]))
            return answer(request)

        with client(handler) as http:
            result = evaluate(http, "toy", CLASSIFICATION, labelled("bb" + "ab" * 34))
        assert seen == [CHUNK, CHUNK, 70 - 2 * CHUNK]
        assert (result.version, result.task) == (VERSION, "classification")
        assert result.report.rows == 70
        assert result.report.metrics["accuracy"] == pytest.approx(69 / 70)
        assert sorted(result.report.f1) == ["a", "b"]

    @pytest.mark.parametrize(
        ("task", "row", "item"),
        [
            ("classification", {"text": "a", "label": "x"}, "a"),
            ("classification", {"text": "a", "text_pair": "b", "label": "x"}, {"text": "a", "text_pair": "b"}),
            (
                "relation_extraction",
                {"text": "a b", "spans": [[0, 1], [2, 3]], "label": "x"},
                {"text": "a b", "spans": [[0, 1], [2, 3]]},
            ),
            ("question_answering", {"question": "a", "context": "b", "answers": {}}, {"question": "a", "context": "b"}),
            ("tagging", {"tokens": ["a", "b"], "tags": ["O", "O"]}, "a b"),
        ],
    )
    def test_inputs_are_what_the_route_takes(self, task: str, row: dict[str, Any], item: object) -> None:
        bodies: list[dict[str, Any]] = []

        def handler(request: httpx.Request) -> httpx.Response:
            assert request.url.path == f"/prefix{TASKS[task].route.path}"
            bodies.append(json.loads(request.content))
            return httpx.Response(404)

        with client(handler) as http, pytest.raises(AdapterdError, match="404"):
            evaluate(http, "toy", TASKS[task], Dataset((TASKS[task].example.model_validate(row),), "0" * 64))
        assert bodies[0]["inputs"] == [item]

    def test_the_server_says_what_the_adapter_is_for(self) -> None:
        def handler(request: httpx.Request) -> httpx.Response:
            assert (request.method, request.url.raw_path) == ("GET", b"/prefix/admin/adapters/a%2Fb")
            return httpx.Response(200, json={"name": "a/b", "task": "tagging"})

        with client(handler) as http:
            assert served_task(http, "a/b") is TASKS["tagging"]

    @pytest.mark.parametrize(
        ("detail", "message"),
        [({"task": "juggling"}, "task 'juggling' is not supported"), ({}, "does not answer as adapterd does")],
    )
    def test_what_is_served_has_to_be_a_known_task(self, detail: dict[str, Any], message: str) -> None:
        with client(lambda _: httpx.Response(200, json=detail)) as http, pytest.raises(AdapterdError, match=message):
            served_task(http, "toy")

    def test_busy_servers_are_asked_again(self) -> None:
        refusals = iter([429, 503])

        def handler(request: httpx.Request) -> httpx.Response:
            status = next(refusals, None)
            return httpx.Response(status, headers={"Retry-After": "0"}) if status else answer(request)

        with client(handler) as http:
            assert evaluate(http, "toy", CLASSIFICATION, self.data).report.metrics["accuracy"] == 1.0

    def test_but_not_for_ever(self) -> None:
        asked = 0

        def handler(request: httpx.Request) -> httpx.Response:
            nonlocal asked
            asked += 1
            return httpx.Response(429, headers={"Retry-After": "0"}, json={"error": {"message": "the queue is full"}})

        with client(handler) as http, pytest.raises(AdapterdError, match="answered 429: the queue is full"):
            evaluate(http, "toy", CLASSIFICATION, self.data)
        assert asked == RETRIES + 1

    @pytest.mark.parametrize(
        ("response", "message"),
        [
            (httpx.Response(404, json={"error": {"message": "no adapter is called 'toy'"}}), "404: no adapter is"),
            (httpx.Response(502, text="<html>"), "502: Bad Gateway"),
            (httpx.Response(200, json={"ok": True}), "does not answer as adapterd does"),
        ],
    )
    def test_the_servers_words_are_reported(self, response: httpx.Response, message: str) -> None:
        with client(lambda _: response) as http, pytest.raises(AdapterdError, match=message):
            evaluate(http, "toy", CLASSIFICATION, self.data)

    def test_one_version_is_measured(self) -> None:
        versions: Iterator[str] = iter([VERSION, VERSION, "cd" * 32])
        with (
            client(lambda request: answer(request, next(versions))) as http,
            pytest.raises(AdapterdError, match="another version of adapter 'toy' was released"),
        ):
            evaluate(http, "toy", CLASSIFICATION, self.data)


class TestCommands:
    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def test_train(self, options: dict[str, Any], tmp_path: Path) -> None:
        arguments = ["train", "--data", options["data"], "--eval", options["eval"], "--backbone", options["backbone"]]
        arguments += ["--method", "bottleneck", "--set", "mh_adapter=true", "--set", "non_linearity=gelu"]
        arguments += ["--epochs", 5, "--learning-rate", 3e-2, "--batch-size", 8, "--device", "cpu"]
        arguments += ["--name", "toy", "--store", tmp_path / "store"]
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        summary = json.loads(result.stdout)
        assert summary["eval"]["metrics"]["accuracy"] == 1.0
        assert summary["published"] == {"store": str(tmp_path / "store"), "name": "toy", "release": 1}
        store = Sync(AdapterStore.open(str(tmp_path / "store")))
        config = store.get_version("toy", summary["version"]).manifest.config
        assert config["mh_adapter"] is True
        assert config["non_linearity"] == "gelu"

        lines = self.run(*arguments).stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["trained", "measured", "version", "published"]
        assert summary["version"] in lines[2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "none.jsonl"], "adapterd: none.jsonl: No such file or directory"),
            (["--data", "none.jsonl", "--batch-size", "0"], "adapterd: --batch-size: Input should be greater than"),
            (["--data", "none.jsonl", "--set", "r"], "adapterd: --set r: write it as name=value"),
        ],
    )
    def test_train_reports_one_line(self, arguments: list[str], message: str) -> None:
        result = self.run("train", *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("http://127.0.0.1:1", "adapterd: http://127.0.0.1:1 cannot be reached: "),
            ("127.0.0.1", "adapterd: 127.0.0.1/ cannot be reached: "),
            ("http://host:port", "adapterd: --url http://host:port: "),
        ],
    )
    def test_evaluate_reports_one_line(self, options: dict[str, Any], url: str, message: str) -> None:
        result = self.run("evaluate", "--adapter", "toy", "--data", options["eval"], "--url", url)
        assert result.exit_code == 1
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1
