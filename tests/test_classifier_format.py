"""Whole models of transformers with a head: their bodies are the backbone, up to biases and norms, or are refused."""

import copy
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pytest
import safetensors.torch
import torch
from helpers import LABELS, build, random_text, run, tiny_backbone, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

from server.backbone.backbone import Backbone
from server.backbone.sites import FAMILIES
from server.convert import convert
from server.core import ClassifyOptions, Encoding, HeadKind, LabelDecision, Pooling
from server.errors import InvalidAdapter
from server.store.artifact import Artifact
from server.store.formats import read_checkpoint

CONFIG, TENSORS = "config.json", "model.safetensors"
LOGITS = 1e-5
VISIBLE = 1e-2
"""What every change to a body changes in a logit of every text, at least."""

TEXTS = tuple(random_text(length, seed=length) for length in (1, 2, 9, 30, 70))
POOLED = ("bert", "albert")
"""Families whose classifiers go through the backbone's own pooler."""

NO_BIASES = ("llama", "qwen3", "modernbert")
"""Families without a single bias in a linear layer of their bodies."""

BackboneOf = Callable[[str], Backbone]
Files = dict[str, bytes]


class Tuned(NamedTuple):
    """A classifier's folder, and what transformers answers with it."""

    files: Files
    logits: list[Tensor]


