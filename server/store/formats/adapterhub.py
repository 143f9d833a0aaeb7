"""AdapterHub checkpoints, as `save_adapter` of the library `adapters` writes them, and as its predecessors did.

adapter_config.json and adapter.safetensors hold the adapter, head_config.json and model_head.safetensors its head.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters import METHODS
from server.adapters.activations import ACTIVATIONS
from server.adapters.base import Host, tensor_name
from server.core import ENCODER_INPUT, BackboneSpec, HeadKind, Pooling, Site, SiteKind, is_target
from server.errors import InvalidAdapter
from server.store.artifact import Artifact, read_tensors
from server.store.formats import sentence_transformers
from server.store.formats.files import required
from server.store.formats.heads import Head
from server.store.formats.reading import (
    Checkpoint,
    by_index,
    check_backbone,
    configured,
    label_names,
    read_json,
    refusal,
    refuse_labels,
    refuse_pickle,
)
from server.tasks.head import BIAS, WEIGHT, hidden_name

CONFIG = "adapter_config.json"
TENSORS = "adapter.safetensors"
HEAD_CONFIG = "head_config.json"
HEAD_TENSORS = "model_head.safetensors"
PICKLES = {TENSORS: "pytorch_adapter.bin", HEAD_TENSORS: "pytorch_model_head.bin"}

ARCHITECTURES = "bottleneck (no architecture), lora, prefix_tuning, prompt_tuning, union"

RENAMED = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
"""Names of version 1 -> names of today."""

RENAMED_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What activations were called before checkpoints had a `version`."""

LORA_SCALED_SINCE = (1, 1, 0)
"""Earlier versions of `adapters` ignored alpha."""

MAX_MEMBERS = 8
"""Configurations of a union."""

HEADS = {
    "classification": "classification",
    "multilabel_classification": "multi_label_classification",
    "tagging": "tagging",
    "question_answering": "question_answering",
}
"""`head_type` -> our task."""

OF_TOKENS = ("tagging", "question_answering")
"""Tasks whose heads read each token."""

BOTTLENECK = (
    "mh_adapter",
    "output_adapter",
    "reduction_factor",
    "non_linearity",
    "original_ln_before",
    "original_ln_after",
    "ln_before",
    "ln_after",
    "residual_before_ln",
    "adapter_residual_before_ln",
    "is_parallel",
    "scaling",
    "use_gating",
    "leave_out",
)
PHM = (
    "phm_dim",
    "phm_rank",
    "phm_bias",
    "factorized_phm_W",
    "shared_W_phm",
    "factorized_phm_rule",
    "shared_phm_rule",
)
INERT = frozenset(
    {
        "architecture",
        "cross_adapter",  # after cross attention, which classifiers do not have
        "cross_prefix",
        "dropout",
        "dtype",
        "encoder_prefix",
        "hypercomplex_nonlinearity",
        "init_weights",
        "init_weights_seed",
        "learn_phm",
        "phm_c_init",
        "phm_init_range",
        "prompt_init",
        "prompt_init_text",
        "random_uniform_scale",
        "stochastic_depth",
    }
)
"""Options that change no output."""


