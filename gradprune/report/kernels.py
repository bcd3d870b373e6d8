"""Which kernels the code that Inductor generated calls."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass

_EXTERNAL = ("extern_kernels.", "torch.ops.", "aten.")
_CPP_CALL = re.compile(r"^\s*(?:AOTI_TORCH_ERROR_CODE_CHECK\()?\s*((?:aoti_torch|cpp_fused|triton|call_triton)_\w+)\(")
_CPP_BOOKKEEPING = re.compile(
    r"aoti_torch_(get|empty|delete|create|as_strided|clone|assign|new|check|grad|device|dtype|_?reinterpret)"
)


@dataclass(frozen=True)
class Kernel:
    """A kernel, generated or of a library, and how often one call of the compiled code runs it.

    Attributes:
        name: Its name in the generated code.
        count: Calls of it in that code.
        kind: ``"generated"`` for C++ or Triton that Inductor wrote, ``"external"`` for an operator of a library.
        part: ``"step"``, or ``"forward"`` and ``"backward"`` of the model form.
    """

    name: str
    count: int
    kind: str
    part: str


def called_kernels(code: str, part: str) -> list[Kernel]:
    """The kernels that generated code calls, most frequent first.

    Args:
        code: What Inductor wrote: Python, or C++ inside Python with its ``cpp_wrapper``. Empty if nobody knows.
        part: Which part of the graph it belongs to.
    """
    try:
        names = _python_calls(ast.parse(code))
    except SyntaxError:
        names = []
    if not names:
        names = [match[1] for line in code.splitlines() if (match := _CPP_CALL.match(line))]
        names = [name for name in names if not _CPP_BOOKKEEPING.match(name)]
    return [Kernel(name, count, _kind(name), part) for name, count in Counter(names).most_common()]


def _kind(name: str) -> str:
    return "generated" if name.startswith(("cpp_fused", "triton_", "call_triton", "cpp_")) else "external"


def _python_calls(module: ast.Module) -> list[str]:
    # Kernels are assigned at the top, to names; Inductor may divide ``call`` into functions of its own.
    generated = {
        target.id
        for statement in module.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
        for target in statement.targets
        if isinstance(target, ast.Name) and ast.unparse(statement.value.func).startswith("async_compile.")
    }
    names = []
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef) or not re.fullmatch(r"call|partition_\d+", function.name):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in generated or name.removesuffix(".run") in generated:
                names.append(name.removesuffix(".run"))
            elif name.startswith(_EXTERNAL):
                names.append(name.removeprefix("torch.ops.").removesuffix(".default"))
    return names
