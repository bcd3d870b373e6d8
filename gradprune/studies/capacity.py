"""How much capacity robustness takes: six scales of one CNN, trained against PGD and against FGSM [LR 1]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.attacks import FGSM, PGD, Attack, AutoAttack, Runtime
from gradprune.training import LinearEps

from .context import Context
from .data import Batches
from .figures import OURS, PAPER, beside, finish, mean_and_spread, panels, percent
from .networks import CapacityNet, drawn
from .outcome import Claim, Outcome, Picture, Table
from .records import Figures
from .study import Study
from .training import objective_of, seeded, train
from .written import as_written

EPS = 0.3
FILTERS = tuple((2 * 2**scale, 4 * 2**scale, 100 * 2**scale) for scale in range(6))
"""Filters of both convolutions and neurons of the hidden layer, by capacity scale."""
PAPERS_PARAMETERS = (5590, 20e3, 80e3, 320e3, 1.2e6, 4.8e6)
PAPERS = {
    "PGD": {
        "clean": (0.8967, 0.9343, 0.9592, 0.9829, 0.9829, 0.9899),
        "adversarial": (0.055, 0.0425, 0.0311, 0.8396, 0.7190, 0.8487),
    },
    "FGSM": {
        "clean": (0.9457, 0.9554, 0.9638, 0.9836, 0.9884, 0.9590),
        "adversarial": (0.0574, 0.068, 0.0566, 0.9202, 0.8801, 0.9209),
    },
}
"""Tables II and III."""
JUMP, LOW = 0.4, 0.2
"""Of adversarial accuracy: what it rises by between two scales, and what it stays below before."""
SMALL = (0, 1, 2)
"""Scales that the paper's training makes no robust network of."""
GAIN = 0.2
"""Of adversarial accuracy, by another way of training."""
PLAIN, WARM = "", ", eps growing"


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Attributes:
        train: Images to train on.
        test: Images to test on.
        capacities: Of ``FILTERS``.
        epochs: Of training.
        seeds: How many networks of each kind.
        attack: PGD in training.
        adam: Train by Adam instead of by the paper's SGD, which needs far more updates.
        autoattacked: Test images for AutoAttack.
        autoattack: Its steps, queries and targets.
    """

    train: int | None = None
    test: int | None = None
    capacities: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    epochs: int = 50
    seeds: int = 3
    batch: int = 128
    attack: PGD = PGD(eps=EPS, step_size=0.01, steps=40)  # noqa: RUF009
    evaluation_steps: int = 40
    adam: bool = False
    autoattacked: int = 1000
    autoattack: tuple[int, int, int] = (100, 5000, 9)


class CapacityStudy(Study):
    """Six scales of capacity, trained against PGD and FGSM, and attacked with both."""

    name = "capacity"
    title = "Capacity and robustness [LR 1]"
    scales = {  # noqa: RUF012
        "full": Scale(),
        "small": Scale(
            2048,
            512,
            (0, 1, 2, 3),
            epochs=12,
            seeds=1,
            batch=64,
            attack=PGD(eps=EPS, step_size=0.1, steps=7),
            adam=True,
            autoattacked=64,
            autoattack=(20, 200, 3),
        ),
        "toy": Scale(
            64,
            32,
            (0, 1),
            epochs=1,
            seeds=2,
            batch=32,
            attack=PGD(eps=EPS, step_size=0.15, steps=2),
            evaluation_steps=2,
            adam=True,
            autoattacked=8,
            autoattack=(2, 3, 2),
        ),
    }

    def measure(self, context: Context, scale: Scale) -> Outcome:
        """See ``Study.measure``."""
        found: dict[tuple[str, int], list[Figures]] = {}
        ways = [(name, way) for name in PAPERS for way in (PLAIN, WARM)]
        for capacity in scale.capacities:
            # One network for all cells of a scale, so that attacks on it are compiled once.
            net = CapacityNet(context.images.shape, context.images.classes, *FILTERS[capacity])
            for name, way in ways:
                if name == "FGSM" and way == WARM:
                    continue
                if way == WARM and capacity not in SMALL:
                    continue
                for seed in range(scale.seeds):
                    figures = self._cell(context, scale, net, capacity, name, way, seed)
                    found.setdefault((name + way, capacity), []).append(figures)
        return self.outcome(
            context,
            self._about(context, scale),
            self._claims(scale, found),
            [self._parameters(context, scale), *self._tables(scale, found)],
            [self._picture(context, scale, found, name) for name in PAPERS],
        )

    # --- Measuring ----------------------------------------------------------------------------------------------------

    def _cell(
        self, context: Context, scale: Scale, net: CapacityNet, capacity: int, name: str, way: str, seed: int
    ) -> Figures:
        key = f"scale {capacity}, {name}-trained{way}, seed {seed}"
        images = context.images
        attack = scale.attack if name == "PGD" else FGSM(eps=EPS)
        pgd = PGD(eps=EPS, step_size=EPS / 30, steps=scale.evaluation_steps, seed=0)
        own = pgd if name == "PGD" else FGSM(eps=EPS, seed=0)

        def measure() -> Figures:
            part = seeded(context.options.seed, capacity, seed)  # the same network for all ways of training
            net.load_state_dict(drawn(part, CapacityNet, images.shape, images.classes, *FILTERS[capacity]).state_dict())
            data = (images.train_x, images.train_y)
            updates = scale.epochs * len(Batches(*data, scale.batch))
            history = train(
                context,
                key,
                net,
                objective_of(context, attack),
                optimizer_of(net, scale),
                data,
                epochs=scale.epochs,
                batch=scale.batch,
                eps_schedule=LinearEps(updates // 2) if way == WARM else None,
            )

            def accuracy(attack: Attack | None) -> float:
                return context.accuracy(net, images.test_x, images.test_y, attack, scale.batch)

            figures = {
                "clean": accuracy(None),
                "PGD": accuracy(context.attack(pgd)),
                "FGSM": accuracy(context.attack(FGSM(eps=EPS, seed=0))),
                "loss": history.epochs[-1]["loss"],
            }
            figures["adversarial"] = figures[name]
            if seed == 0 and way == PLAIN and name == "PGD":
                figures["autoattack"] = autoattacked(context, scale, net)
            if not context.options.eager and capacity == max(scale.capacities) and name == "PGD":
                x, y = images.train_x[: scale.batch], images.train_y[: scale.batch]
                written, runtime = as_written(own), context.runtime(len(x))
                context.pace(lambda: own(net, x, y, runtime=runtime), lambda: written(net, x, y))
            return figures

        return context.cell(key, measure)

    # --- Showing ------------------------------------------------------------------------------------------------------

    def _about(self, context: Context, scale: Scale) -> str:
        images, attack = context.images, scale.attack
        optimizer = (
            "Adam at 1e-3, which needs fewer updates than the paper's SGD" if scale.adam else "SGD as the paper's"
        )
        return (
            f"{len(images.train_x):,} images to train on, {len(images.test_x):,} to test on, {scale.epochs} epochs in "
            f"batches of {scale.batch}, {optimizer}, {scale.seeds} "
            f"network{'s' * (scale.seeds > 1)} of each kind. PGD trains with {attack.steps} steps of "
            f"{attack.step_size:g} and evaluates with {scale.evaluation_steps} of {EPS / 30:g}; eps is {EPS:g}. An "
            "extension asks whether small networks lack capacity or whether their training failed: eps grows from 0 "
            "during the first half of it."
        )

    def _parameters(self, context: Context, scale: Scale) -> Table:
        """Counts of parameters, and the paper's."""
        counts = parameters(context, range(len(FILTERS)))
        rows = []
        for capacity, (ours, papers) in enumerate(zip(counts, PAPERS_PARAMETERS, strict=True)):
            fits = [other for other, count in enumerate(counts) if abs(papers / count - 1) < 0.1]
            remark = f"that of our scale {fits[0]}" if fits else "that of none of ours"
            rows.append([str(capacity), *map(str, FILTERS[capacity]), f"{ours:,}", f"{papers:,.0f}", remark])
        head = ["scale", "filters 1", "filters 2", "neurons", "parameters", "paper's", "the paper's is"]
        return Table("Parameters with the paper's filters and neurons, and the numbers that it gives", head, rows)

    def _claims(self, scale: Scale, found: dict[tuple[str, int], list[Figures]]) -> list[Claim]:
        claims = []
        for name in PAPERS:
            means = {capacity: average(found[name, capacity], "adversarial") for capacity in scale.capacities}
            steps = {
                (before, after): means[after] - means[before] for before, after in itertools.pairwise(scale.capacities)
            }
            largest = max(steps, key=lambda pair: steps[pair])
            tells = (2, 3) in steps
            low = all(means[capacity] < LOW for capacity in scale.capacities if capacity in SMALL)
            claims.append(
                Claim(
                    f"[LR] robustness jumps between scales 2 and 3 ({name})",
                    f"{name} accuracy of {name}-trained networks rises by 40 points or more from scale 2 to 3, by less "
                    "between all other neighbours, and is below 20 % at all scales up to 2",
                    ", ".join(f"scale {capacity}: {percent(mean)} %" for capacity, mean in means.items()),
                    (largest == (2, 3) and steps[2, 3] >= JUMP and low) if tells else None,
                )
            )
        gains = {
            capacity: average(found["PGD" + WARM, capacity], "PGD") - average(found["PGD", capacity], "PGD")
            for capacity in scale.capacities
            if capacity in SMALL
        }
        claims.append(
            Claim(
                "[LR] small networks are not robust for want of capacity",
                "at none of the scales 0 to 2 does another way of training, with eps growing, gain 20 points of PGD "
                "accuracy; otherwise it was training that failed",
                ", ".join(f"scale {capacity}: {100 * gain:+.1f} points" for capacity, gain in gains.items()),
                max(gains.values()) < GAIN if tuple(gains) == SMALL else None,
            )
        )
        return claims

    def _tables(self, scale: Scale, found: dict[tuple[str, int], list[Figures]]) -> list[Table]:
        tables = []
        for number, (name, papers) in zip(("II", "III"), PAPERS.items(), strict=True):
            other = "FGSM" if name == "PGD" else "PGD"
            rows = []
            for capacity in scale.capacities:
                cells = found[name, capacity]
                row = [str(capacity), *(beside(average(cells, key), papers[key][capacity]) for key in papers)]
                row.append(percent(average(cells, other)))
                if name == "PGD":
                    row.append(percent(cells[0]["autoattack"]))
                    warm = found.get((name + WARM, capacity))
                    row.append("-" if warm is None else percent(average(warm, "PGD")))
                rows.append(row)
            head = ["scale", "clean", name, other]
            head += (
                [f"AutoAttack, {scale.autoattacked} images", "PGD, trained with eps growing"] if name == "PGD" else []
            )
            tables.append(Table(f"Table {number}: {name}-trained networks, accuracy in %", head, rows))
        return tables

    def _picture(
        self, context: Context, scale: Scale, found: dict[tuple[str, int], list[Figures]], name: str
    ) -> Picture:
        figure, (axis,) = panels(1, 6.6, 4.4)
        for key, marker in (("clean", "o"), ("adversarial", "s")):
            spreads = [mean_and_spread([one[key] for one in found[name, capacity]]) for capacity in scale.capacities]
            axis.errorbar(
                scale.capacities,
                [100 * mean for mean, _ in spreads],
                yerr=[100 * spread for _, spread in spreads],
                color=OURS,
                marker=marker,
                linestyle="-" if key == "adversarial" else ":",
                capsize=3,
                label=f"{key if key == 'clean' else name}, ours",
            )
            axis.plot(
                range(len(FILTERS)),
                [100 * share for share in PAPERS[name][key]],
                color=PAPER,
                marker=marker,
                linestyle="-" if key == "adversarial" else ":",
                label=f"{key if key == 'clean' else name}, paper",
            )
        warm = [capacity for capacity in scale.capacities if (name + WARM, capacity) in found]
        if warm:
            means = [100 * average(found[name + WARM, capacity], name) for capacity in warm]
            axis.plot(warm, means, color="#c98b2b", marker="^", linestyle="--", label=f"{name}, ours, eps growing")
        axis.set_xticks(range(len(FILTERS)))
        finish(axis, "capacity scale", "test accuracy, %", percent=True)
        axis.legend(fontsize=8, frameon=False, loc="center right")
        number = {"PGD": 2, "FGSM": 3}[name]
        caption = f"{name}-trained networks by capacity [LR 1, figure {number}]"
        return context.draw(figure, f"{name.lower()}.png", caption)


