"""Operators of gradprune's own that passes put into graphs, each with a lowering for Inductor."""

from .copies import kept_copy
from .hoisted import hoisted
from .masks import realize, unpack_mask
from .max_pool import max_pool_backward
from .packed import mm, pack_convolution, pack_linear, packed_convolution, packed_linear
from .subpixel import subpixel_weight

__all__ = [
    "hoisted",
    "kept_copy",
    "max_pool_backward",
    "mm",
    "pack_convolution",
    "pack_linear",
    "packed_convolution",
    "packed_linear",
    "realize",
    "subpixel_weight",
    "unpack_mask",
]
