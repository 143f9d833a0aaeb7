"""AdapterHub's `adapters` is the reference: checkpoints as it saves them give the logits that it gives.

The checkpoints and its answers were made beforehand, since it needs an older transformers: see tests/fixtures.
"""

import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from helpers import build, run, tiny_backbone
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from server.adapters.activations import ACTIVATIONS
from server.backbone.backbone import Backbone
from server.convert import convert
from server.core import Encoding
from server.errors import InvalidAdapter
from server.store.formats import read_checkpoint
from server.tasks.adapter import TaskAdapter

FIXTURES = Path(__file__).parent / "fixtures"
TINY, REAL = FIXTURES / "adapterhub_tiny", FIXTURES / "adapterhub"

LOGITS, LOGITS_REAL = 2e-5, 1e-4
"""How far a logit may be off, on the tiny backbones and on the real one. Both sides compute in float32."""

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "deberta-v2", "gpt2", "llama")

REFUSED: dict[str, tuple[str, str]] = {
    "bert/act_prelu": ("non_linearity", "an activation with weights of its own"),
    "bert/act_xielu": ("non_linearity", "an activation with weights of its own"),
    "bert/loreft": ("architecture", "representations are no sites"),
    "deberta-v2/prefix_flat": ("method", "prefixes need the packed layout"),
    "deberta-v2/prefix_gate": ("method", "prefixes need the packed layout"),
    "gpt2/lora_gate": ("use_gating", "three gates in one layer"),
}
"""Cases that the server does not serve -> the option that it names, and why."""

Files = dict[str, bytes]


class Answers(NamedTuple):
    """What `adapters` answers, each text alone."""

    texts: list[Encoding]
    logits: list[Tensor]


class Checkpoint(NamedTuple):
    """One folder."""

    files: Files
    labels: list[str] | None
    """For checkpoints that name none."""
    answers: Answers


@cache
def checkpoints(family: str) -> dict[str, Checkpoint]:
    """The checkpoints of a family of tiny models by their names."""
    folders: dict[str, Files] = {}
    with zipfile.ZipFile(TINY / f"{family}.zip") as archive:
        for path in archive.namelist():
            case, _, file = path.partition("/")
            folders.setdefault(case, {})[file] = archive.read(path)
    return {case: _checkpoint(files) for case, files in folders.items() if case != "backbone"}


def _checkpoint(files: Files) -> Checkpoint:
    files = dict(files)
    expected = json.loads(files.pop("expected.json"))
    head = json.loads(files["head_config.json"])["config"]
    labels = None if head["label2id"] else [f"label {i}" for i in range(head["num_labels"])]
    texts = [Encoding(tuple(ids), (0,) * len(ids), truncated=False) for ids in expected["texts"]]
    return Checkpoint(files, labels, Answers(texts, [torch.tensor(logits) for logits in expected["logits"]]))


def hub_model(family: str) -> PreTrainedModel:
    """The tiny model that a family's checkpoints were made for."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(TINY / f"{family}.zip") as archive:
        for file in ("config.json", "model.safetensors"):
            (Path(folder) / file).write_bytes(archive.read(f"backbone/{file}"))
        model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=torch.float32)
        return model


@cache
def hub_backbone(family: str) -> Backbone:
    """A backbone over it; nobody may change it."""
    return tiny_backbone(family, model=hub_model(family))


EVERY = {f"{family}/{case}": checkpoint for family in FAMILIES for case, checkpoint in checkpoints(family).items()}
PICKLED = [name for name, checkpoint in EVERY.items() if "pytorch_adapter.bin" in checkpoint.files]
SERVED = [name for name in EVERY if name not in REFUSED and name not in PICKLED]


def named(name: str) -> tuple[Backbone, Checkpoint]:
    """The backbone and the checkpoint of `family/case`."""
    return hub_backbone(name.partition("/")[0]), EVERY[name]


def load(backbone: Backbone, checkpoint: Checkpoint) -> TaskAdapter:
    """The checkpoint's adapter, read as an upload is."""
    return build(read_checkpoint(checkpoint.files, checkpoint.labels, backbone), backbone)


