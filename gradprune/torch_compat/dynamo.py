"""What gradprune reads of Dynamo, and where it changes its mind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import fx
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.source import AttrSource, GradSource, is_from_unspecialized_nn_module_source
from torch._dynamo.symbolic_convert import SpeculationLog
from torch._dynamo.utils import counters
from torch._logging._internal import trace_structured

__all__ = [
    "TRACED_FLAGS",
    "TRACES_REQUIRES_GRAD",
    "code_of",
    "compile_wrapper_of",
    "compiling_code",
    "compiling_name",
    "compiling_wrapper",
    "counters",
    "dynamo_config",
    "dynamo_nodes",
    "forget_backend",
    "forget_sources_of_constants",
    "is_module_state",
    "is_restart",
    "leaves",
    "module_state_of_grad",
    "scope_to_backend",
    "source_name",
    "trace_artifact",
]


def is_module_state(placeholder: fx.Node) -> bool:
    """Whether a Dynamo placeholder is a parameter or buffer of an ``nn.Module``, judged by how the code reached it.

    The type is no test: a perturbation may well be an ``nn.Parameter`` that belongs to no module.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    return source is not None and not _is_grad(source) and is_from_unspecialized_nn_module_source(source)


def source_name(placeholder: fx.Node) -> str:
    """How the traced code reaches a placeholder of Dynamo's graph, such as ``L['model'].weight``; empty if unknown."""
    name = getattr(getattr(placeholder, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def leaves(graph: fx.Graph) -> Iterator[torch.Tensor]:
    """The tensors behind the placeholders of a Dynamo graph that may have a ``.grad``."""
    for placeholder in graph.find_nodes(op="placeholder"):
        example = getattr(placeholder.meta.get("grapharg"), "example", None)
        if isinstance(example, torch.Tensor) and example.is_leaf:
            yield example


def module_state_of_grad(placeholder: fx.Node) -> Any:
    """If a Dynamo placeholder is the ``.grad`` of a module's parameter, the source of that parameter, else ``None``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is not None and _is_grad(source) and is_from_unspecialized_nn_module_source(source.base):
        return source.base
    return None


def _is_grad(source: Any) -> bool:
    return isinstance(source, GradSource) or (isinstance(source, AttrSource) and source.member == "grad")


def _backend_chain(function: Any) -> Iterator[Any]:
    """A Dynamo callback and every backend it wraps, outermost first."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        inner = getattr(function, "_torchdynamo_orig_backend", None)
        function = inner if inner is not None else getattr(function, "compiler_fn", None)


def _current_translator() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except Exception:  # Dynamo raises AttributeError outside of tracing; which one is its own business.
        return None


class _ScopedFlag(int):
    """A boolean configuration value that is true only while a given backend's graph is being traced.

    See Note [Scoped Dynamo flags].
    """

    name: str
    backends: list[Callable[..., Any]]

    def __bool__(self) -> bool:
        if int(self):
            return True
        translator = _current_translator()
        if translator is None:
            return False
        if not any(function in self.backends for function in _backend_chain(translator.output.compiler_fn)):
            return False
        return self.name != "trace_autograd_ops" or not _backward_would_be_lost(translator.output)

    def __repr__(self) -> str:
        return repr(bool(int(self)))  # Dynamo hashes the text of its configuration

    def __reduce__(self) -> tuple[type[bool], tuple[int]]:
        return (bool, (int(self),))  # and saves it by pickling


def _backward_would_be_lost(output: Any) -> bool:
    """Whether Dynamo would take a ``loss.backward()`` met now for one that does nothing.

    After a graph break between forward and backward the loss is an input of the graph, and the leaves may all lie
    before it. Finding none, Dynamo (2.13) drops the call; not traced, it breaks the graph once more and runs.
    """
    inputs = list(output.input_source_to_var.values())
    candidates = [*inputs, *getattr(output, "leaf_var_creation_order", ())]
    has_leaf = any(getattr(var, "requires_grad", False) and not var.has_grad_fn for var in candidates)
    return not has_leaf and any(getattr(var, "has_grad_fn", False) for var in inputs)


def forget_sources_of_constants() -> None:
    """Undo what Dynamo (2.13) does to constants that all of its frames share.

    Reading a ``.grad`` that the traced code has set to None notes where it was read on *the* constant None. A later,
    unrelated frame that has to write a None, as one that breaks after ``requires_grad_()`` does, would then look there.
    """
    from torch._dynamo.variables import constant

    for name in ("CONSTANT_VARIABLE_NONE", "CONSTANT_VARIABLE_TRUE", "CONSTANT_VARIABLE_FALSE"):
        shared = getattr(constant, name, None)
        if shared is not None:
            shared.source = None


TRACES_REQUIRES_GRAD = hasattr(SpeculationLog(), "graph_break_on_requires_grad_")
"""Whether Dynamo traces ``requires_grad_()`` on a value made in the function it traces. Where it does not (torch 2.11),
it breaks the graph there, and the step proper is the second piece."""

TRACED_FLAGS = ("trace_autograd_ops", "allow_rnn")
"""Flags of ``torch._dynamo.config`` that gradprune needs while it compiles."""


def scope_to_backend(flag: str, backend: Callable[..., Any]) -> None:
    """Turn on a boolean of ``torch._dynamo.config`` while ``backend`` is compiling, and only then.

    Note [Scoped Dynamo flags]: Dynamo traces ``torch.autograd.grad`` and ``Tensor.backward()`` only under
    ``trace_autograd_ops``, and recurrent layers only under ``allow_rnn``; both are process-wide and off by default.
    Turning them on globally would change how every other backend compiles. Dynamo asks ``if config.flag`` at the moment
    it meets such a call, so a value whose truth depends on who is compiling scopes the flag exactly. It is an ``int``
    because Dynamo logs its configuration as JSON. A user who sets the flag to True keeps it everywhere.
    """
    current = getattr(dynamo_config, flag)
    if not isinstance(current, _ScopedFlag):
        current = _ScopedFlag(bool(current))
        current.name, current.backends = flag, []
        setattr(dynamo_config, flag, current)
    current.backends.append(backend)


def forget_backend(flag: str, backend: Callable[..., Any]) -> None:
    """Undo ``scope_to_backend``."""
    current = getattr(dynamo_config, flag)
    if isinstance(current, _ScopedFlag) and backend in current.backends:
        current.backends.remove(backend)


def compiling_wrapper() -> Any:
    """The object behind the ``torch.compile`` call whose frame is being compiled, ``None`` outside of Dynamo."""
    translator = _current_translator()
    return None if translator is None else _compile_wrapper(translator.output.compiler_fn)


def compiling_code() -> Any:
    """Code object of the user's function whose frame is being compiled, ``None`` outside of Dynamo."""
    translator = _current_translator()
    return None if translator is None else translator.output.root_tx.f_code


def compiling_name() -> str:
    """Name of the user's function whose frame is being compiled; empty outside of Dynamo, and for a module."""
    code = compiling_code()
    return "" if code is None or "_dynamo" in Path(code.co_filename).parts else str(code.co_name)


def is_restart(error: BaseException) -> bool:
    """Whether an error is Dynamo's way to trace the same frame once more."""
    return isinstance(error, RestartAnalysis)


def code_of(compiled: Any) -> Any:
    """Code object of the function that ``compiled`` was compiled from, ``None`` for a module."""
    return getattr(getattr(compiled, "_torchdynamo_orig_callable", None), "__code__", None)


def compile_wrapper_of(compiled: Any) -> Any:
    """The object behind the ``torch.compile`` call that returned ``compiled``, ``None`` if it is not compiled."""
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None:
        for cell in getattr(compiled, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if hasattr(cell.cell_contents, "_torchdynamo_orig_backend"):
                    return _compile_wrapper(cell.cell_contents)
        return None
    return _compile_wrapper(context.callback)


def _compile_wrapper(function: Any) -> Any:
    for candidate in _backend_chain(function):
        if isinstance(candidate, torch._TorchCompileWrapper):
            return candidate
    return None


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Add a text to torch's structured trace, which tlparse renders; nothing is made of it when nobody traces.

    Args:
        name: Name of the artifact.
        encoding: ``"string"`` or ``"json"``.
        payload: Makes the text.
    """
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def dynamo_nodes(node: fx.Node) -> set[str]:
    """Names of the Dynamo nodes that an ATen node was traced from."""
    return {source.name for source in node.meta.get("from_node", ())}
