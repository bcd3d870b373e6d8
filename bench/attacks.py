"""Whole attacks: beside Torchattacks, beside the bare step, and with samples leaving as soon as they are fooled."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.attacks import FAB, PGD, Attack, AutoAttack, Runtime, TargetedAPGD
from gradprune.attacks.norms import get_norm
from gradprune.runtime import Query
from gradprune.runtime.functions import Functions, Sized
from gradprune.support.progress import counter, stage
from gradprune.torch_compat.inductor import fresh_cache
from gradprune.workloads.digits import load_digits

from . import timing
from .attack_candidates import (
    RIVALS,
    TORCHATTACKS,
    TORCHATTACKS_COMPILED,
    UNCOMPILED,
    Method,
    choose_methods,
    our_contender,
    torchattacks_version,
    ways,
    whole,
    with_ten_classes,
)
from .attack_step import attack as take_steps
from .baselines import GRADPRUNE, Baseline, Contender, choose
from .benchmark import Benchmark, Plan, add_budget, add_cases, add_settings, already, chosen_cases, packages_of
from .cases import SEED, Case, Workload
from .harness import (
    MIN_ROUNDS,
    Budget,
    CheckFailed,
    load_average,
    reason,
    start_compiler,
    synchronize,
    time_rounds,
)
from .report import OTHERS, OURS, SECOND, Bar, circumstances, draw_bars, eps_text, figure, grid, ratio_text, share
from .store import Compared, Results, Settings, Timed

BARE_STEP, RUNTIME = "bare compiled step", "through the runtime"
ACTIVE_SET, FULL_BATCH, NOTHING_DROPPED = "active set", "active_set=False", "nothing dropped"

PARTS = ("attacks", "overhead", "active-set")
"""Of ``bench attacks``."""

DEFAULT = ("mnist-cnn-b128", "resnet18-112-b8")

OVERHEAD_STEPS = 50

TOLERANCE = 1e-6
"""How far outside of ball and bounds what an attack returns may be, for rounding."""

SAMPLES, CHANNELS, EPOCHS = 256, 64, 10
"""Of the trained network of the active set: so wide that its arithmetic is what takes the time."""

STEPS, QUERIES, SEARCH_STEPS = 20, 200, 20
"""Of AutoAttack, which takes a hundred steps and 5000 queries otherwise; and of the search for its radius."""

LARGEST_EPS, HALVINGS = 0.5, 8


# --- Records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attacked(Timed):
    """What was measured of a whole attack, run in one way; ``None`` is what was not, or cannot be.

    Attributes:
        part: One of ``PARTS``.
        case: Name of the case.
        attack: Name of the attack.
        candidate: Name of the way to run it.
        failed: Why there are no figures; ``None`` if there are.
        seconds: For every round, the seconds of the whole attack. Round ``i`` of all candidates of an attack on a case
            ran in turn.
        steps: How many steps these are of, where it is a figure of each that matters.
        cold_seconds: Duration of the first attack, if it compiles, with empty disk caches.
        eps: Radius of the ball, in the Linf norm.
        norm: Name of the norm of ``distance``.
        success_rate: Share of the inputs that the attack moved to another class than their label.
        distance: Median norm of the perturbations that did.
        differing: Share of the values of the adversarial examples that are not those of the first candidate, where the
            attack draws nothing at random.
        shown: Inputs that the network was shown during one attack, where it is not compiled.
        outside: Of some attacks, the share of the time in which no compiled function ran.
        other_verdicts: Samples that are fooled and were not by the whole batch, or the other way round.
        compilations: How often the model was compiled.
        load: Load average of the machine when the attack was begun.
    """

    part: str
    case: str
    attack: str
    candidate: str
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)
    steps: int | None = None
    cold_seconds: float | None = None
    eps: float | None = None
    norm: str | None = None
    success_rate: float | None = None
    distance: float | None = None
    differing: float | None = None
    shown: int | None = None
    outside: list[float] = field(default_factory=list)
    other_verdicts: int | None = None
    compilations: int | None = None
    load: float | None = None

    @property
    def compile_seconds(self) -> float | None:
        """What the first attack took longer than the others."""
        return None if self.cold_seconds is None else max(0.0, self.cold_seconds - self.median)

    @property
    def outside_share(self) -> float | None:
        """Median of ``outside``."""
        return statistics.median(self.outside) if self.outside else None

    def derived(self, records: Sequence[Attacked]) -> dict[str, Any]:
        """All that follows from the figures, for the readers of a JSON file."""
        return Contest(records, self.part, self.case, self.attack).derived(self.candidate)


class Contest(Compared[Attacked]):
    """The records of one attack on one case, in all the ways it was run.

    Args:
        records: All records of a file.
        part: One of ``PARTS``.
        case: Name of the case.
        attack: Name of the attack.
    """

    def __init__(self, records: Sequence[Attacked], part: str, case: str, attack: str) -> None:
        self.part, self.case, self.attack = part, case, attack
        self.records = [
            record for record in records if (record.part, record.case, record.attack) == (part, case, attack)
        ]
        self.measured = {record.candidate: record for record in self.records if record.seconds}

    @staticmethod
    def all(records: Sequence[Attacked], part: str, case: str | None = None) -> list[Contest]:
        """Those of one part, and of one case if it is given, each once and in their order."""
        found = [record for record in records if record.part == part]
        keys = dict.fromkeys((one.case, one.attack) for one in found if case in (None, one.case))
        return [Contest(found, part, *key) for key in keys]

    @property
    def work(self) -> float | None:
        """How many times as many inputs gradprune shows the network as Torchattacks does."""
        ours, theirs = (self.measured.get(name) for name in (UNCOMPILED, TORCHATTACKS))
        return ours.shown / theirs.shown if ours and theirs and ours.shown and theirs.shown else None

    def more(self, candidate: str) -> dict[str, Any]:
        """As ``Compared.more``."""
        record = self.measured[candidate]
        return {
            "compile_seconds": record.compile_seconds,
            "outside_share": record.outside_share,
        }


Measure = Callable[[Workload, Settings, Budget], list[Attacked]]


def measure_attacks(
    results: Results[Attacked], cases: Sequence[Case], methods: Sequence[Method], parts: Sequence[str], budget: Budget
) -> None:
    """Measure what ``results`` lack, and save after every attack.

    Args:
        results: The file.
        cases: The networks.
        methods: What to compare with Torchattacks on each of them.
        parts: Which of ``PARTS``.
        budget: How long to time each attack.
    """
    settings = results.settings
    done = {(one.part, one.case, one.attack) for one in results.records}

    def add(part: str, case: str, attack: str, measure: Measure, prepare: Callable[[], Workload]) -> None:
        if (part, case, attack) in done:
            already(f"{case}, {part}, {attack}", results)
        else:
            results.add(measure(prepare(), settings, budget))

    for case in cases:
        prepare = cache(partial(case.prepare, settings.device, channels_last=settings.channels_last))
        for method in methods if "attacks" in parts else ():
            add("attacks", case.name, method.key, partial(measure_method, method), prepare)
        if "overhead" in parts:
            add("overhead", case.name, f"pgd-{OVERHEAD_STEPS}", measure_overhead, prepare)
    train_once = cache(partial(half_robust, settings))
    for attack, make in ACTIVE.items() if "active-set" in parts else ():
        add("active-set", digits_name(), attack, partial(measure_active_set, attack, make), train_once)


# --- What all parts have in common ------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One way to run an attack, and what came of it.

    Attributes:
        record: Of what is known so far.
        contender: ``None`` if it failed.
        found: What its first attack returned.
    """

    record: Attacked
    contender: Contender | None = None
    found: Tensor | None = None


