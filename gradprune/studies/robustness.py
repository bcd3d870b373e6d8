"""PGD at the least likely class, and training against it, on networks for photographs [HW]."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradprune
from gradprune.attacks import PGD
from gradprune.errors import OptionError, unknown
from gradprune.evaluation.plots import Example, draw_examples
from gradprune.runtime.functions import Functions
from gradprune.runtime.guard import unchanged
from gradprune.workloads.data_sets import DIGITS
from gradprune.workloads.models import Normalized, load_checkpoint

from .context import Context, ratio_of_seconds, seconds_of
from .convolution import UnfoldConv2d, UnfoldConvolution
from .data import MNIST, MNIST_5K, Images, load_images, photograph_crops
from .figures import finish, panels, percent
from .outcome import Claim, Outcome, Picture, Table
from .records import Figures
from .study import Study
from .training import objective_of, seeded, train
from .vision import MEAN, NETWORKS, STD, SimpleNet, build
from .written import as_written

EPS = 8 / 255
ATTACKS = {
    "PGD-5": (5, EPS),
    "PGD-10": (10, EPS),
    "PGD-20": (20, EPS),
    "eps .015": (10, 0.015),
    "eps .046": (10, 0.046),
}
"""Steps and eps; a step is a tenth of eps, as the paper's of 10 steps."""
NORMAL, ADVERSARIAL = "normal", "3-step PGD"
PAPERS = {
    NORMAL: {"clean": (0.4382, 0.7148), "PGD-10": (0.1489, 0.4099)},
    ADVERSARIAL: {"clean": (0.4721, 0.7315), "PGD-10": (0.3145, 0.5872)},
}
"""Top-1 and top-5, of 100 classes of MiniPlaces: not to be met on other data."""
PAPERS_COSTS = {"attack": 12.0, "training": 3.2}
TOLERANCE = 1e-10
AHEAD = 0.1
"""Of accuracy, by adversarial training."""
RESNET18 = "resnet18"
COLORS = {NORMAL: "#7f9fbf", ADVERSARIAL: "#c1272d"}


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Attributes:
        size: Side of the photographs.
        classes: Of the rehearsal.
        crops: Of each class in the rehearsal, to train on and to test on.
        archs: The networks that run if none are asked for.
        width: Of the networks.
        epochs: Of both trainings.
        batch: Samples in a batch.
        train: Images to train on, at most; all are held in memory.
        test: Images to test on, at most.
    """

    size: int = 128
    classes: int = 20
    crops: tuple[int, int] = (100, 25)
    archs: tuple[str, ...] = ("simple", "custom", "custom2", "vit")
    width: int = 32
    epochs: int = 60
    batch: int = 100
    train: int = 20_000
    test: int = 2000


class RobustnessStudy(Study):
    """An own convolution; PGD at the least likely class in steps and eps; adversarial training, and what it costs."""

    name = "robustness"
    title = "Networks for photographs under PGD [HW]"
    scales = {  # noqa: RUF012
        "full": Scale(),
        "small": Scale(64, 10, (40, 10), ("simple", "custom2", "vit"), 16, epochs=15, batch=50),
        "toy": Scale(32, 2, (8, 4), ("simple", "vit"), 4, epochs=1, batch=8),
    }

    def load(self, name: str | None, root: Path, scale: Scale) -> Images:
        """Photographs: what was asked for, unless that is digits, or a rehearsal."""
        if name in (None, MNIST, MNIST_5K, DIGITS):
            return photograph_crops(scale.classes, *scale.crops, scale.size)
        images = load_images(name, root, scale.size, (scale.train, scale.test))
        if images.shape != (3, scale.size, scale.size):
            raise OptionError(f"--data {name} has images {images.shape}: robustness needs photographs in colour")
        return images

    def measure(self, context: Context, scale: Scale) -> Outcome:
        """See ``Study.measure``."""
        archs = context.options.arch or scale.archs
        for arch in archs:
            if arch not in NETWORKS:
                raise OptionError(unknown("network", arch, NETWORKS))
        if context.options.checkpoint is not None and RESNET18 not in archs:
            archs = (*archs, RESNET18)
        own = context.cell("own convolution", lambda: own_convolution(context, scale))
        cells = {}
        for arch in archs:
            net = self._network(context, scale, arch)
            # One network for both trainings, so that attacks on it are compiled once.
            initial = copy.deepcopy(net.state_dict())
            for training in (NORMAL, ADVERSARIAL):
                net.load_state_dict(initial)
                cells[arch, training] = self._cell(context, scale, net, arch, training)
        images = context.images
        about = (
            f"{images.classes} classes of {scale.size} x {scale.size} pixels, {len(images.train_x):,} images to train "
            f"on, {len(images.test_x):,} to test on, {scale.epochs} epochs of AdamW in batches of {scale.batch}. PGD "
            "aims at the class that the network thinks least likely, in steps of a tenth of eps from the image itself; "
            "training takes 3 steps of 0.01 at eps 8/255. Photographs are in [0, 1], where eps counts, and are "
            "normalised inside the networks. The paper's numbers are of 100 classes of MiniPlaces."
            + (" **This is a rehearsal on crops of few photographs, no result.**" if "rehearsal" in images.name else "")
        )
        return self.outcome(
            context,
            about,
            self._claims(own, cells),
            [*self._tables(cells), self._costs(context, cells)],
            [self._picture(context, cells), *self._panels(context, cells)],
        )

    # --- Measuring ----------------------------------------------------------------------------------------------------

    def _network(self, context: Context, scale: Scale, arch: str) -> nn.Module:
        seed = seeded(context.options.seed, arch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build(arch, context.images.classes, scale.size, scale.width)
        if arch == RESNET18 and context.options.checkpoint is not None:
            load_backbone(net, context.options.checkpoint)
        return net

    def _cell(self, context: Context, scale: Scale, net: nn.Module, arch: str, training: str) -> Figures:
        images, key = context.images, f"{arch}, {training} training"
        attack = least_likely(3, EPS, step_size=0.01)

        def measure() -> Figures:
            data = (images.train_x, images.train_y)
            batch = min(scale.batch, len(images.test_x))
            objective = objective_of(context, None if training == NORMAL else attack)
            optimizer = optimizer_of(net)
            seconds = seconds_of(
                lambda: train(context, key, net, objective, optimizer, data, epochs=scale.epochs, batch=batch)
            )
            figures: Figures = {"parameters": sum(parameter.numel() for parameter in net.parameters())}
            x, y = images.test_x, images.test_y
            figures["clean"] = context.top(net, x, y, None, batch)
            for name, (steps, eps) in ATTACKS.items():
                figures[name] = context.top(net, x, y, context.attack(least_likely(steps, eps)), batch)
            figures["examples"] = self._examples(context, net, batch) if training == NORMAL else []
            context.note(training_seconds=seconds)
            self._note_costs(context, net, x[:batch], y[:batch], pace=arch != RESNET18 and training == NORMAL)
            return figures

        return context.cell(key, measure)

    def _note_costs(self, context: Context, net: nn.Module, x: Tensor, y: Tensor, *, pace: bool) -> None:
        """Note what PGD-10 takes beside inference, and the bytes of a step."""
        attack, runtime = context.attack(least_likely(10, EPS)), context.runtime(len(x))

        @torch.no_grad()
        def infer() -> None:
            net(x)

        context.note(attack_over_inference=ratio_of_seconds(lambda: attack(net, x, y, runtime=runtime), infer))
        if pace and not context.options.eager:
            written = as_written(least_likely(10, EPS))
            context.pace(lambda: attack(net, x, y, runtime=runtime), lambda: written(net, x, y))
            reports = [one for each in Functions.of(net).compiled for one in gradprune.reports(each)]
            peaks = [report.peak_bytes for report in reports if report.takes_gradient]
            context.note(peak_before=peaks[0]["before"], peak_after=peaks[0]["after"])

    def _examples(self, context: Context, net: nn.Module, batch: int) -> list[Figures]:
        """Up to three images that PGD-10 turned from right to wrong, as bytes."""
        x, y = context.images.test_x[:batch], context.images.test_y[:batch]
        attack = context.attack(least_likely(10, EPS))
        x_adv = attack(net, x, y, runtime=context.runtime(batch))
        with torch.no_grad():
            before, after = net(x).argmax(1), net(x_adv).argmax(1)
        rows = ((before == y) & (after != y)).nonzero().flatten()[:3].tolist()
        return [
            {
                "label": int(y[row]),
                "after": int(after[row]),
                "x": (x[row] * 255).round().int().tolist(),
                # Perturbations are smaller than what bytes can tell.
                "delta": ((x_adv[row] - x[row]) * 25500).round().int().tolist(),
            }
            for row in rows
        ]

    # --- Showing ------------------------------------------------------------------------------------------------------

    def _claims(self, own: Figures, cells: dict[tuple[str, str], Figures]) -> list[Claim]:
        normal = {arch: cell for (arch, training), cell in cells.items() if training == NORMAL}
        adversarial = {arch: cell for (arch, training), cell in cells.items() if training == ADVERSARIAL}

        def line(cell: Figures) -> str:
            return " / ".join(percent(cell[name][0]) for name in ("clean", *ATTACKS))

        falls = all(
            cell[larger][0] <= cell[smaller][0]
            for cell in normal.values()
            for smaller, larger in (
                ("clean", "PGD-5"),
                ("PGD-5", "PGD-10"),
                ("PGD-10", "PGD-20"),
                ("eps .015", "PGD-10"),
                ("PGD-10", "eps .046"),
            )
        )
        gains = {
            arch: min(adversarial[arch][name][0] - normal[arch][name][0] for name in ("PGD-10", "PGD-20"))
            for arch in normal
        }
        error = max(own["errors"].values())
        return [
            Claim(
                "[HW] an own convolution computes what torch's does",
                "results and gradients in float64 differ by no more than 1e-10 in any of the geometries tried",
                f"largest difference {error:.0e}",
                error <= TOLERANCE,
            ),
            Claim(
                "[HW] accuracy falls with eps and with steps",
                "of every normally trained network, top-1 accuracy is nowhere higher with more steps or a larger eps",
                "; ".join(f"{arch} {line(cell)}" for arch, cell in normal.items()),
                falls,
            ),
            Claim(
                "[HW] training with 3 steps holds against 10 and 20",
                "of every network, PGD-10 and PGD-20 leave 10 points more of accuracy after it than after "
                "normal training",
                ", ".join(f"{arch} {100 * gain:+.1f} points" for arch, gain in gains.items()),
                min(gains.values()) >= AHEAD,
            ),
        ]

    def _tables(self, cells: dict[tuple[str, str], Figures]) -> list[Table]:
        names = ["clean", *ATTACKS]
        rows = [
            [f"{arch}, {training}", *(" / ".join(map(percent, cell[name])) for name in names)]
            for (arch, training), cell in cells.items()
        ]
        for training, papers in PAPERS.items():
            shown = [" / ".join(map(percent, papers[name])) if name in papers else "-" for name in names]
            rows.append([f"paper's, {training}", *shown])
        return [Table("Accuracy under PGD at the least likely class: top-1 / top-5, %", ["training", *names], rows)]

    def _costs(self, context: Context, cells: dict[tuple[str, str], Figures]) -> Table:
        runs = {key: context.records.cells[f"{key[0]}, {key[1]} training"]["run"] for key in cells}
        rows = []
        for arch in dict.fromkeys(arch for arch, _ in cells):
            normal, adversarial = runs[arch, NORMAL], runs[arch, ADVERSARIAL]
            peaks = [f"{normal[name] / 1e6:.1f}" if name in normal else "-" for name in ("peak_before", "peak_after")]
            rows.append(
                [
                    arch,
                    f"{cells[arch, NORMAL]['parameters']:,}",
                    f"{normal['attack_over_inference']:.1f}x",
                    f"{normal['times_as_fast']:.2f}x" if "times_as_fast" in normal else "-",
                    f"{adversarial['training_seconds'] / normal['training_seconds']:.1f}x",
                    " -> ".join(peaks),
                ]
            )
        rows.append(["paper's", "-", f"{PAPERS_COSTS['attack']:g}x", "-", f"{PAPERS_COSTS['training']:g}x", "-"])
        head = ["network", "parameters", "PGD-10 over inference", "PGD-10, times as fast as written in the paper's way"]
        head += ["seconds of adversarial training over normal training"]
        return Table("Costs in this run", [*head, "peak of a step, MB, as captured -> as compiled"], rows)

    def _picture(self, context: Context, cells: dict[tuple[str, str], Figures]) -> Picture:
        figure, (steps, radii) = panels(2, 6.0, 4.4)
        markers = dict(zip(dict.fromkeys(arch for arch, _ in cells), "os^Dv", strict=False))
        for (arch, training), cell in cells.items():
            look: Any = {"color": COLORS[training], "marker": markers[arch], "label": f"{arch}, {training}"}
            look["linestyle"] = "-" if training == ADVERSARIAL else "--"
            steps.plot([0, 5, 10, 20], shares(cell, ["clean", "PGD-5", "PGD-10", "PGD-20"]), **look)
            radii.plot([0, 0.015, EPS, 0.046], shares(cell, ["clean", "eps .015", "PGD-10", "eps .046"]), **look)
        finish(steps, "steps, at eps .031", "top-1 accuracy, %", percent=True)
        finish(radii, "eps, with 10 steps", "top-1 accuracy, %", percent=True)
        radii.get_legend().remove()
        steps.set_xticks([0, 5, 10, 20])
        radii.set_xticks([0, 0.015, EPS, 0.046], ["0", ".015", ".031", ".046"])
        caption = "Accuracy under PGD at the least likely class, after normal and adversarial training [HW]"
        return context.draw(figure, "accuracy.png", caption)

    def _panels(self, context: Context, cells: dict[tuple[str, str], Figures]) -> list[Picture]:
        examples = [
            Example(
                f"{arch}, label {one['label']}",
                torch.tensor(one["x"]).div(255).numpy(),
                (torch.tensor(one["x"]) / 255 + torch.tensor(one["delta"]) / 25500).numpy(),
                str(one["label"]),
                str(one["after"]),
                EPS,
            )
            for (arch, _), cell in cells.items()
            for one in cell["examples"][:1]
        ]
        if not examples:
            return []
        caption = "Photographs that PGD-10 succeeded with, after normal training [HW]"
        return [context.draw(draw_examples(examples), "examples.png", caption)]


def shares(cell: Figures, names: Sequence[str]) -> list[float]:
    """Top-1 accuracies in percent."""
    return [100 * cell[name][0] for name in names]


def least_likely(steps: int, eps: float, step_size: float | None = None) -> PGD:
    """The paper's attack."""
    size = eps / 10 if step_size is None else step_size
    return PGD(eps=eps, step_size=size, steps=steps, targeted="least-likely", random_start=False, seed=0)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """AdamW, at which all of the networks train."""
    return torch.optim.AdamW(net.parameters(), 1e-3)


