"""Adversarial training: seconds of an iteration, written in all ways, by the number of steps of its attack.

An iteration is an attack of K steps, a forward and backward pass over what it found, and an update ([SB], Figure 2).
Everybody attacks from the input itself, so that all compute the same, with the model in evaluation mode, and learns in
training mode with the same optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from gradprune.attacks import PGD
from gradprune.errors import OptionError
from gradprune.support.figures import figure_of
from gradprune.support.progress import counter, stage
from gradprune.torch_compat.dynamo import counters
from gradprune.torch_compat.inductor import fresh_cache
from gradprune.training import AdversarialTrainer, PGDTraining

from .attack_step import Step, attack, move, pgd_step
from .baselines import DTYPES, GRADPRUNE, Contender
from .benchmark import WHOLE, Benchmark, Plan, add_budget, add_cases, add_settings, already, chosen_cases, packages_of
from .cases import SEED, Case, Workload, find_case
from .harness import (
    Budget,
    CheckFailed,
    load_average,
    peak_bytes,
    reason,
    start_compiler,
    synchronize,
    time_rounds,
)
from .report import COLORS, OURS, attacked, circumstances, failures, figure, finish_axis, grid, ratio_text
from .store import Compared, Results, Settings, Timed

EAGER_TRAINING = "eager, live parameters"
FROZEN_TRAINING = "eager, frozen in the attack"
COMPILED_TRAINING = "frozen + compile(model)"
COMPILED_GRADIENT = "frozen + compile(gradient)"

RIVAL_TRAININGS = (FROZEN_TRAINING, COMPILED_TRAINING, COMPILED_GRADIENT)
"""What a user could write today; the fastest of these is "the best alternative"."""

ATTACK_STEPS = (1, 3, 7, 10, 20)
"""Of the iterations that ``bench training`` compares by default."""

DEFAULT = ("mnist-cnn-b128", "resnet18-32-b16")

LEARNING_RATE, MOMENTUM = 0.01, 0.9

BATCHES, FIRST_SEED = 8, 100
"""How many batches are trained on in turn, and the seed of the first."""

TOLERANCES = 1e-3, 0.05
"""Allowed errors of loss and update; or four times those of eager, where these are larger, but never more than half of
what the attack changes. Rounding tips ReLUs and signs, and each step of an attack builds on the one before it."""

Iterate = Callable[[Tensor, Tensor, int], Tensor]
"""From clean inputs ``(N, ...)``, labels ``(N,)`` and the number of steps to the outer loss, a scalar, detached."""


# --- Records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained(Timed):
    """What was measured of an iteration of adversarial training, written in one way; ``None`` is what was not.

    Attributes:
        case: Name of the case.
        steps: Steps of the attack in an iteration, K.
        candidate: Name of the way.
        failed: Why there are no figures; ``None`` if there are.
        seconds: For every round, the seconds of one iteration: attack, outer step, update. Round ``i`` of all
            candidates ran in turn, on the same batch.
        compile_seconds: What its first iteration took longer than its second, with empty disk caches; compiled code is
            shared by all numbers of steps.
        recompilations: Graphs that were compiled after the first iteration of all.
        loss_error: Relative error of the outer loss of an iteration from the initial weights, against float64.
        update_error: The same of the change of the weights, in the Euclidean norm.
        eager_loss_error: ``loss_error`` of eager with the same settings.
        eager_update_error: ``update_error`` of the same.
        loss_tolerance: Largest allowed ``loss_error``.
        update_tolerance: Largest allowed ``update_error``.
        peak_bytes: Most bytes an iteration holds at once beyond what was held before it.
        load: Load average of the machine when the rounds were begun.
    """

    case: str
    steps: int
    candidate: str
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float | None = None
    recompilations: int | None = None
    loss_error: float | None = None
    update_error: float | None = None
    eager_loss_error: float | None = None
    eager_update_error: float | None = None
    loss_tolerance: float | None = None
    update_tolerance: float | None = None
    peak_bytes: int | None = None
    load: float | None = None

    def derived(self, records: Sequence[Trained]) -> dict[str, Any]:
        """All that follows from the figures, for the readers of a JSON file."""
        return Iteration(records, self.case, self.steps).derived(self.candidate)


class Iteration(Compared[Trained]):
    """The records of one iteration of adversarial training on one case, in all the ways it was written.

    Args:
        records: All records of a file.
        case: Name of the case.
        steps: Steps of its attack.
    """

    def __init__(self, records: Sequence[Trained], case: str, steps: int) -> None:
        self.case, self.steps = case, steps
        self.records = [record for record in records if (record.case, record.steps) == (case, steps)]
        self.measured = {record.candidate: record for record in self.records if record.seconds}

    @staticmethod
    def all(records: Sequence[Trained], case: str) -> list[Iteration]:
        """Those of one case, by their steps."""
        found = {record.steps for record in records if record.case == case}
        return [Iteration(records, case, steps) for steps in sorted(found)]

    @property
    def predicted_ratio(self) -> float:
        """How many times as fast as eager an iteration is without weight gradients in its attack, by FLOPs ([SB])."""
        return (6 * self.steps + 6) / (4 * self.steps + 6)

    @property
    def best_alternative(self) -> str | None:
        """The fastest alternative by the medians."""
        return self.fastest(RIVAL_TRAININGS)

    def more(self, candidate: str) -> dict[str, Any]:
        """As ``Compared.more``."""
        return {
            "best_alternative": self.best_alternative,
            "predicted_ratio": self.predicted_ratio,
        }


# --- Ways to write an iteration ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainee:
    """A model that is trained in one way.

    Attributes:
        name: The way, for tables.
        model: Its model, a copy of its own.
        optimizer: Updates the model.
        iterate: One iteration. No gradients are left behind.
        compiled: Whether its first iteration compiles.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer
    iterate: Iterate
    compiled: bool = False

    def restore(self, work: Workload) -> None:
        """Begin anew from the weights of ``work``."""
        self.model.load_state_dict(work.model.state_dict())
        self.optimizer.state.clear()


