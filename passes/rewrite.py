"""Local rewrites: a pass that is one function, from a node to what takes its place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from gradprune.graph.build import Builder, Knowledge
from gradprune.graph.cost import DIRECT_FLOPS
from gradprune.graph.step_graph import Form, StepGraph

from .base import Change, Pass, PassResult, Tier
from .dce import eliminate_dead_code
from .narrow_outputs import used_outputs


@dataclass(frozen=True)
class Skip:
    """A rewrite leaves a node that it would have changed.

    Attributes:
        reason: What a report says about it.
    """

    reason: str


Rewrite: TypeAlias = Callable[[fx.Node, Builder], "fx.Node | Skip | None"]
"""``rewrite(node, build)``: the node that takes its place, ``node`` itself if it was changed in place, a reason why it
has to stay, or ``None`` if there is nothing to do. ``build.call(...)`` inserts nodes."""


class LocalRewrite(Pass):
    """Offers every call of some operators to a function, and puts in its place what that returns."""

    def __init__(
        self,
        function: Rewrite,
        operators: Collection[Any],
        reason: str,
        output: int | None,
        when: Callable[[StepGraph], bool] | None,
    ) -> None:
        self.function = function
        self.operators = frozenset(operators)
        self.reason = reason
        self.output = output
        self.when = when

    def run(self, graph: StepGraph) -> PassResult:
        """Rewrite all that can be, and erase what becomes dead."""
        result = PassResult()
        calls = [node for node in graph.calls() if node.target in self.operators]
        if not calls or (self.when is not None and not self.when(graph)):
            return result
        knowledge = Knowledge(graph)
        for node in calls:
            if self.output is not None and used_outputs(node) != frozenset({self.output}):
                continue
            build = Builder(node, knowledge)
            new = self.function(node, build)
            if isinstance(new, fx.Node):
                result.narrowed.append(Change.at(node, self.reason))
                if new is not node:
                    self._replace(node, new, is_inserted=new in build.inserted)
                continue
            for unused in reversed(build.inserted):
                unused.graph.erase_node(unused)
            if new is not None:
                result.skipped.append(Change.at(node, new.reason))
        if result.narrowed:
            result.removed += eliminate_dead_code(graph.graph)
        return result

    def _replace(self, node: fx.Node, new: fx.Node, *, is_inserted: bool) -> None:
        if is_inserted:
            # Strides in the metadata stay those of the trace, for the views further on; Inductor knows better.
            value = node.meta["val"] if self.output is None else node.meta["val"][self.output]
            kept = {key: new.meta[key] for key in (DIRECT_FLOPS,) if key in new.meta}
            new.meta = {**node.meta, **kept, "val": value}
        for old in [node] if self.output is None else list(node.users):
            old.replace_all_uses_with(new)
            old.graph.erase_node(old)
        if self.output is not None:
            node.graph.erase_node(node)


def rewrite(
    *operators: torch._ops.OpOverload,
    name: str,
    tier: Tier,
    reason: str,
    forms: Collection[Form] = ("step", "model"),
    needs: Collection[str] = (),
    keeps: Collection[torch._ops.OpOverload] = (),
    output: int | None = None,
    when: Callable[[StepGraph], bool] | None = None,
) -> Callable[[Rewrite], LocalRewrite]:
    """Make a pass of a function.

    Args:
        operators: Whose calls the function is offered.
        name: See ``Pass``, as ``tier``, ``forms``, ``needs`` and ``keeps``.
        tier: What the pass does to the numbers.
        reason: What a report says about a node that was rewritten.
        forms: Of steps, of models, or of both.
        needs: Names of passes without which this one would not pay, or not work.
        keeps: Operators that Inductor must not decompose.
        output: Of operators with several outputs, the one that the function computes: it is offered calls of which
            nothing else is used.
        when: Which graphs to look at at all.
    """
    declared: dict[str, Any] = {
        "name": name,
        "tier": tier,
        "forms": frozenset(forms),
        "needs": frozenset(needs),
        "keeps": tuple(keeps),
    }

    def make(function: Rewrite) -> LocalRewrite:
        described = {"__doc__": function.__doc__, "__module__": function.__module__}
        kind = type(function.__name__, (LocalRewrite,), {**declared, **described})
        made: LocalRewrite = kind(function, operators, reason, output, when)
        return made

    return make
