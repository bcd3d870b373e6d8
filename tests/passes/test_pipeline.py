from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pass_testing import Builder, apply, aten, captured, copied, evaluate, find, random_arguments
from torch import fx, nn
from torch.testing import FileCheck

from gradprune import passes
from gradprune.errors import PassError
from gradprune.graph.cost import count_flops
from gradprune.graph.step_graph import OutputRole, StepGraph, tensor_of
from gradprune.passes.base import Change, Pass, PassResult, Stage, Tier
from gradprune.passes.pipeline import (
    PASS_NAMES,
    PIPELINE,
    PassRecord,
    count_ops,
    run_passes,
    select_passes,
)
from gradprune.passes.rewrite import LocalRewrite
from gradprune.passes.verify import Verifier

JOINT = [step for step in PIPELINE if step.stage is Stage.JOINT]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 5)),
    )


def captured_step() -> StepGraph:
    model = network()

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_(True)
        loss = model(x).square().sum()
        loss.backward()
        return x.grad, loss.detach()

    return captured(step, torch.rand(2, 3, 8, 8))


def captured_model() -> StepGraph:
    return captured(network(), torch.rand(2, 3, 8, 8, requires_grad=True))


def test_names_are_unique():
    assert len(set(PASS_NAMES)) == len(PASS_NAMES)


@pytest.mark.parametrize("step", PIPELINE, ids=lambda step: step.name)
def test_pass_is_a_value_named_after_its_file(step: Pass):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", step.name)
    if not isinstance(step, LocalRewrite):
        assert dataclasses.is_dataclass(step)
        assert type(step)() == step
        assert type(step).__dataclass_params__.frozen
    assert Path(passes.__file__).with_name(step.name.replace("-", "_") + ".py").is_file()
    assert type(step).__module__.rpartition(".")[2] == step.name.replace("-", "_")


def test_passes_that_only_remove_or_move_are_exact():
    exact = {"select-outputs", "narrow-outputs", "shape-only-operands", "early-masks", "hoist-invariants"}
    assert {step.name for step in PIPELINE if step.tier is Tier.EXACT} == exact


def test_every_pass_runs_by_default():
    assert select_passes() == PIPELINE


def test_exact_order_leaves_out_what_rounds_differently():
    assert {step.tier for step in select_passes(exact_order=True)} == {Tier.EXACT}


@pytest.mark.parametrize("name", PASS_NAMES)
def test_a_pass_is_disabled_by_its_name(name: str):
    gone = {name, *(step.name for step in PIPELINE if name in step.needs)}
    assert [step.name for step in select_passes([name])] == [step.name for step in PIPELINE if step.name not in gone]


def test_part_of_a_name_disables_nothing():
    assert select_passes(["dgrad", "outputs", "select-output"]) == PIPELINE


@pytest.mark.parametrize("step", JOINT, ids=lambda step: step.name)
def test_pass_leaves_a_graph_it_does_not_apply_to(step: Pass):
    b = Builder()
    x, buffer = b.input("x", 2, 3), b.weight("buffer", 2, 3)
    noise = b.call(aten.rand_like.default, x)
    value = b.call(aten.tanh.default, b.call(aten.mul.Tensor, x, noise))
    gradient = b.call(aten.tanh_backward.default, x, value, backward=True)
    b.call(aten.copy_.default, buffer, value)
    step_graph = b.build(value, (gradient, OutputRole.INPUT_GRAD), (None, OutputRole.UPDATE))
    applied = apply(step, step_graph)
    assert applied.result == PassResult()
    assert not applied.changed


@pytest.mark.parametrize("capture", [captured_step, captured_model])
@pytest.mark.parametrize("step", JOINT, ids=lambda step: step.name)
def test_each_pass_alone(step: Pass, capture):
    apply(step, capture())