def run_in_turn(
    blank: Attacked,
    baselines: Sequence[Baseline],
    work: Workload,
    settings: Settings,
    budget: Budget,
    check: Callable[[Tensor], None],
    *,
    shared: bool = False,
) -> list[Trial]:
    """Run an attack in several ways once, check what comes of it, then time those in turn that passed.

    Args:
        blank: A record with what all have in common.
        baselines: The ways; a step of their contenders is a whole attack.
        work: What is attacked.
        settings: Of the run.
        budget: How long to time.
        check: Raises ``CheckFailed`` for adversarial examples that are none.
        shared: Whether what an earlier attack has compiled may be used, in the process and on disk.

    Returns:
        Their trials, in their order.
    """

    if not shared:
        torch.compiler.reset()
    blank = replace(blank, load=load_average())
    if any(baseline.compiles for baseline in baselines) and not shared:
        start_compiler()
    trials = []
    for baseline in baselines:
        trial = Trial(replace(blank, candidate=baseline.name))
        trials.append(trial)
        # As in ``step.measure_workload``: a compile time is one with empty caches.
        empty = fresh_cache() if baseline.compiles and not shared else contextlib.nullcontext()
        with stage(f"{blank.case}, {blank.attack}: first attack, {baseline.name}"), empty:
            try:
                _enter(trial, baseline, work, settings, check)
            except Exception as error:  # whatever a library or a compiler may raise: the others are measured
                trial.contender = None
                trial.record = replace(trial.record, failed=reason(error))
                print(f"{baseline.name} failed: {reason(error)}", file=sys.stderr, flush=True)
    passed = [trial.contender for trial in trials if trial.contender]
    with counter(f"{blank.case}, {blank.attack}: timing", budget.rounds * len(passed)) as bar:
        seconds = time_rounds(passed, work, 1, budget, bar.update)
    for trial in trials:
        if trial.contender:
            compilations = Functions.of(trial.contender.model).compilations or None
            trial.record = replace(
                trial.record, seconds=seconds[trial.contender.name], compilations=compilations, **_achieved(trial, work)
            )
    return trials