Build = Callable[[Workload, Settings], Trainee]


def optimizer_of(model: nn.Module) -> Optimizer:
    """What everybody updates weights with."""
    return SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, foreach=True)


def loss_of(model: nn.Module, autocast: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
    """``(x, y) -> mean cross entropy``, with the model run in ``autocast``."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            logits = model(x)
        return F.cross_entropy(logits.float() if autocast else logits, y)

    return loss


def moving(case: Case, gradient: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """A step of PGD, see ``attack_step.pgd_step``, by a function from inputs and labels to the gradient."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        direction = gradient(x_adv, y)
        return move(case, x_adv, x, direction), direction

    return step


def by_hand(name: str, *, frozen: bool = True, compiled: Literal["model", "gradient"] | None = None) -> Build:
    """An iteration as a user writes it.

    Args:
        name: Its name in tables.
        frozen: Whether parameters require no gradient during the attack, as [SB] has it; otherwise the gradient of the
            input is taken by ``loss.backward()``, together with those of all parameters.
        compiled: What of the attack is compiled, besides the outer loss: the model, ``torch.compile(model)``, or the
            gradient as a whole, ``torch.compile(torch.func.grad(loss))``. Which is faster depends on the network.
    """

    def build(work: Workload, settings: Settings) -> Trainee:
        model = copy.deepcopy(work.model).requires_grad_(True)
        optimizer, dtype, case = optimizer_of(model), DTYPES[settings.autocast], work.case
        loss = learned = loss_of(model, dtype)
        if compiled:
            learned = torch.compile(loss, fullgraph=True, dynamic=False)
        if compiled == "gradient":
            gradient = torch.compile(torch.func.grad(loss), fullgraph=True, dynamic=False)
            step = moving(case, gradient)
        else:
            attacked = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
            step = pgd_step(attacked, case, dtype, backward=not frozen)

        def iterate(x: Tensor, y: Tensor, steps: int) -> Tensor:
            model.eval()
            if frozen:
                model.requires_grad_(False)
            x_adv = attack(step, x, y, steps)
            if frozen:
                model.requires_grad_(True)
            else:
                optimizer.zero_grad()  # what the attack has left there
            model.train()
            value = learned(x_adv, y)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value.detach()

        return Trainee(name, model, optimizer, iterate, compiled is not None)

    return build


def trained_by_us(work: Workload, settings: Settings) -> Trainee:
    """An iteration of ``AdversarialTrainer``."""
    model = copy.deepcopy(work.model).requires_grad_(True).train()
    optimizer, case = optimizer_of(model), work.case
    pgd = PGD(random_start=False, steps=1, eps=case.eps, step_size=case.step_size, bounds=case.bounds, seed=SEED)
    trainer = AdversarialTrainer(model, optimizer, PGDTraining(attack=pgd), autocast=DTYPES[settings.autocast])

    def iterate(x: Tensor, y: Tensor, steps: int) -> Tensor:
        # One trainer for all numbers of steps, as another one would compile the outer step again.
        trainer.objective = PGDTraining(attack=replace(pgd, steps=steps))
        return trainer.step(x, y).loss

    return Trainee(GRADPRUNE, model, optimizer, iterate, compiled=True)


WAYS: dict[str, Build] = {
    EAGER_TRAINING: by_hand(EAGER_TRAINING, frozen=False),
    FROZEN_TRAINING: by_hand(FROZEN_TRAINING),
    COMPILED_TRAINING: by_hand(COMPILED_TRAINING, compiled="model"),
    COMPILED_GRADIENT: by_hand(COMPILED_GRADIENT, compiled="gradient"),
    GRADPRUNE: trained_by_us,
}
"""By their names, in the order of the tables."""


# --- What everybody has to compute ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What an iteration did.

    Attributes:
        loss: Its outer loss.
        update: Change of all parameters, in one piece, float64.
    """

    loss: float
    update: Tensor

    @staticmethod
    def of(model: nn.Module, iterate: Callable[[], Tensor]) -> Outcome:
        """Run an iteration of ``model`` and see."""
        before = _flat(model)
        return Outcome(float(iterate()), _flat(model) - before)

    def errors(self, exact: Outcome) -> tuple[float, float]:
        """Relative differences of loss and of update, the latter in the Euclidean norm."""
        loss = abs(self.loss - exact.loss) / abs(exact.loss)
        return loss, float((self.update - exact.update).norm() / exact.update.norm())


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def outcomes(
    model: nn.Module, case: Case, x: Tensor, y: Tensor, steps: Collection[int], autocast: torch.dtype | None
) -> dict[int, Outcome]:
    """Outcome of an eager iteration for each number of steps; one attack passes through what all of them find."""
    step = pgd_step(copy.deepcopy(model).eval().requires_grad_(False), case, autocast)
    found, x_adv = {}, x.clone()
    for taken in range(max(steps) + 1):
        if taken in steps:
            learner = copy.deepcopy(model).train().requires_grad_(True)
            found[taken] = Outcome.of(learner, partial(_learn, learner, x_adv, y, autocast))
        x_adv, _ = step(x_adv, x, y)
    return found


def _learn(model: nn.Module, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> Tensor:
    loss = loss_of(model, autocast)(x, y)
    loss.backward()
    optimizer_of(model).step()
    return loss.detach()


@dataclass(frozen=True)
class Reference:
    """What iterations from the initial weights have to agree with.

    Attributes:
        exact: Outcomes in float64 by number of steps, and that without an attack.
        eager: Those of eager with the same settings.
    """

    exact: dict[int, Outcome]
    eager: dict[int, Outcome]

    @staticmethod
    def of(work: Workload, x: Tensor, y: Tensor, steps: Collection[int], settings: Settings) -> Reference:
        """Compute it with eager autograd."""
        counts = {0, *steps}
        exact = outcomes(copy.deepcopy(work.model).double(), work.case, x.double(), y, counts, None)
        return Reference(exact, outcomes(work.model, work.case, x, y, counts, DTYPES[settings.autocast]))

    def eager_errors(self, steps: int) -> tuple[float, float]:
        """Errors of eager, of loss and update."""
        return self.eager[steps].errors(self.exact[steps])

    def tolerances(self, steps: int) -> tuple[float, float]:
        """Largest allowed errors of loss and update."""
        effects = self.exact[0].errors(self.exact[steps])
        each = zip(TOLERANCES, self.eager_errors(steps), effects, strict=True)
        loss, update = (min(max(floor, 4 * own), effect / 2) for floor, own, effect in each)
        return loss, update

    def check(self, outcome: Outcome, steps: int) -> tuple[float, float]:
        """Errors of an outcome, of loss and update.

        Raises:
            CheckFailed: They are too large.
        """
        errors = outcome.errors(self.exact[steps])
        for name, error, allowed in zip(("loss", "update"), errors, self.tolerances(steps), strict=True):
            if not error <= allowed:
                raise CheckFailed(f"{name} off by {error:.2%} with {steps} steps, allowed are {allowed:.2%}")
        return errors


# --- Measuring --------------------------------------------------------------------------------------------------------


class Recompilations:
    """Counts graphs that Dynamo compiles while one of several trainees iterates."""

    def __init__(self) -> None:
        self.graphs: dict[str, int] = {}

    def count(self, trainee: Trainee, x: Tensor, y: Tensor, steps: int) -> Tensor:
        """Run an iteration and count."""
        before = counters["stats"]["unique_graphs"]
        loss = trainee.iterate(x, y, steps)
        self.graphs[trainee.name] = self.graphs.get(trainee.name, 0) + counters["stats"]["unique_graphs"] - before
        return loss


def measure_training(results: Results[Trained], cases: Sequence[Case], steps: Sequence[int], budget: Budget) -> None:
    """Measure what ``results`` lack, and save after every number of steps.

    Args:
        results: The file.
        cases: The networks.
        steps: Numbers of steps.
        budget: How long to time each number of steps.
    """
    done = {(one.case, one.steps) for one in results.records}
    for case in cases:
        missing = [count for count in sorted({*steps}) if (case.name, count) not in done]
        if missing:
            measure_case(results, case, missing, budget)
        else:
            already(case.name, results)


def measure_case(results: Results[Trained], case: Case, steps: Sequence[int], budget: Budget) -> None:
    """Let everybody iterate once, check what comes of it, then time in turn those that passed.

    Args:
        results: The file that records go to.
        case: The network.
        steps: Numbers of steps.
        budget: How long to time each.
    """
    # What candidates share with those of other cases counts towards Dynamo's limits.
    torch.compiler.reset()
    settings = results.settings
    with stage(f"{case.name}: building, float64 iterations"):
        work = case.prepare(settings.device, channels_last=settings.channels_last)
        batches = draw_batches(work)
        reference = Reference.of(work, *batches[0], steps, settings)
    start_compiler()
    recompilations = Recompilations()
    trainees: dict[str, Trainee] = {}
    known: dict[str, Trained] = {}
    for name, build in WAYS.items():
        blank = Trained(case.name, 0, name)
        with stage(f"{case.name}: first iteration, {name}"):
            try:
                trainees[name], known[name] = _enter(blank, build, work, batches[1], steps[0], settings)
            except Exception as error:  # whatever a compiler may raise: the others are measured
                known[name] = _failed(blank, error)
    for count in steps:
        load, records, passed = load_average(), {}, []
        for name, blank in known.items():
            records[name] = record = replace(blank, steps=count, load=load)
            if name not in trainees:
                continue
            with stage(f"{case.name}, {count} steps: checking {name}"):
                try:
                    trainees[name].restore(work)
                    iterate = partial(recompilations.count, trainees[name], *batches[0], count)
                    errors = reference.check(Outcome.of(trainees[name].model, iterate), count)
                except Exception as error:
                    records[name] = _failed(record, error)
                    continue
            records[name] = replace(record, **_checked(errors, reference, count))
            passed.append(_contender(trainees[name], batches, count, recompilations))
        with counter(f"{case.name}, {count} steps: timing", budget.rounds * len(passed)) as bar:
            seconds = time_rounds(passed, work, 1, budget, bar.update)
        for contender in passed:
            with stage(f"{case.name}, {count} steps: memory of {contender.name}"):
                records[contender.name] = replace(
                    records[contender.name],
                    seconds=seconds[contender.name],
                    peak_bytes=peak_bytes(contender.step, work.x, work.y),
                    recompilations=recompilations.graphs[contender.name],
                )
        results.add(list(records.values()))


def draw_batches(work: Workload) -> list[tuple[Tensor, Tensor]]:
    """Batches of random inputs and random labels, which a network cannot learn in the time, always the same.

    What is learned would have a gradient of zero, and small numbers may take another time.
    """
    with torch.no_grad():
        classes = work.model(work.x).shape[1]
    drawn = []
    for seed in range(FIRST_SEED, FIRST_SEED + BATCHES):
        y = torch.randint(classes, (work.case.batch,), generator=torch.Generator().manual_seed(seed))
        drawn.append((torch.empty_like(work.x).copy_(work.case.inputs(seed)), y.to(work.y)))
    return drawn


def _enter(
    blank: Trained, build: Build, work: Workload, batch: tuple[Tensor, Tensor], steps: int, settings: Settings
) -> tuple[Trainee, Trained]:
    """Build a trainee and let it iterate twice; with a record of what is known of it then."""

    trainee = build(work, settings)
    # As in ``step.measure_workload``: a compile time is one with empty caches.
    empty = fresh_cache() if trainee.compiled else contextlib.nullcontext()
    seconds = []
    with empty:
        for _ in range(2):
            synchronize(settings.device)
            started = time.perf_counter()
            trainee.iterate(*batch, steps)
            synchronize(settings.device)
            seconds.append(time.perf_counter() - started)
    compiling = max(0.0, seconds[0] - seconds[1]) if trainee.compiled else None
    return trainee, replace(blank, compile_seconds=compiling)


def _contender(
    trainee: Trainee, batches: Sequence[tuple[Tensor, Tensor]], steps: int, recompilations: Recompilations
) -> Contender:
    """A trainee in a form that can be timed: a step is an iteration, each on the next batch."""
    order = itertools.cycle(batches)

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = recompilations.count(trainee, *next(order), steps)
        return x, loss

    return Contender(trainee.name, trainee.model, step, trainee.compiled)


def _checked(errors: tuple[float, float], reference: Reference, steps: int) -> dict[str, Any]:
    """What a record says about errors that are small enough."""
    figured: dict[str, Any] = {}
    figured["loss_error"], figured["update_error"] = errors
    figured["eager_loss_error"], figured["eager_update_error"] = reference.eager_errors(steps)
    figured["loss_tolerance"], figured["update_tolerance"] = reference.tolerances(steps)
    return figured


def _failed(record: Trained, error: Exception) -> Trained:
    print(f"{record.candidate} failed: {reason(error)}", file=sys.stderr, flush=True)
    return replace(record, failed=reason(error))


# --- Tables and plot --------------------------------------------------------------------------------------------------


def _training(results: Results[Trained]) -> list[str]:
    """All sections about iterations of training."""
    summary, body = [], []
    for case in results.cases:
        iterations = Iteration.all(results.records, case)
        for one in iterations:
            ours, best = one.measured.get(GRADPRUNE), one.best_alternative
            row = [f"{case}, {one.steps} step{'s' * (one.steps > 1)}", figure(ours.median) if ours else "-"]
            row += [ratio_text(one.predicted_ratio), ratio_text(one.ratio(GRADPRUNE, EAGER_TRAINING), spread=True)]
            row += [f"{figure(one.measured[best].median)} {best}" if best else "-"]
            summary.append([*row, ratio_text(one.ratio(GRADPRUNE, best), spread=True)])
        records = [record for one in iterations for record in one.records]
        body += [f"## {case}", f"{attacked(find_case(case))}. {circumstances(records)}", *failures(records)]
        rows = [[column(one, r) for column in TRAINING.values()] for one in iterations for r in one.measured.values()]
        body.append(grid([*TRAINING], rows))
    head = [
        "iteration",
        "gradprune s",
        "FLOPs say",
        f"vs {EAGER_TRAINING}",
        "best alternative s",
        "vs best alternative",
    ]
    return ["## Summary\n\n" + grid(head, summary), *body]


def _versus(baseline: str) -> Callable[[Iteration, Trained], str]:
    return lambda one, record: ratio_text(one.ratio(record.candidate, baseline))


def _error(own: float | None) -> str:
    return "-" if own is None else f"{own:.0e}"


TRAINING: dict[str, Callable[[Iteration, Trained], str]] = {
    "steps, way": lambda one, record: f"{record.steps}, {record.candidate}",
    "s": lambda one, record: figure(record.median),
    "IQR": lambda one, record: figure(record.iqr),
    **{f"vs {name}": _versus(name) for name in (EAGER_TRAINING, *RIVAL_TRAININGS)},
    "FLOPs say": lambda one, record: "-" if record.candidate == EAGER_TRAINING else ratio_text(one.predicted_ratio),
    "compile s": lambda one, record: figure(record.compile_seconds),
    "recompiled": lambda one, record: "-" if record.recompilations is None else str(record.recompilations),
    "peak MB": lambda one, record: figure(record.peak_bytes, 1e6),
    "loss error": lambda one, record: _error(record.loss_error),
    "eager's own loss": lambda one, record: _error(record.eager_loss_error),
    "update error": lambda one, record: _error(record.update_error),
    "eager's own update": lambda one, record: _error(record.eager_update_error),
}


class TrainingBenchmark(Benchmark):
    """``bench training``."""

    name = "training"
    help = "seconds per iteration of PGD adversarial training, by the number of attack steps"
    record = Trained
    about = "Random weights and random inputs, always the same; labels are random, too."
    legend = """\
- s: median over the rounds of one iteration: PGD of so many steps from the input itself with the model in evaluation
  mode, forward and backward pass over what it found in training mode, update by SGD with momentum. IQR: its
  interquartile range.
- eager, live parameters: the attack by loss.backward(), which computes all weight gradients too. frozen: parameters
  require no gradient during the attack, as [SB] proposes; + compile(model): torch.compile(model) in the attack,
  + compile(gradient): torch.compile(torch.func.grad(loss)), both with a compiled loss in the outer step. gradprune:
  AdversarialTrainer(model, optimizer, PGDTraining(attack=PGD(...))).step(x, y).
- vs: how many times as fast as that way, median of the ratios within each round; below 1 is slower. In brackets the
  quartiles of these ratios. best alternative: the fastest of those with frozen parameters.
- FLOPs say: (6K + 6) / (4K + 6), the ratio to live parameters if only FLOPs counted and K steps computed no weight
  gradients ([SB]).
- compile s: what the first iteration took longer than the second, with empty disk caches and a compiler that is already
  started; the compiled code serves all numbers of steps. recompiled: graphs that were compiled after it.
- peak MB: most that an iteration holds beyond what was held before it, where no weight has a gradient.
- loss error, update error: of an iteration from the initial weights, loss and change of the weights against float64,
  relative, in the Euclidean norm; eager's own is that of eager autograd. Signs of gradients next to zero, and ReLUs
  that round to the other side, add up over the steps of an attack.
- Every way was checked so for every number of steps; one that fails is not timed. Batches are random, with random
  labels, another one at every iteration and the same for all."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add_cases(parser, DEFAULT)
        text = f"numbers of attack steps (default: {' '.join(map(str, ATTACK_STEPS))})"
        parser.add_argument("--attack-steps", nargs="+", default=ATTACK_STEPS, help=text, **WHOLE)
        add_budget(parser, 120, "number of steps")
        add_settings(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        if settings.autocast == "fp16":
            raise OptionError("bench training --autocast fp16: the first updates would only fit the scale; pass bf16")
        cases, budget = chosen_cases(arguments, DEFAULT), Budget(arguments.rounds, arguments.seconds)
        return [
            Plan(
                self,
                lambda results: measure_training(results, cases, arguments.attack_steps, budget),
                packages_of(cases),
            )
        ]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        return _training(results)

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``: seconds per iteration, and how many times as fast as eager, over the steps."""
        cases = {case: Iteration.all(results.records, case) for case in results.cases}
        figure = figure_of(12, 4.2 * len(cases))
        rows = figure.subplots(len(cases), 2, squeeze=False)
        for (times, ratios), (case, iterations) in zip(rows, cases.items(), strict=True):
            for i, name in enumerate(dict.fromkeys(name for one in iterations for name in one.measured)):
                own = [one for one in iterations if name in one.measured]
                style: dict[str, Any] = (
                    {"color": OURS, "linewidth": 2.2} if name == GRADPRUNE else {"color": COLORS[i % len(COLORS)]}
                )
                style.update({"linestyle": ":"} if name == EAGER_TRAINING else {})
                seconds = [one.measured[name].median for one in own]
                times.plot([one.steps for one in own], seconds, marker="o", markersize=3.5, label=name, **style)
                known = [(one.steps, ratio) for one in own if (ratio := one.ratio(name, EAGER_TRAINING))]
                if name == EAGER_TRAINING or not known:
                    continue
                at = [steps for steps, _ in known]
                ratios.plot(at, [ratio.median for _, ratio in known], marker="o", markersize=3.5, label=name, **style)
                low, high = [ratio.low for _, ratio in known], [ratio.high for _, ratio in known]
                ratios.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
            steps = [one.steps for one in iterations]
            predicted = [one.predicted_ratio for one in iterations]
            ratios.plot(
                steps, predicted, color="black", linewidth=0.9, linestyle="--", label="FLOPs say: (6K+6)/(4K+6)"
            )
            for axis, label in ((times, "seconds per iteration"), (ratios, f"times as fast as {EAGER_TRAINING}")):
                axis.set_xticks(steps, [str(count) for count in steps])
                finish_axis(axis, case, "steps of the attack, K", label)
        return figure