def classifier(family: str, labels: int, auto: Any = AutoModelForSequenceClassification) -> PreTrainedModel:
    """transformers' classifier over the weights of the tiny backbone, with a head that is not small."""
    base = tiny_model(family)
    config = copy.deepcopy(base.config)
    config.num_labels = labels
    with torch.random.fork_rng():
        torch.manual_seed(crc32(f"{family} {labels}".encode()))
        model = auto.from_config(config).eval()
        result = model.base_model.load_state_dict(base.state_dict(), strict=False)
        assert not result.missing_keys
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{model.base_model_prefix}."):
                parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    return model


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def nudge(model: PreTrainedModel, wanted: Callable[[str, nn.Module], bool], params: Sequence[str], seed: int) -> None:
    """As if these parameters of the body had been trained."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for name, module in model.base_model.named_modules():
        for param in params:
            if wanted(name, module) and getattr(module, param, None) is not None:
                value = getattr(module, param).data
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
                changed += 1
    assert changed


def tune_pooler(model: PreTrainedModel) -> None:
    nudge(model, lambda name, _: name.startswith("pooler"), ("weight", "bias"), seed=1)


NO_SITES = ("pos_key_proj", "pos_query_proj", "q_norm", "k_norm")
"""Modules that see rows of something other than tokens: relative positions that share one, or heads."""


def tune_biases(model: PreTrainedModel) -> None:
    def wanted(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | Conv1D) and "pooler" not in name and not name.endswith(NO_SITES)

    nudge(model, wanted, ("bias",), seed=2)


def tune_norms(model: PreTrainedModel) -> None:
    nudge(model, lambda name, module: is_norm(module) and not name.endswith(NO_SITES), ("weight", "bias"), seed=3)


TUNINGS: dict[str, tuple[tuple[Callable[[PreTrainedModel], None], ...], tuple[str, ...], tuple[str, ...]]] = {
    "head": ((), tuple(FAMILIES), ("head_only",)),
    "pooler": ((tune_pooler,), POOLED, ("head_only",)),
    "biases": ((tune_biases,), tuple(family for family in FAMILIES if family not in NO_BIASES), ("bitfit",)),
    "norms": ((tune_norms,), tuple(FAMILIES), ("ln_tuning",)),
    "biases and norms": (
        (tune_biases, tune_norms),
        tuple(family for family in FAMILIES if family not in NO_BIASES),
        ("bitfit", "ln_tuning"),
    ),
    "pooler and norms": ((tune_pooler, tune_norms), POOLED, ("ln_tuning",)),
}
"""What was trained beside the head: how, in which families, and our methods for it."""

AUTO = {
    HeadKind.SEQUENCE: AutoModelForSequenceClassification,
    HeadKind.TOKENS: AutoModelForTokenClassification,
    HeadKind.QUESTION: AutoModelForQuestionAnswering,
}
OF_TOKENS = (HeadKind.TOKENS, HeadKind.QUESTION)
TOKEN_TUNINGS = ("head", "biases", "norms", "biases and norms")
TOKEN_CASES = [
    (family, kind, tuning) for kind in OF_TOKENS for tuning in TOKEN_TUNINGS for family in TUNINGS[tuning][1]
]

CASES = [(family, tuning) for tuning, (_, families, _) in TUNINGS.items() for family in families]


def saved(model: PreTrainedModel) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@torch.no_grad()
def answers(model: PreTrainedModel) -> list[Tensor]:
    """The logits of each text: [labels], or [tokens, labels] of a head that reads tokens."""
    outputs = [model(input_ids=torch.tensor([text.ids])) for text in TEXTS]
    if "start_logits" in outputs[0]:
        return [torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1) for output in outputs]
    return [output.logits[0] for output in outputs]


def tuned(
    family: str, tuning: str = "head", labels: int = 3, kind: HeadKind = HeadKind.SEQUENCE, **config: Any
) -> Tuned:
    """A model with a head, saved and asked. `config` are further fields of its config."""
    model = classifier(family, 2 if kind is HeadKind.QUESTION else labels, AUTO[kind])
    bare = answers(model)
    for tune in TUNINGS[tuning][0]:
        tune(model)
    for field, value in config.items():
        setattr(model.config, field, value)
    logits = answers(model)
    if tuning != "head":
        assert all((one - other).abs().max() > VISIBLE for one, other in zip(bare, logits, strict=True))
    return Tuned(saved(model), logits)


def read(files: Mapping[str, bytes], backbone: Backbone, labels: Sequence[str] | None = LABELS[:3]) -> Artifact:
    return read_checkpoint(files, labels, backbone)


def methods(artifact: Artifact) -> tuple[str, ...]:
    return artifact.manifest.method, *(part.method for part in artifact.manifest.also)


def with_config(files: Files, **changes: Any) -> Files:
    """The files with other fields in config.json; `...` drops one."""
    document = {key: value for key, value in (json.loads(files[CONFIG]) | changes).items() if value is not ...}
    return files | {CONFIG: json.dumps(document).encode()}


def with_tensors(files: Files, edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Files:
    return files | {TENSORS: safetensors.torch.save(dict(edit(safetensors.torch.load(files[TENSORS]))))}


def refused(files: Mapping[str, bytes], backbone: Backbone, param: str, code: str, **kwargs: Any) -> str:
    with pytest.raises(InvalidAdapter) as caught:
        read(files, backbone, **kwargs)
    assert (caught.value.param, caught.value.error_code) == (param, code), caught.value.message
    return caught.value.message


def check(found: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
    for answer, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(answer, reference, rtol=0, atol=LOGITS)


# -------------------------------------------------------------------------------------------------------------- parity


@torch.inference_mode()
@pytest.mark.parametrize(("family", "tuning"), CASES)
def test_each_text_alone(family: str, tuning: str, backbone_of: BackboneOf) -> None:
    checkpoint, backbone = tuned(family, tuning), backbone_of(family)
    artifact = read(checkpoint.files, backbone)
    assert methods(artifact) == TUNINGS[tuning][2]
    assert artifact.manifest.backbone.fingerprint == backbone.spec.fingerprint
    assert artifact.manifest.source.startswith("transformers ")
    adapter = build(artifact, backbone)
    check([run(backbone, [(text, adapter)])[0].logits for text in TEXTS], checkpoint.logits)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_family_in_one_batch(family: str, backbone_of: BackboneOf) -> None:
    backbone = backbone_of(family)
    rows: list[tuple[Encoding, Any]] = []
    expected: list[Tensor] = []
    for index, tuning in enumerate(tuning for other, tuning in CASES if other == family):
        checkpoint = tuned(family, tuning, labels=2 + index % 4)
        adapter = build(read(checkpoint.files, backbone, LABELS[: 2 + index % 4]), backbone)
        rows += [(text, adapter) for text in TEXTS]
        expected += checkpoint.logits
    order = sorted(range(len(rows)), key=lambda index: (index % len(TEXTS), index))
    found = run(backbone, [rows[index] for index in order])
    check([answer.logits for answer in found], [expected[index] for index in order])


@pytest.mark.parametrize("family", POOLED)
def test_a_pooler_is_the_heads_only_where_it_is_not_the_backbones(family: str, backbone_of: BackboneOf) -> None:
    poolings = {}
    for tuning in ("head", "pooler"):
        manifest = read(tuned(family, tuning).files, backbone_of(family)).manifest
        poolings[tuning] = (manifest.head["pooling"], manifest.head.get("hidden_layers", 0))
    assert poolings == {"head": (Pooling.POOLER, 0), "pooler": (Pooling.CLS, 1)}


@torch.inference_mode()
@pytest.mark.parametrize("family", POOLED)
@pytest.mark.parametrize("tuning", ["pooler", "pooler and norms"])
def test_a_checkpoint_brings_the_pooler_that_the_backbone_lacks(family: str, tuning: str) -> None:
    model = tiny_model(family)
    model.pooler = None
    bare = tiny_backbone(family, model=model)
    assert Pooling.POOLER not in bare.spec.poolings
    checkpoint = tuned(family, tuning)
    adapter = build(read(checkpoint.files, bare), bare)
    check([run(bare, [(text, adapter)])[0].logits for text in TEXTS], checkpoint.logits)
    probe = with_tensors(checkpoint.files, lambda all: {n: t for n, t in all.items() if n.startswith("classifier")})
    refused(probe, bare, "pooling", "no_pooler")


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_probe_is_the_head_alone(family: str, backbone_of: BackboneOf) -> None:
    checkpoint, backbone = tuned(family), backbone_of(family)
    prefix = f"{backbone.spec.prefix}."
    probe = with_tensors(checkpoint.files, lambda all: {n: t for n, t in all.items() if not n.startswith(prefix)})
    assert len(probe[TENSORS]) < len(checkpoint.files[TENSORS]) / 5
    assert read(probe, backbone).version == read(checkpoint.files, backbone).version


# ------------------------------------------------------------------------------------------------------------ the body


@pytest.mark.parametrize("family", FAMILIES)
def test_another_body_is_refused_by_a_tensors_name(family: str, backbone_of: BackboneOf) -> None:
    checkpoint, backbone = tuned(family), backbone_of(family)
    kept = [name for name, tensor in safetensors.torch.load(checkpoint.files[TENSORS]).items() if tensor.ndim > 1]
    body = [name for name in kept if name.startswith(f"{backbone.spec.prefix}.") and "pooler" not in name]
    assert len(body) > 8
    for name in body[:: len(body) // 4]:
        files = with_tensors(checkpoint.files, lambda all, name=name: all | {name: all[name] + 1e-3})
        assert "0.001" in refused(files, backbone, name, "other_body")


def test_a_body_that_was_trained_as_a_whole_is_refused(bert: Backbone) -> None:
    model = classifier("bert", 3)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 1e-3)
    with pytest.raises(InvalidAdapter, match=r"bert\..*weight.*cannot share a backbone"):
        read(saved(model), bert)


@pytest.mark.parametrize(("family", "name"), [("deberta-v2", "pos_key_proj.bias"), ("qwen3", "q_norm.weight")])
def test_trained_biases_and_norms_that_no_adapter_can_replace_are_refused(
    family: str, name: str, backbone_of: BackboneOf
) -> None:
    checkpoint = tuned(family)
    (theirs, *_) = sorted(n for n in safetensors.torch.load(checkpoint.files[TENSORS]) if n.endswith(name))
    files = with_tensors(checkpoint.files, lambda all: all | {theirs: all[theirs] + 0.1})
    refused(files, backbone_of(family), theirs, "other_body")


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_body_is_refused(family: str, backbone_of: BackboneOf) -> None:
    checkpoint, backbone = tuned(family), backbone_of(family)
    prefix = f"{backbone.spec.prefix}."
    body = [name for name in safetensors.torch.load(checkpoint.files[TENSORS]) if name.startswith(prefix)]
    for name in sorted(body)[:: len(body) // 4]:
        if "pooler" in name:
            continue  # without it the head reads the backbone's
        files = with_tensors(checkpoint.files, lambda all, name=name: {n: t for n, t in all.items() if n != name})
        message = refused(files, backbone, name.removeprefix(prefix), "missing_tensor")
        assert "whole" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_head_is_needed(family: str, backbone_of: BackboneOf) -> None:
    checkpoint, backbone = tuned(family), backbone_of(family)
    names = safetensors.torch.load(checkpoint.files[TENSORS])
    head = [name for name in names if not name.startswith(f"{backbone.spec.prefix}.")]
    assert head
    for name in head:
        missing = with_tensors(checkpoint.files, lambda all, name=name: {n: t for n, t in all.items() if n != name})
        with pytest.raises(InvalidAdapter, match=re.escape(name)) as caught:
            read(missing, backbone)
        assert caught.value.error_code in ("missing_tensor", "missing_head")
        poisoned = with_tensors(checkpoint.files, lambda all, name=name: all | {name: all[name] * float("nan")})
        refused(poisoned, backbone, name, "not_finite")
        longer = with_tensors(checkpoint.files, lambda all, name=name: all | {name: all[name].repeat_interleave(2, -1)})
        message = refused(longer, backbone, name, "wrong_shape")
        assert str(list(names[name].shape)) in message
    extra = with_tensors(checkpoint.files, lambda all: all | {"extra": torch.zeros(1)})
    refused(extra, backbone, "extra", "unused_tensor")


@pytest.mark.parametrize("tuning", ["biases", "norms"])
def test_trained_tensors_of_the_body_are_checked(tuning: str, bert: Backbone) -> None:
    name = {"biases": "bert.encoder.layer.0.output.dense.bias", "norms": "bert.encoder.layer.1.output.LayerNorm.weight"}
    for value, code in ((float("nan"), "not_finite"), (float("inf"), "not_finite")):
        files = with_tensors(
            tuned("bert", tuning).files, lambda all, value=value: all | {name[tuning]: torch.full((32,), value)}
        )
        refused(files, bert, name[tuning], code)
    files = with_tensors(tuned("bert", tuning).files, lambda all: all | {name[tuning]: torch.zeros(31)})
    message = refused(files, bert, name[tuning], "wrong_shape")
    assert "[31]" in message
    assert "[32]" in message


def test_a_body_of_other_sizes_is_refused_with_both(bert: Backbone) -> None:
    files = with_tensors(
        tuned("bert").files, lambda all: all | {"bert.encoder.layer.0.intermediate.dense.weight": torch.zeros(64, 32)}
    )
    message = refused(files, bert, "bert.encoder.layer.0.intermediate.dense.weight", "wrong_shape")
    assert "[64, 32]" in message
    assert "[48, 32]" in message


def test_more_layers_than_the_backbone_are_refused(bert: Backbone) -> None:
    extra = "bert.encoder.layer.2.output.dense.bias"
    files = with_tensors(tuned("bert").files, lambda all: all | {extra: torch.zeros(32)})
    refused(files, bert, extra, "unused_tensor")


@torch.inference_mode()
def test_names_of_the_first_berts_and_their_buffers_are_read(bert: Backbone) -> None:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for tuning in ("head", "norms"):
        checkpoint = tuned("bert", tuning)

        def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            renamed = {}
            for name, tensor in tensors.items():
                tail = next((tail for tail in old if name.endswith(tail)), "")
                renamed[name.removesuffix(tail) + old.get(tail, "")] = tensor
            return renamed | {"bert.embeddings.position_ids": torch.arange(256)[None]}

        files = with_tensors(checkpoint.files, rename)
        assert b"LayerNorm.gamma" in files[TENSORS]
        assert b"LayerNorm.weight" not in files[TENSORS]
        adapter = build(read(files, bert), bert)
        check([run(bert, [(text, adapter)])[0].logits for text in TEXTS], checkpoint.logits)


@torch.inference_mode()
def test_names_without_the_models_prefix_are_read(bert: Backbone) -> None:
    checkpoint = tuned("bert", "norms")
    files = with_tensors(checkpoint.files, lambda all: {name.removeprefix("bert."): t for name, t in all.items()})
    assert read(files, bert).version == read(checkpoint.files, bert).version


# ------------------------------------------------------------------------------------------------- config.json, labels


@pytest.mark.parametrize(
    ("field", "value", "here"), [("model_type", "roberta", "bert"), ("hidden_size", 768, 32), ("hidden_size", "32", 32)]
)
def test_another_backbone_is_refused_with_both(field: str, value: Any, here: Any, bert: Backbone) -> None:
    message = refused(with_config(tuned("bert").files, **{field: value}), bert, field, "wrong_backbone")
    assert repr(str(value)) in message
    assert repr(here) in message


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("modernbert", {"classifier_pooling": "mean"}),
        ("modernbert", {"classifier_activation": "relu"}),
        ("deberta-v2", {"pooler_hidden_act": "relu"}),
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"num_attention_heads": 8}),
        ("bert", {"layer_norm_eps": 0.1}),
    ],
    ids=str,
)
def test_a_config_that_computes_otherwise_is_served_right_or_refused(
    family: str, options: dict, backbone_of: BackboneOf
) -> None:
    """The tensors are the same, and what is made of them is not."""
    model, backbone = classifier(family, 3), backbone_of(family)
    config = copy.deepcopy(model.config)
    for option, value in options.items():
        setattr(config, option, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    expected = answers(other)
    assert max((one - two).abs().max() for one, two in zip(expected, answers(model), strict=True)) > 1e-4
    refusal, adapter = None, None
    try:
        adapter = build(read(saved(other), backbone), backbone)
    except InvalidAdapter as error:
        refusal = error
    if refusal is not None:
        assert any(option in refusal.message for option in options)
        return
    check([run(backbone, [(text, adapter)])[0].logits for text in TEXTS], expected)


def test_a_real_classifier_of_another_family_is_refused(bert: Backbone) -> None:
    assert "electra" in refused(tuned("electra").files, bert, "model_type", "wrong_backbone")


def test_labels_come_from_the_config_a_side_file_or_the_upload(bert: Backbone) -> None:
    names = ["zinc", "argon", "neon"]
    checkpoint = tuned("bert", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    files = checkpoint.files

    def labels(files: Files, uploaded: Sequence[str] | None = None) -> tuple[str, ...]:
        return read(files, bert, uploaded).manifest.labels

    assert labels(files) == tuple(names)
    assert labels(with_config(files, id2label=...)) == tuple(names)  # label2id says the same
    side = {"labels.json": json.dumps(names[::-1]).encode()}
    assert labels(with_config(files, id2label=..., label2id=...) | side) == tuple(names[::-1])
    assert labels(files | side) == tuple(names[::-1])
    assert labels(files | side, LABELS[:3]) == LABELS[:3]
    unnamed = with_config(files, id2label=..., label2id=...)
    refused(unnamed, bert, "labels", "missing_labels", labels=None)
    for wrong in (b'["a", "b"]', b'["a", "b", "b"]', b'["a", "b", 3]'):
        refused(unnamed | {"labels.json": wrong}, bert, "labels", "invalid_labels", labels=None)
    for wrong in (b"{}", b'"abc"', b"[", b"null"):
        refused(unnamed | {"labels.json": wrong}, bert, "labels.json", "bad_file", labels=None)
    refused(files, bert, "labels", "invalid_labels", labels=["a", "b"])


PROBLEMS = [
    (None, 3, "classification"),
    (None, 1, "multi_label_classification"),
    ("single_label_classification", 3, "classification"),
    ("multi_label_classification", 3, "multi_label_classification"),
    ("multi_label_classification", 1, "multi_label_classification"),
    ("regression", 3, "regression"),
    ("regression", 1, "regression"),
]


class _Ids:
    """As much of a tokenizer as transformers' pipeline needs, for texts that are ids."""

    model_input_names = ["input_ids"]

    def __call__(self, text: str, **options: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([json.loads(text)])}


