"""Labelled data from JSON Lines files."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from server.errors import InvalidRequest, TooLarge
from server.tasks.examples import Example

ExampleT = TypeVar("ExampleT", bound=Example)


@dataclass(frozen=True, slots=True)
class Dataset(Generic[ExampleT]):
    """The rows of one file."""

    examples: tuple[ExampleT, ...]
    sha256: str
    """Digest of the file's bytes, hex."""

    @property
    def texts(self) -> list[str]:
        """All texts in it."""
        return [
            text for row in self.examples for one in row.inputs() for text in (one.text, one.pair) if text is not None
        ]


def read_dataset(path: Path, row: type[ExampleT], known: Collection[str] | None = None) -> Dataset[ExampleT]:
    """Reads a file; see parse_dataset."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", param=str(path)) from error
    return parse_dataset(data, str(path), row, known)


def parse_dataset(
    data: bytes, source: str, row: type[ExampleT], known: Collection[str] | None = None, max_rows: int | None = None
) -> Dataset[ExampleT]:
    """Rows of a task, say `{"text": ..., "label": ...}`; other fields and blank lines are skipped.

    Raises InvalidRequest naming the `source` and the line, also for a label that is not among the `known` ones;
    TooLarge for more than `max_rows`.
    """
    names = None if known is None else frozenset(known)
    rows: list[ExampleT] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            example = row.model_validate_json(line)
        except ValidationError as error:
            raise _invalid(source, number, _reason(error)) from error
        if known is not None and names is not None and (other := [one for one in example.names() if one not in names]):
            raise _invalid(source, number, f"label {other[0]!r} is none of {', '.join(known)}")
        if max_rows is not None and len(rows) == max_rows:
            raise TooLarge(f"{source}: more than {max_rows} rows", param=source)
        rows.append(example)
    if not rows:
        raise InvalidRequest(f"{source}: no rows", param=source)
    return Dataset(tuple(rows), hashlib.sha256(data).hexdigest())


def _invalid(source: str, number: int, reason: str) -> InvalidRequest:
    where = f"{source}:{number}"
    return InvalidRequest(f"{where}: {reason}", param=where)


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    field = "".join(f"{part}: " for part in first["loc"])
    # the parser sees one line at a time, so its own "line 1" would only mislead
    return field + first["msg"].removeprefix("Value error, ").replace(" at line 1 column ", " at column ")
