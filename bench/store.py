"""What is kept of a measurement: the JSON file, its settings, and the arithmetic on what was timed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from gradprune.errors import OptionError
from gradprune.support.files import write_json


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

    def derived(self, candidate: str) -> dict[str, Any]:
        """What follows from a candidate's figures, for the readers of a JSON file; nothing if it was not timed."""
        if candidate not in self.measured:
            return {}
        ratios = {name: self.ratio(candidate, name) for name in self.measured}
        return {
            "median_seconds": self.measured[candidate].median,
            "iqr_seconds": self.measured[candidate].iqr,
            "ratios": {name: asdict(ratio) for name, ratio in ratios.items() if ratio},
            **self.more(candidate),
        }

    def more(self, candidate: str) -> dict[str, Any]:
        """What follows beside that, of a candidate that was timed."""
        return {}


class Kept(Protocol):
    """A record: a frozen dataclass of what was measured of one candidate on one case."""

    @property
    def case(self) -> str:
        """Name of the case."""

    @property
    def candidate(self) -> str:
        """Name of the candidate."""

    def derived(self, records: Sequence[Any]) -> dict[str, Any]:
        """What follows from the figures of all ``records``, for the readers of a JSON file."""


R = TypeVar("R", bound=Kept)


@dataclass
class Results(Generic[R]):
    """One JSON file.

    Attributes:
        path: The file; its stem is the name of the benchmark.
        record: Class of the records.
        settings: What all its figures were measured with.
        environment: Where.
        records: What was measured.
    """

    path: Path
    record: type[R]
    settings: Settings
    environment: dict[str, Any]
    records: list[R] = field(default_factory=list)

    @property
    def cases(self) -> list[str]:
        """Names of all cases, each once."""
        return list(dict.fromkeys(record.case for record in self.records))

    @staticmethod
    def read(path: Path, record: type[R]) -> Results[R]:
        """Read a file with records of some class.

        Raises:
            OptionError: It is not one that this version wrote.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            own = [each.name for each in dataclasses.fields(record)]  # type: ignore[arg-type]
            records = [record(**{name: one[name] for name in own if name in one}) for one in content["records"]]
            return Results(path, record, Settings(**content["settings"]), content["environment"], records)
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
        old = Results.read(self.path, self.record)
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

    def add(self, records: Sequence[R], instead_of: str | None = None) -> None:
        """Take up new records and write the file, whole or not at all.

        Args:
            records: The new ones.
            instead_of: Case whose old records go: their rounds were not those of the new ones.
        """
        self.records = [*(old for old in self.records if old.case != instead_of), *records]
        written = [{**asdict(one), "derived": one.derived(self.records)} for one in self.records]  # type: ignore[call-overload]
        content = {"settings": asdict(self.settings), "environment": self.environment, "records": written}
        write_json(self.path, {"benchmark": self.path.stem, **content})