def _enter(
    trial: Trial, baseline: Baseline, work: Workload, settings: Settings, check: Callable[[Tensor], None]
) -> None:
    """Build one contender, run its attack for the first time, and check it."""
    contender = baseline.build(work, settings)
    # A compiler would compile the counting as well.
    counts: AbstractContextManager[list[int] | None] = (
        contextlib.nullcontext() if contender.compiled else _counted(contender.model)
    )
    with contender.context(), counts as shown:
        started = time.perf_counter()
        found, _ = contender.step(work.x, work.x, work.y)
        synchronize(settings.device)
        seconds = time.perf_counter() - started
    check(found)
    trial.contender, trial.found = contender, found
    cold = seconds if contender.compiled else None
    trial.record = replace(trial.record, cold_seconds=cold, shown=sum(shown) if shown else None)


@contextlib.contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list that is given the size of every batch that the model is shown."""
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def _achieved(trial: Trial, work: Workload) -> dict[str, Any]:
    """What the attack achieved."""
    found, norm = trial.found, get_norm(trial.record.norm or "linf")
    assert found is not None
    fooled = _fooled(work, found)
    lengths = norm.of(found - work.x)[fooled]
    return {
        "success_rate": float(fooled.double().mean()),
        "distance": float(lengths.median()) if len(lengths) else None,
    }


def _fooled(work: Workload, found: Tensor) -> Tensor:
    """Which samples ``(N,)`` the network itself, in eager mode, no longer takes for what their labels say."""
    with torch.no_grad():
        predictions: Tensor = work.model(found).argmax(1)
    return predictions != work.y


def check_examples(work: Workload, eps: float | None, found: Tensor) -> None:
    """Check that adversarial examples are valid inputs and, if ``eps`` is given, in the Linf ball.

    Raises:
        CheckFailed: They are not.
    """
    if found.shape != work.x.shape or not bool(found.isfinite().all()):
        raise CheckFailed("what it returns are no inputs: of another shape, or not finite")
    if work.case.bounds is not None:
        outside = max(work.case.bounds[0] - float(found.min()), float(found.max()) - work.case.bounds[1])
        if outside > TOLERANCE:
            raise CheckFailed(f"what it returns is outside of the bounds by {outside:.1e}")
    if eps is not None and (beyond := float((found - work.x).abs().max()) - eps) > TOLERANCE:
        raise CheckFailed(f"what it returns is outside of the ball by {beyond:.1e}")


# --- Beside Torchattacks ----------------------------------------------------------------------------------------------


def measure_method(method: Method, work: Workload, settings: Settings, budget: Budget) -> list[Attacked]:
    """Run one attack in all ways.

    Returns:
        A record for each of ``attack_candidates.ways``, in their order.
    """
    work = with_ten_classes(replace(work, case=replace(work.case, eps=method.ball * work.case.eps)))
    eps = work.case.eps if method.bounded else None
    blank = Attacked("attacks", work.case.name, method.key, "", eps=eps, norm=method.norm)
    trials = run_in_turn(blank, ways(method), work, settings, budget, partial(check_examples, work, eps))
    first = trials[0].found
    if method.deterministic and first is not None:
        _compare(trials, first)
    return [trial.record for trial in trials]


def _compare(trials: Sequence[Trial], first: Tensor) -> None:
    for trial in trials:
        if trial.found is not None:
            trial.record = replace(trial.record, differing=timing.differing_share(trial.found, first))


# --- Beside the bare step ---------------------------------------------------------------------------------------------


class Clock(Functions):
    """The compiled functions of a model, with a clock that can be started.

    Attributes:
        running: Whether it takes the time.
        seconds: How long functions ran meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running = False
        self.seconds = 0.0

    def get(self, key: Any, make: Callable[[], Sized]) -> Any:
        """See ``Functions.get``."""
        function = super().get(key, make)
        return partial(self._time, function) if self.running else function

    def _time(self, function: Sized, model: Any, x: Tensor, *others: Tensor, **options: Any) -> Any:
        synchronize(x.device)
        started = time.perf_counter()
        result = function(model, x, *others, **options)
        synchronize(x.device)
        self.seconds += time.perf_counter() - started
        return result


