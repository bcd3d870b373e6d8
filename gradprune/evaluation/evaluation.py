"""What was asked for, and carrying it out: attacks one after the other, unless they are done, then a report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gradprune.attacks import Attack
from gradprune.attacks.registry import CLEAN, Clean, label_of
from gradprune.runtime import Runtime
from gradprune.support.distributed import Ranks
from gradprune.support.environment import environment
from gradprune.support.figures import can_draw
from gradprune.support.files import write_text
from gradprune.workloads.data_sets import Data
from gradprune.workloads.models import fingerprint

from .plots import examples_of, save_accuracy, save_examples, title_of
from .records import EXAMPLES, Record, ResultFolder, key_of, read_arrays, read_records
from .run import ModelOnData, collect, compute, record_of, settings_of
from .tables import document, eps_text, order, text

PICTURES = 4
"""Images shown for each result."""
MOST_ROWS = 40
"""In one picture."""
RESULTS = "results"


AUTOCAST: dict[torch.dtype | None, str] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Names of types, as they are given on the command line."""


@dataclass(frozen=True)
class Job:
    """One attack to run: its name in tables, itself, and where its result is kept."""

    label: str
    attack: Attack
    place: ResultFolder


@dataclass(frozen=True)
class Evaluation:
    """Everything that was asked for, loaded and checked.

    Attributes:
        subject: What to attack.
        attacks: With their names.
        ranks: The processes that share the work.
        output: The folder to write to.
        names: Of model and data.
        determines: What results depend on besides the attack.
        seed: Of all random numbers.
    """

    subject: ModelOnData
    attacks: list[tuple[str, Attack]]
    ranks: Ranks
    output: Path
    names: tuple[str, str]
    determines: dict[str, Any]
    seed: int

    @staticmethod
    def prepare(
        model: nn.Module,
        data: Data,
        attacks: Sequence[tuple[str, Attack]],
        output: Path,
        *,
        device: torch.device,
        batch_size: int = 128,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        autocast: torch.dtype | None = None,
        compile: bool | Literal["auto"] = True,
        name: str | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008
    ) -> Evaluation:
        """Check what can be known to fail before any work.

        Args:
            model: From inputs ``(N, ...)`` to logits ``(N, classes)``, in evaluation mode; it is moved to ``device``.
            data: What to attack it with.
            attacks: With the names they have in ``gradprune.attacks.registry``.
            output: An existing folder to write to.
            device: Where to compute.
            batch_size: Samples in a batch.
            bounds: Smallest and largest valid input.
            seed: Of all random numbers.
            autocast: Type to run the model in.
            compile: Compile the attacks with gradprune; ``"auto"`` as in ``Runtime``.
            name: The model's in tables; by default that of its class.
            ranks: The processes that share the work.

        Raises:
            GradpruneError: The model does not take the data.
        """
        batch_size = min(batch_size, len(data))
        determines: dict[str, Any] = {
            "gradprune": str(environment()["gradprune"]),
            "torch": torch.__version__,
            "model": fingerprint(model),
            "data": data.fingerprint,
            "batch_size": batch_size,
            "seed": seed,
            "autocast": AUTOCAST.get(autocast),
            "compile": compile,
            "device": device.type,
        }
        runtime = Runtime(
            compile=compile,
            autocast=autocast,
            batch_size=batch_size,
            progress=ranks.is_first and sys.stderr.isatty(),
        )
        subject = ModelOnData(model.to(device), data, device, batch_size, runtime, bounds)
        subject.check()
        names = name or type(model).__name__, data.name
        return Evaluation(subject, list(attacks), ranks, output, names, determines, seed)

    def run_all(self, *, keep_examples: bool = False) -> tuple[list[Record], list[str]]:
        """Run all attacks, and none for clean accuracy, unless that is done; write everything.

        Args:
            keep_examples: Keep all adversarial examples, not only those that are drawn.

        Returns:
            The records, that of no attack first, and what was written, by name. Of several processes, only the first
            one writes.
        """
        jobs = self.jobs([self.clean, *self.attacks], lambda slug: self.output / RESULTS / slug)
        keep = len(self.subject.data) if keep_examples else PICTURES
        done = [(job, self.carry_out(job, PICTURES if job.label == CLEAN else keep)) for job in jobs]
        written = self.report(done) if self.ranks.is_first else []
        self.ranks.wait()
        return [record for _, record in done], written

    @property
    def clean(self) -> tuple[str, Attack]:
        """No attack."""
        return CLEAN, Clean(bounds=self.subject.bounds, seed=self.seed)

    @property
    def context(self) -> str:
        """A hash of model and data."""
        return key_of({name: self.determines[name] for name in ("model", "data")})

    def jobs(self, attacks: Sequence[tuple[str, Attack]], folder: Callable[[str], Path]) -> list[Job]:
        """What to do, which all processes agree about.

        Args:
            attacks: With their names.
            folder: Where a result is kept, by a short name of it.
        """
        jobs = []
        for name, attack in attacks:
            settings = settings_of(attack)
            key = key_of({**self.determines, "attack": settings})
            autocast = self.determines["autocast"]
            label = label_of(name, attack) + (f", {autocast}" if autocast and name != CLEAN else "")
            jobs.append(Job(label, attack, ResultFolder(folder(_slug(name, settings, key)), key)))
        self.ranks.agree([job.place.key for job in jobs], self.output)
        return jobs

    def carry_out(self, job: Job, keep: int) -> Record:
        """Run one attack, unless that is done, and write its record."""
        place = job.place
        is_done = place.holds(keep)
        self.ranks.wait()  # until all have looked, for the first is about to write
        if is_done:
            if self.ranks.is_first:
                place.clean()
                print(f"{_title(job)}: found in {place.folder}", file=sys.stderr)
        else:
            place.folder.mkdir(parents=True, exist_ok=True)
            batches = len(self.ranks.share(self.subject.batches))
            with _bar(_title(job), batches, shown=self.ranks.is_first) as update:
                compute(self.subject, job.attack, place, self.ranks, update, seed=self.seed)
            self.ranks.wait()
            if self.ranks.is_first:
                figures, examples = collect(self.subject, job.attack, place, keep)
                model, data = self.names
                record = record_of(
                    figures,
                    attack=job.attack,
                    label=job.label,
                    place=place,
                    context=self.context,
                    model=model,
                    data=data,
                    settings={**self.determines, "processes": self.ranks.size},
                    environment={**environment(), **_gpu(self.subject.device)},
                )
                place.finish(record, examples)
            self.ranks.wait()
        found = place.record
        assert found is not None
        return found

    def draw(self, job: Job, record: Record) -> bool:
        """Draw pictures of the first images; returns whether they are images."""
        x = self._first_images(PICTURES)
        if not can_draw(x):
            return False
        arrays = read_arrays(job.place.folder / EXAMPLES)
        save_examples(job.place.folder / "pictures.png", examples_of(record, x, arrays, self.subject.bounds))
        return True

    def report(self, done: Sequence[tuple[Job, Record]]) -> list[str]:
        """Print and write tables, plot and pictures; returns what was written."""
        folders = read_records(self.output / RESULTS)
        records = list(folders.values())
        print(text(records))
        write_text(self.output / "accuracy.md", document(records))
        written = ["accuracy.md", f"{RESULTS}/*/record.json"]
        if save_accuracy(self.output / "accuracy.png", records):
            written.append("accuracy.png")
        drawn = [self.draw(job, record) for job, record in done if record.label != CLEAN]
        x = self._first_images(1)
        own = [folder for folder, record in folders.items() if record.context == self.context and record.label != CLEAN]
        rows = []
        for folder in sorted(own, key=lambda folder: order(folders[folder])) if can_draw(x) else ():
            arrays, record = read_arrays(folder / EXAMPLES), folders[folder]
            rows += examples_of(record, x, arrays, self.subject.bounds, title=title_of(record))
        if any(drawn):
            written.append(f"{RESULTS}/*/pictures.png")
        if rows:
            save_examples(self.output / "first-image.png", rows[:MOST_ROWS])
            written.append("first-image.png" + (f" (the first {MOST_ROWS} results)" if len(rows) > MOST_ROWS else ""))
        return written

    def _first_images(self, count: int) -> Any:
        x, _ = self.subject.data.batch(0, min(count, len(self.subject.data)))
        return x.numpy()


