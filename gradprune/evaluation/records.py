"""What has been computed, in files: batches while they are under way, then one record for each result.

Every file is there as a whole or not at all, and is found again by a hash of everything that determines what is in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradprune.errors import GradpruneError
from gradprune.support.files import replacing, write_json

RECORD, EXAMPLES = "record.json", "adversarial.npz"
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of one attack on one model and data set.

    Attributes:
        key: Hash of everything that determines it.
        context: Hash of model and data.
        model: Name of the model.
        data: Name of the data.
        label: Name of the attack, with what is unusual about it.
        attack: All its settings.
        norm: The norm that perturbations are measured in.
        eps: Radius of the ball; ``None`` where there is none.
        steps: Steps of the attack; ``None`` where it has none.
        samples: How many samples were attacked.
        classes: How many classes the model tells apart.
        clean_accuracy: Share of the samples that the model classifies as labelled.
        accuracy: The same of the adversarial examples.
        robust_accuracy: Share that it classifies as labelled both before and after the attack.
        clean_top5: Share whose label is among the five largest logits.
        top5: The same of the adversarial examples.
        target_rate: Share of the adversarial examples that are taken for their target; ``None`` without one, or one
            drawn at random.
        perturbation: Mean, median and largest norm of the perturbations that changed a right answer into a wrong one;
            ``None`` if there are none.
        seconds: Duration of the attack, compilation included, over all processes.
        settings: How it was run.
        environment: Where it was run.
    """

    key: str
    context: str
    model: str
    data: str
    label: str
    attack: dict[str, Any]
    norm: str
    eps: float | None
    steps: int | None
    samples: int
    classes: int
    clean_accuracy: float
    accuracy: float
    robust_accuracy: float
    clean_top5: float
    top5: float
    target_rate: float | None
    perturbation: dict[str, float] | None
    seconds: float
    settings: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True)
class ResultFolder:
    """Where one result is kept, finished or not.

    Attributes:
        folder: Holds the record and the adversarial examples.
        key: Hash of everything that determines the result.
    """

    folder: Path
    key: str

    @property
    def batches(self) -> Path:
        """The folder of what is not finished yet."""
        return self.folder / f"batches-{self.key[:12]}"

    def batch(self, number: int) -> Path:
        """The file of one finished batch."""
        return self.batches / f"{number:05d}.npz"

    def partial(self, number: int) -> Path:
        """The file of a batch that some parts of an attack are done with."""
        return self.batches / f"{number:05d}-parts.npz"

    @property
    def record(self) -> Record | None:
        """The finished result; ``None`` if there is none, or one of something else."""
        path = self.folder / RECORD
        if not path.exists():
            return None
        record = read_record(path)
        return record if record.key == self.key else None

    def holds(self, examples: int) -> bool:
        """Whether the result is finished, and that many adversarial examples are kept with it, or all."""
        record = self.record
        if record is None:
            return False
        return len(read_arrays(self.folder / EXAMPLES, ("y",))["y"]) >= min(examples, record.samples)

    def finish(self, record: Record, examples: Arrays) -> None:
        """Write the result and remove what it was made of."""
        path = self.folder / RECORD
        path.unlink(missing_ok=True)  # of another result, whose examples are about to go
        write_arrays(self.folder / EXAMPLES, examples)
        write_json(path, dataclasses.asdict(record))
        self.clean()

    def clean(self) -> None:
        """Remove what a finished result was made of."""
        shutil.rmtree(self.batches, ignore_errors=True)


def key_of(everything: dict[str, Any]) -> str:
    """A hash of what can be written as JSON."""
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        GradpruneError: The file holds none.
    """
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise GradpruneError(
            f"{path} is no record of this version: remove it, or pass --output DIR with another directory"
        ) from error


def read_records(folder: Path) -> dict[Path, Record]:
    """All records in the folders of a folder, by theirs."""
    return {path.parent: read_record(path) for path in sorted(folder.glob(f"*/{RECORD}"))}


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays to a ``.npz`` file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path, names: Collection[str] | None = None) -> Arrays:
    """Read some, or all, arrays of a ``.npz`` file.

    Raises:
        GradpruneError: The file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise GradpruneError(f"cannot read {path} ({error}): remove it and run the command again") from error
