"""What holds for every adapter method on every backbone family. A new method or family is picked up by itself."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import (
    EVERY_FAMILY,
    EVERY_VARIANT,
    FAMILIES,
    LABELS,
    UNLISTED,
    VARIANTS,
    Adapter,
    Answer,
    Sync,
    build,
    close,
    every_adapter,
    forward,
    make_artifact,
    make_blueprint,
    random_adapter,
    random_tensors,
    random_text,
    run,
    tiny_backbone,
    tiny_model,
    variant_id,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from server.adapters import METHODS
from server.adapters.base import KeyValue
from server.adapters.flow import Flow, Texts
from server.adapters.plan import AdapterPlan, Prefix, Segment
from server.backbone.attention import PackedTexts, packed_attention
from server.backbone.backbone import Backbone, fingerprint
from server.core import ENCODER_INPUT, ENCODER_OUTPUT, ClassifyOptions, Encoding, Pooling, Reach, Site, SiteKind
from server.engine.runner import Row, Runner
from server.engine.scheduler import Scheduler
from server.engine.worker import QueuedRow, Ticket, Worker
from server.errors import InvalidAdapter, NotFiniteOutput
from server.metrics import Metrics
from server.packed import Packed
from server.store.artifact import read_tensors
from server.tasks.adapter import Blueprint, TaskAdapter

TOLERANCE = 1e-5
LENGTHS = (1, 2, 3, 5, 8, 13, 30, 63, 64, 65, 120)

TYPICAL = ("bert", "mpnet", "gpt2", "llama")
"""Packed and padded, norm after and before, causal or not, with biases and without, Linear and Conv1D."""

CAUSAL = ("gpt2", "llama", "qwen3", *UNLISTED)

variants = pytest.mark.parametrize(("method", "options"), VARIANTS, ids=variant_id)
every_variant = pytest.mark.parametrize(("method", "options", "also"), EVERY_VARIANT, ids=variant_id)
BackboneOf = Callable[[str], Backbone]
AdaptersOf = Callable[[str], list[Adapter]]
Rows = list[tuple[Encoding, TaskAdapter | None]]


@pytest.fixture(scope="module")
def adapters_of(backbone_of: BackboneOf) -> AdaptersOf:
    """family -> a random adapter of each variant on its tiny backbone; made once, so nobody may change them."""
    return cache(lambda family: every_adapter(backbone_of(family)))


@pytest.fixture
def adapters(backbone: Backbone, adapters_of: AdaptersOf) -> list[Adapter]:
    """Those of the backbone whose turn it is."""
    return adapters_of(backbone.spec.model_type)


@pytest.fixture(scope="module")
def double_bert() -> Backbone:
    """A tiny BERT in double precision."""
    return tiny_backbone("bert", dtype=torch.float64)


def mixed_rows(adapters: Sequence[TaskAdapter], seed: int, texts_each: int = 2) -> Rows:
    """Texts of many lengths in runs of one adapter each; bare texts between, some adapters in two runs."""
    rng = random.Random(seed)
    runs: list[TaskAdapter | None] = [*adapters, *rng.sample(adapters, len(adapters) // 2), *[None] * 6]
    rng.shuffle(runs)
    return [
        (random_text(rng.choice(LENGTHS), rng.randrange(100)), adapter)
        for adapter in runs
        for _ in range(rng.randint(1, texts_each))
    ]


def moves_states(adapter: TaskAdapter | None) -> bool:
    """Whether it acts anywhere at all."""
    return adapter is not None and any(part.sites for part in adapter.weights.parts)


def check_mixed_batch(backbone: Backbone, rows: Rows, tolerance: float) -> None:
    """A batch is each of its rows alone, and each adapter did something."""
    together = run(backbone, rows)
    alone = [run(backbone, [row])[0] for row in rows]
    close(together, alone, tolerance)
    untouched = run(backbone, [(text, None) for text, _ in rows])
    for (text, adapter), answer, plain in zip(rows, together, untouched, strict=True):
        assert answer.own.shape == plain.own.shape
        if adapter and adapter.weights.framing.before == len(text):
            continue  # virtual tokens after all others are not seen where attention is causal
        moved = (answer.own - plain.own).abs().max()
        assert moved > 1e-2 if moves_states(adapter) else moved <= tolerance


@torch.inference_mode()
def test_a_mixed_batch_equals_each_row_alone(backbone: Backbone, adapters: list[Adapter]) -> None:
    bound = [adapter.bound for adapter in adapters]
    assert len({adapter.weights.method.name for adapter in bound}) >= 10
    assert len({adapter.labels for adapter in bound}) == 4
    assert {adapter.blueprint.head.pooling for adapter in adapters} == backbone.spec.poolings
    check_mixed_batch(backbone, mixed_rows(bound, seed=0), TOLERANCE)


def test_batches_that_run_at_once_are_what_they_are_one_by_one(backbone: Backbone, adapters: list[Adapter]) -> None:
    bound = [adapter.bound for adapter in adapters]
    batches = [mixed_rows(bound[start::3], seed=start) for start in range(3)]
    batches += [[(rows[0][0], whose) for _, whose in rows] for rows in batches]  # copies of a text share what they can

    def answers(rows: Rows) -> list[Answer]:
        with torch.inference_mode():
            return run(backbone, rows)

    expected = [answers(rows) for rows in batches]
    with ThreadPoolExecutor(3) as pool:
        for own, alone in zip(pool.map(answers, batches), expected, strict=True):
            close(own, alone, TOLERANCE)


@pytest.mark.parametrize("family", TYPICAL)
def test_what_is_loaded_is_what_is_bound(family: str) -> None:
    """To the bit, in the number format whose rounding shows; and it takes no more memory."""
    backbone = tiny_backbone(family, dtype=torch.bfloat16)
    packed = quick = 0
    for adapter in every_adapter(backbone):
        sizes = []
        halves = {name: tensor / 2 for name, tensor in adapter.tensors.items()}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in adapter.tensors.items()}
        for tensors in (adapter.tensors, halves, zeros):  # of the others it is known from the first how to
            bound = adapter.blueprint.bind(tensors, backbone)
            file = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
            read = read_tensors("file", memoryview(bytearray(file)))
            packed += isinstance(read, Packed)
            quick += adapter.blueprint.loads_quickly(read, backbone)
            for given in (tensors, read):
                loaded = adapter.blueprint.load(given, backbone)
                same(loaded, bound)
                sizes.append(loaded.nbytes)
        assert max(sizes) <= 1.2 * bound.nbytes + 4096
        assert max(sizes) - min(sizes) <= 64 * len(adapter.tensors)  # what keeps tensors aligned
    assert packed > quick > 0


def same(one: TaskAdapter, other: TaskAdapter) -> None:
    """To the bit, but for what they take."""
    assert (one.task, one.config, one.labels) == (other.task, other.config, other.labels)
    assert [part.method for part in one.weights.parts] == [part.method for part in other.weights.parts]
    assert (one.weights.alone, one.weights.form, one.weights.framing) == (
        other.weights.alone,
        other.weights.form,
        other.weights.framing,
    )
    for own, part in zip(one.weights.parts, other.weights.parts, strict=True):
        assert (own.sites.keys(), own.framing) == (part.sites.keys(), part.framing)
        for site, weights in own.sites.items():
            assert type(weights) is type(part.sites[site])
            same_leaves(weights, part.sites[site])
    assert type(one.head) is type(other.head)
    same_leaves(one.head, other.head)


def same_leaves(one: object, other: object) -> None:
    for mine, theirs in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine is theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_no_adapter_changes_the_model_even_for_a_moment(family: str) -> None:
    """Another batch may be in the same module just then."""
    backbone = tiny_backbone(family)
    for module in backbone.model.modules():
        for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
            module.__dict__[name] = MappingProxyType(getattr(module, name))  # cannot be written to
    backbone._bare.clear()  # copies that share what was there before
    bound = [adapter.bound for adapter in every_adapter(backbone)]
    run(backbone, mixed_rows(bound, seed=0))


@torch.inference_mode()
@pytest.mark.parametrize("family", TYPICAL)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_one_method_side_by_side_equal_each_alone(
    method: str, family: str, backbone_of: BackboneOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the runner sorts them. Many methods join the products of neighbours."""
    backbone = backbone_of(family)
    own = [options for name, options in VARIANTS if name == method]
    bound: list[TaskAdapter] = []
    for seed in range(max(3 * len(own), 12)):
        try:
            bound.append(random_adapter(backbone, method, own[seed % len(own)], seed=seed).bound)
        except InvalidAdapter:
            continue
    if not bound:
        pytest.skip(f"{family} does not carry {method}")
    random.Random(0).shuffle(bound)
    lengths = (12, 14, 13, 70, 11, 66)
    rows: Rows = [(random_text(lengths[i % 6], seed=i), adapter) for i, adapter in enumerate(bound)]
    neighbours: list[int] = []
    apply_run = METHODS[method].apply_run

    def spy(weights: Sequence[Any], flow: Flow) -> Iterator[Tensor]:
        neighbours.append(len(weights))
        return apply_run(weights, flow)

    monkeypatch.setattr(METHODS[method], "apply_run", spy)
    together = run(backbone, rows)
    if neighbours:
        assert max(neighbours) > 2
    else:
        assert method in ("prefix_tuning", "head_only")
    close(together, [run(backbone, [row])[0] for row in rows], TOLERANCE)
    close(run(backbone, rows[::-1]), together[::-1], TOLERANCE)


