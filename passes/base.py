"""What a pass is and what it says about its work."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from torch import fx

from gradprune.graph.step_graph import StepGraph, overload_name, source_line


class Tier(enum.Enum):
    """What a pass does to the numbers."""

    EXACT = "exact"
    """Every value that is still computed is computed by the same operator from the same operands."""
    REORDERS_FLOAT = "reorders float"
    """Mathematically equal, but floating point may round differently."""


@dataclass(frozen=True)
class Change:
    """One thing a pass did, or left alone, at one node.

    Attributes:
        node: Name of the node.
        operator: Its operator, such as ``aten.convolution_backward``.
        source: ``file:line`` of the user's code it comes from; empty if unknown.
        reason: Why.
    """

    node: str
    operator: str
    source: str
    reason: str

    @staticmethod
    def at(node: fx.Node, reason: str) -> Change:
        """A change at a node that is still in the graph."""
        return Change(node.name, overload_name(node), source_line(node), reason)


@dataclass
class PassResult:
    """What one run of a pass did.

    Attributes:
        removed: Nodes and outputs that are gone.
        narrowed: Nodes that compute less than before.
        hoisted: Values that leave the loop over the steps of an attack.
        skipped: What the pass would have changed but had to leave, and why.
    """

    removed: list[Change] = field(default_factory=list)
    narrowed: list[Change] = field(default_factory=list)
    hoisted: list[Change] = field(default_factory=list)
    skipped: list[Change] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether the graph is another one than before."""
        return bool(self.removed or self.narrowed)


class Pass(Protocol):
    """A graph rewrite. Implementations are frozen dataclasses whose fields are their options."""

    @property
    def name(self) -> str:
        """Name in the pipeline, in reports and in the ``disable`` option: words joined by hyphens."""

    @property
    def tier(self) -> Tier:
        """What the pass does to the numbers."""

    def run(self, step_graph: StepGraph) -> PassResult:
        """Rewrite ``step_graph`` in place.

        Contract: roles stay as they are, every live value keeps its ``meta["val"]`` shape and dtype, the graph has no
        dead nodes of the pass's own making, and a graph the pass does not apply to is left untouched.
        """
