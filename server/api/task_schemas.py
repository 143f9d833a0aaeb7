"""What the routes of tasks take and answer."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from server.api.deps import MAX_TIMEOUT_MS
from server.api.schemas import Body
from server.core import (
    Activation,
    Aggregation,
    AnswerOptions,
    AnswerSpan,
    ClassifyOptions,
    EmbedOptions,
    Entity,
    LabelDecision,
    LabelScore,
    Long,
    Options,
    Pooling,
    Priority,
    Span,
    TagOptions,
    TextInput,
    WindowPooling,
    check_text,
)

MAX_ADAPTERS = 64
"""Adapters of one request."""

MAX_SPANS = 16


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return check_text(text)


Text = Annotated[str, AfterValidator(_not_blank)]


class TextItem(Body):
    """A text, what belongs to it, and what is marked in it."""

    text: Text
    text_pair: Annotated[str, AfterValidator(check_text)] | None = Field(
        None, description="A second text: the hypothesis to a premise, the passage to a query."
    )
    spans: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
        [], max_length=MAX_SPANS, description="Marked pieces of the text: first character, one past the last."
    )

    def item(self) -> TextInput:
        """As the engine takes it."""
        return TextInput(self.text, self.text_pair, tuple((start, end) for start, end in self.spans))


class QuestionItem(Body):
    """A question to a text."""

    question: Text
    context: Text

    def item(self) -> TextInput:
        """As the engine takes it."""
        return TextInput(self.question, self.context)


def _text_item(value: Any) -> str | TextItem:
    """Most inputs are plain texts, and stay that: a request may hold hundreds."""
    if isinstance(value, str):
        return _not_blank(value)
    if not isinstance(value, dict):
        raise ValueError("a text is needed, or an object with one")
    return TextItem.model_validate(value)


def _question_item(value: Any, parse: ValidatorFunctionWrapHandler) -> QuestionItem:
    if not isinstance(value, dict):
        raise ValueError("an object with a question and a context is needed")
    item: QuestionItem = parse(value)
    return item


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


TextItems = Annotated[
    list[Annotated[str | TextItem, PlainValidator(_text_item, json_schema_input_type=str | TextItem)]],
    BeforeValidator(_listed, json_schema_input_type=str | TextItem | list[str | TextItem]),
    Field(min_length=1, description="A text, or a list of texts; with a second text, or marked spans, as an object."),
]
Texts = Annotated[
    list[Text],
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    Field(min_length=1, description="A text, or a list of texts."),
]
Questions = Annotated[
    list[Annotated[QuestionItem, WrapValidator(_question_item, json_schema_input_type=QuestionItem)]],
    BeforeValidator(_listed, json_schema_input_type=QuestionItem | list[QuestionItem]),
    Field(min_length=1, description="A question with its context, or a list of them."),
]


def text_inputs(items: Iterable[str | TextItem]) -> tuple[TextInput, ...]:
    """As the engine takes them."""
    return tuple(TextInput(one) if isinstance(one, str) else one.item() for one in items)


class TaskBody(Body):
    """What all routes of tasks take: which adapters answer, and what becomes of long texts."""

    adapter: str | None = Field(
        None,
        validation_alias=AliasChoices("adapter", "model"),
        description="The adapter's name; `model` is accepted for it.",
    )
    adapters: list[str] | None = Field(
        None, min_length=1, max_length=MAX_ADAPTERS, description="Several adapters; each answers all inputs."
    )
    version: str | None = Field(
        None, description="Answer with this version, whatever is released; else one that the last release names."
    )
    routing_key: Annotated[str, AfterValidator(check_text)] | None = Field(
        None,
        max_length=1024,
        description="Requests with the same key get the same version while the shares of traffic stay: a user's id, "
        "say. Without one, the request's id decides.",
    )
    truncate: bool = Field(True, description="Cut texts that are too long for the backbone; else they get 413.")
    long: Literal["window"] | None = Field(
        None, description="`window`: run long texts in overlapping windows instead of cutting them."
    )
    window_pooling: Annotated[WindowPooling, Field(strict=False)] = Field(
        WindowPooling.MEAN, description="How the outputs of a text's windows become one: `mean` or `max`."
    )

    priority: Annotated[Priority, Field(strict=False)] = Field(
        Priority.NORMAL,
        description="`high`, `normal` or `low`: where the device is short, what waits of one runs before what waits of "
        "the next.",
    )
    timeout_ms: int | None = Field(
        None, ge=1, le=MAX_TIMEOUT_MS, description="How long the answer may take, in milliseconds; then 504."
    )

    def cut(self) -> Long | None:
        """What becomes of long texts."""
        return Long(self.window_pooling) if self.long else None

    @abstractmethod
    def items(self) -> tuple[TextInput, ...]:
        """The inputs, as the engine takes them."""

    @abstractmethod
    def options(self) -> Options:
        """What is wanted of the answer."""


class ClassifyBody(TaskBody):
    """Texts and the adapter to classify them with."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"adapter": "sentiment", "inputs": "What a lovely day"}]},
    )

    inputs: TextItems
    top_k: int | None = Field(
        None, ge=1, description="Only this many labels of each text: the highest scores, best first."
    )
    activation: Annotated[Activation, Field(strict=False)] | None = Field(
        None, description="How logits become scores, in place of the task's own way."
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Where a text may have several labels: the probability from which on it has one, in place of the "
        "adapter's own thresholds.",
    )

    def items(self) -> tuple[TextInput, ...]:
        """The inputs, as the engine takes them."""
        return text_inputs(self.inputs)

    def options(self) -> ClassifyOptions:
        """What is wanted of the answer."""
        return ClassifyOptions(self.top_k, self.activation, self.threshold)


