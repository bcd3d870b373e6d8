"""What is kept of a measurement, the arithmetic on it, and the JSON file it is kept in."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from gradprune.errors import OptionError
from gradprune.support.files import write_json

EAGER_BACKWARD = "eager backward()"
EAGER_GRAD = "eager autograd.grad"
FROZEN = "frozen eager"
COMPILED_MODEL = "frozen + compile(model)"
COMPILED_STEP = "compile(step)"
TUNED_MODEL = "frozen + compile(model, max-autotune)"
GRADPRUNE = "gradprune"
TUNED_GRADPRUNE = "gradprune max-autotune"
JAX = "jax jit(grad)"

TORCHATTACKS = "Torchattacks"
TORCHATTACKS_FROZEN = "Torchattacks, frozen"
TORCHATTACKS_COMPILED = "Torchattacks, frozen + compile(model)"
UNCOMPILED = "gradprune, not compiled"

BARE_STEP, RUNTIME = "bare compiled step", "through the runtime"
ACTIVE_SET, FULL_BATCH, NOTHING_DROPPED = "active set", "active_set=False", "nothing dropped"

BASELINES = (EAGER_BACKWARD, EAGER_GRAD, FROZEN, COMPILED_MODEL, COMPILED_STEP)
"""What every candidate is compared with by name."""

ALTERNATIVES = (FROZEN, COMPILED_MODEL, COMPILED_STEP, TUNED_MODEL)
"""What a user could do today; the fastest of these is "the best alternative"."""

RIVALS = (TORCHATTACKS, TORCHATTACKS_FROZEN, TORCHATTACKS_COMPILED, UNCOMPILED)
"""What every whole attack is compared with by name."""

PARTS = ("attacks", "overhead", "active-set")
"""Of ``bench attacks``."""

EAGER_TRAINING = "eager, live parameters"
FROZEN_TRAINING = "eager, frozen in the attack"
COMPILED_TRAINING = "frozen + compile(model)"
COMPILED_GRADIENT = "frozen + compile(gradient)"

ATTACK_STEPS = (1, 3, 7, 10, 20)
"""Of the iterations that ``bench training`` compares by default."""

RIVAL_TRAININGS = (FROZEN_TRAINING, COMPILED_TRAINING, COMPILED_GRADIENT)
"""What a user could write today; the fastest of these is "the best alternative"."""


@dataclass(frozen=True)
class Settings:
    """What all figures of one file were measured with.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads.
        steps: Steps of one attack.
        autocast: ``"fp16"`` or ``"bf16"``; ``None`` leaves autocast off.
        tf32: Whether float32 products may be rounded to TF32 (CUDA).
        channels_last: Whether every candidate was given images and weights with the channels last.
    """

    device: str = "cpu"
    threads: int = 1
    steps: int = 1
    autocast: str | None = None
    tf32: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        dtype = f"autocast {self.autocast}" if self.autocast else "fp32 with TF32" if self.tf32 else "fp32"
        layout = ", channels last" * self.channels_last
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {dtype}{layout}"


class Timed:
    """What has been timed, round after round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Interquartile range of the seconds."""
        low, high = quartiles(self.seconds)
        return high - low


@dataclass(frozen=True)
class Record(Timed):
    """What was measured of one candidate on one case; ``None`` is what was not, or cannot be.

    Attributes:
        case: Name of the case.
        candidate: Name of the candidate.
        failed: Why there are no figures; ``None`` if there are.
        seconds: For every round, the seconds of the attack divided by its steps. Round ``i`` of all candidates of a
            case ran in turn.
        cold_seconds: Duration of the first call, if it compiles, with empty disk caches.
        warm_seconds: The same with the caches that an earlier process left.
        flops: FLOPs of the contractions of a step, a multiply-add as two.
        saved_bytes: Bytes alive from the forward to the backward pass.
        peak_bytes: Most bytes a step holds at once beyond what was held before it.
        gradient_error: Largest error of the gradient against float64, relative to its largest value; the worst point.
        gradient_error_l2: The same in the Euclidean norm.
        eager_error: ``gradient_error`` of eager autograd with the same settings.
        eager_error_l2: ``gradient_error_l2`` of the same.
        success_rate: Share of the inputs that the attack moved to another class.
        eager_success_rate: The same of eager.
        differing: Share of the values of the adversarial examples that are not those of eager.
        load: Load average of the machine when the case was begun.
    """

    case: str
    candidate: str
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)
    cold_seconds: float | None = None
    warm_seconds: float | None = None
    flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    gradient_error: float | None = None
    gradient_error_l2: float | None = None
    eager_error: float | None = None
    eager_error_l2: float | None = None
    success_rate: float | None = None
    eager_success_rate: float | None = None
    differing: float | None = None
    load: float | None = None


@dataclass(frozen=True)
class Kernels:
    """One layer configuration in one direction, computed by itself in every way at hand.

    Attributes:
        case: Name of the case.
        candidate: The configuration, for people.
        kind: Class of the kernel, such as ``"conv 3x3"``.
        direction: ``"forward"`` or ``"input gradient"``.
        count: How often it occurs in the network.
        flops: FLOPs of one.
        seconds: Median seconds of one by way; the first way is what eager does. ``None`` where it cannot be used.
    """

    case: str
    candidate: str
    kind: str
    direction: str
    count: int
    flops: int
    seconds: dict[str, float | None]

    @property
    def plain(self) -> float:
        """Seconds of all its occurrences, the way eager does it."""
        return self.count * (next(iter(self.seconds.values())) or float("nan"))

    @property
    def best(self) -> tuple[float, str]:
        """Seconds of all its occurrences, the fastest way, and which that is."""
        seconds, name = min((value, name) for name, value in self.seconds.items() if value is not None)
        return self.count * seconds, name


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


AnyRecord: TypeAlias = "Record | Kernels | Attacked | Trained | ObjectiveRecord"

KINDS: dict[str, type[Record] | type[Kernels] | type[Attacked] | type[Trained] | type[ObjectiveRecord]] = {
    **dict.fromkeys(("step", "scaling", "ablation", "overhead", "compile"), Record),
    "kernels": Kernels,
    "attacks": Attacked,
    "training": Trained,
    "objectives": ObjectiveRecord,
}
"""By kind of run, and so by name of its file, what that holds."""


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the median over the rounds, and their quartiles. Below 1 is slower."""

    median: float
    low: float
    high: float

    @staticmethod
    def paired(baseline: Sequence[float], own: Sequence[float]) -> Ratio:
        """From the seconds of rounds in which both ran one after the other, which is what makes them comparable."""
        ratios = [theirs / ours for theirs, ours in zip(baseline, own, strict=True)]
        return Ratio(statistics.median(ratios), *quartiles(ratios))


