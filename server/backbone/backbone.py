"""The one frozen model: loaded once, fingerprinted, run over packed batches with whatever adapters a plan brings."""

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from server.adapters.plan import NO_ADAPTERS, AdapterPlan
from server.adapters.states import TextStates
from server.backbone import attention
from server.backbone.sites import FAMILIES, find_sites, first_position
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import BackboneSpec, Encoding, Pooling, Site
from server.errors import BackboneError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

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


class Backbone:
    """A frozen transformer with adapter sites.

    Not thread-safe: one thread at a time may call `forward`, since the plan of the running batch is attached to it.
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
        self.tokenizer = tokenizer
        self._plan = NO_ADAPTERS
        self._first_position = first_position(model.config)
        # Families without type embeddings may still take the argument, and add something else for it (GPT-2).
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters and bool(
            getattr(model.config, "type_vocab_size", 0)
        )
        candidates = find_sites(model, model.config)
        for site, (module, _, _) in candidates.items():
            module.register_forward_hook(self._hook(site))
        self.packed = self._choose_layout()
        sites = self._on_token_axis(candidates)
        family = FAMILIES.get(model.config.model_type)
        has_pooler = isinstance(getattr(model, "pooler", None), nn.Module)
        self.spec = BackboneSpec(
            name=name,
            model_type=model.config.model_type,
            fingerprint=identity,
            hidden_size=model.config.hidden_size,
            num_layers=model.config.num_hidden_layers,
            max_tokens=tokenizer.max_tokens,
            prefix=model.base_model_prefix,
            sites={site: (size_in, size_out) for site, (_, size_in, size_out) in candidates.items() if site in sites},
            poolings=frozenset(Pooling) if has_pooler else frozenset(Pooling) - {Pooling.POOLER},
            classifier_pooling=family.classifier_pooling if family else None,
            default_targets=_present(family.targets, sites) if family else (),
        )
        self._pooler = self._pool if has_pooler else None

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The number format it computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

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

    def chunks(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the texts that should share a forward: all of them if packed, else texts of similar length."""
        if self.packed:
            return [list(range(len(lengths)))]
        chunks: list[list[int]] = []
        shortest = 0
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            if not chunks or lengths[index] > PADDING_WASTE * shortest:
                chunks.append([])
                shortest = lengths[index]
            chunks[-1].append(index)
        return chunks

    def forward(self, texts: Sequence[Encoding], plan: AdapterPlan = NO_ADAPTERS) -> TextStates:
        """Runs texts, sorted as the plan's segments are, and returns their states in the same order."""
        lengths = [len(text) for text in texts]
        return TextStates(self._states(texts, lengths, plan), lengths, self._pooler)

    def _states(self, texts: Sequence[Encoding], lengths: list[int], plan: AdapterPlan) -> Tensor:
        self._plan = plan
        try:
            return self._packed(texts, lengths) if self.packed else self._padded(texts, lengths)
        finally:
            self._plan = NO_ADAPTERS

    def _packed(self, texts: Sequence[Encoding], lengths: list[int]) -> Tensor:
        """All texts in one row [1, tokens]; position ids restart at each."""
        self._plan.place([0, *accumulate(lengths)])
        positions = [self._first_position + i for length in lengths for i in range(length)]
        inputs = {
            "input_ids": self._tensor([[i for text in texts for i in text.ids]]),
            "position_ids": self._tensor([positions]),
        }
        if self._takes_types:
            inputs["token_type_ids"] = self._tensor([[t for text in texts for t in text.type_ids]])
        return self._run(**inputs, packed=attention.PackedTexts(lengths, self.device))[0]

    def _padded(self, texts: Sequence[Encoding], lengths: list[int]) -> Tensor:
        """One row per text [texts, longest]; padding is dropped from the states again."""
        longest = max(lengths)
        self._plan.place(range(0, (len(texts) + 1) * longest, longest))

        def rows(name: str, fill: int) -> Tensor:
            return self._tensor([[*getattr(t, name), *[fill] * (longest - len(t))] for t in texts])

        mask = self._tensor([[1] * length + [0] * (longest - length) for length in lengths])
        inputs = {"input_ids": rows("ids", self.model.config.pad_token_id or 0), "attention_mask": mask}
        if self._takes_types:
            inputs["token_type_ids"] = rows("type_ids", 0)
        keep = [row * longest + i for row, length in enumerate(lengths) for i in range(length)]
        return self._run(**inputs).flatten(0, 1)[self._tensor(keep)]

    def _run(self, **inputs: Any) -> Tensor:
        if getattr(self.model.config, "use_cache", None) is not None:
            inputs["use_cache"] = False
        states: Tensor = self.model(**inputs).last_hidden_state  # [rows, length, hidden]
        return states

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values).to(self.device, non_blocking=True)

    def _pool(self, first: Tensor) -> Tensor:
        """The model's pooler, which expects [texts, length, hidden] and looks at the first token."""
        pooled: Tensor = self.model.pooler(first[:, None])
        return pooled

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            flat = output.flatten(0, -2)  # [tokens, size_out]
            return self._plan.apply(site, inputs[0].flatten(0, -2), flat).view_as(output)

        return hook

    @torch.inference_mode()
    def _choose_layout(self) -> bool:
        """True for packed, which is much the faster; False for padded. Switches the attention accordingly."""
        longest = min(12, self.tokenizer.max_tokens)
        try:
            texts = [self._probe(length) for length in (longest, max(1, longest // 2), max(1, longest - 2))]
            # As transformers runs them: one at a time, with its own attention and positions. Nothing to compare on
            # the meta device, where transformers' masks do not run either.
            on_meta = self.device.type == "meta"
            alone = [] if on_meta else [self._run(input_ids=self._tensor([text.ids]))[0] for text in texts]
        except Exception as error:
            raise BackboneError(f"backbones of type {self.model.config.model_type!r} cannot be run: {error}") from error
        self.packed = bool(type(self.model)._supports_attention_backend) and not _slides(self.model)
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

    def _reproduces(self, texts: list[Encoding], alone: list[Tensor]) -> bool:
        """Whether the layout gives texts of different lengths together the states that they have alone."""
        try:
            together = self._states(texts, [len(text) for text in texts], NO_ADAPTERS)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False  # the architecture does not take this layout at all
        if not alone:
            return True
        expected = torch.cat(alone).float()
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        return bool((together.float() - expected).abs().max() <= tolerance * expected.abs().max())

    @torch.inference_mode()
    def _on_token_axis(self, sites: Iterable[Site]) -> set[Site]:
        """The sites whose modules see one row per token, and nothing else.

        A pooler sees one row per text, relative position projections one per distance: no adapter's slice fits those.
        """
        recorder = _Recorder()
        text = self._probe(min(7, self.tokenizer.max_tokens))
        self._states([text], [len(text)], recorder)
        return {site for site in sites if recorder.rows[site] == {len(text)}}

    def _probe(self, length: int) -> Encoding:
        """A text of arbitrary ordinary tokens."""
        ids = tuple((7 * length + 11 * i) % (self.model.config.vocab_size - 2) + 2 for i in range(length))
        return Encoding(ids, (0,) * length, truncated=False)


class _Recorder(AdapterPlan):
    """Notes how many rows each site sees."""

    def __init__(self) -> None:
        super().__init__(())
        self.rows: defaultdict[Site, set[int]] = defaultdict(set)

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        self.rows[site].add(y.shape[0])
        return y


def _present(targets: Iterable[str], sites: Iterable[Site]) -> tuple[str, ...]:
    """The targets that name a site here. DeBERTa-v3's query projection also maps distances, so it is none."""
    return tuple(target for target in targets if any(site.is_target(target) for site in sites))


def _slides(model: PreTrainedModel) -> bool:
    """Sliding-window layers need a mask that packing does not make."""
    layers = getattr(model.config, "layer_types", None) or ()
    return getattr(model.config, "sliding_window", None) is not None or "sliding_attention" in layers


def _max_tokens(model: PreTrainedModel) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    return (positions - first_position(model.config)) if positions else 1 << 30
