"""The neutral adapter: a manifest and named tensors, whatever library it came from.

Its version is a digest of its bytes, so the same adapter is the same version wherever it is stored, and a damaged one
is found out when it is read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError
from torch import Tensor

from server.core import BackboneSpec, check_text
from server.errors import CorruptVersion, InvalidAdapter
from server.packed import Packed, Packing
from server.store.report import Report

MANIFEST = "manifest.json"
TENSORS = "adapter.safetensors"

MAX_TENSORS = 20_000
"""Tensors of one file. Large models have hundreds; empty ones cost an uploader nothing."""

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""What names so many tensors. safetensors itself would make objects of a header of 100 MB."""


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    for label, count in Counter(labels).most_common(1):
        if count > 1:
            raise ValueError(f"label {label!r} occurs {count} times")
    return labels


Label = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(check_text)]
Labels = Annotated[tuple[Label, ...], Field(max_length=10_000), AfterValidator(_distinct)]


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
    """A few texts with the raw outputs that the trainer saw for them: whoever serves the adapter can check.

    The task says what input it makes of a text; outputs of its tokens follow one another.
    """

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
    """The task checks how many there have to be; some have none."""
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
    tensor_bytes: bytes | memoryview
    report: Report | None = None
    """What is known of it beside its content; no part of the version."""
    tensor_digest: bytes | None = None
    """Of `tensor_bytes`, where it has been found to be what the version says."""

    @cached_property
    def version(self) -> str:
        """sha256 (hex) over the digests of the two files, the first without the report."""
        return _version(self.manifest_bytes, digest(self.tensor_bytes))

    @classmethod
    def build(cls, manifest: Manifest, tensors: Mapping[str, Tensor]) -> "Artifact":
        """Serializes; the same content gives the same bytes."""
        document = manifest.model_dump(mode="json", exclude_none=True)
        packed = safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)})
        return cls(manifest, tensors, _document(document), packed)

    @classmethod
    def parse(cls, manifest_bytes: bytes, tensor_bytes: bytes | memoryview) -> "Artifact":
        """Reads the two files. Raises InvalidAdapter naming the file or the field."""
        try:
            manifest = Manifest.model_validate_json(manifest_bytes)
        except ValidationError as error:
            raise invalid_fields(MANIFEST, error) from error
        return cls(manifest, read_tensors(TENSORS, tensor_bytes), manifest_bytes, tensor_bytes)

    @classmethod
    def uploaded(cls, fields: Mapping[str, Any], tensor_bytes: bytes) -> "Artifact":
        """Of somebody's manifest and tensors. A report that comes along is not believed."""
        own = {name: value for name, value in fields.items() if name != _REPORT}
        try:
            Manifest.model_validate(own)  # first: it names the field where the next step would not
            manifest_bytes = _document(own)
        except ValidationError as error:
            raise invalid_fields(MANIFEST, error) from error
        except ValueError as error:  # NaN, or half a character
            raise InvalidAdapter(f"{MANIFEST}: {error}", param=MANIFEST, code="bad_file") from error
        return cls.parse(manifest_bytes, tensor_bytes)

    @classmethod
    def verify(cls, version: str, manifest_file: bytes, tensor_bytes: bytes | memoryview) -> "Artifact":
        """Reads a stored version. Raises CorruptVersion where its bytes are not the ones that were stored."""
        manifest_bytes, report = _split(version, manifest_file)
        tensor_digest = digest(tensor_bytes)
        if (found := _version(manifest_bytes, tensor_digest)) != version:
            raise CorruptVersion(f"version {version} is damaged: its bytes have the digest {found}")
        try:
            artifact = cls.parse(manifest_bytes, tensor_bytes)
        except InvalidAdapter as error:
            raise CorruptVersion(f"version {version} is damaged: {error.message}") from error
        return replace(artifact, report=report, tensor_digest=tensor_digest)

    @staticmethod
    def manifest_in(version: str, manifest_file: bytes) -> tuple[Manifest, Report | None]:
        """A stored manifest and its report, if it has one. Raises CorruptVersion."""
        manifest_bytes, report = _split(version, manifest_file)
        try:
            return Manifest.model_validate_json(manifest_bytes), report
        except ValidationError as error:
            raise CorruptVersion(f"version {version} is damaged: {invalid_fields(MANIFEST, error).message}") from error

    def manifest_file(self, report: Report | None = None) -> bytes:
        """The manifest as it is stored: with the report as its last field."""
        return _joined(self.manifest_bytes, report.model_dump(mode="json") if report else None)


