"""Rows of data that adapters are trained and measured on."""

from abc import abstractmethod
from collections.abc import Collection
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from server.core import TextInput


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is blank")  # a server would refuse it
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
Label = Annotated[str, Field(min_length=1, max_length=256)]  # as long as a manifest takes


class Example(BaseModel):
    """One row; other fields than those of its task are skipped."""

    model_config = ConfigDict(frozen=True)

    @abstractmethod
    def inputs(self) -> tuple[TextInput, ...]:
        """What an adapter is asked."""

    def names(self) -> Collection[str]:
        """The labels in it."""
        return ()


class TextExample(Example):
    """A text, or a pair of texts."""

    text: Text
    text_pair: str | None = None

    def inputs(self) -> tuple[TextInput, ...]:
        """The text."""
        return (TextInput(self.text, self.text_pair),)


class LabelledText(TextExample):
    """With one label."""

    label: Label

    def names(self) -> Collection[str]:
        """That one."""
        return (self.label,)
