"""Accuracy tables, as aligned text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from gradprune.attacks.registry import ATTACKS, CLEAN

from .records import Record
from .run import TOP

LEGEND = """\
- robust: share of the samples that the model classifies as labelled both before and after the attack.
- accuracy: share of the adversarial examples that it classifies as labelled; top-5: whose label is among the five
  largest logits; target: that are taken for the class the attack aims at.
- median, largest: norm of the perturbations that changed a right answer into a wrong one.
- seconds: of the attack, compilation included, summed over processes."""


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by what they attack, under a title for each, and in the order of tables."""
    by_context: dict[str, list[Record]] = {}
    for record in sorted(records, key=order):
        by_context.setdefault(record.context, []).append(record)
    return {_title(context, group[0]): group for context, group in by_context.items()}


def text(records: Sequence[Record]) -> str:
    """All tables, for a terminal."""
    parts = []
    for title, group in groups(records).items():
        lines = aligned(_rows(group))
        rule = "-" * len(lines[0])
        parts.append("\n".join([title, rule, lines[0], rule, *lines[1:], rule]))
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of one length as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def document(records: Sequence[Record]) -> str:
    """All tables, in Markdown."""
    parts = ["# Accuracy under attack"]
    for title, group in groups(records).items():
        header, *rows = _rows(group)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(row)} |" for row in lines)]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def eps_text(eps: float | None) -> str:
    """A radius as people write it: small ones in 255ths where that is a whole number."""
    if eps is None:
        return "-"
    parts = eps * 255
    return f"{parts:.0f}/255" if 0 < eps < 0.1 and abs(parts - round(parts)) < 1e-6 else f"{eps:.4g}"


def _title(context: str, record: Record) -> str:
    # Two models of one name are told apart by the hash.
    return f"{record.model} on {record.samples:,} samples of {record.data} ({context[:6]})"


def order(record: Record) -> tuple[object, ...]:
    """What tables are sorted by."""
    names = [CLEAN, *ATTACKS]
    name = record.label.split(",")[0]
    place = names.index(name) if name in names else len(names)
    return (
        record.model,
        record.data,
        record.context,
        place,
        record.norm,
        record.label,
        record.steps or 0,
        record.eps or 0,
    )


def _rows(group: Sequence[Record]) -> list[list[str]]:
    """Header and rows; columns that say nothing are left out."""
    columns = [
        "attack",
        "norm",
        "eps",
        "steps",
        "robust",
        "accuracy",
        "top-5",
        "target",
        "median",
        "largest",
        "seconds",
    ]
    rows = []
    for one in group:
        is_clean, changed = one.label == CLEAN, one.perturbation
        rows.append(
            [
                one.label,
                "-" if is_clean else one.norm,
                "0" if is_clean else eps_text(one.eps),
                "-" if one.steps is None else str(one.steps),
                f"{one.robust_accuracy:.2%}",
                f"{one.accuracy:.2%}",
                f"{one.top5:.2%}" if one.classes > 2 * TOP else "-",
                "-" if one.target_rate is None else f"{one.target_rate:.2%}",
                "-" if changed is None else f"{changed['median']:.4g}",
                "-" if changed is None else f"{changed['max']:.4g}",
                "-" if is_clean else f"{one.seconds:.{1 if one.seconds >= 10 else 2}f}",
            ]
        )
    used = [place for place, _ in enumerate(columns) if any(row[place] != "-" for row in rows)]
    return [[row[place] for place in used] for row in [columns, *rows]]
