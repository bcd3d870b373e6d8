"""The report of one compiled graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from ..analysis.cost import FLOP_CLASSES, count_flops
from ..analysis.liveness import base, peak_bytes, saved_nodes, total_bytes
from ..passes.base import Change
from ..passes.pipeline import PassRecord, count_ops
from ..step_graph import Form, StepGraph


@dataclass
class Report:
    """What gradprune did to one graph.

    "Before" is the graph as captured, with batch norm folded already if it is. FLOPs count contractions, a multiply-add
    as two, and a convolution as what it is, whichever algorithm computes it. Bytes are those of the graph as it stands,
    see ``gradprune.analysis.liveness``; in the model form ``saved_bytes["after"]`` is what the compiled forward pass
    really hands to the backward pass.

    Attributes:
        form: ``"step"`` or ``"model"``.
        ops: Operators before and after.
        flops: FLOPs by class (``forward``, ``input_grad``, ``weight_grad``, ``other``), before and after.
        saved_bytes: Bytes kept from forward to backward, before and after.
        peak_bytes: Largest number of bytes alive at once, before and after, without fusion.
        passes: The passes that ran.
        fallback: Why the graph was compiled as captured, ``None`` if it was not.
    """

    form: Form
    ops: dict[str, int] = field(default_factory=dict)
    flops: dict[str, dict[str, int]] = field(default_factory=dict)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    fallback: str | None = None

    @property
    def removed(self) -> list[Change]:
        """Nodes and outputs that are gone."""
        return [change for record in self.passes for change in record.result.removed]

    @property
    def narrowed(self) -> list[Change]:
        """Nodes that compute less than before, or from less."""
        return [change for record in self.passes for change in record.result.narrowed]

    @property
    def hoisted(self) -> list[Change]:
        """Values of weights that are computed once per attack instead of once per step."""
        return [change for record in self.passes for change in record.result.hoisted]

    @property
    def skipped(self) -> list[Change]:
        """What was left although it computes more than is used, and why."""
        return [change for record in self.passes for change in record.result.skipped]

    @property
    def takes_gradient(self) -> bool:
        """Whether the graph has a backward pass."""
        return self.form == "step" or self.flops.get("before", {}).get("input_grad", 0) > 0

    def measure(self, step_graph: StepGraph, when: str) -> None:
        """Fill in the figures of ``step_graph`` as it is now, ``when`` being "before" or "after"."""
        self.ops[when] = count_ops(step_graph)
        self.flops[when] = count_flops(step_graph)
        self.saved_bytes[when] = total_bytes(saved_nodes(step_graph))
        self.peak_bytes[when] = peak_bytes(step_graph)

    def measure_saved(self, forward: fx.Graph) -> None:
        """Take the bytes saved for backward from a partitioned forward graph: what it returns beyond its outputs."""
        output = forward.output_node()
        visible = set(output.meta["user_visible_output_idxs"])
        saved = {
            base(value): None
            for position, value in enumerate(output.args[0])  # type: ignore[arg-type]
            if position not in visible and isinstance(value, fx.Node) and base(value).op == "call_function"
        }
        self.saved_bytes["after"] = total_bytes(saved)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that ``json.dump`` takes."""
        return {
            "form": self.form,
            "ops": dict(self.ops),
            "flops": {when: dict(classes) for when, classes in self.flops.items()},
            "saved_bytes": dict(self.saved_bytes),
            "peak_bytes": dict(self.peak_bytes),
            "removed": [asdict(change) for change in self.removed],
            "narrowed": [asdict(change) for change in self.narrowed],
            "hoisted": [asdict(change) for change in self.hoisted],
            "skipped": [asdict(change) for change in self.skipped],
            "passes": [
                {
                    "name": record.name,
                    "tier": record.tier.value,
                    "seconds": record.seconds,
                    "ops": {"before": record.ops_before, "after": record.ops_after},
                }
                for record in self.passes
            ],
            "fallback": self.fallback,
        }

    def __str__(self) -> str:
        title = {"step": "attack step, one graph", "model": "model, backward called from outside"}[self.form]
        lines = [f"gradprune: {title}"]
        if self.fallback is not None:
            lines.append(f"  compiled as captured: {self.fallback}")
        if "after" in self.ops:
            total = {when: sum(classes.values()) for when, classes in self.flops.items()}
            lines.append(f"  {'':<24}{'before':>14}{'after':>14}")
            lines.append(_row("operators", self.ops, 1, 0))
            unit, prefix = _unit(max(total.values()))
            for name in FLOP_CLASSES:
                of_class = {when: classes[name] for when, classes in self.flops.items()}
                if any(of_class.values()):
                    lines.append(_row(f"{prefix}FLOP {name.replace('_', ' ')}", of_class, unit, 2))
            ratio = f"{total['before'] / total['after']:.2f}x" if total["after"] else ""
            lines.append(_row(f"{prefix}FLOP total", total, unit, 2, ratio))
            for label, size in (("B saved for backward", self.saved_bytes), ("B peak, unfused", self.peak_bytes)):
                unit, prefix = _unit(max(size.values()))
                lines.append(_row(prefix + label, size, unit, 1))
        for label, changes in (("removed", self.removed), ("narrowed", self.narrowed), ("hoisted", self.hoisted)):
            if changes:
                counts = Counter(change.operator for change in changes).most_common(6)
                lines.append(f"  {label} {len(changes)}: " + ", ".join(f"{n} {name}" for name, n in counts))
        for change in self.skipped:
            where = f" ({change.source})" if change.source else ""
            lines.append(f"  kept {change.operator} {change.node}{where}: {change.reason}")
        if self.passes:
            lines.append("  passes: " + ", ".join(f"{r.name} {r.seconds * 1e3:.0f} ms" for r in self.passes))
        return "\n".join(lines)


def _unit(largest: float) -> tuple[float, str]:
    """The largest decimal unit that keeps ``largest`` at or above one, and its prefix."""
    return next(
        ((unit, prefix) for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= unit), (1e3, "k")
    )


def _row(label: str, values: Mapping[str, float], unit: float, digits: int, note: str = "") -> str:
    before, after = (f"{values[when] / unit:,.{digits}f}" for when in ("before", "after"))
    return f"  {label:<24}{before:>14}{after:>14}  {note}".rstrip()