def measure_overhead(
    work: Workload, settings: Settings, budget: Budget, runtime: Runtime | None = None
) -> list[Attacked]:
    """Run PGD through the runtime and as a loop over the compiled step of ``bench step``.

    Args:
        work: What is attacked.
        settings: Of the run.
        budget: How long to time.
        runtime: In place of the default one.

    Returns:
        A record of each, the bare step's first.
    """
    case = work.case
    options: dict[str, Any] = {"eps": case.eps, "step_size": case.step_size, "bounds": case.bounds}
    (bare,) = choose(["gradprune"], settings.device)

    def build_bare(work: Workload, settings: Settings) -> Contender:
        contender = bare.build(work, settings)
        step = whole(lambda x, y: take_steps(contender.step, x, y, OVERHEAD_STEPS))
        return replace(contender, name=BARE_STEP, step=step)

    def build_attack(work: Workload, settings: Settings) -> Contender:
        make = lambda _: PGD(random_start=False, steps=OVERHEAD_STEPS, **options)  # noqa: E731
        contender = our_contender(RUNTIME, make, runtime or Runtime(), work, settings)
        Clock().keep(contender.model)
        return contender

    name = f"pgd-{OVERHEAD_STEPS}"
    blank = Attacked("overhead", case.name, name, "", steps=OVERHEAD_STEPS, eps=case.eps, norm="linf")
    baselines = [Baseline("", BARE_STEP, build_bare), Baseline("", RUNTIME, build_attack)]
    check = partial(check_examples, work, case.eps)
    trials = run_in_turn(blank, baselines, work, settings, budget, check)
    if trials[0].found is not None:
        _compare(trials, trials[0].found)
    if contender := trials[1].contender:
        outside = [_share_outside(contender, work) for _ in range(min(MIN_ROUNDS, budget.rounds))]
        trials[1].record = replace(trials[1].record, outside=outside)
    return [trial.record for trial in trials]


