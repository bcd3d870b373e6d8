"""The trainer around its objectives: policies, precision, accumulation, freshness, and what must not be touched."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from networks import batch, loader, network, separable
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradprune
from gradprune import AttackError, OptionError, TrainingError, TrainingStepError
from gradprune.attacks import FGSM, PGD, Runtime
from gradprune.runtime.functions import Functions
from gradprune.training import AWP, MART, TRADES, AdversarialTrainer, Free, LinearEps, NearPGD, PGDTraining, Plain

ATTACK = PGD(eps=0.1, step_size=0.03, steps=2, seed=0)
AT = PGDTraining(attack=ATTACK)


def trainer_of(model: nn.Module, objective: Any = AT, lr: float = 0.1, **settings: Any) -> AdversarialTrainer:
    settings.setdefault("compile", False)
    return AdversarialTrainer(model, torch.optim.SGD(model.parameters(), lr, momentum=0.9), objective, **settings)


# --- Compiled once, and never stale -----------------------------------------------------------------------------------


def test_neither_stale_nor_recompiled() -> None:
    model = network()
    errors: list[float] = []
    steps = [0]
    current: list[Tensor] = []

    def advance(x_adv: Tensor, direction: Tensor, size: float) -> Tensor:
        """A step of PGD that compares the gradient of each attack's first step with that of a plain copy."""
        if steps[0] % ATTACK.steps == 0:
            plain, x = copy.deepcopy(model), x_adv.detach().requires_grad_(True)
            (expected,) = torch.autograd.grad(F.cross_entropy(plain(x), current[0], reduction="sum"), x)
            errors.append(float((direction - expected).norm() / expected.norm()))
        steps[0] += 1
        return x_adv + size * direction.sign()

    attack = PGD(eps=0.1, step_size=0.03, steps=ATTACK.steps, step=advance)
    scheduler_of = torch.optim.lr_scheduler.ExponentialLR
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    trainer = AdversarialTrainer(
        model,
        optimizer,
        PGDTraining(attack=attack),
        scheduler=scheduler_of(optimizer, 0.99),
        eps_schedule=LinearEps(10),
        ema=0.9,
        clip=1.0,
    )
    x, y = separable(40)
    graphs = []
    weights = []
    for _ in range(5):
        for begin in range(0, 40, 12):  # the last batch is smaller
            current[:] = [y[begin : begin + 12]]
            trainer.step(x[begin : begin + 12], current[0])
            weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
        trainer.evaluate(DataLoader(TensorDataset(x, y), 30), ATTACK)
        graphs.append((counters["stats"]["unique_graphs"], Functions.of(model).compilations))
    assert len(errors) == 20
    assert max(errors) < 1e-4
    # The weights moved by far more than that error from one iteration to the next.
    assert min(float((a - b).norm() / a.norm()) for a, b in itertools.pairwise(weights)) > 1e-3
    assert graphs[0][0] > 0
    assert graphs == graphs[:1] * 5


def test_many_trainers_in_one_process() -> None:
    torch._dynamo.reset()
    earlier = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for i in range(3):
            trainer_of(network(), Plain(label_smoothing=i / 20), compile=True).step(*batch())
    assert counters["stats"]["unique_graphs"] - earlier == 3


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [AT, AWP(objective=AT), Free(attack=FGSM(eps=0.1), replays=2)], ids=type)
def test_learns(objective: Any) -> None:
    model = network()
    trainer = trainer_of(model, objective)
    before = trainer.evaluate(loader(shuffle=False), ATTACK)
    trainer.fit(loader(), 12)
    clean, robust = trainer.evaluate(loader(shuffle=False), ATTACK)
    assert robust is not None
    assert before[0] < 0.6
    assert clean > 0.9
    assert robust > 0.8


# --- Policies of batch norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_attack_leaves_statistics_alone(batch_norm: Any) -> None:
    model, reference = network(), network()
    x, y = batch()
    trainer_of(model, lr=0.0, batch_norm=batch_norm).step(x, y)
    reference.train(batch_norm == "train")
    x_adv = PGD(eps=0.1, step_size=0.03, steps=2, seed=0)
    x_adv = x_adv(reference, x, y, runtime=Runtime(compile=False, mode="keep"))
    reference.train()(x_adv)
    for own, expected in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(own, expected)