def converted(files: Mapping[str, bytes], folder: Path) -> Files:
    """The files after `adapterd convert`."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    convert(source, target)
    return {path.name: path.read_bytes() for path in target.iterdir()}


def check(answers: Sequence[Tensor | None], expected: Sequence[Tensor], tolerance: float) -> None:
    for answer, reference in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, reference, rtol=0, atol=tolerance)


def check_parity(backbone: Backbone, checkpoint: Checkpoint) -> None:
    """Each text alone."""
    adapter, answers = load(backbone, checkpoint), checkpoint.answers
    check([run(backbone, [(text, adapter)])[0].logits for text in answers.texts], answers.logits, LOGITS)


# ------------------------------------------------------------------------------------------------------ tiny backbones


def test_the_tables_name_checkpoints_that_are_there() -> None:
    assert set(REFUSED) <= set(EVERY)
    assert not set(REFUSED) & set(PICKLED)
    assert len(SERVED) > 200
    assert {path.stem for path in TINY.glob("*.zip")} == set(FAMILIES)


@torch.inference_mode()
@pytest.mark.parametrize("name", SERVED)
def test_each_text_alone(name: str) -> None:
    check_parity(*named(name))


@torch.inference_mode()
@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_family_in_one_batch(family: str, by_text: bool) -> None:
    backbone = hub_backbone(family)
    rows, expected = [], []
    for name in SERVED:
        if name.startswith(f"{family}/"):
            checkpoint = EVERY[name]
            adapter = load(backbone, checkpoint)
            rows += [(text, adapter) for text in checkpoint.answers.texts]
            expected += checkpoint.answers.logits
    if by_text:  # neighbours belong to different adapters
        order = sorted(range(len(rows)), key=lambda index: (index % 4, index))
        rows, expected = [rows[index] for index in order], [expected[index] for index in order]
    bare = len(rows) // 2
    text = rows[bare][0]
    rows.insert(bare, (text, None))
    answers = run(backbone, rows)
    (alone,) = run(backbone, [(text, None)])
    torch.testing.assert_close(answers.pop(bare).states, alone.states, rtol=0, atol=LOGITS)
    check([answer.logits for answer in answers], expected, LOGITS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_the_options_name(name: str) -> None:
    option, _ = REFUSED[name]
    with pytest.raises(InvalidAdapter) as caught:
        load(*named(name))
    assert caught.value.param == option
    assert "support" in caught.value.message


def test_an_unsupported_activation_is_told_the_supported_ones() -> None:
    with pytest.raises(InvalidAdapter, match="prelu") as caught:
        load(*named("bert/act_prelu"))
    assert all(activation in caught.value.message for activation in ACTIVATIONS)


@torch.inference_mode()
@pytest.mark.parametrize("name", PICKLED)
def test_pickles_are_refused_and_served_after_conversion(name: str, tmp_path: Path) -> None:
    backbone, checkpoint = named(name)
    with pytest.raises(InvalidAdapter, match="adapterd convert") as caught:
        load(backbone, checkpoint)
    assert (caught.value.param, caught.value.error_code) == ("pytorch_adapter.bin", "bad_file")
    files = converted(checkpoint.files, tmp_path)
    assert set(files) == {"adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors"}
    check_parity(backbone, checkpoint._replace(files=files))


EVERY_METHOD = (
    "bert/seq_bn", "bert/double_seq_bn_inv", "bert/phm_own_fact_rule", "bert/lora_gate", "bert/dora", "bert/vera",
    "bert/ia3", "bert/ia3_gate", "bert/prefix_tuning", "bert/prefix_flat", "bert/prefix_gate", "bert/prompt_tuning",
    "bert/union_lora_inv", "bert/unipelt", "bert/gate_ln", "gpt2/lora_kv", "gpt2/ia3", "albert/par_bn",
)  # fmt: skip


def refusal(name: str, file: str, tensors: Mapping[str, Tensor]) -> InvalidAdapter:
    """Why a checkpoint with other tensors in a file is not served."""
    backbone, checkpoint = named(name)
    files = checkpoint.files | {file: safetensors.torch.save(dict(tensors))}
    with pytest.raises(InvalidAdapter) as caught:
        load(backbone, checkpoint._replace(files=files))
    return caught.value


@pytest.mark.parametrize("file", ["adapter.safetensors", "model_head.safetensors"])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_wrong_tensor_is_named(name: str, file: str) -> None:
    """Also one that is not in the artifact as it is in the file."""
    tensors = safetensors.torch.load(named(name)[1].files[file])
    for theirs, tensor in tensors.items():
        rest = {other: value for other, value in tensors.items() if other != theirs}
        if not any(torch.equal(tensor, value) for value in rest.values()):  # else it is there under two names
            missing = refusal(name, file, rest)
            assert missing.error_code == "missing_tensor"
            assert theirs.rpartition(".")[2] in missing.message
        poisoned = refusal(name, file, rest | {theirs: torch.full_like(tensor, float("nan"))})
        assert poisoned.error_code in ("not_finite", "contradiction")
        assert theirs in poisoned.message
        double = torch.cat([tensor, tensor])
        misshapen = refusal(name, file, rest | {theirs: double})
        assert misshapen.error_code in ("wrong_shape", "contradiction")
        if "shared_parameters" in theirs:
            continue  # it is held against others, and one of those may be named
        assert theirs in misshapen.message
        if misshapen.error_code == "wrong_shape":
            assert str(list(double.shape)) in misshapen.message
            assert str(list(tensor.shape)) in misshapen.message
    unused = refusal(name, file, tensors | {"extra": torch.zeros(2)})
    assert (unused.param, unused.error_code) == ("extra", "unused_tensor")


@pytest.mark.parametrize("name", ["bert/seq_bn", "bert/lora_ffn", "bert/ia3", "bert/dora", "bert/vera", "gpt2/lora"])
def test_a_layer_without_its_tensors_is_refused(name: str) -> None:
    tensors = safetensors.torch.load(named(name)[1].files["adapter.safetensors"])
    rest = {theirs: tensor for theirs, tensor in tensors.items() if ".1." not in theirs.partition("loras")[0]}
    assert 0 < len(rest) < len(tensors)
    assert refusal(name, "adapter.safetensors", rest).error_code == "missing_tensor"


# ------------------------------------------------------------------------------------------------------- real backbone


REAL_CASES = ("double_seq_bn", "ia3", "lora", "par_bn", "prefix_tuning", "prompt_tuning", "seq_bn")
REAL_PICKLED = ("double_seq_bn", "lora", "prefix_tuning")
PROMPT_TOKENS = {"prompt_tuning": 6}
"""Virtual tokens in front of a text, for which `adapters` gives tags as well."""


def real_checkpoint(case: str, minilm: Backbone) -> Checkpoint:
    files = {path.name: path.read_bytes() for path in (REAL / case).iterdir()}
    logits = json.loads(files.pop("expected.json"))["logits"]
    texts = minilm.tokenizer.encode(json.loads((REAL / "texts.json").read_text()), truncate=True)
    tensors = [torch.tensor(rows)[PROMPT_TOKENS.get(case, 0) :] for rows in logits]
    return Checkpoint(files, None, Answers(texts, tensors))


@torch.inference_mode()
def test_parity_on_the_real_backbone(minilm: Backbone, tmp_path: Path) -> None:
    assert {path.name for path in REAL.iterdir() if path.is_dir()} == set(REAL_CASES)
    rows, expected = [], []
    for case in REAL_CASES:
        checkpoint = real_checkpoint(case, minilm)
        if case in REAL_PICKLED:
            with pytest.raises(InvalidAdapter, match="adapterd convert"):
                load(minilm, checkpoint)
            folder = tmp_path / case
            folder.mkdir()
            checkpoint = checkpoint._replace(files=converted(checkpoint.files, folder))
        adapter = load(minilm, checkpoint)
        alone = [run(minilm, [(text, adapter)])[0].logits for text in checkpoint.answers.texts]
        check(alone, checkpoint.answers.logits, LOGITS_REAL)
        rows += [(text, adapter) for text in checkpoint.answers.texts]
        expected += checkpoint.answers.logits
    check([answer.logits for answer in run(minilm, rows)], expected, LOGITS_REAL)


def test_labels_are_the_checkpoints_own(minilm: Backbone) -> None:
    checkpoint = real_checkpoint("prompt_tuning", minilm)
    adapter = load(minilm, checkpoint)
    assert adapter.labels == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")  # by index, not by name
    assert adapter.task.name == "tagging"
    for case, task in (("seq_bn", "classification"), ("par_bn", "classification")):
        assert load(minilm, real_checkpoint(case, minilm)).task.name == task
