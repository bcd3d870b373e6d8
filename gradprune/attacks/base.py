"""What all attacks have in common: the call, its checks, targets, and the random state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..errors import AttackError, OptionError
from ..options import unknown
from ..runtime import Query, Runtime

Target = Literal["given", "least-likely", "second-best", "random"]

BOUNDS_TOLERANCE = 1e-6
"""How far inputs may be outside of the declared range, for rounding."""

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
        if self.bounds is not None and not (len(self.bounds) == 2 and self.bounds[0] < self.bounds[1]):
            raise OptionError(f"bounds have to be a smaller and a larger number, or None, not {self.bounds!r}")
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
            x: Clean inputs ``(N, ...)``, floating point, within ``bounds``.
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
        x = x.detach()
        if x.is_inference():
            x = x.clone()
        with runtime.attack(model, x) as query:
            if int(y.min()) < 0 or int(y.max()) >= query.classes:
                raise AttackError(
                    f"labels have to be classes of the model, 0 to {query.classes - 1}, and they are "
                    f"{int(y.min())} to {int(y.max())}"
                )
            labels = self._labels(query, x, y, generator)
            return self.run(query, x, labels, generator).detach()

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
        """Which samples ``(N,)`` the attack has succeeded for. NaN among the logits is no class, so it is a success."""
        if self.targeted:
            return logits.argmax(1) == labels[:, 1]
        return logits.isnan().any(1) | (logits.argmax(1) != labels[:, 0])

    def clip(self, x: Tensor) -> Tensor:
        """The closest valid input."""
        return x if self.bounds is None else x.clamp(*self.bounds)

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
        parameters = getattr(model, "parameters", tuple)()
        for parameter in parameters:
            if parameter.device != x.device and parameter.device.type != "meta":
                raise AttackError(
                    f"the model is on {parameter.device} and the inputs are on {x.device}: move one to the other"
                )
            break
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


def check_finite(logits: Tensor) -> None:
    """Raise an ``AttackError`` if clean logits hold NaN or infinity."""
    if not bool(logits.isfinite().all()):
        raise AttackError(
            "the model's logits hold NaN or infinity before anything is attacked: check its weights and its inputs"
        )


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``(N,)`` with as many dimensions as ``like``, to multiply with."""
    return values.view(-1, *[1] * (like.ndim - 1))
