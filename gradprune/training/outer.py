"""The outer step: loss and logits of a batch, as one module that is compiled, and wrapped where devices are many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from .objectives import Objective, Outcome

BatchNorm = Literal["eval", "train", "separate"]


class Outer(nn.Module):
    """Loss and logits of a batch.

    Args:
        model: The model that is trained.
        objective: Whose loss it is.
        autocast: Type to run the model in.
        statistics: Batch-norm statistics for adversarial examples in place of the model's own.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, autocast: torch.dtype | None, statistics: Statistics | None
    ) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        self._autocast = autocast
        self.statistics = None if statistics is None else statistics.adversarial
        # Dynamo allows a few compilations for each code object, so each trainer has one of its own.
        plain: Any = Outer.forward
        own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, closure=plain.__closure__)
        self.forward = MethodType(own, self)  # type: ignore[method-assign]

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """See ``Objective.loss``."""

        def clean(x: Tensor) -> Tensor:
            return self._full(self.model, x)

        def adversarial(x: Tensor) -> Tensor:
            if self.statistics is None:
                return self._full(self.model, x)
            return self._full(lambda x: functional_call(self.model, self.statistics, (x,)), x)

        loss, logits = self._objective.loss(clean, adversarial, x, x_adv, y)
        return loss, logits.detach()

    def _full(self, model: object, x: Tensor) -> Tensor:
        """Logits in float32 or better, whatever the model computes in: losses need their precision."""
        with torch.autocast(x.device.type, self._autocast, enabled=self._autocast is not None):
            logits: Tensor = model(x)  # type: ignore[operator]
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class Statistics:
    """Batch-norm statistics of adversarial examples, beside those of clean inputs, which are in the model.

    Source: Xie et al. 2020, "Adversarial Examples Improve Image Recognition" (AdvProp), section 4.1; there scale and
    shift are doubled as well, here only what is no weight.

    Attributes:
        adversarial: By the names that the model's own have.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {
            f"{name}.{buffer_name}" if name else buffer_name: buffer
            for name, module in model.named_modules()
            if isinstance(module, _NormBase)
            for buffer_name, buffer in module.named_buffers(recurse=False)
        }
        self.adversarial = {name: buffer.clone() for name, buffer in self._own.items()}

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block the model has the statistics of adversarial examples."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for own, adversarial in zip(self._own.values(), self.adversarial.values(), strict=True):
                before = own.clone()
                own.copy_(adversarial)
                adversarial.copy_(before)
