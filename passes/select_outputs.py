"""Stop returning gradients that only ever land in the ``.grad`` of a weight.

    return (%x_next, %gw, %gb)       return (%x_next, None, None)

Legal for outputs with role WEIGHT_GRAD: the capture has established that nothing reads them. Gradients that something
reads have role KEPT_WEIGHT_GRAD; they stay and are reported. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from gradprune.graph.step_graph import OutputRole, StepGraph

from .base import Change, Pass, PassResult, Tier
from .dce import eliminate_dead_code


@dataclass(frozen=True)
class SelectOutputs(Pass):
    """Drop outputs with role WEIGHT_GRAD, and everything that was computed for them alone."""

    name = "select-outputs"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        """Drop unread weight gradients, and what they alone needed."""
        result = PassResult()
        values = step_graph.output_values()
        for position, role in enumerate(step_graph.outputs):
            value = values[position]
            if not isinstance(value, fx.Node):
                continue
            if role is OutputRole.WEIGHT_GRAD:
                result.removed.append(Change.at(value, "weight gradient that nothing reads"))
                values[position] = None
            elif role is OutputRole.KEPT_WEIGHT_GRAD:
                reason = step_graph.kept_because.get(position, "something reads this weight gradient")
                result.skipped.append(Change.at(value, reason))
        if result.removed:
            step_graph.set_output_values(values)
            gradients = {change.node for change in result.removed}
            erased = eliminate_dead_code(step_graph.graph, "only a weight gradient needed it")
            result.removed += [change for change in erased if change.node not in gradients]
        return result
