"""What every objective of adversarial training comes to on handwritten digits: accuracy epoch by epoch, and its price.

The same network, data, optimizer, schedule and seed for all, and no setting chosen by looking at one of them alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from gradprune.attacks import FGSM, PGD, RSFGSM
from gradprune.errors import OptionError, unknown
from gradprune.support.figures import figure_of
from gradprune.support.progress import stage
from gradprune.training import (
    AWP,
    MART,
    OBJECTIVES,
    TRADES,
    AdversarialTrainer,
    Fast,
    Free,
    NearPGD,
    Objective,
    PGDTraining,
    Plain,
)
from gradprune.workloads.digits import load_digits
from gradprune.workloads.networks import DigitsNet

from .benchmark import WHOLE, Benchmark, Plan, add_threads, already
from .report import figure, finish_axis, grid
from .store import Results, Settings, Timed

EPS, STEPS, REPLAYS = 0.2, 7, 8
BATCH, EPOCHS, LEARNING_RATE, SEED = 64, 20, 5e-3, 0
CASE = "digits"


@dataclass(frozen=True)
class ObjectiveRecord(Timed):
    """What an objective of adversarial training has come to.

    Attributes:
        case: The data.
        candidate: Name of the objective.
        failed: Why there are no figures; ``None`` if there are.
        seconds: For every epoch, the seconds of its batches.
        loss: For every epoch, the mean outer loss.
        clean: For every epoch, the accuracy on held-out inputs behind it.
        robust: The same under attack.
        updates: How often the weights were updated.
    """

    case: str
    candidate: str
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    robust: list[float] = field(default_factory=list)
    updates: int = 0

    def derived(self, records: Sequence[ObjectiveRecord]) -> dict[str, Any]:
        """All that follows from the figures, for the readers of a JSON file."""
        return {"seconds": self.median}


ITERATED: dict[str, Any] = {"eps": EPS, "step_size": EPS / 4, "steps": STEPS}
MAKE: dict[str, Callable[[], Objective]] = {
    "plain": Plain,
    "pgd": lambda: PGDTraining(attack=PGD(**ITERATED)),
    "trades": lambda: TRADES(attack=NearPGD(loss="kl", **ITERATED)),
    "mart": lambda: MART(attack=NearPGD(**ITERATED)),
    "awp": lambda: AWP(objective=PGDTraining(attack=PGD(**ITERATED))),
    "free": lambda: Free(attack=FGSM(eps=EPS), replays=REPLAYS),
    "fast": lambda: Fast(attack=RSFGSM(eps=EPS)),
}
"""With STEPS + 1 = REPLAYS passes over each batch, except plain and fast."""


def choose_objectives(names: Sequence[str] | None) -> list[str]:
    """The objectives asked for, each once; all by default.

    Raises:
        OptionError: There is no such objective.
    """
    for name in names or ():
        if name not in OBJECTIVES:
            raise OptionError(unknown("objective", name, OBJECTIVES))
    return list(dict.fromkeys(names or OBJECTIVES))


def measure_objectives(
    results: Results[ObjectiveRecord], names: Sequence[str], epochs: int, *, compile: bool = True
) -> None:
    """Train with every objective that ``results`` lack, and save after each."""
    missing = results.missing(CASE, names)
    for name in names:
        if name in missing:
            results.add([learn(name, epochs, compile=compile)])
        else:
            already(name, results)


def learn(name: str, epochs: int, *, compile: bool = True) -> ObjectiveRecord:
    """Train with one objective, measuring clean accuracy and that under PGD of 20 steps after every epoch."""
    digits = load_digits()
    training = DataLoader(TensorDataset(digits.train_x, digits.train_y), BATCH, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(digits.test_x, digits.test_y), len(digits.test_x))
    objective = MAKE[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DigitsNet()
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        updates = epochs * len(training) * getattr(objective, "replays", 1)
        trainer = AdversarialTrainer(
            model, optimizer, objective, scheduler=OneCycleLR(optimizer, LEARNING_RATE, updates + 1), compile=compile
        )
        attack = PGD(eps=EPS, step_size=EPS / 4, steps=20, seed=SEED)
        with stage(name):
            history = trainer.fit(training, epochs, validation=test, evaluation=attack, seed=SEED)
    return ObjectiveRecord(
        CASE,
        name,
        seconds=[record["seconds"] for record in history.epochs],
        loss=[record["loss"] for record in history.epochs],
        clean=[record["clean"] for record in history.epochs],
        robust=[record["robust"] for record in history.epochs],
        updates=trainer.updates,
    )


class ObjectivesBenchmark(Benchmark):
    """``bench objectives``."""

    name = "objectives"
    help = "what every objective of adversarial training comes to on handwritten digits"
    record = ObjectiveRecord
    about = "Real data: 1347 handwritten digits of scikit-learn to train on, 450 to measure on."
    legend = """\
- clean, PGD-20: accuracy on held-out digits after the last epoch, as they are and under PGD of 20 steps in the Linf
  ball of 0.2 that was trained in. to plain, to pgd: difference of PGD-20 in points. best: the largest PGD-20 of any
  epoch. s an epoch: median, without evaluation.
- pgd, trades, mart and awp attack with PGD of 7 steps; free uses each batch 8 times, so that these run about as many
  passes over a batch. Adam and one cycle of the learning rate, the same for all."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        parser.add_argument("--objectives", nargs="+", metavar="NAME", help="such as pgd, trades, free (default: all)")
        parser.add_argument("--epochs", default=EPOCHS, help=f"for each (default: {EPOCHS})", **WHOLE)
        add_threads(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        names, epochs = choose_objectives(arguments.objectives), arguments.epochs
        return [Plan(self, lambda results: measure_objectives(results, names, epochs), {"sklearn"})]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``: plain training first."""
        records = {record.candidate: record for record in results.records}
        plain, madry = (records.get(name) for name in ("plain", "pgd"))
        rows = []
        for name, record in records.items():
            gains = []
            for other in (plain, madry):
                gains.append("-" if other in (None, record) else f"{100 * (record.robust[-1] - other.robust[-1]):+.1f}")
            best = max(record.robust)
            rows.append(
                [
                    name,
                    f"{record.clean[-1]:.1%}",
                    f"{record.robust[-1]:.1%}",
                    *gains,
                    f"{best:.1%} ({record.robust.index(best) + 1})",
                    str(record.updates),
                    figure(record.median),
                ]
            )
        table = grid(
            ["objective", "clean", "PGD-20", "to plain", "to pgd", "best (epoch)", "updates", "s an epoch"],
            rows,
        )
        return [table]

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``: accuracy under attack and clean over the epochs, a line for each objective."""
        drawn = figure_of(12, 4.4)
        axes = drawn.subplots(1, 2)
        for i, record in enumerate(results.records):
            epochs = range(1, len(record.robust) + 1)
            style: dict[str, Any] = {"color": "0.4", "linestyle": ":"} if record.candidate == "plain" else {}
            for axis, values in zip(axes, (record.robust, record.clean), strict=True):
                shares = [100 * value for value in values]
                axis.plot(epochs, shares, **{"color": f"C{i}", **style}, label=record.candidate)
        for axis, title in zip(axes, ("under PGD-20", "clean"), strict=True):
            finish_axis(axis, f"accuracy {title}, %", "epoch")
            axis.set_ylim(0, 102)
            axis.xaxis.get_major_locator().set_params(integer=True)
        return drawn
