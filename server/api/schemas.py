"""What goes over the wire. Requests are strict: a wrong type or an unknown field is an error that names it."""

from datetime import datetime
from functools import cache
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    model_validator,
)
from pydantic_core import CoreSchema

from server.core import check_text
from server.engine.recent import RanRow
from server.settings import LogLevel
from server.store.releases import KEEP, MAX_SERVING, MAX_SHADOWS, MIN_AGE, Plan, Share, Version
from server.store.report import Report

MAX_AGE_SECONDS = 100 * 366 * 86_400.0

Note = Annotated[str, Field(max_length=2000, description="Why; it is kept in the history."), AfterValidator(check_text)]
After = Annotated[
    int | None,
    Field(ge=0, description="Only if this is still the last release (0: none yet); else 409."),
]


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, list):
        for one in schema:
            _fail_fast(one)
    elif isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for one in schema.values():
            _fail_fast(one)


class Body(BaseModel):
    """A request's body. It is strict: a wrong type or an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lists are left at the first wrong item: each costs an error object, and a body may hold a million."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field_is_enough(cls, body: Any) -> Any:
        """Only the first unknown field reaches the check that names it: a body may hold a hundred thousand."""
        if not isinstance(body, dict):
            return body
        names = _names(cls)
        unknown = next((name for name in body if name not in names), None)
        if unknown is None:
            return body
        return {name: body[name] for name in names if name in body} | {unknown: body[unknown]}


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    """What its fields may be called."""
    aliases = (alias for field in model.model_fields.values() for alias in _aliases(field.validation_alias))
    return frozenset((*model.model_fields, *aliases))


def _aliases(alias: Any) -> list[str]:
    return [one for one in alias.choices if isinstance(one, str)] if isinstance(alias, AliasChoices) else []


class AdapterSummary(BaseModel):
    """An adapter that serves."""

    name: str
    version: str = Field(description="The version with the largest share of the traffic.")
    traffic: dict[str, float] = Field(description="Version -> share of the requests.")
    shadow: list[str] = Field(description="Versions that compute every request as well, for comparison.")
    release: int
    released_at: datetime
    resident: bool | None = Field(
        description="Whether this server has all versions that get traffic in memory; null where no server was asked."
    )
    pinned: bool = Field(description="Whether they are kept there.")


class AdapterList(BaseModel):
    """A page of adapters, by name."""

    adapters: list[AdapterSummary]
    damaged: list[str] = Field(description="Names in between whose last release cannot be read.")
    next: str | None = Field(description="Pass as `after` for the next page; null on the last.")


class AdapterDetail(AdapterSummary):
    """An adapter that serves, with the manifest and the report of its main version."""

    task: str
    route: str | None = Field(description="Where it is asked; null for a task that this server does not know.")
    labels: list[str]
    manifest: dict[str, JsonValue]
    report: Report | None = Field(description="What a server found when it checked the version.")


class VersionInfo(BaseModel):
    """A version in the store."""

    version: str
    bytes: int
    stored_at: datetime
    whole: bool = Field(description="False for what a writer that died has left.")
    resident: bool | None = Field(description="Whether this server has it in memory; null where no server was asked.")


class VersionList(BaseModel):
    """An adapter's versions, the latest first."""

    adapter: str
    versions: list[VersionInfo]


class EvaluationResult(BaseModel):
    """How well a version did on the uploaded texts."""

    rows: int
    metrics: dict[str, float]


class Evaluation(BaseModel):
    """The upload and what serves, on the same texts."""

    candidate: EvaluationResult
    current: EvaluationResult | None = Field(description="Null where nothing served that could be compared.")


class UploadAnswer(BaseModel):
    """What became of an upload."""

    adapter: str
    version: str
    release: int | None = Field(description="The release that serves it; null with `release=false`.")
    created: bool = Field(description="False where the same content was there, and serving, already.")
    method: str
    also: list[str] = Field(description="Further methods of the same adapter.")
    task: str
    labels: list[str]
    source: str
    report: Report
    evaluation: Evaluation | None


