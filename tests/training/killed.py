"""A training that is killed by its parent at random moments. Imported by a fork server, so that starting is quick."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from networks import loader, network
from torch import nn

from gradprune.attacks import FGSM, PGD
from gradprune.training import AWP, AdversarialTrainer, Free, LinearEps, PGDTraining

EPOCHS = 3


def training(kind: str) -> tuple[nn.Module, AdversarialTrainer]:
    """A training with every kind of state that there is."""
    model = network()
    model.append(nn.Dropout(0.1))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    attack = PGD(eps=0.1, step_size=0.03, steps=2)
    objective = Free(attack=FGSM(eps=0.1), replays=2) if kind == "free" else AWP(objective=PGDTraining(attack=attack))
    return model, AdversarialTrainer(
        model,
        optimizer,
        objective,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=1000),
        eps_schedule=LinearEps(30),
        ema=0.9,
        clip=1.0,
        accumulate=1 if kind == "free" else 2,
        autocast=torch.float16 if kind == "fp16" else None,
        compile=False,
    )


def train(kind: str, folder: Path) -> None:
    """Train to the end, with a checkpoint after every update."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    model, trainer = training(kind)
    trainer.fit(
        loader(240, 12), EPOCHS, validation=loader(24, 12, 1), folder=folder, checkpoint_seconds=0, seed=5, patience=9
    )
    torch.save([*model.state_dict().values(), *trainer.averages], folder / "end.pt")
