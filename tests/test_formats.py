"""What an uploader may send wrong: each refusal has its class and names the tensor, file or field at fault."""

import gzip
import io
import json
import random
import resource
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import (
    LABELS,
    VARIANTS,
    build,
    make_artifact,
    make_blueprint,
    peft_config,
    peft_files,
    peft_tensors,
    random_tensors,
    run,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_parity_adapterhub import checkpoints, hub_backbone
from torch import Tensor

from server.backbone.backbone import Backbone
from server.errors import AdapterdError, CorruptVersion, InvalidAdapter, TooLarge
from server.store.artifact import MAX_HEADER_BYTES, Artifact, Manifest, read_tensors
from server.store.formats import read_checkpoint
from server.store.formats.files import MAX_FILES, MAX_MEMBERS, gather
from server.store.formats.peft import TYPES
from server.tasks.adapter import Blueprint

NAMES = list(LABELS[:3])
LIMIT = 1 << 20
A = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
B = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"
HEAD = "base_model.model.classifier.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB, HUB_HEAD, HUB_HEAD_CONFIG = "adapter.safetensors", "model_head.safetensors", "head_config.json"
Files = dict[str, bytes]


@pytest.fixture(scope="session")
def native(bert: Backbone) -> Artifact:
    """A good adapter in our own format."""
    blueprint = make_blueprint(bert.spec, "lora", {"r": 2})
    return make_artifact(blueprint, random_tensors(blueprint, seed=0), golden={"texts": ["w1"], "outputs": [[1, 2, 3]]})


def refused(call: Callable[[], Any], param: str | None, code: str | None = None, kind: type = InvalidAdapter) -> str:
    """Asserts the error's class, what it names and its code; returns its message."""
    with pytest.raises(AdapterdError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error.message
    assert error.param == param, error.message
    if code is not None:
        assert error.error_code == code, error.message
    assert error.message
    (error.message + (error.param or "")).encode()  # an answer can carry it
    return error.message


def with_tensors(**changes: Tensor | None) -> Files:
    """Good files but for some tensors; None drops one."""
    tensors = peft_tensors() | changes
    return peft_files(tensors={name: tensor for name, tensor in tensors.items() if tensor is not None})


# ---------------------------------------------------------------------------------------------- PEFT, read_checkpoint


def test_a_good_peft_checkpoint_is_read_whole(bert: Backbone) -> None:
    artifact = read_checkpoint(peft_files(), NAMES, bert)
    assert artifact.manifest.method == "lora"
    assert artifact.manifest.labels == tuple(NAMES)
    assert artifact.manifest.backbone.name == "tiny-bert"
    assert artifact.manifest.source == "peft 0.18.0"
    theirs = peft_tensors()
    assert len(artifact.tensors) == len(theirs)
    assert torch.equal(artifact.tensors["head/classifier.weight"], theirs[HEAD])
    assert torch.equal(artifact.tensors["linear:encoder.layer.1.attention.self.query/lora_A"], theirs[A])
    assert torch.equal(artifact.tensors["linear:encoder.layer.1.attention.self.value/lora_B"], theirs[B])
    manifest = artifact.manifest
    Blueprint.check(
        method=manifest.method,
        config=manifest.config,
        task=manifest.task,
        head=manifest.head,
        labels=manifest.labels,
        spec=bert.spec,
    ).check_tensors(artifact.tensors)


def test_the_same_files_are_the_same_version(bert: Backbone) -> None:
    version = read_checkpoint(peft_files(), NAMES, bert).version
    assert read_checkpoint(peft_files(), NAMES, bert).version == version
    shuffled = dict(reversed(peft_tensors().items()))
    assert read_checkpoint(peft_files(tensors=shuffled), NAMES, bert).version == version
    assert read_checkpoint(peft_files(folder="a/b/"), NAMES, bert).version == version
    others = [
        read_checkpoint(peft_files(), NAMES[::-1], bert),
        read_checkpoint(peft_files(peft_config(lora_alpha=5)), NAMES, bert),
        read_checkpoint(with_tensors(**{A: peft_tensors()[A] + 1e-6}), NAMES, bert),
    ]
    assert len({version, *(other.version for other in others)}) == 4


@pytest.mark.parametrize("folder", ["", "checkpoint/", "a/b/c/"])
def test_a_folder_around_the_files_and_files_beside_them_do_not_matter(folder: str, bert: Backbone) -> None:
    files = peft_files(folder=folder)
    files |= {"README.md": b"", f"{folder}README.md": b"# hi", f"{folder}tokenizer.json": b"{", "__MACOSX/._x": b"\0"}
    files[f"{folder}deeper/{WEIGHTS}"] = b"not looked at"
    assert read_checkpoint(files, NAMES, bert).version == read_checkpoint(peft_files(), NAMES, bert).version


def test_names_without_the_models_prefix_are_read(bert: Backbone) -> None:
    tensors = {name.replace(".bert.", "."): tensor for name, tensor in peft_tensors().items()}
    artifact = read_checkpoint(peft_files(tensors=tensors), NAMES, bert)
    assert artifact.version == read_checkpoint(peft_files(), NAMES, bert).version


def test_labels_may_come_from_the_models_config(bert: Backbone) -> None:
    twelve = [f"l{i}" for i in range(12)]
    by_index = {str(index): label for index, label in sorted(enumerate(twelve), key=lambda pair: str(pair[0]))}
    files = peft_files(tensors=peft_tensors(labels=12)) | {"config.json": json.dumps({"id2label": by_index}).encode()}
    assert read_checkpoint(files, None, bert).manifest.labels == tuple(twelve)
    assert read_checkpoint(files, twelve[::-1], bert).manifest.labels == tuple(
        twelve[::-1]
    )  # the uploader's word counts


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        (None, "missing_labels"),
        ([], "invalid_labels"),
        (["a", "b"], "invalid_labels"),
        (["a", "b", "c", "d"], "invalid_labels"),
        (["a", "b", "a"], "invalid_labels"),
        (["a", "b", ""], "invalid_labels"),
        (["a", "b", "c" * 257], "invalid_labels"),
        (["a", "b", 3], "invalid_labels"),
        (["a", "b", "\ud800"], "invalid_labels"),
    ],
)
def test_wrong_labels(labels: Any, code: str, bert: Backbone) -> None:
    refused(lambda: read_checkpoint(peft_files(), labels, bert), "labels", code)


@pytest.mark.parametrize("id2label", [{}, {"0": "a"}, {"0": "a", "1": "a", "2": "b"}, {"0": {}, "1": [], "2": None}])
def test_wrong_labels_in_the_models_config(id2label: dict, bert: Backbone) -> None:
    files = peft_files() | {"config.json": json.dumps({"id2label": id2label}).encode()}
    refused(lambda: read_checkpoint(files, None, bert), "labels", "invalid_labels")


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"[" * 100_000])
def test_a_broken_model_config(document: bytes, bert: Backbone) -> None:
    refused(lambda: read_checkpoint(peft_files() | {"config.json": document}, None, bert), "config.json", "bad_file")


