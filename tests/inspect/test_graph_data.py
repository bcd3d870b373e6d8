"""The data of the page: totals as in the report, nodes in the modules they come from."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from capture import Graph, by_name, graphs_of, step_graphs
from torch import Tensor, nn
from zoo import ZOO

from gradprune.report.report import Report


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.norm1(self.conv1(x))))


def network() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU())
    return nn.Sequential(stem, Block(), Block(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()


INPUTS = (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.tensor([1, 3]))

Graphs = tuple[Report, Graph, Graph]


@pytest.fixture(scope="module", params=["step", "model"])
def graphs(request: pytest.FixtureRequest) -> Graphs:
    if request.param == "step":
        return step_graphs(network(), *INPUTS)
    return graphs_of(network(), INPUTS[0].clone().requires_grad_(True))


@pytest.fixture(scope="module")
def step() -> Graphs:
    return step_graphs(network(), *INPUTS)


def assert_totals(report: Report, graph: Graph, when: str) -> None:
    totals, nodes = graph["totals"], graph["nodes"]
    calls = [node for node in nodes if node["phase"] not in ("input", "output")]
    assert totals["ops"] == report.ops[when] == len(calls)
    assert totals["flops"] == report.flops[when]
    assert totals["flops"] == {
        name: sum(node.get("flops", {}).get(name, 0) for node in nodes) for name in report.flops[when]
    }
    assert totals["peak_bytes"] == report.peak_bytes[when] == max(graph["memory"])
    assert len(graph["memory"]) == len(calls)
    saved = sum(nodes[owner].get("bytes", 0) for owner, _ in graph["saved"])
    assert totals["saved_bytes"] == report.saved_bytes[when] == saved


@pytest.mark.parametrize("name", ["mobilenet", "vit", "gru", "spectral_norm"])
def test_totals_are_those_of_the_report(name: str):
    case = ZOO[name]
    x, y, _ = case.inputs()
    report, before, after = step_graphs(case.build(), x, x.clone(), y)
    assert_totals(report, before, "before")
    assert_totals(report, after, "after")


def test_is_plain_data(graphs: Graphs):
    for graph in graphs[1:]:
        assert json.loads(json.dumps(graph)) == graph


def test_edges_lead_to_earlier_nodes(graphs: Graphs):
    for graph in graphs[1:]:
        for position, node in enumerate(graph["nodes"]):
            assert all(operand < position for operand in node.get("inputs", []))


def test_saved_tensors_cross_from_forward_to_backward(graphs: Graphs):
    for graph in graphs[1:]:
        nodes = graph["nodes"]
        assert graph["saved"]
        for owner, readers in graph["saved"]:
            assert nodes[owner]["phase"] == "forward"
            assert {nodes[reader]["phase"] for reader in readers} == {"backward"}


def modules_of(graph: Graph, operator: str, phase: str) -> list[str]:
    return [n["module"] for n in by_name(graph).values() if n["op"].startswith(operator) and n["phase"] == phase]


CONVOLUTIONS = ["0.0", "1.conv1", "1.conv2", "2.conv1", "2.conv2"]


def test_forward_nodes_are_in_their_module(graphs: Graphs):
    _, before, _ = graphs
    assert modules_of(before, "aten.convolution", "forward") == CONVOLUTIONS
    assert modules_of(before, "aten.relu", "forward") == ["1.act", "2.act"]
    assert modules_of(before, "aten.addmm", "forward") == ["5"]
    kinds = {module["path"]: module["type"] for module in before["modules"]}
    assert (kinds["0.1"], kinds["1"], kinds["1.conv2"]) == ("GELU", "Block", "Conv2d")


def test_backward_nodes_are_in_the_module_of_their_forward(graphs: Graphs):
    report, before, after = graphs
    assert modules_of(before, "aten.convolution_backward", "backward") == CONVOLUTIONS[::-1]
    if report.form == "step":  # whatever a pass put in their place
        assert modules_of(after, "gradprune.packed_convolution", "backward")[-4:] == CONVOLUTIONS[::-1][1:]
    assert modules_of(before, "aten.where", "backward")[-2:] == ["2.act", "1.act"]
    erf = modules_of(before, "aten.erf", "backward")
    assert set(erf) <= {"0.1"}
    assert set(modules_of(before, "aten.max_pool2d_with_indices_backward", "backward")) <= {"3"}


def test_weights_that_are_computed_are_where_they_are_used(step: Graphs):
    _, before, _ = step
    folded = [node["module"] for node in by_name(before).values() if node["op"] == "aten.rsqrt"]
    assert folded == ["1.conv1", "2.conv1"]


def test_what_is_outside_of_the_model(step: Graphs):
    _, before, after = step
    for graph in (before, after):
        nodes = by_name(graph)
        assert {node["module"] for node in nodes.values() if node["phase"] == "input"} == {"(inputs)"}
        assert [node["module"] for node in nodes.values() if node["op"] == "aten.sign"] == ["(update)"]
        assert {n["module"] for n in nodes.values() if "log_softmax" in n["name"]} <= {"(after the model)"}
    roles = {node.get("role") for node in before["nodes"]}
    assert {"weight", "perturbation", "data", "returned", "returned, weight gradient"} <= roles


def test_weight_gradients_and_what_is_computed_ahead_are_marked(step: Graphs):
    report, before, after = step
    marked = {node["name"] for node in before["nodes"] if node.get("weight_grad")}
    assert marked
    assert marked.isdisjoint(node["name"] for node in after["nodes"])
    ahead = {node["name"] for node in after["nodes"] if node.get("prologue")}
    assert {change.node for change in report.hoisted} <= ahead
    assert all(node.get("weight_only") for node in after["nodes"] if node["name"] in ahead)


def test_source_lines_and_shapes(step: Graphs):
    _, before, _ = step
    relu: dict[str, Any] = next(node for node in before["nodes"] if node["op"] == "aten.relu")
    assert before["sources"][relu["source"]].startswith(f"{__file__}:")
    assert relu["value"] == "float32[2, 4, 4, 4]"
    assert relu["bytes"] == 2 * 4 * 4 * 4 * 4


def test_models_that_are_called_in_one_step_are_told_apart():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)

    def step(x_adv: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad((first(x_adv) * second(x_adv)).sum(), x_adv)
        return grad

    _, before, _ = graphs_of(step, torch.rand(2, 3))
    paths = [path for operator in ("aten.addmm", "aten.mm") for path in modules_of(before, operator, "forward")]
    assert paths == ["Linear 1", "Linear 2"]
