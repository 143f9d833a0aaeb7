"""Bottleneck adapters: up(sigma(down(h))) at the end of sub-layers, with everything that AdapterHub lets vary.

Houlsby et al. 2019 (arXiv:1902.00751) put one after the attention and one after the feed-forward network, Pfeiffer et
al. 2020 (arXiv:2005.00247) one after the feed-forward network, over the normalized sum; He et al. 2021
(arXiv:2110.04366) run it in parallel to the sub-layer. The order of sums and norms is that of AdapterHub's `Adapter`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, FiniteFloat, field_validator, model_validator
from torch import Tensor, nn

from server.adapters.activations import ACTIVATIONS, ActivationName
from server.adapters.base import AdapterMethod, MethodConfig, Shape, unsupported
from server.adapters.flow import Flow, Gate
from server.adapters.joined import columns, groups, own_columns
from server.core import BackboneSpec, Site, SiteKind, SiteSpec
from server.errors import InvalidAdapter


class BottleneckConfig(MethodConfig):
    """AdapterHub's names. Houlsby: both places, swish; Pfeiffer: `mh_adapter` false, `original_ln_before`, relu."""

    mh_adapter: bool = False
    """An adapter after the multi-head attention."""
    output_adapter: bool = True
    """An adapter after the feed-forward network."""
    reduction_factor: float | dict[str, float] = 16.0
    """Hidden size over bottleneck size; or that by layer, with a "default" for the others."""
    non_linearity: ActivationName = "relu"
    original_ln_before: bool = False
    """The adapter reads the sum with the residual stream, normalized where the model does so."""
    original_ln_after: bool = True
    """The stream is added (and normalized) after the adapter."""
    ln_before: bool = False
    """A LayerNorm of its own at the adapter's input."""
    ln_after: bool = False
    """A LayerNorm of its own at the adapter's output."""
    residual_before_ln: bool | Literal["post_add"] = True
    """The skip connection starts before the sum that `original_ln_before` makes, after it, or, "post_add", between sum
    and norm."""
    adapter_residual_before_ln: bool = False
    """The skip connection ends before `ln_after` instead of after it."""
    is_parallel: bool = False
    """The adapter reads what the sub-layer read."""
    scaling: FiniteFloat | Literal["learned", "channel"] = 1.0
    """What its output is multiplied by: a number, one learned number, or one for each channel."""
    use_gating: bool = False
    """Its output is multiplied by a sigmoid of its input, averaged over the text."""
    leave_out: tuple[int, ...] = Field((), max_length=10_000)
    """Layers without an adapter."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "BottleneckConfig":
        if not (self.mh_adapter or self.output_adapter):
            raise ValueError("one of mh_adapter and output_adapter has to be true")
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError("residual_before_ln 'post_add' needs original_ln_before")
        return self

    @field_validator("reduction_factor")
    @classmethod
    def _reduces(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        for factor in value.values() if isinstance(value, dict) else (value,):
            if not 1e-3 <= factor < float("inf"):
                raise ValueError("has to be finite and at least 0.001")
        return value

    def factor(self, layer: int) -> float:
        """The reduction factor of a layer. KeyError where the mapping has none."""
        if isinstance(self.reduction_factor, dict):
            return self.reduction_factor.get(str(layer)) or self.reduction_factor["default"]
        return self.reduction_factor


class Form(NamedTuple):
    """What neighbours must have in common to be computed together."""

    non_linearity: str
    original_ln_before: bool
    original_ln_after: bool
    ln_before: bool
    ln_after: bool
    residual_before_ln: bool | str
    adapter_residual_before_ln: bool
    is_parallel: bool
    use_gating: bool
    scaled: bool
    biased: bool


class BottleneckWeights(NamedTuple):
    """One site."""

    form: Form
    down: Tensor  # [bottleneck, hidden]
    down_bias: Tensor | None  # [bottleneck]
    up: Tensor  # [hidden, bottleneck]
    up_bias: Tensor | None  # [hidden]
    scaling: Tensor | None  # [1] or [hidden]
    params: Mapping[str, Tensor]  # of its own norms and its gate
    norm: nn.Module | None  # the model's own, where it normalizes the sum


class Bottleneck(AdapterMethod[BottleneckConfig, BottleneckWeights]):
    """A small two-layer network with a skip connection, at the end of sub-layers."""

    name = "bottleneck"
    Config = BottleneckConfig

    def sites(self, config: BottleneckConfig, spec: BackboneSpec) -> list[Site]:
        """One or two residual sites in each layer that is not left out."""
        places = [place for place, on in (("attention", config.mh_adapter), ("ffn", config.output_adapter)) if on]
        residual = spec.sites_of(SiteKind.RESIDUAL)
        if not residual:
            raise unsupported(self, spec, "where its sub-layers join the residual stream is not known")
        return [
            site for site in residual if site.name.partition(".")[2] in places and _layer(site) not in config.leave_out
        ]

    def shapes(self, config: BottleneckConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """AdapterHub's names; the bottleneck is hidden // reduction_factor, at least 1."""
        hidden = at.size_out
        try:
            size = max(1, int(hidden // config.factor(_layer(site))))
        except KeyError:
            raise _no_factor(site) from None
        return self.projections(config, hidden, size) | self._own(config, hidden)

    def projections(self, config: BottleneckConfig, hidden: int, size: int) -> dict[str, Shape]:
        """What the two projections are made of."""
        return {
            "adapter_down.weight": (size, hidden),
            "adapter_down.bias": (size,),
            "adapter_up.weight": (hidden, size),
            "adapter_up.bias": (hidden,),
        }

    def _own(self, config: BottleneckConfig, hidden: int) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for name, on in (("adapter_norm_before", config.ln_before), ("adapter_norm_after", config.ln_after)):
            if on:
                shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
        if config.use_gating:
            shapes |= {"gate.weight": (1, hidden), "gate.bias": (1,)}
        if isinstance(config.scaling, str):
            shapes["scaling"] = (1,) if config.scaling == "learned" else (hidden,)
        return shapes

    def init(
        self, config: BottleneckConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Houlsby's near-identity start: small normal down, zero up; norms and scales are one."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(config, site, at).items()}
        for name, value in params.items():
            if name in ("adapter_down.weight", "gate.weight"):
                value.normal_(std=0.02, generator=generator)
            elif name == "scaling" or ("norm" in name and name.endswith("weight")):
                value.fill_(1.0)
        return params

    def bind(
        self,
        config: BottleneckConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> BottleneckWeights:
        """The two projections as matrices, and what says how they are applied."""
        down, down_bias, up, up_bias = self.matrices(config, params, shared)
        scaling = params.get("scaling")
        if scaling is None and config.scaling != 1:
            scaling = up.new_tensor([float(config.scaling)])
        form = Form(
            config.non_linearity,
            config.original_ln_before,
            config.original_ln_after,
            config.ln_before,
            config.ln_after,
            config.residual_before_ln,
            config.adapter_residual_before_ln,
            config.is_parallel,
            config.use_gating,
            scaling is not None,
            down_bias is not None,
        )
        own = {name: value for name, value in params.items() if "norm" in name or name.startswith("gate")}
        norm = None if isinstance(module, nn.Identity) else module
        return BottleneckWeights(form, down, down_bias, up, up_bias, scaling, own, norm)

    def matrices(
        self, config: BottleneckConfig, params: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Down [bottleneck, hidden] and its bias, up [hidden, bottleneck] and its bias."""
        return (
            params["adapter_down.weight"],
            params["adapter_down.bias"],
            params["adapter_up.weight"],
            params["adapter_up.bias"],
        )

    def apply(self, weights: BottleneckWeights, flow: Flow) -> Tensor:
        """The adapter's output, with the stream added and normalized as the model and the configuration have it."""
        return _together([weights], flow)

    def apply_run(self, weights: Sequence[BottleneckWeights], flow: Flow) -> Iterator[Tensor]:
        """Neighbours of one form go together, their products joined as LoRA's are."""
        done = 0
        for _, same in groupby(weights, key=lambda own: own.form):
            alike = list(same)
            for first, end in groups([own.down.shape[0] for own in alike], columns(alike[0].down)):
                yield _together(alike[first:end], flow.cut(done + first, done + end))
            done += len(alike)


def _together(weights: Sequence[BottleneckWeights], flow: Flow) -> Tensor:
    """Adapters of one form on their rows, with the stream added and normalized as form and model have it."""
    form, norm = weights[0].form, weights[0].norm
    assert flow.h is not None  # a residual site always has it
    stream, h = flow.x, flow.h
    if form.is_parallel:
        read = stream
    elif form.original_ln_before:
        read = flow.y if norm else h + stream  # y is the normalized sum already
    else:
        read = h
    out = _adapter(weights, read, flow)
    if form.is_parallel:
        out = h + (_own_norm("adapter_norm_after", weights, out, flow) if form.ln_after else out)
    else:
        skip = h if form.residual_before_ln is True else h + stream if form.residual_before_ln == "post_add" else read
        if form.adapter_residual_before_ln:
            out = out + skip
        if form.ln_after:
            out = _own_norm("adapter_norm_after", weights, out, flow)
        if not form.adapter_residual_before_ln:
            out = out + skip
    if norm:
        return norm(out + stream) if form.original_ln_after else out
    return out if form.original_ln_after else out - stream  # the model adds the stream to whatever leaves here


def _adapter(weights: Sequence[BottleneckWeights], read: Tensor, flow: Flow) -> Tensor:
    """up(sigma(down(read))), scaled and gated."""
    form = weights[0].form
    gate = _gate(weights, read, flow) if form.use_gating else None
    if form.ln_before:
        read = _own_norm("adapter_norm_before", weights, read, flow)
    down = _cat([own.down for own in weights])
    biases = [own.down_bias for own in weights if own.down_bias is not None]
    low = ACTIVATIONS[form.non_linearity](F.linear(read, down, _cat(biases) if biases else None))
    if len(weights) > 1:
        low = own_columns(low, [own.down.shape[0] for own in weights], flow)
    out = F.linear(low, _cat([own.up for own in weights], dim=1))
    if ups := [own.up_bias for own in weights if own.up_bias is not None]:
        out = out + flow.per_row(ups)
    if form.scaled:
        # one number and one for each channel may stand side by side
        size = out.shape[1]
        out = out * flow.per_row([own.scaling.expand(size) for own in weights if own.scaling is not None])
    return out if gate is None else out * gate


def _own_norm(name: str, weights: Sequence[BottleneckWeights], values: Tensor, flow: Flow) -> Tensor:
    normal = F.layer_norm(values, values.shape[-1:])
    weight, bias = (flow.per_row([own.params[f"{name}.{part}"] for own in weights]) for part in ("weight", "bias"))
    return normal * weight + bias


def _gate(weights: Sequence[BottleneckWeights], read: Tensor, flow: Flow) -> Tensor:
    """[rows, 1]: each text's number."""
    parts = zip(weights, torch.split(read, list(flow.lengths)), flow.texts, strict=True)
    return _cat(
        [Gate(own.params["gate.weight"], own.params["gate.bias"]).per_row(rows, texts) for own, rows, texts in parts]
    )


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _layer(site: Site) -> int:
    return int(site.name.partition(".")[0])


def _no_factor(site: Site) -> InvalidAdapter:
    return InvalidAdapter(
        f"reduction_factor has neither layer {_layer(site)} nor a default",
        param="reduction_factor",
        code="unsupported_option",
    )
