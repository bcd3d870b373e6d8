"""``gradprune demo``: candidates of ``bench step`` on photographs and digits, and what they do to trained networks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.evaluation.plots import Example, save_examples
from gradprune.support.environment import environment
from gradprune.support.files import write_json, write_text
from gradprune.support.progress import stage
from gradprune.workloads.digits import train_digits
from gradprune.workloads.imagenet import efficientnet_lite0, imagenet_names, imagenet_photographs
from gradprune.workloads.mnist import load_mnist
from gradprune.workloads.networks import calibrated_resnet
from gradprune.workloads.photos import photo_batch

from . import timing
from .baselines import COMPILED_MODEL, EAGER_BACKWARD, FROZEN, GRADPRUNE, Contender, choose
from .cases import Case, MnistCnn, Workload
from .harness import Budget, configured
from .meanwhile import Meanwhile, measure_meanwhile
from .report import eps_text, failures, figure, ratio_text, share
from .step import FIGURES, Column, Comparison, Record, Reports, columns_of, measure_workload
from .store import Settings

KEYS = ("backward", "frozen", "compile-model", "gradprune")
CANDIDATES = (EAGER_BACKWARD, FROZEN, COMPILED_MODEL, GRADPRUNE)

RESNET_50 = (3, 4, 6, 3)
RESNET_14 = (1, 1, 1, 1)
CALIBRATION_PHOTOS = 24
MNIST_EPOCHS, MNIST_IMAGES = 3, 128

COLUMNS: dict[str, Column] = {
    "candidate": FIGURES["candidate"],
    "compile s": lambda one, record: figure(record.cold_seconds),
    "ms/step": lambda one, record: figure(record.median, 1e-3),
    "IQR": lambda one, record: figure(record.iqr, 1e-3),
    "vs eager": lambda one, record: ratio_text(one.ratio(record.candidate, EAGER_BACKWARD)),
    "vs frozen": lambda one, record: ratio_text(one.ratio(record.candidate, FROZEN)),
    **{name: FIGURES[name] for name in ("GFLOP", "saved MB", "gradient error", "pixels off")},
    "accuracy": lambda one, record: share(None if record.success_rate is None else 1 - record.success_rate),
}

LEGEND = """\
- compile s: seconds of the first call, with empty disk caches.
- ms/step: median over the timed attacks of attack / steps; IQR: its interquartile range, in ms.
- vs: how many times as fast, the median of the ratios within each round.
- GFLOP: convolutions and matrix products of one step.
- saved MB: alive from the forward to the backward pass of one step. The weights themselves are not counted; copies of
  them that a candidate saves are.
- gradient error: max |g - g64| / max |g64|, then the same in the Euclidean norm, against float64; the worst of two
  points. A ReLU whose input rounds to the other side of zero takes the other branch. Of the millions in a deep network
  a handful does, in eager mode too, which is enough for an error of percents.
- pixels off: share of the adversarial values that differ by more than 1e-6 from those of frozen eager. sign() makes a
  whole step of the smallest difference around zero, and what differs then grows.