@torch.inference_mode()
@pytest.mark.parametrize(("problem", "labels", "task"), PROBLEMS)
def test_the_problem_type_chooses_the_task(
    problem: str | None, labels: int, task: str, bert: Backbone, tmp_path: Path
) -> None:
    """Scores are those of transformers' pipeline."""
    checkpoint = tuned("bert", labels=labels, problem_type=problem)
    for name, data in checkpoint.files.items():
        (tmp_path / name).write_bytes(data)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    theirs = pipeline("text-classification", model=model, tokenizer=_Ids(), device="cpu", top_k=None)
    artifact = read(checkpoint.files, bert, None)
    assert artifact.manifest.task == task
    adapter = build(artifact, bert)
    outputs = torch.stack([run(bert, [(text, adapter)])[0].logits for text in TEXTS])
    check(list(outputs), checkpoint.logits)
    for text, prediction in zip(TEXTS, adapter.decode(outputs, ClassifyOptions()), strict=True):
        (scores,) = theirs(json.dumps(text.ids))
        expected = {one["label"]: one["score"] for one in scores}
        assert len(expected) == labels
        assert {one.label: one.score for one in prediction} == pytest.approx(expected, abs=1e-5)
        assert isinstance(prediction[0], LabelDecision) == (task == "multi_label_classification")


