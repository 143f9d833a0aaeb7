"""One text through many adapters: what they have in common is computed once, and each answers as it does alone."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    LABELS,
    close,
    every_adapter,
    forward,
    random_adapter,
    random_text,
    run,
    tiny_backbone,
    tiny_model,
)
from torch import Tensor, nn
from transformers import BertModel

from server.adapters.joined import rounded_up
from server.backbone.backbone import Backbone
from server.backbone.sharing import Share, shares
from server.core import ClassifyOptions, Encoding, Pooling
from server.engine.pipeline import Job
from server.engine.runner import Row, Runner
from server.engine.scheduler import Scheduler
from server.engine.worker import QueuedRow, Ticket, Worker
from server.errors import InvalidAdapter, MemoryFull, NotFiniteOutput
from server.metrics import Metrics
from server.tasks.adapter import Blueprint, TaskAdapter
from server.tasks.pooled import PooledTask

LAYERS = 4
TOLERANCE = 1e-5
FALLING_BACK = ("albert", "mpnet", "deberta-v2")
"""A layer that runs several times, and the padded layout: each copy is computed for itself."""

SHARING = tuple(family for family in FAMILIES if family not in FALLING_BACK)


@pytest.fixture(scope="module")
def deep() -> Backbone:
    """A BERT of four layers."""
    return tiny_backbone("bert", num_hidden_layers=LAYERS)


def in_layer(backbone: Backbone, layer: int, *, seed: int) -> TaskAdapter:
    """LoRA at all linear layers of one layer."""
    options = {"target_modules": rf".*\.{re.escape(backbone.spec.layers[layer])}\..*"}
    return random_adapter(backbone, "lora", {"r": 2, "lora_alpha": 2, **options}, seed=seed).bound


def head(backbone: Backbone, seed: int, task: str = "classification", **options: Any) -> TaskAdapter:
    """An adapter that is a head and nothing else."""
    blueprint = Blueprint.check(
        method="head_only", config={}, task=task, head=options, labels=LABELS[: 2 + seed % 3], spec=backbone.spec
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in blueprint.shapes().items()}
    return blueprint.bind(tensors, backbone)


@contextmanager
def observed(backbone: Backbone) -> Any:
    """Rows that enter a linear layer of each layer, in the order of the layers."""
    rows: list[int] = []
    firsts = [
        next(module for module in backbone.model.get_submodule(path).modules() if hasattr(module, "weight"))
        for path in backbone.spec.layers
    ]
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].flatten(0, -2).shape[0]))
        for module in firsts
    ]
    yield rows
    for hook in hooks:
        hook.remove()


# ------------------------------------------------------------------------------------------------ what can be shared


def test_copies_are_computed_for_each_other_until_they_part() -> None:
    a, b, c = object(), object(), object()
    assert shares([a, b, c], [0, 2, 4]) == []
    assert shares([a, a, b], [0, 0, 4]) == []
    assert shares([a, a], [0, 3]) == []  # the other is on its own from the start, then
    assert shares([a, a], [3, 3]) == [Share(0, [0, 0]), Share(3, [0, 1])]
    assert shares([a, b, a, c, a], [2, 0, 4, 4, 3]) == [
        Share(0, [0, 1, 0, 3, 0]),
        Share(2, [0, 1, 2, 3, 2]),
        Share(3, [0, 1, 2, 3, 4]),
    ]
    assert shares([a, b, b, a], [1, 2, 2, 1]) == [
        Share(0, [0, 1, 1, 0]),
        Share(1, [0, 1, 1, 3]),
        Share(2, [0, 1, 2, 3]),
    ]


def test_equal_texts_that_are_not_the_same_object_are_no_copies() -> None:
    one, other = random_text(5, 0), random_text(5, 0)
    assert one == other
    assert shares([one, other], [2, 2]) == []


# -------------------------------------------------------------------------------------------------------- in the model


def mixed_fanout(backbone: Backbone) -> list[tuple[Encoding, TaskAdapter | None]]:
    """Two texts through adapters that first act at different layers, and ordinary texts between them."""
    adapters = [adapter.bound for adapter in every_adapter(backbone)]
    layers = len(backbone.spec.layers)
    options = [
        ("bottleneck", {"leave_out": [*range(layer)], "mh_adapter": True, "reduction_factor": 4})
        for layer in range(layers)
    ]
    options += [
        ("prefix_tuning", {"num_virtual_tokens": 2, "leave_out": [0]}),
        ("prefix_tuning", {"num_virtual_tokens": 3, "use_gating": True, "leave_out": [*range(layers - 1)]}),
        ("post_encoder", {}),
        ("post_encoder", {"residual": True}),
    ]
    for seed, (method, own) in enumerate(options):
        try:
            adapters.append(random_adapter(backbone, method, own, seed=100 + seed).bound)
        except InvalidAdapter:  # the family does not carry it
            continue
    adapters += [in_layer(backbone, layer, seed=layer) for layer in range(layers) for _ in range(2)]
    one, two = random_text(9, 1), random_text(70, 2)
    rows: list[tuple[Encoding, TaskAdapter | None]] = []
    for index, adapter in enumerate(adapters):
        rows += [(one, adapter), (two, adapter)] if index % 2 else [(two, adapter)]
        if index % 5 == 0:
            rows += [(random_text(3 + index, 3), adapter), (one, None), (two, None)]
    return rows


@torch.inference_mode()
def test_a_fanout_equals_each_adapter_alone(backbone: Backbone) -> None:
    rows = mixed_fanout(backbone)
    close(run(backbone, rows), [run(backbone, [row])[0] for row in rows], TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("family", SHARING)
def test_copies_may_part_at_every_layer(family: str) -> None:
    """In double precision, since rounding adds up over the layers."""
    backbone = tiny_backbone(family, num_hidden_layers=LAYERS, dtype=torch.float64)
    rows = mixed_fanout(backbone)
    together = run(backbone, rows)
    for answer, row in zip(together, rows, strict=True):
        torch.testing.assert_close(answer.states, run(backbone, [row])[0].states, rtol=0, atol=1e-10)


@torch.inference_mode()
@pytest.mark.parametrize("family", SHARING)
def test_layers_below_the_adapters_see_each_text_once(family: str) -> None:
    backbone = tiny_backbone(family, num_hidden_layers=LAYERS)
    text, other = random_text(9, 1), random_text(5, 2)
    adapters = [in_layer(backbone, layer, seed=layer) for layer in (2, 2, 3)]
    rows = [*((text, adapter) for adapter in adapters), (text, None), (text, None), (other, adapters[0])]
    with observed(backbone) as seen:
        together = forward(backbone, rows)
    # at layer 2 two copies part from the others, at layer 3 one more, after the last the two bare ones
    assert seen == [9 + 5, 9 + 5, 3 * 9 + 5, 4 * 9 + 5]
    close(together, [forward(backbone, [row])[0] for row in rows], TOLERANCE)
    with observed(backbone) as seen:
        forward(backbone, rows[:1])
        forward(backbone, [(random_text(9, 1), None), (random_text(9, 1), None)])
    assert seen == [9] * LAYERS + [18] * LAYERS


@torch.inference_mode()
@pytest.mark.parametrize(
    ("method", "options", "parted"),
    [
        ("lora", {"r": 2, "layers_to_transform": [3], "target_modules": ["query"]}, 3),
        ("lora", {"r": 2, "target_modules": ["pooler.dense"]}, 4),
        ("bottleneck", {"leave_out": [0, 1], "reduction_factor": 4}, 2),
        ("bottleneck", {"leave_out": [0], "mh_adapter": True, "use_gating": True, "reduction_factor": 4}, 1),
        ("prefix_tuning", {"num_virtual_tokens": 2, "leave_out": [0, 1]}, 2),
        ("prefix_tuning", {"num_virtual_tokens": 2, "leave_out": [0, 1, 2], "use_gating": True}, 3),
        ("ln_tuning", {"target_modules": r".*layer\.[23]\..*LayerNorm"}, 2),
        ("ia3", {"target_modules": r".*layer\.1\..*dense", "feedforward_modules": r".*layer\.1\..*dense"}, 1),
        ("post_encoder", {}, 4),
    ],
    ids=str,
)
def test_every_kind_of_adapter_shares_what_lies_below_it(
    method: str, options: dict, parted: int, deep: Backbone
) -> None:
    text = random_text(8, 0)
    adapters = [random_adapter(deep, method, options, seed=seed, pooling=Pooling.POOLER).bound for seed in range(3)]
    rows = [(text, adapter) for adapter in adapters]
    with observed(deep) as seen:
        together = forward(deep, rows)
    assert seen == [8] * parted + [24] * (LAYERS - parted)
    close(together, [forward(deep, [row])[0] for row in rows], TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["modernbert", "gpt2"])
def test_norms_after_the_last_layer_belong_to_no_layer(family: str) -> None:
    backbone = tiny_backbone(family, num_hidden_layers=LAYERS)
    text = random_text(6, 1)
    final = ["final_norm" if family == "modernbert" else "ln_f"]
    adapters = [random_adapter(backbone, "ln_tuning", {"target_modules": final}, seed=seed).bound for seed in range(3)]
    rows = [(text, adapter) for adapter in adapters]
    with observed(backbone) as seen:
        together = forward(backbone, rows)
    assert seen == [6] * LAYERS
    close(together, [forward(backbone, [row])[0] for row in rows], TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt_tuning", {"num_virtual_tokens": 2}),
        ("invertible", {}),
        ("lora", {"r": 2, "target_modules": ["word_embeddings"]}),
        ("lora", {"r": 2}),
    ],
)
def test_adapters_that_act_from_the_start_share_nothing(method: str, options: dict, deep: Backbone) -> None:
    adapters = [random_adapter(deep, method, options, seed=seed).bound for seed in range(3)]
    rows = [(random_text(8, 0), None)] * 2 + [(text, adapter) for text in [random_text(8, 1)] for adapter in adapters]
    with observed(deep) as seen:
        together = forward(deep, rows)
    extra = adapters[0].weights.framing.virtual_tokens
    assert seen == [8 + 3 * (8 + extra)] * LAYERS
    close(together, [forward(deep, [row])[0] for row in rows], TOLERANCE)


def test_gradients_flow_through_what_is_shared(deep: Backbone) -> None:
    weights = [in_layer(deep, layer, seed=layer) for layer in (1, 3)]
    text = random_text(7, 0)

    def gradient(rows: Sequence[tuple[Encoding, TaskAdapter]]) -> torch.Tensor:
        heads = [adapter.head.layers.weight.clone().requires_grad_() for _, adapter in rows]
        answers = forward(deep, list(rows))
        loss = sum((one @ answer.states.T).square().sum() for one, answer in zip(heads, answers, strict=True))
        return torch.stack(torch.autograd.grad(loss, heads))

    shared = gradient([(text, adapter) for adapter in weights])
    apart = gradient([(random_text(7, 0), adapter) for adapter in weights])
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_row_counts_stay_among_the_known_ones_in_bfloat16_on_a_cpu() -> None:
    backbone = tiny_backbone("bert", num_hidden_layers=LAYERS, dtype=torch.bfloat16)
    text = random_text(13, 1)
    rows = [(text, in_layer(backbone, layer, seed=layer)) for layer in (1, 1, 2, 2, 3, 3)]
    with observed(backbone) as seen:
        together = forward(backbone, rows)
    assert seen == [rounded_up(count * 13, steps=8) for count in (1, 3, 5, 6)]
    assert len(set(seen)) > 2
    for answer, row in zip(together, rows, strict=True):
        expected = forward(backbone, [row])[0].states
        assert (answer.states - expected).abs().max() < 0.05 * expected.abs().max()


def by_name(model: BertModel) -> None:
    """The layers are handed their states by name."""

    def renamed(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        names = ("hidden_states", "attention_mask", "encoder_hidden_states")
        return (), kwargs | dict(zip(names, args, strict=False))

    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(renamed, with_kwargs=True)


def one_query(model: BertModel) -> None:
    """Two layers have a module in common."""
    model.encoder.layer[1].attention.self.query = model.encoder.layer[0].attention.self.query


@torch.inference_mode()
@pytest.mark.parametrize("change", [by_name, one_query])
def test_where_the_layers_do_not_let_it_nothing_is_shared(change: Callable[[BertModel], None]) -> None:
    with torch.inference_mode(False):
        model = tiny_model("bert")
    change(model)
    backbone = tiny_backbone("bert", model=model)
    text = random_text(7, 1)
    rows = [(text, in_layer(backbone, 1, seed=seed)) for seed in range(3)]
    with observed(backbone) as seen:
        together = forward(backbone, rows)
    assert set(seen) == {21}
    close(together, [forward(backbone, [row])[0] for row in rows], TOLERANCE)


# -------------------------------------------------------------------------------------------------------- in the runner


def answers_alone(backbone: Backbone, rows: Sequence[Row]) -> list[Any]:
    return [Runner(backbone).run([row])[0] for row in rows]


def asked(text: Encoding, adapter: TaskAdapter) -> Row:
    """For an answer where the outputs alone make one, else for the outputs."""
    return Row(text, adapter, ClassifyOptions() if isinstance(adapter.task, PooledTask) else None)


def same_answers(one: Sequence[Any], other: Sequence[Any]) -> None:
    """Labels alike, scores but for rounding."""
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
        else:
            assert [score.label for score in a] == [score.label for score in b]
            assert [score.score for score in a] == pytest.approx([score.score for score in b], abs=TOLERANCE)


def test_heads_of_all_tasks_read_one_row(deep: Backbone) -> None:
    text = random_text(11, 1)
    heads = [
        head(deep, 0, pooling=Pooling.MEAN),
        head(deep, 1, pooling=Pooling.CLS),
        head(deep, 2, pooling=Pooling.POOLER),
        head(deep, 3, "multi_label_classification", pooling=Pooling.MEAN),
        head(deep, 4, "tagging"),
        head(deep, 5, "tagging"),
    ]
    rows = [asked(text, adapter) for adapter in heads]
    with observed(deep) as seen:
        answers = Runner(deep).run(rows)
    assert seen == [11] * LAYERS
    same_answers(answers, answers_alone(deep, rows))


@pytest.mark.parametrize("family", ["bert", "mpnet", "albert", "llama"])
def test_any_mixture_answers_as_each_row_alone(family: str, backbone_of: Callable[[str], Backbone]) -> None:
    """Heads read texts that do not lie side by side; the same row twice; ordinary rows between; padded or packed."""
    backbone = backbone_of(family)
    texts = [random_text(length, seed=length) for length in (9, 4, 10, 12, 11)]
    tasks = ["classification", "tagging", "multi_label_classification", "classification"]
    heads = [head(backbone, seed, task) for seed, task in enumerate(tasks)]
    lora = [in_layer(backbone, len(backbone.spec.layers) - 1, seed=seed) for seed in range(3)]
    prompts = random_adapter(backbone, "prompt_tuning", {"num_virtual_tokens": 2}, seed=9).bound
    rows = [asked(texts[i], adapter) for adapter in [*heads, *lora] for i in (0, 1, 2, 3)]
    rows += [asked(texts[i], heads[1]) for i in (4, 2, 0)]
    rows += [asked(texts[i], heads[0]) for i in (4, 4, 1)]
    rows += [asked(random_text(8, seed), lora[seed % 3]) for seed in range(4)]
    rows += [asked(texts[i], prompts) for i in (0, 0, 3)]
    rows = [rows[(7 * index) % len(rows)] for index in range(len(rows))]
    assert len(set(map(id, rows))) == len(rows)
    same_answers(Runner(backbone).run(rows), answers_alone(backbone, rows))


def test_the_same_row_twice_is_computed_once(deep: Backbone) -> None:
    text, lora = random_text(9, 0), in_layer(deep, 0, seed=0)
    with observed(deep) as seen:
        answers = Runner(deep).run([asked(text, lora), asked(text, lora), asked(random_text(9, 0), lora)])
    assert seen == [18] * LAYERS
    same_answers(answers[1:], answers[:1] * 2)


def test_an_adapter_that_overflows_fails_nobody_else_of_its_fanout(deep: Backbone) -> None:
    text = random_text(9, 1)

    def ruined(adapter: TaskAdapter) -> TaskAdapter:
        adapter.head.layers.weight.fill_(float("nan"))
        return adapter

    good = [head(deep, 0), in_layer(deep, 2, seed=0), head(deep, 1), in_layer(deep, 3, seed=1)]
    bad = [ruined(head(deep, 2)), ruined(in_layer(deep, 2, seed=2))]
    for site in bad[1].weights.parts[0].sites.values():
        site.a.fill_(float("inf"))
    rows = [asked(text, adapter) for pair in zip(good, [*bad, *bad], strict=True) for adapter in pair]
    scheduler = Scheduler[QueuedRow](max_batch_tokens=1000, max_queue_tokens=1000, clock=time.monotonic)
    worker = Worker(Runner(deep), scheduler, Metrics())
    tickets = [Ticket(1) for _ in rows]
    worker._run([QueuedRow(row, ticket, 0) for row, ticket in zip(rows, tickets, strict=True)])
    for row, ticket in zip(rows, tickets, strict=True):
        if any(row.adapter is one for one in bad):
            assert isinstance(ticket.future.exception(timeout=0), NotFiniteOutput)
        else:
            same_answers(ticket.future.result(timeout=0), answers_alone(deep, [row]))


def test_an_error_that_names_its_adapter_still_says_when_to_come_back(deep: Backbone) -> None:
    error = MemoryFull("no room")
    error.retry_after = 7
    with (
        pytest.raises(MemoryFull, match=r"'x'.*no room") as caught,
        Job(head(deep, 0), ClassifyOptions(), name="x").blamed(),
    ):
        raise error
    assert (caught.value.param, caught.value.retry_after) == ("adapter", 7)
