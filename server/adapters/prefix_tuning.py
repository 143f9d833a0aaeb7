"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): learned keys and values before each layer's own.

A prefix is one [virtual tokens, size] matrix of keys and one of values for each layer. In training it may be the output
of a small network (prefix projection), which steadies it; checkpoints of PEFT hold the output, those of AdapterHub the
network.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from server.adapters.base import AdapterMethod, Framing, Host, KeyValue, MethodConfig, Shape, unsupported
from server.adapters.flow import Gate
from server.core import BackboneSpec, Site, SiteKind, SiteSpec
from server.errors import InvalidAdapter

MAX_VIRTUAL_TOKENS = 2048
"""Attention grows with their number times the text's; papers use some hundred at most."""


class PrefixTuningConfig(MethodConfig):
    """PEFT's names."""

    num_virtual_tokens: int = Field(10, ge=1)
    position_shift: bool = False
    """The text's positions start after the virtual tokens, as in PEFT; in AdapterHub they do not."""
    prefix_projection: bool = False
    """The prefix is computed: tanh network over an embedding of the virtual tokens."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Inner size of that network; the hidden size if None."""
    use_gating: bool = False
    """AdapterHub's: keys and values are multiplied by a sigmoid of what the attention reads, averaged over the text."""
    shared_gating: bool = True
    """By the same number; else by one each."""
    leave_out: tuple[int, ...] = Field((), max_length=10_000)
    """Layers without a prefix."""


class PrefixTuning(AdapterMethod[PrefixTuningConfig, KeyValue]):
    """Keys and values that every text of the adapter sees."""

    name = "prefix_tuning"
    Config = PrefixTuningConfig

    def sites(self, config: PrefixTuningConfig, spec: BackboneSpec) -> list[Site]:
        """The attention of each layer that is not left out."""
        sites = spec.sites_of(SiteKind.KEY_VALUE)
        if not sites:
            raise unsupported(self, spec, "it needs the packed layout and an attention of its own in each layer")
        check_room(config.num_virtual_tokens, spec)
        return [site for site in sites if int(site.name) not in config.leave_out]

    def shapes(self, config: PrefixTuningConfig, site: Site, at: SiteSpec) -> dict[str, Shape]:
        """Keys and values, where they are not computed, and the gate if there is one."""
        numbers = 1 if config.shared_gating else 2
        gate: dict[str, Shape] = {}
        if config.use_gating:
            gate = {"gate.weight": (numbers, at.size_in), "gate.bias": (numbers,)}
        if config.prefix_projection:
            return gate
        shape = (config.num_virtual_tokens, at.size_out)
        return {"key": shape, "value": shape} | gate

    def shared_shapes(self, config: PrefixTuningConfig, spec: BackboneSpec) -> dict[str, Shape]:
        """The network that computes them, under PEFT's names."""
        if not config.prefix_projection:
            return {}
        inner = config.encoder_hidden_size or spec.hidden_size
        sites = self.sites(config, spec)
        total = sum(2 * spec.sites[site].size_out for site in sites)
        return {
            "embedding.weight": (config.num_virtual_tokens, spec.hidden_size),
            "transform.0.weight": (inner, spec.hidden_size),
            "transform.0.bias": (inner,),
            "transform.2.weight": (total, inner),
            "transform.2.bias": (total,),
        }

    def init(
        self, config: PrefixTuningConfig, site: Site, at: SiteSpec, module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Normal, as PEFT's embedding; a small gate."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(config, site, at).items()}
        for name, value in params.items():
            if name != "gate.bias":
                value.normal_(std=0.02 if name == "gate.weight" else 1.0, generator=generator)
        return params

    def init_shared(
        self, config: PrefixTuningConfig, spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """torch's defaults for an embedding and linear layers, biases at zero."""
        return fresh_network(self.shared_shapes(config, spec), generator)

    def share(self, config: PrefixTuningConfig, shared: Mapping[str, Tensor], host: Host) -> Mapping[str, Tensor]:
        """Runs the network: `<layer>.key` and `<layer>.value` of each layer."""
        if not config.prefix_projection:
            return {}
        hidden = torch.tanh(
            F.linear(shared["embedding.weight"], shared["transform.0.weight"], shared["transform.0.bias"])
        )
        prefix = F.linear(hidden, shared["transform.2.weight"], shared["transform.2.bias"])
        sites = self.sites(config, host.spec)
        sizes = [host.spec.sites[site].size_out for site in sites for _ in range(2)]
        names = [f"{site.name}.{param}" for site in sites for param in ("key", "value")]
        return dict(zip(names, torch.split(prefix, sizes, dim=1), strict=True))

    def bind(
        self,
        config: PrefixTuningConfig,
        site: Site,
        params: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        module: nn.Module,
    ) -> KeyValue:
        """The keys and values of one layer, and its gate."""
        gate = Gate(params["gate.weight"], params["gate.bias"]) if config.use_gating else None
        if config.prefix_projection:
            return KeyValue(shared[f"{site.name}.key"], shared[f"{site.name}.value"], gate)
        return KeyValue(params["key"], params["value"], gate)

    def framing(self, config: PrefixTuningConfig) -> Framing:
        """Moves the text's positions in PEFT's way, or nothing."""
        return Framing(positions=config.num_virtual_tokens if config.position_shift else 0)


def check_room(virtual_tokens: int, spec: BackboneSpec) -> None:
    """Refuses virtual tokens that leave a text no positions, or that every text of the adapter would pay dearly for."""
    most = min(spec.max_tokens // 2, MAX_VIRTUAL_TOKENS)
    if virtual_tokens > most:
        raise InvalidAdapter(
            f"num_virtual_tokens is {virtual_tokens}, at most {most} fit this backbone",
            param="num_virtual_tokens",
            code="unsupported_option",
        )


def fresh_network(shapes: Mapping[str, Shape], generator: torch.Generator) -> dict[str, Tensor]:
    """A normal embedding and torch's default for linear layers, biases at zero."""
    params: dict[str, Any] = {}
    for name, shape in shapes.items():
        value = torch.zeros(shape)
        if name.startswith("embedding"):
            value.normal_(generator=generator)
        elif len(shape) == 2:
            value.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
        params[name] = value
    return params
