"""The one frozen model: loaded once, fingerprinted, run over packed batches with whatever adapters a plan brings."""

import hashlib
import inspect
import re
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from server.adapters.base import AdapterWeights, Framing
from server.adapters.joined import compiles, rounded_up
from server.adapters.plan import NO_ADAPTERS, AdapterPlan, Placement, Prefix
from server.adapters.states import TextStates
from server.backbone import attention
from server.backbone.sharing import BEFORE_LAYERS, Share, Sharing, lay_out, shares, watched
from server.backbone.sites import FAMILIES, Attachment, encoder_output, find_sites, first_position, layer_paths
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import BackboneSpec, Encoding, HeadKind, HeadSpec, Pooling, Reach, Site, SiteKind, SiteSpec
from server.errors import BackboneError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PROBE_TOKENS = 12
"""Length of the longest text that a layout is tried on, unless a sliding window makes a difference only later."""

PADDING_WASTE = 1.25
"""In the padded layout, texts share a forward while the longest is at most this many times the shortest."""


def choose_device(choice: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise BackboneError("device 'cuda' was asked for, but torch sees no CUDA device")
    return torch.device(choice)


def choose_dtype(choice: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    if choice != "auto":
        return DTYPES[choice]
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if native else torch.float32


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """`sha256:` over the names, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


class _Row(NamedTuple):
    """One text as the model takes it, with the virtual tokens of its adapter."""

    ids: list[int]
    type_ids: list[int]
    positions: list[int]


class _Running(threading.local):
    """What a thread's forward is at: the hooks on the model's modules are the same for all threads, and look here."""

    def __init__(self) -> None:
        self.plan = NO_ADAPTERS
        self.rows = 0
        self.pooling = False
        """The pooler runs, outside of the model's own forward."""
        self.residuals: dict[Site, Tensor] = {}
        """What a residual site waits for, within a layer."""
        self.outputs: dict[Site, Tensor] = {}


class Backbone:
    """A frozen transformer with adapter sites.

    Several threads may call `forward` at once, once it has been made.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, name: str, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Takes a loaded model over: freezes it, hooks its sites and finds the layout that it can be batched in.

        The layouts are tried on real tokens: a batch has to give each text the states that it has alone.
        """
        identity = fingerprint(model.state_dict())  # before the cast: the same whatever dtype serves
        self.model: Any = model.requires_grad_(False).train(False)
        self.model.to(device=device, dtype=dtype)
        self._device: torch.device = self.model.device
        self._dtype = dtype
        self._rounds = compiles(torch.empty(0, device=device, dtype=dtype))
        self.tokenizer = tokenizer
        self._tensors: Mapping[str, Tensor] = model.state_dict()
        self._first_position = first_position(model.config)
        accepted = inspect.signature(model.forward).parameters
        # Families without type embeddings may still take the argument, and add something else for it (GPT-2).
        self._takes_types = "token_type_ids" in accepted and bool(getattr(model.config, "type_vocab_size", 0))
        # Where a family that is not listed starts to count is not known; padded, it counts itself.
        self._takes_positions = "position_ids" in accepted and model.config.model_type in FAMILIES
        self._running = _Running()
        self._counting = threading.Lock()
        self.text_rows = 0
        """Rows of all forwards that were a text's."""
        self.computed_rows = 0
        """All rows of them, with padding and filler."""
        self._reaches: dict[Site, Reach] = {}
        self._sharing: Sharing | None = None
        self._bare: dict[Site, nn.Module] = {}
        self._last_readers: set[Site] = set()
        self._attachments = find_sites(model, model.config)
        # Changed inputs come last: what else is read where they enter is read as it was.
        for site in sorted(self._attachments, key=lambda site: site.kind is SiteKind.LINEAR_INPUT):
            self._attach(site, self._attachments[site])
        self._attentions = {
            attachment.module: site for site, attachment in self._attachments.items() if site.kind is SiteKind.KEY_VALUE
        }
        pooler = getattr(model, "pooler", None)
        self._has_pooler = isinstance(pooler, nn.Module)
        self.packed = self._choose_layout()
        layers = [model.get_submodule(path) for path in layer_paths(model, model.config)]
        recorded = self._record(layers)
        self._reaches = self._find_reaches(recorded)
        self._per_text = {site for site, reach in self._reaches.items() if reach is Reach.TEXTS}
        self._last_readers = self._find_last_readers()
        self._share(layers, recorded)
        family = FAMILIES.get(model.config.model_type)
        heads = family.heads(model.config) if family else {}
        self.spec = BackboneSpec(
            name=name,
            model_type=model.config.model_type,
            fingerprint=identity,
            hidden_size=model.config.hidden_size,
            num_layers=model.config.num_hidden_layers,
            max_tokens=tokenizer.max_tokens,
            prefix=model.base_model_prefix,
            listed=family is not None,
            sites=self._site_specs(heads),
            poolings=frozenset(Pooling) if self._has_pooler else frozenset(Pooling) - {Pooling.POOLER},
            heads=heads,
            layers=layer_paths(model, model.config),
            word_embeddings=_path(model, model.get_input_embeddings()),
            targets=family.targets if family else {},
        )

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The number format it computes in."""
        return self._dtype

    @property
    def dtype_name(self) -> str:
        """The same as settings and reports write it: `float32`."""
        return str(self._dtype).removeprefix("torch.")

    def module(self, site: Site) -> nn.Module:
        """The frozen module at a site; at a residual site, the normalization that follows (Identity if none does).

        It may be called from within a forward: no adapter acts in it.
        """
        if site not in self._bare:
            attachment = self._attachments.get(site)
            if attachment is None:
                module = None
            else:
                module = attachment.norm if site.kind is SiteKind.RESIDUAL else attachment.module
            self._bare[site] = nn.Identity() if module is None else _without_hooks(module)
        return self._bare[site]

    def tensors(self) -> Mapping[str, Tensor]:
        """The frozen tensors by name."""
        return self._tensors

    def config(self) -> Mapping[str, Any]:
        """The model's own configuration, as config.json has it."""
        config: dict[str, Any] = self.model.config.to_dict()
        return config

    @classmethod
    def load(cls, name: str, *, device: str = "auto", dtype: str = "auto") -> "Backbone":
        """Loads a folder, a hub id or a package's backbone. Raises BackboneError with the reason if it cannot."""
        source = resolve(name)
        try:
            model, report = AutoModel.from_pretrained(source, dtype="auto", output_loading_info=True)
        except Exception as error:  # whatever configurations, weight files and the hub raise
            raise BackboneError(f"backbone {name!r} cannot be loaded: {error}") from error
        missing = set(report["missing_keys"])
        if pooler := {key for key in missing if key.startswith("pooler.")}:
            # transformers would initialise it at random; a head that needs it is refused instead
            model.pooler = None
            missing -= pooler
        if missing:
            raise BackboneError(f"backbone {name!r} lacks weights, first of them {min(missing)!r}")
        target = choose_device(device)
        tokenizer = Tokenizer.load(source, _max_tokens(model))
        return cls(model, tokenizer, Path(name).name, device=target, dtype=choose_dtype(dtype, target))

    def chunks(self, texts: Sequence[Encoding], adapters: Sequence[AdapterWeights | None]) -> list[list[int]]:
        """Indices of the texts that should share a forward, given each text's adapter.

        That is all of them if packed, else texts of similar length; adapters that need a forward to themselves get it.
        """
        mixed: list[int] = []
        alone: dict[int, list[int]] = {}
        for index, adapter in enumerate(adapters):
            (alone.setdefault(id(adapter), []) if adapter is not None and adapter.alone else mixed).append(index)
        together = [group for group in (mixed, *alone.values()) if group]
        if self.packed:
            return together
        lengths = [
            len(text) + (adapter.framing.virtual_tokens if adapter is not None else 0)
            for text, adapter in zip(texts, adapters, strict=True)
        ]
        return [chunk for group in together for chunk in _similar(group, lengths)]

    def forward(self, texts: Sequence[Encoding], plan: AdapterPlan = NO_ADAPTERS) -> TextStates:
        """Runs texts, sorted as the plan's segments are, and returns their states in the same order.

        What a text that is given several times, as the same object, comes to before any of its adapters acts is
        computed once.

        Raises ValueError where an adapter that needs a forward to itself shares it.
        """
        plan.check(len(texts))
        framings = plan.framings(len(texts))
        rows = [self._row(text, framing) for text, framing in zip(texts, framings, strict=True)]
        states = self._states(rows, plan, self._shares(texts, plan))
        virtual = [(framing.before, framing.virtual_tokens) for framing in framings]
        pooler = partial(self._pool, plan) if self._has_pooler else None
        spans = [text.spans for text in texts]
        return TextStates(states, [len(row.ids) for row in rows], virtual, pooler, spans)

    def _row(self, text: Encoding, framing: Framing) -> _Row:
        """The text, and places for virtual tokens whose embeddings the adapter brings."""
        extra, before = framing.virtual_tokens, framing.before
        ids, type_ids = list(text.ids), list(text.type_ids)
        positions = [self._first_position + framing.positions + i for i in range(len(ids))]
        if extra:
            ids[before:before] = [ids[0]] * extra  # any word but padding
            type_ids[before:before] = [0] * extra
            taken = range(extra) if framing.positions else [0] * extra
            positions[before:before] = [self._first_position + i for i in taken]
        return _Row(ids, type_ids, positions)

    def _shares(self, texts: Sequence[Encoding], plan: AdapterPlan) -> list[Share]:
        """What copies of a text can share."""
        if self._sharing is None or len({id(text) for text in texts}) == len(texts):
            return []
        return shares(texts, [self._sharing.first_layer(adapter) for adapter in plan.adapters(len(texts))])

    def _states(self, rows: Sequence[_Row], plan: AdapterPlan, found: Sequence[Share] = ()) -> Tensor:
        with self._attached(plan):
            return self._packed(rows, found) if self.packed else self._padded(rows)

    @contextmanager
    def _attached(self, plan: AdapterPlan, *, pooling: bool = False) -> Iterator[None]:
        """The plan acts at the sites as long as this lasts."""
        running = self._running
        running.plan, running.pooling = plan, pooling
        try:
            yield
        finally:
            running.plan, running.pooling = NO_ADAPTERS, False
            running.residuals.clear()
            running.outputs.clear()

    def _packed(self, rows: Sequence[_Row], found: Sequence[Share] = ()) -> Tensor:
        """All texts in one row [1, tokens]; position ids restart at each."""
        whole = Placement.of([len(row.ids) for row in rows])
        total = whole.offsets[-1]
        packed = self._pack(whole.lengths)
        if filler := packed.filler:
            rows = [*rows, _Row([rows[0].ids[0]] * filler, [0] * filler, [self._first_position] * filler)]
        inputs = {
            "input_ids": self._tensor([[i for row in rows for i in row.ids]]),
            "position_ids": self._tensor([[p for row in rows for p in row.positions]]),
            # Nobody reads it. Without a mask transformers looks at the ids, which waits for the device.
            "attention_mask": torch.empty(1, 1, 1, 1, device=self.device),
        }
        if self._takes_types:
            inputs["token_type_ids"] = self._tensor([[t for row in rows for t in row.type_ids]])
        if self._sharing is None or not found:
            self._place(whole, total + filler)
            return self._encoded(self._run(**inputs, packed=packed)[0, :total])
        stages = lay_out(found, whole, self._pack, self.device)
        self._place(whole, total + filler, self._sharing.placed(stages, whole))
        with self._sharing.running(stages, total + filler):
            states = self._run(**inputs, packed=packed)
        return self._encoded(states[0, :total])

    def _pack(self, lengths: Sequence[int]) -> attention.PackedTexts:
        """What the attention is told of the texts, with as many filler rows as they need behind them."""
        total = sum(lengths)
        filler = rounded_up(total, steps=8) - total if self._rounds and not torch.is_grad_enabled() else 0
        return attention.PackedTexts(lengths, self.device, self._prefixes, filler)

    def _padded(self, rows: Sequence[_Row]) -> Tensor:
        """One row per text [texts, longest]; padding is dropped from the states again."""
        lengths = [len(row.ids) for row in rows]
        longest = max(lengths)
        self._place(Placement.of(lengths, each=longest), len(rows) * longest)

        def padded(values: Sequence[list[int]], fill: int) -> Tensor:
            return self._tensor([[*own, *[fill] * (longest - len(own))] for own in values])

        inputs = {
            "input_ids": padded([row.ids for row in rows], self.model.config.pad_token_id or 0),
            "attention_mask": self._tensor([[1] * length + [0] * (longest - length) for length in lengths]),
        }
        if self._takes_types:
            inputs["token_type_ids"] = padded([row.type_ids for row in rows], 0)
        if self._takes_positions:
            inputs["position_ids"] = padded([row.positions for row in rows], self._first_position)
        keep = [row * longest + i for row, length in enumerate(lengths) for i in range(length)]
        return self._encoded(self._run(**inputs).flatten(0, 1))[self._tensor(keep)]

    def _place(self, whole: Placement, rows: int, at: Callable[[Site], Placement] | None = None) -> None:
        self._running.plan.place(whole, self._per_text if self._reaches else (), at)
        self._running.rows = rows
        with self._counting:
            self.text_rows += sum(whole.lengths)
            self.computed_rows += rows

    def _encoded(self, states: Tensor) -> Tensor:
        """What adapters after the encoder make of its last states, [rows, hidden]."""
        site, _ = encoder_output(self.model.config)
        return self._running.plan.apply(site, states, states) if self._running.plan.acts_at(site) else states

    def _run(self, **inputs: Any) -> Tensor:
        if getattr(self.model.config, "use_cache", None) is not None:
            inputs["use_cache"] = False
        states: Tensor = self.model(**inputs).last_hidden_state  # [rows, length, hidden]
        return states

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values).to(self.device, non_blocking=True)

    def _pool(self, plan: AdapterPlan, first: Tensor) -> Tensor:
        """The model's pooler on the first token of each text, [texts, hidden] -> [texts, hidden]."""
        with self._attached(plan, pooling=True):
            pooler = self.model.pooler
            if isinstance(pooler, nn.Linear):  # ALBERT's; the others look for the first token themselves
                pooled: Tensor = self.model.pooler_activation(pooler(first))
            else:
                pooled = pooler(first[:, None])
            return pooled

    def _prefixes(self, module: nn.Module) -> Sequence[Prefix]:
        site = self._attentions.get(module)
        return self._running.plan.prefixes(site) if site is not None else ()

    def _attach(self, site: Site, attachment: Attachment) -> None:
        """Hooks a site. A hook of a site at which the running plan does nothing costs a dictionary look-up."""
        if site.kind is SiteKind.KEY_VALUE:
            self._attach_gates(site, attachment)
        elif site.kind is SiteKind.RESIDUAL:
            self._attach_residual(site, attachment)
        elif site.kind is SiteKind.LINEAR_INPUT:
            attachment.module.register_forward_pre_hook(self._input_hook(site))
        else:
            attachment.module.register_forward_hook(self._output_hook(site))

    def _acts_at(self, site: Site) -> bool:
        if not self._running.plan.acts_at(site):
            return False
        # a pooler's sites act where it is run on all texts, not within the model's own forward
        return not self._reaches or (self._reaches.get(site) is Reach.TEXTS) is self._running.pooling

    def _input_hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
            if not self._acts_at(site):
                return None
            x = inputs[0].flatten(0, -2)
            own = x if site in self._last_readers else x.clone()  # others may still read what enters this layer
            return (self._adapted(site, x, own).view_as(inputs[0]), *inputs[1:])

        return hook

    def _output_hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            if not self._acts_at(site):
                return None
            y = output.flatten(0, -2)  # [rows, size_out]
            if site.kind is SiteKind.ENCODER:
                x = y  # what enters the embeddings is no tensor of rows
            elif site.kind is SiteKind.EMBEDDING:
                if not isinstance(inputs[0], Tensor):
                    return None  # RoFormer looks positions up by a shape
                x = inputs[0].flatten()
            else:
                x = inputs[0].flatten(0, -2)
            return self._adapted(site, x, y).view_as(output)

        return hook

    def _adapted(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        if self._reaches.get(site) is Reach.SHARED and y.shape[0] != self._running.rows:
            return self._running.plan.apply_to_all(site, x, y)
        return self._running.plan.apply(site, x, y)

    def _attach_gates(self, site: Site, attachment: Attachment) -> None:
        """Prefixes may depend on what the attention reads."""
        assert attachment.stream is not None  # sites.py gives every key_value site one

        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._running.plan.prefixes(site):
                self._running.plan.observe(site, inputs[0].flatten(0, -2))

        attachment.stream.register_forward_pre_hook(observe)

    def _attach_residual(self, site: Site, attachment: Attachment) -> None:
        """Three modules meet here: one sees the residual stream, one the sub-layer's output, one may norm the sum."""
        assert attachment.stream is not None  # sites.py gives every residual site one

        def keep_stream(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._acts_at(site):
                self._running.residuals[site] = inputs[0].flatten(0, -2)

        def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            if not self._acts_at(site):
                return None
            h = output.flatten(0, -2)
            if attachment.norm is not None:
                self._running.outputs[site] = h
                return None
            return self._running.plan.apply(site, self._running.residuals.pop(site), h, h).view_as(output)

        def join(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            if not self._acts_at(site):
                return None
            stream, h = self._running.residuals.pop(site), self._running.outputs.pop(site)
            if attachment.swapped:
                stream, h = h, stream
            return self._running.plan.apply(site, stream, output.flatten(0, -2), h).view_as(output)

        attachment.stream.register_forward_pre_hook(keep_stream)
        attachment.module.register_forward_hook(keep_output)
        if attachment.norm is not None:
            attachment.norm.register_forward_hook(join)

    @torch.inference_mode()
    def _choose_layout(self) -> bool:
        """True for packed, which is much the faster; False for padded. Switches the attention accordingly."""
        window = getattr(self.model.config, "sliding_window", None)
        longest = min(max(PROBE_TOKENS, window + 8 if window and window < 1024 else 0), self.tokenizer.max_tokens)
        try:
            texts = [self._probe(length) for length in (longest, max(1, longest // 2), max(1, longest - 2))]
            # As transformers runs them: one at a time, with its own attention and positions. Nothing to compare on
            # the meta device, where transformers' masks do not run either.
            on_meta = self.device.type == "meta"
            alone = [] if on_meta else [self._run(input_ids=self._tensor([text.ids]))[0] for text in texts]
        except Exception as error:
            raise BackboneError(f"backbones of type {self.model.config.model_type!r} cannot be run: {error}") from error
        self.packed = bool(type(self.model)._supports_attention_backend) and not (window and window >= 1024)
        if self.packed:
            attention.register()
            self.model.set_attn_implementation(attention.PACKED)
            if self._reproduces(texts, alone):
                return True
            self.packed = False
            self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")
        if not self._reproduces(texts, alone):
            raise BackboneError(
                f"backbones of type {self.model.config.model_type!r} give a text other states in a batch than alone"
            )
        return False

    def _reproduces(self, texts: list[Encoding], alone: list[Tensor], found: Sequence[Share] = ()) -> bool:
        """Whether the layout gives texts of different lengths together the states that they have alone."""
        try:
            together = self._states([self._row(text, Framing()) for text in texts], NO_ADAPTERS, found)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False  # the architecture does not take this layout at all
        if not alone:
            return True
        expected = torch.cat(alone).float()
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        return bool((together.float() - expected).abs().max() <= tolerance * expected.abs().max())

    @torch.inference_mode()
    def _record(self, layers: Sequence[nn.Module]) -> "_Recorder":
        """What a forward over two texts passes."""
        texts = [self._probe(min(length, self.tokenizer.max_tokens)) for length in (7, 5)]
        with watched(layers) as entered:
            recorder = _Recorder(entered)
            self._states([self._row(text, Framing()) for text in texts], recorder)
        return recorder

    @torch.inference_mode()
    def _find_reaches(self, forward: "_Recorder") -> dict[Site, Reach]:
        """Which rows the modules at the sites see, by a recorded forward and a pooling; one that sees others is none.

        The embedding of positions, seen once for all texts in the padded layout, fits no adapter's slice; nor does an
        expert that sees some of the tokens.
        """
        pooling = _Recorder([BEFORE_LAYERS])
        if self._has_pooler:
            self._pool(pooling, torch.zeros(3, self.model.config.hidden_size, device=self.device, dtype=self.dtype))
        listed = self.model.config.model_type in FAMILIES
        reaches = {}
        for site in self._attachments:
            if site in pooling.rows:
                reaches[site] = Reach.TEXTS
            elif forward.rows[site] == {self._running.rows} or (site.kind is SiteKind.KEY_VALUE and self.packed):
                reaches[site] = Reach.TOKENS
            elif listed and self._running.rows in forward.rows[site] and site.kind is not SiteKind.EMBEDDING:
                reaches[site] = Reach.SHARED
        return reaches

    @torch.inference_mode()
    def _share(self, layers: Sequence[nn.Module], recorded: "_Recorder") -> None:
        """Lets copies of a text share what they have in common, if the layers do: tried on copies of every kind.

        In the padded layout, and where layers run more than once or have modules in common, each copy is computed for
        itself.
        """
        by_token = [site for site, reach in self._reaches.items() if reach is Reach.TOKENS]
        in_turn = bool(layers) and recorded.entered == [BEFORE_LAYERS, *range(len(layers) + 1)]
        in_one = all(len(recorded.layers[site]) == 1 for site in by_token)
        if not (self.packed and in_turn and in_one) or self.device.type == "meta":
            return
        layer_of = {site: min(recorded.layers[site]) for site in by_token}
        after = {encoder_output(self.model.config)[0], *self._per_text}
        self._sharing = Sharing(layers, layer_of | dict.fromkeys(after, len(layers)))
        probes = [self._probe(min(length, self.tokenizer.max_tokens)) for length in (5, 3)]
        own_from = [*range(len(layers) + 1)] * len(probes)
        texts = [text for text in probes for _ in range(len(layers) + 1)]
        alone = {id(text): self._states([self._row(text, Framing())], NO_ADAPTERS) for text in probes}
        if not self._reproduces(texts, [alone[id(text)] for text in texts], shares(texts, own_from)):
            self._sharing.close()
            self._sharing = None

    @torch.inference_mode()
    def _find_last_readers(self) -> set[Site]:
        """The linear layers whose input nobody reads after them, so that an adapter may change it in place.

        Found by spoiling it: what enters a layer is made NaN once the layer has run, and the states stay finite or not.
        Copying it instead costs as much as some layers do. Layers of the same name are tried together.
        """
        kinds: defaultdict[str, list[Site]] = defaultdict(list)
        for site, reach in self._reaches.items():
            if site.kind is SiteKind.LINEAR_INPUT and reach is Reach.TOKENS and self.device.type != "meta":
                kinds[re.sub(r"\d+", "", site.name)].append(site)
        row = self._row(self._probe(min(PROBE_TOKENS, self.tokenizer.max_tokens)), Framing())

        frozen = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        kept: set[Site] = set()  # what enters is a tensor of the model itself

        def spoil(site: Site, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if inputs[0].untyped_storage().data_ptr() in frozen:
                kept.add(site)
            else:
                inputs[0].fill_(float("nan"))

        last: set[Site] = set()
        for sites in kinds.values():
            hooks = [self._attachments[site].module.register_forward_hook(partial(spoil, site)) for site in sites]
            states = self._states([row], NO_ADAPTERS)
            for hook in hooks:
                hook.remove()
            if bool(states.isfinite().all()):
                last.update(sites)
        streams = {attachment.stream for attachment in self._attachments.values()}  # our own hooks read those
        return {site for site in last - kept if self._attachments[site].module not in streams}

    def _site_specs(self, heads: Mapping[HeadKind, HeadSpec]) -> dict[Site, SiteSpec]:
        # A pooler that the family's classifiers do not have is no target of adapters that were trained in one.
        pools = not heads or heads[HeadKind.SEQUENCE].pooling is Pooling.POOLER
        specs = {
            site: replace(attachment.spec, reach=self._reaches[site])
            for site, attachment in self._attachments.items()
            if site in self._reaches and (pools or self._reaches[site] is not Reach.TEXTS)
        }
        return specs | dict([encoder_output(self.model.config)])

    def _probe(self, length: int) -> Encoding:
        """A text of arbitrary ordinary tokens."""
        ids = tuple((7 * length + 11 * i) % (self.model.config.vocab_size - 2) + 2 for i in range(length))
        return Encoding(ids, (0,) * length, truncated=False)


class _Recorder(AdapterPlan):
    """Notes how many rows each site sees, and in which layers."""

    def __init__(self, entered: Sequence[int]) -> None:
        """`entered`: the layers that the forward has entered so far."""
        super().__init__(())
        self.entered = entered
        self.rows: defaultdict[Site, set[int]] = defaultdict(set)
        self.layers: defaultdict[Site, set[int]] = defaultdict(set)

    def acts_at(self, site: Site) -> bool:
        return True

    def apply(self, site: Site, x: Tensor, y: Tensor, h: Tensor | None = None) -> Tensor:
        self.rows[site].add(y.shape[0])
        self.layers[site].add(self.entered[-1])
        return y

    def prefixes(self, site: Site) -> Sequence[Prefix]:
        self.layers[site].add(self.entered[-1])
        return ()


def _similar(indices: Iterable[int], lengths: Sequence[int]) -> list[list[int]]:
    """Groups of texts whose padding wastes little."""
    chunks: list[list[int]] = []
    shortest = 0
    for index in sorted(indices, key=lengths.__getitem__):
        if not chunks or lengths[index] > PADDING_WASTE * shortest:
            chunks.append([])
            shortest = lengths[index]
        chunks[-1].append(index)
    return chunks


def _without_hooks(module: nn.Module) -> nn.Module:
    """The same parameters, and a call that runs no hooks."""
    bare = copy(module)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    return bare


def _path(model: nn.Module, wanted: nn.Module) -> str:
    """Where a module lies in the model."""
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name


def _max_tokens(model: PreTrainedModel) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    return (positions - first_position(model.config)) if positions else 1 << 30
