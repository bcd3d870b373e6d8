"""What every objective of adversarial training comes to on handwritten digits: accuracy epoch by epoch, and its price.

The same network, data, optimizer, schedule and seed for all, and no setting chosen by looking at one of them alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from gradprune.attacks import FGSM, PGD, RSFGSM
from gradprune.errors import OptionError, unknown
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

from .record import ObjectiveRecord, Results

EPS, STEPS, REPLAYS = 0.2, 7, 8
BATCH, EPOCHS, LEARNING_RATE, SEED = 64, 20, 5e-3, 0
CASE = "digits"

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


def measure_objectives(results: Results, names: Sequence[str], epochs: int, *, compile: bool = True) -> None:
    """Train with every objective that ``results`` lack, and save after each."""
    missing = results.missing(CASE, names)
    for name in names:
        if name in missing:
            results.add([learn(name, epochs, compile=compile)])
        else:
            print(f"{name}: already in {results.path}", file=sys.stderr)


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
