from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import backward_step, images, input_gradient, network
from torch import Tensor, nn

import gradprune

pytestmark = pytest.mark.usefixtures("no_code")


def step_report(**options: Any) -> gradprune.Report:
    step = gradprune.compile(backward_step(network()), **options)
    step(*images())
    (report,) = gradprune.reports(step)
    return report


def test_empty_before_the_first_call():
    assert gradprune.reports(gradprune.compile(backward_step(network()))) == []
    assert gradprune.reports(gradprune.accelerate(network())) == []


@pytest.mark.parametrize("compiled", [torch.compile, gradprune.compile])
def test_one_per_graph(compiled: Any):
    options = {"backend": "gradprune"} if compiled is torch.compile else {}
    step = compiled(backward_step(network()), **options)
    for _ in range(3):
        step(*images())
    assert [report.form for report in gradprune.reports(step)] == ["step"]


def test_a_recompilation_adds_one():
    step = gradprune.compile(backward_step(network()), dynamic=False)
    step(*images())
    (first,) = gradprune.reports(step)
    step(*(torch.cat([argument] * 2) for argument in images()))
    assert len(gradprune.reports(step)) == 2
    assert gradprune.reports(step)[0] is first


def test_a_graph_break_adds_one():
    def step(x: Tensor) -> Tensor:
        x = x.sin()
        print()
        return x.cos()

    compiled = gradprune.compile(step)
    compiled(torch.rand(3))
    assert len(gradprune.reports(compiled)) == 2


def test_equal_compilations_share_what_was_compiled():
    """Dynamo compiles once for both; the second call of ``torch.compile`` must not come away empty."""
    step = backward_step(network())
    first, second = (torch.compile(step, backend="gradprune") for _ in range(2))
    first(*images())
    second(*images())
    assert len(gradprune.reports(first)) == 1
    assert gradprune.reports(first) == gradprune.reports(second)


def test_other_functions_have_reports_of_their_own():
    def one(x: Tensor) -> Tensor:
        return x.sin()

    def other(x: Tensor) -> Tensor:
        return x.cos()

    compiled_one, compiled_other = gradprune.compile(one), gradprune.compile(other)
    compiled_one(torch.rand(3))
    assert [len(gradprune.reports(compiled)) for compiled in (compiled_one, compiled_other)] == [1, 0]


def test_other_options_have_reports_of_their_own():
    step = backward_step(network())
    plain, exact = gradprune.compile(step), gradprune.compile(step, exact_order=True)
    plain(*images()), exact(*images())
    (first,), (second,) = gradprune.reports(plain), gradprune.reports(exact)
    missing = {record.name for record in first.passes} - {record.name for record in second.passes}
    assert {"fold-batch-norm", "dgrad-as-convolution", "prepack-convolutions"} <= missing


@pytest.mark.parametrize("wrap", [gradprune.compile, gradprune.accelerate], ids=["compiled", "accelerated"])
def test_modules(wrap: Any):
    _, x, y = images()
    attacked = wrap(network())
    input_gradient(attacked, x, y)
    assert [report.form for report in gradprune.reports(attacked)] == ["model"]


def test_figures_of_a_step():
    report = step_report()
    convolution, linear = 2 * 2 * 4 * 16 * 27, 2 * 2 * 64 * 5
    total = convolution + linear
    assert report.flops["before"] == {"forward": total, "input_grad": total, "weight_grad": total, "other": 0}
    assert report.flops["after"] == {"forward": total, "input_grad": total, "weight_grad": 0, "other": 0}
    assert report.takes_gradient
    assert report.saved_bytes["after"] < report.saved_bytes["before"]
    assert report.removed
    assert "aten.convolution_backward" in [change.operator for change in report.narrowed]
    assert report.fallback is None


def saved_bytes(model: nn.Module) -> dict[str, int]:
    _, x, y = images()
    attacked = gradprune.compile(model)
    input_gradient(attacked, x, y)
    return gradprune.reports(attacked)[0].saved_bytes


def test_saved_bytes_of_a_model():
    after = saved_bytes(network())
    activation = 2 * 4 * 16
    assert after["after"] == activation  # the mask of the ReLU, a byte per element
    assert after["before"] >= 4 * activation  # what the ReLU returned


def test_saved_bytes_of_a_model_are_what_the_partitioner_saves():
    """The second sigmoid is computed again from the first; the graph does not know that before it is partitioned."""
    torch.manual_seed(0)
    sigmoids = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid(), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 5))
    assert saved_bytes(sigmoids)["after"] == 4 * 2 * 4 * 16


KEYS = {
    *("form", "ops", "flops", "saved_bytes", "peak_bytes"),
    *("removed", "narrowed", "skipped", "passes", "fallback"),
}


def test_dictionary():
    report = step_report()
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain.keys() >= KEYS
    for figure in ("ops", "flops", "saved_bytes", "peak_bytes"):
        assert plain[figure].keys() == {"before", "after"}
    assert plain["flops"]["before"].keys() == {"forward", "input_grad", "weight_grad", "other"}
    for change in plain["removed"] + plain["narrowed"]:
        assert change.keys() == {"node", "operator", "source", "reason"}
    for record in plain["passes"]:
        assert record.keys() == {"name", "tier", "seconds", "ops"}
        assert record["ops"].keys() == {"before", "after"}
    assert [record["name"] for record in plain["passes"]] == list(gradprune.passes.pipeline.PASS_NAMES)
    assert {record["tier"] for record in plain["passes"]} == {"exact", "reorders float"}


def test_text():
    report = step_report()
    title, *lines = str(report).splitlines()
    assert title == "gradprune: attack step, one graph"

    def row(label: str) -> list[str]:
        (line,) = (line for line in lines if label in line)
        return line.split()

    assert row("operators")[-2:] == [str(report.ops["before"]), str(report.ops["after"])]
    for label in ("FLOP forward", "FLOP input grad", "saved for backward"):
        assert row(label)
    assert float(row("FLOP weight grad")[-2]) > float(row("FLOP weight grad")[-1]) == 0
    assert row("FLOP total")[-1] == "1.50x"
    assert row("passes:")[1] == "fold-batch-norm"
    assert "compiled as captured" not in str(report)


def test_text_names_what_was_kept():
    model, (x_adv, _, y) = network(), images()

    def step(x_adv: Tensor, y: Tensor) -> Any:
        x_adv = x_adv.detach().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(model(x_adv), y), [x_adv, model[0].weight])

    compiled = gradprune.compile(step)
    compiled(x_adv, y)
    (report,) = gradprune.reports(compiled)
    text = " ".join(str(report).split())
    assert "the step returns this weight gradient" in text.partition("kept")[2]
    assert f"{Path(__file__).name}:" in text


def test_reports_go_with_what_was_compiled():
    step = gradprune.compile(backward_step(network()))
    step(*images())
    report = weakref.ref(gradprune.reports(step)[0])
    del step
    torch._dynamo.reset()
    gc.collect()
    gradprune.reports(gradprune.compile(images))  # looking at reports lets go of those that nobody can ask for
    assert report() is None
