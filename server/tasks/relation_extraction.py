"""Relation extraction: how two marked pieces of a text are related, say `founded_by`."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from server.adapters.states import TextStates
from server.core import BackboneSpec, ClassifyOptions, Span, TextInput
from server.errors import InvalidRequest
from server.tasks import head as heads
from server.tasks.base import LayeredTask, need_labels
from server.tasks.classification import SingleLabel
from server.tasks.examples import LabelledText
from server.tasks.head import Layers, LayersConfig


class MarkedText(LabelledText):
    """A text with two marked pieces and how they are related."""

    spans: tuple[Span, Span]

    @model_validator(mode="after")
    def _inside(self) -> Self:
        try:
            check_spans(self.text, self.spans)
        except InvalidRequest as error:
            raise ValueError(f"{error.param}: {error.message}") from None
        return self

    def inputs(self) -> tuple[TextInput, ...]:
        """The text with its marks."""
        return (TextInput(self.text, self.text_pair, self.spans),)


class RelationExtraction(
    SingleLabel[LayersConfig, Layers, MarkedText], LayeredTask[LayersConfig, Layers, ClassifyOptions, MarkedText]
):
    """One label per text with two marked pieces.

    The head reads what Baldini Soares et al. 2019, "Matching the Blanks", call mention pooling: a vector of the one
    piece's tokens beside one of the other's. The vectors are means here, over however many tokens a piece has.
    """

    name = "relation_extraction"
    Config = LayersConfig
    example = MarkedText
    windowable = False

    def check(self, config: LayersConfig, labels: Sequence[str], spec: BackboneSpec) -> None:
        """At least two labels."""
        need_labels(self, labels, 2)

    def width(self, spec: BackboneSpec) -> int:
        """Two vectors."""
        return 2 * spec.hidden_size

    def bind(self, config: LayersConfig, tensors: Mapping[str, Tensor]) -> Layers:
        """The tensors as float32."""
        return heads.bind(config, tensors)

    def apply(self, head: Layers, states: TextStates, start: int, end: int) -> Tensor:
        """Outputs [texts, labels]."""
        texts = [(states.own(text), states.spans[text]) for text in range(start, end)]
        pieces = [own[first:last].float().mean(0) for own, spans in texts for first, last in spans]
        return head(torch.stack(pieces).view(end - start, -1))  # the two of a text side by side

    def check_input(self, text: TextInput) -> None:
        """Two marked pieces within the text, which may overlap."""
        check_spans(text.text, text.spans)

    def sample(self, text: str) -> TextInput:
        """The whole text, twice."""
        whole = (0, len(text))
        return TextInput(text, spans=(whole, whole))


def check_spans(text: str, spans: Sequence[Span]) -> None:
    """Raises InvalidRequest unless there are two, neither of them empty, within the text."""
    if len(spans) != 2:
        raise InvalidRequest(f"two pieces of the text have to be marked, not {len(spans)}", param="spans")
    for number, (start, end) in enumerate(spans):
        if not 0 <= start < end <= len(text):
            raise InvalidRequest(
                f"{start} to {end} is no piece of a text of {len(text)} characters", param=f"spans.{number}"
            )
