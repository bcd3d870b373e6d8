"""What is generated in less time is what is generated otherwise."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import sympy
import torch
from tiny import backward_step, images, network
from torch._inductor.codegen import cpp
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from gradprune.compiler import lower
from gradprune.torch_compat import codegen

d0, d1, d2, s0 = sympy.symbols("d0 d1 d2 s0", integer=True)

INDICES = [
    d0,
    sympy.Integer(7),
    100352 * d0 + 64 * d1 + d2 + 3,
    -d0 + 5 * d1,
    3 * (d0 + d1),
    s0 * d0 + d1,
    d0 * d1,
    d0**2 + d1,
    FloorDiv(d0, 2) + d1,
    FloorDiv(d0, 32) + 4 * d1,
    ModularIndexing(d0, 1, 16) + d2,
    64 * ModularIndexing(d1, 16, 7) + d1,
]


@pytest.mark.parametrize("length", [None, 8, 16])
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_strides_are_those_of_inductor(index: sympy.Expr, length: int | None):
    for variable in (d0, d1, d2):
        assert codegen.stride(index, variable, length) == cpp.stride_at_vec_range(index, variable, length)


def generated() -> Any:
    torch._dynamo.reset()
    with fresh_cache():
        _, code = run_and_get_code(torch.compile(backward_step(network()), backend="gradprune"), *images())
    return [re.sub(r"# AOT ID: .*", "", graph) for graph in code]


@pytest.mark.inductor
def test_code_is_that_of_inductor(monkeypatch: pytest.MonkeyPatch):
    quick = generated()
    monkeypatch.setattr(lower, "quick_codegen", nullcontext)
    assert quick == generated()
    assert quick


def test_inductor_is_left_as_it_was():
    before = cpp.stride_at_vec_range, DtypePropagationOpsHandler.__init__
    with codegen.quick_codegen(), codegen.quick_codegen():
        assert cpp.stride_at_vec_range is codegen.stride
    assert (cpp.stride_at_vec_range, DtypePropagationOpsHandler.__init__) == before
