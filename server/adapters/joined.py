"""Products of neighbouring adapters, joined: fewer and larger matrix products than one after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.flow import Flow, Gate

JOINED_COLUMNS = 64
"""Ranks of neighbouring adapters that are multiplied together, up to this sum. Joining multiplies more than needed and
calls less. On a CPU, for 64 adapters of rank 8, bfloat16 gains up to 64 columns."""

ONE_PRODUCT_COLUMNS = 128
"""The same where a single product then does, for more rows than ONE_PRODUCT_ROWS: in bfloat16 on a CPU, 16 adapters of
rank 8 on 350 rows take a third less than with two products of 64 columns, 12 on 230 rows half of what they take more
than a single one."""

ONE_PRODUCT_ROWS = 128
"""What fewer rows gain does not count, and each further shape of a product takes memory and time to compile."""

FLOAT32_CPU_COLUMNS = 24
"""The same for float32 on a CPU, whose small products are quick: it gains only up to 16 or 32."""

JOINED_ROWS = 256
"""Rows of neighbouring adapters that are scaled or shifted together, up to this sum: few enough to stay in a core's
cache, many enough that calls do not count."""


MIN_SIZE = 16
"""Rows and columns of the smallest product that is compiled."""

WIDTH_STEP = 32
"""Columns from one size to the next between a full group's and those that one product does for."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number, the integers of as many."""


def columns(like: Tensor) -> int:
    """How many columns of such products to join."""
    return FLOAT32_CPU_COLUMNS if like.dtype == torch.float32 and like.device.type == "cpu" else JOINED_COLUMNS


