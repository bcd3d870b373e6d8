"""A report as plain data from which the same report can be made, unlike that of ``Report.to_dict``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gradprune.passes.base import Change, PassResult, Tier
from gradprune.passes.pipeline import PassRecord

from .figures import Figures
from .kernels import Kernel
from .prediction import Prediction
from .report import Report
from .snapshot import NodeSummary, Snapshot


def to_data(report: Report) -> dict[str, Any]:
    """What there is to know about a compilation that is finished, counted."""
    return {
        "passes": [{**asdict(record), "tier": record.tier.value} for record in report.passes],
        "kernels": [asdict(kernel) for kernel in report.kernels],
        "figures": {when: asdict(figures) for when, figures in report.figures().items()},
        "removed_by": report._removed_by,
    }


def fill_in(report: Report, data: dict[str, Any]) -> None:
    """Make ``report`` say what the one did that ``data`` was made of."""
    report.passes = [_record(**record) for record in data["passes"]]
    report.kernels = [Kernel(**kernel) for kernel in data["kernels"]]
    report._figures = {when: _figures(**figures) for when, figures in data["figures"].items()}
    report._removed_by = data["removed_by"]


def _record(*, tier: str, result: dict[str, Any], **rest: Any) -> PassRecord:
    changes = {what: [Change(**change) for change in some] for what, some in result.items()}
    return PassRecord(tier=Tier(tier), result=PassResult(**changes), **rest)


def _figures(
    *, prediction: dict[str, Any], graph: dict[str, Any], weight_gradients: list[dict[str, Any]], **rest: Any
) -> Figures:
    nodes = {name: NodeSummary(**{**node, "inputs": tuple(node["inputs"])}) for name, node in graph["nodes"].items()}
    outputs: list[Any] = [tuple(output) for output in graph["outputs"]]
    changes = [Change(**change) for change in weight_gradients]
    return Figures(
        prediction=Prediction(**prediction), graph=Snapshot(nodes, outputs), weight_gradients=changes, **rest
    )