T = TypeVar("T", bound=Timed)


class Compared(Generic[T]):
    """Timed records that can be compared with each other.

    Attributes:
        measured: By their candidates.
    """

    measured: Mapping[str, T]

    def ratio(self, candidate: str, baseline: str | None) -> Ratio | None:
        """How many times as fast as ``baseline`` a candidate is, ``None`` if one of them was not timed."""
        if baseline is None or baseline not in self.measured or candidate not in self.measured:
            return None
        return Ratio.paired(self.measured[baseline].seconds, self.measured[candidate].seconds)

    def fastest(self, candidates: Sequence[str]) -> str | None:
        """The fastest of some candidates by the medians."""
        timed = [name for name in candidates if name in self.measured]
        return min(timed, key=lambda name: self.measured[name].median, default=None)

    def figures(self, candidate: str) -> dict[str, Any]:
        """What follows from a candidate's seconds, for the readers of a JSON file."""
        ratios = {name: self.ratio(candidate, name) for name in self.measured}
        return {
            "median_seconds": self.measured[candidate].median,
            "iqr_seconds": self.measured[candidate].iqr,
            "ratios": {name: asdict(ratio) for name, ratio in ratios.items() if ratio},
        }


class Comparison(Compared[Record]):
    """The timed records of one case.

    Args:
        records: All records of a file.
        case: Name of the case.
    """

    def __init__(self, records: Sequence[AnyRecord], case: str) -> None:
        found = [record for record in records if isinstance(record, Record) and record.case == case]
        self.failed = [record for record in found if record.failed]
        self.measured = {record.candidate: record for record in found if record.seconds}

    @property
    def best_alternative(self) -> str | None:
        """The fastest alternative by the medians."""
        return self.fastest(ALTERNATIVES)

    def predicted_ratio(self, candidate: str) -> float | None:
        """How many times as fast as ``eager backward()`` it would be if only FLOPs counted."""
        full, own = self.measured.get(EAGER_BACKWARD), self.measured.get(candidate)
        return full.flops / own.flops if full and own and full.flops and own.flops else None

    def break_even(self, candidate: str) -> float | None:
        """Steps after which a candidate has made up for compiling longer than the best alternative.

        Returns:
            ``None`` if it never has, or compiles nothing.
        """
        ours, best = self.measured[candidate], self.best_alternative
        if best is None or ours.cold_seconds is None or ours.median >= self.measured[best].median:
            return None
        theirs = self.measured[best]
        return max(0.0, ours.cold_seconds - (theirs.cold_seconds or 0.0)) / (theirs.median - ours.median)

    def derived(self, candidate: str) -> dict[str, Any]:
        """All of this for the readers of a JSON file."""
        if candidate not in self.measured:
            return {}
        return {
            **self.figures(candidate),
            "best_alternative": self.best_alternative,
            "break_even_steps": self.break_even(candidate),
            "predicted_ratio": self.predicted_ratio(candidate),
        }


