"""Large pieces of memory that come and go by the thousand, used again instead of returned.

A fresh piece of a few hundred kilobytes costs more than what is written to it: the operating system maps its pages one
by one, when they are first touched, and unmaps them in all threads at the end. Among malloc's other pieces it leaves
holes that nothing fits.
"""

import ctypes
import mmap
import threading
import weakref
from functools import lru_cache

SMALLEST_BYTES = 64 * 1024
"""Smaller pieces are malloc's."""

KEPT_BYTES = 5 * 1024 * 1024
"""Memory that waits to be used again, all together: some files on their way, and what has just left. A third less, and
16 cold loads at once take a quarter longer."""


class Blocks:
    """Gives out memory that comes back by itself, once nothing refers to it any more. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # what comes back may do so while its thread holds the lock
        self._free: dict[int, list[mmap.mmap]] = {}

    @property
    def kept(self) -> int:
        """Bytes that wait to be used again."""
        return sum(size * len(pieces) for size, pieces in list(self._free.items()))

    def take(self, nbytes: int) -> memoryview:
        """Writable bytes with anything in them. Whatever is made of the view, torch.frombuffer too, keeps them."""
        if nbytes < SMALLEST_BYTES:
            return memoryview(bytearray(nbytes))
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            pieces = self._free.get(size)
            piece = pieces.pop() if pieces else None
        if piece is None:
            piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        owner = _bytes_of(nbytes).from_buffer(piece)
        weakref.finalize(owner, self._take_back, size, piece).atexit = False
        return memoryview(owner).cast("B")

    def drop(self) -> None:
        """Returns what waits to be used again to the operating system."""
        with self._lock:
            self._free = {}

    def _take_back(self, size: int, piece: mmap.mmap) -> None:
        with self._lock:
            if self.kept + size <= KEPT_BYTES:
                self._free.setdefault(size, []).append(piece)


@lru_cache(maxsize=64)
def _bytes_of(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * nbytes


BLOCKS = Blocks()
"""The process's."""
