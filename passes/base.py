"""What a pass is and what it says about its work."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from gradprune.graph.step_graph import Form, overload_name, source_line


class Tier(enum.Enum):
    """What a pass does to the numbers."""

    EXACT = "exact"
    """Every value that is still computed is computed by the same operator from the same operands."""
    REORDERS_FLOAT = "reorders float"
    """Mathematically equal, but floating point may round differently."""


class Stage(enum.Enum):
    """Which graph a pass works on."""

    CAPTURED = "before autograd"
    """The one that Dynamo captured, a ``CapturedGraph``: what changes here is differentiated as changed."""
    JOINT = "after autograd"
    """The one of forward and backward, a ``StepGraph``."""


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


class Pass(ABC):
    """A graph rewrite. Implementations are frozen dataclasses whose fields are their options.

    Attributes:
        name: Name in the pipeline, in reports and in the ``disable`` option: words joined by hyphens.
        tier: What the pass does to the numbers.
        stage: Which graph it works on.
        forms: Of steps, of models, or of both.
        needs: Names of the passes without which it would not pay, or not work.
        keeps: Operators that it has to see whole, so that Inductor must not decompose them.
    """

    name: ClassVar[str]
    tier: ClassVar[Tier]
    stage: ClassVar[Stage] = Stage.JOINT
    forms: ClassVar[frozenset[Form]] = frozenset({"step", "model"})
    needs: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[tuple[torch._ops.OpOverload, ...]] = ()

    @abstractmethod
    def run(self, graph: Any) -> PassResult:
        """Rewrite a ``CapturedGraph`` or a ``StepGraph``, as ``stage`` has it, in place.

        Contract: roles stay as they are, every live value keeps its ``meta["val"]`` shape and dtype, the graph has no
        dead nodes of the pass's own making, and a graph the pass does not apply to is left untouched.
        """
