"""bfloat16 on a CPU: products in few shapes, which change no answer and no neighbour."""

import pytest
import torch
from helpers import LABELS, build, random_text, run, tiny_backbone
from test_http import own_adapter

from server.adapters.joined import rounded_up
from server.backbone.backbone import Backbone


@pytest.fixture(scope="module")
def half() -> Backbone:
    """A tiny BERT in bfloat16."""
    return tiny_backbone("bert", dtype=torch.bfloat16)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_sizes_are_few_and_never_too_small(steps: int) -> None:
    sizes = [rounded_up(rows, steps) for rows in range(1, 5000)]
    assert all(rows <= size < rows + max(16, rows / steps) for rows, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 10 * steps + 16
    assert all(rounded_up(size, steps) == size for size in set(sizes))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 7, 3, 8, 2), (8,) * 20, (60, 8)])
@torch.inference_mode()
def test_a_mixed_batch_gives_each_text_what_it_gets_alone(half: Backbone, ranks: tuple[int, ...]) -> None:
    adapters = [
        build(own_adapter(half, "lora", {"r": rank, "target_modules": ["query", "value"]}, list(LABELS), seed), half)
        for seed, rank in enumerate(ranks)
    ]
    rows = [(random_text(3 + 7 * index % 40, index), adapter) for index, adapter in enumerate(adapters)]
    rows.insert(1, (random_text(11, 99), None))
    together = run(half, rows)
    for row, mixed in zip(rows, together, strict=True):
        [alone] = run(half, [row])
        assert mixed.states.shape == alone.states.shape
        torch.testing.assert_close(mixed.states.float(), alone.states.float(), atol=0.06, rtol=0.06)
    bare = run(half, [(text, None) for text, _ in rows])
    torch.testing.assert_close(together[1].states.float(), bare[1].states.float(), atol=0.06, rtol=0.06)


def test_compact_weights_are_the_same_and_lie_together(half: Backbone) -> None:
    made = own_adapter(half, "lora", {"r": 4, "target_modules": ["query", "value"]}, list(LABELS), 5)
    adapter = build(made, half)
    factors = [factor for part in adapter.weights.parts for own in part.sites.values() for factor in (own.a, own.b)]
    assert len({factor.untyped_storage().data_ptr() for factor in factors}) == 1
    assert all(factor.data_ptr() % 64 == factors[0].data_ptr() % 64 for factor in factors)
