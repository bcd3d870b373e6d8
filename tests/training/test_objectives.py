"""One iteration of every objective against a plain one, written from its paper with nothing of the package."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import batch, network
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.attacks import FGSM, PGD, RSFGSM
from gradprune.training import AWP, MART, TRADES, AdversarialTrainer, Fast, Free, NearPGD, Objective, PGDTraining, Plain

EPS, STEP, STEPS, SEED = 0.1, 0.03, 3, 7
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

Reference = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], Tensor]


# --- References -------------------------------------------------------------------------------------------------------


def perturbed(
    model: nn.Module, x: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor], steps: int = STEPS, step: float = STEP
) -> Tensor:
    """Signed steps up ``loss`` of the logits of the model in evaluation mode, in the Linf ball and [0, 1]."""
    model.eval()
    x_adv = start.clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(model(x_adv)), x_adv)
        x_adv = torch.max(torch.min(x_adv + step * gradient.sign(), x + EPS), x - EPS).clamp(0, 1)
    model.train()
    return x_adv.detach()


def uniform(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return x + EPS * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)


def near(x: Tensor) -> Tensor:
    return x + 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED), dtype=x.dtype)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    return descend(optimizer, F.cross_entropy(model(x), y))


def madry(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    x_adv = perturbed(model, x, uniform(x), lambda logits: F.cross_entropy(logits, y, reduction="sum"))
    return descend(optimizer, F.cross_entropy(model(x_adv), y))


def goodfellow(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    x_adv = perturbed(model, x, uniform(x), lambda logits: F.cross_entropy(logits, y, reduction="sum"))
    on_clean = F.cross_entropy(model(x), y, label_smoothing=0.1)
    return descend(optimizer, 0.3 * on_clean + 0.7 * F.cross_entropy(model(x_adv), y, label_smoothing=0.1))


def wong(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    x_adv = perturbed(model, x, uniform(x), lambda logits: F.cross_entropy(logits, y, reduction="sum"), 1, 1.25 * EPS)
    return descend(optimizer, F.cross_entropy(model(x_adv), y))


def trades(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    p = model(x).softmax(1).detach()
    x_adv = perturbed(model, x, near(x), lambda logits: (p * (p.log() - logits.log_softmax(1))).sum())
    logits, attacked = model(x), model(x_adv)
    p = logits.softmax(1)
    divergence = (p * (logits.log_softmax(1) - attacked.log_softmax(1))).sum() / len(x)
    return descend(optimizer, F.cross_entropy(logits, y) + 6 * divergence)


def mart(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    x_adv = perturbed(model, x, near(x), lambda logits: F.cross_entropy(logits, y, reduction="sum"))
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):  # equation 11, sample by sample, with the small numbers of the published code
        own = int(y[i])
        other = torch.cat([q[i, :own], q[i, own + 1 :]]).max()
        divergence = (p[i] * (p[i].log() - (q[i] + 1e-12).log())).sum()
        total = total - q[i, own].log() - (1.0001 - other + 1e-12).log() + 5 * divergence * (1.0000001 - p[i, own])
    return descend(optimizer, total / len(x))


def awp(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    x_adv = perturbed(model, x, uniform(x), lambda logits: F.cross_entropy(logits, y, reduction="sum"))
    proxy = copy.deepcopy(model)
    F.cross_entropy(proxy(x_adv), y).backward()
    moved = []
    for weight, other in zip(model.parameters(), proxy.parameters(), strict=True):
        if weight.ndim > 1:
            change = 0.01 * weight.detach().norm() / other.grad.norm() * other.grad
            moved.append((weight, weight.detach().clone(), change))
    optimizer.zero_grad()
    with torch.no_grad():
        for weight, _, change in moved:
            weight += change
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    with torch.no_grad():
        for weight, before, _ in moved:
            weight.copy_(before)
    optimizer.step()
    return loss.detach()


def shafahi(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    noise = torch.zeros_like(x)
    for _ in range(3):
        x_adv = (x + noise).clamp(0, 1).requires_grad_(True)
        loss = descend(optimizer, F.cross_entropy(model(x_adv), y))
        noise = (noise + EPS * x_adv.grad.sign()).clamp(-EPS, EPS)
    return loss


PGD_ATTACK = PGD(eps=EPS, step_size=STEP, steps=STEPS, seed=SEED)
CASES: dict[str, tuple[Objective, Reference]] = {
    "plain": (Plain(), plain),
    "pgd": (PGDTraining(attack=PGD_ATTACK), madry),
    "pgd with clean inputs": (PGDTraining(attack=PGD_ATTACK, clean=0.3, label_smoothing=0.1), goodfellow),
    "trades": (TRADES(attack=NearPGD(eps=EPS, step_size=STEP, steps=STEPS, seed=SEED, loss="kl")), trades),
    "mart": (MART(attack=NearPGD(eps=EPS, step_size=STEP, steps=STEPS, seed=SEED)), mart),
    "awp": (AWP(objective=PGDTraining(attack=PGD_ATTACK), gamma=0.01), awp),
    "free": (Free(attack=FGSM(eps=EPS), replays=3), shafahi),
    "fast": (Fast(attack=RSFGSM(eps=EPS, seed=SEED)), wong),
}


WAYS = [(name, torch.float64, True) for name in CASES] + [(name, torch.float32, False) for name in CASES]
WAYS += [("awp", torch.float32, True), ("mart", torch.float64, False)]


@pytest.mark.parametrize(("name", "dtype", "compile"), WAYS, ids=lambda value: str(value).removeprefix("torch."))
def test_first_iterations(name: str, dtype: torch.dtype, compile: bool) -> None:
    objective, reference = CASES[name]
    ours, theirs = network(dtype), network(dtype)
    initial = copy.deepcopy(ours.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (ours, theirs)]
    trainer = AdversarialTrainer(ours, optimizers[0], objective, compile=compile)
    for seed in range(1 if name == "free" else 2):  # Free carries its perturbation on; the reference does not
        x, y = batch(dtype=dtype, seed=seed)
        metrics = trainer.step(x, y)
        loss = reference(theirs, optimizers[1], x, y)
        torch.testing.assert_close(metrics.loss, loss, rtol=TOLERANCE[dtype], atol=0)
    for (key, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        update, reference_update = (v.double() - initial[key].double() for v in (value, expected))
        # The difference of two weights is not known better than the weights are.
        floor = 1e-6 * float(expected.double().norm()) if dtype is torch.float32 else 1e-15
        error = (update - reference_update).norm()
        assert error <= TOLERANCE[dtype] * reference_update.norm() + floor, key


def test_free_carries_its_perturbation_on() -> None:
    model = network()
    trainer = AdversarialTrainer(
        model, torch.optim.SGD(model.parameters(), 0.1), Free(attack=FGSM(eps=EPS), replays=2), compile=False
    )
    trainer.step(*batch(12))
    first = trainer.state["delta"].clone()
    assert first.abs().max() == pytest.approx(EPS)
    trainer.step(*batch(5, seed=1))
    assert trainer.state["delta"].shape == first.shape
    assert torch.equal(trainer.state["delta"][5:], first[5:])
    assert not torch.equal(trainer.state["delta"][:5], first[:5])
    assert trainer.updates == 4


def test_free_moves_what_another_image_has_moved_out_of_bounds() -> None:
    model = network()
    trainer = AdversarialTrainer(
        model, torch.optim.SGD(model.parameters(), 0.0), Free(attack=FGSM(eps=EPS), replays=2), compile=False
    )
    x, y = batch()
    trainer.state["delta"] = torch.full_like(x, -EPS)
    trainer.step(torch.zeros_like(x), y)  # where every pixel is at its bound, and beyond with this perturbation
    assert not (trainer.state["delta"] == -EPS).all(dim=(1, 2, 3)).any()


def test_awp_leaves_no_trace_of_its_perturbation() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    objective = AWP(objective=PGDTraining(attack=PGD_ATTACK), gamma=0.5)
    trainer = AdversarialTrainer(model, torch.optim.SGD(model.parameters(), 0.0), objective, compile=False)
    trainer.step(*batch())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    # One forward pass in training mode, not two: that of the perturbation's gradient does not count.
    assert int(model.state_dict()["1.num_batches_tracked"]) == 1


def test_awp_waits_for_its_warmup() -> None:
    updates = []
    for objective in (
        AWP(objective=PGDTraining(attack=PGD_ATTACK), gamma=0.5, warmup=1),
        PGDTraining(attack=PGD_ATTACK),
    ):
        model = network()
        trainer = AdversarialTrainer(model, torch.optim.SGD(model.parameters(), 0.1), objective, compile=False)
        trainer.step(*batch())
        updates.append([weight.detach().clone() for weight in model.parameters()])
        trainer.step(*batch(seed=1))
        updates.append([weight.detach().clone() for weight in model.parameters()])
    assert all(map(torch.equal, updates[0], updates[2]))
    assert not all(map(torch.equal, updates[1], updates[3]))
