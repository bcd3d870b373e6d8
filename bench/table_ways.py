"""The five ways in which ``bench tables`` runs an attack, and what it keeps of each."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import gradprune
from gradprune.torch_compat.aot import functorch_config
from gradprune.torch_compat.dynamo import dynamo_config

from . import timing
from .attack_candidates import whole
from .attack_step import pgd_step
from .attacks import Attacked, check_examples, run_in_turn
from .baselines import COMPILED_MODEL, Baseline, Contender
from .cases import SEED, Workload
from .harness import Budget
from .store import Settings
from .table_attacks import Lengths, Patch, Row

SHIPPED = "as shipped"
FROZEN = "frozen"
COMPILED = COMPILED_MODEL
ACCELERATED = "accelerate"
PATCHED = "patch"

WAYS = (SHIPPED, FROZEN, COMPILED, ACCELERATED, PATCHED)
"""In the order of the tables."""

RECOMPILATIONS = 64

OFF = 1e-3
"""A pixel differs if it is off by more than this, pixels being from 0 to 1."""


@dataclass(frozen=True)
class Entry(Attacked):
    """What was measured of a row of a table, run in one way.

    Attributes:
        other_verdicts: Samples that are fooled and are not by the attack as shipped, or the other way round.
        differing: Share of the values that are off those of the attack as shipped by more than ``OFF``.
        rounding: ``differing`` of the attack as shipped, once more with other kernels of torch.
        weight_flops: FLOPs that compiled graphs spend on gradients of weights; ``None`` where gradprune compiled none.
        predicted: How many times as fast as with a full backward pass a step is without weight gradients if only FLOPs
            counted.
        samples: Inputs in a batch.
    """

    rounding: float | None = None
    weight_flops: int | None = None
    predicted: float | None = None
    samples: int | None = None

    @property
    def best(self) -> float:
        """The smallest of the seconds."""
        return min(self.seconds)


class Models:
    """One network in the five ways, shared by all attacks on it, so that it is compiled once for each.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def _copy(self, frozen: bool) -> nn.Module:
        return copy.deepcopy(self._model).requires_grad_(not frozen)

    @cached_property
    def _shipped(self) -> nn.Module:
        return self._copy(False)

    @cached_property
    def _frozen(self) -> nn.Module:
        return self._copy(True)

    @cached_property
    def _compiled(self) -> tuple[nn.Module, Any]:
        model = self._copy(True)
        return model, compile_model(model)

    @cached_property
    def _accelerated(self) -> tuple[nn.Module, Any]:
        model = self._copy(False)
        return model, gradprune.accelerate(model)

    def of(self, way: str) -> tuple[nn.Module, Any]:
        """The network whose parameters show gradients, and what is attacked."""
        if way == COMPILED:
            return self._compiled
        if way in (ACCELERATED, PATCHED):
            return self._accelerated
        model = self._shipped if way == SHIPPED else self._frozen
        return model, model

    @property
    def reports(self) -> list[Any]:
        """What gradprune says it did."""
        return gradprune.reports(self._accelerated[1]) if "_accelerated" in vars(self) else []


def compile_model(model: nn.Module) -> Any:
    """What the way ``COMPILED`` attacks."""
    return torch.compile(model)


def as_it_is(attack: Any) -> Any:
    """In place of ``gradprune.patch``."""
    return attack