def _share_outside(contender: Contender, work: Workload) -> float:
    """Share of the time of one attack in which no function of its model ran."""
    clock = Functions.of(contender.model)
    assert isinstance(clock, Clock)
    clock.seconds, clock.running = 0.0, True
    try:
        started = time.perf_counter()
        contender.step(work.x, work.x, work.y)
        synchronize(work.x.device)
        return 1 - clock.seconds / (time.perf_counter() - started)
    finally:
        clock.running = False


# --- With the active set ----------------------------------------------------------------------------------------------


class EveryTarget(TargetedAPGD):
    """Targeted APGD that aims all samples at every class."""

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        order = query.logits(x).scatter(1, labels[:, :1], -torch.inf).argsort(dim=1, descending=True)
        result, is_open = x.clone(), torch.ones_like(labels[:, 0], dtype=torch.bool)
        for place in range(min(self.targets, query.classes - 1)):
            aimed = torch.stack([labels[:, 0], order[:, place]], dim=1)
            state = self.maximize(query, x, aimed, self.start(x, generator))
            succeeds = is_open & state.fooled
            result[succeeds] = state.result()[succeeds]
            is_open &= ~succeeds
        return result


class WholeEnsemble(AutoAttack):
    """AutoAttack that gives every part all samples, and has each part keep them."""

    keeps_all = True

    @property
    def parts(self) -> tuple[Attack, ...]:
        """See ``AutoAttack.parts``."""
        return tuple(
            EveryTarget(**vars(part))
            if isinstance(part, TargetedAPGD)
            else replace(part, stop_at_success=False)
            if isinstance(part, FAB)
            else part
            for part in super().parts
        )


def pgd(case: Case, steps: int = 50) -> PGD:
    """PGD for an evaluation: what is fooled is done."""
    return PGD(eps=case.eps, step_size=case.step_size, steps=steps, stop_at_success=True, seed=SEED)


def auto_attack(case: Case, kind: type[AutoAttack] = AutoAttack) -> AutoAttack:
    """A short AutoAttack."""
    return kind(eps=case.eps, steps=STEPS, queries=QUERIES, seed=SEED)


ACTIVE: dict[str, Callable[[Case], PGD | AutoAttack]] = {"pgd-50": pgd, "autoattack": auto_attack}


def measure_active_set(
    attack: str,
    make: Callable[[Case], PGD | AutoAttack],
    work: Workload,
    settings: Settings,
    budget: Budget,
    runtime: Runtime | None = None,
) -> list[Attacked]:
    """Run an attack with samples leaving as soon as they are fooled, and without.

    Args:
        attack: Its name.
        make: Makes it.
        work: What is attacked.
        settings: Of the run.
        budget: How long to time.
        runtime: In place of the default one.

    Returns:
        A record of each way, that with the active set first.
    """
    active = runtime or Runtime()
    full = replace(active, active_set=False)
    chosen: dict[str, tuple[Callable[[Case], PGD | AutoAttack], Runtime]] = {
        ACTIVE_SET: (make, active),
        FULL_BATCH: (make, full),
    }
    if isinstance(make(work.case), AutoAttack):
        chosen[NOTHING_DROPPED] = partial(auto_attack, kind=WholeEnsemble), full
    baselines = [
        Baseline("", name, partial(our_contender, name, *how), compiles=bool(active.compile))
        for name, how in chosen.items()
    ]
    eps = work.case.eps
    blank = Attacked("active-set", work.case.name, attack, "", eps=eps, norm="linf")
    trials = run_in_turn(blank, baselines, work, settings, budget, partial(check_examples, work, eps))
    reference = trials[1].found
    for trial in trials:
        if reference is not None and trial.found is not None:
            others = _fooled(work, trial.found) != _fooled(work, reference)
            trial.record = replace(trial.record, other_verdicts=int(others.sum()))
    return [trial.record for trial in trials]


