"""A copy that no compiler takes for the value it copies."""

from __future__ import annotations

from typing import Any

import torch

from gradprune.torch_compat.lowering import lowerings, register_lowering

from .library import LIBRARY

LIBRARY.define("kept_copy(Tensor value) -> Tensor")
torch.library.impl(LIBRARY, "kept_copy", "CompositeExplicitAutograd")(torch.clone)
torch.library.register_fake("gradprune::kept_copy", torch.clone, lib=LIBRARY)

kept_copy = torch.ops.gradprune.kept_copy.default
"""``kept_copy(value)``: the value as it is now, of a tensor that is about to be overwritten. Torch takes ``clone`` out
of graphs that it takes to be functional."""


@register_lowering(kept_copy, type_promotion_kind=None)
def _lower_kept_copy(value: Any) -> Any:
    copy = lowerings[torch.ops.aten.clone.default](value)
    copy.realize()
    return copy
