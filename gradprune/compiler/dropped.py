"""Weights whose gradient was dropped, so that an optimizer that waits for one is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_dropped: dict[int, tuple[StorageWeakRef, str, str]] = {}
"""By the identity of a weight: its memory, as another tensor may come to have the identity; whose it is; its name."""
_told: set[str] = set()


def note_dropped(weights: Iterable[tuple[str, torch.Tensor]], by: str) -> None:
    """Note weights, by their names, that received no gradient from a backward pass through ``by``."""
    for name, weight in weights:
        known = _dropped.get(id(weight))
        if known is not None and known[0].cdata == weight.untyped_storage()._cdata:
            return  # so are the others
        _dropped[id(weight)] = StorageWeakRef(weight.untyped_storage()), by, name


def _warn_of_void(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once for each of what dropped it, of a weight that is about to be left where it is."""
    for group in optimizer.param_groups if _dropped else ():
        for weight in group["params"]:
            storage, by, name = _dropped.get(id(weight), (None, "", ""))
            if weight.grad is not None or storage is None or by in _told:
                continue
            if storage.cdata != weight.untyped_storage()._cdata:
                del _dropped[id(weight)]
                continue
            _told.add(by)
            warnings.warn(
                f"{type(optimizer).__name__}.step() leaves {name or 'a weight'} as it is: its gradient is None, and "
                f"{by}, which was compiled with gradprune, computes none for weights. To train, call backward() on the "
                "model that was not compiled, or compile it with torch.compile's default backend; see also "
                "gradprune.training. If the optimizer moves a perturbation, mark it: "
                "gradprune.perturbation(parameter_or_module)",
                stacklevel=3,
            )


register_optimizer_step_pre_hook(_warn_of_void)
