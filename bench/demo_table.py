"""The tables of the demo, as aligned text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .demo_candidates import EAGER, FROZEN, GRADPRUNE
from .demo_workload import Measured, Result

HEADERS = (
    "candidate",
    "compile s",
    "ms/step",
    "IQR",
    "vs eager",
    "vs frozen",
    "GFLOP",
    "saved MB",
    "grad error",
    "pixels off",
    "accuracy",
)

LEGEND = """\
- compile s: seconds of the first call; fewer when Inductor's disk cache knows the graph already.
- ms/step: median over the timed attacks of attack / steps; IQR: its interquartile range, in ms.
- vs: how many times as fast, by the medians.
- GFLOP: convolutions and matrix products of one step.
- saved MB: alive from the forward to the backward pass of one step. The weights themselves are not counted; copies of
  them that a candidate saves are.
- grad error: max |g - g64| / max |g64|, then the same in the Euclidean norm, against float64; the worse of two points.
  A ReLU whose input rounds to the other side of zero takes the other branch. Of the millions in a deep network a
  handful does, in eager mode too, which is enough for an error of percents.
- pixels off: share of values that differ by more than 1e-6 from those of frozen eager, after the first and after the
  last step. sign() makes a whole step of the smallest difference around zero, and what differs then grows.
- accuracy: share of the adversarial examples that are still classified as labelled."""


def text(measured: Measured) -> str:
    """The table of one workload with what goes above and below it, as aligned plain text."""
    rows = [HEADERS, *(_cells(measured, result) for result in measured.results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([*_above(measured), rule, lines[0], rule, *lines[1:], rule, *_below(measured)])


def document(measured: Sequence[Measured], environment: dict[str, Any]) -> str:
    """All tables in Markdown, with the environment."""
    parts = ["# gradprune demo"]
    for one in measured:
        title, *above = _above(one)
        rows = [HEADERS, ["---", *["---:"] * (len(HEADERS) - 1)], *(_cells(one, result) for result in one.results)]
        parts += [f"## {title}", " ".join(above), "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        parts += [" ".join(_below(one))]
    parts += [LEGEND, "## Environment", "\n".join(f"- {key}: {value}" for key, value in environment.items())]
    return "\n\n".join(parts) + "\n"


def _cells(measured: Measured, result: Result) -> list[str]:
    """One row."""
    first, third = result.quartiles
    return [
        result.candidate,
        "-" if result.compile_seconds is None else f"{result.compile_seconds:.1f}",
        f"{result.median * 1e3:.2f}",
        f"{(third - first) * 1e3:.2f}",
        f"{measured.speedup(result, EAGER):.2f}x",
        f"{measured.speedup(result, FROZEN):.2f}x",
        "-" if result.flops is None else _scaled(result.flops, 1e9),
        "-" if result.saved_bytes is None else _scaled(result.saved_bytes, 1e6),
        f"{result.gradient_error:.0e} / {result.gradient_error_l2:.0e}",
        f"{result.differing_first:.2%} / {result.differing_last:.2%}",
        f"{result.accuracy:.1%}",
    ]


def _scaled(value: float, unit: float) -> str:
    """Three significant digits for small figures, one decimal for large ones."""
    scaled = value / unit
    return f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.3g}"


def _above(measured: Measured) -> list[str]:
    """Title and circumstances."""
    workload = measured.workload
    eps = f"{workload.eps * 255:g}/255" if workload.eps < 0.1 else f"{workload.eps:g}"
    return [
        workload.title,
        f"PGD in the Linf ball, eps {eps}, {measured.steps} steps. Clean accuracy {measured.clean_accuracy:.1%}.",
        workload.note,
    ]


def _below(measured: Measured) -> list[str]:
    """What gradprune's own report says, and when its compilation has paid for itself."""
    lines = []
    if len(measured.reports) != 1:
        lines.append(f"gradprune compiled {len(measured.reports)} graphs; their reports are in the JSON file.")
    else:
        report = measured.reports[0]
        flops, saved = report["flops"], report["saved_bytes"]
        weight = [_scaled(flops[when]["weight_grad"], 1e9) for when in ("before", "after")]
        alive = [_scaled(saved[when], 1e6) for when in ("before", "after")]
        lines.append(
            f"gradprune's report: weight gradients {weight[0]} -> {weight[1]} GFLOP, "
            f"saved for backward {alive[0]} -> {alive[1]} MB per step."
        )
        if report["fallback"]:
            lines.append(f"gradprune fell back: {report['fallback']}.")
    ours, baseline = measured.of(GRADPRUNE), measured.of(FROZEN)
    if ours.compile_seconds is not None and ours.median < baseline.median:
        steps = ours.compile_seconds / (baseline.median - ours.median)
        lines.append(f"Its compilation has paid for itself against {FROZEN} after {steps:,.0f} steps.")
    return lines
