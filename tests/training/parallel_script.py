"""What two processes do in ``test_parallel``: every check leaves its results in the folder given as argument.

Results are nested containers of tensors, written as ``CHECK-RANK.pt``. If a process fails, torchrun ends the other.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gradprune.attacks import FGSM, PGD
from gradprune.compiler import hoisted_step as prologue
from gradprune.errors import TrainingError
from gradprune.passes import prepack_convolutions
from gradprune.training import (
    AWP,
    MART,
    TRADES,
    AdversarialTrainer,
    Fast,
    Free,
    Objective,
    PGDTraining,
    Plain,
    parallel,
)

ROWS, SIDE, CLASSES = 4, 6, 5
"""Rows of each process, side of an image, classes."""


@dataclass(frozen=True, kw_only=True)
class FixedStart(PGD):
    """PGD from a point next to the input that depends on the input alone, so that any division of a batch gives it."""

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.clip(x + 0.01 * torch.sin(100 * x))


ATTACK = FixedStart(eps=0.1, step_size=0.05, steps=3)
OBJECTIVES: dict[str, Objective] = {
    "plain": Plain(),
    "pgd": PGDTraining(attack=ATTACK, clean=0.5),
    "fast": Fast(attack=FixedStart(eps=0.1, step_size=0.1, steps=1)),
    "trades": TRADES(attack=FixedStart(eps=0.1, step_size=0.05, steps=3, loss="kl")),
    "mart": MART(attack=ATTACK),
    "awp": AWP(objective=PGDTraining(attack=ATTACK), gamma=0.1),
    "free": Free(attack=FGSM(eps=0.1), replays=2),
}


def network(*, batch_norm: bool = False, seed: int = 0) -> nn.Module:
    """Two blocks, each a unit of FSDP, and a head that is in the unit of the whole."""
    torch.manual_seed(seed)
    norm = [nn.BatchNorm2d(4)] if batch_norm else []
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *norm, nn.Softplus())
    second = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.Tanh())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(16, CLASSES)).double()


def sharded(model: nn.Module) -> nn.Module:
    for block in (model[0], model[1], model):  # type: ignore[index]
        fully_shard(block)
    return model


def trainer(model: nn.Module, objective: Objective, **options: Any) -> AdversarialTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return AdversarialTrainer(model, optimizer, objective, **{"compile": False, **options})


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of both processes, the same on both."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.rand(2 * ROWS, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
        yield x, torch.randint(CLASSES, (2 * ROWS,), generator=generator)


def mine(value: Tensor) -> Tensor:
    """What this process has of a batch."""
    return value.chunk(2)[parallel.rank()]


def whole(values: Any) -> list[Tensor]:
    return [value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone() for value in values]


def train(trainer: AdversarialTrainer, count: int = 3, *, alone: bool = False) -> dict[str, Any]:
    """Train on shares of batches, or on all of them, and say what came of it."""
    share = (lambda value: value) if alone else mine
    metrics = [trainer.step(share(x).to(trainer.weights[0].dtype), share(y)) for x, y in batches(count)]
    return {
        "losses": torch.stack([step.loss for step in metrics]),
        "weights": whole(trainer.model.parameters()),
        "averages": whole(trainer.averages),
        "buffers": [buffer.clone() for buffer in trainer.model.buffers()],
        "correct": sum(int(step.correct) for step in metrics),
    }


def reference(objective: Objective, count: int = 3, **options: Any) -> dict[str, Any]:
    """The same by one process."""
    return train(trainer(network(), objective, parallel="none", **options), count, alone=True)


def collectives(trainer: AdversarialTrainer, steps: int = 1) -> dict[str, list[str]]:
    """Names of the collectives of the last of some steps: all, those during its attack, and those before it."""
    scheduled = trainer.scheduled

    def marked(attack: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            with record_function("inner loop"):
                return scheduled(attack)(*args, **kwargs)  # type: ignore[no-any-return]

        return call

    *others, (x, y) = batches(steps)
    for other in others:
        trainer.step(*map(mine, other))
    trainer.scheduled = marked  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.step(mine(x), mine(y))
    trainer.scheduled = scheduled  # type: ignore[method-assign]
    events = profiled.events() or []
    (loop,) = (event.time_range for event in events if event.name == "inner loop")
    found = [(event.time_range.start, event.name) for event in events if event.name.startswith("c10d::")]
    return {
        "all": [name for _, name in found],
        "inner": [name for start, name in found if loop.start <= start <= loop.end],
        "before": [name for start, name in found if start < loop.start],
    }


CHECKS: list[Callable[[], Any]] = []


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS.append(function)
    return function


# --- DDP --------------------------------------------------------------------------------------------------------------


@check
def objectives() -> Any:
    """Every objective by two processes, whose weights differ at first, and by one."""
    return {
        name: (
            train(trainer(network(seed=parallel.rank()), objective, clip=1.0, ema=0.5)),
            reference(objective, clip=1.0, ema=0.5),
        )
        for name, objective in OBJECTIVES.items()
    }


@check
def compiled() -> Any:
    """Objectives compiled, by two processes, and eager, by one; and the collectives of a step of what is compiled."""
    results: dict[str, Any] = {}
    for name in ("trades", "free"):
        one = trainer(network(), OBJECTIVES[name], compile=True)
        results[name] = train(one), reference(OBJECTIVES[name])
        if name == "trades":
            results["collectives"] = collectives(one)
    return results


@check
def counted() -> Any:
    """Collectives of an eager step; one of a batch that waits for another; one that is left to the caller."""
    return {
        "updating": collectives(trainer(network(batch_norm=True), OBJECTIVES["trades"])),
        "waiting": collectives(trainer(network(batch_norm=True), OBJECTIVES["pgd"], accumulate=2)),
        "none": collectives(trainer(network(batch_norm=True), OBJECTIVES["pgd"], parallel="none")),
    }


@check
def accumulated() -> Any:
    """Two batches for an update, by two processes and by one; and by one with batches twice as large."""
    results = {}
    for name in ("pgd", "awp"):
        two = trainer(network(), OBJECTIVES[name], accumulate=2)
        results[name] = train(two, 4), reference(OBJECTIVES[name], 4, accumulate=2)
    one = trainer(network(), OBJECTIVES["pgd"], parallel="none")
    (x, y), (x2, y2), (x3, y3), (x4, y4) = batches(4)
    one.step(torch.cat([x, x2]), torch.cat([y, y2]))
    one.step(torch.cat([x3, x4]), torch.cat([y3, y4]))
    return results, whole(one.model.parameters())


@check
def batch_norm() -> Any:
    """Buffers and separate statistics, before the processes share them after an update, and behind."""
    one = trainer(network(batch_norm=True, seed=parallel.rank()), OBJECTIVES["trades"], batch_norm="separate")
    share = one._devices.share_buffers
    seen: list[list[Tensor]] = []

    def look() -> None:
        assert one.statistics is not None
        seen.append([value.clone() for value in (*one.model.buffers(), *one.statistics.adversarial.values())])

    def looked_at() -> None:
        look()
        share()
        look()

    one._devices.share_buffers = looked_at  # type: ignore[method-assign]
    train(one, 2)
    return seen


@check
def not_finite() -> Any:
    """NaN in the data of one process only, and a batch behind it."""
    one = trainer(network(), Plain())
    before = whole(one.model.parameters())
    x, y = next(batches(1))
    x[-1] = torch.nan
    try:
        one.step(mine(x), mine(y))
        message = ""
    except TrainingError as error:
        message = str(error)
    same = all(map(torch.equal, before, whole(one.model.parameters())))
    return {"message": message, "same": same, "behind": (train(one), reference(Plain()))}


@check
def half_precision() -> Any:
    """Scaled losses, and a scale with which gradients are infinite."""
    return {name: scaled(make) for name, make in (("ddp", trainer), ("fsdp", fsdp_trainer))}


def scaled(make: Callable[..., AdversarialTrainer]) -> dict[str, Any]:
    one = make(network().float(), OBJECTIVES["pgd"], autocast=torch.float16, clip=1.0)
    train(one, 2)
    before = whole(one.model.parameters())
    one.scaler.update(1e38)  # with which gradients are infinite
    train(one, 1)
    skipped = all(map(torch.equal, before, whole(one.model.parameters())))
    return {"weights": before, "skipped": skipped, "scale": one.scaler.get_scale()}


@check
def objects() -> Any:
    rank = parallel.rank()
    parallel.barrier()
    return {
        "gathered": parallel.gather({"rank": rank, "values": torch.full((rank + 1,), rank)}),
        "scattered": parallel.scatter(["first", "second"] if rank == 0 else None),
        "shared": parallel.share(rank + 10),
        "sum": parallel.sum_counts(torch.tensor([1, rank])),
        "first": parallel.is_first(),
    }


# --- FSDP -------------------------------------------------------------------------------------------------------------


def fsdp_trainer(model: nn.Module, objective: Objective, **options: Any) -> AdversarialTrainer:
    replica = copy.deepcopy(model)
    return trainer(sharded(model), objective, replica=replica, **options)


@check
def fsdp() -> Any:
    results = {}
    for name in ("pgd", "trades", "awp", "free"):
        two = fsdp_trainer(network(), OBJECTIVES[name], clip=1.0, ema=0.5)
        results[name] = train(two), reference(OBJECTIVES[name], clip=1.0, ema=0.5)
    two = fsdp_trainer(network(), OBJECTIVES["awp"], accumulate=2)
    results["accumulated awp"] = train(two, 4), reference(OBJECTIVES["awp"], 4, accumulate=2)
    return results


@check
def fsdp_compiled() -> Any:
    """In float32, in which convolutions are packed for the attack; and how often it looked at the weights anew."""
    prepack_convolutions.WORTH_FLOPS = 0
    one = fsdp_trainer(network().float(), PGDTraining(attack=ATTACK), compile=True)
    alone = trainer(network().float(), PGDTraining(attack=ATTACK), parallel="none")
    return {"pgd": (train(one), train(alone, alone=True)), "refreshes": [step.refreshes for step in prologue._steps]}


@check
def fsdp_counted() -> Any:
    """Collectives, and whether the replica had the weights, buffers and modes of the model."""
    one = fsdp_trainer(network(batch_norm=True), OBJECTIVES["trades"], batch_norm="separate", ema=0.5)
    counts = collectives(one, 2)
    with one.averaged() as model:
        averaged = all(map(torch.equal, whole(one.averages), model.parameters()))
    one.model[0].eval()  # type: ignore[index]
    replica = one._devices.whole()
    equal = all(map(torch.equal, whole(one.model.parameters()), replica.parameters()))
    equal = equal and all(map(torch.equal, one.model.buffers(), replica.buffers()))
    modes = [module.training for module in one.model.modules()] == [module.training for module in replica.modules()]
    return {**counts, "equal": equal, "modes": modes, "averaged": averaged, "buffers": list(one.model.buffers())}


def states_of(one: AdversarialTrainer) -> list[dict[str, Any]]:
    model, averages = one.model, one.averages
    return [
        parallel.model_state(model),
        parallel.optimizer_state(one.optimizer),
        parallel.averages_state(model, averages),
    ]


def load_states(one: AdversarialTrainer, model: dict, optimizer: dict, averages: dict) -> None:
    parallel.load_model_state(one.model, model)
    parallel.load_optimizer_state(one.optimizer, optimizer)
    parallel.load_averages_state(one.model, one.averages, averages)


@check
def checkpoints() -> Any:
    """States saved after three batches by one engine, and loaded by all, which train for two more."""
    engines = {
        "ddp": lambda: trainer(network(), OBJECTIVES["pgd"], ema=0.5),
        "fsdp": lambda: fsdp_trainer(network(), OBJECTIVES["pgd"], ema=0.5),
    }
    results = {}
    for source, make in engines.items():
        one = make()
        train(one, 3)
        states = states_of(one)
        empty = states == [{}, {}, {}]
        states = parallel.share(copy.deepcopy(states))
        results[source, "further"] = train(one, 2)
        for target, make_other in engines.items():
            other = make_other()
            load_states(other, *copy.deepcopy(states))  # of which the optimizer keeps tensors
            other.updates = 3
            results[source, target] = train(other, 2)
        results[source, "empty"] = empty
        results[source, "keys"] = list(states[0])
    return results


# --- The whole loop ---------------------------------------------------------------------------------------------------


@check
def fitted() -> Any:
    """Two epochs in one go, and with an interruption; an evaluation, and that of one process."""
    x, y = (torch.cat(values) for values in zip(*batches(3), strict=True))
    data = TensorDataset(x, y)

    def fit(make: Callable[..., AdversarialTrainer], folder: str, *epochs: int) -> dict[str, Any]:
        for seed, last in enumerate(epochs):
            one = make(network(batch_norm=True, seed=seed), OBJECTIVES["free"], ema=0.5)
            loader = DataLoader(data, ROWS, sampler=DistributedSampler(data))
            history = one.fit(loader, last, folder=FOLDER / folder)
        return {"weights": whole(one.model.parameters()), "history": str(history), **one.state}

    results: dict[str, Any] = {}
    for name, make in (("ddp", trainer), ("fsdp", fsdp_trainer)):
        results[name, "once"] = fit(make, f"{name}-once", 2)
        results[name, "twice"] = fit(make, f"{name}-twice", 1, 2)
        one = make(network(), OBJECTIVES["pgd"])
        results[name, "accuracy"] = one.evaluate([(mine(x), mine(y))], ATTACK)
    results["accuracy"] = trainer(network(), OBJECTIVES["pgd"], parallel="none").evaluate([(mine(x), mine(y))], ATTACK)
    return results


@contextmanager
def running(folder: Path) -> Iterator[Callable[[str, Any], None]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    try:
        yield lambda name, value: torch.save(value, folder / f"{name}-{dist.get_rank()}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    with running(FOLDER) as save:
        for function in CHECKS:
            if len(sys.argv) == 2 or function.__name__ in sys.argv[2:]:
                save(function.__name__, function())
                torch._dynamo.reset()
                dist.barrier()
