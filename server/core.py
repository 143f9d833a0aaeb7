"""The nouns of adapterd. Plain data, no torch: everything else may import this, and this imports nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class SiteKind(StrEnum):
    """The kinds of places at which an adapter may touch the backbone."""

    LINEAR = "linear"
    """A linear layer: x enters it, y leaves it. The name is the module's path."""
    LINEAR_INPUT = "linear_input"
    """What enters a linear layer. The name is the module's path."""
    EMBEDDING = "embedding"
    """A table of embeddings: x are the ids that are looked up, y their rows. The name is the module's path."""
    NORM = "norm"
    """A normalization layer: x enters it, y leaves it. The name is the module's path."""
    RESIDUAL = "residual"
    """Where a sub-layer's output h joins the residual stream x. y is what goes on from there: h itself where the
    model adds and normalizes later (pre-LN), norm(h + x) where it does both at once (post-LN). The name is
    `<layer>.attention|ffn`."""
    KEY_VALUE = "key_value"
    """The keys and values of a layer's attention, [rows, size_out] each; it reads [rows, size_in]. The name is the
    layer's number."""
    ENCODER = "encoder"
    """The states before the first layer, name `input`, and after the last, name `output`."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One place of one backbone at which an adapter may act."""

    kind: SiteKind
    name: str

    def __hash__(self) -> int:
        return hash(self.name)  # sites are looked up all the time, and few names have two kinds

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


ENCODER_INPUT = Site(SiteKind.ENCODER, "input")
ENCODER_OUTPUT = Site(SiteKind.ENCODER, "output")


class Reach(StrEnum):
    """Which rows the module at a site sees."""

    TOKENS = "tokens"
    """One row per token."""
    TEXTS = "texts"
    """One row per text: a pooler."""
    SHARED = "shared"
    """Also rows that belong to no text, such as relative positions: an adapter that acts here has to have the
    forward to itself."""


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """The sizes at a site."""

    size_in: int
    size_out: int
    bias: bool = False
    """Whether its module has a bias."""
    reach: Reach = Reach.TOKENS


class Pooling(StrEnum):
    """How the token states of a text become one vector."""

    MEAN = "mean"
    """Mean over the text's tokens."""
    CLS = "cls"
    """The state of the first token."""
    LAST = "last"
    """The state of the last token."""
    POOLER = "pooler"
    """The backbone's own frozen pooler on the first token (BERT: tanh(W h + b))."""


class HeadKind(StrEnum):
    """What transformers builds heads for, as its classes are called: `BertForTokenClassification`."""

    SEQUENCE = "SequenceClassification"
    TOKENS = "TokenClassification"
    QUESTION = "QuestionAnswering"


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A head that transformers builds for a family: what it reads, and its tensors.

    pooling -> dense -> activation -> norm -> output, where dense and norm may be missing.
    """

    pooling: Pooling | None
    """None: each token of the text."""
    output: str
    """Path of the last linear layer."""
    dense: str | None = None
    dense_bias: bool = True
    activation: str = "tanh"
    norm: str | None = None
    norm_eps: float = 1e-5
    bias: bool = True
    """Whether the last layer has one."""
    prefix: str | None = None
    """`base_model_prefix` of the class with this head, where it is not the family's."""


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
    listed: bool
    """Whether sites.py knows the family; else only its linear layers and embeddings are sites."""
    sites: Mapping[Site, SiteSpec]
    poolings: frozenset[Pooling]
    heads: Mapping[HeadKind, HeadSpec]
    """transformers' heads for the family, if the family is listed."""
    layers: tuple[str, ...]
    """Paths of the layers, where the family is listed. A layer that is run through several times is one."""
    word_embeddings: str
    """Path of the table of word embeddings."""
    targets: Mapping[str, tuple[str, ...]]
    """Roles of linear layers -> names that they have here: `query`, `key`, `value`, `query_key_value` (one layer for
    all three), `intermediate` and `output` (the feed-forward network's; `adapterhub_...` where AdapterHub takes another
    layer for it). Empty for a family that is not listed."""

    def sites_of(self, kind: SiteKind) -> list[Site]:
        """The sites of a kind, in the model's order."""
        return [site for site in self.sites if site.kind is kind]

    def named(self, *roles: str) -> tuple[str, ...]:
        """Names of the linear layers that play these roles here, as far as they are sites."""
        names = [name for role in roles for name in self.targets.get(role, ())]
        linear = [site.name for site in self.sites_of(SiteKind.LINEAR)]
        return tuple(name for name in names if any(is_target(path, name) for path in linear))


