"""What goes over the wire. Requests are strict: a wrong type or an unknown field is an error that names it."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    model_validator,
)

from server.core import LabelScore, check_text


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return check_text(text)


Text = Annotated[str, AfterValidator(_not_blank)]


class ClassifyBody(BaseModel):
    """Texts and the adapter to classify them with."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"adapter": "sentiment", "inputs": "What a lovely day"}]},
    )

    adapter: str = Field(
        validation_alias=AliasChoices("adapter", "model"),
        description="The adapter's name; `model` is accepted for it.",
    )
    inputs: Annotated[
        list[Text],
        FailFast(),  # a long list of wrong items would otherwise cost an error object each
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="A text, or a list of texts."),
    ]
    top_k: int | None = Field(None, ge=1, description="Only this many labels of each text, the best ones.")
    truncate: bool = Field(True, description="Cut texts that are too long for the backbone; else they get 413.")

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field_is_enough(cls, body: Any) -> Any:
        """Only the first unknown field reaches the check that names it: a body may hold a hundred thousand."""
        if not isinstance(body, dict):
            return body
        known = {name: body[name] for name in (*cls.model_fields, "model") if name in body}
        unknown = next((name for name in body if name not in known), None)
        return known if unknown is None else known | {unknown: body[unknown]}


class Usage(BaseModel):
    """What the request cost."""

    tokens: int = Field(description="Tokens of all inputs, special tokens included, after truncation.")


class ClassifyAnswer(BaseModel):
    """One list of labels per input, best first, and who computed it."""

    adapter: str
    version: str = Field(description="sha256 of the adapter that answered.")
    release: int
    backbone: str
    predictions: list[list[LabelScore]]
    truncated: list[int] = Field(description="Indices of the inputs that were cut.")
    usage: Usage


class AdapterSummary(BaseModel):
    """An adapter that serves."""

    name: str
    version: str
    release: int
    released_at: datetime
    resident: bool = Field(description="Whether this process has it in memory.")


class AdapterList(BaseModel):
    """A page of adapters, by name."""

    adapters: list[AdapterSummary]
    next: str | None = Field(description="Pass as `after` for the next page; null on the last.")


class AdapterDetail(AdapterSummary):
    """An adapter that serves, with its manifest."""

    manifest: dict[str, JsonValue]


class UploadAnswer(BaseModel):
    """What became of an upload."""

    adapter: str
    version: str
    release: int
    created: bool = Field(description="False where the same content was serving already.")
    method: str
    also: list[str] = Field(description="Further methods of the same adapter.")
    task: str
    labels: list[str]
    source: str


class DeleteAnswer(BaseModel):
    """A deletion, which is a release too."""

    adapter: str
    release: int
    deleted: bool = True


class BackboneInfo(BaseModel):
    """The one model."""

    name: str
    model_type: str
    fingerprint: str
    hidden_size: int
    layers: int
    max_tokens: int
    device: str
    dtype: str
    layout: str = Field(description="`packed`: texts side by side without padding; `padded`: one row each.")


class Limits(BaseModel):
    """What a request may be."""

    max_inputs: int
    max_body_bytes: int
    max_upload_bytes: int
    max_batch_tokens: int
    max_queue_tokens: int


class Info(BaseModel):
    """What this server is."""

    version: str
    backbone: BackboneInfo
    methods: list[str]
    tasks: list[str]
    limits: Limits


class ErrorBody(BaseModel):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None = Field(description="The field, file or tensor at fault.")
    code: str
    request_id: str | None


class ErrorAnswer(BaseModel):
    """The shape of every error."""

    error: ErrorBody
