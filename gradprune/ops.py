"""Operators of gradprune's own that passes put into graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import register_lowering

_library = torch.library.Library("gradprune", "DEF")

_library.define("realize(Tensor value) -> Tensor")
torch.library.impl(_library, "realize", "CompositeExplicitAutograd")(torch.clone)
torch.library.register_fake("gradprune::realize", torch.empty_like, lib=_library)

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
