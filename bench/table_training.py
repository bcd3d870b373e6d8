"""[SB] Figure 2: an epoch of adversarial training by the steps of its attack, the attack in five ways.

The loop is what users write: PGD by ``loss.backward()`` in evaluation mode, a forward and backward pass over what it
found in training mode, an update. Only the attack differs; the outer step is eager in all.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradprune

from .attack_step import attack, pgd_step
from .baselines import Contender
from .benchmark import already
from .cases import Case, Workload
from .harness import Budget
from .store import Results, Settings
from .table_scales import Scale
from .table_ways import COMPILED, FROZEN, PATCHED, Entry, Models, compare, contender, sharing
from .training import optimizer_of

PART = "figure2"

IMAGES = 50_000
"""Of an epoch of CIFAR-10."""


def pgd(model: nn.Module, x: Tensor, y: Tensor, case: Case, steps: int) -> Tensor:
    """PGD in the ball of a case, from the input itself, by ``loss.backward()``."""
    return attack(pgd_step(model, case, backward=True), x, y, steps)


def trainee(models: Models, initial: dict[str, Any], steps: int, way: str, work: Workload, _: Settings) -> Contender:
    """Training with the attack in one way, from the initial weights; what it returns is what the attack found."""
    model, attacked = models.of(way)
    model.load_state_dict(initial)
    model.requires_grad_(True)
    optimizer = optimizer_of(model)
    find = gradprune.patch(pgd) if way == PATCHED else pgd
    toggled = way in (FROZEN, COMPILED)

    def iterate(x: Tensor, y: Tensor) -> Tensor:
        model.eval()
        if toggled:
            model.requires_grad_(False)
        x_adv = find(attacked, x, y, work.case, steps)
        if toggled:
            model.requires_grad_(True)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        return x_adv.detach()

    return contender(way, model, iterate)


def measure_epochs(results: Results[Entry], scale: Scale, budget: Budget) -> None:
    """Measure the numbers of steps that ``results`` lack, and save after each."""
    settings = results.settings
    done = {one.attack for one in results.records if one.part == PART}
    missing = [steps for steps in scale.training_steps if name_of(steps) not in done]
    if not missing:
        already("figure 2", results)
        return
    work = scale.training.prepare(settings.device)
    # What it reads in them already would leave nothing to learn.
    y = torch.randint(int(work.model(work.x[:1]).shape[1]), (len(work.x),), generator=torch.Generator().manual_seed(1))
    work = replace(work, y=y.to(work.y))
    initial = {name: value.clone() for name, value in work.model.state_dict().items()}
    with sharing():
        models = Models(work.model)
        for steps in missing:
            blank = Entry(PART, work.case.name, name_of(steps), "", eps=work.case.eps, norm="linf", samples=len(work.x))
            make = partial(trainee, models, initial, steps)
            blank = replace(blank, steps=steps, predicted=predicted(steps))
            results.add(compare(blank, make, models, work, settings, budget))


def name_of(steps: int) -> str:
    """What a number of attack steps is called."""
    return f"K = {steps}"


def epoch_seconds(entry: Entry, seconds: float) -> float:
    """Seconds of an epoch, of those of an iteration."""
    return seconds * IMAGES / (entry.samples or 1)


def predicted(steps: int) -> float:
    """How many times as fast an iteration is without weight gradients in its attack, by FLOPs ([SB])."""
    return (6 * steps + 6) / (4 * steps + 6)
