"""Operators that store masks, and values, where Inductor would compute them again."""

from __future__ import annotations

from typing import Any

import torch

from gradprune.torch_compat.lowering import lowerings, register_lowering, to_dtype

from .library import LIBRARY

# --- realize ----------------------------------------------------------------------------------------------------------

LIBRARY.define("realize(Tensor value) -> Tensor")
torch.library.impl(LIBRARY, "realize", "CompositeExplicitAutograd")(torch.clone)
torch.library.register_fake("gradprune::realize", torch.empty_like, lib=LIBRARY)

realize = torch.ops.gradprune.realize.default
"""``realize(value)``: a value that Inductor must store instead of fusing its computation into every use.

The generated code does not copy: the lowering below asks for the buffer of ``value`` itself, in whatever memory layout
its producer has. (``node.meta["inductor_realize_to_strides"]`` would force the strides of the trace, which are not
those of a graph that Inductor converts to channels-last, and cost a kernel of its own.)
"""


@register_lowering(realize, type_promotion_kind=None)
def _lower_realize(value: Any) -> Any:
    value.realize()
    return value


# --- unpack_mask ------------------------------------------------------------------------------------------------------

LIBRARY.define("unpack_mask(Tensor packed, Tensor gradient) -> Tensor")


@torch.library.impl(LIBRARY, "unpack_mask", "CompositeExplicitAutograd")
def _unpack_mask(packed: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return packed != 0


@torch.library.register_fake("gradprune::unpack_mask", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_unpack_mask(packed: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(packed, dtype=torch.bool)


unpack_mask = torch.ops.gradprune.unpack_mask.default
"""``unpack_mask(packed, gradient)``: where ``packed`` is not zero.

``gradient`` is not read. It makes the operator part of the backward pass, so that a partitioner can only choose to save
the packed mask, not the boolean one.
"""


@register_lowering(unpack_mask, type_promotion_kind=None)
def _lower_unpack_mask(packed: Any, gradient: Any) -> Any:
    # Compared as float, for the reason given in Note [Masks on a CPU] in passes/early_masks.py.
    return lowerings[torch.ops.aten.ne.Scalar](to_dtype(packed, torch.float32), 0)