def _gpu(device: torch.device) -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def _slug(name: str, settings: dict[str, Any], key: str) -> str:
    """A folder name that people can read and that no other result has."""
    parts = [name]
    parts += [settings["norm"]] if "norm" in settings else []
    parts += [f"eps{settings['eps']:.4g}"] if "eps" in settings else []
    parts += [f"steps{settings['steps']}"] if "steps" in settings else []
    return "-".join([*parts, key[:8]])


def _title(job: Job) -> str:
    steps, eps = getattr(job.attack, "steps", None), getattr(job.attack, "eps", None)
    return (
        job.label
        + (f", {steps} steps" if steps and steps > 1 else "")
        + (f", eps {eps_text(eps)}" if eps is not None else "")
    )


@contextmanager
def _bar(description: str, total: int, *, shown: bool) -> Iterator[Callable[[], object]]:
    """A progress bar on standard error, if this process shows one; yields what moves it."""
    from gradprune.support.progress import counter

    if not shown:
        yield lambda: None
        return
    with counter(description, total) as bar:
        yield bar.update


def evaluate(
    model: nn.Module,
    data: Data,
    attacks: Mapping[str, Attack] | Sequence[tuple[str, Attack]],
    output: Path | str,
    *,
    device: torch.device | str = "cpu",
    keep_examples: bool = False,
    **settings: Any,
) -> list[Record]:
    """Measure a model's accuracy under attacks, as ``gradprune evaluate`` does.

    Finished batches are kept in the output folder until all are done: called again, it goes on where it ended.

        data = load_data(DataOptions("images.npz"))
        records = evaluate(model, data, {"pgd": PGD(eps=8 / 255), "autoattack": AutoAttack(eps=8 / 255)}, "results")

    Args:
        model: From inputs ``(N, ...)`` to logits ``(N, classes)``, in evaluation mode.
        data: What ``gradprune.workloads.data_sets.load_data`` returns.
        attacks: By names that tables have.
        output: Folder for records, tables, plots and pictures; it is made if there is none.
        device: Where to compute.
        keep_examples: Keep all adversarial examples.
        settings: See ``Evaluation.prepare``.

    Returns:
        The records, that of no attack first.

    Raises:
        GradpruneError: The model does not take the data, or an attack cannot be run.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    named = list(attacks.items()) if isinstance(attacks, Mapping) else list(attacks)
    evaluation = Evaluation.prepare(model, data, named, folder, device=torch.device(device), **settings)
    return evaluation.run_all(keep_examples=keep_examples)[0]