def is_target(path: str, target: str) -> bool:
    """PEFT's rule for a list of target modules: a module's whole path, or the end of it after a dot."""
    return path == target or path.endswith(f".{target}")


Span = tuple[int, int]
"""A piece of a text or of a list: its first place, and one past its last."""


@dataclass(frozen=True, slots=True)
class TextInput:
    """One input of a request."""

    text: str
    """Of a question to a text: the question."""
    pair: str | None = None
    """A second text: the hypothesis to a premise, the text that a question is about."""
    spans: tuple[Span, ...] = ()
    """Marked pieces of `text`, in characters."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where the tokens of an encoding come from; one entry per token."""

    parts: tuple[int | None, ...]
    """0: the text, 1: its pair, None: a special token."""
    offsets: tuple[Span, ...]
    """Characters of that part."""
    words: tuple[int | None, ...]
    """Which word of that part, as the tokenizer splits it before it looks words up; None: a special token."""
    continues: tuple[bool, ...]
    """Whether the token goes on with the word of the one before it, as transformers' token classification decides."""
    skipped: int = 0
    """Tokens of the text that is cut into windows, the last one that has any, before this window."""
    cls: int | None = None
    """Which token is the tokenizer's CLS token; None where there is none, as in GPT-2."""

    def places(self, part: int) -> list[int]:
        """Which tokens are of a part."""
        return [index for index, owner in enumerate(self.parts) if owner == part]


@dataclass(frozen=True, slots=True)
class Encoding:
    """One tokenized input, or a window of it."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    truncated: bool
    spans: tuple[Span, ...] = ()
    """Tokens of the input's marked spans."""
    alignment: Alignment | None = None
    """Where it was asked for."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Which adapter answered: name, content digest and the release that chose it."""

    name: str
    version: str
    release: int | None
    """None where the adapter was never released and the version was asked for."""


@dataclass(frozen=True, slots=True)
class StoreCall:
    """A call of the adapter store that has ended, further tries included."""

    operation: str
    key: str
    """The object's, or what a listing's keys begin with."""
    outcome: str
    """`success`, `missing`, `exists`, `failure` or `cancelled`."""
    seconds: float
    attempts: int

    @property
    def failed(self) -> bool:
        """Whether the store did not do what it should."""
        return self.outcome == "failure"


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label and its score: a probability, or the value that was measured."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class LabelDecision:
    """One label of several that a text may have, its probability, and whether that is enough."""

    label: str
    score: float
    above: bool
    """Whether the score reaches the label's threshold."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A piece of a text and its label."""

    label: str
    score: float
    start: int
    """First character."""
    end: int
    """One past the last character."""
    text: str


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """A piece of the context that answers a question; an empty one if there is no answer in it."""

    text: str
    score: float
    start: int
    """First character of the context."""
    end: int
    """One past the last character."""


def check_text(text: str) -> str:
    """JSON can carry halves of characters (lone surrogates), which no tokenizer and no answer can. ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode") from None
    return text


class Route(StrEnum):
    """The routes of tasks, each with answers of one form."""

    CLASSIFY = "classify"
    TAG = "tag"
    ANSWER = "answer"
    EMBED = "embed"

    @property
    def path(self) -> str:
        """Where it is reached over HTTP."""
        return f"/{self}"

    def item(self, text: TextInput) -> str | dict[str, Any]:
        """An input as it is written there."""
        if self is Route.ANSWER:
            return {"question": text.text, "context": text.pair}
        more = {name: value for name, value in (("text_pair", text.pair), ("spans", text.spans)) if value}
        return {"text": text.text, **more} if more else text.text


class Activation(StrEnum):
    """How logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


