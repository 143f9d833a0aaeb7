"""Labelled texts from JSON Lines files."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from server.errors import InvalidRequest, TooLarge


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is blank")  # a server would refuse it
    return text


class _Row(BaseModel):
    text: Annotated[str, AfterValidator(_not_blank)]
    label: str = Field(min_length=1, max_length=256)  # as long as a manifest takes


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of one file."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    """The label of each text."""
    sha256: str
    """Digest of the file's bytes, hex."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))


def read_dataset(path: Path, known: Collection[str] | None = None) -> Dataset:
    """Reads a file; see parse_dataset."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", param=str(path)) from error
    return parse_dataset(data, str(path), known)


def parse_dataset(
    data: bytes, source: str, known: Collection[str] | None = None, max_rows: int | None = None
) -> Dataset:
    """Rows `{"text": ..., "label": ...}`; other fields and blank lines are skipped.

    Raises InvalidRequest naming the `source` and the line, also for a label that is not among the `known` ones;
    TooLarge for more than `max_rows`.
    """
    names = None if known is None else frozenset(known)
    rows: list[_Row] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _Row.model_validate_json(line)
        except ValidationError as error:
            raise _invalid(source, number, _reason(error)) from error
        if known is not None and names is not None and row.label not in names:
            raise _invalid(source, number, f"label {row.label!r} is none of {', '.join(known)}")
        if max_rows is not None and len(rows) == max_rows:
            raise TooLarge(f"{source}: more than {max_rows} rows", param=source)
        rows.append(row)
    if not rows:
        raise InvalidRequest(f"{source}: no rows", param=source)
    return Dataset(tuple(row.text for row in rows), tuple(row.label for row in rows), hashlib.sha256(data).hexdigest())


def _invalid(source: str, number: int, reason: str) -> InvalidRequest:
    where = f"{source}:{number}"
    return InvalidRequest(f"{where}: {reason}", param=where)


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    field = "".join(f"{part}: " for part in first["loc"])
    # the parser sees one line at a time, so its own "line 1" would only mislead
    return field + first["msg"].removeprefix("Value error, ").replace(" at line 1 column ", " at column ")