- accuracy: share of the adversarial examples that are still classified as labelled."""


@dataclass
class Shown:
    """A workload of the demo, and what was measured on it.

    Attributes:
        title: What it is, for people.
        note: What the reader has to know about the network and its labels.
        work: The network and its images.
        names: What its classes are called, if it was trained to tell them apart.
        drawn: How many examples are drawn.
        keys: What is timed.
        rounds: Attacks timed per candidate, at most; ``None`` for as many as asked for.
        steps: Steps of an attack.
        records: One for each candidate.
        reports: gradprune's own reports, one for each graph it compiled.
        meanwhile: The first attacks with the option ``background``, if they were measured.
        adversarial: gradprune's adversarial examples, shaped like the images.
        weight_gradients: By candidate, how many weight gradients its attack left in ``.grad``.
    """

    title: str
    note: str
    work: Workload
    names: Sequence[str] = ()
    drawn: int = 0
    keys: Sequence[str] = KEYS
    rounds: int | None = None
    steps: int = 0
    records: list[Record] = field(default_factory=list)
    reports: Reports = field(default_factory=list)
    meanwhile: Meanwhile | None = None
    adversarial: Tensor | None = None
    weight_gradients: dict[str, int] = field(default_factory=dict)

    @property
    def comparison(self) -> Comparison:
        """What was timed."""
        return Comparison(self.records, self.work.case.name)

    @property
    def clean_accuracy(self) -> float:
        """Share of the images that are classified as labelled."""
        return timing.accuracy(self.work.model, self.work.x, self.work.y)

    def take(self, contender: Contender, adversarial: Tensor, reports: Reports) -> None:
        """What ``measure_workload`` tells of a candidate that was timed."""
        left = [parameter for parameter in contender.model.parameters() if parameter.grad is not None]
        self.weight_gradients[contender.name] = len(left)
        if contender.name == GRADPRUNE:
            self.adversarial, self.reports = adversarial, reports

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        case, one = self.work.case, self.comparison
        return {
            "title": self.title,
            "note": self.note,
            "shape": list(self.work.x.shape),
            "parameters": sum(parameter.numel() for parameter in self.work.model.parameters()),
            "eps": case.eps,
            "step_size": case.step_size,
            "steps": self.steps,
            "clean_accuracy": self.clean_accuracy,
            "candidates": [
                {
                    **asdict(record),
                    "weight_gradients": self.weight_gradients.get(record.candidate),
                    "derived": one.derived(record.candidate),
                }
                for record in self.records
            ],
            "background": asdict(self.meanwhile) if self.meanwhile else None,
            "reports": self.reports,
        }


def _workload(network: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Workload:
    """Images in a ball; gradients are checked at points in it.

    Not at other images: what the network makes of them may be far from what it was calibrated on.
    """

    def draw(shape: Any, generator: torch.Generator) -> Tensor:
        return (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)

    case = Case(network, len(x), tuple(x.shape[1:]), lambda: model, eps=eps, step_size=eps / 4, draw=draw)
    return Workload(case, model, x, y)


def photographs(batch: int, size: int, *, quick: bool) -> Shown:
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
    return Shown(
        f"{name}, {batch} photographs of {size}x{size}",
        "Random weights; labels are its own clean predictions. A step costs what it would with trained ones.",
        _workload("photographs", model, x, y, 8 / 255),
    )


def imagenet() -> Shown:
    """EfficientNet-Lite0 with trained weights, on photographs with true labels."""
    x, y = imagenet_photographs()
    return Shown(
        f"EfficientNet-Lite0, {len(x)} ImageNet photographs of {x.shape[-1]}x{x.shape[-1]}",
        "Trained weights and true labels.",
        _workload("imagenet", efficientnet_lite0(), x, y, 2 / 255),
        imagenet_names(),
        drawn=4,
        keys=("frozen", "gradprune"),
        rounds=1,
    )


def mnist(*, quick: bool) -> Shown:
    """The small network of many papers, trained on the spot, on held-out digits of MNIST."""
    data = load_mnist()
    x, y = data.test_x[:MNIST_IMAGES], data.test_y[:MNIST_IMAGES]
    return Shown(
        f"CNN on {len(x)} held-out MNIST digits",
        f"Trained on {len(data.train_x)} other digits for this run.",
        _workload("mnist", train_digits(data, MnistCnn, 1 if quick else MNIST_EPOCHS), x, y, 0.2),
        [str(digit) for digit in range(10)],
        drawn=2,
    )


def measure(steps: int, batch: int, size: int, rounds: int, *, threads: int, quick: bool) -> list[Shown]:
    """Make the workloads and measure them.

    Args:
        steps: Steps of an attack.
        batch: Photographs in a batch.
        size: Side of a photograph in pixels.
        rounds: Attacks timed per candidate.
        threads: CPU threads.
        quick: Take a smaller network for the photographs, and leave out EfficientNet.
    """
    with stage("building the network for the photographs"):
        all_shown = [photographs(batch, size, quick=quick)]
    if not quick:
        with stage("loading EfficientNet-Lite0 and its photographs"):
            all_shown.append(imagenet())
    with stage("training a network on MNIST digits"):
        all_shown.append(mnist(quick=quick))
    settings = Settings(threads=threads, steps=steps)
    with configured(settings):
        for shown in all_shown:
            shown.steps = steps
            budget = Budget(shown.rounds or rounds, float("inf"))
            candidates = choose(shown.keys, "cpu")
            shown.records = measure_workload(shown.work, candidates, settings, budget, shown.take, same=False)
        with stage("compiling in the background"):
            all_shown[-1].meanwhile = measure_meanwhile(all_shown[-1].work, settings)
    return all_shown


def write(directory: Path, measured: list[Shown], settings: Mapping[str, Any], threads: int) -> None:
    """Print the tables and write all files."""
    here = {**environment(), "threads": threads}
    print(file=sys.stderr)
    print("\n\n".join("\n".join(section(one)) for one in measured))
    parts = ["# gradprune demo", *("\n\n".join([f"## {one.title}", *section(one)[1:]]) for one in measured), LEGEND]
    parts += ["## Environment", "\n".join(f"- {key}: {value}" for key, value in here.items())]
    write_text(directory / "demo.md", "\n\n".join(parts) + "\n")
    workloads = [one.to_dict() for one in measured]
    content = {"environment": here, "settings": {**settings}, "baseline": FROZEN, "workloads": workloads}
    write_json(directory / "demo.json", content)
    save_examples(directory / "demo.png", [example for one in measured for example in examples(one)])


def section(shown: Shown) -> list[str]:
    """Title, circumstances, table, and what gradprune's own report says."""
    case, one = shown.work.case, shown.comparison
    about = f"PGD in the Linf ball, eps {eps_text(case.eps, case.eps)}, {shown.steps} steps. "
    about += f"Clean accuracy {shown.clean_accuracy:.1%}. {shown.note}"
    return [shown.title, about, *failures(one.failed), columns_of(one, COLUMNS), *_conclusions(shown)]