def recognizes(options: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's and not PEFT's."""
    return "peft_type" not in options and "config" in options


@dataclass
class _Reader:
    """One checkpoint on its way: what is known of it so far."""

    checkpoint: Checkpoint
    spec: BackboneSpec
    name: str
    """The adapter's, which its tensors carry."""
    names: dict[str, str]
    """Names of today without the model's prefix -> names in the file."""

    def read(self, config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Takes the tensors of a configuration: our methods and their options."""
        architecture = config.get("architecture")
        if architecture == "union":
            members: Any = config.get("configs")
            whole = isinstance(members, list) and all(isinstance(one, dict) for one in members)
            if not whole or not 1 <= len(members) <= MAX_MEMBERS or any("configs" in one for one in members):
                raise refusal(CONFIG, config, "configs", f"a list of 1 to {MAX_MEMBERS} configurations, not nested")
            return [part for one in members for part in self.read(one)]
        if architecture is None:
            return self._bottleneck(config)
        if architecture == "lora":
            mode = config.get("composition_mode", "add")
            if mode not in ("add", "scale"):
                raise refusal(CONFIG, config, "composition_mode", "add, scale")
            return [self._ia3(config) if mode == "scale" else self._lora(config)]
        if architecture == "prefix_tuning":
            return [self._prefix(config)]
        if architecture == "prompt_tuning":
            return [self._prompt(config)]
        raise refusal(CONFIG, config, "architecture", ARCHITECTURES)

    # ------------------------------------------------------------------------------------------------- bottleneck

    def _bottleneck(self, config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        config = dict(config)
        if isinstance(nested := config.pop("invertible_adapter", None), dict):  # as version 1 had it
            config |= {
                "inv_adapter": nested.get("block_type"),
                "inv_adapter_reduction_factor": nested.get("reduction_factor"),
            }
        _only(config, {*BOTTLENECK, *PHM, "phm_layer", "inv_adapter", "inv_adapter_reduction_factor"})
        method, known = ("compacter", BOTTLENECK + PHM) if config.get("phm_layer") else ("bottleneck", BOTTLENECK)
        options = {name: config[name] for name in known if config.get(name) is not None}
        found = configured(CONFIG, method, options, self.spec)
        paths = [self._place(name) for name in self.names]
        for name, theirs in self.names.items():
            if (place := self._place(name)) is not None:
                self._take_bottleneck(theirs, *place, bool(config.get("ln_before")))
            elif (shared := self._after(name, "shared_parameters")) is not None:
                self.checkpoint.take(theirs, f"{method}/{shared}")
        parts = [(method, found)] if any(paths) or not config.get("inv_adapter") else []
        if config.get("inv_adapter") and (part := self._invertible(config)) is not None:
            parts.append(part)
        return parts

    def _place(self, name: str) -> tuple[Site, str] | None:
        """The residual site and the parameter that a bottleneck's tensor belongs to."""
        param = self._after(name, "adapters")
        if param is None:
            return None
        for index, layer in enumerate(self.spec.layers):
            if name.startswith(f"{layer}."):
                place = "attention" if name.removeprefix(f"{layer}.").startswith("attention") else "ffn"
                return Site(SiteKind.RESIDUAL, f"{index}.{place}"), param
        return None

    def _take_bottleneck(self, theirs: str, site: Site, param: str, ln_before: bool) -> None:
        """`adapter_down.0` is the projection, or the norm before it, which is there under its own name as well."""
        if ln_before and param.startswith("adapter_down.0."):
            twin = theirs.replace("adapter_down.0.", "adapter_norm_before.")
            if twin in self.checkpoint.tensors:
                self.checkpoint.same(theirs, twin)
            else:
                self.checkpoint.take(
                    theirs, tensor_name(site, param.replace("adapter_down.0.", "adapter_norm_before."))
                )
            return
        param = re.sub(r"^adapter_down\.[01]\.", "adapter_down.", param)
        self.checkpoint.take(theirs, tensor_name(site, param))

    def _invertible(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        if config["inv_adapter"] != "nice":
            raise refusal(CONFIG, config, "inv_adapter", "nice")
        own = {
            param: theirs
            for name, theirs in self.names.items()
            if (param := self._after(name, "invertible_adapters")) is not None
        }
        if not own:
            return None  # version 1 wrote the option into task adapters that had none
        options = {
            "inv_adapter_reduction_factor": config.get("inv_adapter_reduction_factor") or 2,
            "non_linearity": config.get("non_linearity"),
        }
        for param, theirs in own.items():
            self.checkpoint.take(theirs, tensor_name(ENCODER_INPUT, param))
        return "invertible", configured(CONFIG, "invertible", options, self.spec)

    # ------------------------------------------------------------------------------------------------- LoRA and IA3

    def _lora(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        _only(config, _LORA)
        dora = bool(config.get("use_dora"))
        vera = isinstance(config.get("vera_d"), float) or isinstance(config.get("vera_b"), float)
        sites = self._adapted(config)
        rank = _integer(config, "r")
        options: dict[str, Any] = {"lora_alpha": _number(config, "alpha"), "use_gating": bool(config.get("use_gating"))}
        if options["use_gating"]:
            options["lora_alpha"] = rank  # the gate takes the scale's place
        ranks = {}
        for site, params in sites.items():
            at = self.spec.sites[site]
            if vera:
                self._take_vera(site, params)
            elif self._merged(site):
                if options["use_gating"]:
                    raise refusal(CONFIG, config, "use_gating", "false where query, key and value are one layer")
                ranks[site.name] = self._take_merged(site, params, config, rank)
            else:
                self._take_own(site, params, "lora_A", "lora_B")
            if dora:
                theirs = params.get("m.weight", f"{site.name}.loras.{self.name}.m.weight")
                self.checkpoint.take(theirs, tensor_name(site, "lora_magnitude_vector"), (at.size_out, 1), _flat)
            if options["use_gating"]:
                self._take_own(site, params, "gate.weight", "gate.bias")
        alpha = options["lora_alpha"]
        merged = {path: own for path, own in ranks.items() if own != rank}
        options |= {
            "r": rank,
            "target_modules": [site.name for site in sites],
            "rank_pattern": {re.escape(path): own for path, own in merged.items()},
            "alpha_pattern": {re.escape(path): alpha * own / rank for path, own in merged.items()},
        }
        if dora:
            options["unscaled_norm"] = options["scaled_bias"] = True
        method = "dora" if dora else "lora"
        return method, configured(CONFIG, method, options, self.spec)

    def _take_vera(self, site: Site, params: Mapping[str, str]) -> None:
        """vera_B (B (vera_D (A x))): the two in the middle are whole matrices here, so it is a LoRA like any other."""
        shared = {param: self.names.get(f"shared_parameters.{self.name}.{param}") for param in ("lora_A", "lora_B")}
        names = {param: params.get(param, f"{site.name}.loras.{self.name}.{param}") for param in ("vera_B", "vera_D")}
        a = self.checkpoint.use(shared["lora_A"] or f"shared_parameters.{self.name}.lora_A")
        b = self.checkpoint.use(shared["lora_B"] or f"shared_parameters.{self.name}.lora_B")
        for theirs, tensor in ((shared["lora_A"], a), (shared["lora_B"], b)):
            if tensor.ndim != 2:
                raise InvalidAdapter(
                    f"tensor {theirs!r} has shape {list(tensor.shape)}, the backbone needs a matrix",
                    param=theirs,
                    code="wrong_shape",
                )
        at = self.spec.sites[site]
        outer = self.checkpoint.use(names["vera_B"], (at.size_out, b.shape[0]))
        inner = self.checkpoint.use(names["vera_D"], (b.shape[-1], a.shape[0]))
        self.checkpoint.put(tensor_name(site, "lora_A"), a.clone())  # each site's own in the artifact
        self.checkpoint.put(tensor_name(site, "lora_B"), outer.float() @ b.float() @ inner.float())

    def _take_merged(self, site: Site, params: Mapping[str, str], config: Mapping[str, Any], rank: int) -> int:
        """GPT-2's query, key and value are one layer: a block of rank r for each that is adapted."""
        at = self.spec.sites[site]
        blocks = _blocks(config)
        size = at.size_out // 3
        a = self.checkpoint.use(params.get("lora_A", f"{site.name}.lora_A"), (rank * len(blocks), at.size_in))
        b = self.checkpoint.use(params.get("lora_B", f"{site.name}.lora_B"), (size * len(blocks), rank))
        whole = b.new_zeros(at.size_out, rank * len(blocks))
        for index, block in enumerate(blocks):
            own = b[index * size : (index + 1) * size]
            whole[block * size : (block + 1) * size, index * rank : (index + 1) * rank] = own
        self.checkpoint.put(tensor_name(site, "lora_A"), a)
        self.checkpoint.put(tensor_name(site, "lora_B"), whole)
        return rank * len(blocks)

    def _ia3(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        _only(config, _LORA)
        if config.get("use_dora"):
            raise refusal(CONFIG, config, "use_dora", "false together with composition_mode 'scale'")
        gated = bool(config.get("use_gating"))
        alpha = 1 if gated else _number(config, "alpha")  # the gate takes the scale's place
        sites = self._adapted(config)
        for site, params in sites.items():
            at = self.spec.sites[site]
            theirs = params.get("lora_B", f"{site.name}.loras.{self.name}.lora_B")
            ours = tensor_name(site, "ia3_l")
            if self._merged(site):
                blocks, size = _blocks(config), at.size_out // 3
                if gated:
                    raise refusal(CONFIG, config, "use_gating", "false where query, key and value are one layer")
                stored = self.checkpoint.use(theirs, (size * len(blocks), 1)).flatten()
                whole = torch.ones(3, size, dtype=stored.dtype)
                whole[blocks] = stored.view(len(blocks), size)
                self.checkpoint.put(ours, whole.flatten() * alpha)
                continue
            self.checkpoint.take(theirs, ours, (at.size_out, 1), lambda tensor: tensor.flatten() * alpha)
            if gated:
                self._take_own(site, params, "gate.weight", "gate.bias")
        options = {"target_modules": [site.name for site in sites], "feedforward_modules": [], "use_gating": gated}
        return "ia3", configured(CONFIG, "ia3", options, self.spec)

    def _merged(self, site: Site) -> bool:
        """Whether query, key and value are this one layer, as GPT-2 has it."""
        return any(is_target(site.name, name) for name in self.spec.targets.get("query_key_value", ()))

    def _take_own(self, site: Site, params: Mapping[str, str], *names: str) -> None:
        """Takes parameters of a site that are called the same in the artifact."""
        for param in names:
            theirs = params.get(param, f"{site.name}.loras.{self.name}.{param}")
            self.checkpoint.take(theirs, tensor_name(site, param))

    def _adapted(self, config: Mapping[str, Any]) -> dict[Site, dict[str, str]]:
        """The linear sites that the options name -> parameter -> its name in the file."""
        left_out = config.get("leave_out") or []
        if not isinstance(left_out, list):
            raise refusal(CONFIG, config, "leave_out", "a list of layers")
        sites: dict[Site, dict[str, str]] = {}
        for index, layer in enumerate(self.spec.layers):
            for role in self._roles(config) if index not in left_out else ():
                for name in self.spec.targets.get(f"adapterhub_{role}") or self.spec.targets.get(role, ()):
                    sites |= {site: {} for site in self._in_layer(layer, name, role)}
        for name, theirs in self.names.items():
            path, found, param = name.partition(f".loras.{self.name}.")
            site = Site(SiteKind.LINEAR, path)
            if found and site in sites:
                sites[site][param] = theirs
        if not sites:
            raise refusal(CONFIG, config, "attn_matrices", "some of q, k and v, or intermediate_lora, or output_lora")
        return {site: sites[site] for site in self.spec.sites if site in sites}

    def _roles(self, config: Mapping[str, Any]) -> list[str]:
        """What the options say of a layer, as roles of linear layers."""
        roles = []
        if config.get("selfattn_lora", True):
            blocks = _blocks(config)
            merged = "query_key_value" in self.spec.targets
            roles = ["query_key_value"] if merged and blocks else [("query", "key", "value")[block] for block in blocks]
        for option, role in (("intermediate_lora", "intermediate"), ("output_lora", "output")):
            if config.get(option):
                roles.append(role)
        return roles

    def _in_layer(self, layer: str, name: str, role: str) -> list[Site]:
        """A layer's linear layers of a name; those of the feed-forward network lie outside of the attention."""
        found = [
            site
            for site in self.spec.sites_of(SiteKind.LINEAR)
            if site.name.startswith(f"{layer}.") and is_target(site.name.removeprefix(f"{layer}."), name)
        ]
        if role in ("intermediate", "output"):
            found = [site for site in found if not site.name.removeprefix(f"{layer}.").startswith("attention")]
        return found

    # ------------------------------------------------------------------------------------------- prefixes and prompts

    def _prefix(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        _only(
            config,
            {"prefix_length", "flat", "bottleneck_size", "non_linearity", "leave_out", "use_gating", "shared_gating"},
        )
        length = _integer(config, "prefix_length")
        options = {
            "num_virtual_tokens": length,
            "position_shift": False,
            "leave_out": config.get("leave_out") or [],
            "use_gating": bool(config.get("use_gating")),
            "shared_gating": bool(config.get("shared_gating", True)),
        }
        found = configured(CONFIG, "prefix_tuning", options, self.spec)
        method = METHODS["prefix_tuning"]
        sites = method.sites(method.Config.model_validate(found), self.spec)
        stored = self._prefix_tensors()
        sizes = [self.spec.sites[site].size_out for site in sites for _ in range(2)]
        total = sum(sizes)
        if config.get("flat"):
            flat = self.checkpoint.use(stored.get("control_trans", "control_trans"), (length * total,))
            prefix = flat.view(length, total)
        else:
            hidden, inner = self.spec.hidden_size, _integer(config, "bottleneck_size")
            shapes = {
                "wte.weight": (length, hidden),
                "control_trans.0.weight": (inner, hidden),
                "control_trans.0.bias": (inner,),
                "control_trans.2.weight": (total, inner),
                "control_trans.2.bias": (total,),
            }
            own = {name: self.checkpoint.use(stored.get(name, name), shape).float() for name, shape in shapes.items()}
            activation = ACTIVATIONS.get(str(config.get("non_linearity")).lower())
            if activation is None:
                raise refusal(CONFIG, config, "non_linearity", ", ".join(sorted(ACTIVATIONS)))
            low = activation(F.linear(own["wte.weight"], own["control_trans.0.weight"], own["control_trans.0.bias"]))
            prefix = F.linear(low, own["control_trans.2.weight"], own["control_trans.2.bias"])
        for name, theirs in self.names.items():
            gate = self._after(name, "prefix_gates")
            for index, layer in enumerate(self.spec.layers):
                if gate is not None and name.startswith(f"{layer}."):
                    self.checkpoint.take(theirs, tensor_name(Site(SiteKind.KEY_VALUE, str(index)), f"gate.{gate}"))
        places = [(site, param) for site in sites for param in ("key", "value")]
        for (site, param), piece in zip(places, torch.split(prefix, sizes, dim=1), strict=True):
            self.checkpoint.put(tensor_name(site, param), piece)
        return "prefix_tuning", found

    def _prefix_tensors(self) -> dict[str, str]:
        """Parameter -> name in the file. Every layer's attention holds a reference to the same ones."""
        stored: dict[str, str] = {}
        for name, theirs in sorted(self.names.items(), key=lambda pair: len(pair[0])):
            _, found, rest = name.partition(f"prefix_tunings.{self.name}.")
            param = rest.partition(".")[2]  # after where it acts: self_prefix
            if not found:
                continue
            if param in stored:
                self.checkpoint.same(theirs, stored[param])
            else:
                stored[param] = theirs
        return stored

    def _prompt(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        _only(config, {"prompt_length", "combine"})
        options = {
            "num_virtual_tokens": _integer(config, "prompt_length"),
            "placement": "states",
            "combine": config.get("combine", "prefix"),
        }
        found = configured(CONFIG, "prompt_tuning", options, self.spec)
        name = f"prompt_tuning.prompt_tunings.{self.name}.prompt_embedding.weight"
        self.checkpoint.take(self.names.get(name, name), tensor_name(ENCODER_INPUT, "prompt"))
        return "prompt_tuning", found

    def _after(self, name: str, kind: str) -> str | None:
        """The parameter, of a tensor `...<kind>.<adapter>.<parameter>`."""
        before, found, param = name.partition(f"{kind}.{self.name}.")
        return param if found and (not before or before.endswith(".")) else None


_LORA = frozenset(
    {
        "alpha",
        "attn_matrices",
        "composition_mode",
        "intermediate_lora",
        "leave_out",
        "output_lora",
        "r",
        "selfattn_lora",
        "use_dora",
        "use_gating",
        "vera_b",
        "vera_d",
    }
)
"""Where the layers are, the tensors' names say."""


def read(files: Mapping[str, bytes], labels: Sequence[str] | None, host: Host) -> Artifact:
    """The artifact of an AdapterHub folder. Every tensor of it is consumed, or refused by the name it has there."""
    spec = host.spec
    document = read_json(files, CONFIG)
    check_backbone(CONFIG, document, spec)
    if not spec.listed:
        raise InvalidAdapter(
            f"where AdapterHub's adapters touch backbones of type {spec.model_type!r} is not known",
            param="model_type",
            code="unsupported_method",
        )
    for file, pickle in PICKLES.items():
        refuse_pickle(files, file, pickle, "use_safetensors=True")
    config = _config(document)
    name = document.get("name")
    if not isinstance(name, str) or not name:
        raise refusal(CONFIG, document, "name", "the name that the tensors carry")
    tensors = read_tensors(TENSORS, required(files, TENSORS))
    headless = HEAD_CONFIG not in files and HEAD_TENSORS not in files
    if headless and labels is not None:
        raise InvalidAdapter(
            f"file {HEAD_CONFIG!r} is missing: an adapter without a head gives vectors, which have no labels; save it "
            "with with_head=True, or leave the labels out",
            param=HEAD_CONFIG,
            code="missing_file",
        )
    head_document = {} if headless else read_json(files, HEAD_CONFIG)
    head_tensors = {} if headless else read_tensors(HEAD_TENSORS, required(files, HEAD_TENSORS))
    if both := tensors.keys() & head_tensors.keys():
        raise InvalidAdapter(f"tensor {min(both)!r} is in both files", param=min(both), code="contradiction")
    checkpoint = Checkpoint({**tensors, **head_tensors}, host)
    reader = _Reader(checkpoint, spec, name, _names(tensors, spec))
    parts = reader.read(config)
    if headless:
        head = sentence_transformers.embedding(files, labels)
    else:
        head = _head(checkpoint, head_document, files, labels, spec)
    return checkpoint.finish(
        parts=parts,
        task=head.task,
        head=head.config,
        labels=head.labels,
        source=str(document.get("version") or "adapter-transformers").replace("adapters.", "adapters ")[:60],
    )


def _config(document: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's configuration, with what older versions meant otherwise put right. Source: `loading.py`."""
    config = document.get("config")
    if not isinstance(config, dict):
        raise refusal(CONFIG, document, "config", "the whole configuration, as the library saves it")
    config = dict(config)
    version = str(document.get("version") or "")
    if not version and isinstance(activation := config.get("non_linearity"), str):
        config["non_linearity"] = RENAMED_ACTIVATIONS.get(activation, activation)
    numbers = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})\.(\d{1,4}).*", version)
    if numbers and tuple(map(int, numbers.groups())) < LORA_SCALED_SINCE and config.get("architecture") == "lora":
        config["alpha"] = config.get("r")
    return config


def _names(tensors: Mapping[str, Tensor], spec: BackboneSpec) -> dict[str, str]:
    """Names of today without the model's prefix -> names in the file."""
    names: dict[str, str] = {}
    for theirs in tensors:
        name = theirs.removeprefix(f"{spec.prefix}.")
        for old, new in RENAMED.items():
            name = name.replace(f"{old}.", f"{new}.")
        if name in names:
            raise InvalidAdapter(f"tensor {theirs!r} is there twice", param=theirs, code="contradiction")
        names[name] = theirs
    return names


def _head(
    checkpoint: Checkpoint,
    document: Mapping[str, Any],
    files: Mapping[str, bytes],
    labels: Sequence[str] | None,
    spec: BackboneSpec,
) -> Head:
    """Takes the head's tensors."""
    config = document.get("config")
    if not isinstance(config, dict):
        raise refusal(HEAD_CONFIG, document, "config", "the whole configuration, as the library saves it")
    kind = config.get("head_type")
    if not isinstance(kind, str) or kind not in HEADS:
        raise refusal(HEAD_CONFIG, config, "head_type", ", ".join(HEADS))
    task = HEADS[kind]
    _only(config, _HEAD, HEAD_CONFIG)
    layers = config.get("layers")
    if not isinstance(layers, int) or not 1 <= layers <= 16:
        raise refusal(HEAD_CONFIG, config, "layers", "1 to 16")
    activation = config.get("activation_function")
    if activation is not None and str(activation).lower() not in ACTIVATIONS:
        raise refusal(HEAD_CONFIG, config, "activation_function", ", ".join(sorted(ACTIVATIONS)))
    bias = bool(config.get("bias", True))
    # dropout, linear and activation count on, where they are there
    step = 3 if activation else 2
    prefix = f"heads.{document.get('name')}."
    for index in range(layers):
        last = index == layers - 1
        for param in ("weight", "bias") if bias or not last else ("weight",):
            ours = (WEIGHT if param == "weight" else BIAS) if last else hidden_name(index, param)
            checkpoint.take(f"{prefix}{step * index + 1}.{param}", ours)
    head: dict[str, Any] = {"hidden_layers": layers - 1, "activation": activation, "bias": bias}
    if task not in OF_TOKENS:
        decoder = spec.heads[HeadKind.SEQUENCE].pooling is Pooling.LAST
        first = Pooling.LAST if decoder else Pooling.CLS
        head["pooling"] = Pooling.POOLER if config.get("use_pooler") else first
    if task == "question_answering":
        refuse_labels(labels, "an adapter for question answering")
        return Head(task, head, ())
    outputs = config.get("num_labels")
    if task == "classification" and outputs == 1:
        task = "regression"  # what the library trains such a head for
    known = label_names(files, labels, by_index(config, HEAD_CONFIG), outputs if isinstance(outputs, int) else None)
    return Head(task, head, known)


_HEAD = frozenset(
    {
        "activation_function",
        "bias",
        "dropout_prob",
        "head_type",
        "id2label",
        "label2id",
        "layers",
        "num_labels",
        "use_pooler",
    }
)


def _only(config: Mapping[str, Any], known: frozenset[str] | set[str], where: str = CONFIG) -> None:
    """Refuses options that are set and not known."""
    for option in sorted(config.keys() - known - INERT):
        if config[option]:
            raise refusal(where, config, option, ", ".join(sorted(known)))


def _integer(config: Mapping[str, Any], option: str) -> int:
    value = config.get(option)
    if not isinstance(value, int) or not 1 <= value <= 1_000_000:
        raise refusal(CONFIG, config, option, "a positive number")
    return value


def _number(config: Mapping[str, Any], option: str) -> float:
    value = config.get(option)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e6:
        raise refusal(CONFIG, config, option, "a number")
    return value


def _blocks(config: Mapping[str, Any]) -> list[int]:
    """Which of query, key and value are adapted, in that order."""
    matrices = config.get("attn_matrices")
    if not isinstance(matrices, list):
        raise refusal(CONFIG, config, "attn_matrices", "a list of q, k and v")
    return [index for index, name in enumerate("qkv") if name in matrices]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()
