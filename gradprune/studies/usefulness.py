"""Which features of a network are useful, and which still are when they are attacked, one attack per feature [LR 2].

A network tells 3 from 7 by one logit, the sum of its features times their weights. A feature is useful as far as it
votes for the right class: its usefulness is E[(2y - 1)(2 s(f(x)) - 1)], s being the sigmoid; its actual usefulness is
that of f times its weight; and its robust usefulness is that of the worst input in a ball, found by an attack on this
feature alone. The program of the paper attacks a hundred times. Here which feature is attacked is data, so that rows of
one batch attack different features, and what is compiled once serves them all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.attacks import BIM, PGD
from gradprune.training import LinearEps

from .context import Context
from .data import Batches, Images
from .figures import OURS, PAPER, finish, panels, percent
from .networks import BinaryNet, drawn
from .outcome import Claim, Outcome, Picture, Table
from .records import Figures
from .study import Study
from .training import objective_of, seeded, train
from .written import as_written

CLASSES = (3, 7)
STANDARD, ROBUST = "standard", "PGD-trained"
PAPERS, STRONGER = "paper's attack", "stronger attack"
COLORS = {STANDARD: OURS, ROBUST: "#2a7f62"}
LEARNED = 0.9
"""Clean accuracy from which on a network counts as one that has learned the task."""
GAIN, LOSS = 0.05, 0.05
"""Of robust accuracy that counts as one, and of clean accuracy that may be lost for it."""


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Attributes:
        train: Images to train on, before the two classes are chosen.
        test: Images to test on, before that.
        attacked: Test images of the two classes on which features are attacked.
        epochs: Of training.
        batch: Samples in a batch of training and of evaluation.
        rows: Pairs of a feature and an image that are attacked at once.
        filters: Of both convolutions.
        features: How many.
    """

    train: int | None = None
    test: int | None = None
    attacked: int | None = None
    epochs: int = 20
    batch: int = 50
    rows: int = 500
    filters: tuple[int, int] = (16, 32)
    features: int = 100


