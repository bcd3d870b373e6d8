"""Leave a model as it was found, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

Mode = Literal["eval", "keep"]


@contextmanager
def unchanged(model: Any, mode: Mode) -> Iterator[None]:
    """Put a model into ``mode`` for the block.

    Restored at the end: the mode of every submodule; and with ``"keep"``, where the block may run batch norm in
    training mode, the buffers. Gradients and ``requires_grad`` are not touched by anything in the block.

    Args:
        model: The model; what is no ``nn.Module`` has no state to restore.
        mode: ``"eval"`` for evaluation mode throughout; ``"keep"`` to leave modules in the modes they are in.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    buffers = []
    if mode == "keep" and any(training for _, training in modes):
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        if mode == "eval":
            for module, training in modes:
                if training:
                    module.training = False
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
