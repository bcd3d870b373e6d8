"""The captured graph for Graphviz, with what became of every node."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report

_STYLES = {
    "removed": 'style="filled,dashed" fillcolor="#f4cccc"',
    "narrowed": 'style=filled fillcolor="#fff2cc"',
    "hoisted": 'style=filled fillcolor="#cfe2f3"',
    "kept": "",
}


def dot(report: Report) -> str:
    """A digraph in the DOT language: removed nodes dashed and red, narrowed or replaced ones yellow, hoisted ones blue.

    ``dot -Tsvg graph.dot -o graph.svg`` draws it; beyond a few thousand nodes ``sfdp`` is faster.
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