@pytest.mark.parametrize("capture", [captured_step, captured_model])
def test_pipeline_as_a_whole(capture):
    step_graph = capture()
    original = copied(step_graph)
    assert count_flops(step_graph)["weight_grad"] > 0
    records = run_passes(step_graph, PIPELINE, verify=True)
    assert [record.name for record in records] == [step.name for step in JOINT if step_graph.form in step.forms]
    assert count_flops(step_graph)["weight_grad"] == 0
    assert count_flops(step_graph)["input_grad"] == count_flops(original)["input_grad"]
    FileCheck().check_count("convolution.default", 2, exactly=True).check_not("convolution_backward").run(
        str(step_graph.graph).replace("pack_convolution.default", "packing")
    )
    arguments = random_arguments(original)
    for new, old, role in zip(
        evaluate(step_graph, arguments), evaluate(original, arguments), step_graph.outputs, strict=True
    ):
        if role is OutputRole.WEIGHT_GRAD:
            assert new is None
        else:
            torch.testing.assert_close(new, old)


@pytest.mark.parametrize("capture", [captured_step, captured_model])
def test_second_run_changes_nothing(capture):
    step_graph = capture()
    run_passes(step_graph, PIPELINE)
    once = str(step_graph.graph)
    assert not any(record.result.changed for record in run_passes(step_graph, PIPELINE))
    assert str(step_graph.graph) == once


def test_records_follow_the_number_of_operators():
    step_graph = captured_step()
    before = count_ops(step_graph)
    seen: list[tuple[PassRecord, int]] = []
    records = run_passes(step_graph, PIPELINE, observe=lambda record: seen.append((record, count_ops(step_graph))))
    assert [record for record, _ in seen] == records
    assert [record.ops_after for record in records] == [count for _, count in seen]
    assert [record.ops_before for record in records] == [before, *(record.ops_after for record in records[:-1])]
    assert count_ops(step_graph) < before


@dataclass(frozen=True)
class Fails(Pass):
    name = "fails"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        raise KeyError("boom")


@dataclass(frozen=True)
class Negates(Pass):
    """Returns something of another shape in place of the first output."""

    name = "negates"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        value = step_graph.output_values()[0]
        assert isinstance(value, fx.Node)
        with step_graph.graph.inserting_after(value):
            total = step_graph.graph.call_function(aten.sum.default, (value,))
        total.meta["val"] = tensor_of(value).sum()
        step_graph.set_output_values([total, *step_graph.output_values()[1:]])
        return PassResult(narrowed=[Change.at(total, "out of malice")])


def test_failing_pass_is_named():
    with pytest.raises(PassError, match=r"pass 'fails' failed: KeyError\('boom'\)"):
        run_passes(captured_step(), (Fails(),))


def test_pass_that_leaves_an_invalid_graph_is_named_if_asked_to_verify():
    with pytest.raises(PassError, match=r"(?s)pass 'negates' left an invalid graph: output 0 was .*sum_default"):
        run_passes(captured_step(), (*PIPELINE, Negates()), verify=True)
    run_passes(captured_step(), (*PIPELINE, Negates()))


def test_unknown_backward_operator_in_a_step_is_kept_and_reported():
    @torch.library.custom_op("gradprune_tests::scaled", mutates_args=())
    def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * w

    @torch.library.custom_op("gradprune_tests::scaled_backward", mutates_args=())
    def scaled_backward(gy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gy * w, gy * x

    scaled.register_fake(lambda x, w: torch.empty_like(x))
    scaled_backward.register_fake(lambda gy, x, w: (torch.empty_like(x), torch.empty_like(w)))
    scaled.register_autograd(
        lambda ctx, gy: scaled_backward(gy, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.rand(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scaled(x, self.factor)

    step_graph = captured(Scale(), torch.rand(2, 3, requires_grad=True))
    records = run_passes(step_graph, PIPELINE, verify=True)
    skipped = [change for record in records for change in record.result.skipped]
    assert [change.operator for change in skipped] == ["gradprune_tests.scaled_backward"]
    assert len(find(step_graph, torch.ops.gradprune_tests.scaled_backward.default)) == 1


def test_a_valid_graph_passes_the_verifier():
    for step_graph in (captured_step(), captured_model()):
        Verifier(step_graph).check(step_graph, after="nothing")
