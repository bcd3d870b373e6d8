"""The report of one compiled graph."""

from __future__ import annotations

import difflib
import logging
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from gradprune.errors import GradpruneError
from gradprune.graph.cost import FLOP_CLASSES
from gradprune.graph.step_graph import Form, StepGraph
from gradprune.passes.base import Change
from gradprune.passes.pipeline import PassRecord

from .figures import Figures
from .kernels import Kernel
from .snapshot import Snapshot, Why

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
"""Version of what ``Report.to_dict`` returns. Keys may be added without a new one."""

WIDTH = 120
KEPT_SHOWN = 5
KINDS_SHOWN = 6


@dataclass
class Report:
    """What gradprune did to one graph.

    "Before" is the graph as captured, with batch norm folded already if it is. FLOPs count contractions, a multiply-add
    as two, and a convolution as what it is, whichever algorithm computes it. Bytes are those of the graph as it stands,
    see ``gradprune.graph.liveness``; in the model form ``saved_bytes["after"]`` is what the compiled forward pass
    really hands to the backward pass.

    Counting takes time and is done when a figure is first asked for.

    Attributes:
        form: ``"step"`` or ``"model"``.
        passes: The passes that ran.
        kernels: What Inductor's generated code calls; empty if nothing was compiled.
        fallback: Why something had to be done without, ``None`` if nothing had to.
        fallback_kind: What it was, ``None`` if nothing was: ``"folding failed"`` (batch norm is not folded),
            ``"prologue not compiled"`` (what runs once per attack runs operator by operator, on a GPU),
            ``"passes failed, compiled as captured"`` (all but unread weight gradients is computed),
            ``"computed wrongly, runs eagerly"`` (see ``check``) or ``"compiled as captured"`` (nothing is known about
            the graph); or ``"not compiled, runs eagerly"`` of a call
            that nothing was compiled for.
        check: How the comparison of the first call with the captured graph, run eagerly, ended; empty before that call.
        is_stored: Whether all of this was found on disk, where an earlier process left it, and no pass ran in this one.
        left_out: What of the function or module Dynamo left to Python, with the line and why.
        function: Name of the function or module that the graph was captured from, if it is known.
        dump: Folder that all of this was written to, ``None`` if nothing was.
        dump_error: Why something is missing there, ``None`` if nothing is.
    """

    form: Form
    passes: list[PassRecord] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    fallback: str | None = None
    fallback_kind: str | None = None
    check: str = ""
    is_stored: bool = False
    left_out: list[str] = field(default_factory=list)
    function: str = ""
    dump: str | None = None
    dump_error: str | None = None
    _graphs: dict[str, StepGraph] = field(default_factory=dict, repr=False)
    _figures: dict[str, Figures] = field(default_factory=dict, repr=False)
    _saved_by_forward: int | None = field(default=None, repr=False)
    _removed_by: dict[str, str] = field(default_factory=dict, repr=False)

    def keep(self, step_graph: StepGraph, when: str) -> None:
        """Keep a copy of a graph, ``when`` being "before" or "after", to count in once a figure is asked for."""
        self._graphs[when] = step_graph.copy()

    def figures(self) -> dict[str, Figures]:
        """All that is counted, before and after. What cannot be counted is a warning, and is missing."""
        while self._graphs:
            when, step_graph = self._graphs.popitem()
            try:
                self._figures[when] = Figures.of(step_graph)
            except Exception as error:
                log.warning(
                    "gradprune: the figures %s the passes are missing in a report: %r", when, error, exc_info=error
                )
        if "before" not in self._figures:
            return {}  # nothing to compare with
        return {when: self._figures[when] for when in ("before", "after") if when in self._figures}

    @property
    def ops(self) -> dict[str, int]:
        """Operators, before and after."""
        return {when: figures.ops for when, figures in self.figures().items()}

    @property
    def flops(self) -> dict[str, dict[str, int]]:
        """FLOPs by class (``forward``, ``input_grad``, ``weight_grad``, ``other``), before and after."""
        return {when: figures.flops for when, figures in self.figures().items()}

    @property
    def saved_bytes(self) -> dict[str, int]:
        """Bytes kept from forward to backward, before and after."""
        saved = {when: figures.saved_bytes for when, figures in self.figures().items()}
        return saved if self._saved_by_forward is None else {**saved, "after": self._saved_by_forward}

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Largest number of bytes alive at once, before and after, without fusion."""
        return {when: max(figures.memory, default=0) for when, figures in self.figures().items()}

    @property
    def memory(self) -> dict[str, list[int]]:
        """Bytes alive while each operator runs, in graph order, before and after, without fusion."""
        return {when: figures.memory for when, figures in self.figures().items()}

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes that one call should read and write, before and after, see ``gradprune.report.prediction``."""
        return {when: figures.prediction.moved_bytes for when, figures in self.figures().items()}

    @property
    def graphs(self) -> dict[str, Snapshot]:
        """The nodes by name, before and after."""
        return {when: figures.graph for when, figures in self.figures().items()}

    @property
    def weight_gradients(self) -> list[Change]:
        """Operators that compute a weight gradient after all passes, and which output needs it."""
        return [change for figures in list(self.figures().values())[-1:] for change in figures.weight_gradients]

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

    @property
    def hoisted_bytes(self) -> int:
        """Bytes that the hoisted values take from one step to the next, not counting padding of packed weights."""
        return sum(self._hoisted_bytes().values())

    def _hoisted_bytes(self) -> dict[str, int]:
        """Bytes of every hoisted value, by the name of its node."""
        bytes_of = next((figures.bytes_of for figures in list(self.figures().values())[-1:]), {})
        return {change.node: bytes_of[change.node] for change in self.hoisted if change.node in bytes_of}

    @property
    def speedup(self) -> dict[str, float]:
        """What should be gained, as ratios of before to after: of FLOPs, of bytes moved, and of the time modelled."""
        pairs: dict[str, Mapping[str, float]] = {
            "flops": {when: sum(classes.values()) for when, classes in self.flops.items()},
            "bytes": self.moved_bytes,
            "predicted": {when: figures.prediction.time for when, figures in self.figures().items()},
        }
        return {name: pair["before"] / pair["after"] for name, pair in pairs.items() if pair.get("after")}

    def note_saved(self, saved: int) -> None:
        """Note the bytes that the compiled forward pass hands to the backward pass."""
        self._saved_by_forward = saved

    def note_removed(self, names: Iterable[str], by: str) -> None:
        """Remember which pass the nodes called ``names`` are gone with."""
        for name in names:
            self._removed_by.setdefault(name, by)

    def why(self, node: str) -> Why:
        """Why a node is computed: the chain of nodes from it to the output that needs it.

        Args:
            node: Name of a node, before or after the passes, as in ``removed``, in the dump and in logs.

        Returns:
            What prints as an explanation. Of a node that is gone it says which pass removed it and why.

        Raises:
            GradpruneError: There is no such node; the message has the nearest name.
        """
        after = self.graphs.get("after", self.graphs.get("before", Snapshot()))
        before = self.graphs.get("before", Snapshot())
        if node in after.nodes:
            return self._why_kept(node, after)
        if node not in before.nodes and node not in self._removed_by:
            names = [*after.nodes, *before.nodes]
            near = difflib.get_close_matches(node, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "report.to_dict() and the dump have the names"
            raise GradpruneError(f"the graph has no node {node!r}: {hint}")
        for record in self.passes:
            result = record.result
            for what, changes in (("removed", result.removed), ("replaced", result.narrowed)):
                for change in changes:
                    # What an earlier pass narrowed may be removed by a later one.
                    if change.node == node and self._removed_by.get(node, record.name) == record.name:
                        reason = f"{record.name} {what} it: {change.reason}"
                        return Why(node, change.operator, change.source, False, (), None, reason)
        seen = before.nodes.get(node)
        reason = f"{self._removed_by.get(node, 'a pass')} removed it, with what needed it"
        return Why(node, seen.operator if seen else "", seen.source if seen else "", False, (), None, reason)

    def _why_kept(self, node: str, graph: Snapshot) -> Why:
        seen = graph.nodes[node]
        names, output = graph.path(node)
        chain = tuple((name, graph.nodes[name].operator) for name in names)
        if output is None:
            reason = "no output depends on it" + (
                ", but it writes to memory or draws random numbers" if seen.is_call else ""
            )
        else:
            reason = graph.meaning(output)
        hoisted = next((name for name in names if name in self._hoisted_bytes()), None)
        if hoisted is not None:
            reason += f"; {'it is' if hoisted == node else f'{hoisted} is'} computed once per attack"
        return Why(node, seen.operator, seen.source, True, chain, output, reason)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that ``json.dump`` takes, and that ``report.json`` of a dump holds.

        Returns:
            ``schema_version`` (this is 1), ``form``, ``function``; ``ops``, ``flops`` by class, ``saved_bytes``,
            ``peak_bytes``, ``moved_bytes`` and ``memory`` (bytes alive while each operator runs), each with ``before``
            and ``after``; ``speedup`` (ratios of ``flops`` and ``bytes``, and ``predicted``); the lists ``removed``,
            ``narrowed``, ``hoisted``, ``skipped`` and ``weight_gradients`` of ``node``, ``operator``, ``source``,
            ``reason``, for hoisted values ``bytes`` too; ``passes`` (``name``, ``tier``, ``seconds``, ``ops``);
            ``kernels`` (``name``, ``count``, ``kind``, ``part``); ``check``; ``fallback``, ``fallback_kind``, ``dump``,
            ``dump_error``, which may be ``None``.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "form": self.form,
            "function": self.function,
            "ops": dict(self.ops),
            "flops": {when: dict(classes) for when, classes in self.flops.items()},
            "saved_bytes": dict(self.saved_bytes),
            "peak_bytes": dict(self.peak_bytes),
            "moved_bytes": dict(self.moved_bytes),
            "memory": {when: list(curve) for when, curve in self.memory.items()},
            "speedup": self.speedup,
            "removed": [asdict(change) for change in self.removed],
            "narrowed": [asdict(change) for change in self.narrowed],
            "hoisted": [
                {**asdict(change), "bytes": self._hoisted_bytes().get(change.node, 0)} for change in self.hoisted
            ],
            "skipped": [asdict(change) for change in self.skipped],
            "weight_gradients": [asdict(change) for change in self.weight_gradients],
            "passes": [
                {
                    "name": record.name,
                    "tier": record.tier.value,
                    "seconds": record.seconds,
                    "ops": {"before": record.ops_before, "after": record.ops_after},
                }
                for record in self.passes
            ],
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "check": self.check,
            "fallback": self.fallback,
            "fallback_kind": self.fallback_kind,
            "dump": self.dump,
            "dump_error": self.dump_error,
        }

    def summary(self) -> str:
        """The report in a line."""
        name = self.function or {"step": "a step", "model": "a model"}[self.form]
        if "after" not in self.ops:
            return f"{name}: {self.fallback_kind}: {self.fallback}" if self.fallback else f"{name}: nothing to prune"
        total = {when: sum(classes.values()) for when, classes in self.flops.items()}
        parts = [f"{self.ops['before']} -> {self.ops['after']} operators"]
        for label, values in (("FLOP", total), ("B saved", self.saved_bytes)):
            unit, prefix = unit_of(max(values.values()))
            parts.append(f"{values['before'] / unit:,.2f} -> {values['after'] / unit:,.2f} {prefix}{label}")
        parts += [f"{len(self.hoisted)} values hoisted", f"{sum(kernel.count for kernel in self.kernels)} kernels"]
        return f"{name} ({self.form}): " + ", ".join(parts)

    def __str__(self) -> str:
        title = {"step": "attack step, one graph", "model": "model, backward called from outside"}[self.form]
        lines = [f"gradprune: {title}"]
        if self.fallback is not None:
            lines += _wrap(f"{self.fallback_kind}: {self.fallback}")
        if "after" in self.ops:
            lines += self._table()
        counts: Counter[str]
        for label, changes in (("removed", self.removed), ("narrowed", self.narrowed)):
            if changes:
                counts = Counter(change.operator for change in changes)
                lines += _wrap(f"{label} {counts.total()}: {_most_common(counts)}")
        if self.hoisted:
            unit, prefix = unit_of(self.hoisted_bytes)
            counts = Counter(change.operator for change in self.hoisted)
            size = f"{self.hoisted_bytes / unit:,.1f} {prefix}B"
            lines += _wrap(f"hoisted {counts.total()} ({size}): {_most_common(counts)}")
        lines += _kept(self.skipped)
        if self.weight_gradients:
            first, count = self.weight_gradients[0], len(self.weight_gradients)
            by = "an operator" if count == 1 else f"{count} operators"
            lines += _wrap(f"weight gradients computed by {by}: {first.reason}: {_place(first)}")
        if self.kernels:
            counts = Counter()
            for kernel in self.kernels:
                counts["generated" if kernel.kind == "generated" else kernel.name] += kernel.count
            lines += _wrap(f"kernels {counts.total()}: {_most_common(counts)}")
        if self.passes:
            took = (f"{record.name}\xa0{record.seconds * 1e3:.0f}\xa0ms" for record in self.passes)
            lines += _wrap("passes: " + ", ".join(took), lines=4)
        if self.check:
            lines += _wrap(self.check)
        if self.dump is not None:
            lines.append(f"  written to {self.dump}")
        if self.dump_error is not None:
            lines += _wrap(f"not written: {self.dump_error}")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        total = {when: sum(classes.values()) for when, classes in self.flops.items()}
        lines = [f"  {'':<24}{'before':>14}{'after':>14}", _row("operators", self.ops, 1, 0)]
        unit, prefix = unit_of(max(total.values()))
        for name in FLOP_CLASSES:
            of_class = {when: classes[name] for when, classes in self.flops.items()}
            if any(of_class.values()):
                lines.append(_row(f"{prefix}FLOP {name.replace('_', ' ')}", of_class, unit, 2))
        ratio = self.speedup
        lines.append(_row(f"{prefix}FLOP total", total, unit, 2, _times(ratio.get("flops"))))
        for label, size, note in (
            ("B saved for backward", self.saved_bytes, None),
            ("B peak, unfused", self.peak_bytes, None),
            ("B moved, fused", self.moved_bytes, ratio.get("bytes")),
        ):
            unit, prefix = unit_of(max(size.values()))
            lines.append(_row(prefix + label, size, unit, 1, _times(note)))
        if "predicted" in ratio:
            lines.append(f"  predicted from both{'':<33}{_times(ratio['predicted'])}, kernels being equally good")
        return lines


