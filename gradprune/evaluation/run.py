"""Run one attack on a data set, in batches that do not depend on each other, and say what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.attacks import NORMS, Attack, AutoAttack, Runtime
from gradprune.attacks.base import BOUNDS_TOLERANCE, check_finite
from gradprune.attacks.registry import Clean
from gradprune.errors import AttackError, GradpruneError
from gradprune.support.distributed import Ranks
from gradprune.workloads.data_sets import Data

from .records import Arrays, Record, ResultFolder, read_arrays, write_arrays

TOLERANCE = 1e-6
TOP = 5
STATISTICS = (
    "predictions",
    "clean_predictions",
    "in_top",
    "clean_in_top",
    "y",
    "norms",
    "reached",
    "seconds",
    "classes",
)
"""What a record is made of; beside these a batch has its examples and their index."""


@dataclass(frozen=True)
class ModelOnData:
    """What is attacked, and how.

    Attributes:
        model: In evaluation mode, on ``device``.
        data: What to attack it with.
        device: Where to compute.
        batch_size: Samples in a batch; results may depend on it, for a batch has its own random numbers.
        runtime: How to run attacks.
        bounds: Smallest and largest valid input.
    """

    model: nn.Module
    data: Data
    device: torch.device
    batch_size: int
    runtime: Runtime
    bounds: tuple[float, float]

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.data) // self.batch_size)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of one batch, on the device."""
        begin = number * self.batch_size
        x, y = self.data.batch(begin, min(begin + self.batch_size, len(self.data)))
        return x.to(self.device), y.to(self.device)

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        with self.runtime.attack(self.model, x) as query:
            return query.logits(x)

    def check(self) -> None:
        """Make sure that the model takes the data.

        Raises:
            AttackError: It does not.
        """
        x, _ = self.data.batch(0, 1)
        try:
            with self.runtime.attack(self.model, x.to(self.device)):
                pass  # which has asked the model for the number of its classes
        except GradpruneError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise AttackError(
                f"the model does not take the data's inputs of shape {tuple(x[0].shape)}: {reason}"
            ) from error


def compute(
    subject: ModelOnData, attack: Attack, place: ResultFolder, ranks: Ranks, update: Callable[[], object], *, seed: int
) -> None:
    """Attack this process's share of the batches; what is done already is not done again.

    Args:
        subject: What to attack.
        attack: The attack.
        place: Where batches are kept.
        ranks: The processes that share the work.
        update: Called after each batch.
        seed: Every batch, and every part of an attack, has random numbers of its own that are made from it.
    """
    place.batches.mkdir(parents=True, exist_ok=True)
    for number in ranks.share(subject.batches):
        if not place.batch(number).exists():
            write_arrays(place.batch(number), _attacked(subject, attack, place, number, seed))
            place.partial(number).unlink(missing_ok=True)
        update()


