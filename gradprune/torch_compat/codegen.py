"""Two spots where Inductor's code generation for a CPU takes long to find out what is plain to see.

- How far apart the elements are that a vector would hold is asked of sympy, which simplifies the index twice. In a sum
  of variables and their integer factors, it is the factor. That was a sixth of what a ResNet-50 took to compile.
- ``DtypePropagationOpsHandler()`` stands for one instance, and fills in the same four hundred attributes of it at every
  operator.

What is generated is the same, letter by letter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import sympy  # type: ignore[import-untyped]
from torch._inductor.codegen import cpp
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler

_usual_stride = cpp.stride_at_vec_range  # type: ignore[attr-defined]


@functools.lru_cache(4096)
def stride(index: sympy.Expr, variable: sympy.Symbol, length: int | None = None) -> sympy.Expr:
    """How much ``index`` grows with ``variable``, as Inductor's ``stride_at_vec_range`` has it."""
    found = sympy.S.Zero
    for term in sympy.Add.make_args(index):
        factor, rest = term.as_coeff_Mul()
        if not (factor.is_Integer and (rest.is_Symbol or rest is sympy.S.One)):
            return _usual_stride(index, variable, length)
        if rest == variable:
            found += factor
    return found


_usual_init = DtypePropagationOpsHandler.__init__


@contextmanager
def quick_codegen() -> Iterator[None]:
    """Have Inductor generate code in less time in the block."""
    DtypePropagationOpsHandler()
    cpp.stride_at_vec_range = stride  # type: ignore[attr-defined]
    DtypePropagationOpsHandler.__init__ = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        cpp.stride_at_vec_range = _usual_stride  # type: ignore[attr-defined]
        DtypePropagationOpsHandler.__init__ = _usual_init  # type: ignore[method-assign]
