"""Which versions of torch are supported."""

from __future__ import annotations

import torch

from gradprune.errors import UnsupportedTorchError

OLDEST, BEYOND = (2, 11), (2, 16)


def check_version(version: str = torch.__version__) -> None:
    """Raise unless ``version`` of torch is supported.

    Raises:
        UnsupportedTorchError: It is older than 2.11, or 2.16 or newer.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) < BEYOND:
        raise UnsupportedTorchError(
            f"gradprune supports torch >= 2.11, < 2.16, but torch {version} is installed: "
            'pip install "torch>=2.11,<2.16", or look for a newer gradprune'
        )
