"""What gradprune reads of Dynamo, and where it changes its mind."""

from __future__ import annotations

import contextlib
import dis
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import fx
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import (
    BackendCompilerFailed,
    RestartAnalysis,
    TorchDynamoException,
    Unsupported,
    UserError,
)
from torch._dynamo.output_graph import graph_break_reasons  # type: ignore[attr-defined]
from torch._dynamo.source import AttrSource, GradSource, is_from_unspecialized_nn_module_source
from torch._dynamo.symbolic_convert import SpeculationLog
from torch._dynamo.utils import counters
from torch._logging._internal import LazyTraceHandler, trace_log, trace_structured
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

__all__ = [
    "SIZE_IS_FIXED",
    "TRACED_FLAGS",
    "TRACES_REQUIRES_GRAD",
    "LeftOut",
    "code_of",
    "compile_wrapper_of",
    "compiling_code",
    "compiling_name",
    "compiling_wrapper",
    "counters",
    "dynamo_config",
    "dynamo_nodes",
    "example_of",
    "forget_backend",
    "forget_sources_of_constants",
    "is_module_state",
    "is_restart",
    "is_traced",
    "leaves",
    "module_state_of_grad",
    "note_compiled",
    "on_left_out",
    "optimized_parameters",
    "rebound_before_grad",
    "recompile",
    "scope_to_backend",
    "source_name",
    "trace_artifact",
    "with_symbolic_batch",
]

SIZE_IS_FIXED = (ConstraintViolationError, UserError)
"""What is raised where a size that was to be symbolic is fixed by what is traced."""


def is_failure(error: Exception) -> bool:
    """Whether an error that a compilation raised is one; Dynamo has others, by which it starts over or gives up."""
    return isinstance(error, BackendCompilerFailed) or not isinstance(error, TorchDynamoException)


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
        example = example_of(placeholder)
        if isinstance(example, torch.Tensor) and example.is_leaf:
            yield example


def example_of(placeholder: fx.Node) -> Any:
    """The value that a placeholder of Dynamo's graph stands for, as it was given; ``None`` if it is gone."""
    return getattr(placeholder.meta.get("grapharg"), "example", None)


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
    """A boolean configuration value that is another only while a given backend's graph is being traced.

    See Note [Scoped Dynamo flags].
    """

    name: str
    value: bool
    backends: list[Callable[..., Any]]

    def __bool__(self) -> bool:
        usual = bool(int(self))
        if usual is self.value:
            return usual
        translator = _current_translator()
        if translator is None:  # guards are made behind the tracing
            is_ours = not self.value and any(_being_compiled(backend)[0] is not None for backend in self.backends)
            return self.value if is_ours else usual
        if not any(function in self.backends for function in _backend_chain(translator.output.compiler_fn)):
            return usual
        return self.value if self.name != "trace_autograd_ops" else not _backward_would_be_lost(translator.output)

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

TRACED_FLAGS = {"trace_autograd_ops": True, "allow_rnn": True, "skip_nnmodule_hook_guards": False}
"""Flags of ``torch._dynamo.config`` that gradprune needs while it compiles, and what they have to be."""


def scope_to_backend(flag: str, backend: Callable[..., Any]) -> None:
    """Set a boolean of ``torch._dynamo.config`` while ``backend`` is compiling, and only then, see ``TRACED_FLAGS``.

    Note [Scoped Dynamo flags]: Dynamo traces ``torch.autograd.grad`` and ``Tensor.backward()`` only under
    ``trace_autograd_ops``, and recurrent layers only under ``allow_rnn``; it looks at hooks that were added to a module
    or removed from it only without ``skip_nnmodule_hook_guards``. All are process-wide and otherwise by default.
    Setting them globally would change how every other backend compiles. Dynamo asks ``if config.flag`` at the moment
    it meets such a call, so a value whose truth depends on who is compiling scopes the flag exactly. It is an ``int``
    because Dynamo logs its configuration as JSON. A user who sets the flag so keeps it everywhere.
    """
    current = getattr(dynamo_config, flag)
    if not isinstance(current, _ScopedFlag):
        current = _ScopedFlag(bool(current))
        current.name, current.value, current.backends = flag, TRACED_FLAGS[flag], []
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


