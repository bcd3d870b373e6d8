"""The page that shows a graph before and after the passes: one file that needs no network."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from gradprune.report.report import Report
from gradprune.support.files import write_text

TITLES = {"step": "attack step, one graph", "model": "model, backward called from outside"}
MODULES = ("figures", "data", "tree", "layout", "overview", "gpu", "toolbar", "theme", "graph", "details", "start")
"""Of the script. The first four look at no document."""

KINDS = ("removed", "narrowed", "hoisted", "skipped")


def write_page(path: Path, report: Report, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write the page of one compiled graph.

    Args:
        path: The file. It appears when it is complete, and replaces one that is there.
        report: What was done to the graph.
        before: ``graph_data`` of the graph before the passes.
        after: ``graph_data`` of the graph after them, which is that before them if nothing was done.
    """
    write_text(path, page(report, before, after))


def page(report: Report, before: dict[str, Any], after: dict[str, Any]) -> str:
    """The text of the page, see ``write_page``."""
    title = ": ".join(filter(None, [report.function, TITLES[report.form]]))
    data = {
        "title": title,
        "report": {
            figure: {when: figures.get(when, graph["totals"][figure]) for when, graph in graphs}
            for graphs in [(("before", before), ("after", after))]
            for figure, figures in (
                ("ops", report.ops),
                ("flops", report.flops),
                ("saved_bytes", report.saved_bytes),
                ("peak_bytes", report.peak_bytes),
            )
        },
        "fallback": report.fallback
        and f"{(report.fallback_kind or 'compiled as captured').capitalize()}: {report.fallback}",
        "gone": _gone(report, before, after),
        "passes": [
            {
                "name": record.name,
                "tier": record.tier.value,
                "seconds": record.seconds,
                "ops": [record.ops_before, record.ops_after],
                "changes": [
                    [kind, change.node, change.operator, change.reason]
                    for kind in KINDS
                    for change in getattr(record.result, kind)
                ],
            }
            for record in report.passes
        ],
        "before": before,
        "after": after,
    }
    parts = {
        "title": html.escape(title),
        "style": _asset("page.css"),
        "data": _in_script(data),
        "script": _script(),
    }
    text, rest = "", _asset("page.html")
    for name, part in parts.items():  # in the order of the template, so that nothing inserted is taken for a mark
        head, _, rest = rest.partition(f"@{name}@")
        text += head + part
    return text + rest


def add_emission(path: Path, emission: dict[str, Any]) -> None:
    """Have a page that ``write_page`` wrote show what the step becomes on a GPU, too.

    Args:
        path: The file. It is replaced when it is complete.
        emission: ``Emission.to_dict()``.
    """
    begin, end = '<script type="application/json" id="data">', "</script>"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    data, _, tail = rest.partition(end)  # nothing in the data ends a script
    write_text(path, f"{head}{begin}{_in_script({**json.loads(data), 'emission': emission})}{end}{tail}")


def _gone(report: Report, before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Why nodes are gone that no pass names itself."""
    names = {node["name"] for node in before["nodes"]} - {node["name"] for node in after["nodes"]}
    for record in report.passes:
        for kind in KINDS:
            names -= {change.node for change in getattr(record.result, kind)}
    known = report.graphs["before"].nodes if "before" in report.graphs else {}
    return {name: report.why(name).reason for name in sorted(names & known.keys())}


def _in_script(data: Any) -> str:
    """JSON that neither ends the script element it stands in nor opens a comment there."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _script() -> str:
    """All modules in one scope of their own, and the call that begins."""
    modules = "\n".join(_asset(f"{name}.js") for name in MODULES)
    begin = 'start(JSON.parse(document.getElementById("data").textContent));'
    return f'(() => {{\n"use strict";\n{modules}\n{begin}\n}})();'


def _asset(name: str) -> str:
    return (resources.files(__package__ or "") / "page" / name).read_text(encoding="utf-8")