def test_a_single_label_is_no_choice(bert: Backbone) -> None:
    files = with_config(tuned("bert", labels=1).files, problem_type="single_label_classification")
    assert "at least 2" in refused(files, bert, "labels", "invalid_labels", labels=LABELS[:1])


@pytest.mark.parametrize("problem", ["ranking", 3, ["regression"]])
def test_an_unknown_problem_type_is_refused(problem: Any, bert: Backbone) -> None:
    files = with_config(tuned("bert").files, problem_type=problem)
    message = refused(files, bert, "problem_type", "unsupported_option")
    assert "multi_label_classification, regression" in message


# ------------------------------------------------------------------------------------------------------ heads of tokens


@torch.inference_mode()
@pytest.mark.parametrize(("family", "kind", "tuning"), TOKEN_CASES)
def test_each_token_of_a_text_alone(family: str, kind: HeadKind, tuning: str, backbone_of: BackboneOf) -> None:
    checkpoint, backbone = tuned(family, tuning, kind=kind), backbone_of(family)
    artifact = read(checkpoint.files, backbone, LABELS[:3] if kind is HeadKind.TOKENS else None)
    assert methods(artifact) == TUNINGS[tuning][2]
    if kind is HeadKind.TOKENS:
        assert (artifact.manifest.task, artifact.manifest.labels) == ("tagging", LABELS[:3])
    else:
        assert (artifact.manifest.task, artifact.manifest.labels) == ("question_answering", ())
    adapter = build(artifact, backbone)
    assert all(
        logits.shape == (len(text), 3 - (kind is HeadKind.QUESTION))
        for text, logits in zip(TEXTS, checkpoint.logits, strict=True)
    )
    check([run(backbone, [(text, adapter)])[0].logits for text in TEXTS], checkpoint.logits)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_every_kind_in_one_batch(family: str, backbone_of: BackboneOf) -> None:
    backbone = backbone_of(family)
    rows: list[tuple[Encoding, Any]] = []
    expected: list[Tensor] = []
    for index, kind in enumerate(HeadKind):
        checkpoint = tuned(family, "norms" if index % 2 else "head", kind=kind)
        adapter = build(read(checkpoint.files, backbone, None), backbone)
        rows += [(text, adapter) for text in TEXTS]
        expected += checkpoint.logits
    order = sorted(range(len(rows)), key=lambda index: (index % len(TEXTS), index))
    found = run(backbone, [rows[index] for index in order])
    check([answer.logits for answer in found], [expected[index] for index in order])