@torch.inference_mode()
def test_segments_may_alternate_and_neighbours_may_be_of_any_method(bert: Backbone, adapters_of: AdaptersOf) -> None:
    """Every adapter with a single text, in the order of the table, between two others of its kind or not."""
    bound = [adapter.bound for adapter in adapters_of("bert")]
    rows: Rows = [(random_text(1 + index % 7, seed=index), adapter) for index, adapter in enumerate([*bound, *bound])]
    close(forward(bert, rows), [run(bert, [row])[0] for row in rows], TOLERANCE)


@every_variant
def test_an_adapter_that_overflows_fails_nobody_else(method: str, options: dict, also: tuple, bert: Backbone) -> None:
    """Its NaNs reach neighbours that share an attention window; then the batch is run again adapter by adapter."""
    good = [random_adapter(bert, method, options, also, seed=seed).bound for seed in range(3)]
    blueprint = make_blueprint(bert.spec, method, options, also)
    huge = {name: torch.full(shape, 3e38) for name, shape in blueprint.shapes().items()}
    bad = blueprint.bind(huge, bert)
    rows = [
        Row(random_text(9, seed=i), adapter, ClassifyOptions())
        for i, adapter in enumerate([good[0], bad, good[1], bad, good[2]])
    ]
    scheduler = Scheduler[QueuedRow](max_batch_tokens=100, max_queue_tokens=100, clock=time.monotonic)
    worker = Worker(Runner(bert), scheduler, Metrics())
    tickets = [Ticket(1) for _ in rows]
    worker._run([QueuedRow(row, ticket, 0) for row, ticket in zip(rows, tickets, strict=True)])
    for index, (row, ticket) in enumerate(zip(rows, tickets, strict=True)):
        if row.adapter is bad:
            assert isinstance(ticket.future.exception(timeout=0), NotFiniteOutput), index
        else:
            assert ticket.future.result(timeout=0) == Runner(bert).run([row]), index


@torch.inference_mode()
def test_states_come_back_in_the_order_of_the_texts(backbone: Backbone) -> None:
    texts = [random_text(length, seed=length) for length in (9, 2, 40)]
    states = backbone.forward(texts)
    assert list(states.lengths) == [9, 2, 40]
    assert states.tokens.shape == (51, backbone.spec.hidden_size)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_bare_backbone_is_what_transformers_computes(family: str, backbone_of: BackboneOf) -> None:
    texts = [random_text(length, seed=4) for length in (7, 70, 3, 1, 64)]
    with torch.inference_mode():
        expected = [
            tiny_model(family)(input_ids=torch.tensor([text.ids])).last_hidden_state[0].float() for text in texts
        ]
        answers = run(backbone_of(family), [(text, None) for text in texts])
    close(answers, [Answer(states, None) for states in expected], TOLERANCE)