def collect(subject: ModelOnData, attack: Attack, place: ResultFolder, keep: int) -> tuple[dict[str, Any], Arrays]:
    """The figures of a record from all batches, and the first ``keep`` adversarial examples."""
    files = [place.batch(number) for number in range(subject.batches)]
    parts = [read_arrays(file, STATISTICS) for file in files]
    all_of = {name: np.concatenate([part[name] for part in parts]) for name in STATISTICS[:-2]}
    y, predictions, before = all_of["y"], all_of["predictions"], all_of["clean_predictions"]
    norms = all_of["norms"][(before == y) & (predictions != y)]
    figures = {
        "samples": len(y),
        "classes": int(parts[0]["classes"]),
        "clean_accuracy": float(np.mean(before == y)),
        "accuracy": float(np.mean(predictions == y)),
        "robust_accuracy": float(np.mean((before == y) & (predictions == y))),
        "clean_top5": float(np.mean(all_of["clean_in_top"])),
        "top5": float(np.mean(all_of["in_top"])),
        "target_rate": float(np.mean(all_of["reached"])) if attack.targeted not in (None, "random") else None,
        "perturbation": {name: float(of(norms)) for name, of in _SUMMARIES.items()} if len(norms) else None,
        "seconds": float(sum(part["seconds"] for part in parts)),
    }
    examples = [
        read_arrays(file, ("x_adv", "y", "index", "predictions", "clean_predictions"))
        for file in files[: -(-keep // subject.batch_size)]
    ]
    return figures, {name: np.concatenate([one[name] for one in examples])[:keep] for name in examples[0]}


_SUMMARIES: dict[str, Callable[[Any], Any]] = {"mean": np.mean, "median": np.median, "max": np.max}


def settings_of(attack: Attack) -> dict[str, Any]:
    """An attack and all its settings, ready for JSON."""
    values = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    return {"name": attack.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def norm_of(attack: Attack) -> str:
    """The norm that an attack's perturbations are measured in."""
    return str(getattr(attack, "norm", "linf" if isinstance(attack, Clean) else "l2"))


def _attacked(subject: ModelOnData, attack: Attack, place: ResultFolder, number: int, seed: int) -> Arrays:
    """Attack one batch."""
    x, y = subject.batch(number)
    Clean(bounds=attack.bounds, seed=seed)(subject.model, x, y, runtime=subject.runtime)
    clean = subject.logits(x)
    check_finite(clean)
    if isinstance(attack, AutoAttack):
        x_adv, seconds = _in_parts(subject, attack, x, y, clean, place, number, seed)
    else:
        own = dataclasses.replace(attack, seed=_seed(seed, number))
        started = time.perf_counter()
        x_adv = own(subject.model, x, y, runtime=subject.runtime)
        _synchronize(x_adv)
        seconds = time.perf_counter() - started
    logits = subject.logits(x_adv)
    norms = NORMS[norm_of(attack)].of(x_adv.double() - x.double())
    check_examples(attack, x, x_adv, norms)
    begin = number * subject.batch_size
    tensors = {
        "x_adv": x_adv,
        "y": y,
        "predictions": _predictions(logits),
        "clean_predictions": _predictions(clean),
        "in_top": _in_top(logits, y),
        "clean_in_top": _in_top(clean, y),
        "norms": norms,
        "reached": _predictions(logits) == _targets(attack, clean, y),
    }
    return {
        **{name: tensor.cpu().numpy() for name, tensor in tensors.items()},
        "index": np.asarray(subject.data.index[begin : begin + len(x)]),
        "seconds": np.asarray(seconds),
        "classes": np.asarray(clean.shape[1]),
    }


def _in_parts(
    subject: ModelOnData,
    attack: AutoAttack,
    x: Tensor,
    y: Tensor,
    clean: Tensor,
    place: ResultFolder,
    number: int,
    seed: int,
) -> tuple[Tensor, float]:
    """AutoAttack, with what it has reached written down after each of its parts."""
    if x.ndim != 4:  # its last part would find that out after all others
        raise AttackError(
            f"AutoAttack is for images (N, C, H, W), not inputs of shape {tuple(x.shape)}: use apgd or fab"
        )
    file = place.partial(number)
    x_adv, is_open, first, seconds = x.clone(), _predictions(clean) == y, 0, 0.0
    if file.exists():
        known = read_arrays(file)
        x_adv, is_open = torch.from_numpy(known["x_adv"]).to(x), torch.from_numpy(known["is_open"]).to(x.device)
        first, seconds = int(known["done"]), float(known["seconds"])
    parts = [
        dataclasses.replace(part, seed=_seed(seed, number, done))
        for done, part in enumerate(attack.usable_parts(clean.shape[1]), start=1)
    ]

    def attacked(part: Attack, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = part(subject.model, x[rows], y[rows], runtime=subject.runtime)
        return found, _predictions(subject.logits(found)) != y[rows]

    started = time.perf_counter()
    for done, _ in enumerate(attack.in_parts(parts[first:], x_adv, is_open, attacked), start=first + 1):
        _synchronize(x_adv)
        seconds += time.perf_counter() - started
        write_arrays(
            file,
            {
                "x_adv": x_adv.cpu().numpy(),
                "is_open": is_open.cpu().numpy(),
                "done": np.asarray(done),
                "seconds": np.asarray(seconds),
            },
        )
        started = time.perf_counter()
    return x_adv, seconds


def check_examples(attack: Attack, x: Tensor, x_adv: Tensor, norms: Tensor) -> None:
    """Make sure that adversarial examples are what the attack promises.

    Raises:
        AttackError: They are outside of the ball or of the bounds, or not finite.
    """
    if x_adv.shape != x.shape or not bool(x_adv.isfinite().all()):
        raise AttackError(f"{attack.name} returned what is not finite or of another shape: nothing of it was written")
    if attack.bounds is not None:
        low, high = (float(bound) for bound in x_adv.aminmax())
        if low < attack.bounds[0] - BOUNDS_TOLERANCE or high > attack.bounds[1] + BOUNDS_TOLERANCE:
            raise AttackError(
                f"{attack.name} returned values from {low:g} to {high:g}, outside of the bounds {attack.bounds}: "
                "nothing of it was written"
            )
    eps = getattr(attack, "eps", None)
    if eps is not None:
        values = x[0].numel()
        # That x + delta is rounded may add this much, whatever the attack does.
        rounding = (
            float(x.abs().amax().clamp(min=1)) * 2**-24 * {"linf": 1, "l2": values**0.5, "l1": values}[norm_of(attack)]
        )
        if float(norms.amax()) > eps * (1 + TOLERANCE) + TOLERANCE + rounding:
            raise AttackError(
                f"{attack.name} returned a perturbation of norm {float(norms.amax()):.9g} for eps {eps:.9g}: nothing "
                "of it was written"
            )


def record_of(figures: dict[str, Any], *, attack: Attack, label: str, place: ResultFolder, **others: Any) -> Record:
    """A record from the figures of ``collect``."""
    return Record(
        key=place.key,
        label=label,
        attack=settings_of(attack),
        norm=norm_of(attack),
        eps=getattr(attack, "eps", None),
        steps=getattr(attack, "steps", None),
        **figures,
        **others,
    )


def _predictions(logits: Tensor) -> Tensor:
    """Classes ``(N,)``; -1, which is none, where logits are NaN."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def _in_top(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the label is among the largest logits."""
    return (logits.topk(min(TOP, logits.shape[1]), dim=1).indices == y[:, None]).any(1)


def _targets(attack: Attack, clean: Tensor, y: Tensor) -> Tensor:
    """The classes that samples are to be taken for; -1 where they are not known here."""
    if attack.targeted == "least-likely":
        return clean.scatter(1, y[:, None], torch.inf).argmin(1)
    if attack.targeted == "second-best":
        return clean.scatter(1, y[:, None], -torch.inf).argmax(1)
    return torch.full_like(y, -1)


def _seed(*parts: int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
