"""What came of studies, to read: a Markdown page for each, and an index of all in a folder, as HTML and Markdown."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gradprune.support.files import write_text

from .outcome import Claim, Outcome, Picture, Table
from .study import OUTCOME

INDEX = "index"
EAGER = "-eager"
MARKS = {True: "reproduced", False: "not reproduced", None: "not tested"}
LEGEND = (
    "Numbers in parentheses are the paper's: **=** where ours is within five points of it, **≠** where it is not. A "
    "claim counts as reproduced by the criterion beside it, whatever else the numbers look like; one that is not "
    "reproduced at this scale is a finding, not a failure. [LR] is Huang, Jin, Xue, *Towards lighter adversarially "
    "robust model*; [LAB] a lab on CNNs and FGSM; [HW] a report on homework 2 of CS 771."
)


def read_outcome(folder: Path) -> Outcome | None:
    """What came of the study in a folder; ``None`` if none has ended there, or one of another version."""
    try:
        values = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        parts: Any = {
            name: [kind(**one) for one in values.pop(name)]
            for name, kind in (("claims", Claim), ("tables", Table), ("pictures", Picture))
        }
        return Outcome(**values, **parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_pages(output: Path, order: Sequence[str]) -> None:
    """Write the page of every study that has ended in a folder, and the index.

    Args:
        output: The folder, with one for each study.
        order: Names of studies, as they are to be listed.
    """
    found = {name: read_outcome(output / name) for name in (*order, *(f"{name}{EAGER}" for name in order))}
    outcomes = {name: one for name, one in found.items() if one is not None}
    for name, outcome in outcomes.items():
        write_text(output / name / f"{outcome.study}.md", f"# {outcome.title}\n\n{_markdown(outcome, '')}\n")
    shown = {
        name: outcome for name, outcome in outcomes.items() if name in order or name.removesuffix(EAGER) not in outcomes
    }
    parts = ["# gradprune study", LEGEND, _summary(outcomes)]
    parts += [f"## {outcome.title}\n\n{_markdown(outcome, f'{name}/')}" for name, outcome in shown.items()]
    write_text(output / f"{INDEX}.md", "\n\n".join(parts) + "\n")
    write_text(output / f"{INDEX}.html", _page(outcomes, shown))


# --- Markdown ---------------------------------------------------------------------------------------------------------


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _markdown(outcome: Outcome, prefix: str) -> str:
    parts = [_where(outcome), outcome.about]
    parts += [f"### Claims\n\n{_claims(outcome.claims)}"]
    parts += [f"### {table.title}\n\n{grid(table.head, table.rows)}" for table in outcome.tables]
    parts += [f"![{picture.caption}]({prefix}{picture.file})" for picture in outcome.pictures]
    return "\n\n".join(parts)


def _where(outcome: Outcome) -> str:
    how = "run eagerly, as the paper's programs do" if outcome.eager else "attacks compiled by gradprune"
    return f"Data: **{outcome.data}**; scale **{outcome.scale}**; {how}."


def _claims(claims: Sequence[Claim]) -> str:
    rows = [[one.text, one.criterion, one.found, f"**{MARKS[one.holds]}**"] for one in claims]
    lines = [["claim", "counts as reproduced if", "found", ""], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SUMMARY = (
    "study",
    "data",
    "scale",
    "reproduced",
    "seconds",
    "seconds, eager",
    "one batch attacked, times as fast",
    "graphs",
    "after a first epoch",
    "weight-gradient FLOPs",
)


def _summary_rows(outcomes: dict[str, Outcome]) -> list[list[str]]:
    rows = []
    for name, outcome in outcomes.items():
        if outcome.eager and name.removesuffix(EAGER) in outcomes:
            continue
        eager = outcome if outcome.eager else outcomes.get(f"{name}{EAGER}")
        tested = [one.holds for one in outcome.claims if one.holds is not None]
        run, pace = outcome.run, outcome.run.get("times_as_fast")
        rows.append(
            [
                outcome.study,
                outcome.data,
                outcome.scale,
                f"{sum(tested)} of {len(tested)} claims",
                "-" if outcome.eager else f"{run['seconds']:.0f}",
                "-" if eager is None or eager.scale != outcome.scale else f"{eager.run['seconds']:.0f}",
                "-" if pace is None else f"{pace:.2f}",
                *(
                    ["-"] * 3
                    if outcome.eager
                    else [
                        str(run["graphs"]),
                        str(run["graphs_after_first_epoch"]),
                        str(run["weight_gradient_flops"]),
                    ]
                ),
            ]
        )
    return rows


def _summary(outcomes: dict[str, Outcome]) -> str:
    return grid(SUMMARY, _summary_rows(outcomes))


# --- HTML -------------------------------------------------------------------------------------------------------------

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { margin-top: 2.2em; border-bottom: 2px solid #c1272d; padding-bottom: .2em; }
table { border-collapse: collapse; margin: .8em 0; font-size: 13px; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #999; } .wide td, .wide th, td:first-child, th:first-child { text-align: left; }
.yes { background: #e2f3e6; } .no { background: #fbe3e1; } .open { background: #eee; }
figure { margin: 1.2em 0; } img { max-width: 100%; } figcaption { color: #666; font-size: 13px; }
nav a { margin-right: 1.2em; }
"""


def _page(outcomes: dict[str, Outcome], shown: dict[str, Outcome]) -> str:
    links = " ".join(f'<a href="#{name}">{_text(outcome.study)}</a>' for name, outcome in shown.items())
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>gradprune study</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>gradprune study</h1><nav>{links}</nav><p>{_text(LEGEND)}</p>",
        _html_table(SUMMARY, _summary_rows(outcomes)),
        *(_section(name, outcome) for name, outcome in shown.items()),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _section(name: str, outcome: Outcome) -> str:
    parts = [
        f'<h2 id="{name}">{_text(outcome.title)}</h2>',
        f"<p>{_text(_where(outcome))}</p><p>{_text(outcome.about)}</p>",
        "<h3>Claims</h3>",
        _html_claims(outcome.claims),
    ]
    for table in outcome.tables:
        parts += [f"<h3>{_text(table.title)}</h3>", _html_table(table.head, table.rows)]
    parts += [
        f'<figure><img src="{name}/{picture.file}" alt="{_text(picture.caption)}"></figure>'
        for picture in outcome.pictures
    ]
    return "\n".join(parts)


def _html_claims(claims: Sequence[Claim]) -> str:
    css = {True: "yes", False: "no", None: "open"}
    rows = "".join(
        f'<tr class="{css[one.holds]}">'
        + "".join(f"<td>{_text(text)}</td>" for text in (one.text, one.criterion, one.found, MARKS[one.holds]))
        + "</tr>"
        for one in claims
    )
    head = "<th>claim</th><th>counts as reproduced if</th><th>found</th><th></th>"
    return f'<table class="wide"><tr>{head}</tr>{rows}</table>'


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are coloured where they agree with a paper's number, and where they do not."""

    def cell(text: str) -> str:
        css = ' class="yes"' if "(= " in text else ' class="no"' if "(≠ " in text else ""
        return f"<td{css}>{_text(text)}</td>"

    titles = "".join(f"<th>{_text(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _text(text: str) -> str:
    """A text as HTML, with the emphasis and the code that Markdown has."""
    escaped = html.escape(text)
    for mark, tag in (("**", "b"), ("*", "i"), ("`", "code")):
        pieces = escaped.split(mark)
        if len(pieces) % 2:
            escaped = "".join(f"<{tag}>{piece}</{tag}>" if place % 2 else piece for place, piece in enumerate(pieces))
    return escaped
