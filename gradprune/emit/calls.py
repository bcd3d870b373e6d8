"""Reads what generated code does: which kernels and functions it calls in which order, on what, and what is alive.

Inductor writes a function ``call`` without branches: buffers are allocated, given other names, handed to kernels and
freed. Here it is followed statement by statement with layouts in place of tensors. Bytes are those of whole buffers,
each counted once for a kernel that reads it and once for one that writes it: what a perfect cache would leave.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradprune.torch_compat.fake_cuda import Generated, Layout

from .flops import call_flops, rate_of
from .gpus import Gpu
from .record import Call, Part

_VIEWS = ("reinterpret_tensor", "copy_if_misaligned")
_EXTERNAL = re.compile(r"^(?:extern_kernels\.|torch\.ops\.\w+\.|aten\.)(.+?)(?:\.(?:default|Tensor|out|\w+_out))?$")
_IGNORED = ("assert_size_stride", "assert_alignment", "get_raw_stream", "start_graph", "end_graph")


@dataclass(frozen=True)
class _View:
    """A name in the code: which memory it stands for, and how it looks at it."""

    memory: str
    layout: Layout


class _Memory:
    """What is allocated, by whom it is held, and how much of it there was at most."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.held: Counter[str] = Counter()
        self.alive = self.peak = 0

    def hold(self, memory: str, size: int) -> None:
        if memory not in self.sizes:
            self.sizes[memory] = size
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self.held[memory] += 1

    def release(self, memory: str) -> None:
        self.held[memory] -= 1
        if not self.held[memory]:
            self.alive -= self.sizes[memory]


def kernel_sources(code: str) -> dict[str, str]:
    """The Triton kernels of generated code, by name."""
    found = {}
    for statement in ast.parse(code).body:
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "async_compile.triton":
            name, source = (ast.literal_eval(argument) for argument in value.args[:2])
            found[name] = source
    return found


def read_part(name: str, generated: Generated, gpu: Gpu) -> Part:
    """Follow the generated code of one part.

    Args:
        name: Of the part. What ``"backward"`` is handed by forward counts as its own.
        generated: The code.
        gpu: Whose rates bound its time.
    """
    reader = _Reader(generated, gpu, owns_inputs=name.startswith("backward"))
    returned = reader.follow()
    return Part(name, reader.calls, reader.memory.peak, returned, generated.code)


