"""Which files of a folder make a checkpoint."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

NESTED = "*/config.json"
"""What of the folders in it belongs to it: sentence-transformers keeps the options of its pooling there."""


def checkpoint_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names, with slashes, and paths of what may belong to a checkpoint; the caller leaves out what is no plain file.

    Hidden files are nobody's checkpoint, and of what lies deeper only the configurations are: the rest is a trainer's.
    """
    for path in chain(folder.iterdir(), folder.glob(NESTED)):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("."):
            yield name, path
