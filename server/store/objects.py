"""An object store: the few calls that the adapter store is made of, each with a deadline, tried again, and with named
failures. Everything about obstore is here.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

import obstore
import stamina
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, ObjectStore, S3Store

from server.blocks import BLOCKS
from server.core import StoreCall
from server.errors import InvalidRequest, StoreUnavailable
from server.logs import get_logger
from server.together import Together, outcome

log = get_logger("adapterd.store")

T = TypeVar("T")
Buffer = bytes | memoryview | obstore.Bytes
Choose = Callable[[list[str]], str | None]
Observe = Callable[[StoreCall], None]
"""Told of each call when it has ended."""

ATTEMPTS = 3
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 1.0

SLOWEST_BYTES_PER_SECOND = 1024 * 1024
"""A call may take its deadline, and for each such portion of data a second more."""

SCHEMES = ("file", "memory", "s3", "gs", "az")

PORTION_BYTES = 64 * 1024
"""Of a file whose size is not known: a manifest, a release."""

FOLDER_THREADS = 8
"""They read a folder's files, and wait where the folder hangs; what is made of small ones, they make."""

S3_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Where AWS's own tools look for one."""

_LEFTOVER = re.compile(r".+#[0-9]+")
"""How obstore names a file that it is writing."""

_HOPELESS = (
    FileNotFoundError,
    PermissionError,
    AlreadyExistsError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
"""Failures that trying again does not mend."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing."""

    key: str
    size: int  # bytes
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class Opened:
    """An object whose size is known and whose bytes have still to come."""

    size: int
    read: "Callable[[], Awaitable[Buffer]]"
    """Raises StoreUnavailable. Copying the bytes into Python's takes time, which is left to the caller."""


class _Folder:
    """Reads a folder's files on other threads."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._threads = Together(ThreadPoolExecutor(FOLDER_THREADS, "adapterd-store"))

    async def call(self, function: Callable[[], T], size: int = 0) -> T:
        """Does something with files, or with so many bytes of them."""
        return await self._threads.call(function, size)

    def read(self, key: str) -> bytes:
        """A small file's bytes, in as few system calls as can be: after each one the thread waits for Python's lock."""
        file = os.open(self._path(key), os.O_RDONLY)
        try:
            parts = [os.read(file, PORTION_BYTES)]
            while len(parts[-1]) == PORTION_BYTES:  # of a file, only the end is shorter
                parts.append(os.read(file, PORTION_BYTES))
        finally:
            os.close(file)
        return b"".join(parts)

    def read_block(self, key: str, size: int) -> memoryview:
        """The first bytes of a file, so many of them, or as many as there are."""
        file = os.open(self._path(key), os.O_RDONLY)
        try:
            data = BLOCKS.take(size)
            done = 0
            while done < size and (count := os.readv(file, [data[done:]])):
                done += count
        finally:
            os.close(file)
        return data[:done]

    def choose(self, prefix: str, choose: Choose) -> tuple[str, bytes] | None:
        """See Objects.choose."""
        try:
            with os.scandir(self._path(prefix)) as entries:
                names = [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            if not self.is_there():
                raise _gone() from None
            return None
        name = choose(names)
        return None if name is None else (name, self.read(f"{prefix}/{name}"))

    def read_and_measure(self, key: str, other: str) -> tuple[bytes | None, int | None]:
        """A file's bytes and another one's size, each None where there is no such file."""
        data = size = None
        with suppress(FileNotFoundError):
            data = self.read(key)
        with suppress(FileNotFoundError):
            size = self.size(other)
        return data, size

    def size(self, key: str) -> int:
        """A file's size."""
        return os.stat(self._path(key)).st_size

    def is_there(self) -> bool:
        """Whether there is the folder itself: one that has vanished looks like an empty one."""
        return os.path.isdir(self._root)

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key)