class _Reader:
    def __init__(self, generated: Generated, gpu: Gpu, owns_inputs: bool) -> None:
        self._generated, self._gpu, self._owns_inputs = generated, gpu, owns_inputs
        self._kernels = kernel_sources(generated.code)
        self._views: dict[str, _View] = {}
        self._results: dict[str, list[str]] = {}
        self._writers: dict[str, int] = {}
        self._positions: dict[int, int] = {}
        self._numbers = itertools.count()
        self.memory = _Memory()
        self.calls: list[Call] = []

    def follow(self) -> int:
        """Follow ``call`` to its end; returns the bytes that it returns and has allocated."""
        statements = list(_statements(_function(self._generated.code).body))
        for statement in statements:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Subscript):
                whole = ast.unparse(statement.value.value)
                self._results.setdefault(whole, []).append(ast.unparse(statement.targets[0]))
        for statement in statements:
            if isinstance(statement, ast.Assign):
                self._assign(statement.targets[0], statement.value)
            elif isinstance(statement, ast.Delete):
                for target in statement.targets:
                    self._release(ast.unparse(target))
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                self._call(statement.value, None)
            elif isinstance(statement, ast.Return):
                names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
                kept = {self._views[name].memory for name in names if name in self._views}
                return sum(self.memory.sizes[memory] for memory in kept)
        return 0

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):  # the arguments
            for name in map(ast.unparse, target.elts):
                layout = self._generated.layout(name)
                if layout is not None:
                    is_handed = self._owns_inputs and not name.startswith(("primals", "hoisted"))
                    self._bind(name, _View(name, layout), layout.extent if is_handed else 0)
            return
        name = ast.unparse(target)
        view = self._view(value)
        if isinstance(value, ast.Subscript):
            view = self._views.get(f"{ast.unparse(value.value)}: {name}")
        if view is not None:
            self._bind(name, view, 0)
        elif isinstance(value, ast.Call) and ast.unparse(value.func).startswith("empty_strided"):
            size, stride, dtype = (_literal(argument) for argument in value.args[:3])
            self._allocate(name, Layout(tuple(size), tuple(stride), dtype))
        elif isinstance(value, ast.Call):
            self._call(value, name)

    def _call(self, call: ast.Call, name: str | None) -> None:
        function = ast.unparse(call.func)
        external = _EXTERNAL.match(function)
        if function.endswith(".run") and function[:-4] in self._kernels:
            self._launch(function[:-4], call.args)
        elif external is not None:
            self._external(external[1], call, name)
        elif name is not None and not function.startswith(_IGNORED):
            layout = self._generated.layout(name)
            if layout is not None:  # such as a scalar that is made on the CPU
                self._allocate(name, layout)

    def _launch(self, name: str, arguments: list[ast.expr]) -> None:
        source, call = self._kernels[name], self._begin(Call(name, "generated"))
        body = source[source.index("@triton.jit") :]
        for parameter, argument in zip(_parameters(source), arguments, strict=False):
            view = self._view(argument)
            if view is None:
                continue
            stores = re.search(rf"tl\.(?:store|atomic_\w+)\(\s*{parameter}\b", body) is not None
            loads = re.search(rf"tl\.(?:load|atomic_\w+)\(\s*{parameter}\b", body) is not None
            if loads or not stores:
                self._read(call, view)
            if stores:
                self._written(call, view)
        call.seconds = self._gpu.seconds(call.bytes)

    def _begin(self, call: Call) -> Call:
        self._positions[id(call)] = len(self.calls)
        self.calls.append(call)
        return call

    def _external(self, function: str, node: ast.Call, name: str | None) -> None:
        call = self._begin(Call(function, "external"))
        args = [self._argument(argument) for argument in node.args]
        kwargs = {one.arg: self._argument(one.value) for one in node.keywords if one.arg is not None}
        out = kwargs.pop("out", None)
        unread = {1} if function == "convolution_backward" and not args[-1][1] else set()
        for position, value in enumerate([*args, *kwargs.values()]):
            if isinstance(value, _View) and position not in unread:
                self._read(call, value)
        written = out
        if isinstance(out, _View):
            self._written(call, out)
        elif name is not None:
            layout = self._generated.layout(name)
            if layout is not None:
                written = self._allocate(name, layout)
                self._written(call, written)
            for later in self._results.get(name, []):  # several, which get their names later
                layout = self._generated.layout(later)
                if layout is not None:
                    self._written(call, self._allocate(f"{name}: {later}", layout))
        layouts = [value.layout if isinstance(value, _View) else value for value in args]
        named = {key: value.layout if isinstance(value, _View) else value for key, value in kwargs.items()}
        result = written.layout if isinstance(written, _View) else None
        call.flops = call_flops(function, layouts, named, result)
        call.rate = rate_of(function, layouts, self._gpu)
        call.seconds = self._gpu.seconds(call.bytes, call.flops, call.rate)

    # --- Names --------------------------------------------------------------------------------------------------------

    def _view(self, value: ast.expr) -> _View | None:
        """The memory that an expression stands for without a call of anything."""
        if isinstance(value, ast.Name):
            known = self._views.get(value.id)
            if known is None and value.id.startswith(("constant", "_tensor")):
                layout = self._generated.layout(value.id)
                return None if layout is None else _View(value.id, layout)
            return known
        if isinstance(value, ast.Call) and ast.unparse(value.func) in _VIEWS:
            base = self._view(value.args[0])
            if base is None or len(value.args) < 3:
                return base
            size, stride = (tuple(_literal(argument)) for argument in value.args[1:3])
            return _View(base.memory, Layout(size, stride, base.layout.dtype))
        return None

    def _argument(self, argument: ast.expr) -> Any:
        view = self._view(argument)
        return _literal(argument) if view is None else view

    def _allocate(self, name: str, layout: Layout) -> _View:
        view = _View(f"{name}#{next(self._numbers)}", layout)
        self._bind(name, view, layout.extent)
        return view

    def _bind(self, name: str, view: _View, size: int) -> None:
        self.memory.hold(view.memory, size)  # before what had the name is released, which may be the same
        self._release(name)
        self._views[name] = view

    def _release(self, name: str) -> None:
        names = [name, *(f"{name}: {result}" for result in self._results.get(name, []))]
        for view in (self._views.pop(one, None) for one in names):
            if view is not None:
                self.memory.release(view.memory)

    def _read(self, call: Call, view: _View) -> None:
        call.reads[view.memory] = view.layout.bytes
        writer = self._writers.get(view.memory)
        if writer is not None:
            call.sources[writer] = call.sources.get(writer, 0) + view.layout.bytes

    def _written(self, call: Call, view: _View) -> None:
        call.writes[view.memory] = view.layout.bytes
        self._writers[view.memory] = self._positions[id(call)]
        if call.kind == "external":
            call.seconds = self._gpu.seconds(call.bytes, call.flops, call.rate)


def _function(code: str) -> ast.FunctionDef:
    """What runs the part."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and node.name == "call":
            return node
    raise ValueError("the generated code has no function 'call'")


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, (ast.With, ast.If, ast.Try)):
            yield from _statements(statement.body)
        else:
            yield statement


def _parameters(source: str) -> list[str]:
    """Names of what a kernel is called with."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            return [argument.arg for argument in node.args.args]
    return []


def _literal(value: ast.expr) -> Any:
    """A constant, ``torch.float32`` among them; ``None`` for what is no constant."""
    if isinstance(value, ast.Attribute) and ast.unparse(value.value) == "torch":
        return getattr(torch, value.attr, None)
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None