@pytest.mark.parametrize("document", [b'{"id2label": null}', b'{"id2label": ["a", "b", "c"]}', b"{}"])
def test_a_model_config_without_label_names(document: bytes, bert: Backbone) -> None:
    files = peft_files() | {"config.json": document}
    refused(lambda: read_checkpoint(files, None, bert), "labels", "missing_labels")


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("peft_type", "OFT", "unsupported_option"),
        ("peft_type", ..., "unsupported_option"),
        ("peft_type", ["LORA"], "unsupported_option"),
        ("task_type", "CAUSAL_LM", "unsupported_option"),
        ("task_type", ["SEQ_CLS"], "unsupported_option"),
        ("bias", "some", "unsupported_option"),
        ("bias", ["all"], "unsupported_option"),
        ("layer_replication", [[0, 2]], "unsupported_option"),
        ("trainable_token_indices", [1], "unsupported_option"),
        ("an_option_of_tomorrow", "yes", "unsupported_option"),
        ("init_lora_weights", "pissa", "unsupported_option"),
        ("init_lora_weights", "olora", "unsupported_option"),
        ("init_lora_weights", ["pissa"], "unsupported_option"),
        ("target_modules", ..., "unsupported_option"),
        ("target_modules", [], "unsupported_option"),
        ("target_modules", 7, "unsupported_option"),
        ("target_modules", {"query": 1}, "unsupported_option"),
        ("target_modules", [["query"], None, 3], "unsupported_option"),
        ("target_modules", "(", "unsupported_option"),
        ("target_modules", "", "unknown_target"),
        ("target_modules", ".*uery!", "unknown_target"),
        ("target_modules", ["q_proj", "v_proj"], "unknown_target"),
        ("target_modules", ["uery"], "unknown_target"),
        ("target_modules", ["LayerNorm"], "unknown_target"),
        ("exclude_modules", "(", "unsupported_option"),
        ("exclude_modules", 3, "unsupported_option"),
        ("exclude_modules", [None], "unsupported_option"),
        ("layers_to_transform", {"a": 1}, "unsupported_option"),
        ("layers_to_transform", "0", "unsupported_option"),
        ("rank_pattern", [1], "unsupported_option"),
        ("rank_pattern", {"(": 4}, "unsupported_option"),
        ("alpha_pattern", 7, "unsupported_option"),
        ("alpha_pattern", {"(": 4}, "unsupported_option"),
        ("use_rslora", "maybe", None),
        ("lora_bias", "maybe", None),
        ("r", 0, None),
        ("r", -1, None),
        ("r", 2.5, None),
        ("r", "two", None),
        ("r", 10**400, None),
        ("lora_alpha", 0, None),
        ("lora_alpha", float("inf"), None),
        ("lora_alpha", float("nan"), None),
        ("lora_alpha", 10**400, None),
    ],
)
def test_an_option_that_would_change_the_outputs(option: str, value: Any, code: str, bert: Backbone) -> None:
    files = peft_files(peft_config(**{option: value}))
    message = refused(lambda: read_checkpoint(files, NAMES, bert), option, code)
    assert option in message
    if value is not ... and code == "unsupported_option" and value != "(" and value != {"(": 4}:
        assert "supported" in message or "has to" in message


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [None, "two", [2], {}, float("nan"), float("inf"), 10**400])
def test_a_pattern_for_no_number_is_refused(field: str, value: Any, bert: Backbone) -> None:
    files = peft_files(peft_config(**{field: {"query": value}}))
    with pytest.raises(InvalidAdapter):
        read_checkpoint(files, NAMES, bert)


@pytest.mark.parametrize(
    ("option", "value", "param", "code"),
    [
        ("exclude_modules", ["query", "value"], "target_modules", "unknown_target"),
        ("layers_to_transform", 99, "target_modules", "unknown_target"),
        ("layers_to_transform", ["0"], "target_modules", "unknown_target"),
        ("exclude_modules", ["query"], A.replace(".1.", ".0."), "unused_tensor"),
        ("layers_to_transform", [0], A, "unused_tensor"),
        ("use_dora", True, A.replace(".1.", ".0.").replace("lora_A.weight", "lora_magnitude_vector"), "missing_tensor"),
        ("lora_bias", True, A.replace(".1.", ".0.").replace("lora_A.weight", "lora_B.bias"), "missing_tensor"),
        ("rank_pattern", {"query": 4}, A.replace(".1.", ".0."), "wrong_shape"),
        ("r", None, A.replace(".1.", ".0."), "wrong_shape"),  # PEFT's default, 8
        ("target_modules", "all-linear", None, "missing_tensor"),
        ("target_modules", ["query", "value", "pooler.dense"], None, "missing_tensor"),
    ],
)
def test_options_and_tensors_that_do_not_belong_together(
    option: str, value: Any, param: str | None, code: str, bert: Backbone
) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read_checkpoint(peft_files(peft_config(**{option: value})), NAMES, bert)
    assert caught.value.error_code == code, caught.value.message
    assert param is None or caught.value.param == param


HUGE = (10**6, 10**9, 10**18, 10**30)


@pytest.mark.parametrize("size", HUGE)
def test_huge_sizes_cost_nothing(size: int, bert: Backbone) -> None:
    """They are held against the tensors' shapes before anything of that size is made."""
    virtual = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": size}
    checks: list[tuple[Files, str | None]] = [
        (peft_files(peft_config(r=size)), "wrong_shape"),
        (peft_files(peft_config(rank_pattern={"query": size})), "wrong_shape"),
        (prompt_files(**virtual), None),
        (prompt_files(**virtual | {"peft_type": "PREFIX_TUNING"}), None),
        (prompt_files(**virtual | {"peft_type": "P_TUNING"}), None),
        (peft_files({"peft_type": "LOHA", "r": size, "target_modules": ["query"]}), None),
        (peft_files({"peft_type": "LOKR", "r": size, "decompose_factor": size, "target_modules": ["query"]}), None),
        *(
            (edited(case, **{option: size}), None)
            for case, option in (
                ("lora", "r"), ("prefix_tuning", "prefix_length"), ("prefix_tuning", "bottleneck_size"),
                ("prompt_tuning", "prompt_length"), ("compacter", "phm_dim"), ("compacter", "phm_rank"),
            )
        ),
    ]  # fmt: skip

    def read_all() -> None:
        for files, code in checks:
            with pytest.raises(InvalidAdapter) as caught:
                read_checkpoint(files, NAMES, hub_backbone("bert") if HUB in files else bert)
            assert code is None or caught.value.error_code == code

    with little_computing():
        assert peak_memory(read_all) < 64 * LIMIT


@pytest.mark.parametrize("size", [10**6, 10**9])
def test_projections_of_a_huge_rank_are_not_drawn(size: int, bert: Backbone) -> None:
    """VeRA's come from a seed; what they would take is known before."""
    tensors = {name: tensor for name, tensor in peft_tensors().items() if "lora" not in name}
    for layer in range(2):
        path = f"base_model.model.bert.encoder.layer.{layer}.attention.self.query"
        tensors |= {f"{path}.vera_lambda_b": torch.zeros(32), f"{path}.vera_lambda_d": torch.zeros(4)}
    config = {"peft_type": "VERA", "r": size, "target_modules": ["query"], "projection_prng_key": 0}
    for extra in ({}, {"base_model.vera_A": torch.zeros(4, 32), "base_model.vera_B": torch.zeros(32, 4)}):
        files = peft_files(config, tensors | extra)
        with little_computing(), pytest.raises(InvalidAdapter):
            read_checkpoint(files, NAMES, bert)


def prompt_files(**options: Any) -> Files:
    tensors = {"prompt_embeddings": torch.zeros(4, 32)}
    tensors |= {name.replace("model.model.", "model."): t for name, t in peft_tensors().items() if "lora" not in name}
    return peft_files({"task_type": "SEQ_CLS", **options}, tensors)


SLOW = r"(?:\w|[a-z]|\.){0,26}[A-Z]"
"""Tries two choices at each of 26 characters of every name."""

EVIL = {
    "exponential": r"(?:\w|\w|[a-z]|\.)*[A-Z]",
    "slow on every name": SLOW,
    "many groups": "(.*)" * 20 + "[A-Z]",
    "nested": r"(((.*)*)*)*[A-Z]",
    "bounded": "(?:.{0,9999}){0,9999}[A-Z]",
    "back references": r"(.*)(.*)\1\2\1\2[A-Z]",
    "deep": "(" * 3000 + ")" * 3000,
    "long": "q" * 1_000_000,
    "many alternatives": "|".join(f"(a{i})" for i in range(30_000)),
}


@pytest.mark.parametrize(
    ("option", "pattern"),
    [
        *((option, pattern) for option in ("target_modules", "rank_pattern") for pattern in EVIL),
        *((option, "exponential") for option in ("exclude_modules", "alpha_pattern")),
    ],
)
def test_a_pattern_takes_no_longer_than_a_second(option: str, pattern: str, bert: Backbone) -> None:
    value = EVIL[pattern]
    files = peft_files(peft_config(**{option: {value: 2} if option.endswith("pattern") else value}))
    harmless_within_a_second(lambda: read_checkpoint(files, NAMES, bert))