class TagBody(TaskBody):
    """Texts and the adapter to find entities with."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"adapter": "entities", "inputs": "Ada Lovelace was born in London"}]},
    )

    inputs: Texts
    aggregation: Annotated[Aggregation, Field(strict=False)] = Field(
        Aggregation.SIMPLE, description="How tokens become entities; `none`: each token is one."
    )

    def items(self) -> tuple[TextInput, ...]:
        """The inputs, as the engine takes them."""
        return tuple(map(TextInput, self.inputs))

    def options(self) -> TagOptions:
        """What is wanted of the answer."""
        return TagOptions(self.aggregation)


class AnswerBody(TaskBody):
    """Questions to texts and the adapter to answer them with."""

    inputs: Questions
    top_k: int = Field(1, ge=1, le=100, description="Answers to each question, the best ones.")
    max_answer_tokens: int = Field(15, ge=1, le=512, description="Longest answer.")
    no_answer: bool = Field(False, description="Whether a context may be said to hold no answer.")

    def items(self) -> tuple[TextInput, ...]:
        """The inputs, as the engine takes them."""
        return tuple(one.item() for one in self.inputs)

    def options(self) -> AnswerOptions:
        """What is wanted of the answer."""
        return AnswerOptions(self.top_k, self.max_answer_tokens, self.no_answer)


class EmbedBody(TaskBody):
    """Texts to make vectors of, with an adapter or with the backbone alone."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "What a lovely day"}]})

    inputs: Texts
    normalize: bool | None = Field(None, description="Vectors of length 1; by default as the adapter says, else yes.")
    dimensions: int | None = Field(None, ge=1, description="Only so many of the first numbers.")
    pooling: Annotated[Pooling, Field(strict=False)] | None = Field(
        None, description="Of the backbone alone, by default the mean; an adapter brings its own."
    )

    def items(self) -> tuple[TextInput, ...]:
        """The inputs, as the engine takes them."""
        return tuple(map(TextInput, self.inputs))

    def options(self) -> EmbedOptions:
        """What is wanted of the answer."""
        return EmbedOptions(self.normalize, self.dimensions, self.pooling)


class Usage(BaseModel):
    """What the request cost."""

    tokens: int = Field(description="Tokens of all inputs, special tokens included, after truncation.")


P = TypeVar("P")


class Answer(BaseModel, Generic[P]):
    """One prediction per input, and who computed it."""

    adapter: str | None = Field(description="Null: the backbone alone.")
    version: str | None = Field(description="sha256 of the adapter that answered.")
    release: int | None = Field(
        description="The adapter's last release when it answered; null where a version was asked for before any."
    )
    backbone: str
    predictions: list[P]
    truncated: list[int] = Field(description="Indices of the inputs that were cut.")
    windows: list[list[Span]] | None = Field(
        description="With `long`: of each input, the characters of each window that it was run in."
    )
    usage: Usage


class Answers(BaseModel, Generic[P]):
    """What each of several adapters says, in the order in which they were asked."""

    answers: list[Answer[P]]


ClassifyAnswer = Answer[list[LabelScore] | list[LabelDecision]]
"""Of each input the labels, best first."""
ClassifyAnswers = Answers[list[LabelScore] | list[LabelDecision]]
TagAnswer = Answer[list[Entity]]
"""Of each input the entities, in the text's order."""
TagAnswers = Answers[list[Entity]]
AnswerAnswer = Answer[list[AnswerSpan]]
"""Of each question the answers, best first."""
AnswerAnswers = Answers[list[AnswerSpan]]
EmbedAnswer = Answer[list[float]]
"""Of each input a vector."""
EmbedAnswers = Answers[list[float]]
