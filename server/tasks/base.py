"""What a task is: the head on top of the backbone's states, its loss, and how its outputs read as an answer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from server.adapters.states import TextStates
from server.core import BackboneSpec, Prediction
from server.tasks.head import HeadConfig

Outputs = Tensor | list[Tensor]
"""One entry per text: rows of one tensor, or tensors where the texts have different sizes."""

ConfigT = TypeVar("ConfigT", bound=HeadConfig)
HeadT = TypeVar("HeadT")


class Task(ABC, Generic[ConfigT, HeadT]):
    """One kind of task. Stateless: an instance is shared by all adapters of the kind."""

    name: ClassVar[str]
    classifies: ClassVar[bool] = True
    """Whether its answer is about a text as a whole, as /classify gives it."""
    Config: ClassVar[type[HeadConfig]]

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

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The scalar that training minimizes."""

    @abstractmethod
    def decode(self, outputs: Any, labels: Sequence[str], top_k: int | None = None) -> list[Prediction]:
        """Raw outputs as answers, one per text, each with at most `top_k` labels."""

    def agrees(self, one: Prediction, other: Prediction) -> bool:
        """Whether two answers to a text come to the same: here, whether their best labels are the same one."""
        return [score.label for score in one[:1]] == [score.label for score in other[:1]]


AnyTask = Task[Any, Any]
