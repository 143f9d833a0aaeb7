"""What a task is: a head on the backbone's states, its loss, how outputs read as answers, and how good they are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from server.adapters.states import TextStates
from server.core import Alignment, BackboneSpec, Encoding, Options, Prediction, Route, TextInput, WindowPooling
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks import head as heads
from server.tasks.examples import Example
from server.tasks.head import HeadConfig, Layers, LayersConfig
from server.tasks.metrics import Report

Outputs = Tensor | list[Tensor]
"""One entry per text: rows of one tensor, or tensors where the texts have different sizes."""

ConfigT = TypeVar("ConfigT", bound=HeadConfig)
HeadT = TypeVar("HeadT")
OptionsT = TypeVar("OptionsT", bound=Options)
ExampleT = TypeVar("ExampleT", bound=Example)
LayersConfigT = TypeVar("LayersConfigT", bound=LayersConfig)


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of an input that went through the backbone, and what the head made of it."""

    encoding: Encoding
    output: Tensor
    """The text's entry of `Task.apply`'s outputs, float32 on the CPU."""


class Numbers(NamedTuple):
    """How much one input makes."""

    outputs: int
    """Numbers that the head gives for all its windows, which are held until they are read."""
    scores: int
    """Of its answer: labels with a score."""


Restore = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""The tensors that were trained on standardized examples -> those for the examples as they are."""


class Task(ABC, Generic[ConfigT, HeadT, OptionsT, ExampleT]):
    """One kind of task. Stateless: an instance is shared by all adapters of the kind."""

    name: ClassVar[str]
    route: ClassVar[Route]
    """Where its adapters are asked."""
    Config: ClassVar[type[HeadConfig]]
    options: ClassVar[type[Options]]
    example: ClassVar[type[Example]]
    """A row of the data that it is trained and measured on."""
    prediction: ClassVar[Any]
    """The type of its answer to one input."""
    aligned: ClassVar[bool] = False
    """Whether reading its outputs takes the places of the tokens in the text."""
    windowed: ClassVar[bool] = False
    """Whether long texts are run in windows unless the request says otherwise; else they are cut."""
    windowable: ClassVar[bool] = True
    """Whether long texts can be: not where an answer takes places that may lie in different windows."""
    measured: ClassVar[Options]
    """The options under which it is measured."""
    measured_rows: ClassVar[int | None] = None
    """The most rows that it is measured on beside serving; None: it takes hardly more time for each than for one."""
    decisive: ClassVar[Mapping[str, int]]
    """The metrics that say which of two adapters is better -> 1 where more is better, -1 where less is."""

    # ---------------------------------------------------------------------------------------------------------- head

    @abstractmethod
    def check(self, config: ConfigT, labels: Sequence[str], spec: BackboneSpec) -> None:
        """Raises InvalidAdapter where this backbone cannot carry such a head, or the labels make no sense.

        Also asked with as many made-up labels, for what depends on their number alone.
        """

    @abstractmethod
    def shapes(self, config: ConfigT, labels: Sequence[str], spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
        """Artifact tensor name -> shape."""

    @abstractmethod
    def init(
        self, config: ConfigT, labels: Sequence[str], spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Fresh float32 tensors for training, of the shapes that `shapes` gives."""

    @abstractmethod
    def bind(self, config: ConfigT, tensors: Mapping[str, Tensor]) -> HeadT:
        """Prepares a head's tensors for `apply`. Differentiable."""

    @abstractmethod
    def apply(self, head: HeadT, states: TextStates, start: int, end: int) -> Outputs:
        """Raw outputs for the texts start..end of a batch, one entry each. Pure and differentiable."""

    # ------------------------------------------------------------------------------------------------------- answers

    def check_input(self, text: TextInput) -> None:
        """Raises InvalidRequest, `param` naming the field, for an input that it cannot answer. Here: marked spans."""
        if text.spans:
            raise InvalidRequest(f"an adapter for {self.name} does not read spans", param="spans")

    def check_options(self, config: ConfigT, options: OptionsT, spec: BackboneSpec) -> None:
        """Raises InvalidRequest, `param` naming the option, for what an adapter cannot give. Here: all is well."""
        return

    def sample(self, text: str) -> TextInput:
        """An input that it can answer, made of a text: for smoke tests and golden samples."""
        return TextInput(text)

    def numbers(self, tokens: int, labels: Sequence[str], options: OptionsT) -> Numbers:
        """What an input of so many tokens in all its windows comes to, at most. Here: nothing worth counting."""
        return Numbers(0, 0)

    @abstractmethod
    def read(
        self,
        text: TextInput,
        windows: Sequence[Window],
        config: ConfigT,
        labels: Sequence[str],
        options: OptionsT,
        pooling: WindowPooling,
    ) -> Prediction:
        """The answer to one input from its windows, of which there is at least one."""

    @abstractmethod
    def agrees(self, one: Any, other: Any) -> bool:
        """Whether two answers to an input come to the same."""

    # ------------------------------------------------------------------------------------------- training and quality

    def labels(self, examples: Sequence[ExampleT]) -> tuple[str, ...]:
        """The labels of an adapter that is trained on these: here, all that occur, sorted."""
        return tuple(sorted({name for example in examples for name in example.names()}))

    def standardized(self, examples: Sequence[ExampleT], config: ConfigT) -> tuple[Sequence[ExampleT], Restore]:
        """The examples in units that training takes well, and the way back. Here: as they are."""
        return examples, dict

    @abstractmethod
    def targets(self, examples: Sequence[ExampleT], texts: Sequence[Encoding], labels: Sequence[str]) -> Tensor:
        """What the outputs are compared with; `texts` are the examples' inputs in order, some aligned."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The scalar that training minimizes."""

    def check_measurable(self, labels: Sequence[str]) -> None:
        """Raises InvalidRequest where an adapter with these labels cannot be measured on examples. Here: all can."""
        return

    def kept(self, prediction: Any) -> Any:
        """What `measure` reads of an answer, for where many are held until all are there. Here: all of it."""
        return prediction

    @abstractmethod
    def measure(self, examples: Sequence[ExampleT], predictions: Sequence[Any]) -> Report:
        """How good the answers, asked with `measured`, to the examples' inputs are; each whole, or what is `kept`."""