_REPORT = "report"


def digest(data: bytes | memoryview) -> bytes:
    """sha256 of a file."""
    return hashlib.sha256(data).digest()


def _version(manifest_bytes: bytes, tensor_digest: bytes) -> str:
    return digest(digest(manifest_bytes) + tensor_digest).hex()


def _document(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _joined(manifest_bytes: bytes, report: Any) -> bytes:
    if report is None:
        return manifest_bytes
    field = json.dumps({_REPORT: report}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return manifest_bytes.removesuffix(b"\n}\n") + b",\n " + field[1:-1].encode() + b"\n}\n"


def _split(version: str, manifest_file: bytes) -> tuple[bytes, Report | None]:
    """A stored manifest as the bytes that the version is a digest of, and the report.

    The report is one line, so nothing has to be parsed to tell it from the rest.
    """
    before, found, last = manifest_file.rpartition(f',\n "{_REPORT}": '.encode())
    if not found:
        return manifest_file, None
    try:
        report = Report.model_validate_json(last.removesuffix(b"\n}\n"))
    except ValidationError as error:
        raise CorruptVersion(f"the report of version {version} is damaged") from error
    return before + b"\n}\n", report


def read_tensors(file: str, data: bytes | memoryview) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file; a truncated or foreign one is refused by its name.

    Of a file in memory that may be written to, they are views.
    """
    if (header := int.from_bytes(data[:8], "little")) > MAX_HEADER_BYTES:
        raise InvalidAdapter(
            f"{file} is not a whole safetensors file: a header of {header} bytes, at most {MAX_HEADER_BYTES} are read",
            param=file,
            code="bad_file",
        )
    try:
        tensors: Mapping[str, Tensor] = safetensors.torch.load(data) if isinstance(data, bytes) else _views(data)
    except Exception as error:  # safetensors' own, or whatever torch says to a shape or a type that it cannot make
        reason = str(error).partition("\n")[0]  # torch puts a stack trace below
        raise InvalidAdapter(
            f"{file} is not a whole safetensors file: {reason}", param=file, code="bad_file"
        ) from error
    if len(tensors) > MAX_TENSORS:
        raise InvalidAdapter(
            f"{file} has {len(tensors)} tensors, at most {MAX_TENSORS} are read", param=file, code="bad_file"
        )
    if "" in tensors:
        raise InvalidAdapter(f"{file} has a tensor without a name", param=file, code="bad_file")
    return tensors


LENGTH_BYTES = 8
"""At the beginning of a safetensors file: the length of the header, a JSON document, that the numbers follow."""

LONGEST_KEPT_HEADER = 64 * 1024
KEPT_HEADERS = 64


def _views(data: memoryview) -> Mapping[str, Tensor]:
    """A file's tensors where they lie. Files of one family of adapters have the same header, which is read once."""
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    header = bytes(data[LENGTH_BYTES:start])
    packing = (_packing if len(header) <= LONGEST_KEPT_HEADER else _packing.__wrapped__)(header, len(data) - start)
    if packing is None:
        return safetensors.torch.load(bytes(data))
    return Packed(packing, torch.frombuffer(data, dtype=packing.dtype, offset=start))


@lru_cache(maxsize=KEPT_HEADERS)
def _packing(header: bytes, nbytes: int) -> Packing | None:
    """How the tensors lie in files with this header and so many bytes of numbers; None where they are of several number
    formats or there are empty ones. Whether such files are whole is left to their library."""
    file = len(header).to_bytes(LENGTH_BYTES, "little") + header + bytes(nbytes)
    tensors = safetensors.torch.load(file)
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
    names = sorted(places, key=places.__getitem__)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not all(tensor.numel() for tensor in tensors.values()):
        return None
    (dtype,) = dtypes
    aligned = (LENGTH_BYTES + len(header)) % dtype.itemsize == 0
    if not aligned or sum(tensors[name].numel() for name in names) * dtype.itemsize != nbytes:
        return None
    return Packing.of(dtype, {name: tensors[name].shape for name in names})


def invalid_fields(where: str, error: ValidationError) -> InvalidAdapter:
    """A pydantic error as ours: the first wrong field and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return InvalidAdapter(f"{where}: {field + ': ' if field else ''}{first['msg']}", param=field or where)
