"""Grid sampling: outputs are the gradients of input and grid.

Without the gradient of the input the kernels skip their scattered additions. The gradient of the grid they compute
whatever the mask says.
"""

from __future__ import annotations

from .masked import narrow_mask
from .registry import register, register_whole

register(
    "aten.grid_sampler_2d_backward.default",
    "aten.grid_sampler_3d_backward.default",
)(narrow_mask("output_mask"))

register_whole(
    "the kernel computes the gradients of input and grid together",
    "aten._grid_sampler_2d_cpu_fallback_backward.default",
    "aten.cudnn_grid_sampler_backward.default",
)
