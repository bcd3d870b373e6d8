"""What all attacks have in common: the call, its checks, targets, and the random state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from gradprune.errors import AttackError, OptionError, unknown
from gradprune.runtime import Query, Runtime
from gradprune.runtime.functions import Answer
from gradprune.runtime.losses import LABEL_LOSSES, Loss

Target = Literal["given", "least-likely", "second-best", "random"]

BOUNDS_TOLERANCE = 1e-6
"""How far inputs may be outside of the declared range, for rounding."""

TWO_SIDED = ("difference", "dlr-targeted")
"""Losses that know both label and target, and grow from one towards the other."""

DEFAULT_RUNTIME = Runtime()


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack: a value that is called with a model, inputs and labels.

    Attributes:
        bounds: Smallest and largest valid input; ``None`` where any number is valid.
        targeted: ``None`` to have samples misclassified. Otherwise the class that they are to be taken for: ``"given"``
            in place of the labels, ``"least-likely"`` or ``"second-best"`` by the clean logits, or drawn at
            ``"random"`` among the other classes.
        seed: Makes the attack deterministic and leaves torch's random state alone. ``None`` draws from torch's
            generator once.
    """

    bounds: tuple[float, float] | None = (0.0, 1.0)
    targeted: Target | None = None
    seed: int | None = None

    can_be_targeted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bounds is not None and not _are_bounds(self.bounds):
            raise OptionError(f"bounds have to be a smaller and a larger number, or None, not {self.bounds!r}")
        if self.seed is not None and not _is_whole(self.seed):
            raise OptionError(f"seed has to be a whole number or None, not {self.seed!r}")
        if self.targeted is not None:
            if not self.can_be_targeted:
                raise OptionError(f"{type(self).__name__} cannot be targeted")
            if self.targeted not in get_args(Target):
                raise OptionError(unknown("target", str(self.targeted), list(get_args(Target))))

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, runtime: Runtime = DEFAULT_RUNTIME) -> Tensor:
        """Attack a batch.

        The model is left as it was, whatever happens: its modes, its buffers, ``requires_grad`` and ``.grad``.

        Args:
            model: From inputs to logits ``(N, classes)``; a module, compiled or not, or a function.
            x: Clean inputs ``(N, ...)``, floating point, within ``bounds``. Those of half precision are perturbed in
                float32, with the model under autocast to their type, and rounded to it at the end.
            y: Labels ``(N,)``, int64; targets if ``targeted`` is ``"given"``.
            runtime: How to run it.

        Returns:
            Adversarial examples, shaped like ``x``, detached.

        Raises:
            AttackError: The inputs are unfit: of another type or range, labels that are no classes, a model on another
                device or with NaN among its logits.
        """
        self._check_inputs(model, x, y)
        if not len(x):
            return x.detach().clone()
        generator = self._generator(x.device)
        dtype = x.dtype
        if dtype in (torch.float16, torch.bfloat16):
            x, runtime = x.float(), replace(runtime, autocast=runtime.autocast or dtype)
        with torch.inference_mode(False):
            x, y = (value.clone() if value.is_inference() else value.detach() for value in (x, y))
        with runtime.attack(model, x) as query:
            if int(y.min()) < 0 or int(y.max()) >= query.classes:
                raise AttackError(
                    f"labels have to be classes of the model, 0 to {query.classes - 1}, and they are "
                    f"{int(y.min())} to {int(y.max())}"
                )
            labels = self._labels(query, x, y, generator)
            return self.run(query, x, labels, generator).detach().to(dtype)

    @abstractmethod
    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The attack itself.

        Args:
            query: What to ask the model with.
            x: Clean inputs ``(N, ...)``.
            labels: ``(N, 2)``: true labels, and targets, which without a target are the labels again.
            generator: For whatever is random.

        Returns:
            Adversarial examples.
        """

    @property
    def name(self) -> str:
        """Its name in tables."""
        return type(self).__name__

    def is_fooled(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which samples ``(N,)`` the attack has succeeded for. Logits with NaN are of no class, so of another."""
        is_class = ~logits.isnan().any(1)
        if self.targeted:
            return is_class & (logits.argmax(1) == labels[:, 1])
        return ~(is_class & (logits.argmax(1) == labels[:, 0]))

    def sign(self, loss: str | Loss) -> int:
        """Whether a loss is to grow (1) or, being the target's, to shrink (-1)."""
        return 1 if self.targeted is None or loss in TWO_SIDED else -1

    def aimed(self, labels: Tensor, loss: str | Loss) -> Tensor:
        """Labels and targets as a loss takes them, ``(N, 2)``: first what it is about, the target if there is one."""
        return labels if self.sign(loss) > 0 else labels.flip(1)

    def clip(self, x: Tensor) -> Tensor:
        """The closest valid input."""
        return x if self.bounds is None else x.clamp(*self.bounds)

    def average(self, query: Query, x: Tensor, against: Tensor, loss: str | Loss, times: int) -> Answer:
        """What to maximise, logits and gradient at ``x``, averaged over several evaluations of a random model.

        Args:
            query: What to ask the model with.
            x: Inputs ``(N, ...)``.
            against: What the loss takes beside the logits, such as labels as ``aimed`` returns them.
            loss: See ``Query.gradient``.
            times: How many evaluations.
        """
        losses, logits, gradient = query.gradient(x, against, loss)
        for _ in range(times - 1):
            more = query.gradient(x, against, loss)
            losses, logits, gradient = losses + more[0], logits + more[1], gradient + more[2]
        scale = self.sign(loss) / times
        # Where logits are NaN the model is fooled, and there is nowhere to go from there.
        return scale * losses, logits / times, scale * gradient.nan_to_num(nan=0.0)

    def _labels(self, query: Query, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        if self.targeted is None:
            return torch.stack([y, y], dim=1)
        logits = query.logits(x)
        check_finite(logits)
        if self.targeted == "given":
            return torch.stack([logits.argmax(1), y], dim=1)
        if query.classes < 2:
            raise AttackError("a targeted attack needs a model of at least two classes")
        if self.targeted == "random":
            shift = torch.randint(1, query.classes, y.shape, generator=generator, device=y.device)
            return torch.stack([y, (y + shift) % query.classes], dim=1)
        others = logits.scatter(1, y[:, None], math.inf if self.targeted == "least-likely" else -math.inf)
        target = others.argmin(1) if self.targeted == "least-likely" else others.argmax(1)
        return torch.stack([y, target], dim=1)

    def _check_counts(self, *names: str, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise OptionError(f"{name} has to be a whole number, at least {least}, not {value!r}")

    def _check_positive(self, *names: str, or_zero: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            is_number = isinstance(value, Real) and math.isfinite(value)
            if not is_number or not (value > 0 or (or_zero and value == 0)):
                raise OptionError(f"{name} has to be a positive number{' or zero' if or_zero else ''}, not {value!r}")

    def _check_loss(self, loss: str | Loss, names: Collection[str] = LABEL_LOSSES) -> None:
        if not (loss in names if isinstance(loss, str) else callable(loss)):
            raise OptionError(unknown("loss", loss, names))
        if loss in TWO_SIDED and self.targeted is None:
            raise OptionError(f'the loss {loss!r} is about a target: pass targeted="second-best" or another')

    def _generator(self, device: torch.device) -> torch.Generator:
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        return torch.Generator(device).manual_seed(seed)

    def _check_inputs(self, model: Any, x: Tensor, y: Tensor) -> None:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise AttackError("inputs and labels have to be tensors: torch.as_tensor(x) makes one of an array")
        if not x.is_floating_point():
            raise AttackError(f"inputs have to be floating point, not {x.dtype}: images of bytes are x.float() / 255")
        if x.ndim < 2:
            raise AttackError(f"inputs have to be a batch (N, ...), not of shape {tuple(x.shape)}: x.unsqueeze(0)")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise AttackError(
                f"labels have to be int64 of shape ({len(x)},), not {y.dtype} of shape {tuple(y.shape)}: classes "
                "from 0 on, one for each input"
            )
        if y.device != x.device:
            raise AttackError(f"inputs are on {x.device} and labels on {y.device}: y.to({str(x.device)!r})")
        parameter: Tensor | None = next(iter(getattr(model, "parameters", tuple)()), None)
        if parameter is not None and parameter.device != x.device:
            raise AttackError(
                f"the model is on {parameter.device} and the inputs are on {x.device}: move one to the other"
            )
        if not len(x):
            return
        low, high = (float(bound) for bound in x.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AttackError("inputs have to be finite, and these hold NaN or infinity")
        if self.bounds is not None:
            least, most = self.bounds
            if low < least - BOUNDS_TOLERANCE or high > most + BOUNDS_TOLERANCE:
                raise AttackError(
                    f"inputs have to be within the bounds {least:g} to {most:g}, and are {low:g} to {high:g}: scale "
                    "them, or set bounds to the range that the model takes"
                )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral)


def _are_bounds(bounds: Any) -> bool:
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        return False
    return -math.inf < low < high < math.inf


def check_finite(logits: Tensor) -> None:
    """Raise an ``AttackError`` if clean logits hold NaN or infinity."""
    if not bool(logits.isfinite().all()):
        raise AttackError(
            "the model's logits hold NaN or infinity before anything is attacked: check its weights and its inputs"
        )


def check_start(query: Query, x: Tensor, logits: Tensor) -> None:
    """Raise an ``AttackError`` if clean logits hold NaN or infinity, which are asked for if those of the start do."""
    if not bool(logits.isfinite().all()):
        check_finite(query.logits(x))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``(N,)`` with as many dimensions as ``like``, to multiply with."""
    return values.view(-1, *[1] * (like.ndim - 1))