class Contest(Compared[Attacked]):
    """The records of one attack on one case, in all the ways it was run.

    Args:
        records: All records of a file.
        part: One of ``PARTS``.
        case: Name of the case.
        attack: Name of the attack.
    """

    def __init__(self, records: Sequence[AnyRecord], part: str, case: str, attack: str) -> None:
        self.part, self.case, self.attack = part, case, attack
        self.records = [
            record
            for record in records
            if isinstance(record, Attacked) and (record.part, record.case, record.attack) == (part, case, attack)
        ]
        self.measured = {record.candidate: record for record in self.records if record.seconds}

    @staticmethod
    def all(records: Sequence[AnyRecord], part: str, case: str | None = None) -> list[Contest]:
        """Those of one part, and of one case if it is given, each once and in their order."""
        found = [record for record in records if isinstance(record, Attacked) and record.part == part]
        keys = dict.fromkeys((one.case, one.attack) for one in found if case in (None, one.case))
        return [Contest(found, part, *key) for key in keys]

    @property
    def work(self) -> float | None:
        """How many times as many inputs gradprune shows the network as Torchattacks does."""
        ours, theirs = (self.measured.get(name) for name in (UNCOMPILED, TORCHATTACKS))
        return ours.shown / theirs.shown if ours and theirs and ours.shown and theirs.shown else None

    def derived(self, candidate: str) -> dict[str, Any]:
        """All that follows from the figures, for the readers of a JSON file."""
        if candidate not in self.measured:
            return {}
        record = self.measured[candidate]
        return {
            **self.figures(candidate),
            "compile_seconds": record.compile_seconds,
            "outside_share": record.outside_share,
        }


