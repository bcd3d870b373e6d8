"""Graphs before and after the passes, as the page gets them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from helpers import step_by_backward
from torch import nn

import gradprune
from gradprune.compiler import pruning
from gradprune.graph.step_graph import StepGraph
from gradprune.inspect.graph_data import graph_data
from gradprune.report.report import Report

Graph = dict[str, Any]


def graphs_of(function: Any, *args: Any, **options: Any) -> tuple[Report, Graph, Graph]:
    """What ``explain`` says of a function, and the data of its graph before and after the passes."""
    found: list[Graph] = []
    run_passes = pruning.run_passes

    def spy(step_graph: StepGraph, *args: Any, **options: Any) -> Any:
        before = graph_data(step_graph)
        records = run_passes(step_graph, *args, **options)
        found.extend([before, graph_data(step_graph)])
        return records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "run_passes", spy)
        report = gradprune.explain(function, *args, strict=True, **options)
    before, after = found
    return report, before, after


def step_graphs(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Report, Graph, Graph]:
    """The same of one step that attacks ``model``; ``inputs`` are x_adv, x and y."""
    return graphs_of(step_by_backward(model, F.cross_entropy), *inputs, **options)


def by_name(graph: Graph) -> dict[str, dict[str, Any]]:
    """The nodes, with the path of their module in place of its number."""
    paths = [module["path"] for module in graph["modules"]]
    return {node["name"]: {**node, "module": paths[node["module"]]} for node in graph["nodes"]}