class LayeredTask(Task[LayersConfigT, HeadT, OptionsT, ExampleT]):
    """A task whose head is what head.py builds: some linear layers."""

    def outputs(self, labels: Sequence[str]) -> int:
        """Outputs of the last layer."""
        return len(labels)

    def width(self, spec: BackboneSpec) -> int:
        """Numbers that the head reads."""
        return spec.hidden_size

    def shapes(self, config: LayersConfigT, labels: Sequence[str], spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
        """The head's layers."""
        return heads.shapes(config, self.outputs(labels), self.width(spec))

    def init(
        self, config: LayersConfigT, labels: Sequence[str], spec: BackboneSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """transformers' start for classifiers."""
        return heads.init(config, self.outputs(labels), self.width(spec), generator)


AnyTask = Task[Any, Any, Any, Any]


def need_labels(task: AnyTask, labels: Sequence[str], at_least: int) -> None:
    """Raises InvalidAdapter for fewer labels."""
    if len(labels) < at_least:
        raise InvalidAdapter(
            f"{task.name} needs at least {at_least} labels, not {len(labels)}", param="labels", code="invalid_labels"
        )


def aligned(encoding: Encoding) -> Alignment:
    """Where the tokens of an encoding come from, which those for tasks that are `aligned` say."""
    if encoding.alignment is None:
        raise ValueError("the encoding is not aligned")
    return encoding.alignment


def token_layers(head: Layers, states: TextStates, start: int, end: int) -> list[Tensor]:
    """The head's outputs [tokens, outputs] of each text, of its own tokens alone."""
    texts = [states.own(index) for index in range(start, end)]
    lengths = [text.shape[0] for text in texts]
    return list(torch.split(head(torch.cat(texts).float()), lengths))
