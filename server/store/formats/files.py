"""The files of an upload: loose ones and archives, in memory, with nothing ever written to a path they name."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import IO, cast

from server.errors import AdapterdError, InvalidAdapter, TooLarge

MAX_FILES = 256
"""Files in one upload; a checkpoint has a handful."""

MAX_MEMBERS = 16 * MAX_FILES
"""Members of an archive, folders among them: zipfile and tarfile make an object of each."""

ZIP_ENTRY = b"PK\1\2"
"""Before each entry of a zip's directory; zipfile reads no entry that does not begin with it."""

MAX_JSON_BYTES = 4 * 1024 * 1024
"""A manifest of ten thousand long labels fits."""

TAR_OVERHEAD = 4096 * MAX_FILES
"""Bytes that a tar archive may have beside its contents: headers and padding."""


def gather(uploads: Sequence[tuple[str, bytes]], max_bytes: int) -> dict[str, bytes]:
    """Path -> content of (file name, content) pairs; .zip, .tar.gz and .tgz are unpacked.

    Raises InvalidAdapter naming the file for an unsafe path or a broken archive, TooLarge for contents over
    `max_bytes` in all, however small they are while compressed.
    """
    files: dict[str, bytes] = {}
    room = max_bytes
    for name, data in uploads:
        for path, content in _contents(name, data, room):
            if path in files:
                raise InvalidAdapter(f"file {path!r} is there twice", param=path, code="bad_file")
            if len(files) == MAX_FILES:
                raise InvalidAdapter(f"more than {MAX_FILES} files", param="files", code="bad_file")
            files[path] = content
            room -= len(content)
    return files


def required(files: Mapping[str, bytes], name: str) -> bytes:
    """A file that has to be there."""
    if name not in files:
        raise InvalidAdapter(f"file {name!r} is missing", param=name, code="missing_file")
    return files[name]


def required_json(files: Mapping[str, bytes], name: str) -> bytes:
    """A JSON file that has to be there, of a size that is quickly parsed."""
    data = required(files, name)
    if len(data) > MAX_JSON_BYTES:
        raise InvalidAdapter(f"{name} is larger than {MAX_JSON_BYTES} bytes", param=name, code="bad_file")
    return data


def _contents(name: str, data: bytes, room: int) -> Iterator[tuple[str, bytes]]:
    lower = name.lower()
    archive: Callable[[bytes, int], _Members] | None = (
        _zip if lower.endswith(".zip") else _tar if lower.endswith((".tar.gz", ".tgz")) else None
    )
    if archive is None:
        _within(room, len(data))
        yield _safe(name), data
        return
    try:
        for path, open_member in archive(data, room):
            safe = _safe(path)
            with open_member() as stream:
                content = stream.read(room + 1)  # never trusts the size that the archive declares
            _within(room, len(content))
            room -= len(content)
            yield safe, content
    except AdapterdError:
        raise
    except Exception as error:  # zipfile and tarfile raise a dozen kinds on damaged input, and promise none
        raise InvalidAdapter(f"archive {name!r} cannot be read: {error}", param=name, code="bad_file") from error


_Members = Iterator[tuple[str, Callable[[], IO[bytes]]]]


def _zip(data: bytes, room: int) -> _Members:
    if data.count(ZIP_ENTRY) > MAX_MEMBERS:  # before zipfile reads the directory, which it does as a whole
        raise _too_many()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # bzip2 and LZMA unpack without bounds in zipfile: a kilobyte can fill the memory.
                raise InvalidAdapter(
                    f"{info.filename!r} is neither stored nor deflated", param=info.filename, code="bad_file"
                )
            yield info.filename, partial(archive.open, info)


def _tar(data: bytes, room: int) -> _Members:
    # Unpacked as a whole and within bounds first: tarfile would read a header of any size into memory.
    limit = room + TAR_OVERHEAD
    with gzip.open(io.BytesIO(data)) as stream:
        unpacked = stream.read(limit + 1)
    _within(limit, len(unpacked))
    with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:", encoding="utf-8", errors="strict") as archive:
        for count, member in enumerate(archive):
            if count == MAX_MEMBERS:
                raise _too_many()
            if member.isdir():
                continue
            if not member.isreg():
                raise InvalidAdapter(f"{member.name!r} is not a plain file", param=member.name, code="bad_file")
            # extractfile gives None for what is not a file, which has been refused above
            yield member.name, cast(Callable[[], IO[bytes]], partial(archive.extractfile, member))


def _too_many() -> InvalidAdapter:
    return InvalidAdapter(f"the archive has more than {MAX_MEMBERS} members", param="files", code="bad_file")


def _safe(name: str) -> str:
    path, printable = PurePosixPath(name), name.encode(errors="replace").decode()
    unsafe = not name or "\0" in name or "\\" in name or path.is_absolute() or ".." in path.parts or not path.name
    if unsafe or name != printable:
        raise InvalidAdapter(f"file name {name!r} is not allowed", param=printable or "files", code="unsafe_path")
    return str(path)


def _within(room: int, size: int) -> None:
    if size > room:
        raise TooLarge("the files of this adapter are over the server's limit", param="files")
