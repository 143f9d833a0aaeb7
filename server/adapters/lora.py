"""LoRA (Hu et al. 2021, arXiv:2106.09685): y + (alpha / r) * x A^T B^T at linear layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from server.adapters.base import AdapterMethod, MethodConfig
from server.core import BackboneSpec, Site
from server.errors import InvalidAdapter

JOINED_COLUMNS = 64
"""Ranks of neighbouring adapters that are multiplied together, up to this sum. On a CPU, for 64 adapters of rank 8,
float32 is slower beyond it, bfloat16 slower below it and hardly faster beyond."""


class LoraConfig(MethodConfig):
    """PEFT's names. A target matches a linear layer whose path is the target or ends in `.target`."""

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, gt=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(min_length=1, max_length=1000)


class LoraWeights(NamedTuple):
    """One site, ready for two matrix products."""

    a: Tensor  # [size_in, r]
    b: Tensor  # [r, size_out], scaled by alpha / r


class Lora(AdapterMethod[LoraConfig, LoraWeights]):
    """A low-rank addition to linear layers."""

    name = "lora"
    Config = LoraConfig

    def defaults(self, spec: BackboneSpec) -> dict[str, Any]:
        """The attention's query and value projections, as in the paper."""
        return {"target_modules": spec.default_targets} if spec.default_targets else {}

    def sites(self, config: LoraConfig, spec: BackboneSpec) -> list[Site]:
        """The linear layers that the targets name; each target has to name at least one."""
        found: dict[Site, None] = {}
        for target in config.target_modules:
            hits = [site for site in spec.sites if site.is_target(target)]
            if not hits:
                raise InvalidAdapter(
                    f"target module {target!r} is not a linear layer of the backbone ({spec.model_type})",
                    param="target_modules",
                    code="unknown_target",
                )
            found |= dict.fromkeys(hits)
        return list(found)

    def shapes(self, config: LoraConfig, site: Site, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
        """PEFT's names and orientation."""
        return {"lora_A": (config.r, size_in), "lora_B": (size_out, config.r)}

    def init(
        self, config: LoraConfig, site: Site, size_in: int, size_out: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """PEFT's default: Kaiming-uniform A, zero B, so that training starts at the bare backbone."""
        bound = 1 / math.sqrt(size_in)
        a = torch.empty(config.r, size_in).uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": torch.zeros(size_out, config.r)}

    def bind(self, config: LoraConfig, site: Site, params: Mapping[str, Tensor]) -> LoraWeights:
        """Transposes both factors and folds alpha / r into B."""
        scale = config.lora_alpha / config.r
        return LoraWeights(params["lora_A"].t().contiguous(), (params["lora_B"] * scale).t().contiguous())

    def apply(self, weights: LoraWeights, x: Tensor, y: Tensor) -> Tensor:
        """y + x A B."""
        return torch.addmm(y, x @ weights.a, weights.b)

    def apply_run(
        self, weights: Sequence[LoraWeights], lengths: list[int], x: Tensor, y: Tensor, shared: dict[Any, Any]
    ) -> Tensor:
        """Joins the products of neighbours: one `x @ [A1 A2 ...]`, of which each token keeps its own adapter's columns,
        and one `@ [B1; B2; ...]`.

        That multiplies more than needed, by as many adapters as are joined, and calls less; see JOINED_COLUMNS.
        """
        outputs: list[Tensor] = []
        start = 0
        for first, end in _joined([own.a.shape[1] for own in weights]):
            tokens = sum(lengths[first:end])
            own_x, own_y = x[start : start + tokens], y[start : start + tokens]
            start += tokens
            if end - first == 1:
                outputs.append(self.apply(weights[first], own_x, own_y))
                continue
            group = weights[first:end]
            others = _others([own.a.shape[1] for own in group], lengths[first:end], x.device, shared)
            # filled rather than multiplied by zero: a neighbour's overflow times zero would not be zero
            low = (own_x @ torch.cat([own.a for own in group], dim=1)).masked_fill(others, 0)
            outputs.append(torch.addmm(own_y, low, torch.cat([own.b for own in group])))
        return torch.cat(outputs)


def _joined(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours to join, as (first, one past the last): as many as JOINED_COLUMNS holds, at least one."""
    groups: list[tuple[int, int]] = []
    columns = 0
    for index, rank in enumerate(ranks):
        if groups and columns + rank <= JOINED_COLUMNS:
            groups[-1] = (groups[-1][0], index + 1)
        else:
            groups.append((index, index + 1))
            columns = 0
        columns += rank
    return groups


def _others(ranks: Sequence[int], lengths: Sequence[int], device: torch.device, shared: dict[Any, Any]) -> Tensor:
    """[tokens, columns]: True where a column belongs to another adapter than the token."""
    key = (tuple(ranks), tuple(lengths))
    if key not in shared:
        index = torch.arange(len(ranks))
        owners = [
            torch.repeat_interleave(index, torch.tensor(sizes)).to(device, non_blocking=True)
            for sizes in (lengths, ranks)
        ]
        shared[key] = owners[0][:, None] != owners[1][None, :]
    mask: Tensor = shared[key]
    return mask
