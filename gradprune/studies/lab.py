"""A CNN on small images and FGSM at growing radii [LAB]."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.attacks import FGSM
from gradprune.support.figures import figure_of
from gradprune.training import Plain
from gradprune.training.watchers import Progress

from .context import EVALUATED, Context
from .figures import OURS, PAPER, finish, panels, percent, show_image
from .networks import LabNet, drawn
from .outcome import Claim, Outcome, Picture, Table
from .records import Figures
from .study import Study
from .training import seeded, train
from .written import as_written

FALL = 0.2
"""Of accuracy, from eps 0 to the largest, that counts as one."""
LOGITS, SOFTMAX = "logits", "softmax before the cross entropy"


@dataclass(frozen=True)
class Scale:
    """Sizes: images to train on (a fifth of which is for validation) and to test on, epochs, batch."""

    train: int | None
    test: int | None
    epochs: int = 10
    batch: int = 32
    eps: tuple[float, ...] = (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


@dataclass(frozen=True, kw_only=True)
class AfterSoftmax(Plain):
    """Training on a cross entropy that takes probabilities for logits: the trap of the lab."""

    name = "after-softmax"

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """See ``Objective``."""
        return super().cross_entropy(logits.softmax(1), y)


class LabStudy(Study):
    """Train a CNN (three convolutions, a max pool, two linear layers) for ten epochs; attack it with FGSM."""

    name = "lab"
    title = "A CNN and FGSM at growing eps [LAB]"
    scales = {  # noqa: RUF012
        "full": Scale(None, None),
        "small": Scale(4000, 1000),
        "toy": Scale(120, 40, epochs=2, eps=(0, 0.1, 0.3)),
    }

    def measure(self, context: Context, scale: Scale) -> Outcome:
        """See ``Study.measure``."""
        net = drawn(seeded(context.options.seed, "lab"), LabNet, context.images.shape, context.images.classes)
        # One network for both, so that attacks on it are compiled once.
        initial = copy.deepcopy(net.state_dict())
        cells = {}
        for way in (LOGITS, SOFTMAX):
            net.load_state_dict(initial)
            cells[way] = self._cell(context, scale, net, way)
        ours = cells[LOGITS]
        accuracies: list[float] = ours["accuracy"]
        falls = all(after <= before for before, after in itertools.pairwise(accuracies))
        falls = falls and accuracies[-1] <= accuracies[0] - FALL
        ratio = ours["softmax_gradient_ratio"]
        claims = [
            Claim(
                "[LAB] accuracy falls with eps",
                "at no eps is accuracy higher than at the next smaller one, and at the largest it is at least 20 "
                "points lower than without an attack",
                ", ".join(f"{eps:g}: {percent(share)} %" for eps, share in zip(scale.eps, accuracies, strict=True)),
                falls,
            ),
            Claim(
                "a softmax before the cross entropy makes gradients smaller",
                "the gradient of the untrained network's weights on the first batch is at most half as long",
                f"{ratio:.2f} times as long; test accuracy {percent(cells[SOFTMAX]['accuracy'][0])} % with it, "
                f"{percent(accuracies[0])} % without",
                ratio <= 0.5,
            ),
        ]
        rows = [
            [f"{eps:g}", *(percent(cell["accuracy"][place]) for cell in cells.values())]
            for place, eps in enumerate(scale.eps)
        ]
        parts = context.images
        held_out = len(parts.train_x) // 5
        about = (
            f"{ours['parameters']:,} parameters, trained by Adam on {len(parts.train_x) - held_out:,} images for "
            f"{scale.epochs} epochs in batches of {scale.batch}, {held_out:,} images for validation, "
            f"{len(parts.test_x):,} for testing. The network returns logits: a softmax before `F.cross_entropy`, which "
            "has one of its own, is a trap, and what it costs is measured beside."
        )
        return self.outcome(
            context,
            about,
            claims,
            [Table("Test accuracy under FGSM, %", ["eps", *cells], rows)],
            self._pictures(context, scale, cells),
        )

    def _cell(self, context: Context, scale: Scale, net: nn.Module, way: str) -> Figures:
        images, seed = context.images, context.options.seed
        held_out, key = len(images.train_x) // 5, f"train on {way}"

        def measure() -> Figures:
            ratio = softmax_gradient_ratio(net, images.train_x[: scale.batch], images.train_y[: scale.batch])
            history = train(
                context,
                key,
                net,
                AfterSoftmax() if way == SOFTMAX else Plain(),
                torch.optim.Adam(net.parameters()),
                (images.train_x[held_out:], images.train_y[held_out:]),
                epochs=scale.epochs,
                batch=scale.batch,
                validation=(images.train_x[:held_out], images.train_y[:held_out]),
                watchers=[Progress()],
            )
            attacks = [context.attack(FGSM(eps=eps, seed=seed)) if eps else None for eps in scale.eps]
            accuracies = [context.accuracy(net, images.test_x, images.test_y, attack, EVALUATED) for attack in attacks]
            x, y = images.test_x[:EVALUATED], images.test_y[:EVALUATED]
            runtime = context.runtime(EVALUATED)
            first = [x[:1] if attack is None else attack(net, x, y, runtime=runtime)[:1] for attack in attacks]
            if not context.options.eager and way == LOGITS:
                largest = FGSM(eps=max(scale.eps), seed=seed)
                written = as_written(largest)
                context.pace(lambda: largest(net, x, y, runtime=runtime), lambda: written(net, x, y))
            with torch.no_grad():
                read = net(torch.cat(first)).argmax(1)
            return {
                "parameters": sum(parameter.numel() for parameter in net.parameters()),
                "loss": [record["loss"] for record in history.epochs],
                "validation": [record["clean"] for record in history.epochs],
                "accuracy": accuracies,
                "first": (torch.cat(first) * 255).round().int().tolist(),
                "first_read_as": read.tolist(),
                "first_label": int(y[0]),
                "softmax_gradient_ratio": ratio,
            }

        return context.cell(key, measure)

    def _pictures(self, context: Context, scale: Scale, cells: dict[str, Figures]) -> list[Picture]:
        figure, (loss, accuracy, robust) = panels(3, 4.6, 4.0)
        for (way, cell), color in zip(cells.items(), (OURS, PAPER), strict=True):
            epochs = range(1, len(cell["loss"]) + 1)
            loss.plot(epochs, cell["loss"], marker=".", color=color, label=way)
            accuracy.plot(epochs, [100 * share for share in cell["validation"]], marker=".", color=color, label=way)
            robust.plot(scale.eps, [100 * share for share in cell["accuracy"]], marker="o", color=color, label=way)
        finish(loss, "epoch", "cross entropy", "training loss")
        finish(accuracy, "epoch", "%", "validation accuracy", percent=True)
        finish(robust, "eps", "%", "test accuracy under FGSM", percent=True)
        for axis in (loss, accuracy):
            axis.xaxis.get_major_locator().set_params(integer=True)
        curves = context.draw(figure, "curves.png", "A CNN [LAB]: training, and accuracy under FGSM by eps")
        return [curves, self._first_images(context, scale.eps, cells[LOGITS])]

    def _first_images(self, context: Context, eps: Sequence[float], cell: Figures) -> Picture:
        figure = figure_of(1.75 * len(eps), 2.7)
        images = torch.tensor(cell["first"]) / 255
        axes: Any = figure.subplots(1, len(eps), squeeze=False)[0]
        for axis, size, image, label in zip(axes, eps, images, cell["first_read_as"], strict=True):
            show_image(axis, image, f"read as {label}")
            axis.set_title(f"eps {size:g}", fontsize=9)
        caption = f"The first test image (label {cell['first_label']}) under FGSM at every eps [LAB]"
        return context.draw(figure, "first-image.png", caption)


def softmax_gradient_ratio(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """How long the gradient of the weights is with a softmax before the cross entropy, beside that without one."""

    def length(logits: Tensor) -> float:
        gradients = torch.autograd.grad(F.cross_entropy(logits, y), list(net.parameters()))
        return float(torch.cat([one.flatten() for one in gradients]).norm())

    return length(net(x).softmax(1)) / length(net(x))