# The papers' formulas once more, as changes of an untouched transformers model.


def change_matrix(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Changes a module's weight, seen as [size_out, size_in]."""
    weight = module.weight.data
    weight = weight if isinstance(module, nn.Linear) else weight.t()
    weight.copy_(change(weight.clone()))


def change_bias(module: nn.Module, change: Callable[[Tensor | float], Tensor]) -> None:
    module.bias = nn.Parameter(change(0.0 if module.bias is None else module.bias.data))


def scale_of(config: Any, site: Site, rank: int) -> float:
    alpha = config.alpha_pattern.get(site.name, getattr(config, "lora_alpha", None) or getattr(config, "alpha", None))
    return alpha / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank)


def lora_delta(own: dict[str, Tensor]) -> tuple[Tensor, int]:
    kind = "lora_embedding" if "lora_embedding_A" in own else "lora"
    return own[f"{kind}_B"] @ own[f"{kind}_A"], own[f"{kind}_A"].shape[0]


def lora(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    delta, rank = lora_delta(own)
    scale = scale_of(config, site, rank)
    change_matrix(module, lambda weight: weight + scale * delta)
    if "lora_B_bias" in own:
        change_bias(module, lambda bias: bias + scale * own["lora_B_bias"])


def dora(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    delta, rank = lora_delta(own)
    scale = scale_of(config, site, rank)

    def factors(weight: Tensor) -> Tensor:
        direction = weight + (delta if config.unscaled_norm else scale * delta)
        return own["lora_magnitude_vector"] / direction.square().sum(1).sqrt()

    if config.scaled_bias and getattr(module, "bias", None) is not None:
        weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.t()
        change_bias(module, lambda bias: bias * factors(weight))
    change_matrix(module, lambda weight: factors(weight)[:, None] * (weight + scale * delta))


def vera(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    def changed(weight: Tensor) -> Tensor:
        a, b = shared["vera_A"][:, : weight.shape[1]], shared["vera_B"][: weight.shape[0]]
        return weight + own["vera_lambda_b"].diag() @ b @ own["vera_lambda_d"].diag() @ a

    change_matrix(module, changed)


def loha(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    change_matrix(module, lambda weight: weight + scale_of(config, site, own["hada_w1_a"].shape[1]) * delta)


def lokr(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    w1, w2 = (own.get(name, own.get(f"{name}_a")) for name in ("lokr_w1", "lokr_w2"))
    w1 = w1 @ own["lokr_w1_b"] if "lokr_w1_b" in own else w1
    w2 = w2 @ own["lokr_w2_b"] if "lokr_w2_b" in own else w2
    rank = config.rank_pattern.get(site.name, config.r)
    change_matrix(module, lambda weight: weight + scale_of(config, site, rank) * torch.kron(w1, w2))


def ia3(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    if site.kind is SiteKind.LINEAR_INPUT:
        change_matrix(module, lambda weight: weight * own["ia3_l"][None])
        return
    change_matrix(module, lambda weight: weight * own["ia3_l"][:, None])
    if module.bias is not None:
        change_bias(module, lambda bias: bias * own["ia3_l"])


def parameters(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    for name, value in own.items():
        module.get_parameter(name).data.copy_(value)


def houlsby(module: nn.Module, config: Any, site: Site, own: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    def adapted(_: nn.Module, inputs: Any, h: Tensor) -> Tensor:
        low = torch.einsum("...i,bi->...b", h, own["adapter_down.weight"]) + own["adapter_down.bias"]
        low = low * low.sigmoid()
        return h + torch.einsum("...b,ob->...o", low, own["adapter_up.weight"]) + own["adapter_up.bias"]

    module.register_forward_hook(adapted)


REWRITES = {
    "lora": lora,
    "dora": dora,
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "ia3": ia3,
    "bitfit": parameters,
    "ln_tuning": parameters,
    "bottleneck": houlsby,
    "head_only": parameters,
}
HOULSBY = next(options for name, options in VARIANTS if name == "bottleneck")


def rewritable(method: str, options: dict, family: str) -> bool:
    """Whether the formula above is the whole of it."""
    if method == "vera":
        return bool(options.get("save_projection"))  # that A and B come from the seed as in PEFT is tested elsewhere
    if method == "bottleneck":
        return options is HOULSBY and family != "albert"  # which takes the stream for the output
    return method in REWRITES and not options.get("use_gating")


def rewrite(model: PreTrainedModel, adapter: Adapter, family: str) -> None:
    """Makes the model what the adapter says."""
    for part in adapter.blueprint.parts:
        shared = {
            name.removeprefix(f"{part.method.name}/"): value
            for name, value in adapter.tensors.items()
            if name.startswith(f"{part.method.name}/")
        }
        for site in part.sites(adapter.blueprint.spec):
            own = {
                name.removeprefix(f"{site}/"): value
                for name, value in adapter.tensors.items()
                if name.startswith(f"{site}/")
                and name.removeprefix(f"{site}/")
                in part.method.shapes(part.config, site, adapter.blueprint.spec.sites[site])
            }
            assert own, f"no tensor is stored for {site}"
            path = site.name
            if site.kind is SiteKind.RESIDUAL:
                layer, place = site.name.split(".")
                sub = FAMILIES[family].attention if place == "attention" else FAMILIES[family].ffn
                path = f"{FAMILIES[family].layer.format(layer)}.{sub.output}"
            REWRITES[part.method.name](model.get_submodule(path), part.config, site, own, shared)


@torch.inference_mode()
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_math_at_a_site_is_the_papers(family: str, backbone_of: BackboneOf) -> None:
    backbone = backbone_of(family)
    text = random_text(11, seed=5)
    pooling = Pooling.POOLER if Pooling.POOLER in backbone.spec.poolings else Pooling.LAST
    tried = set()
    for index, (method, options, also) in enumerate(EVERY_VARIANT):
        if not all(rewritable(*part, family) for part in ((method, options), *also)):
            continue
        try:
            adapter = random_adapter(backbone, method, options, also, seed=100 + index, pooling=pooling)
        except InvalidAdapter:
            continue
        tried.add(method)
        model = tiny_model(family)
        rewrite(model, adapter, family)
        reference = model(input_ids=torch.tensor([text.ids]))
        states = reference.last_hidden_state[0]
        vector = reference.pooler_output[0] if pooling is Pooling.POOLER else states[-1]
        head = adapter.tensors
        expected = Answer(states, head["head/classifier.weight"] @ vector + head["head/classifier.bias"])
        close(run(backbone, [(text, adapter.bound)]), [expected], 2e-5)
    assert len(tried) >= 7


@torch.inference_mode()
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("options", [options for name, options in VARIANTS if name == "prompt_tuning"], ids=variant_id)
def test_virtual_tokens_lie_where_the_options_say(family: str, options: dict, backbone_of: BackboneOf) -> None:
    adapter = random_adapter(backbone_of(family), "prompt_tuning", options, seed=0)
    (prompt,) = (tensor for name, tensor in adapter.tensors.items() if name.endswith("/prompt"))
    text, model = random_text(9, seed=2), tiny_model(family)
    ids = torch.tensor([text.ids])
    before = 1 if options.get("combine") == "prefix_after_bos" else 0
    if options.get("placement") == "states":
        model.embeddings.register_forward_hook(
            lambda _, inputs, output: torch.cat([output[:, :before], prompt[None], output[:, before:]], dim=1)
        )
        expected = model(input_ids=ids).last_hidden_state[0]
    else:
        words = torch.cat([prompt[None], model.get_input_embeddings()(ids)], dim=1)
        expected = model(inputs_embeds=words).last_hidden_state[0]
    (answer,) = run(backbone_of(family), [(text, adapter.bound)])
    close([answer], [Answer(expected, answer.logits)], TOLERANCE)
    after = before + len(prompt)
    torch.testing.assert_close(answer.own, torch.cat([expected[:before], expected[after:]]), rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_saving_and_loading_gives_the_same_logits_bit_for_bit(
    backbone: Backbone, adapters: list[Adapter], memory_store: Sync
) -> None:
    text = random_text(9, seed=1)
    for adapter in adapters:
        artifact = make_artifact(adapter.blueprint, adapter.tensors)
        version = memory_store.put_version("a", artifact)
        loaded = memory_store.get_version("a", version)
        assert loaded.manifest == artifact.manifest
        # where numbers lie decides how products add them up, and those read from a file lie as they do there
        aligned = {name: tensor.clone() for name, tensor in loaded.tensors.items()}
        bound = build(replace(loaded, tensors=aligned), backbone)
        assert bound.labels == adapter.blueprint.labels
        before, after = run(backbone, [(text, adapter.bound)])[0], run(backbone, [(text, bound)])[0]
        assert torch.equal(before.logits, after.logits)
        assert torch.equal(before.states, after.states)


def test_the_backbone_is_untouched(backbone: Backbone, adapters: list[Adapter]) -> None:
    text = random_text(20, seed=2)
    with torch.inference_mode():
        before = run(backbone, [(text, None)])[0]
        run(backbone, mixed_rows([adapter.bound for adapter in adapters], seed=1))
        after = run(backbone, [(text, None)])[0]
    assert torch.equal(before.states, after.states)
    assert fingerprint(backbone.model.state_dict()) == backbone.spec.fingerprint
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


@torch.inference_mode()
def test_a_plan_is_attached_for_one_forward_alone(backbone_of: BackboneOf) -> None:
    """Also where that forward raises half-way. Seen on the model itself, which the padded layout lets run alone."""
    backbone = backbone_of("mpnet")
    text = random_text(6, seed=3)
    ids = torch.tensor([text.ids])
    before = backbone.model(input_ids=ids).last_hidden_state
    for method in ("lora", "bottleneck"):
        adapter = random_adapter(backbone, method, {}, seed=0).bound
        run(backbone, [(text, adapter)])
        assert torch.equal(backbone.model(input_ids=ids).last_hidden_state, before)
        last = next(reversed(adapter.weights.parts[0].sites.values()))
        (last.a if method == "lora" else last.down).resize_(3, 3)
        with pytest.raises(RuntimeError):
            run(backbone, [(text, adapter)])
        assert torch.equal(backbone.model(input_ids=ids).last_hidden_state, before)


def starts_at_nothing(method: str, options: dict) -> bool:
    """Whether a fresh adapter promises to change nothing."""
    match method:
        case "ia3":
            return not options.get("use_gating")
        case "post_encoder":
            return bool(options.get("residual"))
        case "prefix_tuning" | "prompt_tuning" | "p_tuning":
            return False
        case "bottleneck" | "compacter":
            # what it adds is nothing; but the skip connection may carry something else than what came
            if options.get("ln_after") and options.get("adapter_residual_before_ln"):
                return False
            skip = options.get("residual_before_ln", True)
            return bool(options.get("is_parallel") or skip is True) and options.get("original_ln_after", True)
    return True


@torch.inference_mode()
@pytest.mark.parametrize("family", TYPICAL)
def test_a_fresh_adapter_changes_nothing(family: str, backbone_of: BackboneOf) -> None:
    backbone = backbone_of(family)
    text = random_text(15, seed=3)
    plain = run(backbone, [(text, None)])[0]
    tried = set()
    for method, options, also in EVERY_VARIANT:
        if not all(starts_at_nothing(*part) for part in ((method, options), *also)):
            continue
        try:
            blueprint = make_blueprint(backbone.spec, method, options, also)
        except InvalidAdapter:
            continue
        tensors = blueprint.init(backbone, torch.Generator().manual_seed(0))
        assert any(tensor.any() for name, tensor in tensors.items() if not name.startswith("head/")) is bool(
            blueprint.parts[0].sites(backbone.spec)
        )
        fresh = run(backbone, [(text, blueprint.bind(tensors, backbone))])[0]
        torch.testing.assert_close(fresh.states, plain.states, rtol=0, atol=2e-6)
        tried.add(method)
    assert len(tried) >= 12


def test_fresh_tensors_are_the_same_for_the_same_seed(bert: Backbone) -> None:
    for variant in EVERY_VARIANT:
        blueprint = make_blueprint(bert.spec, *variant)
        one, same, other = (blueprint.init(bert, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
        assert all(tensor.dtype == torch.float32 for tensor in one.values())


class AtSite:
    """A method at one site of a backbone, as functions of tensors."""

    def __init__(self, method: str, options: dict, host: Backbone, site: Site, seed: int = 0) -> None:
        blueprint = make_blueprint(host.spec, method, options)
        (self.part,) = blueprint.parts
        self.method, self.host, self.site = self.part.method, host, site
        own = {f"{site}/{name}" for name in self.method.shapes(self.part.config, site, host.spec.sites[site])}
        tensors = {name: tensor.double() for name, tensor in random_tensors(blueprint, seed, host).items()}
        self.rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("head/")}
        shared = {name for name in self.rest if name.startswith(f"{method}/")}
        self.tensors = {name: self.rest[name] for name in sorted(own | shared)}
        self.flow = random_flow(host, site, seed)

    def bound(self, tensors: dict[str, Tensor]) -> Any:
        return self.part.bind(self.part.turn(self.rest | tensors, self.host.spec), self.host).sites[self.site]

    def inputs(self) -> list[Tensor]:
        """All that a result depends on."""
        flow = [self.flow.y] if self.site.kind is SiteKind.KEY_VALUE else [self.flow.x, self.flow.y, self.flow.h]
        return [*(tensor for tensor in flow if tensor is not None), *self.tensors.values()]


def random_flow(host: Backbone, site: Site, seed: int = 0) -> Flow:
    """Two texts in a slice with padding between them, as it is in the padded layout."""
    at = host.spec.sites[site]
    generator = torch.Generator().manual_seed(seed)
    texts = Texts((0, 9), (8, 7), 18)

    def rows(size: int) -> Tensor:
        return torch.randn(18, size, generator=generator, dtype=torch.float64)

    x = torch.randint(at.size_in, (18,), generator=generator) if site.kind is SiteKind.EMBEDDING else rows(at.size_in)
    y = rows(at.size_out)
    if site.kind is SiteKind.NORM:
        y = host.module(site)(x)
    if site.kind in (SiteKind.LINEAR_INPUT, SiteKind.ENCODER):
        x = y
    return Flow(x, y, (texts,), rows(at.size_out) if site.kind is SiteKind.RESIDUAL else None)


def sites_of(method: str, options: dict, host: Backbone) -> list[Site]:
    """One site of each kind at which a variant acts."""
    (part,) = make_blueprint(host.spec, method, options).parts
    return list({site.kind: site for site in reversed(part.sites(host.spec))}.values())


acting = pytest.mark.parametrize(
    ("method", "options"), [variant for variant in VARIANTS if variant[0] != "head_only"], ids=variant_id
)


@acting
def test_bind_and_apply_are_differentiable(method: str, options: dict, double_bert: Backbone) -> None:
    for site in sites_of(method, options, double_bert):
        at = AtSite(method, options, double_bert, site)
        flow, names = at.flow, list(at.tensors)

        def output(x: Tensor, y: Tensor, h: Tensor | None, *values: Tensor) -> Any:
            weights = at.bound(dict(zip(names, values, strict=True)))  # noqa: B023
            if isinstance(weights, KeyValue):
                return weights.keys, weights.values
            return at.method.apply(weights, Flow(x, y, flow.texts, h))  # noqa: B023

        leaves = [
            tensor.clone().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
            for tensor in (flow.x, flow.y, flow.h, *at.tensors.values())
        ]
        if site.kind is not SiteKind.KEY_VALUE:
            assert output(*leaves).shape == flow.y.shape
        assert torch.autograd.gradcheck(output, leaves, fast_mode=True)


@torch.inference_mode()
@acting
def test_apply_writes_to_nothing(method: str, options: dict, double_bert: Backbone) -> None:
    for site in sites_of(method, options, double_bert):
        if site.kind is SiteKind.KEY_VALUE:
            continue
        at = AtSite(method, options, double_bert, site)
        weights = at.bound(at.tensors)
        inputs = [*at.inputs(), *double_bert.module(site).state_dict().values()]
        before = [tensor.clone() for tensor in inputs]
        first = at.method.apply(weights, at.flow)
        kept = first.clone()
        first += 1  # a caller may do so; neither x nor y may be the same memory
        assert torch.equal(at.method.apply(weights, at.flow), kept)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@torch.inference_mode()
@acting
def test_neighbours_are_each_as_alone(method: str, options: dict, double_bert: Backbone) -> None:
    """`apply_run` is `apply`, one after the other, whatever of it is joined."""
    for site in sites_of(method, options, double_bert):
        if site.kind is SiteKind.KEY_VALUE:
            continue
        each = [AtSite(method, options, double_bert, site, seed) for seed in range(7)]
        weights = [at.bound(at.tensors) for at in each]
        expected = [at.method.apply(own, at.flow) for own, at in zip(weights, each, strict=True)]
        x, y = (torch.cat([getattr(at.flow, name) for at in each]) for name in "xy")
        h = None if each[0].flow.h is None else torch.cat([at.flow.h for at in each])
        flow = Flow(x, y, [texts for at in each for texts in at.flow.texts], h)
        result = torch.cat(list(METHODS[method].apply_run(weights, flow)))
        # what padding holds is anything
        rows = torch.cat([18 * index + torch.tensor([*range(8), *range(9, 16)]) for index in range(7)])
        torch.testing.assert_close(result[rows], torch.cat(expected)[rows], rtol=0, atol=1e-10)


def idle(adapter: Adapter, name: str) -> bool:
    """Whether a tensor may have no part in the logits."""
    spec, pooling = adapter.blueprint.spec, adapter.blueprint.head.pooling
    pooler = any(at.reach is Reach.TEXTS and name.startswith(f"{site}/") for site, at in spec.sites.items())
    # the first token sees nothing but itself where attention is causal; a unit of ReLU may be off for all tokens
    blind = pooling is Pooling.CLS and spec.model_type in CAUSAL
    return blind or (pooler and pooling is not Pooling.POOLER) or "relu" in repr(adapter.blueprint.parts)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(backbone: Backbone, adapters: list[Adapter]) -> None:
    texts = [random_text((3, 17, 8)[index % 3], seed=index) for index in range(len(adapters))]
    with torch.no_grad():
        served = run(backbone, [(text, adapter.bound) for text, adapter in zip(texts, adapters, strict=True)])

    def gradients(batched: bool) -> list[dict[str, Tensor | None]]:
        """Of each adapter's tensors; the answers are those that are given without gradients."""
        leaves = [
            {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors.items()} for adapter in adapters
        ]
        rows: Rows = [
            (text, adapter.blueprint.bind(tensors, backbone))
            for adapter, tensors, text in zip(adapters, leaves, texts, strict=True)
        ]
        batches = [rows] if batched else [[row] for row in rows]
        answers = [answer for batch in batches for answer in run(backbone, batch)]
        close(answers, served, TOLERANCE)
        torch.stack([answer.logits.logsumexp(0) for answer in answers]).sum().backward()
        return [{name: tensor.grad for name, tensor in tensors.items()} for tensors in leaves]

    for adapter, one, other in zip(adapters, gradients(batched=True), gradients(batched=False), strict=True):
        for name, gradient in one.items():
            if not idle(adapter, name):
                assert gradient is not None, name
                assert gradient.any(), f"{name} gets no gradient"
            expected = torch.zeros_like(adapter.tensors[name]) if other[name] is None else other[name]
            gradient = torch.zeros_like(expected) if gradient is None else gradient
            torch.testing.assert_close(gradient, expected, rtol=0, atol=float(3e-5 * (1 + expected.abs().max())))
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "albert"])
def test_gradients_are_the_finite_differences(family: str) -> None:
    """Along a random direction, through the whole model, in double precision: DoRA's norm too is differentiated."""
    backbone = tiny_backbone(family, dtype=torch.float64)
    texts = [random_text(length, seed=1) for length in (4, 19, 7)]
    generator = torch.Generator().manual_seed(0)
    for index, variant in enumerate(EVERY_VARIANT):
        try:
            blueprint = make_blueprint(backbone.spec, *variant)
        except InvalidAdapter:
            continue
        tensors = {name: value.double() for name, value in random_tensors(blueprint, index, backbone).items()}
        names = [name for name in tensors if not name.startswith("head/")]
        if not names:
            continue
        direction = {name: torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64) for name in names}
        factors = torch.randn(400, backbone.spec.hidden_size, generator=generator, dtype=torch.float64)

        def loss(step: float | Tensor) -> Tensor:
            moved = tensors | {name: tensors[name] + step * direction[name] for name in names}  # noqa: B023
            states = backbone.forward(
                texts,
                AdapterPlan([Segment(blueprint.bind(moved, backbone).weights, 0, 3)]),  # noqa: B023
            )
            return (states.tokens * factors[: len(states.tokens)]).sum()  # noqa: B023

        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(step), step)
        with torch.no_grad():
            difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
        torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["bert", "albert", "modernbert", "gpt2", "llama"])
def test_the_padded_and_the_packed_layout_agree(family: str, adapters_of: AdaptersOf, backbone_of: BackboneOf) -> None:
    packed, padded = backbone_of(family), tiny_backbone(family)
    assert packed.packed
    padded.packed = False
    padded.model.set_attn_implementation("sdpa")
    both = [
        adapter.bound
        for adapter in adapters_of(family)
        if not any(site.kind is SiteKind.KEY_VALUE for site in adapter.sites)
    ]
    rows = mixed_rows(both, seed=0)
    close(run(packed, rows), run(padded, rows), TOLERANCE)


FAMILIES_ONLY = ("bottleneck", "compacter", "invertible", "ln_tuning")
"""Methods at places that only the table of families knows."""


def carries(backbone: Backbone, method: str, options: dict) -> bool:
    """Whether a method has a place on a backbone."""
    listed = backbone.spec.model_type in FAMILIES
    if method == "prefix_tuning":
        return listed and backbone.packed
    if method == "bitfit":
        return any(at.bias for at in backbone.spec.sites.values())
    return listed or (method not in FAMILIES_ONLY and options.get("placement") != "states")


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_works_or_is_refused(family: str, method: str, backbone_of: BackboneOf) -> None:
    """Whether it also does what it should, the other laws tell."""
    backbone = backbone_of(family)
    for options in (options for name, options in VARIANTS if name == method):
        if carries(backbone, method, options):
            assert make_blueprint(backbone.spec, method, options).check_tensors is not None
            continue
        with pytest.raises(InvalidAdapter) as caught:
            make_blueprint(backbone.spec, method, options)
        assert (caught.value.param, caught.value.error_code) == ("method", "unsupported_method")
        assert repr(method) in caught.value.message
        assert family in caught.value.message


def test_the_unlisted_families_carry_what_needs_no_table(backbone_of: BackboneOf) -> None:
    for family in UNLISTED:
        spec = backbone_of(family).spec
        assert not spec.listed
        assert {site.kind for site in spec.sites} == {
            SiteKind.LINEAR,
            SiteKind.LINEAR_INPUT,
            SiteKind.EMBEDDING,
            SiteKind.ENCODER,
        }
        assert spec.sites_of(SiteKind.ENCODER) == [ENCODER_OUTPUT]
    for family in FAMILIES:
        spec = backbone_of(family).spec
        assert spec.listed
        assert spec.sites_of(SiteKind.ENCODER) == [ENCODER_INPUT, ENCODER_OUTPUT]


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (("lora", {}), "tensors of the same name"),
        (("dora", {}), "tensors of the same name"),
        (("ia3", {"rank": 2}), "also.rank"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(also: tuple[str, dict], message: str, bert: Backbone) -> None:
    with pytest.raises(InvalidAdapter, match=message) as caught:
        make_blueprint(bert.spec, "lora", {}, [also])
    assert caught.value.param.startswith("also")


def test_an_unknown_part_is_named(bert: Backbone) -> None:
    known = make_blueprint(bert.spec, "lora", {})
    with pytest.raises(InvalidAdapter, match="'nothing' is not supported; supported: lora, dora"):
        Blueprint.check(
            method="lora",
            config=known.config.model_dump(),
            also=[("nothing", {})],
            task="classification",
            head={},
            labels=LABELS,
            spec=bert.spec,
        )


def test_virtual_tokens_of_two_parts_are_refused(bert: Backbone) -> None:
    prompts = [("prompt_tuning", {}), ("p_tuning", {"placement": "states"})]
    with pytest.raises(InvalidAdapter, match="two methods of the adapter add virtual tokens"):
        make_blueprint(bert.spec, *prompts[0], prompts[1:])


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_strays_from_the_device(family: str, backbone_of: BackboneOf, adapters_of: AdaptersOf) -> None:
    """On the meta device a stray CPU tensor raises, and so does a look at a value: a hidden synchronization."""
    if not backbone_of(family).packed:
        pytest.skip("transformers' own masks for padded batches look at values")
    meta = torch.device("meta")
    backbone = tiny_backbone(family, device=meta)
    assert backbone.packed
    assert backbone.spec.sites == backbone_of(family).spec.sites
    adapters = [adapter.blueprint.bind(adapter.tensors, backbone) for adapter in adapters_of(family)]
    with OneDevice():
        answers = run(backbone, mixed_rows(adapters, seed=0))
    assert all(answer.states.device == meta for answer in answers)
    logits = [answer.logits for answer in answers if answer.logits is not None]
    assert len(logits) >= len(adapters)
    assert all(row.device == meta for row in logits)


class OneDevice(TorchDispatchMode):
    """Raises where an operation mixes devices; some do so silently on the meta device. Scalars are allowed to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
        assert len(devices) < 2, f"{func} mixes {devices}"
        return func(*args, **kwargs or {})


@pytest.mark.cuda
@torch.inference_mode()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_mixed_batch_on_cuda_equals_each_row_alone(family: str) -> None:
    backbone = tiny_backbone(family, device=torch.device("cuda"))
    rows = mixed_rows([adapter.bound for adapter in every_adapter(backbone)], seed=0)
    check_mixed_batch(backbone, rows, 1e-4)


def test_a_head_stays_in_float32_on_a_bfloat16_backbone() -> None:
    backbone = tiny_backbone("bert", dtype=torch.bfloat16)
    adapter = random_adapter(backbone, "lora", {}, seed=0, pooling=Pooling.POOLER)
    (part,) = adapter.bound.weights.parts
    assert {weights.a.dtype for weights in part.sites.values()} == {torch.bfloat16}
    assert {weights.b.dtype for weights in part.sites.values()} == {torch.bfloat16}
    assert torch.equal(adapter.bound.head.layers.weight, adapter.tensors["head/classifier.weight"])
    assert torch.equal(adapter.bound.head.layers.bias, adapter.tensors["head/classifier.bias"])
    with torch.inference_mode():
        (answer,) = run(backbone, [(random_text(8, seed=0), adapter.bound)])
    assert answer.logits.dtype == torch.float32
    whole = random_adapter(tiny_backbone("bert"), "lora", {}, seed=0, pooling=Pooling.POOLER)
    assert whole.bound.nbytes > adapter.bound.nbytes


@torch.inference_mode()
@pytest.mark.parametrize("family", TYPICAL)
def test_every_method_runs_in_bfloat16(family: str, backbone_of: BackboneOf, adapters_of: AdaptersOf) -> None:
    exact, rounded = backbone_of(family), tiny_backbone(family, dtype=torch.bfloat16)
    texts = [random_text(length, seed=1) for length in (3, 40, 12)]
    adapters = adapters_of(family)
    rows = [(text, adapter.bound) for adapter in adapters for text in texts]
    others = [adapter.blueprint.bind(adapter.tensors, rounded) for adapter in adapters]
    answers = run(rounded, [(text, other) for other in others for text in texts])
    for answer, reference, (_, adapter) in zip(answers, run(exact, rows), rows, strict=True):
        assert answer.states.dtype == torch.bfloat16
        error = (answer.states.float() - reference.states).abs().mean()
        assert 0 < error < 0.05 * reference.states.abs().mean(), adapter.weights.method.name


# Sites that also see rows of no text: DeBERTa may project relative positions with the words' own layers.


@pytest.fixture(scope="module")
def sharing() -> Backbone:
    return tiny_backbone("deberta-v2", share_att_key=True)


@torch.inference_mode()
def test_an_adapter_at_a_shared_site_has_the_forward_to_itself(sharing: Backbone) -> None:
    shared = [site.name for site, at in sharing.spec.sites.items() if at.reach is Reach.SHARED]
    assert any(name.endswith("query_proj") for name in shared)
    assert any(name.endswith("key_proj") for name in shared)
    assert not any(name.endswith("value_proj") for name in shared)
    alone = [
        random_adapter(sharing, method, {"target_modules": ["query_proj", "key_proj", "value_proj"], **options}, seed=1)
        for method, options in (("lora", {"r": 2}), ("ia3", {}), ("dora", {"r": 3}), ("bitfit", {}), ("loha", {"r": 2}))
    ]
    mixed = [
        random_adapter(sharing, "lora", {"target_modules": ["value_proj"]}, seed=2),
        random_adapter(sharing, "bottleneck", {}, seed=3),
    ]
    assert all(adapter.bound.weights.alone for adapter in alone)
    assert not any(adapter.bound.weights.alone for adapter in mixed)

    texts = [random_text(length, seed=6) for length in (9, 8, 3, 30)]
    for adapter in alone:
        for other in (None, mixed[0].bound):
            with pytest.raises(ValueError, match="needs the forward to itself"):
                forward(sharing, [(texts[0], adapter.bound), (texts[1], other)])
        model = tiny_model("deberta-v2", share_att_key=True)
        rewrite(model, adapter, "deberta-v2")
        for text in texts:
            expected = model(input_ids=torch.tensor([text.ids])).last_hidden_state[0]
            (answer,) = run(sharing, [(text, adapter.bound)])
            torch.testing.assert_close(answer.states, expected, rtol=0, atol=TOLERANCE)

    rows: Rows = [(text, adapter.bound) for text in texts for adapter in (*alone, *mixed)]
    rows += [(text, None) for text in texts]
    close(run(sharing, rows), [run(sharing, [row])[0] for row in rows], TOLERANCE)

    asked = [Row(text, adapter) for text, adapter in rows if adapter]
    each = [Runner(sharing).run([row])[0] for row in asked]
    torch.testing.assert_close(Runner(sharing).run(asked), each, rtol=0, atol=1e-4)


# Attention with prefixes, against a dense one.


def dense(
    q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, *, causal: bool, sliding: int | None
) -> Tensor:
    """One text's attention, [heads, tokens, size] -> the same, one score after the other."""
    group = q.shape[0] // k.shape[0]
    k, v = (t.repeat_interleave(group, dim=0) for t in (k, v))
    own = k.shape[1]
    scores = q @ k.transpose(1, 2)
    for i in range(own):
        for j in range(own):
            if (causal and j > i) or (sliding is not None and abs(i - j) >= sliding):
                scores[:, i, j] = -math.inf
    values = v
    if before is not None:
        keys, first = (t.repeat_interleave(group, dim=0) for t in before)
        scores = torch.cat([q @ keys.transpose(1, 2), scores], dim=2)
        values = torch.cat([first, v], dim=1)
    return (scores / math.sqrt(q.shape[2])).softmax(-1) @ values


@torch.inference_mode()
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("sliding", [None, 4, 40])
@pytest.mark.parametrize("heads", [4, 2], ids=["own_heads", "grouped"])
def test_attention_with_prefixes_is_the_dense_one(causal: bool, sliding: int | None, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 3, 70, 1, 64, 20, 30, 2, 9]
    size, total = 8, sum(lengths)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # runs of one, of several, of windows' parts; text 1 and the last have none
    prefixes = [
        Prefix(start, end, KeyValue(rows(tokens, heads * size), rows(tokens, heads * size)), 0, Texts((), (), 0))
        for start, end, tokens in ((0, 1, 3), (2, 4, 1), (4, 7, 80), (7, 8, 2))
    ]
    module = nn.Module()
    module.is_causal = causal
    q, k, v = rows(1, 4, total, size), rows(1, heads, total, size), rows(1, heads, total, size)
    texts = PackedTexts(lengths, q.device, lambda asked: prefixes if asked is module else ())
    answer, _ = packed_attention(module, q, k, v, None, packed=texts, sliding_window=sliding)
    parts = zip(*(t[0].split(lengths, dim=1) for t in (q, k, v)), strict=True)
    for index, (seen, own) in enumerate(zip(answer[0].split(lengths), parts, strict=True)):
        before = None
        for prefix in prefixes:
            if prefix.start <= index < prefix.end:
                before = tuple(t.view(-1, heads, size).transpose(0, 1) for t in prefix.key_value[:2])
        expected = dense(*own, before, causal=causal, sliding=sliding)
        torch.testing.assert_close(seen.transpose(0, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "options"), [("lora", {"r": 2}), ("ia3", {})])
def test_a_gate_at_a_shared_site_is_each_texts_own(sharing: Backbone, method: str, options: dict) -> None:
    targets = {"target_modules": ["query_proj", "key_proj"], "use_gating": True, **options}
    adapter = random_adapter(sharing, method, targets, seed=4).bound
    rows: Rows = [(random_text(length, seed=7), adapter) for length in (9, 9, 4, 30)]
    with torch.inference_mode():
        close(run(sharing, rows), [run(sharing, [row])[0] for row in rows], TOLERANCE)


def test_answers_of_different_size_share_an_adapter_at_a_shared_site(sharing: Backbone) -> None:
    adapter = random_adapter(sharing, "lora", {"target_modules": ["query_proj"]}, seed=1).bound
    texts = [random_text(length, seed=8) for length in (6, 6, 6)]
    answers = Runner(sharing).run(
        [Row(text, adapter, ClassifyOptions(top_k)) for text, top_k in zip(texts, (1, None, 2), strict=True)]
    )
    assert [len(answer) for answer in answers] == [1, 3, 2]


def test_an_identity_beside_a_changed_input_changes_nothing(bert: Backbone) -> None:
    """What joins the residual stream is the stream as it was, not as another method of the adapter reads it."""
    scale = {"target_modules": ["intermediate.dense", "value"], "feedforward_modules": ["intermediate.dense", "value"]}
    alone = random_adapter(bert, "ia3", scale, seed=1)
    both = make_blueprint(bert.spec, "ia3", scale, also=[("bottleneck", {"mh_adapter": True})])
    fresh = both.init(bert, torch.Generator().manual_seed(0))
    bound = both.bind(fresh | alone.tensors, bert)
    text = random_text(12, seed=1)
    with torch.inference_mode():
        expected, answer = run(bert, [(text, alone.bound), (text, bound)])
    torch.testing.assert_close(answer.states, expected.states, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("also", ["compacter", "ln_tuning", "bitfit"])
def test_methods_that_would_overrule_each_other_are_refused(also: str, bert: Backbone) -> None:
    options = {"reduction_factor": 4} if also == "compacter" else {}
    with pytest.raises(InvalidAdapter, match="neither would see the other"):
        make_blueprint(bert.spec, "bottleneck", {}, also=[(also, options)])


def test_memory_counts_what_is_multiplied_out(bert: Backbone) -> None:
    stored = random_adapter(bert, "vera", {"r": 16}, seed=0)
    assert stored.bound.nbytes > sum(tensor.nbytes for tensor in stored.tensors.values())
    hadamard = random_adapter(bert, "loha", {"r": 5}, seed=0)
    assert hadamard.bound.nbytes > sum(tensor.nbytes for tensor in hadamard.tensors.values())
