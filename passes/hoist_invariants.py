"""Find what depends on weights alone, so that it is computed once per attack instead of once per step.

    %f = flip(%w, [2, 3])                    prologue(%w):           %f = flip(%w, [2, 3])
    %g = convolution(%gy, %f)                step(%f, %gy):          %g = convolution(%gy, %f)

This is loop-invariant code motion out of the loop over the steps of an attack. The pass merges equal invariant values
(common subexpressions, so that each is computed and kept once) and lists what is to be hoisted; the graph is split when
it is compiled, see ``compiler/split.py``. Legal for every pure operator whose operands are weights that the step
does not write, or values hoisted already. A model that is called from outside has no loop that is known: its weights
are compared at every call. It does not hoist what depends on the clean images, nor views, which cost nothing. Exact.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from gradprune.graph.invariance import hoisted_values, invariant_nodes
from gradprune.graph.step_graph import StepGraph

from .base import Change, Pass, PassResult, Tier


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Merge equal values of weights and say which are hoisted."""

    name = "hoist-invariants"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        """Merge equal values of weights, then list what is hoisted."""
        result = PassResult()
        result.removed += _merge_equal(step_graph)
        result.hoisted += [
            Change.at(node, "depends on weights alone: computed once per attack") for node in hoisted_values(step_graph)
        ]
        return result


def _merge_equal(step_graph: StepGraph) -> list[Change]:
    """Replace invariant nodes by an earlier one that computes the same."""
    merged = []
    first: dict[Hashable, fx.Node] = {}
    invariant = invariant_nodes(step_graph)
    for node in list(step_graph.calls()):
        if node not in invariant:
            continue
        same = first.setdefault(_expression(node), node)
        if same is not node:
            merged.append(Change.at(node, f"the same value as {same.name}"))
            node.replace_all_uses_with(same)
            step_graph.graph.erase_node(node)
    return merged


def _expression(node: fx.Node) -> Hashable:
    """What a node computes; equal for nodes that compute the same."""
    leaves, structure = tree_flatten((node.args, node.kwargs))
    # The type tells 1 from 1.0 and True, which Python holds to be equal.
    return node.target, str(structure), tuple((type(leaf), _hashable(leaf)) for leaf in leaves)


def _hashable(leaf: Any) -> Hashable:
    if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return id(leaf)
    return repr(leaf) if isinstance(leaf, float) else leaf  # nan is not equal to itself
