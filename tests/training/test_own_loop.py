"""The training loop of the README, with two compiled functions and no trainer."""

from __future__ import annotations

import torch
from networks import network, separable
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

EPS, STEP_SIZE = 0.1, 0.04


def train(model: nn.Module, *, compiled: bool) -> tuple[list[Tensor], list[int]]:
    """The last weights, and how many graphs had been compiled after each epoch."""

    def attack_step(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x_adv), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
        return torch.clamp(x + (x_adv - x).clamp(-EPS, EPS), 0, 1)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    step = torch.compile(attack_step, backend="gradprune") if compiled else attack_step
    compiled_loss = torch.compile(loss_of) if compiled else loss_of
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    inputs, labels = separable(36)
    inputs = inputs.double()
    generator = torch.Generator().manual_seed(0)
    graphs, earlier = [], counters["stats"]["unique_graphs"]
    for _ in range(3):
        for x, y in zip(inputs.split(12), labels.split(12), strict=True):
            model.eval()
            x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS, generator=generator)).clamp(0, 1)
            before = [weight.grad for weight in model.parameters()]
            for _ in range(3):
                x_adv = step(x_adv, x, y)
            assert all(weight.grad is grad for weight, grad in zip(model.parameters(), before, strict=True))
            model.train()
            optimizer.zero_grad()
            compiled_loss(x_adv, y).backward()
            optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"] - earlier)
    assert all(weight.requires_grad for weight in model.parameters())
    return [weight.detach() for weight in model.parameters()], graphs


def test_two_compiled_functions() -> None:
    weights, graphs = train(network(torch.float64), compiled=True)
    expected, _ = train(network(torch.float64), compiled=False)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert graphs == [2, 2, 2]
