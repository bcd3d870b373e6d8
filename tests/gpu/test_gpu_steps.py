"""What a step is on a GPU: its layouts, streams, CUDA graphs, waits, launches and memory."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from gpu_testing import (
    TOLERANCE,
    Network,
    Subject,
    error,
    images,
    new_steps,
    peak_bytes,
    side_stream,
    step_of,
    traced_step_of,
    wait,
    without_buffers,
)
from helpers import update
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gradprune

CUDA_GRAPHS = {"mode": "reduce-overhead"}


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_last", [False, True], ids=["weights contiguous", "weights channels last"])
@pytest.mark.parametrize("images_last", [False, True], ids=["images contiguous", "images channels last"])
def test_channels_last(images_last: bool, weights_last: bool, device: torch.device):
    last, contiguous = torch.channels_last, torch.contiguous_format
    model = Network().to(device).to(memory_format=last if weights_last else contiguous)
    x_adv, x, y = images(device)
    if images_last:
        x_adv, x = x_adv.to(memory_format=last), x.to(memory_format=last)
    subject = Subject(model)
    for _ in range(3):
        x_adv, _ = subject(x_adv, x, y)


def test_gradients_of_a_model_have_the_strides_of_eager(device: torch.device):
    model = Network().to(device)
    accelerated = gradprune.accelerate(model)
    for layout in (torch.contiguous_format, torch.channels_last):
        gradients = []
        for one in (model, accelerated):
            x = images(device)[1].to(memory_format=layout).requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(one(x), images(device)[2]), x)
            gradients.append(gradient)
        assert gradients[1].stride() == gradients[0].stride()
        assert error(gradients[1], gradients[0]) < TOLERANCE


# --- Streams ----------------------------------------------------------------------------------------------------------


def test_values_made_on_one_stream_are_used_on_another(device: torch.device):
    subject = Subject(Network(64, 32).to(device))
    x_adv, x, y = images(device, 16, 32)
    x_adv, _ = subject(x_adv, x, y)
    wait(device)
    for _ in range(3):
        with torch.no_grad():  # the prologue runs on this stream
            for parameter in subject.model.parameters():
                parameter.mul_(1.1)
        expected = subject.eager(x_adv, x, y)
        wait(device)
        moved, first = subject.step(x_adv, x, y)
        with side_stream(device):
            if device.type == "cuda":
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            _, second = subject.step(x_adv, x, y)
        wait(device)
        assert error(first, expected[1]) < TOLERANCE
        assert error(second, expected[1]) < TOLERANCE
        x_adv = moved


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_outputs_of_recorded_steps_outlive_the_next_ones(kernels: None, device: torch.device):
    subject = Subject(Network().to(device), **CUDA_GRAPHS)
    x_adv, x, y = images(device)
    kept = []
    for _ in range(6):
        before = x_adv
        x_adv, gradient = subject.step(before, x, y)
        kept.append((before, x_adv, gradient))
    for before, moved, gradient in kept:
        assert error(gradient, subject.eager(before, x, y)[1]) < TOLERANCE
        torch.testing.assert_close(moved, update(before, x, gradient))


def test_recorded_steps_see_weights_that_change(kernels: None, device: torch.device):
    subject = Subject(Network().to(device), **CUDA_GRAPHS)
    start, x, y = images(device)
    for _ in range(3):
        x_adv = start
        for _ in range(3):
            x_adv, _ = subject(x_adv, x, y)
        with torch.no_grad():
            for parameter in subject.model.parameters():
                parameter.mul_(1.2)


def test_steps_are_recorded(gpu: torch.device):
    step = gradprune.compile(traced_step_of(Network().to(gpu)), **CUDA_GRAPHS)
    x_adv, x, y = images(gpu)
    for _ in range(4):
        x_adv, _ = step(x_adv, x, y)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(x_adv, x, y)
        wait(gpu)
    assert sum("cudaGraphLaunch" in event.name for event in profiler.events()) == 1


# --- Waits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Network, without_buffers])
def test_no_wait_in_mid_attack(make: type[Network], gpu: torch.device):
    """But for the event of the comparison of buffers, of which ``set_sync_debug_mode`` knows nothing."""
    step = gradprune.compile(traced_step_of(make().to(gpu)), check="never")
    x_adv, x, y = images(gpu)
    for _ in range(3):
        x_adv, _ = step(x_adv, x, y)
    wait(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            x_adv, _ = step(x_adv, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x_adv).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_waits_of_an_attack_do_not_grow_with_its_steps(norm: str, gpu: torch.device):
    from gradprune.attacks import PGD

    model, (_, x, y) = Network().to(gpu), images(gpu)
    counts = []
    for steps in (2, 2, 12):  # the first compiles
        attack = PGD(norm=norm, eps=0.5, step_size=0.1, steps=steps, seed=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                attack(model, x, y)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(one.message) for one in caught))
    assert counts[2] == counts[1]


# --- Launches ---------------------------------------------------------------------------------------------------------


def test_generated_kernels_are_launched_as_often_as_the_report_says(gpu: torch.device):
    subject = Subject(without_buffers().to(gpu), traced_step_of)
    x_adv, x, y = images(gpu)
    for _ in range(3):
        x_adv, _ = subject(x_adv, x, y)
    wait(gpu)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        subject.step(x_adv, x, y)
        wait(gpu)
    launched = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    generated = [name for name in launched if name.startswith("triton_")]
    told = [kernel for kernel in subject.report()["kernels"] if kernel["part"] == "step"]
    assert len(generated) == sum(kernel["count"] for kernel in told if kernel["kind"] == "generated")
    for kernel in told:
        if kernel["kind"] == "generated":
            assert generated.count(kernel["name"]) == kernel["count"]


def test_the_report_names_kernels(kernels: None, device: torch.device):
    subject = Subject(Network().to(device), traced_step_of)
    subject(*images(device))
    told = subject.report()["kernels"]
    assert {kernel["kind"] for kernel in told} == {"generated", "external"}
    assert all(kernel["count"] > 0 for kernel in told)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_a_step_holds_less_than_eager(kernels: None, device: torch.device):
    # On a GPU so large that what cuDNN works in does not count.
    width, size, batch = (64, 64, 64) if device.type == "cuda" else (32, 32, 8)
    model, (x_adv, x, y) = Network(width, size).to(device), images(device, batch, size)
    frozen = step_of(copy.deepcopy(model).requires_grad_(False))
    compiled = gradprune.compile(traced_step_of(model), check="never")
    held = peak_bytes(device, frozen, x_adv, x, y)
    assert 0 < peak_bytes(device, compiled, x_adv, x, y) < 0.8 * held


def test_nothing_is_held_from_step_to_step(gpu: torch.device):
    subject = Subject(Network(32, 32).to(gpu))
    x_adv, x, y = images(gpu, 8, 32)
    held = []
    for _ in range(8):
        x_adv, _ = subject(x_adv, x, y)
        wait(gpu)
        held.append(torch.cuda.memory_allocated(gpu))
    assert held[-1] <= held[2]


def test_new_values_take_the_memory_of_the_last_ones(device: torch.device):
    with new_steps() as steps:
        subject = Subject(Network().to(device))
        start, x, y = images(device)
        subject(start, x, y)
    (step,) = steps
    assert step.refreshes == 1
    addresses = [value.data_ptr() for value in step._values if not value.is_mkldnn]
    for expected in (2, 3):
        with torch.no_grad():
            subject.model.conv.weight.mul_(1.5)
        subject(start, x, y)
        assert step.refreshes == expected
        if device.type == "cuda":
            assert [value.data_ptr() for value in step._values] == addresses
