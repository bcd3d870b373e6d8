"""Let operators with several outputs compute only the outputs that are used, and erase what becomes dead.

    %cb = convolution_backward(..., [True, True, True])      %cb = convolution_backward(..., [True, False, False])
    %gx = getitem(%cb, 0)                                    %gx = getitem(%cb, 0)
    %gw = getitem(%cb, 1)   # unused                         (gone)

One backward sweep: when a node is reached all its users have been decided, so what is used is known, and erasing or
narrowing it can only free nodes that the sweep has yet to visit. How an operator is narrowed is said by its rule in
``rules/``; a multi-output backward operator without a rule is kept whole and reported. Exact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from gradprune.graph.step_graph import StepGraph

from .base import Change, Pass, PassResult, Tier
from .dce import is_removable
from .rules import is_unnarrowable, rule_for


@dataclass(frozen=True)
class NarrowOutputs(Pass):
    """Narrow multi-output operators to what is used."""

    name = "narrow-outputs"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        """Sweep backwards: erase what is dead, narrow what has outputs that nobody uses."""
        result = PassResult()
        graph = step_graph.graph
        for node in reversed(graph.nodes):
            if not node.users:
                if is_removable(node):
                    result.removed.append(Change.at(node, "no output depends on it"))
                    graph.erase_node(node)
                continue
            used = used_outputs(node)
            if used is None:
                continue
            rule = rule_for(node)
            if rule is None:
                count = len(node.meta.get("val") or ())
                reason = is_unnarrowable(node) if len(used) < count else None
                if reason is not None:
                    result.skipped.append(Change.at(node, f"outputs {sorted(used)} of {count} are used, but {reason}"))
                continue
            narrowed = rule(node, used)
            if narrowed is not None:
                node.args, node.kwargs = narrowed
                _forget_unused(node, used)
                result.narrowed.append(Change.at(node, f"only outputs {sorted(used)} are used"))
        for changes in (result.removed, result.narrowed, result.skipped):
            changes.reverse()
        return result


def used_outputs(node: fx.Node) -> frozenset[int] | None:
    """Which outputs of a multi-output node are used; ``None`` if it has one output, or is used as a whole."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return None
    if any(user.target is not operator.getitem for user in node.users):
        return None
    return frozenset(int(user.args[1]) for user in node.users)  # type: ignore[arg-type]


def _forget_unused(node: fx.Node, used: frozenset[int]) -> None:
    """An output that is no longer computed has no value, so that nobody plans memory for it."""
    value = node.meta["val"]
    node.meta["val"] = type(value)(item if index in used else None for index, item in enumerate(value))