class Objects:
    """Keys to bytes. Raises FileNotFoundError, which is an answer, or StoreUnavailable."""

    def __init__(
        self,
        objects: ObjectStore,
        *,
        timeout_seconds: float = 5.0,
        root: Path | None = None,
        observe: Observe | None = None,
    ) -> None:
        """`root` is the folder of a store that is one."""
        self._observe = observe
        self._objects = objects
        self._timeout_seconds = timeout_seconds
        self._root = root
        self._folder_files = _Folder(root) if root is not None else None

    @classmethod
    def open(
        cls,
        url: str,
        *,
        endpoint: str | None = None,
        timeout_seconds: float = 5.0,
        observe: Observe | None = None,
    ) -> "Objects":
        """A folder (made if it is not there), file:///folder, memory://, s3://, gs:// or az://.

        Credentials come from where the clouds' own tools look: environment, instance or workload identity.
        `endpoint` is the address of a server that speaks S3's or Azure's protocol; `observe` is told of all calls.
        Raises InvalidRequest for a URL that makes no sense, StoreUnavailable for a folder that cannot be opened.
        """
        scheme, separator, rest = url.partition("://")
        if not separator and url and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
            return cls._folder(Path(url), timeout_seconds, observe)
        if scheme == "memory" and separator and not rest:
            return cls(MemoryStore(), timeout_seconds=timeout_seconds, observe=observe)
        if scheme == "file" and rest.startswith("/"):
            return cls._folder(Path(unquote(rest)), timeout_seconds, observe)
        bucket, _, prefix = rest.partition("/")
        if scheme not in ("s3", "gs", "az") or not bucket:
            raise InvalidRequest(
                f"store {url!r} is none of: a folder, file:///folder, memory://, s3://bucket/prefix, "
                "gs://bucket/prefix, az://container/prefix",
                param="store",
            )
        try:
            remote = _remote(scheme, bucket, prefix.strip("/"), endpoint, timeout_seconds)
        except (BaseError, ValueError) as error:
            raise InvalidRequest(f"store {url!r} cannot be opened: {brief(error)}", param="store") from error
        return cls(remote, timeout_seconds=timeout_seconds, observe=observe)

    @classmethod
    def _folder(cls, folder: Path, timeout_seconds: float, observe: Observe | None) -> "Objects":
        try:
            root = folder.expanduser().resolve()
            return cls(LocalStore(root, mkdir=True), timeout_seconds=timeout_seconds, root=root, observe=observe)
        except (BaseError, OSError, ValueError, RuntimeError) as error:  # the last for ~nobody
            raise StoreUnavailable(f"store folder {str(folder)!r} cannot be opened: {brief(error)}") from error

    async def get(self, key: str) -> bytes:
        """An object's bytes."""
        folder = self._folder_files

        async def read() -> bytes:
            if folder is not None:
                return await folder.call(lambda: folder.read(key))
            return bytes(await (await obstore.get_async(self._objects, key)).bytes_async())

        return await self._find("get", key, read)

    async def choose(self, prefix: str, choose: Choose, after: str | None = None) -> tuple[str, bytes] | None:
        """The object below a prefix that `choose` picks from the names there, and its bytes; None where it picks none.

        `after` spares a listing the keys up to that one. What is chosen may be gone: FileNotFoundError.
        """
        folder = self._folder_files
        if folder is not None:
            return await self._find("list", prefix, lambda: folder.call(lambda: folder.choose(prefix, choose)))
        keys = [entry.key for entry in await self.entries(prefix, after)]
        name = choose([key.removeprefix(f"{prefix}/") for key in keys])
        return None if name is None else (name, await self.get(f"{prefix}/{name}"))

    async def get_and_open(self, key: str, other: str) -> tuple[bytes | None, Opened | None]:
        """An object's bytes, and another object, opened; each None where it is not there."""
        folder = self._folder_files
        if folder is not None:
            data, size = await self._find("get", key, lambda: folder.call(lambda: folder.read_and_measure(key, other)))
            if data is None or size is None:
                await self._check_root()
            return data, None if size is None else Opened(size, lambda: self._read_file(other, size))
        outcomes = await asyncio.gather(self.get(key), self.open_object(other), return_exceptions=True)
        for one in outcomes:
            if isinstance(one, BaseException) and not isinstance(one, FileNotFoundError):
                raise one
        first, second = outcomes
        return None if isinstance(first, BaseException) else first, None if isinstance(
            second, BaseException
        ) else second

    async def make_of_both(self, key: str, other: str, at_most: int, make: Callable[[bytes, Buffer], T]) -> T | None:
        """What `make` computes from two objects, on the thread that has read them.

        None where that is not to be had in one go: where this is no folder, one of them is not there, or the other one
        has more than `at_most` bytes. Raises what `make` does.
        """

        def read(folder: _Folder) -> Callable[[], T] | None:
            data, size = folder.read_and_measure(key, other)
            if data is None or size is None or size > at_most:
                return None
            block = folder.read_block(other, size)
            return lambda: make(data, block)

        return await self._made(key, at_most, read)

    async def make_of(self, key: str, size: int, make: Callable[[Buffer], T]) -> T | None:
        """The same from the first bytes of one object, so many of them, or as many as there are."""

        def read(folder: _Folder) -> Callable[[], T] | None:
            try:
                block = folder.read_block(key, size)
            except FileNotFoundError:
                return None
            return lambda: make(block)

        return await self._made(key, size, read)

    async def _made(self, key: str, size: int, read: Callable[[_Folder], Callable[[], T] | None]) -> T | None:
        """What is computed by the function that reading so many bytes of a folder gives."""
        folder = self._folder_files
        if folder is None:
            return None

        def work() -> tuple[T | None, BaseException | None]:
            make = read(folder)
            return (None, None) if make is None else outcome(make)  # an error of which is none of the store

        made, error = await self._find("get", key, lambda: folder.call(work), size)
        if error is not None:
            raise error
        return made

    async def _read_file(self, key: str, size: int) -> Buffer:
        folder = self._folder_files
        assert folder is not None
        return await self._find("get", key, lambda: folder.call(lambda: folder.read_block(key, size), size), size)

    async def open_object(self, key: str) -> Opened:
        """An object's size; its bytes follow when they are asked for."""
        first = await self._find("open", key, lambda: obstore.get_async(self._objects, key))
        size: int = first.meta["size"]
        results = [first]  # a result can be read once: another try needs another

        async def once() -> Buffer:
            result = results.pop() if results else await obstore.get_async(self._objects, key)
            return await result.bytes_async()

        return Opened(size, lambda: self._find("get", key, once, size))

    async def put(self, key: str, data: bytes | memoryview) -> None:
        """Writes an object, whole or not at all, over what may be there."""
        await self._write(key, data, "overwrite")

    async def create(self, key: str, data: bytes) -> bool:
        """Writes an object where there is none; of several who try, one succeeds. False for the others."""
        try:
            await self._write(key, data, "create")
        except AlreadyExistsError:
            # It may be our own: a try whose answer was lost on the way has been repeated.
            with suppress(FileNotFoundError):  # S3 may refuse for a write that is still under way
                return await self.get(key) == data
            return False
        return True

    async def _write(self, key: str, data: bytes | memoryview, mode: Literal["create", "overwrite"]) -> None:
        await self._check_root()  # which obstore would make again, perhaps where something should be mounted
        await self._call("put", key, lambda: obstore.put_async(self._objects, key, data, mode=mode), len(data))

    async def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return await self.modified_at(key) is not None

    async def modified_at(self, key: str) -> datetime | None:
        """When an object was written last; None where there is none."""
        try:
            found = await self._find("head", key, lambda: obstore.head_async(self._objects, key))
        except FileNotFoundError:
            return None
        return found["last_modified"]

    async def delete(self, key: str) -> None:
        """Removes an object, if it is there."""
        try:
            await self._find("delete", key, lambda: obstore.delete_async(self._objects, key))
        except FileNotFoundError:
            return

    async def delete_all(self, keys: list[str]) -> None:
        """Removes up to a thousand objects, those of them that are there: in one call where the store has one."""
        try:
            await self._find("delete", keys[0], lambda: obstore.delete_async(self._objects, keys))
        except FileNotFoundError:  # somebody else is at it, and the rest is still there
            for key in keys:
                await self.delete(key)

    async def entries(self, prefix: str, after: str | None = None) -> list[Entry]:
        """The objects anywhere below a prefix, by key; with `after`, those whose keys come later than that."""
        found = await self._call(
            "list", prefix, lambda: obstore.list(self._objects, prefix, offset=after).collect_async()
        )
        if not found:
            await self._check_root()
        entries = [Entry(meta["path"], meta["size"], meta["last_modified"]) for meta in found]
        return sorted(entries, key=lambda entry: entry.key)

    async def folders(self) -> list[str]:
        """The first parts of all keys, unsorted."""
        found = await self._call("list", "", lambda: obstore.list_with_delimiter_async(self._objects))
        if not found["common_prefixes"]:
            await self._check_root()
        return list(found["common_prefixes"])

    async def remove_leftovers(self, min_age: timedelta) -> None:
        """Removes what writers that died have left half-written in a folder, where listings do not show it."""
        root = self._root
        if root is None:
            return

        def remove() -> None:
            latest = (datetime.now(UTC) - min_age).timestamp()
            for path in root.rglob("*#*"):
                if _LEFTOVER.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < latest:
                    path.unlink(missing_ok=True)

        await asyncio.to_thread(remove)

    async def _check_root(self) -> None:
        """Raises StoreUnavailable where the folder has vanished."""
        folder = self._folder_files
        if folder is not None and not await self._try("head", "", lambda: folder.call(folder.is_there), 0):
            raise _gone()

    async def _call(self, operation: str, key: str, call: Callable[[], Awaitable[T]], size: int = 0) -> T:
        """A call that needs no object to be there: FileNotFoundError speaks of the bucket."""
        try:
            return await self._find(operation, key, call, size)
        except FileNotFoundError as error:
            raise StoreUnavailable("the adapter store's bucket is not there") from error

    async def _find(self, operation: str, key: str, call: Callable[[], Awaitable[T]], size: int = 0) -> T:
        """A call about one object. Raises FileNotFoundError where it is not there."""
        try:
            return await self._try(operation, key, call, size)
        except FileNotFoundError:
            await self._check_root()
            raise

    async def _try(self, operation: str, key: str, call: Callable[[], Awaitable[T]], size: int) -> T:
        if self._observe is None:
            return await self._tried(call, size)
        started, outcome, attempts = time.perf_counter(), "cancelled", 0

        def attempt() -> Awaitable[T]:
            nonlocal attempts
            attempts += 1
            return call()

        try:
            value = await self._tried(attempt, size)
        except (FileNotFoundError, AlreadyExistsError) as error:  # which are answers
            outcome = "missing" if isinstance(error, FileNotFoundError) else "exists"
            raise
        except Exception:
            outcome = "failure"
            raise
        else:
            outcome = "success"
            return value
        finally:
            self._observe(StoreCall(operation, key, outcome, time.perf_counter() - started, attempts))

    async def _tried(self, call: Callable[[], Awaitable[T]], size: int) -> T:
        seconds = self._timeout_seconds + size / SLOWEST_BYTES_PER_SECOND

        async def once() -> T:
            async with asyncio.timeout(seconds):
                return await call()

        try:
            return await once()  # what nearly always succeeds pays for no further tries
        except Exception as error:
            with _reported():
                return await _tried_again(once, error)


