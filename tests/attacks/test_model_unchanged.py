"""The model is left as it was found: modes, weights, buffers, gradients, whatever happens in mid-attack."""

from __future__ import annotations

import pytest
import torch
from attack_testing import EAGER, KINDS, Network, brief, samples
from helpers import ModelState
from torch import Tensor

from gradprune.attacks import Runtime


class Watched(Network):
    """In use for training: modes mixed, one weight frozen, one with a gradient. Raises at a given forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.train()
        self.dropout.eval()
        self.conv.bias.requires_grad_(False)
        self.fc.weight.grad = torch.full_like(self.fc.weight, 0.5)
        self.calls = 0
        self.error: tuple[int, type[BaseException]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.error and self.calls == self.error[0]:
            raise self.error[1]("in mid-attack")
        return super().forward(x)


@pytest.mark.parametrize("mode", ["eval", "keep"])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_as_it_was(name: str, mode: str) -> None:
    model = Watched()
    x, y = samples(Network())
    state = ModelState.of(model)
    runtime = Runtime(compile=False, mode=mode)
    for _ in range(2):  # the first time, the number of classes is asked for
        model.calls = 0
        brief(name)(model, x, y, runtime=runtime)
        state.assert_untouched(model)

    for call in {1, (model.calls + 1) // 2}:
        for error in (RuntimeError, KeyboardInterrupt):
            model.calls, model.error = 0, (call, error)
            with pytest.raises(error, match="in mid-attack"):
                brief(name)(model, x, y, runtime=runtime)
            state.assert_untouched(model)


def test_dropout_is_off_in_evaluation_mode_and_on_if_kept() -> None:
    model = Network()
    model.dropout.train()
    x, y = samples(Network())
    frozen = brief("BIM")(Network(), x, y, runtime=EAGER)
    assert torch.equal(brief("BIM")(model, x, y, runtime=EAGER), frozen)
    assert not torch.equal(brief("BIM")(model, x, y, runtime=Runtime(compile=False, mode="keep")), frozen)
