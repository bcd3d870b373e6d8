"""Compile the C++ kernels of a graph together, in a few translation units instead of one for each.

Inductor runs the compiler once for every kernel. Of the 2.3 s of processor time that takes, 2.0 s are spent on headers;
one that is precompiled takes 5 s to make and 0.4 s to load. The kernel itself takes 0.1 to 0.3 s. Here the kernels of
one graph share as many translation units as can be compiled at the same time. Their code and the flags, and so what
they compute and how fast, are what they would be otherwise.

Note [Whose kernels]
    The code that Inductor generates imports ``AsyncCompile`` by name when it is loaded, so what it finds there is
    replaced while a graph is loaded. Only in the context that asked for it are kernels compiled together; whoever
    compiles in another thread meanwhile gets what ``AsyncCompile`` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch._inductor import async_compile
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.utils import clear_on_fresh_cache

from .instructions import found_early

KERNELS = 4
"""Fewer kernels are not worth a translation unit of their own."""

_PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"

_ENTRY = re.compile(r'extern\s+"C"\s+void\s+kernel\(')

_HEAD = f"""\
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <stdexcept>
{_PREFIX}

static void* (*data_ptr)(PyObject*);

template <typename T> static inline T pointer(PyObject* tensor) {{ return static_cast<T>(data_ptr(tensor)); }}

static inline int64_t integer(PyObject* number) {{
  const auto value = PyLong_AsSsize_t(number);
  if (value == -1 && PyErr_Occurred()) throw std::runtime_error("expected an integer");
  return value;
}}
"""

_CALL = """
namespace kernel_{index} {{
{source}
static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {{
  try {{
    if (count != {count}) throw std::runtime_error("expected {count} arguments");
    kernel({arguments});
  }} catch (const std::exception& error) {{
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }} catch (...) {{
    PyErr_SetString(PyExc_RuntimeError, "a kernel failed");
    return nullptr;
  }}
  Py_RETURN_NONE;
}}
}}
"""

_TAIL = """
static PyMethodDef methods[] = {{
{methods}
  {{NULL, NULL, 0, NULL}}}};

static struct PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{name}", NULL, -1, methods}};

PyMODINIT_FUNC PyInit_{name}(void) {{
  const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
  if (!address) {{
    PyErr_SetString(PyExc_RuntimeError, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR is not set");
    return nullptr;
  }}
  data_ptr = reinterpret_cast<decltype(data_ptr)>(std::strtoull(address, nullptr, 10));
  PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}}
"""


@clear_on_fresh_cache
class _Libraries(CppPythonBindingsCodeCache):
    """Libraries that are compiled without a precompiled header."""

    cache: dict[str, Callable[[], Any]] = {}  # noqa: RUF012, as torch declares it
    cache_clear = staticmethod(cache.clear)

    @classmethod
    def _get_uncompiled_header(cls, device: str) -> str | None:
        return None


@clear_on_fresh_cache
class _SharedLibraries(_Libraries):
    """Libraries of several kernels."""

    cache: dict[str, Callable[[], Any]] = {}  # noqa: RUF012, as torch declares it
    cache_clear = staticmethod(cache.clear)
    entry_function = "kernels"


@dataclass
class _Kernel:
    """One kernel, which is part of a library once that is known.

    Attributes:
        types: C types of its arguments.
        source: Its code.
    """

    types: Sequence[str]
    source: str

    def __post_init__(self) -> None:
        self.library: Callable[[], Any] | None = None
        self.name = ""

    @property
    def can_share(self) -> bool:
        """Whether its code can stand beside that of others; it cannot if it includes or defines what others do not."""
        lines = (line.strip() for line in self.source.splitlines())
        directives = {line for line in lines if line.startswith("#") and not line.startswith("#pragma")}
        types = all(one == "int64_t" or one.endswith("*") for one in self.types)
        is_plain = self.source.count("extern") == 1 and _ENTRY.search(self.source) is not None
        return types and is_plain and directives <= {_PREFIX}

    def code(self, index: int) -> str:
        """Its code in a namespace, behind it what Python calls."""
        arguments = (
            f"integer(args[{position}])" if one == "int64_t" else f"pointer<{one}>(args[{position}])"
            for position, one in enumerate(self.types)
        )
        source = _ENTRY.sub("static void kernel(", self.source.replace(_PREFIX, ""))
        return _CALL.format(index=index, source=source, count=len(self.types), arguments=", ".join(arguments))

    def result(self) -> Any:
        """What is called with tensors and integers. Waits for the compiler."""
        assert self.library is not None
        return getattr(self.library(), self.name)


class _Together(AsyncCompile):
    """Compiles the kernels of one graph when it is told to wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._kernels: list[_Kernel] = []

    def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
        """As ``AsyncCompile`` does."""
        kernel = _Kernel(argtypes, source_code)
        if not (_is_asked_for.get() and kernel.can_share):
            return super().cpp_pybinding(argtypes, source_code)
        async_compile.kernel_code_log.info("C++ kernel:\n%s", source_code)
        self._kernels.append(kernel)
        return kernel

    def wait(self, scope: dict[str, Any]) -> None:
        """As ``AsyncCompile`` does."""
        workers = get_compile_threads()
        for part in _divide(self._kernels, workers):
            _load(part, self.submit if workers > 1 else None)
        self._kernels = []
        scope.update({name: value.result() for name, value in scope.items() if isinstance(value, _Kernel)})
        super().wait(scope)


def _divide(kernels: Sequence[_Kernel], workers: int) -> list[list[_Kernel]]:
    """Kernels in parts that take the compiler about as long, no more than can be compiled at the same time."""
    parts: list[list[_Kernel]] = [[] for _ in range(min(workers, -(-len(kernels) // KERNELS)))]
    for kernel in sorted(kernels, key=lambda one: -len(one.source)):
        min(parts, key=lambda part: sum(len(one.source) for one in part)).append(kernel)
    return parts


def _load(kernels: Sequence[_Kernel], submit: Callable[..., Any] | None) -> None:
    methods = []
    code = [_HEAD]
    for index, kernel in enumerate(kernels):
        kernel.name = f"kernel_{index}"
        code.append(kernel.code(index))
        call = f"(PyCFunction)(void (*)(void))kernel_{index}::call"
        methods.append(f'  {{"{kernel.name}", {call}, METH_FASTCALL, ""}},')
    code.append(_TAIL.format(name=_SharedLibraries.entry_function, methods="\n".join(methods)))
    library = _SharedLibraries.load_async("".join(code), submit_fn=submit)
    for kernel in kernels:
        kernel.library = library


_is_asked_for: ContextVar[bool] = ContextVar("is_asked_for", default=False)


@contextmanager
def compiling_together() -> Iterator[None]:
    """Have kernels of graphs that are loaded in the block compiled together. See Note [Whose kernels]."""
    usual = AsyncCompile if async_compile.AsyncCompile is _Together else async_compile.AsyncCompile
    token = _is_asked_for.set(True)
    async_compile.AsyncCompile = _Together  # type: ignore[misc]
    try:
        with found_early():
            yield
    finally:
        async_compile.AsyncCompile = usual  # type: ignore[misc]
        _is_asked_for.reset(token)


def compile_cpp(argument_types: Sequence[str], source: str) -> Callable[..., None]:
    """Compile a C++ function named ``kernel`` as Inductor does its own, cached on disk.

    Args:
        argument_types: C types of its arguments: pointers, for which tensors are passed, and ``int64_t``.
        source: The code.
    """
    with found_early():
        return _Libraries.load_pybinding(list(argument_types), source)  # type: ignore[no-any-return]
