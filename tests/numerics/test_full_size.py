"""Networks of full size: what a step costs, by counting operators and bytes, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    eager_saved_bytes,
    peak_allocated_bytes,
    step_by_autograd_grad,
    step_by_backward,
    timm_model,
)

import gradprune

BATCH = 4
SAVED_MIB = {
    "resnet18": 10,
    "resnet50": 38,
    "mobilenetv2_100": 24,
    "convnext_atto": 52,
    "vit_tiny_patch16_224": 70.1,
}
"""Upper bounds, in MiB, of what the forward pass hands to the backward pass in the model form."""


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(BATCH, 3, 224, 224), torch.arange(BATCH)


@pytest.mark.parametrize("name", SAVED_MIB)
def test_costs(name: str):
    model = timm_model(name)
    x, y = images()
    saved = eager_saved_bytes(model, x)
    # Folded batch norm saves nothing, and folding comes before what the report takes for the graph before.
    step = step_by_backward(model, F.cross_entropy)
    of_step = gradprune.explain(step, x, x.clone(), y, strict=True, fold_batch_norm=False)
    of_model = gradprune.explain(model, x.clone().requires_grad_(True), strict=True, fold_batch_norm=False)
    for report in (of_step, of_model):
        assert report.flops["before"]["weight_grad"] > 0
        assert report.flops["after"]["weight_grad"] == 0
        # What backward formulas make of saved tensors alone, such as the mask of a ReLU6, is made in the forward pass
        # of a model's joint graph, in one byte instead of four.
        assert report.saved_bytes["before"] == pytest.approx(saved, rel=0.01 if report is of_step else 0.25)
        assert report.saved_bytes["after"] < 0.65 * saved
        if name == "resnet50":  # convolutions are all it has, and each costs the same three times
            before, after = (sum(report.flops[when].values()) for when in ("before", "after"))
            assert before / after == pytest.approx(1.5, rel=0.02)
    assert of_step.flops == of_model.flops
    assert of_model.saved_bytes["after"] <= SAVED_MIB[name] * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_steps_and_models_need_half_the_memory_of_eager(name: str):
    model = timm_model(name)
    x, y = images()
    of_eager = peak_allocated_bytes(step_by_autograd_grad(model, F.cross_entropy), x.clone(), x, y)
    step = gradprune.compile(step_by_autograd_grad(model, F.cross_entropy))
    around_model = step_by_autograd_grad(gradprune.accelerate(model), F.cross_entropy)
    x_adv, _ = step(x.clone(), x, y)  # what the prologue needs is needed once per attack
    assert peak_allocated_bytes(step, x_adv, x, y) < 0.5 * of_eager
    assert peak_allocated_bytes(around_model, x.clone(), x, y) < 0.5 * of_eager
