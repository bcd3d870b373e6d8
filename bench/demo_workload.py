"""The two networks under attack, and everything that is measured on one of them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.support.progress import counter, stage
from gradprune.workloads.digits import load_digits, train_digits
from gradprune.workloads.networks import calibrated_resnet
from gradprune.workloads.photos import photo_batch

from . import timing as figures
from .attack_step import attack
from .demo_candidates import EAGER, FROZEN, GRADPRUNE, INDUCTOR, Candidate, candidates

SEED = 0
RESNET_50 = (3, 4, 6, 3)
RESNET_14 = (1, 1, 1, 1)
CALIBRATION_PHOTOS = 24


@dataclass(frozen=True)
class Workload:
    """A network, images and a ball to attack it in.

    Attributes:
        title: What it is, for people.
        model: The network, in evaluation mode.
        x: Images ``(N, C, H, W)`` in [0, 1].
        y: Labels ``(N,)``.
        eps: Radius of the Linf ball.
        step_size: Length of a step.
        note: What the reader has to know about the network and its labels.
    """

    title: str
    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    step_size: float
    note: str


@dataclass(frozen=True)
class Result:
    """What was measured of one candidate on one workload.

    Attributes:
        candidate: Its name.
        compile_seconds: Duration of its first call, ``None`` if it does not compile.
        step_seconds: For every round, the seconds of the attack divided by its steps.
        flops: FLOPs of the convolutions and matrix products of a step, ``None`` if they cannot be counted.
        saved_bytes: Bytes alive from the forward to the backward pass, ``None`` if they cannot be counted.
        gradient_error: Error of the input gradient against float64: the largest, relative to the largest value.
        gradient_error_l2: The same in the Euclidean norm.
        differing_first: Share of the values of ``x_adv`` that are not those of frozen eager, after the first step.
        differing_last: The same after the last step.
        accuracy: Share of the adversarial examples that are still classified as labelled.
        weight_gradients: How many weight gradients the attack left in ``.grad``.
    """

    candidate: str
    compile_seconds: float | None
    step_seconds: list[float]
    flops: int | None
    saved_bytes: int | None
    gradient_error: float
    gradient_error_l2: float
    differing_first: float
    differing_last: float
    accuracy: float
    weight_gradients: int

    @property
    def median(self) -> float:
        """Median of the seconds per step."""
        return statistics.median(self.step_seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds per step."""
        if len(self.step_seconds) == 1:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.step_seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Measured:
    """A workload and what was measured on it.

    Attributes:
        workload: What was attacked.
        steps: Steps of an attack.
        clean_accuracy: Share of the clean images that are classified as labelled.
        results: One for each candidate, in the order of the tables.
        reports: gradprune's own reports, one for each graph it compiled.
        adversarial: gradprune's adversarial examples, shaped like the images.
    """

    workload: Workload
    steps: int
    clean_accuracy: float
    results: list[Result]
    reports: list[dict[str, Any]]
    adversarial: Tensor

    def of(self, name: str) -> Result:
        """The result of the candidate called ``name``."""
        return next(result for result in self.results if result.candidate == name)

    def speedup(self, result: Result, baseline: str) -> float:
        """How many times as fast as ``baseline`` a step is, by the medians."""
        return self.of(baseline).median / result.median

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        workload = self.workload
        return {
            "title": workload.title,
            "note": workload.note,
            "shape": list(workload.x.shape),
            "parameters": sum(parameter.numel() for parameter in workload.model.parameters()),
            "eps": workload.eps,
            "step_size": workload.step_size,
            "steps": self.steps,
            "clean_accuracy": self.clean_accuracy,
            "candidates": [
                {
                    **dataclasses.asdict(result),
                    "median_seconds": result.median,
                    "quartile_seconds": list(result.quartiles),
                    "speedup_over_eager": self.speedup(result, EAGER),
                    "speedup_over_frozen_eager": self.speedup(result, FROZEN),
                }
                for result in self.results
            ],
            "reports": self.reports,
        }


def photo_workload(batch: int, size: int, *, quick: bool) -> Workload:
    """A ResNet with random weights, on photographs.

    Args:
        batch: How many photographs.
        size: Their side in pixels.
        quick: Take a ResNet of one block per stage instead of ResNet-50.
    """
    blocks, name = (RESNET_14, "ResNet-14") if quick else (RESNET_50, "ResNet-50")
    model = calibrated_resnet(blocks, photo_batch(CALIBRATION_PHOTOS, size))
    x = photo_batch(batch, size)
    with torch.no_grad():
        y = model(x).argmax(1)
    return Workload(
        title=f"{name}, {batch} photographs of {size}x{size}",
        model=model,
        x=x,
        y=y,
        eps=8 / 255,
        step_size=2 / 255,
        note="Random weights; labels are its own clean predictions. A step costs what it would with trained ones.",
    )