def _conclusions(shown: Shown) -> list[str]:
    """What is pruned, and when the compilation has paid for itself."""
    lines = []
    if len(shown.reports) != 1:
        lines.append(f"gradprune compiled {len(shown.reports)} graphs; their reports are in the JSON file.")
    for report in shown.reports if len(shown.reports) == 1 else ():
        flops, saved = report["flops"], report["saved_bytes"]
        weight = [figure(flops[when]["weight_grad"], 1e9) for when in ("before", "after")]
        alive = [figure(saved[when], 1e6) for when in ("before", "after")]
        lines.append(
            f"gradprune's report: weight gradients {weight[0]} -> {weight[1]} GFLOP, "
            f"saved for backward {alive[0]} -> {alive[1]} MB per step."
        )
        if report["fallback"]:
            lines.append(f"gradprune fell back: {report['fallback']}.")
    ours, frozen = (shown.comparison.measured.get(name) for name in (GRADPRUNE, FROZEN))
    if ours and frozen and ours.cold_seconds is not None and ours.median < frozen.median:
        steps = ours.cold_seconds / (frozen.median - ours.median)
        lines.append(f"Its compilation has paid for itself against {FROZEN} after {steps:,.0f} steps.")
    if shown.meanwhile:
        lines.append(str(shown.meanwhile))
    return lines


def examples(shown: Shown) -> list[Example]:
    """Original, adversarial example, perturbation and where it is large: of such as are fooled, if there are any."""
    work, found = shown.work, shown.adversarial
    if found is None:
        return []
    with torch.no_grad():
        before, after = (work.model(one).softmax(1).max(1) for one in (work.x, found))
    fooled = (after.indices != work.y) & (before.indices == work.y)
    chosen = torch.argsort(fooled.int(), descending=True, stable=True)[: shown.drawn].tolist()

    def read(prediction: Any, index: int) -> str:
        return f"{shown.names[prediction.indices[index]]}, {float(prediction.values[index]):.0%}"

    title = shown.title.split(",")[0].split(" on ")[0]
    return [
        Example(title, work.x[i].numpy(), found[i].numpy(), read(before, i), read(after, i), work.case.eps)
        for i in chosen
    ]