def test_separate_statistics() -> None:
    model, reference = network(), network()
    trainer = trainer_of(model, TRADES(attack=NearPGD(eps=0.1, step_size=0.03, seed=0)), batch_norm="separate")
    assert trainer.statistics is not None
    before = copy.deepcopy(trainer.statistics.adversarial)
    x, y = batch()
    trainer.step(x, y)
    reference(x)  # clean inputs alone have gone into the model's own statistics
    for own, expected in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(own, expected)
    adversarial = trainer.statistics.adversarial
    assert all(not torch.equal(adversarial[name], before[name]) for name in adversarial)
    assert not torch.allclose(adversarial["1.running_mean"], model.state_dict()["1.running_mean"], atol=1e-4)


def test_attack_meets_the_separate_statistics() -> None:
    model = network()
    seen = []

    def watch(x_adv: Tensor, direction: Tensor, size: float) -> Tensor:
        seen.append(model.state_dict()["1.running_mean"].clone())
        return x_adv

    trainer = trainer_of(model, TRADES(attack=NearPGD(eps=0.1, steps=1, step=watch)), batch_norm="separate")
    assert trainer.statistics is not None
    trainer.statistics.adversarial["1.running_mean"].fill_(0.25)
    trainer.step(*batch())
    assert torch.equal(seen[0], torch.full((6,), 0.25))


def test_separate_statistics_compiled_equal_eager() -> None:
    results = []
    for compile in (True, False):
        model = network(torch.float64)
        trainer = trainer_of(
            model,
            MART(attack=NearPGD(eps=0.1, step_size=0.03, steps=2, seed=0)),
            batch_norm="separate",
            compile=compile,
        )
        for seed in range(2):
            trainer.step(*batch(dtype=torch.float64, seed=seed))
        assert trainer.statistics is not None
        results.append([*model.state_dict().values(), *trainer.statistics.adversarial.values()])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)


# --- Updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Plain(), AT, AWP(objective=AT)], ids=type)
def test_accumulated_batches_equal_a_larger_one(objective: Any) -> None:
    x, y = batch(12, torch.float64)
    whole, parts = (network(torch.float64, norm=False) for _ in range(2))
    attack = PGD(eps=0.1, step_size=0.03, steps=2, random_start=False)
    if isinstance(objective, AWP):
        objective = AWP(objective=PGDTraining(attack=attack), warmup=10)  # which depends on the batch that it sees
    elif objective.attack is not None:
        objective = PGDTraining(attack=attack)
    trainer_of(whole, objective).step(x, y)
    trainer = trainer_of(parts, objective, accumulate=3)
    for begin in (0, 4, 8):
        assert trainer.updates == 0
        trainer.step(x[begin : begin + 4], y[begin : begin + 4])
    assert trainer.updates == 1
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_awp_keeps_what_was_accumulated() -> None:
    model = network(norm=False)
    trainer = trainer_of(model, AWP(objective=AT), accumulate=2)
    trainer.step(*batch())
    first = [weight.grad.clone() for weight in trainer.weights if weight.grad is not None]
    assert len(first) == len(trainer.weights)
    trainer.gradients(batch()[0], batch()[0], batch()[1])
    assert all(torch.equal(weight.grad, before) for weight, before in zip(trainer.weights, first, strict=True))


