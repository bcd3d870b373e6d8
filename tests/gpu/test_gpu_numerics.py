"""Gradients of small networks in every precision a GPU computes in, beside eager in the same one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from gpu_testing import STRICT, step_of
from helpers import update
from torch import Tensor
from zoo import ZOO, Network

import gradprune
from gradprune.ops.kernel_choice import not_measuring

BATCH = 6

NETWORKS = (
    "resnet_basic",
    "resnet_bottleneck",
    "densenet",
    "mobilenet",
    "convnext",
    "unet",
    "vit",
    "bert",
    "conv_1d",
    "instance_norm",
)


@dataclass(frozen=True)
class Precision:
    """What a model is computed in.

    Attributes:
        name: Of the precision.
        floor: Error that is allowed however exact eager is.
        autocast: Type to run the model in.
        tf32: Whether products of float32 are rounded to TF32; a CPU does not know of it.
    """

    name: str
    floor: float
    autocast: torch.dtype | None = None
    tf32: bool = False

    def __str__(self) -> str:
        return self.name


PRECISIONS = (
    Precision("fp32", 1e-5),
    Precision("tf32", 5e-3, tf32=True),
    Precision("fp16", 5e-3, torch.float16),
    Precision("bf16", 4e-2, torch.bfloat16),
)

FACTOR = 4
"""How many times the error of eager in the same precision is allowed, beyond the floor."""


def typical_error(gradient: Tensor, exact: Tensor) -> float:
    """Median over the samples of the distance in the Euclidean norm, relative to the exact gradient.

    In half precision a ReLU or a maximum whose inputs round to the other side moves the gradient of a sample by a tenth
    and more, in eager as well, but not those of most samples. NaN in one sample is NaN in all.
    """
    assert gradient.shape == exact.shape
    ours, exact = gradient.detach().double().cpu().flatten(1), exact.flatten(1)
    errors = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    return float(errors.median())


def check(network: Network, precision: Precision, device: torch.device, form: str) -> None:
    """The gradient is as close to that in float64 as eager's is, at two iterates, and the update follows it."""
    if precision.tf32:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    model = network.build().to(device)
    x, y, context = network.inputs(BATCH)
    exact = step_of(copy.deepcopy(model).cpu().double(), network.loss)
    eager = step_of(model, network.loss, precision.autocast)
    if form == "step":
        compiled = gradprune.compile(step_of(model, network.loss, precision.autocast), **STRICT)
        step, reported = compiled, compiled
    else:
        reported = gradprune.accelerate(model, **STRICT)
        step = step_of(reported, network.loss, precision.autocast)
    on_device = [tensor.to(device) for tensor in (x, y, *context)]
    x_adv = on_device[0] + 0.01
    for _ in range(2):
        _, reference = exact(x_adv.cpu().double(), x.double(), y, *(one.double() for one in context))
        moved, gradient = step(x_adv, *on_device)
        assert gradient.dtype == torch.float32
        allowed = FACTOR * typical_error(eager(x_adv, *on_device)[1], reference) + precision.floor
        assert typical_error(gradient, reference) <= allowed
        torch.testing.assert_close(moved, update(x_adv, on_device[0], gradient))
        x_adv = moved
    for report in gradprune.reports(reported):
        assert report.fallback is None
        assert report.flops["after"]["weight_grad"] == 0


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_step(name: str, precision: Precision, device: torch.device):
    check(ZOO[name], precision, device, "step")


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
@pytest.mark.parametrize("name", ["resnet_bottleneck", "mobilenet", "vit"])
def test_model(name: str, precision: Precision, device: torch.device):
    check(ZOO[name], precision, device, "model")


@pytest.mark.parametrize("precision", PRECISIONS[:2], ids=str)
@pytest.mark.parametrize("name", ["resnet_basic", "vit", "bert"])
def test_what_is_taken_where_it_is_faster(name: str, precision: Precision, device: torch.device):
    with not_measuring(assumed=True):
        check(ZOO[name], precision, device, "step")


def test_a_wrong_gradient_is_not_allowed_for(device: torch.device):
    """Turning the sign of one filter costs more than twice of what is allowed beyond the error of eager."""
    network = ZOO["resnet_basic"]
    model = network.build()
    x, y, _ = network.inputs(BATCH)
    reference = step_of(copy.deepcopy(model).double(), network.loss)(x.double(), x.double(), y)[1]
    with torch.no_grad():
        model[0].weight[0].neg_()
    changed = step_of(model.to(device), network.loss)(x.to(device), x.to(device), y.to(device))[1]
    assert typical_error(changed, reference) > 2 * max(precision.floor for precision in PRECISIONS)