def groups(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Neighbours to join, as (first, one past the last): as many as the limit holds, at least one."""
    first = total = 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            yield first, index
            first, total = index, 0
        total += size
    if sizes:
        yield first, len(sizes)


def row_groups(flow: Flow) -> Iterator[tuple[int, int]]:
    """Neighbours whose rows are scaled or shifted together."""
    return groups(flow.lengths, JOINED_ROWS)


def scaled(y: Tensor, vectors: Sequence[Tensor], flow: Flow) -> Tensor:
    """y with each row multiplied by its adapter's vector; y itself where the flow owns it."""
    own = flow.per_row(vectors)
    return y.mul_(own) if flow.owned else y * own


def shifted(y: Tensor, vectors: Sequence[Tensor], flow: Flow) -> Tensor:
    """The same with the vectors added."""
    own = flow.per_row(vectors)
    return y.add_(own) if flow.owned else y + own


def compiles(y: Tensor) -> bool:
    """Whether products with as many rows as y are compiled for each shape that has not been before: by oneDNN, which
    multiplies bfloat16 on a CPU. That takes most of a millisecond, and most of a megabyte that is kept."""
    return y.dtype == torch.bfloat16 and y.device.type == "cpu"


def rounded_up(rows: int, steps: int) -> int:
    """The next of so many sizes in each power of two, `steps` itself one; never less than MIN_SIZE."""
    step = max(MIN_SIZE, (1 << (rows.bit_length() - 1)) // steps)
    return -(-rows // step) * step


def own_columns(low: Tensor, ranks: Sequence[int], flow: Flow, before: int = 0) -> Tensor:
    """`low` where row and column are of the same one of the joined adapters, else 0, whatever is there: a neighbour's
    overflow times 0 would not be 0. It may be changed.

    Shape [rows, columns]; `before` rows come before the flow's, and there may be some after them, and columns after the
    adapters'. All those are nobody's.
    """
    key = (tuple(ranks), flow.lengths, before, low.shape, low.dtype)
    if key not in flow.shared:
        owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        own = flow.owners[:, None] == owners.to(flow.y.device, non_blocking=True)
        after = low.shape[0] - before - own.shape[0]
        bits = F.pad(own, (0, low.shape[1] - own.shape[1], before, after)).to(_BITS[low.element_size()]).neg_()
        flow.shared[key] = bits  # all of them set, or none
    bits = flow.shared[key]
    if low.requires_grad:
        return low.masked_fill(bits == 0, 0)
    low.view(bits.dtype).bitwise_and_(bits)  # on a CPU it takes a sixth of what filling does
    return low


class LowRank(NamedTuple):
    """y * scale + shift + gate * x A B at one site, where scale, shift and gate may be missing."""

    a: Tensor  # [rank, size_in]
    b: Tensor | None  # [rank, size_out]; None where A is the whole product, [size_out, size_in]
    shift: Tensor | None = None  # [size_out]
    scale: Tensor | None = None  # [size_out]
    gate: Gate | None = None

    @property
    def columns(self) -> int:
        """What it counts for when products are joined: what cannot be joined fills a group."""
        return ONE_PRODUCT_COLUMNS if self.b is None or self.gate is not None else self.a.shape[0]


def low_rank(weights: LowRank, flow: Flow) -> Tensor:
    """One adapter's."""
    y = _scaled_and_shifted([weights], flow)
    if flow.x.dim() == 1:  # ids: an embedding is the product with a one-hot matrix
        low = F.embedding(flow.x, weights.a.t())
        return y + low if weights.b is None else torch.addmm(y, low, weights.b)
    low = F.linear(flow.x, weights.a)
    if weights.b is None:
        return y + low
    return torch.addmm(y, low if weights.gate is None else low * weights.gate.per_row(flow.x, flow.texts[0]), weights.b)


def low_rank_run(weights: Sequence[LowRank], flow: Flow) -> Iterator[Tensor]:
    """Joins the products of neighbours: one `x @ [A1 A2 ...]`, of which each row keeps its own adapter's columns, and
    one `@ [B1; B2; ...]`. See JOINED_COLUMNS.
    """
    limit = columns(flow.y)
    sizes = [ONE_PRODUCT_COLUMNS if flow.x.dim() == 1 else own.columns for own in weights]
    if compiles(flow.y) and flow.y.shape[0] > ONE_PRODUCT_ROWS and sum(sizes) <= ONE_PRODUCT_COLUMNS:
        limit = ONE_PRODUCT_COLUMNS
    for first, end in groups(sizes, limit):
        part, group = flow.cut(first, end), weights[first:end]
        factors = [own.b for own in group if own.b is not None]
        if len(group) == 1 and (flow.x.dim() == 1 or not factors or group[0].gate is not None):
            yield low_rank(group[0], part)
            continue
        if part.whole is not None and compiles(part.y):
            _scaled_and_shifted(group, part)
            _add_in_known_shapes(group, part)
            yield part.y
            continue
        if len(group) == 1:
            low, b = F.linear(part.x, group[0].a), factors[0]
        else:
            low = F.linear(part.x, torch.cat([own.a for own in group]))
            low = own_columns(low, [own.a.shape[0] for own in group], part)
            b = torch.cat(factors)
        y = _scaled_and_shifted(group, part)
        yield y.addmm_(low, b) if part.owned else torch.addmm(y, low, b)


def _add_in_known_shapes(weights: Sequence[LowRank], part: Flow) -> None:
    """y += x A B in place, for neighbours, as a product of one of few shapes: of more rows than theirs, to which
    nothing is added, and of more columns, which are zero."""
    assert part.whole is not None
    ranks = [own.a.shape[0] for own in weights]
    rows = part.y.shape[0]
    height, wide = rounded_up(rows, steps=1), width(sum(ranks))
    first = max(0, min(part.start, part.whole[0].shape[0] - height))
    x, y = (tensor[first : first + height] for tensor in part.whole)
    unused = wide - sum(ranks)
    low = F.linear(x, _stacked([own.a for own in weights], unused, part))  # [height, wide]
    low = own_columns(low, ranks, part, part.start - first)
    y.addmm_(low, _stacked([own.b for own in weights if own.b is not None], unused, part))


def width(columns: int) -> int:
    """One of few sizes: a single small adapter's, a full group's, some where one product does, powers of two beyond."""
    if columns <= MIN_SIZE:
        return MIN_SIZE
    if columns <= ONE_PRODUCT_COLUMNS:
        return max(JOINED_COLUMNS, -(-columns // WIDTH_STEP) * WIDTH_STEP)
    return 1 << (columns - 1).bit_length()


def _stacked(factors: list[Tensor], unused: int, part: Flow) -> Tensor:
    """Factors on top of each other, and rows of zeros."""
    if unused:
        size = factors[0].shape[1]
        key = ("zeros", unused, size)
        if key not in part.shared:
            part.shared[key] = factors[0].new_zeros(unused, size)
        factors = [*factors, part.shared[key]]
    return torch.cat(factors) if len(factors) > 1 else factors[0]


def _scaled_and_shifted(weights: Sequence[LowRank], flow: Flow) -> Tensor:
    y = flow.y
    if any(own.scale is not None for own in weights):
        y = scaled(y, [y.new_ones(y.shape[1]) if own.scale is None else own.scale for own in weights], flow)
    if any(own.shift is not None for own in weights):
        y = shifted(y, [y.new_zeros(y.shape[1]) if own.shift is None else own.shift for own in weights], flow)
    return y
