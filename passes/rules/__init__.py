"""Narrowing rules: for each operator with several outputs, how to compute only those that are used.

A rule answers one question: given which outputs are used, with which arguments should the operator be called instead?
There is one file per family of operators, which also names the family's operators that cannot be narrowed and says why.
"""

from . import attention, convolution, grid_sampler, linear, normalization, recurrent, resampling  # noqa: F401
from .registry import (
    RULES,
    SHAPE_ONLY,
    WHOLE,
    Narrowed,
    Rule,
    is_unnarrowable,
    register,
    register_shape_only,
    register_whole,
    rule_for,
    shape_only_operators,
)

__all__ = [
    "RULES",
    "SHAPE_ONLY",
    "WHOLE",
    "Narrowed",
    "Rule",
    "is_unnarrowable",
    "register",
    "register_shape_only",
    "register_whole",
    "rule_for",
    "shape_only_operators",
]