def digits_name() -> str:
    """Name of the case of the active set."""
    return f"digits-{CHANNELS}-{2 * CHANNELS}-b{SAMPLES}"


def half_robust(settings: Settings) -> Workload:
    """A network trained on handwritten digits, held-out ones, and a ball in which PGD fools just about half of them."""
    name = digits_name()
    digits = load_digits()
    with stage(f"{name}: training"):
        model = train(digits.train_x, digits.train_y).to(settings.device)
    x, y = (part[:SAMPLES].to(settings.device) for part in (digits.test_x, digits.test_y))
    if settings.channels_last:
        x = x.to(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    case = Case(name.rpartition("-b")[0], len(x), (1, 8, 8), lambda: model)
    with stage(f"{name}: a ball in which half of the samples are fooled"):
        return half_fooled(Workload(case, model, x, y))


def half_fooled(work: Workload) -> Workload:
    """The same with the smallest ball, found by bisection, in which PGD fools at least half of the samples."""
    low, high = 0.0, LARGEST_EPS

    def within(eps: float) -> Workload:
        return replace(work, case=replace(work.case, eps=eps, step_size=eps / 4))

    for _ in range(HALVINGS):
        tried = within((low + high) / 2)
        found = pgd(tried.case, SEARCH_STEPS)(work.model, work.x, work.y, runtime=Runtime(compile=False))
        if float(_fooled(work, found).double().mean()) < 0.5:
            low = tried.case.eps
        else:
            high = tried.case.eps
    return within(high)


def train(x: Tensor, y: Tensor) -> nn.Module:
    """Train a network like ``demo.models.DigitsNet``, with ``CHANNELS`` channels and twice as many.

    Args:
        x: Images ``(N, 1, 8, 8)``.
        y: Labels ``(N,)``.

    Returns:
        The network, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, padding=1),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1),
            nn.BatchNorm2d(2 * CHANNELS),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * CHANNELS * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


# --- Tables and plot --------------------------------------------------------------------------------------------------


def _attacks(results: Results[Attacked]) -> list[str]:
    """All sections about whole attacks."""
    summary = [
        [
            f"{contest.case}, {contest.attack}",
            figure(contest.measured[GRADPRUNE].median) if GRADPRUNE in contest.measured else "-",
            *(ratio_text(contest.ratio(GRADPRUNE, rival), spread=True) for rival in RIVALS),
            ratio_text(contest.work),
        ]
        for contest in Contest.all(results.records, "attacks")
    ]
    body = []
    if summary:
        head = ["attack", "gradprune s", *(f"vs {rival}" for rival in RIVALS), "inputs shown"]
        body.append("## Summary\n\n" + grid(head, summary))
    sections = [(case, "attacks", ATTACKS) for case in results.cases]
    for title, part, columns in (
        *sections,
        ("Overhead", "overhead", OVERHEAD),
        ("Active set", "active-set", ACTIVE_COLUMNS),
    ):
        contests = Contest.all(results.records, part, title if part == "attacks" else None)
        records = [(contest, record) for contest in contests for record in contest.records]
        if not records:
            continue
        body += [f"## {title}", circumstances([record for _, record in records])]
        body += _reasons(record for _, record in records)
        rows = ([column(contest, record) for column in columns.values()] for contest, record in records)
        body.append(grid([*columns], rows))
    return body


def _reasons(records: Iterable[Attacked]) -> list[str]:
    """Why some were not timed, each reason once."""
    failed: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.failed:
            failed.setdefault((record.candidate, record.failed), []).append(record.attack)
    return [f"**{candidate} failed:** {why} ({', '.join(attacks)})" for (candidate, why), attacks in failed.items()]


Cell = Callable[[Contest, Attacked], str]


def _timed(value: Callable[[Attacked], float | None]) -> Cell:
    """A column about what has been timed."""
    return lambda contest, record: figure(value(record)) if record.seconds else "-"


def _against(baseline: str, *, inverse: bool = False, spread: bool = False) -> Cell:
    """A column of ratios to one candidate; the inverse ones as percentages of its time."""

    def cell(contest: Contest, record: Attacked) -> str:
        ratio = contest.ratio(*((baseline, record.candidate) if inverse else (record.candidate, baseline)))
        if not inverse:
            return ratio_text(ratio, spread=spread)
        return f"{ratio.median:.1%} ({ratio.low:.1%}-{ratio.high:.1%})" if ratio else "-"

    return cell


ATTACKS: dict[str, Cell] = {
    "attack": lambda contest, record: f"{record.attack}, {record.candidate}",
    "s": _timed(lambda record: record.median),
    "IQR": _timed(lambda record: record.iqr),
    **{f"vs {rival}": _against(rival) for rival in RIVALS},
    "compile s": _timed(lambda record: record.compile_seconds),
    "compilations": lambda contest, record: str(record.compilations or "-"),
    "shown": lambda contest, record: "-" if record.shown is None else f"{record.shown:,}",
    "success": lambda contest, record: share(record.success_rate),
    "distance": lambda contest, record: f"{figure(record.distance)} {record.norm if record.distance else ''}".strip(),
    "pixels off": lambda contest, record: share(record.differing),
}


OVERHEAD: dict[str, Cell] = {
    "attack": lambda contest, record: f"{record.case}, {record.attack}, {record.candidate}",
    "s": ATTACKS["s"],
    "IQR": ATTACKS["IQR"],
    "ms/step": _timed(lambda record: 1e3 * record.median / record.steps if record.steps else None),
    f"vs {BARE_STEP}": _against(BARE_STEP, spread=True),
    f"of {BARE_STEP}": _against(BARE_STEP, inverse=True),
    "outside": lambda contest, record: "-" if record.outside_share is None else f"{record.outside_share:.2%}",
    **{name: ATTACKS[name] for name in ("compile s", "success", "pixels off")},
}


ACTIVE_COLUMNS: dict[str, Cell] = {
    "attack": ATTACKS["attack"],
    "eps": lambda contest, record: "-" if record.eps is None else eps_text(record.eps, record.eps),
    "s": ATTACKS["s"],
    "IQR": ATTACKS["IQR"],
    "of full batch": _against(FULL_BATCH, inverse=True),
    "of nothing dropped": _against(NOTHING_DROPPED, inverse=True),
    "robust accuracy": lambda contest, record: share(None if record.success_rate is None else 1 - record.success_rate),
    "other verdicts": lambda contest, record: "-" if record.other_verdicts is None else str(record.other_verdicts),
    **{name: ATTACKS[name] for name in ("compile s", "compilations")},
}


AGAINST = {
    "attacks": (GRADPRUNE, {TORCHATTACKS: OURS, TORCHATTACKS_COMPILED: OTHERS, UNCOMPILED: SECOND}),
    "active-set": (ACTIVE_SET, {FULL_BATCH: OURS, NOTHING_DROPPED: OTHERS}),
}
"""By part of ``bench attacks``: whose speed is shown, and relative to whom in which colour."""


class AttacksBenchmark(Benchmark):
    """``bench attacks``."""

    name = "attacks"
    help = "whole attacks beside Torchattacks; what the runtime costs, and what the active set saves"
    record = Attacked
    legend = """\
- s: median over the rounds of the whole attack; IQR: its interquartile range. vs: how many times as fast as that way,
  median of the ratios within each round; below 1 is slower. In brackets the quartiles of these ratios.
- Torchattacks: the same algorithm with the same settings on live parameters; frozen: on a model whose parameters
  require no gradient; frozen + compile(model): on torch.compile of that. gradprune: Runtime(), not compiled:
  Runtime(compile=False), both with active_set=False: in Torchattacks, samples leave only where the algorithm says so.
- Networks with more than ten classes are attacked as classifiers of their first ten: of more, DeepFool of Torchattacks
  would look at all, which is another algorithm.
- compile s: what the first attack took longer than the median, with empty disk caches and a compiler that is already
  started; compilations: how often gradprune compiled the network (at most two batch sizes of gradients, two of logits).
- shown: inputs that the network was shown during one attack, where it is not compiled; in the summary, how many times
  as many as by Torchattacks. More or fewer is another amount of work: CW of Torchattacks stops as soon as the batch's
  loss grows; Square takes its random course; DeepFool of Torchattacks runs ten backward passes for each input that it
  shows, one input at a time, gradprune's one for each. Square is run in a tenth of the ball, to use up its queries.
- success: inputs moved to another class; distance: median norm of these perturbations. pixels off: share of the
  adversarial values that differ from those of Torchattacks by more than 1e-6, where the algorithm draws nothing at
  random. DeepFool of Torchattacks overshoots at every step, the published algorithm and gradprune's at the end.
- Every way was checked to return valid inputs within the ball; one that fails is not timed.
- Overhead: PGD from the input itself. outside: share of an attack's time in which no compiled function ran, from a
  clock around them; the median of some attacks that were not timed otherwise. vs bare step: the loop of `bench step`
  over a step that is compiled as a whole, update included.
- Active set: a network trained on handwritten digits, held-out digits and their true labels, in the smallest ball in
  which a short PGD fools at least half of them. of full batch: time relative to the same attack with active_set=False.
  AutoAttack drops between its parts, and between the classes that they aim at, what is fooled in any case. "nothing
  dropped": all samples in every part and against every class; Square alone ends where it succeeds, as its algorithm has
  it. other verdicts: samples that are fooled and are not with active_set=False, or the other way round."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add = parser.add_argument
        add_cases(parser, DEFAULT)
        add("--attacks", nargs="+", metavar="NAME", help="such as fgsm, pgd-50, apgd-ce (default: all)")
        parts = "beside Torchattacks, beside the bare step, with samples leaving (default: all three)"
        add("--parts", nargs="+", choices=PARTS, default=PARTS, help=parts)
        add_budget(parser, 60, "attack")
        add_settings(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        cases, methods = chosen_cases(arguments, DEFAULT), choose_methods(arguments.attacks)
        budget, parts = Budget(arguments.rounds, arguments.seconds), arguments.parts
        digits = {"sklearn"} if "active-set" in parts else set()
        return [
            Plan(
                self,
                lambda results: measure_attacks(results, cases, methods, parts, budget),
                packages_of(cases) | digits,
                environment={"torchattacks": torchattacks_version()},
            )
        ]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        return _attacks(results)

    def bars(self, records: Sequence[Attacked], case: str) -> list[Bar]:
        """The bars of one case, from top to bottom."""
        bars = []
        for part, (candidate, rivals) in AGAINST.items():
            for contest in Contest.all(records, part, case):
                ratios = [(contest.ratio(candidate, rival), color) for rival, color in rivals.items()]
                known = [(ratio, color) for ratio, color in ratios if ratio]
                work = f", {contest.work:.1f}x the inputs" if contest.work and abs(contest.work - 1) > 0.1 else ""
                for i, (against, color) in enumerate(known):
                    label = "" if i else contest.attack + work
                    bars.append(Bar(label, against.median, against.low, against.high, color))
        return bars

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        label = (
            "times as fast (right of 1: faster), quartiles of the rounds: whole attacks as Torchattacks (red), as it "
            "frozen + compile(model) (blue),\nas gradprune without compilation (grey); digits: as without the active "
            "set (red), as with nothing dropped (blue)"
        )
        return draw_bars({case: self.bars(results.records, case) for case in results.cases}, label, ratios=True)
