import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import Sync, build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, MistralConfig, PreTrainedConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from server.adapters import METHODS
from server.backbone.backbone import Backbone, fingerprint
from server.cli import app
from server.errors import AdapterdError, InvalidAdapter, InvalidRequest
from server.store.artifact import Artifact
from server.store.releases import Plan
from server.store.store import AdapterStore
from server.tasks import TASKS
from server.tasks.adapter import Blueprint
from server.tasks.dataset import Dataset, read_dataset
from server.tasks.metrics import report
from server.training import trainer
from server.training.evaluate import CHUNK, RETRIES, evaluate
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
        assert result.report.accuracy == 1.0
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
        data = read_dataset(options["data"])
        blueprint = Blueprint.check(
            method="bottleneck",
            config={"mh_adapter": True},
            task="classification",
            head={},
            labels=data.label_names,
            spec=backbone.spec,
        )
        tensors, _ = fit(backbone, blueprint, data, TrainOptions(**options))
        assert fingerprint(backbone.model.state_dict()) == backbone.spec.fingerprint
        assert all(parameter.grad is None for parameter in backbone.model.parameters())
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    def test_the_manifest_tells_how_and_not_where(self, options: dict[str, Any], tmp_path: Path) -> None:
        result = train(TrainOptions(**options, config={"r": 2}, pooling="cls"))
        manifest = result.artifact.manifest
        config = METHODS["lora"].Config(r=2, target_modules=["query", "value"])
        assert manifest.config == config.model_dump(mode="json")
        assert manifest.head == TASKS["classification"].Config(pooling="cls").model_dump(mode="json")
        assert manifest.labels == ("negative", "positive")
        assert manifest.backbone.fingerprint == Backbone.load(options["backbone"], device="cpu").spec.fingerprint
        assert manifest.training is not None
        assert manifest.training.rows == 64
        assert manifest.training.data_sha256 == read_dataset(options["data"]).sha256
        assert manifest.training.hyperparameters["epochs"] == 5
        assert manifest.training.metrics == {"accuracy": 1.0, "macro_f1": 1.0}
        assert str(tmp_path).encode() not in result.artifact.manifest_bytes
        assert options["backbone"].encode() not in result.artifact.manifest_bytes

    def test_outputs_are_recorded_in_float32_whatever_it_was_trained_in(self, options: dict[str, Any]) -> None:
        result = train(TrainOptions(**options, dtype="bfloat16"))
        assert result.report is not None
        assert result.report.accuracy == 1.0
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


class TestData:
    def test_reads_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "toy.jsonl"
        path.write_text('{"text": "zwei\u2028Zeilen", "label": "b"}\n\n{"text": "x", "label": "a", "id": 1}\n')
        data = read_dataset(path)
        assert data.texts == ("zwei\u2028Zeilen", "x")
        assert data.labels == ("b", "a")
        assert data.label_names == ("a", "b")
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
            read_dataset(path, known=("x", "y"))
        assert caught.value.message.startswith(f"{tmp_path}/{message}")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match=r"none\.jsonl: No such file or directory"):
            read_dataset(tmp_path / "none.jsonl")


class TestReport:
    def test_by_hand(self) -> None:
        measured = report(["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "a", "d"])
        assert (measured.rows, measured.accuracy) == (6, 0.5)
        # a: 2 hits of 3 expected and 3 predicted; b: 1 of 2 and 2; c and d: none
        assert measured.f1 == {"a": pytest.approx(2 / 3), "b": 0.5, "c": 0.0, "d": 0.0}
        assert measured.macro_f1 == pytest.approx((2 / 3 + 0.5) / 4)

    def test_perfect(self) -> None:
        measured = report(["a", "b"], ["a", "b"])
        assert (measured.accuracy, measured.macro_f1) == (1.0, 1.0)

    def test_nothing_or_uneven(self) -> None:
        with pytest.raises(ValueError, match="no labels"):
            report([], [])
        with pytest.raises(ValueError, match="zip"):
            report(["a"], [])


VERSION = "ab" * 32


def answer(request: httpx.Request, version: str = VERSION) -> httpx.Response:
    """A server whose adapter knows texts that name their label."""
    inputs = json.loads(request.content)["inputs"]
    predictions = [[{"label": text.split()[0], "score": 0.9}, {"label": "none", "score": 0.1}] for text in inputs]
    return httpx.Response(200, json={"adapter": "toy", "version": version, "predictions": predictions})


def client(handler: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler), base_url="http://server/prefix")


class TestEvaluate:
    data = Dataset(tuple(f"{'ab'[i % 2]} text {i}" for i in range(70)), ("a", "b") * 35, "0" * 64)

    def test_chunks_and_report(self) -> None:
        seen: list[int] = []

        def handler(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)
            assert (request.method, request.url.path, body["adapter"]) == ("POST", "/prefix/classify", "toy")
            seen.append(len(body["inputs"]))
            return answer(request)

        wrong = Dataset(self.data.texts, ("b", *self.data.labels[1:]), self.data.sha256)
        with client(handler) as http:
            result = evaluate(http, "toy", wrong)
        assert seen == [CHUNK, CHUNK, 70 - 2 * CHUNK]
        assert result.version == VERSION
        assert result.report.rows == 70
        assert result.report.accuracy == pytest.approx(69 / 70)
        assert sorted(result.report.f1) == ["a", "b"]

    def test_busy_servers_are_asked_again(self) -> None:
        refusals = iter([429, 503])

        def handler(request: httpx.Request) -> httpx.Response:
            status = next(refusals, None)
            return httpx.Response(status, headers={"Retry-After": "0"}) if status else answer(request)

        with client(handler) as http:
            assert evaluate(http, "toy", self.data).report.accuracy == 1.0

    def test_but_not_for_ever(self) -> None:
        asked = 0

        def handler(request: httpx.Request) -> httpx.Response:
            nonlocal asked
            asked += 1
            return httpx.Response(429, headers={"Retry-After": "0"}, json={"error": {"message": "the queue is full"}})

        with client(handler) as http, pytest.raises(AdapterdError, match="answered 429: the queue is full"):
            evaluate(http, "toy", self.data)
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
            evaluate(http, "toy", self.data)

    def test_one_version_is_measured(self) -> None:
        versions: Iterator[str] = iter([VERSION, VERSION, "cd" * 32])
        with (
            client(lambda request: answer(request, next(versions))) as http,
            pytest.raises(AdapterdError, match="another version of adapter 'toy' was released"),
        ):
            evaluate(http, "toy", self.data)


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
        assert summary["eval"]["accuracy"] == 1.0
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