def _kept(skipped: Sequence[Change]) -> list[str]:
    """Lines on what was left although it computes more than is used; what has the same reason shares one."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in skipped:
        groups.setdefault((change.operator, change.reason), []).append(change)
    lines = []
    for (_, reason), changes in list(groups.items())[:KEPT_SHOWN]:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        lines += _wrap(f"kept {changes[0].operator}{more}: {reason}: {_place(changes[0])}")
    if len(groups) > KEPT_SHOWN:
        left = sum(len(changes) for changes in list(groups.values())[KEPT_SHOWN:])
        lines.append(f"  kept {left} more: to_dict()['skipped'] has them all")
    return lines


def _place(change: Change) -> str:
    """Node and ``file:line``, the file relative to the current folder where that is shorter."""
    source = change.source
    with suppress(OSError, ValueError):  # another drive, or a folder that is gone
        source = min(os.path.relpath(source), source, key=len) if source else ""
    return change.node + (f" ({source})" if source else "")


def _most_common(counts: Counter[str]) -> str:
    shown = counts.most_common(KINDS_SHOWN)
    rest = counts.total() - sum(count for _, count in shown)
    return ", ".join(f"{count}\xa0{name}" for name, count in shown) + (f", {rest}\xa0more" if rest else "")


def _wrap(text: str, lines: int = 2) -> list[str]:
    """An indented paragraph of at most so many lines, not broken at non-breaking spaces."""
    wrapped = textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=lines,
        placeholder=" ...",
    )
    return [line.replace("\xa0", " ") for line in wrapped]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def unit_of(largest: float) -> tuple[float, str]:
    """The largest decimal unit that keeps ``largest`` at or above one, and its prefix."""
    return next(
        ((unit, prefix) for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= unit), (1e3, "k")
    )


def _row(label: str, values: Mapping[str, float], unit: float, digits: int, note: str = "") -> str:
    before, after = (f"{values[when] / unit:,.{digits}f}" for when in ("before", "after"))
    return f"  {label:<24}{before:>14}{after:>14}  {note}".rstrip()
