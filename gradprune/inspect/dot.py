"""The captured graph for Graphviz, with what became of every node."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradprune.report.report import Report

NODES_DRAWN = 1500
"""Nodes beyond which Graphviz takes minutes, and nobody looks at its picture."""

PATIENCE = 60
"""Seconds until Graphviz is given up."""

_STYLES = {
    "removed": 'style="filled,dashed" fillcolor="#f4cccc"',
    "narrowed": 'style=filled fillcolor="#fff2cc"',
    "hoisted": 'style=filled fillcolor="#cfe2f3"',
    "kept": "",
}


def dot(report: Report) -> str:
    """A digraph in the DOT language: removed nodes dashed and red, narrowed or replaced ones yellow, hoisted ones blue.

    ``dot -Tsvg graph.dot -o graph.svg`` draws it.
    """
    before, after = report.graphs["before"], report.graphs.get("after")
    narrowed = {change.node for change in report.narrowed}
    hoisted = {change.node for change in report.hoisted}
    lines = ["digraph captured {", '  node [shape=box fontname="monospace" fontsize=10];']
    for name, seen in before.nodes.items():
        fate = "kept"
        if name in narrowed:
            fate = "narrowed"
        elif after is not None and name not in after.nodes:
            fate = "removed"
        elif name in hoisted:
            fate = "hoisted"
        shape = "" if seen.is_call else "shape=ellipse "
        label = json.dumps(f"{name}\n{seen.operator}", ensure_ascii=False)
        lines.append(f"  {json.dumps(name)} [label={label} {shape}{_STYLES[fate]}];")
        lines += [f"  {json.dumps(operand)} -> {json.dumps(name)};" for operand in seen.inputs]
    for position, (value, role, _) in enumerate(before.outputs):
        if value is not None:
            lines.append(f"  output{position} [label={json.dumps(f'output {position}: {role}')} shape=ellipse];")
            lines.append(f"  {json.dumps(value)} -> output{position};")
    return "\n".join([*lines, "}", ""])


def svg(text: str) -> str | None:
    """A digraph as a picture, ``None`` where Graphviz is not installed or does not manage it."""
    command = shutil.which("dot")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, "-Tsvg"], input=text, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
