"""The neutral adapter: a manifest and named tensors, whatever library it came from.

Its version is a digest of its bytes, so the same adapter is the same version wherever it is stored, and a damaged one
is found out when it is read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import safetensors.torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError
from torch import Tensor

from server.core import BackboneSpec, check_text
from server.errors import CorruptVersion, InvalidAdapter

MANIFEST = "manifest.json"
TENSORS = "adapter.safetensors"

MAX_TENSORS = 20_000
"""Tensors of one file. Large models have hundreds; empty ones cost an uploader nothing."""


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise ValueError(f"label {label!r} occurs {count} times")
    return labels


Label = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(check_text)]
Labels = Annotated[tuple[Label, ...], Field(min_length=1, max_length=10_000), AfterValidator(_distinct)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainedOn(_Frozen):
    """The backbone an adapter was made for, as far as its source tells."""

    name: str | None = None
    model_type: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    fingerprint: str | None = None
    """With it, the adapter is refused on any other weights, even of the same shape."""

    @classmethod
    def on(cls, spec: BackboneSpec) -> "TrainedOn":
        """Bound to exactly this backbone."""
        return cls(
            name=spec.name,
            model_type=spec.model_type,
            hidden_size=spec.hidden_size,
            num_layers=spec.num_layers,
            fingerprint=spec.fingerprint,
        )


class Golden(_Frozen):
    """A few texts with the raw outputs that the trainer saw for them: whoever serves the adapter can check."""

    texts: Annotated[tuple[Annotated[str, Field(max_length=10_000)], ...], Field(min_length=1, max_length=32)]
    outputs: tuple[tuple[FiniteFloat, ...], ...]


class Training(_Frozen):
    """How an adapter of our own trainer came about."""

    data_sha256: str
    rows: int
    hyperparameters: dict[str, JsonValue]
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)


class MorePart(_Frozen):
    """A further method of the same adapter."""

    method: str
    config: dict[str, JsonValue]


class Manifest(_Frozen):
    """Everything about an adapter but its numbers. No date and no name: the same content is the same version."""

    format: Literal[1] = 1
    method: str
    config: dict[str, JsonValue]
    """The method's hyperparameters; the method checks them."""
    also: tuple[MorePart, ...] = Field((), max_length=8)
    """Further methods that act beside it: biases trained with LoRA, an invertible adapter with bottlenecks."""
    task: str
    head: dict[str, JsonValue] = Field(default_factory=dict)
    """The head's options; the task checks them."""
    labels: Labels
    backbone: TrainedOn = TrainedOn()
    source: str
    """The library that made it, e.g. `peft 0.18.0`."""
    training: Training | None = None
    golden: Golden | None = None


@dataclass(frozen=True)
class Artifact:
    """An adapter as two files."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    manifest_bytes: bytes
    tensor_bytes: bytes

    @property
    def version(self) -> str:
        """sha256 (hex) over the digests of the two files."""
        parts = (hashlib.sha256(part).digest() for part in (self.manifest_bytes, self.tensor_bytes))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @classmethod
    def build(cls, manifest: Manifest, tensors: Mapping[str, Tensor]) -> "Artifact":
        """Serializes; the same content gives the same bytes."""
        document = manifest.model_dump(mode="json", exclude_none=True)
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        packed = safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)})
        return cls(manifest, tensors, text.encode() + b"\n", packed)

    @classmethod
    def parse(cls, manifest_bytes: bytes, tensor_bytes: bytes) -> "Artifact":
        """Reads the two files. Raises InvalidAdapter naming the file or the field."""
        try:
            manifest = Manifest.model_validate_json(manifest_bytes)
        except ValidationError as error:
            raise invalid_fields(MANIFEST, error) from error
        return cls(manifest, read_tensors(TENSORS, tensor_bytes), manifest_bytes, tensor_bytes)

    @classmethod
    def verify(cls, version: str, manifest_bytes: bytes, tensor_bytes: bytes) -> "Artifact":
        """Reads a stored version. Raises CorruptVersion where its bytes are not the ones that were stored."""
        try:
            artifact = cls.parse(manifest_bytes, tensor_bytes)
        except InvalidAdapter as error:
            raise CorruptVersion(f"version {version} is damaged: {error.message}") from error
        if artifact.version != version:
            raise CorruptVersion(f"version {version} is damaged: its bytes have the digest {artifact.version}")
        return artifact


def read_tensors(file: str, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a truncated or foreign one is refused by its name."""
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # safetensors' own, or whatever torch says to a shape or a type that it cannot make
        reason = str(error).partition("\n")[0]  # torch puts a stack trace below
        raise InvalidAdapter(
            f"{file} is not a whole safetensors file: {reason}", param=file, code="bad_file"
        ) from error
    if len(tensors) > MAX_TENSORS:
        raise InvalidAdapter(
            f"{file} has {len(tensors)} tensors, at most {MAX_TENSORS} are read", param=file, code="bad_file"
        )
    return tensors


def invalid_fields(where: str, error: ValidationError) -> InvalidAdapter:
    """A pydantic error as ours: the first wrong field and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return InvalidAdapter(f"{where}: {field + ': ' if field else ''}{first['msg']}", param=field or where)