def load_backbone(net: nn.Module, path: Path) -> None:
    """Load a checkpoint of ResNet-18 but for the last layer, which is trained anew.

    Raises:
        OptionError: The file holds no ResNet-18.
    """
    from .vision import resnet18

    inner: Any = net.model
    whole = resnet18(1000)
    load_checkpoint(whole, path)
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith("fc.")}
    inner.load_state_dict(state, strict=False)


# --- The own convolution ----------------------------------------------------------------------------------------------

GEOMETRIES = ((3, 4, 3, 1, 1), (2, 5, 5, 2, 2), (4, 3, 1, 1, 0), (3, 2, 7, 3, 1))
"""Channels in and out, kernel, stride, padding."""


def own_convolution(context: Context, scale: Scale) -> Figures:
    """Differences from torch's convolution in float64, and of an attack through a network of own ones."""
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(seeded(context.options.seed, "own"))
    for inputs, outputs, kernel, stride, padding in GEOMETRIES:
        shapes = ((2, inputs, 13, 13), (outputs, inputs, kernel, kernel), (outputs,))
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        found = []
        ways: tuple[Any, Any] = UnfoldConvolution.apply, F.conv2d
        for convolve in ways:
            leaves = [value.clone().requires_grad_(True) for value in values]
            result = convolve(*leaves, stride, padding)
            found.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
        for name, ours, theirs in zip(("result", "input", "weight", "bias"), *found, strict=True):
            scaled = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
            errors[name] = max(errors.get(name, 0.0), scaled)
    images, batch = context.images, min(scale.batch, len(context.images.test_x))
    x, y = images.test_x[:batch], images.test_y[:batch]
    attack = PGD(eps=EPS, step_size=EPS / 4, steps=3, random_start=False, seed=0)
    nets = []
    for convolution in (UnfoldConv2d, nn.Conv2d):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(context.options.seed, "own"))
            inner = SimpleNet(images.classes, scale.width, convolution)
        nets.append(Normalized(inner, [MEAN] * 3, [STD] * 3).eval())
    ours, theirs = nets
    context.watch(ours)
    runtime = context.runtime(batch)
    attacked = context.attack(attack)(ours, x, y, runtime=runtime)
    expected = replace(attack)(theirs, x, y, runtime=context.eagerly)
    with unchanged(ours, "eval"), unchanged(theirs, "eval"):
        context.note(
            own_over_torchs=ratio_of_seconds(
                lambda: as_written(attack)(ours, x, y), lambda: as_written(attack)(theirs, x, y)
            )
        )
    # Signs of gradients near zero turn with rounding; pixels that do not are all but a few.
    same = float(((attacked - expected).abs() <= 1e-4).float().mean())
    return {"errors": errors, "attack_same_pixels": round(same, 2)}