def digits_workload() -> Workload:
    """A small network trained on the spot, on all held-out digits at once."""
    digits = load_digits()
    return Workload(
        title=f"CNN on {len(digits.test_x)} held-out digits of 8x8",
        model=train_digits(digits),
        x=digits.test_x,
        y=digits.test_y,
        eps=0.2,
        step_size=0.05,
        note=f"Trained on {len(digits.train_x)} other digits for this run.",
    )


def measure(workload: Workload, steps: int, rounds: int) -> Measured:
    """Run all candidates on one workload.

    Args:
        workload: What to attack; its model is left as it is.
        steps: Steps of an attack.
        rounds: Attacks timed per candidate.
    """
    # The candidates of all workloads share their code. Without this, the second workload would count as a second shape
    # of the first one's step and be compiled for shapes that vary.
    torch.compiler.reset()
    x, y = workload.x, workload.y
    contenders = candidates(workload.model, workload.eps, workload.step_size)
    compile_seconds = {contender.name: _warm_up(contender, workload) for contender in contenders}
    with stage("comparing gradients with float64"):
        errors = _gradient_errors(contenders, workload)
    with counter(f"timing {workload.title}", rounds * len(contenders)) as bar:
        seconds = figures.time_attacks(contenders, x, y, steps, rounds, bar.update)
    first, adversarial, left_behind = {}, {}, {}
    for contender in contenders:
        contender.clear_gradients()
        first[contender.name] = attack(contender.step, x, y, steps=1).detach()
        adversarial[contender.name] = attack(contender.step, x, y, steps).detach()
        left_behind[contender.name] = sum(p.grad is not None for p in contender.model.parameters())
    reports = next(contender for contender in contenders if contender.name == GRADPRUNE).reports()
    results = []
    for contender in contenders:
        flops, saved = _counted(contender, workload, reports)
        results.append(
            Result(
                candidate=contender.name,
                compile_seconds=compile_seconds[contender.name],
                step_seconds=seconds[contender.name],
                flops=flops,
                saved_bytes=saved,
                gradient_error=max(error for error, _ in errors[contender.name]),
                gradient_error_l2=max(error for _, error in errors[contender.name]),
                differing_first=figures.differing_share(first[contender.name], first[FROZEN]),
                differing_last=figures.differing_share(adversarial[contender.name], adversarial[FROZEN]),
                accuracy=figures.accuracy(workload.model, adversarial[contender.name], y),
                weight_gradients=left_behind[contender.name],
            )
        )
    clean = figures.accuracy(workload.model, x, y)
    return Measured(workload, steps, clean, results, reports, adversarial[GRADPRUNE])


def _warm_up(contender: Candidate, workload: Workload) -> float | None:
    """Make the first calls of a candidate; the seconds of the very first one if that compiled something."""
    doing = "compiling" if contender.compiled else "warming up"
    with stage(f"{doing} {contender.name}"):
        started = time.perf_counter()
        contender.step(workload.x.clone(), workload.x, workload.y)
        seconds = time.perf_counter() - started
        # Two steps: the second is given what the first returned, as in the attack that is timed.
        attack(contender.step, workload.x, workload.y, steps=2)
    return seconds if contender.compiled else None


def _gradient_errors(contenders: list[Candidate], workload: Workload) -> dict[str, list[tuple[float, float]]]:
    """Relative gradient errors of every candidate, largest and Euclidean, at two points inside the ball.

    Two points, because a compiled step that ignored ``x_adv`` could be right about one. Neither is the clean images:
    in a flat piece of sky the max pool ties, and which of the equally right gradients comes out is then a matter of
    rounding.
    """
    x, y = workload.x, workload.y
    generator = torch.Generator().manual_seed(SEED)
    errors: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for _ in range(2):
        noise = torch.rand(x.shape, generator=generator) * 2 - 1
        x_adv = (x + workload.eps * noise).clamp(0, 1)
        exact = figures.float64_gradient(workload.model, x_adv, x, y)
        for contender in contenders:
            _, gradient = contender.step(x_adv, x, y)
            errors[contender.name].append(figures.relative_errors(gradient, exact))
    return errors


def _counted(contender: Candidate, workload: Workload, reports: list[dict[str, Any]]) -> tuple[int | None, int | None]:
    """FLOPs and saved bytes of a step, each ``None`` where there is no honest way to count."""
    x_adv, x, y = workload.x.clone(), workload.x, workload.y
    if contender.name == GRADPRUNE:
        # More than one graph means a break or a recompilation; then a sum would not be the figure of one step.
        if len(reports) != 1:
            return None, None
        after = reports[0]["flops"]["after"]
        return sum(after[part] for part in ("forward", "input_grad", "weight_grad")), reports[0]["saved_bytes"]["after"]
    saved = figures.saved_bytes(contender.step, contender.model, x_adv, x, y)
    if contender.name == INDUCTOR:
        return None, saved  # the counter sees operators, and generated kernels are none
    return figures.flops(contender.step, x_adv, x, y), saved