def test_clip() -> None:
    model = network()
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer = trainer_of(model, lr=1.0, clip=1e-3)
    trainer.step(*batch())
    moved = torch.cat([(w - b).flatten() for w, b in zip(model.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-3)


def test_moving_average() -> None:
    model = network()
    trainer = trainer_of(model, ema=0.75)
    expected = [weight.detach().clone() for weight in model.parameters()]
    for seed in range(3):
        trainer.step(*batch(seed=seed))
        expected = [0.75 * e + 0.25 * w.detach() for e, w in zip(expected, model.parameters(), strict=True)]
    live = copy.deepcopy(model.state_dict())
    with trainer.averaged() as averaged:
        assert averaged is model
        for weight, value in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(weight.detach(), value)
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_eps_schedule() -> None:
    model = network()
    trainer = trainer_of(model, eps_schedule=LinearEps(4))
    radii = []
    for seed in range(5):
        scheduled = trainer.scheduled(ATTACK)
        radii.append((scheduled.eps, scheduled.step_size))
        x, y = batch(seed=seed)
        x_adv = trainer.attack(ATTACK, x, y)
        assert float((x_adv - x).abs().max()) <= scheduled.eps + 1e-6
        trainer.step(x, y)
    assert radii == [pytest.approx((f * 0.1, f * 0.03)) for f in (0.25, 0.5, 0.75, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model, reference = network(), network()
    trainer = trainer_of(model, autocast=dtype)
    assert trainer.scaler.is_enabled() == (dtype is torch.float16)
    metrics = trainer.step(*batch())
    expected = trainer_of(reference).step(*batch())
    assert metrics.loss.dtype is torch.float32
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=2e-2)
    assert float(metrics.loss) != float(expected.loss)  # it did run in another precision
    for weight, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0.1, atol=0.01)


# --- Bad input, and what must not be touched --------------------------------------------------------------------------


def test_nan_loss_leaves_weights_and_statistics() -> None:
    model = network()
    trainer = trainer_of(model, Plain())
    trainer.step(*batch())
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    x[3] = torch.nan
    with pytest.raises(TrainingError, match="the loss is nan after 1 updates"):
        trainer.step(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    trainer.step(*batch())  # it can go on


def test_model_that_was_compiled_for_attacks() -> None:
    model = network()
    accelerated = gradprune.accelerate(model)
    for objective, error, message in (
        (AT, TrainingStepError, "use the model that was not compiled"),
        (Free(), TrainingError, "no weight has got a gradient: pass the model itself"),
    ):
        trainer = AdversarialTrainer(accelerated, torch.optim.SGD(model.parameters(), 0.1), objective, compile=False)
        with pytest.raises(error, match=message):
            trainer.step(*batch())


def test_bad_batch_leaves_the_trainer() -> None:
    model = network()
    trainer = trainer_of(model)
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    for inputs, labels, message in ((x + 2, y, "within the bounds"), (x, y + 9, "classes of the model")):
        with pytest.raises(AttackError, match=message):
            trainer.step(inputs, labels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.iterations == trainer.updates == 0
    assert model.training


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (AT, {"batch_norm": "evals"}, "did you mean 'eval'"),
        (AT, {"batch_norm": "separate"}, "clean inputs and adversarial examples"),
        (Plain(), {"batch_norm": "separate"}, "clean inputs and adversarial examples"),
        (AT, {"clip": 0.0}, "clip has to be positive"),
        (AT, {"accumulate": 0}, "at least 1"),
        (Free(), {"accumulate": 2}, "at every replay"),
        (AT, {"ema": 1.0}, "below 1"),
        (AT, {"autocast": torch.float64}, "torch.float16"),
        (AT, {"options": {"disabled": ()}}, "did you mean 'disable'"),
    ],
)
def test_bad_settings(objective: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        trainer_of(network(), objective, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGDTraining(attack="pgd"), "one of gradprune.attacks"),
        (lambda: PGDTraining(clean=1.0), "below 1"),
        (lambda: PGDTraining(label_smoothing=1.5), "below 1"),
        (lambda: AWP(objective=Free()), "another objective"),
        (lambda: AWP(gamma=-1.0), "zero or positive"),
        (lambda: Free(attack=PGD()), "FGSM"),
        (lambda: Free(replays=0), "at least 1"),
    ],
)
def test_bad_objectives(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_optimizer_of_another_model() -> None:
    with pytest.raises(OptionError, match="none of the model's parameters"):
        AdversarialTrainer(network(), torch.optim.SGD(network().parameters(), 0.1), AT)
    frozen = network().requires_grad_(False)
    with pytest.raises(OptionError, match="nothing to train"):
        AdversarialTrainer(frozen, torch.optim.SGD(network().parameters(), 0.1), AT)