async def _tried_again(once: Callable[[], Awaitable[T]], error: Exception) -> T:
    """A call that has failed once, unless trying again is hopeless. Raises the error of the last try."""
    if not _is_passing(error):
        raise error
    failed = [error]
    async for attempt in stamina.retry_context(
        on=_is_passing,
        attempts=ATTEMPTS,
        timeout=None,
        wait_initial=FIRST_WAIT_SECONDS,
        wait_max=LONGEST_WAIT_SECONDS,
        wait_jitter=FIRST_WAIT_SECONDS,
    ):
        with attempt:
            if failed:
                raise failed.pop()  # what the library waits after
            return await once()
    raise AssertionError("unreachable: the last attempt returns or raises")


def _remote(scheme: str, bucket: str, prefix: str, endpoint: str | None, timeout_seconds: float) -> ObjectStore:
    if scheme == "s3" and not endpoint:
        endpoint = next((os.environ[name] for name in S3_ENDPOINT_VARIABLES if os.environ.get(name)), None)
    options: dict[str, Any] = {
        "prefix": prefix or None,
        # Deadlines and further tries are ours, alike for all stores.
        "retry_config": {"max_retries": 0},
        "client_options": {
            "connect_timeout": timedelta(seconds=timeout_seconds),
            "timeout": timedelta(hours=1),
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
        },
    }
    if scheme == "gs":
        return GCSStore(bucket, **options)
    if endpoint:
        options["endpoint"] = endpoint
    return S3Store(bucket, **options) if scheme == "s3" else AzureStore(bucket, **options)


def _gone() -> StoreUnavailable:
    return StoreUnavailable("the adapter store's folder is gone")


def _is_passing(error: Exception) -> bool:
    return isinstance(error, BaseError | OSError) and not isinstance(error, _HOPELESS)  # TimeoutError is an OSError


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, AlreadyExistsError):
        raise
    except (BaseError, OSError) as error:
        # The reason names paths and hosts: it is for the operator, not for clients.
        log.error("store failed", error=brief(error) or type(error).__name__)
        raise StoreUnavailable("the adapter store failed") from error


def brief(error: Exception) -> str:
    """obstore's messages without the debugging dump that follows them."""
    return str(error).partition("\n")[0]