@contextlib.contextmanager
def other_kernels() -> Iterator[None]:
    """Within it torch computes convolutions as it would without oneDNN and cuDNN, and rounds otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these two set more than they are asked to, and are warned of that
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


Make = Callable[[str, Workload, Settings], Contender]
"""An attack in one of ``WAYS``."""


def seeded(attack: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same attack, which draws the same random numbers at every call, whoever draws them."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        random.seed(SEED)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        return attack(x, y).detach()

    return run


def contender(way: str, model: nn.Module, attack: Callable[[Tensor, Tensor], Tensor]) -> Contender:
    """An attack in one way.

    Args:
        way: One of ``WAYS``.
        model: Whose parameters may have gradients.
        attack: From inputs and labels to adversarial examples.
    """
    context = _kept if way == COMPILED else contextlib.nullcontext
    return Contender(way, model, whole(seeded(attack)), way not in (SHIPPED, FROZEN), context=context)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """A compiled backward pass that may run again must not write into what was saved for it."""
    with functorch_config.patch(donated_buffer=False):
        yield


def compare(
    blank: Entry,
    make: Make,
    models: Models,
    work: Workload,
    settings: Settings,
    budget: Budget,
    *,
    again: bool = False,
) -> list[Entry]:
    """Run one attack in all ways, in turn, and compare what comes of them.

    Args:
        blank: What all records have in common.
        make: Makes the attack.
        models: What it is made with.
        work: What is attacked.
        settings: Of the run.
        budget: How long to time.
        again: Whether to run the attack as shipped once more with other kernels, for ``Entry.rounding``.

    Returns:
        A record for each of ``WAYS``, in their order.
    """
    made = [Baseline("", way, partial(make, way), compiles=way not in (SHIPPED, FROZEN)) for way in WAYS]
    trials = run_in_turn(blank, made, work, settings, budget, partial(check_examples, work, blank.eps), shared=True)
    first = trials[0].found
    records = []
    for trial in trials:
        entry = trial.record
        assert isinstance(entry, Entry)
        if trial.found is not None and first is not None:
            differing = timing.differing_share(trial.found, first, OFF)
            verdicts = int((_fooled(work, trial.found) != _fooled(work, first)).sum())
            entry = replace(entry, differing=differing, other_verdicts=verdicts)
        if again and trial is trials[0] and trial.contender and first is not None:
            with other_kernels():
                otherwise, _ = trial.contender.step(work.x, work.x, work.y)
            entry = replace(entry, rounding=timing.differing_share(otherwise, first, OFF))
        if trial.found is not None and entry.candidate in (ACCELERATED, PATCHED) and models.reports:
            flops = sum(report.flops["after"]["weight_grad"] for report in models.reports)
            entry = replace(entry, weight_flops=flops)
        records.append(entry)
    return records


def measure_row(
    row: Row, lengths: Lengths, models: Models, work: Workload, settings: Settings, budget: Budget
) -> list[Entry]:
    """Run an attack on pictures in all ways.

    Returns:
        A record for each of ``WAYS``, in their order.
    """
    eps = work.case.eps if row.eps == "case" else row.eps

    def make(way: str, work: Workload, settings: Settings) -> Contender:
        model, attacked = models.of(way)
        patch: Patch = gradprune.patch if way == PATCHED else as_it_is
        return contender(way, model, row.build(attacked, work, lengths, patch))

    blank = Entry(row.table, work.case.name, row.name, "", eps=eps, norm=row.norm, samples=len(work.x))
    blank = replace(blank, predicted=predicted_by_flops(models, work))
    return compare(blank, make, models, work, settings, budget, again=True)


def predicted_by_flops(models: Models, work: Workload) -> float:
    """How many times the FLOPs of a step without weight gradients one with them takes, both run eagerly and counted."""
    full, pruned = (
        timing.flops(pgd_step(models.of(way)[0], work.case, backward=True), work.x, work.x, work.y)
        for way in (SHIPPED, FROZEN)
    )
    return full / pruned


def _fooled(work: Workload, found: Tensor) -> Tensor:
    with torch.no_grad():
        predictions: Tensor = work.model(found).argmax(1)
    return predictions != work.y


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within it the process begins without compiled code and keeps all that comes, and drops it at the end.

    Attacks call one network with gradients and without, in whole batches and in parts: nobody should run eagerly
    because Dynamo has compiled it too often.
    """
    torch.compiler.reset()
    with dynamo_config.patch(recompile_limit=RECOMPILATIONS):
        yield
    torch.compiler.reset()