def optimizer_of(net: nn.Module, scale: Scale) -> torch.optim.Optimizer:
    """The paper's SGD, or Adam."""
    if scale.adam:
        return torch.optim.Adam(net.parameters(), 1e-3)
    return torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)


def autoattacked(context: Context, scale: Scale, net: nn.Module) -> float:
    """Accuracy under AutoAttack, which is run eagerly where it is too short for a compilation to pay."""
    steps, queries, targets = scale.autoattack
    attack = AutoAttack(eps=EPS, steps=steps, queries=queries, targets=targets, seed=0)
    x, y = (part[: scale.autoattacked] for part in (context.images.test_x, context.images.test_y))
    runtime = Runtime(compile=context.compiled is True, batch_size=scale.batch)
    right = 0
    for inputs, labels in zip(x.split(scale.batch), y.split(scale.batch), strict=True):
        right += count_right(net, attack(net, inputs, labels, runtime=runtime), labels)
    return right / len(x)


@torch.no_grad()
def count_right(net: nn.Module, x: Tensor, y: Tensor) -> int:
    """How many inputs are classified as labelled."""
    return int((net(x).argmax(1) == y).sum())


def parameters(context: Context, capacities: Sequence[int]) -> list[int]:
    """How many parameters the networks have."""
    with torch.device("meta"):
        nets: list[Any] = [
            CapacityNet(context.images.shape, context.images.classes, *FILTERS[capacity]) for capacity in capacities
        ]
    return [sum(parameter.numel() for parameter in net.parameters()) for net in nets]


def average(cells: Sequence[Figures], key: str) -> float:
    """Mean over seeds."""
    return mean_and_spread([one[key] for one in cells])[0]
