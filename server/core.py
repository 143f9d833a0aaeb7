"""The nouns of adapterd. Plain data, no torch: everything else may import this, and this imports nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class SiteKind(StrEnum):
    """The kinds of places at which an adapter may touch the backbone."""

    LINEAR = "linear"
    """A linear layer: x enters it, y leaves it. The name is the module's path."""
    RESIDUAL = "residual"
    """The output y of a sub-layer before it joins the residual stream. The name is `<layer>.attention|ffn`."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One place of one backbone at which an adapter may act."""

    kind: SiteKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    def is_target(self, target: str) -> bool:
        """PEFT's rule for a list of target modules: a linear layer's whole path, or the end of it after a dot."""
        return self.kind is SiteKind.LINEAR and (self.name == target or self.name.endswith(f".{target}"))


class Pooling(StrEnum):
    """How the token states of a text become one vector."""

    MEAN = "mean"
    """Mean over the text's tokens."""
    CLS = "cls"
    """The state of the first token."""
    POOLER = "pooler"
    """The backbone's own frozen pooler on the first token (BERT: tanh(W h + b))."""


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """What an adapter has to fit: read once from the loaded backbone, without a tensor in it."""

    name: str
    model_type: str
    fingerprint: str
    """`sha256:...` over the names, shapes and bytes of the backbone's tensors, as its checkpoint stores them."""
    hidden_size: int
    num_layers: int
    max_tokens: int
    """Longest text, special tokens included."""
    prefix: str
    """transformers' `base_model_prefix`, e.g. `bert`: checkpoints of whole models put it before module paths."""
    sites: Mapping[Site, tuple[int, int]]
    """Every site with the sizes of its input and of its output."""
    poolings: frozenset[Pooling]
    classifier_pooling: Pooling | None
    """What transformers' sequence classifier of this family puts under its one linear layer, if that is all it
    has; None where its head is built otherwise."""
    default_targets: tuple[str, ...]
    """Names of the attention's query and value projections, where the family is listed."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """One tokenized text."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    truncated: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Which adapter answered: name, content digest and the release that chose it."""

    name: str
    version: str
    release: int


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label and its probability."""

    label: str
    score: float


def check_text(text: str) -> str:
    """JSON can carry halves of characters (lone surrogates), which no tokenizer and no answer can. ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode") from None
    return text


Prediction = list[LabelScore]
"""The labels of one text, best first."""


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """Texts to classify with one adapter."""

    adapter: str
    inputs: tuple[str, ...]
    truncate: bool = True
    top_k: int | None = None
    """Labels wanted of each text, the best ones; all of them if None."""


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer to a ClassifyRequest: one prediction per input, in order."""

    ref: AdapterRef
    backbone: str
    predictions: list[Prediction]
    tokens: int
    truncated: list[int]
    """Indices of the inputs that were cut to the backbone's length."""