@pytest.mark.parametrize("pattern", ["a{9999999}", "((a{300}){300}){300}", "(a{1000}|b){1000}", "a{ 9999999 , }"])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_a_pattern_takes_no_more_memory_than_it_is_worth(option: str, pattern: str, bert: Backbone) -> None:
    """Repeats are copied when a pattern is compiled, which no time limit reaches."""
    value = {pattern: 2} if option == "rank_pattern" else pattern
    files = peft_files(peft_config(layers_to_transform=[0], **{option: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: read_checkpoint(files, NAMES, bert), option, "unsupported_option")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_many_patterns_take_no_longer_than_one(bert: Backbone) -> None:
    files = peft_files(peft_config(rank_pattern={f"{SLOW}{{{index},}}": 2 for index in range(1, 20)}))
    harmless_within_a_second(lambda: read_checkpoint(files, NAMES, bert))


@pytest.mark.parametrize("pattern", ["(", ")", "[", "*", "a{2,1}", "(?P<a>x)(?P<a>y)(", "\\", "(?<=", "\ud800["])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_what_is_no_pattern_is_said_to_be_none(pattern: str, option: str, bert: Backbone) -> None:
    value = {pattern: 2} if option.endswith("pattern") else pattern
    with pytest.raises(InvalidAdapter) as caught:
        read_checkpoint(peft_files(peft_config(**{option: value})), NAMES, bert)
    assert caught.value.param == option or caught.value.error_code == "bad_file"
    assert "regular expression" in caught.value.message or caught.value.error_code == "bad_file"


def harmless_within_a_second(call: Callable[[], Any]) -> None:
    with little_computing():
        harmless(call)


@contextmanager
def little_computing() -> Iterator[None]:
    """Fails where this process computes for much longer than a second, however busy the machine is with others."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": None, "auto_mapping": None, "megatron_config": None, "layers_pattern": None, "eva_config": None},
        {"init_lora_weights": "gaussian"},
        {"layers_to_transform": None, "exclude_modules": None, "lora_bias": False},
        {"peft_version": ...},
        {"base_model_name_or_path": None},
        {"task_type": ...},
        {"target_modules": ["query", "value", "not_in_this_model"]},
    ],
)
def test_options_that_change_nothing_are_accepted(changes: dict, bert: Backbone) -> None:
    artifact = read_checkpoint(peft_files(peft_config(**changes)), NAMES, bert)
    assert artifact.tensors.keys() == read_checkpoint(peft_files(), NAMES, bert).tensors.keys()


@pytest.mark.parametrize(
    "document",
    [b"", b"{", b"\xff\xfe", b"no", b"[]", b"null", b'"LORA"', b"[" * 100_000, b'{"a":' * 100_000, b'{"x": "\\ud800"}'],
)
def test_a_config_that_is_no_json_object(document: bytes, bert: Backbone) -> None:
    files = peft_files() | {CONFIG: document}
    refused(lambda: read_checkpoint(files, NAMES, bert), CONFIG, "bad_file")


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({A: None}, A, "missing_tensor"),
        ({HEAD: None}, HEAD, "missing_tensor"),
        ({"base_model.model.classifier.bias": None}, "base_model.model.classifier.bias", "missing_tensor"),
        ({"extra": torch.zeros(1)}, "extra", "unused_tensor"),
        ({f"{A}.more": torch.zeros(1)}, f"{A}.more", "unused_tensor"),
        ({A: torch.zeros(3, 32)}, A, "wrong_shape"),
        ({A: torch.zeros(32, 2)}, A, "wrong_shape"),
        ({A: torch.zeros(64)}, A, "wrong_shape"),
        ({A: torch.zeros(2, 0)}, A, "wrong_shape"),
        ({A: torch.tensor(1.0)}, A, "wrong_shape"),
        ({HEAD: torch.zeros(3, 64)}, HEAD, "wrong_shape"),
        ({A: torch.full((2, 32), float("nan"))}, A, "not_finite"),
        ({B: torch.full((32, 2), float("inf"))}, B, "not_finite"),
        ({HEAD: torch.full((3, 32), float("-inf"))}, HEAD, "not_finite"),
        ({A: torch.zeros(2, 32, dtype=torch.int64)}, A, "wrong_dtype"),
        ({A: torch.zeros(2, 32, dtype=torch.bool)}, A, "wrong_dtype"),
        ({A: torch.zeros(2, 32, dtype=torch.complex64)}, A, "wrong_dtype"),
        ({A: torch.zeros(2, 32, dtype=torch.float8_e4m3fn)}, A, "wrong_dtype"),
    ],
)
def test_a_wrong_tensor_is_named(changes: dict, param: str, code: str, bert: Backbone) -> None:
    message = refused(lambda: read_checkpoint(with_tensors(**changes), NAMES, bert), param, code)
    assert param in message


def test_one_nan_among_many_numbers_is_found(bert: Backbone) -> None:
    poisoned = peft_tensors()[B].clone()
    poisoned[31, 1] = float("nan")
    refused(lambda: read_checkpoint(with_tensors(**{B: poisoned}), NAMES, bert), B, "not_finite")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_is_accepted_as_it_is(dtype: torch.dtype, bert: Backbone) -> None:
    files = peft_files(tensors={name: tensor.to(dtype) for name, tensor in peft_tensors().items()})
    artifact = read_checkpoint(files, NAMES, bert)
    assert {tensor.dtype for tensor in artifact.tensors.values()} == {dtype}


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        (peft_tensors(layers=12), "unused_tensor"),
        (peft_tensors(layers=1), "missing_tensor"),
        (peft_tensors(hidden=64), "wrong_shape"),
        (peft_tensors(root="roberta.encoder"), "unused_tensor"),
        (
            {
                f"base_model.model.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_{part}.weight": torch.zeros(
                    2, 32
                )
                for part in "AB"
            },
            "unused_tensor",
        ),
    ],
)
def test_an_adapter_of_another_backbone_is_refused_by_a_tensors_name(tensors: dict, code: str, bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read_checkpoint(peft_files(tensors=tensors), NAMES, bert)
    assert caught.value.error_code == code
    assert caught.value.param in tensors or code == "missing_tensor"
    assert caught.value.param in caught.value.message


def test_the_head_of_another_family_is_refused(backbone_of: Callable[[str], Backbone]) -> None:
    for family, param in (("roberta", "base_model.model.classifier.dense.weight"), ("llama", None)):
        with pytest.raises(InvalidAdapter) as caught:
            read_checkpoint(peft_files(), NAMES, backbone_of(family))
        assert param is None or caught.value.error_code in ("missing_tensor", "unused_tensor")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_tensors(keep: int, bert: Backbone) -> None:
    files = peft_files()
    files[WEIGHTS] = files[WEIGHTS][:keep]
    refused(lambda: read_checkpoint(files, NAMES, bert), WEIGHTS, "bad_file")


def safetensors_file(header: Any, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"PK\x03\x04",
        struct.pack("<Q", 1 << 60) + b"{}",
        safetensors_file([]),
        safetensors_file({"a": 1}),
        safetensors_file({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 1]}}, b"1"),
        safetensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"),
        safetensors_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_file({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1"),
        safetensors_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_file({"a": {"dtype": "F32", "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}}),
        safetensors_file({"a": {"dtype": "F32", "shape": [1 << 63, 0], "data_offsets": [0, 0]}}),
        safetensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234more"),
    ],
)
def test_what_is_no_safetensors_file(data: bytes) -> None:
    message = refused(lambda: read_tensors("x.safetensors", data), "x.safetensors", "bad_file")
    assert "\n" not in message


def test_a_pickle_is_not_opened(bert: Backbone) -> None:
    files = {CONFIG: peft_files()[CONFIG], "adapter_model.bin": b"\x80\x04."}
    message = refused(lambda: read_checkpoint(files, NAMES, bert), "adapter_model.bin", "bad_file")
    assert "safe_serialization" in message
    assert "adapterd convert" in message


@pytest.mark.parametrize(
    ("files", "param", "code"),
    [
        ({}, "files", "unknown_format"),
        ({"README.md": b""}, "files", "unknown_format"),
        ({WEIGHTS: b""}, "files", "unknown_format"),
        ({f"x{CONFIG}": b"", "MANIFEST.JSON": b""}, "files", "unknown_format"),
        ({CONFIG: peft_files()[CONFIG]}, WEIGHTS, "missing_file"),
        ({f"a/{CONFIG}": peft_files()[CONFIG], f"b/{WEIGHTS}": b""}, WEIGHTS, "missing_file"),
        ({"config.json": b"{}"}, "model.safetensors", "missing_file"),
        ({"a/config.json": b"{}", "b/config.json": b"{}"}, "files", "unknown_format"),
        ({"manifest.json": b"{}"}, "adapter.safetensors", "missing_file"),
        (peft_files() | peft_files(folder="other/"), "files", "unknown_format"),
        (peft_files() | {"manifest.json": b"{}"}, "files", "unknown_format"),
    ],
)
def test_not_exactly_one_adapter(files: Files, param: str, code: str, bert: Backbone) -> None:
    labels = None if "manifest.json" in files else NAMES
    message = refused(lambda: read_checkpoint(files, labels, bert), param, code)
    assert code != "unknown_format" or "accepted" in message


# ------------------------------------------------------------------------------------------------------ AdapterHub


def edited(case: str, place: str = "config", **changes: Any) -> Files:
    """An AdapterHub checkpoint for the tiny BERT with other options; `...` drops one.

    `place` is `config`, the adapter's configuration, `top`, what is around it, or `head`.
    """
    files = checkpoints("bert")[case].files
    file = HUB_HEAD_CONFIG if place == "head" else CONFIG
    document = json.loads(files[file])
    options = document if place == "top" else document["config"]
    options |= changes
    for option in [option for option, value in options.items() if value is ...]:
        del options[option]
    return files | {file: json.dumps(document).encode()}


def read_hub(files: Files, labels: list[str] | None = None) -> Artifact:
    return read_checkpoint(files, labels, hub_backbone("bert"))


@pytest.mark.parametrize(
    ("case", "place", "option", "value", "supported"),
    [
        ("seq_bn", "config", "architecture", "reft", "prompt_tuning"),
        ("seq_bn", "config", "architecture", ["lora"], "prompt_tuning"),
        ("seq_bn", "config", "non_linearity", "selu", "gelu_new"),
        ("seq_bn", "config", "non_linearity", 3, None),
        ("seq_bn", "config", "scaling", "huge", None),
        ("seq_bn", "config", "residual_before_ln", "sometimes", None),
        ("seq_bn", "config", "reduction_factor", 0, None),
        ("seq_bn", "config", "reduction_factor", -2, None),
        ("seq_bn", "config", "reduction_factor", "four", None),
        ("seq_bn", "config", "an_option_of_tomorrow", True, "reduction_factor"),
        ("seq_bn_inv", "config", "inv_adapter", "glow", "nice"),
        ("lora", "config", "r", "four", "positive"),
        ("lora", "config", "r", 0, "positive"),
        ("lora", "config", "r", ..., "positive"),
        ("lora", "config", "an_option_of_tomorrow", {"a": 1}, "attn_matrices"),
        ("lora", "config", "composition_mode", "multiply", None),
        ("ia3", "config", "use_dora", True, "composition_mode"),
        ("prefix_tuning", "config", "prefix_length", None, "positive"),
        ("prefix_tuning", "config", "bottleneck_size", -1, "positive"),
        ("prefix_tuning", "config", "non_linearity", "prelu", "gelu_new"),
        ("prompt_tuning", "config", "prompt_length", 1.5, "positive"),
        ("prompt_tuning", "config", "combine", "suffix", None),
        ("mam", "config", "configs", None, "list"),
        ("mam", "config", "configs", ["lora"], "list"),
        ("seq_bn", "top", "config", "pfeiffer", "whole"),
        ("seq_bn", "head", "head_type", "dependency_parsing", "question_answering"),
        ("seq_bn", "head", "head_type", ["classification"], "tagging"),
        ("seq_bn", "head", "an_option_of_tomorrow", True, None),
        ("seq_bn", "head", "layers", 0, "1 to 16"),
        ("seq_bn", "head", "layers", 17, "1 to 16"),
        ("seq_bn", "head", "layers", "two", "1 to 16"),
        ("seq_bn", "head", "activation_function", "prelu", "gelu_new"),
    ],
)
def test_an_unsupported_option_of_adapterhub_is_named(
    case: str, place: str, option: str, value: Any, supported: str | None
) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read_hub(edited(case, place, **{option: value}))
    # a condition on several options has no option of its own
    assert str(caught.value.param).partition(".")[0] == option or f"a {option} has to be" in caught.value.message
    assert (HUB_HEAD_CONFIG if place == "head" else CONFIG) in caught.value.message
    if supported is not None:
        assert "supported: " in caught.value.message
        assert supported in caught.value.message.partition("supported: ")[2]


@pytest.mark.parametrize(
    ("place", "field", "value", "here"),
    [
        ("top", "model_type", "roberta", "'bert'"),
        ("top", "hidden_size", 768, "32"),
        ("top", "model_type", None, "'bert'"),
    ],
)
def test_an_adapterhub_checkpoint_of_another_backbone(place: str, field: str, value: Any, here: str) -> None:
    message = refused(lambda: read_hub(edited("seq_bn", place, **{field: value})), field, "wrong_backbone")
    assert here in message
    assert str(value) in message


def test_an_adapterhub_checkpoint_of_another_family_is_refused(backbone_of: Callable[[str], Backbone]) -> None:
    files = checkpoints("roberta")["lora"].files
    refused(lambda: read_hub(files), "model_type", "wrong_backbone")
    renamed = edited("lora", "top", model_type="mistral")
    refused(lambda: read_checkpoint(renamed, None, backbone_of("mistral")), "model_type", "unsupported_method")


@pytest.mark.parametrize(
    ("drop", "param"),
    [(HUB, HUB), (HUB_HEAD, HUB_HEAD), (HUB_HEAD_CONFIG, HUB_HEAD_CONFIG)],
)
def test_an_adapterhub_folder_without_one_of_its_files(drop: str, param: str) -> None:
    files = {name: data for name, data in checkpoints("bert")["seq_bn"].files.items() if name != drop}
    refused(lambda: read_hub(files), param, "missing_file")


def test_one_tensor_in_both_files_of_an_adapterhub_folder() -> None:
    files = checkpoints("bert")["seq_bn"].files
    head = safetensors.torch.load(files[HUB_HEAD])
    both = safetensors.torch.load(files[HUB]) | head
    refused(lambda: read_hub(files | {HUB: safetensors.torch.save(both)}), min(head), "contradiction")


@pytest.mark.parametrize("label2id", [{"a": 1, "b": 2, "c": 3}, {"a": 0, "b": 0, "c": 1}, {"a": 0, "b": "x", "c": []}])
def test_labels_of_an_adapterhub_head_that_are_not_numbered(label2id: dict) -> None:
    refused(lambda: read_hub(edited("seq_bn", "head", label2id=label2id)), "label2id")


@torch.inference_mode()
def test_an_adapterhub_head_of_one_output_measures() -> None:
    checkpoint = checkpoints("bert")["head_l1"]
    artifact = read_hub(checkpoint.files, checkpoint.labels)
    assert (artifact.manifest.task, len(artifact.manifest.labels)) == ("regression", 1)


@torch.inference_mode()
def test_an_adapterhub_head_for_answers_reads_tokens() -> None:
    """The library builds it as it builds one for tags, with two outputs."""
    checkpoint = checkpoints("bert")["head_tagging2"]
    head = safetensors.torch.load(checkpoint.files[HUB_HEAD])
    last = max(head, key=lambda name: (int(name.split(".")[2]), name)).rpartition(".")[0]
    head |= {name: tensor[:2] for name, tensor in head.items() if name.startswith(f"{last}.")}
    changes = {"head_type": "question_answering", "num_labels": 2}
    files = edited("head_tagging2", "head", **changes) | {HUB_HEAD: safetensors.torch.save(head)}
    refused(lambda: read_hub(files, ["start", "end"]), "labels", "invalid_labels")
    artifact = read_hub(files)
    assert (artifact.manifest.task, artifact.manifest.labels) == ("question_answering", ())
    backbone = hub_backbone("bert")
    adapter = build(artifact, backbone)
    for text, logits in zip(checkpoint.answers.texts, checkpoint.answers.logits, strict=True):
        found = run(backbone, [(text, adapter)])[0].logits
        torch.testing.assert_close(found, logits[:, :2], rtol=0, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("case", ["seq_bn", "lora", "prefix_tuning", "ia3", "mam"])
def test_an_adapterhub_folder_without_a_head_gives_vectors(case: str) -> None:
    files = checkpoints("bert")[case].files
    bare = {name: data for name, data in files.items() if name not in (HUB_HEAD, HUB_HEAD_CONFIG)}
    message = refused(lambda: read_hub(bare, NAMES), HUB_HEAD_CONFIG, "missing_file")
    assert "with_head=True" in message
    artifact = read_hub(bare)
    manifest = artifact.manifest
    assert (manifest.task, manifest.head, manifest.labels) == ("embedding", {"pooling": "mean", "normalize": True}, ())
    backbone = hub_backbone("bert")
    with_head, without = build(read_hub(files), backbone), build(artifact, backbone)
    for text in checkpoints("bert")[case].answers.texts:
        one, other = run(backbone, [(text, with_head), (text, without)])
        torch.testing.assert_close(one.states, other.states, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.logits, other.states.mean(0), rtol=0, atol=1e-6)


def test_labels_of_an_adapterhub_head_may_come_from_elsewhere() -> None:
    files = edited("seq_bn", "head", label2id=None)
    refused(lambda: read_hub(files), "labels", "missing_labels")
    refused(lambda: read_hub(files, ["a", "b"]), "labels", "invalid_labels")
    assert read_hub(files, NAMES).manifest.labels == tuple(NAMES)
    side = {"labels.json": json.dumps(NAMES[::-1]).encode()}
    assert read_hub(files | side).manifest.labels == tuple(NAMES[::-1])


def test_the_same_adapterhub_files_are_the_same_version() -> None:
    files = checkpoints("bert")["mam"].files
    version = read_hub(files).version
    assert read_hub({f"run/{path}": data for path, data in reversed(files.items())}).version == version
    assert [part.method for part in read_hub(files).manifest.also] == ["bottleneck"]


HUB_CASES = ("seq_bn", "double_seq_bn_inv", "compacter", "lora", "vera", "dora", "ia3", "ia3_gate", "prefix_tuning",
             "prefix_flat", "prefix_gate", "prompt_tuning", "mam", "unipelt", "union_lora_inv", "legacy_lang",
             "legacy_lora", "head_tagging2", "head_multilabel")  # fmt: skip
FOREIGN = ("an_option_of_tomorrow", "phm_layer", "use_dora", "vera_d", "invertible_adapter", "id2label", "peft_type")
ODD = (
    ..., None, True, False, 0, -1, 1, 3, 1.5, 10**30, float("nan"), float("inf"), 1e-320, "", "relu", "\ud800", [],
    [0], [[1]], ["q"], [10**30], {}, {"a": 1}, {"default": 0}, {"0": "x", "default": 1}, {"a": 0, "b": 0},
    {"a": [], "b": {}},
)  # fmt: skip


@pytest.mark.parametrize("place", ["top", "config", "head"])
@pytest.mark.parametrize("case", HUB_CASES)
def test_odd_values_of_every_adapterhub_field_harm_nothing(case: str, place: str) -> None:
    document = json.loads(checkpoints("bert")[case].files[HUB_HEAD_CONFIG if place == "head" else CONFIG])
    fields = [*(document if place == "top" else document["config"]), *FOREIGN]
    rng = random.Random(f"{case} {place}")
    for field in fields:
        for value in rng.sample(ODD, 6):
            harmless(lambda field=field, value=value: read_hub(edited(case, place, **{field: value})))


@pytest.mark.parametrize(
    ("case", "place", "field", "value"),
    [
        ("double_seq_bn_inv", "top", "name", ...),
        ("mam", "config", "configs", []),
        ("ia3", "config", "alpha", None),
        ("ia3", "config", "alpha", 10**30),
        ("ia3", "config", "alpha", "1"),
        ("ia3", "config", "alpha", {}),
        ("ia3", "config", "alpha", float("nan")),
        ("lora", "config", "alpha", float("nan")),
        ("lora", "config", "alpha", None),
    ],
)
def test_values_that_fuzzing_found(case: str, place: str, field: str, value: Any) -> None:
    harmless(lambda: read_hub(edited(case, place, **{field: value})))


# ------------------------------------------------------------------------------------------------- our own artifact


def native_files(artifact: Artifact) -> Files:
    return {"manifest.json": artifact.manifest_bytes, "adapter.safetensors": artifact.tensor_bytes}


def test_our_own_format_keeps_its_bytes_and_its_version(native: Artifact, bert: Backbone) -> None:
    read = read_checkpoint({f"x/{path}": data for path, data in native_files(native).items()}, None, bert)
    assert read.version == native.version
    assert (read.manifest_bytes, read.tensor_bytes) == (native.manifest_bytes, native.tensor_bytes)
    assert read.manifest == native.manifest


def test_labels_beside_a_manifest_are_refused(native: Artifact, bert: Backbone) -> None:
    refused(lambda: read_checkpoint(native_files(native), NAMES, bert), "labels")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"format": 2}, "format"),
        ({"format": "1"}, "format"),
        ({"method": ...}, "method"),
        ({"method": 3}, "method"),
        ({"labels": ...}, "labels"),
        ({"labels": ["a", "a"]}, "labels"),
        ({"labels": ["a", ""]}, "labels.1"),
        ({"labels": "ab"}, "labels"),
        ({"config": []}, "config"),
        ({"source": None}, "source"),
        ({"surprise": 1}, "surprise"),
        ({"backbone": {"surprise": 1}}, "backbone.surprise"),
        ({"backbone": {"num_layers": "many"}}, "backbone.num_layers"),
        ({"golden": {"texts": [], "outputs": []}}, "golden.texts"),
        ({"golden": {"texts": ["a"], "outputs": [["x"]]}}, "golden.outputs.0.0"),
        ({"training": {}}, "training.data_sha256"),
    ],
)
def test_a_wrong_manifest_field_is_named(changes: dict, param: str, native: Artifact) -> None:
    document = {key: value for key, value in (json.loads(native.manifest_bytes) | changes).items() if value is not ...}
    message = refused(lambda: Artifact.parse(json.dumps(document).encode(), native.tensor_bytes), param)
    assert message.startswith("manifest.json")


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"config":' * 100_000])
def test_a_manifest_that_is_no_json_object(document: bytes, native: Artifact) -> None:
    refused(lambda: Artifact.parse(document, native.tensor_bytes), "manifest.json")


def test_broken_tensors_beside_a_good_manifest(native: Artifact) -> None:
    refused(lambda: Artifact.parse(native.manifest_bytes, native.tensor_bytes[:-1]), "adapter.safetensors", "bad_file")


def test_a_version_is_a_digest_of_both_files(native: Artifact) -> None:
    assert Artifact.verify(native.version, native.manifest_bytes, native.tensor_bytes).version == native.version
    spaced = native.manifest_bytes + b" "  # the same manifest in other bytes
    nudged = native.tensor_bytes[:-1] + bytes([native.tensor_bytes[-1] ^ 1])
    for manifest, tensors in ((spaced, native.tensor_bytes), (native.manifest_bytes, nudged), (b"", b"")):
        message = refused(
            lambda manifest=manifest, tensors=tensors: Artifact.verify(native.version, manifest, tensors),
            None,
            "corrupt_version",
            CorruptVersion,
        )
        assert native.version in message
    assert native.version == native.version.lower()
    assert len(native.version) == 64


def test_a_version_does_not_depend_on_the_order_of_tensors_or_fields(native: Artifact) -> None:
    shuffled = dict(reversed(native.tensors.items()))
    fields = native.manifest.model_dump()
    fields["config"] = dict(reversed(fields["config"].items()))
    manifest = Manifest.model_validate(dict(reversed(fields.items())))
    assert list(manifest.config) != list(native.manifest.config)
    assert Artifact.build(manifest, shuffled).version == native.version


# ------------------------------------------------------------------------------------------------------- Blueprint


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"method": "lorax"}, "method", "unsupported_method"),
        ({"task": "poetry"}, "task", "unsupported_task"),
        ({"config": {"target_modules": ["query"], "use_dora": True}}, "config.use_dora", "unsupported_option"),
        ({"config": {}}, "config.target_modules", "unsupported_option"),
        ({"config": {"target_modules": []}}, "config.target_modules", "unsupported_option"),
        ({"config": {"target_modules": ["nope"]}}, "target_modules", "unknown_target"),
        ({"config": {"target_modules": ["query"], "r": 0}}, "config.r", "unsupported_option"),
        ({"method": "bottleneck", "config": {"reduction_factor": 0}}, "config.reduction_factor", "unsupported_option"),
        (
            {"method": "bottleneck", "config": {"reduction_factor": 1e-320}},
            "config.reduction_factor",
            "unsupported_option",
        ),
        ({"method": "bottleneck", "config": {"non_linearity": "prelu"}}, "config.non_linearity", "unsupported_option"),
        ({"method": "bottleneck", "config": {"output_adapter": False}}, "config", "unsupported_option"),
        ({"head": {"pooling": "max"}}, "head.pooling", "unsupported_option"),
        ({"head": {"dropout": 0.1}}, "head.dropout", "unsupported_option"),
        ({"labels": ["only"]}, "labels", "invalid_labels"),
        ({"labels": []}, "labels", "invalid_labels"),
    ],
)
def test_a_wrong_blueprint_names_the_field(changes: dict, param: str, code: str, bert: Backbone) -> None:
    good = {
        "method": "lora",
        "config": {"target_modules": ["query"]},
        "task": "classification",
        "head": {},
        "labels": NAMES,
    }
    Blueprint.check(**good, spec=bert.spec)
    refused(lambda: Blueprint.check(**good | changes, spec=bert.spec), param, code)


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_every_tensor_of_every_method_is_needed(method: str, options: dict, bert: Backbone) -> None:
    blueprint = make_blueprint(bert.spec, method, options)
    tensors = random_tensors(blueprint, seed=0)
    blueprint.check_tensors(tensors)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        refused(lambda rest=rest: blueprint.check_tensors(rest), name, "missing_tensor")
        poisoned = tensors | {name: tensors[name] * float("nan")}
        refused(lambda poisoned=poisoned: blueprint.check_tensors(poisoned), name, "not_finite")
        longer = tensors | {name: torch.cat([tensors[name], tensors[name]])}
        refused(lambda longer=longer: blueprint.check_tensors(longer), name, "wrong_shape")


# ------------------------------------------------------------------------------------------------- uploads, gather


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(*members: tuple[tarfile.TarInfo | str, bytes], **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", **kwargs) as archive:
        for info, data in members:
            member = tarfile.TarInfo(info) if isinstance(info, str) else info
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def special(kind: bytes, name: str = "x", target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_loose_files_and_every_archive_give_the_same(bert: Backbone) -> None:
    files = peft_files(folder="run-7/")
    expected = read_checkpoint(files, NAMES, bert).version
    folder = special(tarfile.DIRTYPE, "run-7/")
    uploads = [
        [(name, data) for name, data in files.items()],
        *(
            [("a.zip", zipped(files | {"run-7/": b"", "empty/": b""}, compression))]
            for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        ),
        *([(name, tarred((folder, b""), *files.items()))] for name in ("a.tar.gz", "a.tgz", "A.TGZ")),
        [("adapter_config.json", files[f"run-7/{CONFIG}"]), ("w.zip", zipped({WEIGHTS: files[f"run-7/{WEIGHTS}"]}))],
    ]
    for upload in uploads:
        assert read_checkpoint(gather(upload, LIMIT), NAMES, bert).version == expected


UNSAFE = ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a\\..\\b", "C:\\x", "a\0b", "//x"]


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_file_name(name: str) -> None:
    refused(lambda: gather([(name, b"")], LIMIT), name or "files", "unsafe_path")


def test_a_file_name_that_is_no_text() -> None:
    refused(lambda: gather([("\ud800", b""), ("\ud800", b"")], LIMIT), "?", "unsafe_path")
    refused(lambda: gather([("../\ud800", b"")], LIMIT), "../?", "unsafe_path")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "a\\..\\b"])
def test_an_unsafe_name_in_an_archive(name: str) -> None:
    refused(lambda: gather([("a.zip", zipped({name: b""}))], LIMIT), name, "unsafe_path")
    refused(lambda: gather([("a.tgz", tarred((name, b"")))], LIMIT), name, "unsafe_path")


def test_an_empty_name_in_a_zip() -> None:
    broken = bytearray(zipped({"x": b"1"}))
    for signature, offset in ((b"PK\x03\x04", 26), (b"PK\x01\x02", 28)):
        at = broken.index(signature)
        broken[at + offset] = 0  # the name's length
        del broken[broken.index(b"x", at)]
    struct.pack_into("<I", broken, broken.index(b"PK\x05\x06") + 16, broken.index(b"PK\x01\x02"))
    refused(lambda: gather([("a.zip", bytes(broken))], LIMIT), "a.zip", "bad_file")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_a_tar_may_hold_nothing_but_files_and_folders(kind: bytes) -> None:
    refused(lambda: gather([("a.tgz", tarred((special(kind), b"")))], LIMIT), "x", "bad_file")


def test_a_symlink_in_a_zip_is_only_its_text() -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert gather([("a.zip", buffer.getvalue())], LIMIT) == {"link": b"/etc/passwd"}


def test_a_name_in_a_tar_that_is_not_unicode() -> None:
    data = tarred(("../\xff", b""), format=tarfile.USTAR_FORMAT, encoding="latin-1")
    refused(lambda: gather([("a.tgz", data)], LIMIT), "a.tgz", "bad_file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_file_twice() -> None:
    refused(lambda: gather([("x", b"1"), ("x", b"1")], LIMIT), "x", "bad_file")
    refused(lambda: gather([("x", b"1"), ("./x", b"2")], LIMIT), "x", "bad_file")
    refused(lambda: gather([("a.tgz", tarred(("x", b"1"), ("x", b"2")))], LIMIT), "x", "bad_file")
    refused(lambda: gather([("x", b""), ("a.zip", zipped({"x": b""}))], LIMIT), "x", "bad_file")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", b"1")
        archive.writestr("x", b"2")
    refused(lambda: gather([("a.zip", buffer.getvalue())], LIMIT), "x", "bad_file")


def test_too_many_files() -> None:
    assert len(gather([(str(i), b"") for i in range(MAX_FILES)], LIMIT)) == MAX_FILES
    many = {str(i): b"" for i in range(MAX_FILES + 1)}
    refused(lambda: gather(list(many.items()), LIMIT), "files", "bad_file")
    refused(lambda: gather([("a.zip", zipped(many))], LIMIT), "files", "bad_file")
    refused(lambda: gather([("a.tgz", tarred(*many.items()))], LIMIT), "files", "bad_file")


def too_large(uploads: list[tuple[str, bytes]], limit: int) -> None:
    refused(lambda: gather(uploads, limit), "files", "too_large", TooLarge)


def test_contents_over_the_limit() -> None:
    uploads = [("a", b"12345"), ("z.zip", zipped({"b": b"12345", "c": b"12345"})), ("t.tgz", tarred(("d", b"12345")))]
    assert set(gather(uploads, 20)) == {"a", "b", "c", "d"}
    too_large(uploads, 19)
    too_large([("a", b"123456")], 5)
    two = {"b": b"12345", "c": b"12345"}
    for name, data in (("z.zip", zipped(two)), ("t.tgz", tarred(*two.items()))):
        assert gather([(name, data)], 10) == two
        too_large([(name, data)], 9)
    for name, data in uploads[1:]:
        too_large([(name, data)], 4)


def peak_memory(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_is_not_unpacked() -> None:
    bomb = zipped({"x": bytes(32 * LIMIT)})
    assert len(bomb) < LIMIT / 16
    assert peak_memory(lambda: too_large([("a.zip", bomb)], LIMIT)) < 8 * LIMIT


def test_a_zip_of_a_million_members_is_not_listed() -> None:
    entry = zipped({"a/": b""})
    start = entry.index(b"PK\1\2")
    directory = entry[start : entry.index(b"PK\5\6")] * 1_000_000
    count = (0xFFFF).to_bytes(2, "little")  # more do not fit; zipfile goes by the size
    sizes = len(directory).to_bytes(4, "little") + start.to_bytes(4, "little")
    data = entry[:start] + directory + b"PK\5\6" + bytes(4) + count + count + sizes + bytes(2)
    assert peak_memory(lambda: refused(lambda: gather([("a.zip", data)], 1 << 30), "files", "bad_file")) < 1_000_000


def test_a_tar_of_many_folders_is_not_listed() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("a")
        member.type = tarfile.DIRTYPE
        for _ in range(MAX_MEMBERS + 1):
            archive.addfile(member)
    refused(lambda: gather([("a.tgz", buffer.getvalue())], 1 << 30), "files", "bad_file")


def test_a_header_of_many_megabytes_is_not_parsed() -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    data = safetensors_file({f"{index:0100}": empty for index in range(110_000)})
    assert len(data) > MAX_HEADER_BYTES
    message = refused(lambda: read_tensors("x.safetensors", data), "x.safetensors", "bad_file")
    assert "header" in message


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_unpack_without_bounds_are_refused(compression: int) -> None:
    bomb = zipped({"x": bytes(32 * LIMIT)}, compression)
    assert peak_memory(lambda: refused(lambda: gather([("a.zip", bomb)], LIMIT), "x", "bad_file")) < LIMIT


def test_a_zip_that_lies_about_its_sizes() -> None:
    data = bytearray(zipped({"x": bytes(4 * LIMIT)}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = struct.pack("<I", 10)
    with pytest.raises((InvalidAdapter, TooLarge)):
        gather([("a.zip", bytes(data))], LIMIT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_tar_bomb_is_not_unpacked(kind: bytes) -> None:
    """Headers of any size included: tarfile itself would read a long name whole."""
    info = special(kind)
    info.size = 32 * LIMIT
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=1) as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(32):
            stream.write(b"a" * LIMIT)
        stream.write(tarfile.TarInfo("y").tobuf() + bytes(1024))
    bomb = buffer.getvalue()
    assert len(bomb) < LIMIT
    assert peak_memory(lambda: too_large([("a.tgz", bomb)], LIMIT)) < 12 * LIMIT


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(10),
        b"\x1f\x8b",
        gzip.compress(b"not a tar" * 100, mtime=0),  # without the time: the test's name has it
        bytes(1024),
    ],
)
def test_a_broken_archive(name: str, data: bytes) -> None:
    refused(lambda: gather([(name, data)], LIMIT), name, "bad_file")


def test_an_encrypted_zip() -> None:
    data = bytearray(zipped({"x": b"secret"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    refused(lambda: gather([("a.zip", bytes(data))], LIMIT), "a.zip", "bad_file")


def test_a_zip_whose_content_does_not_match_its_checksum() -> None:
    data = bytearray(zipped({"x": b"some content"}, zipfile.ZIP_STORED))
    data[data.index(b"some")] ^= 1
    refused(lambda: gather([("a.zip", bytes(data))], LIMIT), "a.zip", "bad_file")


# ------------------------------------------------------------------------------------------------------------ fuzz


def corrupt(data: bytes, seed: int) -> bytes:
    """`data` with a few bytes changed, dropped, doubled, or its end cut off."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(changed))
        kind = rng.randrange(8)
        if kind < 4:
            changed[at] = rng.choice((0, 255, 0x7B, 0x22, 0x39, 0x2D, rng.randrange(256)))
        elif kind == 4:
            del changed[at : at + rng.randint(1, 9)]
        elif kind == 5:
            changed[at:at] = changed[at : at + rng.randint(1, 30)]
        elif kind == 6:
            changed[at : at + 8] = rng.randbytes(8)
        elif rng.random() < 0.3:
            del changed[at:]
        if not changed:
            break
    return bytes(changed)


def harmless(call: Callable[[], Any]) -> None:
    """Parses, or raises one of our errors with a message that an answer can carry."""
    try:
        call()
    except AdapterdError as error:
        (error.message + (error.param or "")).encode()


fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzz
@given(data=st.binary(max_size=200))
def test_random_bytes_harm_nothing(data: bytes, native: Artifact, bert: Backbone) -> None:
    good = peft_files()
    harmless(lambda: read_tensors("x", data))
    harmless(lambda: read_tensors("x", struct.pack("<Q", len(data)) + data))
    harmless(lambda: Artifact.parse(data, native.tensor_bytes))
    harmless(lambda: read_checkpoint({CONFIG: data, WEIGHTS: good[WEIGHTS]}, NAMES, bert))
    harmless(lambda: read_checkpoint(good | {"config.json": data}, None, bert))
    for name in ("a.zip", "a.tgz"):
        harmless(lambda name=name: gather([(name, data)], LIMIT))
    harmless(lambda: gather([("a.tgz", gzip.compress(data, 0))], LIMIT))


@pytest.mark.parametrize(
    "target", ["manifest", "tensors", "config", "zip", "tar", "gzip", CONFIG, HUB, HUB_HEAD_CONFIG, HUB_HEAD]
)
def test_damaged_files_harm_nothing(target: str, native: Artifact, bert: Backbone) -> None:
    good = peft_files()
    plain_tar = gzip.decompress(tarred(("ünï" * 50, b"content"), *good.items(), format=tarfile.PAX_FORMAT))
    small = {"x.bin": bytes(range(256)) * 4}
    calls: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
        "manifest": (native.manifest_bytes, lambda data: Artifact.parse(data, native.tensor_bytes)),
        "tensors": (good[WEIGHTS], lambda data: read_checkpoint(good | {WEIGHTS: data}, NAMES, bert)),
        "config": (good[CONFIG], lambda data: read_checkpoint(good | {CONFIG: data}, NAMES, bert)),
        "zip": (zipped(small), lambda data: gather([("a.zip", data)], LIMIT)),
        "tar": (plain_tar, lambda data: gather([("a.tgz", gzip.compress(data, 0))], LIMIT)),
        "gzip": (gzip.compress(plain_tar), lambda data: gather([("a.tgz", data)], LIMIT)),
    }
    hub = checkpoints("bert")["unipelt"].files
    calls |= {name: (data, lambda data, name=name: read_hub(hub | {name: data})) for name, data in hub.items()}
    data, call = calls[target]
    call(data)
    for seed in range(400):
        harmless(lambda seed=seed: call(corrupt(data, seed)))


PEFT_TYPES: dict[str, tuple[Files, dict[str, Any]]] = {
    name: (files, json.loads(files[CONFIG]))
    for name, files in {
        "LORA": peft_files(),
        "VERA": peft_files({"peft_type": "VERA", "r": 2, "target_modules": ["query"], "projection_prng_key": 3}),
        "LOHA": peft_files({"peft_type": "LOHA", "r": 2, "alpha": 2, "target_modules": ["query"]}),
        "LOKR": peft_files({"peft_type": "LOKR", "r": 2, "alpha": 2, "target_modules": ["query"]}),
        "IA3": peft_files({"peft_type": "IA3", "target_modules": ["query"], "feedforward_modules": []}),
        "LN_TUNING": peft_files({"peft_type": "LN_TUNING", "target_modules": ["LayerNorm"]}),
        "PREFIX_TUNING": prompt_files(peft_type="PREFIX_TUNING", num_virtual_tokens=4),
        "PROMPT_TUNING": prompt_files(peft_type="PROMPT_TUNING", num_virtual_tokens=4),
        "P_TUNING": prompt_files(peft_type="P_TUNING", num_virtual_tokens=4),
    }.items()
}


@pytest.mark.parametrize("peft_type", PEFT_TYPES)
def test_odd_values_of_every_peft_field_harm_nothing(peft_type: str, bert: Backbone) -> None:
    files, config = PEFT_TYPES[peft_type]
    options = {*config, *TYPES[peft_type].options, *TYPES[peft_type].handled, *TYPES[peft_type].inert, "tomorrow"}
    for option in sorted(options):
        for value in ODD:
            changed = {key: one for key, one in (config | {option: value}).items() if one is not ...}
            document = json.dumps(changed).encode()
            harmless(lambda document=document: read_checkpoint(files | {CONFIG: document}, NAMES, bert))


@fuzz
@given(
    case=st.sampled_from(HUB_CASES),
    place=st.sampled_from(["top", "config", "head"]),
    option=st.sampled_from(["r", "alpha", "configs", "name", "scaling", "reduction_factor", "label2id", "layers"])
    | st.text(max_size=5),
    value=json_values,
)
def test_any_value_of_any_adapterhub_option_harms_nothing(case: str, place: str, option: str, value: Any) -> None:
    harmless(lambda: read_hub(edited(case, place, **{option: value})))


@fuzz
@given(option=st.sampled_from(sorted(peft_config())) | st.text(max_size=5), value=json_values)
@example(option="peft_version", value="\ud800")
@example(option="base_model_name_or_path", value="\ud800")
@example(option="\ud800", value=True)
def test_any_value_of_any_peft_option_harms_nothing(option: str, value: Any, bert: Backbone) -> None:
    harmless(lambda: read_checkpoint(peft_files(peft_config(**{option: value})), NAMES, bert))


@fuzz
@given(
    field=st.sampled_from(sorted(Manifest.model_fields)) | st.text(max_size=5),
    value=json_values,
)
def test_any_value_of_any_manifest_field_harms_nothing(
    field: str, value: Any, native: Artifact, bert: Backbone
) -> None:
    document = json.loads(native.manifest_bytes) | {field: value}

    def load() -> None:
        manifest = Artifact.parse(json.dumps(document).encode(), native.tensor_bytes).manifest
        fields = ("method", "config", "task", "head", "labels")
        Blueprint.check(**{name: getattr(manifest, name) for name in fields}, spec=bert.spec).check_tensors(
            native.tensors
        )

    harmless(load)


@fuzz
@given(
    method=st.sampled_from(["lora", "bottleneck"]),
    option=st.sampled_from(
        ["r", "lora_alpha", "target_modules", "reduction_factor", "non_linearity", "mh_adapter", "output_adapter"]
    ),
    value=json_values | st.floats(min_value=0, max_value=1e-300),
)
def test_any_hyperparameter_harms_nothing(method: str, option: str, value: Any, bert: Backbone) -> None:
    base = {"lora": {"target_modules": ["query"]}, "bottleneck": {}}[method]
    harmless(
        lambda: Blueprint.check(
            method=method, config=base | {option: value}, task="classification", head={}, labels=NAMES, spec=bert.spec
        ).shapes()
    )


@fuzz
@given(name=st.text(max_size=12) | st.text(alphabet="./\\a\0", max_size=8))
def test_any_file_name_stays_inside(name: str) -> None:
    try:
        (path,) = gather([(name, b"")], LIMIT)
    except AdapterdError:
        return
    assert not path.startswith("/")
    assert ".." not in path.split("/")
    assert gather([(path, b"")], LIMIT) == {path: b""}


def test_safetensors_round_trip_of_every_float(native: Artifact) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        data = safetensors.torch.save({"a": torch.arange(6, dtype=dtype).reshape(2, 3)})
        assert read_tensors("x", data)["a"].dtype == dtype


# ------------------------------------------------------------------------------------- values that ended in a 500


@pytest.mark.parametrize("targets", ["(?V0)(?V1)a", "(?a)(?u)a", f"a{{{'9' * 5000}}}"])
def test_patterns_that_upset_the_matcher_itself(targets: str, bert: Backbone) -> None:
    config = peft_config(target_modules=targets)
    refused(lambda: read_checkpoint(peft_files(config), NAMES, bert), "target_modules", "unsupported_option")


def test_a_group_in_a_layers_pattern_is_not_taken_for_the_layer(bert: Backbone) -> None:
    config = peft_config(layers_to_transform=[0], layers_pattern=["x|(?P<layer>bert)|y"])
    harmless(lambda: read_checkpoint(peft_files(config), NAMES, bert))


def test_huge_numbers_in_adapterhub_files() -> None:
    harmless(lambda: read_hub(edited("lora_alpha", "top", version=f"adapters.{'9' * 5000}.1.1")))
    refused(lambda: read_hub(edited("seq_bn", scaling=10**400)), "scaling.float")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_shared_projections_of_odd_shapes(shape: tuple[int, ...]) -> None:
    files = checkpoints("bert")["vera"].files
    tensors = safetensors.torch.load(files["adapter.safetensors"])
    name = next(name for name in tensors if "shared_parameters" in name and name.endswith("lora_B"))
    changed = files | {"adapter.safetensors": safetensors.torch.save(tensors | {name: torch.zeros(shape)})}
    refused(lambda: read_hub(changed), name, "wrong_shape")


def test_two_tensors_that_stand_for_the_same() -> None:
    files = checkpoints("bert")["double_seq_bn"].files
    tensors = safetensors.torch.load(files["adapter.safetensors"])
    name = next(name for name in tensors if name.endswith("adapter_down.0.weight"))
    twin = name.replace("adapter_down.0", "adapter_down.1")
    changed = safetensors.torch.save(tensors | {twin: torch.randn_like(tensors[name])})
    with pytest.raises(InvalidAdapter, match="stand for the same"):
        read_hub(files | {"adapter.safetensors": changed})


def test_a_pattern_that_names_no_target_is_refused(bert: Backbone) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        config = {"target_modules": ["query"], option: {"query": 2}}
        refused(
            lambda config=config: Blueprint.check(
                method="lora", config=config, task="classification", head={}, labels=NAMES, spec=bert.spec
            ),
            option,
            "unknown_target",
        )


def test_a_missing_bias_of_bias_all_is_missed(bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter, match="bias' is missing"):
        read_checkpoint(peft_files(peft_config(bias="all")), NAMES, bert)


def test_too_many_tensors(bert: Backbone) -> None:
    many = safetensors.torch.save({f"t{index}": torch.zeros(0) for index in range(20_001)})
    refused(lambda: read_checkpoint(peft_files() | {WEIGHTS: many}, NAMES, bert), WEIGHTS, "bad_file")


def test_what_has_no_name_is_named_by_its_file(bert: Backbone) -> None:
    refused(lambda: read_checkpoint(peft_files(peft_config(**{"": True})), NAMES, bert), CONFIG, "unsupported_option")
    refused(lambda: read_hub(edited("seq_bn", **{"": True})), CONFIG, "unsupported_option")
    refused(lambda: read_checkpoint(with_tensors(**{"": torch.zeros(3)}), NAMES, bert), WEIGHTS, "bad_file")


def test_projections_that_multiply_out_beyond_measure_are_refused(bert: Backbone) -> None:
    config = {"reduction_factor": 0.01, "shared_W_phm": True}
    with pytest.raises(InvalidAdapter, match=r"at least 0\.25"):
        Blueprint.check(method="compacter", config=config, task="classification", head={}, labels=NAMES, spec=bert.spec)
