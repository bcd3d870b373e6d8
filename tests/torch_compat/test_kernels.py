"""Kernels of one graph are compiled together, and nobody else's are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import backward_step, images, network
from torch._inductor import async_compile, cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import fresh_cache

from gradprune.torch_compat import instructions, kernels
from gradprune.torch_compat.kernels import _divide, _Kernel, _Together, compiling_together

pytestmark = pytest.mark.inductor

PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
ADD = (
    PREFIX
    + 'extern "C"  void  kernel(const float* x, float* y, int64_t n) { for (int i = 0; i < n; i++) y[i] = x[i] + %d; }'
)
FAILS = PREFIX + 'extern "C" void kernel(float* x) { throw std::runtime_error("it cannot be done"); }'


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_cache():
        yield


def libraries(pattern: str = "kernel_0") -> int:
    """Libraries in Inductor's cache that were made of sources with ``pattern`` in it."""
    return sum(pattern in source.read_text() for source in Path(cache_dir()).rglob("*.main.cpp"))


def test_kernels_of_a_step_share_libraries():
    model, inputs = network(), images()
    expected = backward_step(model)(*inputs)
    results = torch.compile(backward_step(model), backend="gradprune")(*inputs)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-6)
    assert 0 < libraries() <= async_compile.get_compile_threads()
    assert async_compile.AsyncCompile is not _Together


def test_other_backends_compile_their_kernels_one_by_one():
    with compiling_together():
        pass
    torch.compile(lambda x: x.sin() + 1)(torch.rand(8))
    assert libraries() == 0
    assert cpu_vec_isa.valid_vec_isa_list is instructions._usual


@pytest.mark.parametrize("threads", [1, 3])
def test_each_name_gets_its_own_kernel(threads: int):
    with torch._inductor.config.patch(compile_threads=threads), compiling_together():
        compiler = async_compile.AsyncCompile()
        scope = {f"add_{k}": compiler.cpp_pybinding(["const float*", "float*", "int64_t"], ADD % k) for k in range(9)}
        scope["fails"] = compiler.cpp_pybinding(["float*"], FAILS)
        scope["other"] = 3
        compiler.wait(scope)
    x = torch.rand(5)
    for k in range(9):
        y = torch.empty(5)
        scope[f"add_{k}"](x, y, 5)
        assert torch.equal(y, x + k)
    with pytest.raises(RuntimeError, match="it cannot be done"):
        scope["fails"](x)
    with pytest.raises(RuntimeError, match="3 arguments"):
        scope["add_0"](x, x)
    with pytest.raises(RuntimeError, match="integer"):
        scope["add_0"](x, x, "five")
    assert scope["other"] == 3
    assert libraries() == threads


@pytest.mark.parametrize(
    ("types", "source"),
    [
        (["float*"], "#include <c10/util/Unroll.h>\n" + FAILS),
        (["float*"], "#define N 3\n" + FAILS),
        (["float*"], FAILS + "\n" + FAILS),
        (["float*"], FAILS.replace("void", "int")),
        (["float"], FAILS),
    ],
    ids=["include", "define", "two functions", "another function", "type"],
)
def test_what_may_get_in_the_way_of_others_is_compiled_alone(types: list[str], source: str):
    assert _Kernel(["float*"], FAILS).can_share
    assert not _Kernel(types, source).can_share


def test_few_kernels_stay_together_and_all_are_kept():
    made = [_Kernel(["float*"], "x" * k) for k in range(10)]
    assert [len(part) for part in _divide(made[: kernels.KERNELS], 8)] == [kernels.KERNELS]
    parts = _divide(made, 2)
    assert sorted(len(kernel.source) for part in parts for kernel in part) == list(range(10))
    assert abs(sum(len(one.source) for one in parts[0]) - sum(len(one.source) for one in parts[1])) <= 1
    assert _divide([], 8) == []


def test_the_instructions_are_those_that_inductor_picks():
    expected = cpu_vec_isa.pick_vec_isa()  # asks about all
    assert str(instructions._find()[0] if instructions._find() else cpu_vec_isa.invalid_vec_isa) == str(expected)


def test_threads_that_compile_at_the_same_time_do_not_end_it_for_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(instructions, "_usual", functools.cache(lambda: ["usual"]))
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", instructions._usual)
    one, other = instructions.found_early(), instructions.found_early()
    with contextlib.ExitStack() as stack:
        stack.enter_context(one)
        with other:
            stack.pop_all().close()
            assert cpu_vec_isa.valid_vec_isa_list is not instructions._usual
    assert cpu_vec_isa.valid_vec_isa_list is instructions._usual