class Aggregation(StrEnum):
    """How tokens become entities, with the names of transformers' token classification."""

    NONE = "none"
    """Each token is one, with the label as it is; also those outside of entities."""
    SIMPLE = "simple"
    """Neighbouring tokens of one entity are joined."""
    FIRST = "first"
    """The same by words: a word has the label of its first token."""
    AVERAGE = "average"
    """By words: the label that is likeliest on average over the word's tokens."""
    MAX = "max"
    """By words: the label of the token that is surest."""


class WindowPooling(StrEnum):
    """How the windows of a long text become one answer."""

    MEAN = "mean"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class ClassifyOptions:
    """What is wanted of /classify."""

    top_k: int | None = None
    """Labels wanted of each text, the best ones; all of them if None."""
    activation: Activation | None = None
    """In place of the task's own."""
    threshold: float | None = None
    """In place of the labels' own, where a text may have several."""


@dataclass(frozen=True, slots=True)
class TagOptions:
    """What is wanted of /tag."""

    aggregation: Aggregation = Aggregation.SIMPLE


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What is wanted of /answer."""

    top_k: int = 1
    """Answers wanted, the best ones."""
    max_answer_tokens: int = 15
    """Longest answer."""
    no_answer: bool = False
    """Whether the text may be said to have no answer."""


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """What is wanted of /embed."""

    normalize: bool | None = None
    """Whether vectors have length 1; the adapter knows if None."""
    dimensions: int | None = None
    """Only so many of the first numbers."""
    pooling: Pooling | None = None
    """Of the backbone alone, the mean if None; an adapter brings its own."""


Options = ClassifyOptions | TagOptions | AnswerOptions | EmbedOptions

ClassifyPrediction = list[LabelScore] | list[LabelDecision]
"""The labels of one text, best first."""

Prediction = ClassifyPrediction | list[Entity] | list[AnswerSpan] | list[float]
"""The answer to one input; a vector is one of /embed."""


@dataclass(frozen=True, slots=True)
class Long:
    """Texts that are too long for the backbone are run in windows that overlap."""

    pooling: WindowPooling = WindowPooling.MEAN


class Priority(StrEnum):
    """How urgent a request is, the most urgent first: what waits of one runs before what waits of the next."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class Terms:
    """How work stands in the queue."""

    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    """On the queue's clock, in seconds: from then on nobody wants the answer."""
    strict: bool = False
    """Rows run together where a batch holds them, and those that fail together fail: for proofs. Else they are tried
    apart."""


PLAIN = Terms()
"""Nothing special."""


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Inputs for some adapters, each of which answers all of them."""

    route: Route
    adapters: tuple[str, ...]
    """None at all: the backbone alone, where the route can do without."""
    inputs: tuple[TextInput, ...]
    options: Options
    truncate: bool = True
    long: Long | None = None
    version: str | None = None
    """The version to answer, whatever is released; else one that the last release names."""
    routing_key: str = ""
    """Requests with the same key get the same version while the shares of traffic stay."""
    priority: Priority = Priority.NORMAL
    timeout_seconds: float | None = None
    """How long the answer may take."""


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """What one adapter says: one prediction per input, in order."""

    ref: AdapterRef | None
    """None: the backbone alone."""
    backbone: str
    predictions: Sequence[Any]
    tokens: int
    truncated: list[int]
    """Indices of the inputs that were cut to the backbone's length."""
    windows: list[list[Span]] | None
    """Of each input, the characters of each window; None where no windows were asked for."""
