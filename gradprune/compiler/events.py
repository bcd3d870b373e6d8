"""What a compilation tells those who listen: reports, dumps and logs are made of it, and none of them is in its way."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from typing import Any

from torch import fx

from gradprune.graph.step_graph import Form, StepGraph
from gradprune.passes.pipeline import PassRecord

from .split import Split

log = logging.getLogger(__name__)


class Fallback(enum.Enum):
    """What a compilation had to do without."""

    FOLDING = "folding failed"
    """Batch norm is not folded; the other passes ran."""
    PROLOGUE = "prologue not compiled"
    """What runs once per attack runs operator by operator; the rest is compiled."""
    PASSES = "passes failed, compiled as captured"
    """The graph is compiled as it was traced, but for the weight gradients that nothing reads."""
    CHECK = "computed wrongly, runs eagerly"
    """What was compiled gave another result than the graph as captured."""
    CAPTURED = "compiled as captured"
    """Nothing is known about the graph: it is compiled as torch's default backend would."""


class Listener:
    """Is told of every stage of one compilation, in this order; what it does not care about it leaves out.

    What a listener raises is a warning and changes nothing else. Graphs belong to the compilation, which goes on to
    change them: a listener that needs one later copies it.
    """

    _has_failed = False

    @property
    def needs_stages(self) -> bool:
        """Whether it is not content with what an earlier process noted of the same compilation."""
        return False

    def captured(self, graph: fx.Graph, example_inputs: Sequence[Any]) -> None:
        """Dynamo captured ``graph``; nothing has been done to it."""

    def classified(self, form: Form) -> None:
        """It is known whether the graph is that of a step or of a model."""

    def traced(self, step_graph: StepGraph) -> None:
        """AOTAutograd made an ATen graph of it, which no pass has seen."""

    def passed(self, record: PassRecord, graph: fx.Graph, step_graph: StepGraph | None) -> None:
        """A pass ran over ``graph``; ``step_graph`` is ``None`` for a pass that comes before autograd."""

    def pruned(self, step_graph: StepGraph) -> None:
        """All passes ran."""

    def fell_back(self, what: Fallback, reason: str, graph: fx.Graph | None) -> None:
        """Something failed; ``graph`` is as the failure left it, and is put back in order next."""

    def split(self, parts: Split) -> None:
        """The step was divided into what runs once per attack and the rest."""

    def compiling(self, part: str, graph: fx.Graph) -> None:
        """Inductor is about to compile ``part``: ``"step"``, or ``"forward"`` or ``"backward"`` of a model."""

    def compiled(self, part: str, result: object) -> None:
        """Inductor compiled a part. Torch compiles ``"backward"`` when it is first called, long after ``finished``."""

    def finished(self) -> None:
        """All is compiled but for the backward graph of a model."""

    def storing(self, notes: dict[str, Any]) -> None:
        """What is compiled is stored for later processes; a listener may note by name what it wants to know then."""

    def restored(self, notes: dict[str, Any]) -> None:
        """What an earlier process stored was found; comes behind ``classified``, and in place of all up to this."""

    def checked(self, outcome: str) -> None:
        """What is compiled was called, and compared with the captured graph or not, long after ``finished``."""

    def abandoned(self, error: BaseException) -> None:
        """The compilation ended in an error, which may be Dynamo's way of beginning anew."""

    def failed(self, event: str, error: Exception) -> None:
        """This listener raised ``error`` when told of ``event``. Is logged, once in a compilation."""
        if self._has_failed:
            return
        self._has_failed = True
        log.warning(
            "gradprune: %s failed at %r, and what it makes is incomplete; the compiled graph is the same: %r",
            *(type(self).__name__, event, error),
            exc_info=error,
        )
