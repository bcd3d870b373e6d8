"""Attacks as the papers' programs have them, for ``--eager``: what the studies took before."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.attacks import PGD, Attack, Runtime
from gradprune.attacks.base import DEFAULT_RUNTIME


@dataclass(frozen=True, kw_only=True)
class WrittenPGD(PGD):
    """PGD by ``loss.backward()`` on a model whose weights require gradients, which are computed and thrown away.

    Start, step and projection are those of ``PGD``, so that results differ by rounding.
    """

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, runtime: Runtime = DEFAULT_RUNTIME) -> Tensor:
        """See ``Attack.__call__``; nothing is compiled, and the gradients of the weights are ``None`` in the end."""
        modules = [*model.modules()] if isinstance(model, nn.Module) else []
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        try:
            generator = self._generator(x.device)
            with runtime.attack(model, x) as query:
                labels = self._labels(query, x, y, generator)
            goal = labels[:, 1 if self.targeted else 0]
            x_adv = self.start(x, generator)
            for _ in range(self.steps):
                x_adv = x_adv.detach().requires_grad_(True)
                self._loss(model(x_adv), goal).backward()
                assert x_adv.grad is not None
                moved = self.advance(x_adv.detach(), self.sign(self.loss) * x_adv.grad)
                x_adv = self.project(moved, x)
            return x_adv.detach()
        finally:
            for module in training:
                module.training = True
            for parameter in model.parameters() if modules else ():
                parameter.grad = None

    def run(self, query: Any, x: Tensor, labels: Tensor, generator: Any) -> Tensor:
        """Never asked for: calls do not go through a query."""
        raise NotImplementedError

    def _loss(self, logits: Tensor, goal: Tensor) -> Tensor:
        return self.loss(logits, goal).sum() if callable(self.loss) else F.cross_entropy(logits, goal, reduction="sum")


def as_written(attack: PGD) -> Attack:
    """The same attack as the papers' programs have it."""
    values = {one.name: getattr(attack, one.name) for one in fields(attack)}
    return WrittenPGD(**{**values, "step_size": attack.step_length})