# --- What Dynamo does not compile ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """Code that Dynamo leaves to Python.

    Attributes:
        wrapper: The object behind the ``torch.compile`` call.
        where: ``file:line``; empty if unknown.
        reason: Why, in a line.
        whole: Whether all of the frame is left to Python, and not only what is at that line.
    """

    wrapper: Any
    where: str
    reason: str
    whole: bool


def on_left_out(backend: Callable[..., Any], tell: Callable[[LeftOut], None]) -> None:
    """Have ``tell`` called whenever Dynamo, compiling for ``backend``, gives up a frame or breaks a graph.

    Note [Left out]: neither reaches a backend. Dynamo calls whoever wants to know behind each compilation, and has then
    the error that it is about to swallow in its hands, the frame on its stack, and the breaks in a list.
    """
    known = len(graph_break_reasons)

    def look(_: Any) -> None:
        nonlocal known
        # The list may have been emptied by somebody else.
        breaks, known = graph_break_reasons[min(known, len(graph_break_reasons)) :], len(graph_break_reasons)
        error = sys.exc_info()[1]
        gave_up = error if isinstance(error, Unsupported) else None
        if not breaks and gave_up is None:
            return
        wrapper, code, soft = _being_compiled(backend)
        if wrapper is None or code is None or not soft or code.co_filename.startswith(_TORCH):
            return
        for one in breaks:
            if not _is_expected(one.reason):
                tell(LeftOut(wrapper, _last_line(one.user_stack), _first_line(one.reason), False))
        if gave_up is not None:
            stack = getattr(gave_up, "real_stack", None) or ()
            where = _last_line(stack) or f"{code.co_filename}:{code.co_firstlineno}"
            tell(LeftOut(wrapper, where, _first_line(str(gave_up)), True))

    callback_handler.end_callbacks = _Kept([*callback_handler.end_callbacks, look])

    class Limit(logging.Handler):
        """Hears of the limit of recompilations, which is reached before anybody is called."""

        def emit(self, record: logging.LogRecord) -> None:
            if "hit config.%s" not in str(record.msg):
                return
            wrapper, code, soft = _being_compiled(backend)
            if wrapper is not None and code is not None and soft:
                reason = f"it was compiled as often as torch._dynamo.config.{record.args[0]} allows; "  # type: ignore[index]
                reason += f"the last time because of {record.args[3]}"  # type: ignore[index]
                where = f"{code.co_filename}:{code.co_firstlineno}"
                tell(LeftOut(wrapper, where, reason, True))

    logging.getLogger("torch._dynamo.convert_frame").addHandler(Limit())


class _Kept(list[Any]):
    """A list that ``torch._dynamo.reset()`` does not empty of what was in it from the start."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__(kept)
        self._kept = list(kept)

    def clear(self) -> None:
        """Forget what came later."""
        self[:] = self._kept


def _being_compiled(backend: Callable[..., Any]) -> tuple[Any, Any, bool]:
    """The ``torch.compile`` call and the code that the running compilation is for, and whether it may give up."""
    frame: Any = sys._getframe(1)
    wrapper = code = None
    soft = False
    while frame is not None and not (soft and code is not None):
        # Not of anybody else's frames: what is looked at is kept alive by the frame.
        if frame.f_code.co_filename.startswith(_TORCH):
            if code is None and frame.f_code.co_name == "_compile":
                code = frame.f_locals.get("code")
            converter = frame.f_locals.get("self")
            chain = list(_backend_chain(getattr(converter, "_torchdynamo_orig_backend", None)))
            if backend in chain:
                wrapper = _compile_wrapper(chain[0])
                soft = soft or type(converter).__name__ == "ConvertFrame"
        frame = frame.f_back
    return wrapper, code, soft