class Iteration(Compared[Trained]):
    """The records of one iteration of adversarial training on one case, in all the ways it was written.

    Args:
        records: All records of a file.
        case: Name of the case.
        steps: Steps of its attack.
    """

    def __init__(self, records: Sequence[AnyRecord], case: str, steps: int) -> None:
        self.case, self.steps = case, steps
        self.records = [
            record for record in records if isinstance(record, Trained) and (record.case, record.steps) == (case, steps)
        ]
        self.measured = {record.candidate: record for record in self.records if record.seconds}

    @staticmethod
    def all(records: Sequence[AnyRecord], case: str) -> list[Iteration]:
        """Those of one case, by their steps."""
        found = {record.steps for record in records if isinstance(record, Trained) and record.case == case}
        return [Iteration(records, case, steps) for steps in sorted(found)]

    @property
    def predicted_ratio(self) -> float:
        """How many times as fast as eager an iteration is without weight gradients in its attack, by FLOPs ([SB])."""
        return (6 * self.steps + 6) / (4 * self.steps + 6)

    @property
    def best_alternative(self) -> str | None:
        """The fastest alternative by the medians."""
        return self.fastest(RIVAL_TRAININGS)

    def derived(self, candidate: str) -> dict[str, Any]:
        """All that follows from the figures, for the readers of a JSON file."""
        if candidate not in self.measured:
            return {}
        return {
            **self.figures(candidate),
            "best_alternative": self.best_alternative,
            "predicted_ratio": self.predicted_ratio,
        }


def limit(records: Sequence[AnyRecord], case: str) -> float | None:
    """Seconds that the layers of ``case`` take by themselves, each the fastest way; ``None`` if not measured."""
    return sum(record.best[0] for record in records if isinstance(record, Kernels) and record.case == case) or None


@dataclass
class Results:
    """One JSON file.

    Attributes:
        path: The file; its stem is what was run, one of ``KINDS``.
        settings: What all its figures were measured with.
        environment: Where.
        records: What was measured.
    """

    path: Path
    settings: Settings
    environment: dict[str, Any]
    records: list[AnyRecord] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What was run."""
        return self.path.stem

    @property
    def cases(self) -> list[str]:
        """Names of all cases, each once."""
        return list(dict.fromkeys(record.case for record in self.records))

    @staticmethod
    def read(path: Path) -> Results:
        """Read a file.

        Raises:
            OptionError: It is not one that this version wrote.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            make: Any = KINDS[path.stem]
            own = [each.name for each in dataclasses.fields(make)]
            records = [make(**{name: record[name] for name in own}) for record in content["records"]]
            return Results(path, Settings(**content["settings"]), content["environment"], records)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path} is not a results file of this version ({error!r}): pass --fresh to replace it, or delete it"
            ) from error

    def resume(self) -> None:
        """Take up the records of an earlier run in the same file.

        Raises:
            OptionError: Its figures could not stand beside those of this run.
        """
        if not self.path.exists():
            return
        old = Results.read(self.path)
        before, now = ({**vars(one.settings), **one.environment} for one in (old, self))
        for name in now.keys() | before.keys():
            if before.get(name) != now.get(name):
                raise OptionError(
                    f"{self.path} was measured with {name} {before.get(name)!r}, this run has {now.get(name)!r}: "
                    "pass --fresh to replace it, or --output DIR to write elsewhere"
                )
        self.records = old.records

    def missing(self, case: str, candidates: Sequence[str]) -> list[str]:
        """Those of ``candidates`` without a record of ``case``, be it a failure."""
        have = {record.candidate for record in self.records if record.case == case}
        return [candidate for candidate in candidates if candidate not in have]

    def add(self, records: Sequence[AnyRecord], instead_of: str | None = None) -> None:
        """Take up new records and write the file, whole or not at all.

        Args:
            records: The new ones.
            instead_of: Case whose old records go: their rounds were not those of the new ones.
        """
        self.records = [*(old for old in self.records if old.case != instead_of), *records]
        written = [{**asdict(one), "derived": self._derived(one)} for one in self.records]
        content = {"settings": asdict(self.settings), "environment": self.environment, "records": written}
        write_json(self.path, {"benchmark": self.kind, **content})

    def _derived(self, one: AnyRecord) -> dict[str, Any]:
        if isinstance(one, Attacked):
            return Contest(self.records, one.part, one.case, one.attack).derived(one.candidate)
        if isinstance(one, Trained):
            return Iteration(self.records, one.case, one.steps).derived(one.candidate)
        if isinstance(one, ObjectiveRecord):
            return {"seconds": one.median}
        return Comparison(self.records, one.case).derived(one.candidate)
