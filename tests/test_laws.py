"""What holds for every adapter method on every backbone family. A new method or family is picked up by itself."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    EVERY_FAMILY,
    FAMILIES,
    LABELS,
    UNLISTED,
    VARIANTS,
    Answer,
    close,
    every_adapter,
    make_artifact,
    make_blueprint,
    method_config,
    random_adapter,
    random_tensors,
    random_text,
    run,
    tiny_backbone,
    tiny_model,
    variant_id,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.adapters import METHODS
from server.adapters.plan import AdapterPlan, Segment
from server.backbone.backbone import Backbone, fingerprint
from server.core import Encoding, Pooling, SiteKind
from server.engine.loading import build
from server.engine.runner import Row, Runner
from server.engine.scheduler import Scheduler
from server.engine.worker import QueuedRow, Ticket, Worker
from server.errors import InvalidAdapter, NotFiniteOutput
from server.metrics import Metrics
from server.store.store import AdapterStore
from server.tasks.adapter import TaskAdapter

TOLERANCE = 1e-5
LENGTHS = (1, 2, 3, 5, 8, 13, 30, 63, 64, 65, 120)
variants = pytest.mark.parametrize(("method", "options"), VARIANTS, ids=variant_id)
BackboneOf = Callable[[str], Backbone]
Rows = list[tuple[Encoding, TaskAdapter | None]]


def mixed_rows(adapters: list[TaskAdapter], seed: int, texts_each: int = 2) -> Rows:
    """Texts of many lengths in runs of one adapter each; bare texts between, some adapters in two runs."""
    rng = random.Random(seed)
    runs: list[TaskAdapter | None] = [*adapters, *rng.sample(adapters, len(adapters) // 2), None, None]
    rng.shuffle(runs)
    return [
        (random_text(rng.choice(LENGTHS), rng.randrange(100)), adapter)
        for adapter in runs
        for _ in range(rng.randint(1, texts_each))
    ]


def check_mixed_batch(backbone: Backbone, rows: Rows, tolerance: float) -> None:
    """A batch is each of its rows alone, and each adapter did something."""
    together = run(backbone, rows)
    alone = [run(backbone, [row])[0] for row in rows]
    close(together, alone, tolerance)
    bare = [run(backbone, [(text, None)])[0] for text, _ in rows]
    for (_, adapter), answer, untouched in zip(rows, together, bare, strict=True):
        moved = (answer.states - untouched.states).abs().max()
        assert moved > 1e-2 if adapter else moved <= tolerance


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_batch_equals_each_row_alone(backbone: Backbone, seed: int) -> None:
    adapters = [adapter.bound for adapter in every_adapter(backbone)]
    assert len({adapter.weights.method.name for adapter in adapters}) >= 1
    assert len({adapter.labels for adapter in adapters}) >= 2
    check_mixed_batch(backbone, mixed_rows(adapters, seed), TOLERANCE)


@torch.inference_mode()
def test_many_adapters_of_one_method_share_a_batch(bert: Backbone) -> None:
    adapters = [
        random_adapter(bert, "lora", {"r": 1 + seed % 5, "lora_alpha": 3 + seed}, seed=seed).bound for seed in range(40)
    ]
    check_mixed_batch(bert, mixed_rows(adapters, seed=0, texts_each=1), TOLERANCE)


@variants
def test_an_adapter_that_overflows_fails_nobody_else(method: str, options: dict, bert: Backbone) -> None:
    """Its NaNs reach neighbours that share an attention window; then the batch is run again adapter by adapter."""
    good = [random_adapter(bert, method, options, seed=seed).bound for seed in range(3)]
    blueprint = make_blueprint(bert.spec, method, options)
    huge = {name: torch.full(shape, 3e38) for name, shape in blueprint.shapes().items()}
    bad = blueprint.bind(huge, bert.device, bert.dtype)
    rows = [Row(random_text(9, seed=i), adapter) for i, adapter in enumerate([good[0], bad, good[1], bad, good[2]])]
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


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@variants
def test_the_math_at_a_site_is_the_papers(family: str, method: str, options: dict, backbone_of: BackboneOf) -> None:
    """Against the formulas written out once more, as hooks on an untouched transformers model."""
    if method not in ORACLES:
        pytest.skip(f"no second formula is written down for {method}")
    backbone = backbone_of(family)
    adapter = random_adapter(backbone, method, options, seed=3)
    model = tiny_model(family)
    for site in adapter.bound.weights.sites:
        path = site.name
        if site.kind is SiteKind.RESIDUAL:
            layer, place = site.name.split(".")
            listed = FAMILIES[family]
            path = (listed.attention_output if place == "attention" else listed.ffn_output).format(layer)
        tensors = {
            name.rpartition("/")[2]: tensor
            for name, tensor in adapter.tensors.items()
            if name.startswith(f"{site.kind.value}:{site.name}/")
        }
        assert tensors, f"no tensor is stored for {site}"
        config = adapter.blueprint.config
        model.get_submodule(path).register_forward_hook(
            lambda _, inputs, output, tensors=tensors, config=config: ORACLES[method](config, tensors, *inputs, output)
        )
    text = random_text(11, seed=5)
    expected = model(input_ids=torch.tensor([text.ids])).last_hidden_state[0]
    answer = run(backbone, [(text, adapter.bound)])[0]
    torch.testing.assert_close(answer.states, expected, rtol=0, atol=TOLERANCE)


def lora_oracle(config, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    delta = config.lora_alpha / config.r * tensors["lora_B"] @ tensors["lora_A"]  # [size_out, size_in]
    return y + torch.einsum("...i,oi->...o", x, delta)


def bottleneck_oracle(config, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    activation = {"relu": F.relu, "gelu": F.gelu, "swish": lambda h: h * h.sigmoid(), "tanh": torch.tanh}
    hidden = torch.einsum("...i,bi->...b", y, tensors["adapter_down.weight"]) + tensors["adapter_down.bias"]
    hidden = activation[config.non_linearity](hidden)
    return y + torch.einsum("...b,ob->...o", hidden, tensors["adapter_up.weight"]) + tensors["adapter_up.bias"]


ORACLES = {"lora": lora_oracle, "bottleneck": bottleneck_oracle}


@torch.inference_mode()
def test_saving_and_loading_gives_the_same_logits_bit_for_bit(backbone: Backbone, memory_store: AdapterStore) -> None:
    text = random_text(9, seed=1)
    for adapter in every_adapter(backbone):
        artifact = make_artifact(adapter.blueprint, adapter.tensors)
        version = memory_store.put_version("a", artifact)
        loaded = memory_store.get_version("a", version)
        assert loaded.manifest == artifact.manifest
        bound = build(loaded, backbone)
        assert bound.labels == adapter.blueprint.labels
        before, after = run(backbone, [(text, adapter.bound)])[0], run(backbone, [(text, bound)])[0]
        assert torch.equal(before.logits, after.logits)
        assert torch.equal(before.states, after.states)


def test_the_backbone_is_untouched(backbone: Backbone) -> None:
    text = random_text(20, seed=2)
    with torch.inference_mode():
        before = run(backbone, [(text, None)])[0]
        run(backbone, mixed_rows([adapter.bound for adapter in every_adapter(backbone)], seed=1))
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
    adapter = random_adapter(backbone, "lora", {}, seed=0).bound
    run(backbone, [(text, adapter)])
    assert torch.equal(backbone.model(input_ids=ids).last_hidden_state, before)
    next(reversed(adapter.weights.sites.values())).a.resize_(3, 3)
    with pytest.raises(RuntimeError):
        run(backbone, [(text, adapter)])
    assert torch.equal(backbone.model(input_ids=ids).last_hidden_state, before)


@torch.inference_mode()
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_a_fresh_adapter_changes_nothing(method: str, bert: Backbone) -> None:
    blueprint = make_blueprint(bert.spec, method, {})
    tensors = blueprint.init(torch.Generator().manual_seed(0))
    fresh = blueprint.bind(tensors, bert.device, bert.dtype)
    assert any(tensor.any() for name, tensor in tensors.items() if not name.startswith("head/"))
    text = random_text(15, seed=3)
    assert torch.equal(run(bert, [(text, fresh)])[0].states, run(bert, [(text, None)])[0].states)


def test_fresh_tensors_are_the_same_for_the_same_seed(bert: Backbone) -> None:
    for method, options in VARIANTS:
        blueprint = make_blueprint(bert.spec, method, options)
        one, same, other = (blueprint.init(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
        assert all(tensor.dtype == torch.float32 for tensor in one.values())


def one_site(method: str, options: dict, bert: Backbone) -> tuple:
    """A method, its config, a site of it, and double-precision parameters, x and y for that site made small."""
    kind = METHODS[method]
    config = kind.Config.model_validate(method_config(method, options, bert.spec))
    site = kind.sites(config, bert.spec)[0]
    size_in, size_out = (5, 7) if site.kind is SiteKind.LINEAR else (6, 6)
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    params = {name: random_tensor(*shape) for name, shape in kind.shapes(config, site, size_in, size_out).items()}
    return kind, config, site, params, random_tensor(4, size_in), random_tensor(4, size_out)


@variants
def test_bind_and_apply_are_differentiable(method: str, options: dict, bert: Backbone) -> None:
    kind, config, site, params, x, y = one_site(method, options, bert)

    def output(x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
        return kind.apply(kind.bind(config, site, dict(zip(params, values, strict=True))), x, y)

    assert output(x, y, *params.values()).shape == y.shape
    assert torch.autograd.gradcheck(output, (x, y, *params.values()))


@variants
def test_apply_writes_to_nothing(method: str, options: dict, bert: Backbone) -> None:
    kind, config, site, params, x, y = one_site(method, options, bert)
    inputs = [x, y, *params.values()]
    for tensor in inputs:
        tensor.requires_grad_(False)
    before = [tensor.clone() for tensor in inputs]
    weights = kind.bind(config, site, params)
    first = kind.apply(weights, x, y)
    kept = first.clone()
    first += 1  # a caller may do so; neither x nor y may be the same memory
    assert torch.equal(kind.apply(weights, x, y), kept)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@variants
def test_apply_takes_an_empty_slice(method: str, options: dict, bert: Backbone) -> None:
    kind, config, site, params, x, y = one_site(method, options, bert)
    assert kind.apply(kind.bind(config, site, params), x[:0], y[:0]).shape == (0, y.shape[1])


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(backbone: Backbone) -> None:
    adapters = every_adapter(backbone)
    texts = [[random_text(length, seed=i) for length in (3, 17)] for i in range(len(adapters))]

    def gradients(batched: bool) -> list[dict[str, Tensor]]:
        leaves = [
            {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors.items()} for adapter in adapters
        ]
        rows: Rows = []
        for adapter, tensors, own in zip(adapters, leaves, texts, strict=True):
            bound = adapter.blueprint.bind(tensors, backbone.device, backbone.dtype)
            rows += [(text, bound) for text in own]
        batches = [rows] if batched else [[row] for row in rows]
        answers = [answer for batch in batches for answer in run(backbone, batch)]
        torch.stack([answer.logits.logsumexp(0) for answer in answers]).sum().backward()
        return [{name: tensor.grad for name, tensor in tensors.items()} for tensors in leaves]

    for together, alone in zip(gradients(batched=True), gradients(batched=False), strict=True):
        for name, gradient in together.items():
            assert gradient.abs().max() > 0, f"{name} gets no gradient"
            torch.testing.assert_close(gradient, alone[name], rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_gradients_are_the_finite_differences(family: str) -> None:
    backbone = tiny_backbone(family, dtype=torch.float64)
    texts = [random_text(length, seed=1) for length in (4, 19, 7)]
    for index, (method, options) in enumerate(VARIANTS):
        blueprint = make_blueprint(backbone.spec, method, options)
        names = [name for name in blueprint.shapes() if not name.startswith("head/")]
        tensors = {name: tensor.double() for name, tensor in random_tensors(blueprint, seed=index).items()}
        generator = torch.Generator().manual_seed(index)
        direction = {name: torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64) for name in names}
        weight = torch.randn(30, backbone.spec.hidden_size, generator=generator, dtype=torch.float64)

        def loss(step: float | Tensor) -> Tensor:
            moved = tensors | {name: tensors[name] + step * direction[name] for name in names}  # noqa: B023
            bound = blueprint.bind(moved, CPU, torch.float64)  # noqa: B023
            states = backbone.forward(texts, AdapterPlan([Segment(bound.weights, 0, 3)]))
            return (states.tokens * weight).sum()  # noqa: B023

        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(step), step)
        with torch.no_grad():
            difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
        torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_padded_and_the_packed_layout_agree() -> None:
    packed, padded = tiny_backbone("bert"), tiny_backbone("bert")
    assert packed.packed
    padded.packed = False
    padded.model.set_attn_implementation("sdpa")
    rows = mixed_rows([adapter.bound for adapter in every_adapter(packed)], seed=0)
    close(run(packed, rows), run(padded, rows), TOLERANCE)


@pytest.mark.parametrize("family", EVERY_FAMILY)
@variants
def test_a_method_works_or_is_refused(family: str, method: str, options: dict, backbone_of: BackboneOf) -> None:
    backbone = backbone_of(family)
    refusal = None
    try:
        make_blueprint(backbone.spec, method, options)
    except InvalidAdapter as error:
        refusal = error
    if refusal is not None:
        assert family in UNLISTED, f"{method} is refused on a listed family: {refusal.message}"
        assert refusal.param
        assert family in refusal.message
        return
    adapter = random_adapter(backbone, method, options, seed=0).bound
    with torch.inference_mode():
        (answer,) = run(backbone, [(random_text(8, seed=0), adapter)])
    assert answer.logits.isfinite().all()
    assert answer.logits.shape == (3,)


@pytest.mark.parametrize("family", UNLISTED)
def test_residual_methods_are_refused_on_an_unlisted_family(family: str, backbone_of: BackboneOf) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        make_blueprint(backbone_of(family).spec, "bottleneck", {})
    assert (caught.value.param, caught.value.error_code) == ("method", "unsupported_method")
    assert make_blueprint(backbone_of(family).spec, "lora", {})


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_strays_from_the_device(family: str, backbone_of: BackboneOf) -> None:
    """On the meta device a stray CPU tensor raises, and so does a look at a value: a hidden synchronization."""
    if not backbone_of(family).packed:
        pytest.skip("transformers' own masks for padded batches look at values")
    meta = torch.device("meta")
    backbone = tiny_backbone(family, device=meta)
    assert backbone.packed
    adapters = [
        random_adapter(backbone, method, options, seed=0, pooling=pooling, labels=LABELS[:4]).bound
        for method, options in VARIANTS
        for pooling in backbone.spec.poolings
    ]
    with OneDevice():
        answers = run(backbone, mixed_rows(adapters, seed=0))
    assert all(answer.states.device == meta for answer in answers)
    logits = [answer.logits for answer in answers if answer.logits is not None]
    assert len(logits) >= len(adapters)
    assert all(row.device == meta and row.shape == (4,) for row in logits)


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
    sites = adapter.bound.weights.sites
    assert {tensor.dtype for weights in sites.values() for tensor in weights} == {torch.bfloat16}
    assert torch.equal(adapter.bound.head.weight, adapter.tensors["head/classifier.weight"])
    assert torch.equal(adapter.bound.head.bias, adapter.tensors["head/classifier.bias"])
    with torch.inference_mode():
        (answer,) = run(backbone, [(random_text(8, seed=0), adapter.bound)])
    assert answer.logits.dtype == torch.float32
    whole = random_adapter(tiny_backbone("bert"), "lora", {}, seed=0, pooling=Pooling.POOLER)
    assert whole.bound.nbytes > adapter.bound.nbytes


@torch.inference_mode()
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_every_method_runs_in_bfloat16(family: str, backbone_of: BackboneOf) -> None:
    exact, rounded = backbone_of(family), tiny_backbone(family, dtype=torch.bfloat16)
    for one, other in zip(every_adapter(exact), every_adapter(rounded), strict=True):
        texts = [random_text(length, seed=1) for length in (3, 40, 12)]
        expected = run(exact, [(text, one.bound) for text in texts])
        for answer, reference in zip(run(rounded, [(text, other.bound) for text in texts]), expected, strict=True):
            assert answer.states.dtype == torch.bfloat16
            error = (answer.states.float() - reference.states).abs().mean()
            assert 0 < error < 0.05 * reference.states.abs().mean()