def _is_expected(reason: str) -> bool:
    """Whether a break is one that every step has with this version of torch."""
    return not TRACES_REQUIRES_GRAD and "requires_grad_" in reason


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
"""Where the files of torch are, and those of no package whose name only begins like it."""


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _last_line(stack: Any) -> str:
    """``file:line`` of the innermost call in the user's code."""
    calls = list(stack)
    own = [call for call in calls if not call.filename.startswith(_TORCH)] or calls
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def rebound_before_grad() -> set[str]:
    """Names of local variables of the function being compiled of which ``.grad`` is read behind a ``name += ...``.

    Dynamo (2.13) takes what such a statement leaves in the variable for a new tensor, which has no ``.grad``.
    """
    code = compiling_code()
    written, found, loaded = set[str](), set[str](), ""
    in_place = False
    for one in dis.get_instructions(code) if code is not None else ():
        if one.opname.startswith("INPLACE_") or (one.opname == "BINARY_OP" and one.argrepr.endswith("=")):
            in_place = True
        elif one.opname == "STORE_FAST":
            if in_place:
                written.add(one.argval)
            in_place = False
        elif one.opname in ("LOAD_ATTR", "STORE_ATTR") and one.argval == "grad" and loaded in written:
            found.add(loaded)
        names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        loaded = str(names[-1]) if one.opname.startswith("LOAD_FAST") else ""
    return found


def optimized_parameters() -> list[Any]:
    """Parameters of the optimizers that the function being compiled can reach, if it has a call of ``step``.

    A call of an optimizer is behind a break of the graph, so that nothing in the graph reads the gradients it needs.
    """
    translator = _current_translator()
    if translator is None:
        return []
    root = translator.output.root_tx
    names = root.f_code.co_names
    values = [*root.f_locals.values(), *(root.f_globals[name] for name in names if name in root.f_globals)]
    codes = [root.f_code, *(value.__code__ for value in values if isinstance(value, FunctionType))]
    if not any("step" in code.co_names for code in codes):
        return []
    values += [cell.cell_contents for cell in values if isinstance(cell, CellType) and _is_full(cell)]
    values += [held for value in values for name, held in _attributes(value) if name in names]
    optimizers = [value for value in values if isinstance(value, torch.optim.Optimizer)]
    return [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]


def _is_full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _attributes(value: Any) -> list[tuple[str, Any]]:
    return list(vars(value).items()) if hasattr(value, "__dict__") and not isinstance(value, ModuleType) else []


def recompile() -> None:
    """Have everything compiled again that was compiled for a backend of ours."""
    for code in list(_compiled):
        reset_code(code)
    _compiled.clear()


_compiled: weakref.WeakSet[Any] = weakref.WeakSet()
"""Code objects."""


def note_compiled() -> None:
    """Remember the code that is being compiled, for ``recompile``."""
    if (code := compiling_code()) is not None:
        _compiled.add(code)


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


def with_symbolic_batch(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of which Dynamo takes the first size for a symbol; a number stays what it is."""
    if tensor.ndim:
        tensor = tensor.detach()  # the mark is on a tensor of ours
        torch._dynamo.mark_dynamic(tensor, 0)
    return tensor


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Add a text to torch's structured trace, which tlparse renders; nothing is made of it when nobody traces.

    Args:
        name: Name of the artifact.
        encoding: ``"string"`` or ``"json"``.
        payload: Makes the text.
    """
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def is_traced() -> bool:
    """Whether torch's structured trace is written to a folder; known once Dynamo has tried to."""
    return any(isinstance(handler, LazyTraceHandler) for handler in trace_log.handlers)


def dynamo_nodes(node: fx.Node) -> set[str]:
    """Names of the Dynamo nodes that an ATen node was traced from."""
    return {source.name for source in node.meta.get("from_node", ())}
