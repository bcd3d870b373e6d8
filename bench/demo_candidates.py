"""The four ways to run the attack that are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attack_step import Ball, Step, pgd_step


@dataclass(frozen=True)
class Candidate:
    """One way to run the attack.

    Attributes:
        name: Its name in the tables.
        model: The model its step attacks. Each candidate has a copy of its own, so that neither frozen parameters nor
            gradients that accumulate in one can show in another, nor in the model that was given.
        step: The attack step.
        compiled: Whether its first call compiles.
        reports: What gradprune says it did, as dictionaries; empty for everybody else and before the first call.
    """

    name: str
    model: nn.Module
    step: Step
    compiled: bool = False
    reports: Callable[[], list[dict[str, Any]]] = list

    def clear_gradients(self) -> None:
        """Forget the weight gradients that earlier steps left behind."""
        for parameter in self.model.parameters():
            parameter.grad = None


EAGER = "eager"
FROZEN = "frozen eager"
INDUCTOR = "torch.compile"
GRADPRUNE = "gradprune"


def candidates(model: nn.Module, eps: float, step_size: float) -> list[Candidate]:
    """All candidates, in the order of the tables.

    Args:
        model: The model under attack; it is copied, never touched.
        eps: Radius of the Linf ball.
        step_size: Length of a step.
    """
    ball = Ball(eps, step_size)
    live, frozen, inductor = copy.deepcopy(model), _frozen(model), _frozen(model)
    return [
        Candidate(EAGER, live, pgd_step(live, ball, backward=True)),
        Candidate(FROZEN, frozen, pgd_step(frozen, ball, backward=True)),
        Candidate(INDUCTOR, inductor, pgd_step(torch.compile(inductor), ball, backward=True), compiled=True),
        _gradprune(copy.deepcopy(model), ball),
    ]


def start_compiler() -> None:
    """Compile something trivial.

    What Inductor does once per process and once per machine, such as its imports and the headers it precompiles, would
    otherwise count against the first candidate that compiles.
    """
    torch.compile(lambda tensor: (tensor + 1).relu())(torch.ones(64))


def _gradprune(model: nn.Module, ball: Ball) -> Candidate:
    """The code of the eager candidate, its parameters as live as there, compiled as a whole."""
    step = torch.compile(pgd_step(model, ball, backward=True), backend="gradprune")

    def reports() -> list[dict[str, Any]]:
        import gradprune

        return [report.to_dict() for report in gradprune.reports(step)]

    return Candidate(GRADPRUNE, model, step, compiled=True, reports=reports)


def _frozen(model: nn.Module) -> nn.Module:
    """A copy without a single parameter that requires a gradient, as [SB] proposes."""
    return copy.deepcopy(model).requires_grad_(False)
