"""One graph on its way through the compiler: what every stage needs to know, and the one way back from a failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from gradprune.errors import CompileError, PassError
from gradprune.graph.editing import copy_graph, restore_graph
from gradprune.passes.base import Pass
from gradprune.passes.fold_batch_norm import FoldBatchNorm
from gradprune.passes.hoist_invariants import HoistInvariants
from gradprune.passes.pipeline import select_passes
from gradprune.torch_compat.dynamo import is_failure
from gradprune.torch_compat.inductor import compile_fx_inner

from .capture import Capture
from .events import Fallback, Listener
from .options import Options
from .split import Split

log = logging.getLogger(__name__)

Callback = Callable[..., Any]
InnerCompile = Callable[..., Any]


@dataclass
class Compilation:
    """One graph on its way through the compiler.

    Attributes:
        options: The backend's options.
        listeners: Are told of every stage.
        inner_compile: What turns an ATen graph into a callable.
        run_prologue: Whether to divide a step into a prologue and the rest. Not for a graph that never computes.
        capture: What Dynamo's graph says about itself.
        module_state: Names of the inputs of Dynamo's graph that are parameters or buffers of modules.
        is_apart: Whether another process compiles it.
        prunes: Whether passes run; if not, no more is changed than that weight gradients are not returned.
        was_traced: Whether the passes were shown the ATen graph of the whole capture.
        parts: The divided step, if it was divided.
        written: Which of Dynamo's inputs the graph writes.
        unrepeatable: Why running it twice may not give the same result; empty if it must.
        refused: Whether ``strict`` has raised an error, which is on its way to the user.
        strides: Of the gradients that a model returns, before the passes, by what torch noted on them.
    """

    options: Options
    listeners: Sequence[Listener] = ()
    inner_compile: InnerCompile = compile_fx_inner
    run_prologue: bool = True
    capture: Capture = field(default_factory=lambda: Capture("model", []))
    module_state: frozenset[str] = frozenset()
    is_apart: bool = False
    prunes: bool = True
    was_traced: bool = False
    parts: Split | None = None
    written: set[int] = field(default_factory=set)
    unrepeatable: str = "it is not known what it changes"
    refused: bool = False
    strides: dict[Any, tuple[Any, ...]] = field(default_factory=dict)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The passes to run, before autograd and after it."""
        options = self.options
        disable = options.disable if options.fold_batch_norm else (*options.disable, FoldBatchNorm.name)
        if self.capture.form == "model" and options.inductor_settings.get("triton.cudagraphs"):
            # A CUDA graph would copy every value at every call, for new ones are not where those before them were.
            disable = (*disable, HoistInvariants.name)
        return select_passes(disable, options.exact_order, options.passes)

    def tell(self, event: str, *about: Any) -> None:
        """Tell every listener; one that raises hears of it, and nothing else comes of it."""
        for listener in self.listeners:
            try:
                getattr(listener, event)(*about)
            except Exception as error:
                listener.failed(event, error)

    def attempt(self, what: Fallback, graph: fx.Graph, change: Callable[[], object], failure: str = "") -> bool:
        """Change ``graph``, or leave it as it is and say so; with the option ``strict``, raise.

        Args:
            what: What there is to do without if the change fails.
            graph: The graph that is changed.
            change: Changes it.
            failure: What to call an error that does not say itself what it is.

        Returns:
            Whether it was changed.

        Raises:
            CompileError: The graph must not be compiled at all, or ``strict`` is set and the change failed.
        """
        backup = copy_graph(graph)
        try:
            change()
        except Exception as error:
            if self.refused:
                raise
            if not isinstance(error, PassError) and (isinstance(error, CompileError) or not is_failure(error)):
                raise
            reason = str(error) if isinstance(error, PassError) else f"{failure}: {error!r}"
            self.fall_back(what, reason, graph, error)
            restore_graph(graph, backup)
            return False
        finally:
            for node in backup.nodes:  # which would hold weak references to weights, and these bar swap_tensors
                node.meta.clear()
        return True

    def fall_back(self, what: Fallback, reason: str, graph: fx.Graph | None, error: Exception | None = None) -> None:
        """Say that something has to be done without; with the option ``strict``, raise."""
        self.tell("fell_back", what, reason, graph)
        if self.options.strict:
            self.refused = True
            raise error if isinstance(error, PassError) else PassError(reason) from error
        log.warning("gradprune: %s: %s", what.value, reason, exc_info=error)