def _few(limit: int) -> BeforeValidator:
    """Counts before anything inside is looked at: each wrong item would cost an error object."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > limit:
            raise ValueError(f"{len(value)} entries, at most {limit} are taken")
        return value

    return BeforeValidator(check)


class ReleaseBody(Body):
    """Which versions serve from here on."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"traffic": {"9c" * 32: 0.9, "da" * 32: 0.1}, "note": "canary"}]}
    )

    traffic: Annotated[
        dict[Version, Share],
        _few(MAX_SERVING),
        Field(min_length=1, description="Version -> share of the requests, adding up to 1. DELETE takes all away."),
    ]
    shadow: Annotated[
        list[Version],
        _few(MAX_SHADOWS),
        Field(description="Versions that compute every request as well, for comparison."),
    ] = []
    note: Note = ""
    after: After = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        self.plan()
        return self

    def plan(self) -> Plan:
        """What the versions are to get."""
        return Plan(traffic=self.traffic, shadow=tuple(self.shadow))


class RollbackBody(Body):
    """How far to go back."""

    to: int | None = Field(None, ge=1, description="A release; without one, what served before this one.")
    note: Note = ""
    after: After = None


class ReleaseAnswer(BaseModel):
    """A release."""

    adapter: str
    release: int
    traffic: dict[str, float] = Field(description="Version -> share of the requests; empty for a deletion.")
    shadow: list[str]
    created_at: datetime
    by: str
    note: str
    restores: int | None = Field(description="The release that a roll-back went back to.")


class ReleaseList(BaseModel):
    """An adapter's history, the latest first."""

    adapter: str
    releases: list[ReleaseAnswer]
    next: int | None = Field(description="Pass as `before` for earlier ones; null on the last page.")


class DeleteAnswer(BaseModel):
    """A deletion, which is a release too."""

    adapter: str
    release: int
    deleted: bool = True


class PinAnswer(BaseModel):
    """Whether an adapter is kept in memory."""

    adapter: str
    pinned: bool


class VerifyAnswer(BaseModel):
    """A version that has just passed every check again."""

    adapter: str
    version: str
    report: Report


class CollectBody(Body):
    """What to keep when versions are removed that nobody needs."""

    adapter: str | None = Field(None, description="Only this one's versions.")
    keep: int = Field(KEEP, ge=1, description="Versions that the last so many releases of an adapter name stay.")
    min_age_seconds: float = Field(
        MIN_AGE.total_seconds(),
        ge=0,
        le=MAX_AGE_SECONDS,
        allow_inf_nan=False,
        description="Younger versions stay: they may be about to be released.",
    )
    dry_run: bool = Field(False, description="Only tell.")


class CollectedVersion(BaseModel):
    """A version that was removed."""

    adapter: str
    version: str
    bytes: int
    stored_at: datetime


class CollectAnswer(BaseModel):
    """What was removed, or would be."""

    removed: list[CollectedVersion]
    bytes: int
    dry_run: bool


class LogLevelBody(Body):
    """How much to log."""

    level: LogLevel = Field(description="The least severe line logged.")


class LogLevelAnswer(BaseModel):
    """How much is logged, by this process and until it ends."""

    level: LogLevel
    before: str


class BatchInfo(BaseModel):
    """A batch that ran."""

    model_config = ConfigDict(from_attributes=True)

    started_at: float = Field(description="Unix time.")
    seconds: float = Field(description="On the device; where it failed, with all further tries.")
    tokens: int
    backlog: bool = Field(description="Whether work was left waiting.")
    rows: list[RanRow]


class BatchList(BaseModel):
    """What ran last on the device, the latest first."""

    batches: list[BatchInfo]


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
    tasks: dict[str, str] = Field(description="Task -> the route that answers it.")
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
