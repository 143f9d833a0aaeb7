"""Blocks: memory that comes back by itself, and never while somebody has it."""

import gc

import pytest
import torch

from server.blocks import KEPT_BYTES, SMALLEST_BYTES, Blocks


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


def test_what_is_let_go_is_given_out_again(blocks: Blocks) -> None:
    first = blocks.take(100_000)
    first[:3] = b"abc"
    assert len(first) == 100_000
    assert blocks.kept == 0
    del first
    assert blocks.kept >= 100_000
    again = blocks.take(99_999)  # of as many pages
    assert bytes(again[:3]) == b"abc"
    assert blocks.kept == 0


def test_whatever_is_made_of_a_block_keeps_it(blocks: Blocks) -> None:
    numbers = torch.frombuffer(blocks.take(100_000), dtype=torch.float32).fill_(1)
    part = numbers[5:10].view(5, 1)
    del numbers
    other = torch.frombuffer(blocks.take(100_000), dtype=torch.float32).fill_(2)
    assert part.unique().tolist() == [1]
    assert blocks.kept == 0
    slices = [memoryview(bytearray(0)), blocks.take(100_000)[10:20]]
    assert blocks.kept == 0
    del part, other, slices
    gc.collect()
    assert blocks.kept >= 3 * 100_000


def test_little_waits_to_be_used_again(blocks: Blocks) -> None:
    del [blocks.take(1_000_000) for _ in range(20)][:]
    assert 0 < blocks.kept <= KEPT_BYTES
    assert blocks.take(2 * KEPT_BYTES).nbytes == 2 * KEPT_BYTES
    assert blocks.kept <= KEPT_BYTES
    blocks.drop()
    assert blocks.kept == 0


def test_small_pieces_are_not_kept(blocks: Blocks) -> None:
    assert len(blocks.take(SMALLEST_BYTES - 1)) == SMALLEST_BYTES - 1
    assert len(blocks.take(0)) == 0
    assert blocks.kept == 0