class Votes(nn.Module):
    """What every feature says for either class: column 2i + y is feature i times its weight, with the sign of class y.

    Args:
        net: The network.
    """

    def __init__(self, net: BinaryNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Votes ``(N, 2 * features)`` of images ``(N, C, H, W)``."""
        votes = self.net.features(x) * self.net.classifier.weight[0]
        return torch.stack([-votes, votes], 2).flatten(1)


def lost(votes: Tensor, labels: Tensor) -> Tensor:
    """What attacks maximise ``(N,)``: minus the usefulness of the vote ``2i + y`` that a row is about."""
    return 1 - 2 * votes.gather(1, labels[:, None]).squeeze(1).sigmoid()


def attacks(scale: Scale) -> dict[str, PGD]:
    """The attacks on features: the paper's, which reaches a tenth of eps, and one that reaches all of it."""
    return {
        PAPERS: BIM(eps=0.3, step_size=0.01, steps=3, loss=lost, seed=0),
        STRONGER: BIM(eps=0.3, step_size=0.05, steps=10, loss=lost, seed=0),
    }


class UsefulnessStudy(Study):
    """Usefulness of 100 features of a network that tells 3 from 7, and robust usefulness by an attack on each."""

    name = "usefulness"
    title = "Useful and robustly useful features [LR 2]"
    scales = {  # noqa: RUF012
        "full": Scale(),
        "small": Scale(4000, 1000, attacked=100, filters=(8, 16)),
        "toy": Scale(300, 100, attacked=5, epochs=2, batch=10, rows=50, filters=(2, 4), features=10),
    }

    def select(self, images: Images, scale: Scale) -> Images:
        """The two classes."""
        images = images.only(scale.train, scale.test)
        parts: list[Tensor] = []
        for x, y in ((images.train_x, images.train_y), (images.test_x, images.test_y)):
            rows = (y == CLASSES[0]) | (y == CLASSES[1])
            parts += [x[rows], (y[rows] == CLASSES[1]).long()]
        return Images(f"{images.name}: {CLASSES[0]} against {CLASSES[1]}", 2, *parts)

    def measure(self, context: Context, scale: Scale) -> Outcome:
        """See ``Study.measure``."""
        build = (context.images.shape, *scale.filters, scale.features)
        net = drawn(seeded(context.options.seed, "net"), BinaryNet, *build)
        assert isinstance(net, BinaryNet)
        # One network for both trainings, so that attacks on it are compiled once.
        initial = copy.deepcopy(net.state_dict())
        votes = Votes(net).eval()
        cells = {}
        for way in (STANDARD, ROBUST):
            net.load_state_dict(initial)
            cells[way] = self._cell(context, scale, net, votes, way)
        attacked = len(context.images.test_x[: scale.attacked])
        about = (
            f"{scale.features} features, which are the neurons of the last hidden layer behind convolutions of "
            f"{scale.filters[0]} and {scale.filters[1]} filters; {len(context.images.train_x):,} images to train on, "
            f"{scale.epochs} epochs of Adam; every feature is attacked on {attacked:,} test images of its own. The "
            "paper's attack (3 steps of 0.01 at eps 0.3) never gets further than 0.03; the stronger one (10 steps of "
            "0.05) does. The worst of the clean and the attacked input counts. The second network, which the "
            "paper could not show, is trained against PGD of 10 steps of 0.05 for twice as many epochs, in the first "
            "half of which eps grows from 0 to 0.3: with eps 0.3 from the first update on it would have to be trained "
            "for far longer to learn anything."
        )
        return self.outcome(
            context,
            about,
            self._claims(cells),
            self._tables(cells),
            self._pictures(context, cells),
        )

    def _cell(self, context: Context, scale: Scale, net: BinaryNet, votes: Votes, way: str) -> Figures:
        images, key = context.images, f"{way} network"
        train_attack = PGD(eps=0.3, step_size=0.05, steps=10, seed=0)
        x, y = images.test_x[: scale.attacked], images.test_y[: scale.attacked]

        def accuracies() -> list[float]:
            against = context.attack(train_attack)
            return [
                context.accuracy(net, images.test_x, images.test_y, attack, scale.batch) for attack in (None, against)
            ]

        def measure() -> Figures:
            objective = objective_of(context, None if way == STANDARD else train_attack)
            optimizer = torch.optim.Adam(net.parameters())
            data = (images.train_x, images.train_y)
            epochs = scale.epochs * (1 if way == STANDARD else 2)
            growing = LinearEps(epochs * len(Batches(*data, scale.batch)) // 2)
            train(
                context,
                key,
                net,
                objective,
                optimizer,
                data,
                epochs=epochs,
                batch=scale.batch,
                eps_schedule=None if way == STANDARD else growing,
            )
            clean, robust = accuracies()
            with torch.no_grad():
                plain = (2 * y[:, None] - 1) * (2 * net.features(x).sigmoid() - 1)
                actual = usefulness(votes(x), y)
            figures = {
                "clean": clean,
                "robust": robust,
                "usefulness": plain.mean(0).tolist(),
                "actual": actual.mean(0).tolist(),
            }
            for name, attack in attacks(scale).items():
                worst = self._worst(context, scale, votes, attack, x, y, range(scale.features))
                figures[name] = torch.minimum(worst, actual).mean(0).tolist()
            if not context.options.eager and way == STANDARD:
                attack, features = attacks(scale)[STRONGER], range(max(1, scale.rows // len(x)))
                context.pace(
                    lambda: self._worst(context, scale, votes, attack, x, y, features),
                    lambda: one_by_one(votes, as_written(attack), x, y, features),
                )
            figures["removed"] = self._remove(net, figures, scale, accuracies, seeded(context.options.seed, way))
            return figures

        return context.cell(key, measure)

    def _worst(
        self, context: Context, scale: Scale, votes: Votes, attack: PGD, x: Tensor, y: Tensor, features: range
    ) -> Tensor:
        """Usefulness ``(N, features)`` at the inputs that an attack on each feature finds."""
        if context.options.eager:
            return one_by_one(votes, context.attack(attack), x, y, features)
        context.watch(votes)
        pairs = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(features)))
        found, runtime = [], context.runtime(scale.rows)
        for rows, attacked in (part.unbind(1) for part in pairs.split(scale.rows)):
            labels = 2 * attacked + y[rows]
            x_adv = attack(votes, x[rows], labels, runtime=runtime)
            with torch.no_grad():
                found.append(-lost(votes(x_adv), labels))
        return torch.cat(found).view(len(x), len(features))

    def _remove(self, net: BinaryNet, figures: Figures, scale: Scale, measure: Any, seed: int) -> Figures:
        """Clean and robust accuracy when features are removed, a tenth at a time, in three orders."""
        weight = net.classifier.weight
        whole = weight.detach().clone()
        generator = torch.Generator().manual_seed(seed)
        orders = {
            "least robustly useful first": torch.tensor(figures[STRONGER]).argsort(),
            "least useful first": torch.tensor(figures["actual"]).argsort(),
            "at random": torch.randperm(scale.features, generator=generator),
        }
        counts = [scale.features * tenth // 10 for tenth in range(10)]
        found: Figures = {"counts": counts}
        for name, order in orders.items():
            accuracies = []
            for count in counts:
                with torch.no_grad():
                    weight.copy_(whole)
                    weight[0, order[:count]] = 0
                accuracies.append(measure())
            found[name] = accuracies
        with torch.no_grad():
            weight.copy_(whole)
        return found

    def _claims(self, cells: dict[str, Figures]) -> list[Claim]:
        claims = []
        for name in (PAPERS, STRONGER):
            values = cells[STANDARD][name]
            positive = sum(value > 0 for value in values)
            claims.append(
                Claim(
                    f"[LR] every feature of a standard network has negative robust usefulness ({name})",
                    "that of no feature is above zero, and that of at least one is below",
                    f"{positive} of {len(values)} are above zero; mean {mean(values):+.2f}",
                    positive == 0 and min(values) < 0,
                )
            )
        means = {way: mean(cell[STRONGER]) for way, cell in cells.items()}
        learned = all(cell["clean"] >= LEARNED for cell in cells.values())
        claims.append(
            Claim(
                "features of a PGD-trained network are more robustly useful than those of a standard one",
                "both networks have learned the task (90 % clean accuracy), and their mean robust usefulness under the "
                "stronger attack is larger",
                ", ".join(f"{way} {value:+.3f}" for way, value in means.items()),
                means[ROBUST] > means[STANDARD] if learned else None,
            )
        )
        removed = cells[STANDARD]["removed"]["least robustly useful first"]
        clean, robust = removed[0]
        best = max(removed, key=lambda one: one[1] if one[0] >= clean - LOSS else -1.0)
        claims.append(
            Claim(
                "[LR] removing the least robustly useful features makes a standard network more robust",
                "for some share of them, accuracy under PGD rises by 5 points or more while clean accuracy falls by no "
                "more than 5",
                f"from {percent(robust)} % to {percent(best[1])} % under PGD, clean from {percent(clean)} % to "
                f"{percent(best[0])} %",
                best[1] >= robust + GAIN,
            )
        )
        return claims

    def _tables(self, cells: dict[str, Figures]) -> list[Table]:
        rows = [
            [
                way,
                percent(cell["clean"]),
                percent(cell["robust"]),
                *(f"{mean(cell[name]):+.3f}" for name in ("usefulness", "actual", PAPERS, STRONGER)),
                *(f"{sum(value > 0 for value in cell[name])}{paper}" for name, paper in positive_beside(way)),
            ]
            for way, cell in cells.items()
        ]
        head = ["network", "clean, %", "PGD, %", "usefulness", "actual", f"robust, {PAPERS}", f"robust, {STRONGER}"]
        head += [f"features above 0, {PAPERS}", f"features above 0, {STRONGER}"]
        tables = [Table("Accuracy, and means over features", head, rows)]
        for way, cell in cells.items():
            removed = cell["removed"]
            names = [name for name in removed if name != "counts"]
            lines = [
                [str(count), *(" / ".join(map(percent, removed[name][place])) for name in names)]
                for place, count in enumerate(removed["counts"])
            ]
            tables.append(Table(f"Features removed from the {way} network: clean / PGD, %", ["removed", *names], lines))
        return tables

    def _pictures(self, context: Context, cells: dict[str, Figures]) -> list[Picture]:
        figure, (bars, scatter, robust) = panels(3, 5.0)
        cell = cells[STANDARD]
        ranks = range(len(cell["actual"]))
        for name, color in (("usefulness", PAPER), ("actual", OURS)):
            bars.plot(ranks, sorted(cell[name], reverse=True), color=color, marker=".", label=name)
        finish(bars, "feature, by rank", "usefulness", "usefulness of f and of w f (figures 5 and 6)")
        scatter.scatter(cell["usefulness"], cell["actual"], s=14, color=OURS)
        scatter.axhline(0, color="black", linewidth=0.8)
        finish(scatter, "usefulness of f", "actual usefulness, of w f", "both compared (figure 7)")
        for name, color in (("actual", PAPER), (PAPERS, "#c98b2b"), (STRONGER, OURS)):
            label = "without attack" if name == "actual" else name
            robust.plot(ranks, sorted(cell[name], reverse=True), color=color, marker=".", label=label)
        robust.axhline(0, color="black", linewidth=0.8)
        finish(robust, "feature, by rank", "usefulness", "robust usefulness (figure 8)")
        caption = "Features of a standard network [LR 2]"
        pictures = [context.draw(figure, "usefulness.png", caption)]
        figure, axes = panels(2, 5.6)
        for axis, (way, one) in zip(axes, cells.items(), strict=True):
            axis.scatter(one["actual"], one[PAPERS], s=14, color=PAPER, label=PAPERS)
            axis.scatter(one["actual"], one[STRONGER], s=14, color=COLORS[way], label=STRONGER)
            axis.axhline(0, color="black", linewidth=0.8)
            finish(axis, "actual usefulness", "robust usefulness", f"{way} network")
        join_limits(axes)
        pictures.append(context.draw(figure, "robust.png", "Robust against actual usefulness of every feature [LR 2]"))
        figure, axes = panels(2, 5.6)
        for axis, (way, one) in zip(axes, cells.items(), strict=True):
            removed = one["removed"]
            names = [name for name in removed if name != "counts"]
            for name, color in zip(names, (OURS, "#c98b2b", "0.5"), strict=True):
                for place, style, what in ((0, "-", "clean"), (1, "--", "PGD")):
                    shares = [100 * both[place] for both in removed[name]]
                    axis.plot(removed["counts"], shares, style, color=color, marker=".", label=f"{name}, {what}")
            finish(axis, "features removed", "test accuracy, %", f"{way} network", percent=True)
            axis.legend(fontsize=7, frameon=False)
        pictures.append(context.draw(figure, "removed.png", "Accuracy when features are removed [LR 2]"))
        return pictures


def usefulness(votes: Tensor, y: Tensor) -> Tensor:
    """Usefulness ``(N, features)`` of votes ``(N, 2 * features)`` for the classes ``y`` ``(N,)``."""
    own: Tensor = votes.unflatten(1, (-1, 2))[torch.arange(len(y)), :, y]
    return 2 * own.sigmoid() - 1


def one_by_one(votes: Votes, attack: Any, x: Tensor, y: Tensor, features: range) -> Tensor:
    """Usefulness ``(N, features)`` under an attack, one call per feature on all images, as the paper has it."""
    found = []
    for feature in features:
        labels = 2 * feature + y
        attacked = attack(votes, x, labels)
        with torch.no_grad():
            found.append(-lost(votes(attacked), labels))
    return torch.stack(found, 1)


def positive_beside(way: str) -> list[tuple[str, str]]:
    """Which attacks' counts a table has, and what the paper found: no feature above zero of a standard network."""
    return [(PAPERS, " (paper: 0)" if way == STANDARD else ""), (STRONGER, "")]


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def join_limits(axes: Sequence[Any]) -> None:
    """Give panels the same vertical axis."""
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
