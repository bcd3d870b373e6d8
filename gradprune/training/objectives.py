"""What adversarial training minimises: for each objective an inner attack, an outer loss, and how one batch is used.

An objective is a frozen value that knows nothing of compilation, devices or optimizers: it asks an ``Engine``, which is
an ``AdversarialTrainer``, for adversarial examples, gradients and updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.attacks import FGSM, PGD, RSFGSM, Attack
from gradprune.errors import OptionError

Model = Callable[[Tensor], Tensor]

Outcome = tuple[Tensor, Tensor]
"""An outer loss, a scalar, and the logits ``(N, classes)`` of what was trained on; both detached."""


class Engine(Protocol):
    """What an objective may ask for while it uses a batch.

    Attributes:
        updates: How many times the weights have been updated.
        state: What the objective keeps from batch to batch; saved in checkpoints.
    """

    updates: int
    state: dict[str, Tensor]

    def attack(self, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial examples of a batch, shaped like ``x``, at the radius scheduled for now."""

    def scheduled(self, attack: Attack) -> Any:
        """``attack`` at the radius scheduled for now."""

    def backward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """Run the outer step: add the gradients of the loss to those of the weights, and of ``x_adv`` if it wants."""

    def gradients(self, x: Tensor, x_adv: Tensor, y: Tensor) -> list[Tensor | None]:
        """Gradients of the outer loss by ``layers()``; nothing else is changed."""

    def layers(self) -> list[nn.Parameter]:
        """The weights of layers, without biases and normalisation."""

    def perturbed(self, changes: Sequence[Tensor | None]) -> AbstractContextManager[None]:
        """Within the block, ``changes`` are added to ``layers()``; behind it these are what they were, exactly."""

    def update(self) -> None:
        """Update the weights, once gradients of as many batches as are accumulated are there."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What is minimised.

    Attributes:
        attack: Makes the adversarial examples; ``None`` where none are made.
        label_smoothing: Share of each label that is spread over all classes in the cross entropies of the outer loss.
    """

    attack: Attack | None = field(default_factory=lambda: PGD(eps=8 / 255, step_size=2 / 255, steps=10))
    label_smoothing: float = 0.0

    name: ClassVar[str]
    uses_clean: ClassVar[bool] = False
    """Whether the outer loss runs the model on clean inputs, too."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise OptionError(f"label_smoothing has to be at least 0 and below 1, not {self.label_smoothing!r}")
        attack: object = self.attack
        if attack is not None and not isinstance(attack, Attack):
            raise OptionError(f"attack has to be one of gradprune.attacks, such as PGD(eps=8/255), not {attack!r}")

    def iterate(self, engine: Engine, x: Tensor, y: Tensor) -> Outcome:
        """Use one batch: attack, outer step, update."""
        outcome = engine.backward(x, self.perturb(engine, x, y), y)
        engine.update()
        return outcome

    def perturb(self, engine: Engine, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial examples of a batch; the inputs themselves without an attack."""
        return x if self.attack is None else engine.attack(self.attack, x, y)

    @abstractmethod
    def loss(self, clean: Model, adversarial: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """The outer loss, which is compiled.

        Args:
            clean: The model as clean inputs are to see it.
            adversarial: The model as adversarial examples are to see it: another one only with batch-norm statistics of
                their own.
            x: Clean inputs ``(N, ...)``.
            x_adv: Adversarial examples, shaped like ``x``.
            y: Labels ``(N,)``, int64.

        Returns:
            The loss, a scalar, and logits ``(N, classes)``.
        """

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy with the objective's label smoothing."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Plain(Objective):
    """Training on the inputs as they are."""

    attack: Attack | None = None

    name = "plain"
    uses_clean = True

    def perturb(self, engine: Engine, x: Tensor, y: Tensor) -> Tensor:
        """The inputs themselves."""
        return x

    def loss(self, clean: Model, adversarial: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.loss``."""
        logits = clean(x)
        return self.cross_entropy(logits, y), logits


@dataclass(frozen=True, kw_only=True)
class PGDTraining(Objective):
    """Training on adversarial examples.

    Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", equation 2.1. With a
    share of clean inputs, Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples", section 6; with
    batch-norm statistics of their own then, Xie et al. 2020, "Adversarial Examples Improve Image Recognition".

    Attributes:
        clean: Weight of the loss on clean inputs; that on adversarial examples weighs the rest of 1.
    """

    clean: float = 0.0

    name = "pgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clean < 1:
            raise OptionError(
                f"clean has to be at least 0 and below 1, not {self.clean!r}: Plain() trains on no others"
            )

    @property
    def uses_clean(self) -> bool:  # type: ignore[override]
        """Whether the outer loss runs the model on clean inputs, too."""
        return self.clean > 0

    def loss(self, clean: Model, adversarial: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.loss``."""
        if not self.clean:
            logits = adversarial(x_adv)
            return self.cross_entropy(logits, y), logits
        on_clean = self.cross_entropy(clean(x), y)
        logits = adversarial(x_adv)
        return self.clean * on_clean + (1 - self.clean) * self.cross_entropy(logits, y), logits


@dataclass(frozen=True, kw_only=True)
class Fast(PGDTraining):
    """Training on FGSM from a random start.

    Source: Wong et al. 2020, "Fast is better than free: Revisiting adversarial training", algorithm 3.
    """

    attack: Attack | None = field(default_factory=lambda: RSFGSM(eps=8 / 255))

    name = "fast"


NEAR = 1e-3
"""Standard deviation of the start of ``NearPGD``."""


@dataclass(frozen=True, kw_only=True)
class NearPGD(PGD):
    """PGD from a normally distributed point next to the input, where divergences have a gradient.

    Source: Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy", algorithm 1.
    """

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where a run starts."""
        if not self.random_start:
            return x.clone()
        return self.clip(x + NEAR * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device))


@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """Cross entropy on the inputs and, weighted, the divergence from there to adversarial examples, which maximise it.

    Source: Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy", equation 5 and
    algorithm 1.

    Attributes:
        beta: Weight of the divergence, 1 / lambda in the paper.
    """

    attack: Attack | None = field(default_factory=lambda: NearPGD(eps=8 / 255, step_size=2 / 255, loss="kl"))
    beta: float = 6.0

    name = "trades"
    uses_clean = True

    def loss(self, clean: Model, adversarial: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.loss``."""
        natural, attacked = clean(x), adversarial(x_adv)
        divergence = F.kl_div(attacked.log_softmax(1), natural.softmax(1), reduction="batchmean")
        return self.cross_entropy(natural, y) + self.beta * divergence, attacked


@dataclass(frozen=True, kw_only=True)
class MART(Objective):
    """Boosted cross entropy on adversarial examples, and a divergence that counts for what is misclassified.

    Source: Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", equations 8
    to 11, with the constants of the published code that keep logarithms finite.

    Attributes:
        beta: Weight of the divergence, lambda in the paper.
    """

    attack: Attack | None = field(default_factory=lambda: NearPGD(eps=8 / 255, step_size=2 / 255))
    beta: float = 5.0

    name = "mart"
    uses_clean = True

    def loss(self, clean: Model, adversarial: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.loss``."""
        natural, attacked = clean(x), adversarial(x_adv)
        p_natural, p_attacked = natural.softmax(1), attacked.softmax(1)
        is_own = torch.arange(natural.shape[1], device=y.device) == y[:, None]
        likeliest_other = p_attacked.masked_fill(is_own, 0.0).amax(1)
        boosted = self.cross_entropy(attacked, y) - (1.0001 - likeliest_other + 1e-12).log().mean()
        divergence = F.kl_div((p_attacked + 1e-12).log(), p_natural, reduction="none").sum(1)
        missing = 1.0000001 - p_natural.gather(1, y[:, None]).squeeze(1)
        return boosted + self.beta * (divergence * missing).mean(), attacked


@dataclass(frozen=True, kw_only=True)
class AWP(Objective):
    """Another objective with adversarially perturbed weights: each layer takes one step up the outer loss.

    Source: Wu et al. 2020, "Adversarial Weight Perturbation Helps Robust Generalization", equations 7 to 9. Weights are
    what they were when the optimizer updates them, so that weight decay is that of the weights without perturbation.

    Attributes:
        objective: What is minimised with these weights, and by which attack.
        gamma: Norm of a layer's perturbation, relative to that of its weights.
        warmup: Updates before weights are perturbed.
    """

    attack: Attack | None = field(init=False, default=None)
    label_smoothing: float = field(init=False, default=0.0)
    objective: Objective = field(default_factory=PGDTraining)
    gamma: float = 5e-3
    warmup: int = 0

    name = "awp"

    def __post_init__(self) -> None:
        if isinstance(self.objective, (AWP, Free)):
            raise OptionError(f"AWP perturbs the weights of another objective, not of {type(self.objective).__name__}")
        object.__setattr__(self, "attack", self.objective.attack)
        object.__setattr__(self, "label_smoothing", self.objective.label_smoothing)
        super().__post_init__()
        if self.gamma < 0:
            raise OptionError(f"gamma has to be zero or positive, not {self.gamma!r}")

    @property
    def uses_clean(self) -> bool:  # type: ignore[override]
        """Whether the outer loss runs the model on clean inputs, too."""
        return self.objective.uses_clean

    def iterate(self, engine: Engine, x: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.iterate``."""
        x_adv = self.objective.perturb(engine, x, y)
        if engine.updates < self.warmup:
            outcome = engine.backward(x, x_adv, y)
        else:
            with engine.perturbed(self.changes(engine.layers(), engine.gradients(x, x_adv, y))):
                outcome = engine.backward(x, x_adv, y)
        engine.update()
        return outcome

    def changes(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What to add to each layer's weights; nothing where a gradient is zero, or too large for half precision."""
        changes: list[Tensor | None] = []
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                changes.append(None)
                continue
            change = self.gamma * weight.detach().norm() * gradient / gradient.norm()
            changes.append(change.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        return changes

    def loss(self, clean: Model, adversarial: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.loss``."""
        return self.objective.loss(clean, adversarial, x, x_adv, y)


DELTA = "delta"


@dataclass(frozen=True, kw_only=True)
class Free(PGDTraining):
    """Every batch several times; each backward pass updates the weights and, with its other gradient, the perturbation.

    Source: Shafahi et al. 2019, "Adversarial Training for Free!", algorithm 1. The perturbation is kept from batch to
    batch, row by row. One iteration is ``replays`` updates, so that an epoch is worth ``replays`` epochs.

    Attributes:
        attack: An FGSM without random start; its steps are taken from where the perturbation is.
        replays: How many times each batch is used, m in the paper.
    """

    attack: Attack | None = field(default_factory=lambda: FGSM(eps=8 / 255))
    replays: int = 8

    name = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.attack, FGSM) or self.attack.random_start or self.attack.targeted or self.clean:
            raise OptionError(
                "Free trains on FGSM(norm=..., eps=...) alone: no other attack, no target, no clean inputs"
            )
        if self.replays < 1:
            raise OptionError(f"replays has to be at least 1, not {self.replays!r}")

    def iterate(self, engine: Engine, x: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.iterate``."""
        attack = engine.scheduled(self.attack)  # type: ignore[arg-type]
        kept = engine.state.get(DELTA)
        if kept is None or kept.shape[1:] != x.shape[1:]:
            kept = torch.zeros_like(x)
        elif len(kept) < len(x):
            kept = torch.cat([kept, torch.zeros_like(x[len(kept) :])])
        delta = attack.ball.project(kept[: len(x)], attack.eps)
        for _ in range(self.replays):
            # Not through the clipping, or pixels that an earlier image's perturbation moved out of bounds stay there.
            x_adv = attack.clip(x + delta).requires_grad_(True)
            outcome = engine.backward(x, x_adv, y)
            assert x_adv.grad is not None
            moved = delta + attack.step_length * attack.ball.normalize(x_adv.grad)
            delta = attack.ball.project(moved, attack.eps)
            engine.update()
        engine.state[DELTA] = torch.cat([delta, kept[len(x) :]])
        return outcome


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Plain, PGDTraining, TRADES, MART, AWP, Free, Fast)
}
"""Objectives by name."""
