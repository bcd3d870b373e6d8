"""Pooling and padding: the backward operator is handed the input, and reads its shape alone."""

from __future__ import annotations

from .registry import register_shape_only

register_shape_only(
    1,
    *(f"aten.{pool}_backward.default" for pool in ("avg_pool2d", "avg_pool3d")),
    *(f"aten._adaptive_avg_pool{rank}d_backward.default" for rank in (2, 3)),
    *(f"aten.adaptive_max_pool{rank}d_backward.default" for rank in (2, 3)),
    *(f"aten.max_pool{rank}d_with_indices_backward.default" for rank in (2, 3)),
    *(f"aten.{kind}_pad{rank}d_backward.default" for kind in ("reflection", "replication") for rank in (1, 2, 3)),
)
