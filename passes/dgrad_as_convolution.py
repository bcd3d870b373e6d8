"""Compute the input gradient of a convolution by a convolution, so that the convolution's input need not be saved.

    %cb = convolution_backward(%gy, %x, %w, ..., [True, False, False])
    %gx = getitem(%cb, 0)
becomes
    %gx = convolution(%gy, %w, None, stride, padding, dilation, transposed=True, output_padding, groups)

``convolution_backward`` keeps the saved input %x as an operand even when only the input gradient is asked for; the
convolution does not, and this is what frees activation memory. The input gradient of a transposed convolution is a
plain one, legal when its output padding is below the stride: more of it would make rows that the input does not have.
Legal otherwise when the output padding that restores the input's size lies in [0, max(stride, dilation)), which torch
demands of a transposed convolution; with symbolic sizes, when that padding is a known integer all the same. Does not
touch a convolution whose weight gradient is used. Reorders float: another algorithm may add up in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import tensor_of

from .base import Tier
from .rewrite import Skip, rewrite

aten = torch.ops.aten


@rewrite(
    aten.convolution_backward.default,
    name="dgrad-as-convolution",
    tier=Tier.REORDERS_FLOAT,
    reason="input gradient computed by a convolution, without the saved input",
    output=0,
)
def dgrad_as_convolution(node: fx.Node, build: Builder) -> fx.Node | Skip:
    """Rewrite ``convolution_backward`` that computes the input gradient alone."""
    grad_output, saved_input, weight, _, stride, padding, dilation, transposed, output_padding, groups, _ = node.args
    shapes = [tensor_of(n) for n in (grad_output, saved_input, weight)]  # type: ignore[arg-type]
    if any(shape is None for shape in shapes):
        return Skip("an operand has no known shape")
    out, inp, kernel = (list(t.shape[2:]) for t in shapes)  # type: ignore[union-attr]
    rank = len(kernel)
    stride, padding, dilation = (_per_dimension(v, rank) for v in (stride, padding, dilation))
    if transposed:
        for k, extra in enumerate(_per_dimension(output_padding, rank)):
            if extra >= stride[k]:
                return Skip(f"dimension {k} has an output padding of {extra}, which is not below the stride")
        arguments: tuple[Any, ...] = (stride, padding, dilation, False, [0] * rank, groups)
        return build.call(aten.convolution.default, grad_output, weight, None, *arguments)
    output_padding = []
    for k in range(rank):
        rest = inp[k] - ((out[k] - 1) * stride[k] - 2 * padding[k] + dilation[k] * (kernel[k] - 1) + 1)
        known = _known_integer(rest)
        if known is None:
            return Skip("the output padding of the transposed convolution depends on a symbolic size")
        if not 0 <= known < max(stride[k], dilation[k]):
            return Skip(f"the input's dimension {k} needs an output padding of {known}, which torch does not allow")
        output_padding.append(known)
    arguments = (stride, padding, dilation, True, output_padding, groups)
    return build.call(aten.convolution.default, grad_output, weight, None, *arguments)


def _per_dimension(value: Any, rank: int) -> list[int]:
    return list(value) * rank if len(value) == 1 else list(value)


def _known_integer(size: int | torch.SymInt) -> int | None:
    """The integer a size is known to be without adding a guard, else ``None``."""
    if isinstance(size, int):
        return size
    expression = size.node.maybe_as_int()
    return None if expression is None else int(expression)
