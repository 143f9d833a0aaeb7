"""Pickled checkpoints to safetensors, on the user's side: the server opens no pickle.

Even here only tensors are unpickled (`torch.load(weights_only=True)`), so that a hostile file runs no code.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from server.errors import InvalidAdapter
from server.store.folder import checkpoint_files

RENAMED = {
    "adapter_model.bin": "adapter_model.safetensors",  # PEFT
    "pytorch_adapter.bin": "adapter.safetensors",  # AdapterHub
    "pytorch_model_head.bin": "model_head.safetensors",
    "pytorch_model.bin": "model.safetensors",  # transformers
}
"""Pickled files -> what their libraries call the same in safetensors."""

COPIED = (".json", ".md", ".txt")
"""What else of a folder belongs to a checkpoint."""


def convert(source: Path, target: Path) -> list[str]:
    """Writes a folder's checkpoint to another one, pickles as safetensors: the names of the files written.

    Raises InvalidAdapter naming the file for a source without a checkpoint, a pickle that holds more than tensors, and
    a target that is not empty.
    """
    if not source.is_dir():
        raise InvalidAdapter(f"there is no folder {str(source)!r}", param="source", code="missing_file")
    pickles = [path for path in sorted(source.iterdir()) if path.name in RENAMED]
    if not pickles:
        raise InvalidAdapter(
            f"{str(source)!r} has none of {', '.join(RENAMED)}: nothing to convert", param="source", code="missing_file"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidAdapter(f"{str(target)!r} is there already and is not an empty folder", param="target")
    # read all before anything is written: a broken file leaves nothing half done
    converted = {RENAMED[path.name]: safetensors.torch.save(_tensors(path), {"format": "pt"}) for path in pickles}
    target.mkdir(parents=True, exist_ok=True)
    for name, data in converted.items():
        (target / name).write_bytes(data)
    others = [
        path
        for name, path in sorted(checkpoint_files(source))
        if path.is_file() and path.suffix in (*COPIED, ".safetensors") and name not in converted
    ]
    for path in others:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    return sorted([*converted, *(str(path.relative_to(source)) for path in others)])


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of a foreign file
        reason = str(error).partition("\n")[0]
        raise InvalidAdapter(f"{path.name} cannot be read: {reason}", param=path.name, code="bad_file") from error
    if not isinstance(loaded, Mapping):
        raise InvalidAdapter(f"{path.name} holds no named tensors", param=path.name, code="bad_file")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InvalidAdapter(
                f"{path.name} holds {type(value).__name__} under {str(name)[:100]!r}, not a tensor",
                param=path.name,
                code="bad_file",
            )
    # clones: tensors that share memory in a pickle are written one by one
    return {name: value.detach().clone().contiguous() for name, value in loaded.items()}
