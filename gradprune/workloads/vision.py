"""torchvision, for its data sets and for timm, which imports it."""

from __future__ import annotations

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def let_torchvision_import() -> None:
    """Declare the operators that a torchvision built for another torch lacks and fails to be imported without.

    Neither data sets nor networks for classification use any of them: schemas without kernels are enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", SCHEMA)