@pytest.mark.parametrize("kind", OF_TOKENS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_head_of_tokens_is_needed(family: str, kind: HeadKind, backbone_of: BackboneOf) -> None:
    checkpoint, backbone = tuned(family, kind=kind), backbone_of(family)
    names = safetensors.torch.load(checkpoint.files[TENSORS])
    prefix = classifier(family, 2, AUTO[kind]).base_model_prefix
    head = [name for name in names if not name.startswith(f"{prefix}.")]
    assert len(head) >= 2
    for name in head:
        missing = with_tensors(checkpoint.files, lambda all, name=name: {n: t for n, t in all.items() if n != name})
        with pytest.raises(InvalidAdapter, match=re.escape(name)) as caught:
            read(missing, backbone, None)
        assert caught.value.error_code in ("missing_tensor", "missing_head")
        longer = with_tensors(checkpoint.files, lambda all, name=name: all | {name: all[name].repeat_interleave(2, -1)})
        refused(longer, backbone, name, "wrong_shape", labels=None)


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_a_pooler_that_heads_of_tokens_do_not_read_changes_nothing(kind: HeadKind, bert: Backbone) -> None:
    """Older versions of transformers stored one."""
    files = tuned("bert", kind=kind).files
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    with_pooler = with_tensors(files, lambda all: all | pooler)
    assert read(with_pooler, bert, None).version == read(files, bert, None).version


def test_labels_of_an_answerer_are_refused(bert: Backbone) -> None:
    message = refused(tuned("bert", kind=HeadKind.QUESTION).files, bert, "labels", "invalid_labels", labels=["a", "b"])
    assert "question answering" in message


def test_an_answerer_has_two_outputs(bert: Backbone) -> None:
    files = with_tensors(
        tuned("bert", kind=HeadKind.QUESTION).files,
        lambda all: all | {"qa_outputs.weight": torch.zeros(3, 32), "qa_outputs.bias": torch.zeros(3)},
    )
    assert "[3" in refused(files, bert, "qa_outputs.bias", "wrong_shape", labels=None)


def test_labels_of_a_token_classifier(bert: Backbone) -> None:
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    files = tuned("bert", kind=HeadKind.TOKENS, id2label=names).files
    assert read(files, bert, None).manifest.labels == ("O", "B-PER", "I-PER")
    refused(files, bert, "labels", "invalid_labels", labels=["a", "b"])


def test_models_that_do_something_else_are_refused(bert: Backbone) -> None:
    message = refused(saved(classifier("bert", 3, AutoModelForMaskedLM)), bert, "architectures", "unsupported_option")
    assert "ForMaskedLM" in message
    assert all(f"...For{kind}" in message for kind in HeadKind)


def test_a_bare_body_is_refused(bert: Backbone) -> None:
    files = saved(tiny_model("bert"))
    refused(files, bert, "architectures", "unsupported_option")
    refused(with_config(files, architectures=...), bert, "classifier.weight", "missing_tensor")


def test_a_pickle_is_refused_and_served_after_conversion(bert: Backbone, tmp_path: Path) -> None:
    checkpoint = tuned("bert", "biases and norms")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    torch.save(safetensors.torch.load(checkpoint.files[TENSORS]), source / "pytorch_model.bin")
    (source / CONFIG).write_bytes(checkpoint.files[CONFIG])
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert "adapterd convert" in refused(files, bert, "pytorch_model.bin", "bad_file")
    convert(source, target)
    converted = {path.name: path.read_bytes() for path in target.iterdir()}
    assert read(converted, bert).version == read(checkpoint.files, bert).version


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"null", b"[" * 100_000])
def test_a_broken_config(document: bytes, bert: Backbone) -> None:
    refused(tuned("bert").files | {CONFIG: document}, bert, CONFIG, "bad_file")


def test_the_class_is_not_taken_from_a_head_of_a_family_that_is_not_known(backbone_of: BackboneOf) -> None:
    model = classifier("mistral", 3)
    refused(saved(model), backbone_of("mistral"), "task_type", "unsupported_head")
