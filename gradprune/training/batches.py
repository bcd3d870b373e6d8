"""Adversarial training, batch by batch: an inner attack without weight gradients, an outer step with them.

Each is compiled on its own. Both read the same weights, which are inputs of the compiled code, so that an update
recompiles neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gradprune.attacks import Attack, Runtime
from gradprune.errors import OptionError, TrainingError, unknown

from . import parallel
from .objectives import Free, Objective, Outcome
from .outer import BatchNorm, Outer, Statistics
from .parallel import Parallel, engine

Batch = tuple[Tensor, Tensor]

EpsSchedule = Callable[[int], float]
"""From the number of updates so far to what ``eps`` and ``step_size`` are multiplied by, from 0 to 1."""


@dataclass(frozen=True)
class LinearEps:
    """Lets eps grow from zero to its value during the first updates.

    Attributes:
        updates: How many.
    """

    updates: int

    def __call__(self, done: int) -> float:
        """The factor after so many updates."""
        return min(1.0, (done + 1) / max(self.updates, 1))


@dataclass
class Metrics:
    """What one iteration did.

    Attributes:
        loss: Outer loss, a scalar on the model's device; of Free the last replay's. The mean over all processes.
        correct: How many samples the model classified rightly in the outer step, int64, a scalar there: adversarial
            examples, or the inputs themselves with ``Plain``.
        samples: Of how many; these and ``correct`` are of this process.
    """

    loss: Tensor
    correct: Tensor
    samples: int


class BatchTrainer:
    """What ``AdversarialTrainer`` does with one batch, and between batches."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        *,
        scheduler: LRScheduler | None = None,
        eps_schedule: EpsSchedule | None = None,
        batch_norm: BatchNorm = "eval",
        autocast: torch.dtype | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        ema: float | None = None,
        compile: bool | Literal["attack"] = True,
        options: dict[str, Any] | None = None,
        parallel: Parallel = "auto",
        replica: nn.Module | None = None,
    ) -> None:
        if batch_norm not in get_args(BatchNorm):
            raise OptionError(unknown("batch_norm", batch_norm, get_args(BatchNorm)))
        if compile not in (True, False, "attack"):
            raise OptionError(f'compile has to be True, False or "attack", not {compile!r}')
        if parallel not in get_args(Parallel):
            raise OptionError(unknown("parallel", parallel, get_args(Parallel)))
        if batch_norm == "train" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise OptionError(
                'SyncBatchNorm would communicate at every step of an attack with batch_norm="train": use "eval", or '
                "BatchNorm"
            )
        if batch_norm == "separate" and not (objective.uses_clean and objective.attack is not None):
            raise OptionError(
                'batch_norm="separate" needs an objective that trains on clean inputs and adversarial examples: '
                "TRADES, MART, or PGDTraining(clean=0.5)"
            )
        if clip is not None and not clip > 0:
            raise OptionError(f"clip has to be positive or None, not {clip!r}")
        if accumulate < 1:
            raise OptionError(f"accumulate has to be at least 1, not {accumulate!r}")
        if accumulate > 1 and isinstance(objective, Free):
            raise OptionError("Free updates the weights at every replay: leave accumulate at 1")
        if ema is not None and not 0 <= ema < 1:
            raise OptionError(f"ema has to be at least 0 and below 1, or None, not {ema!r}")
        self._runtime = Runtime(
            compile=bool(compile),
            autocast=autocast,
            mode="keep" if batch_norm == "train" else "eval",
            options=options or {},
        )
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.weights:
            raise OptionError("no parameter of the model requires a gradient: there is nothing to train")
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if given.isdisjoint(map(id, self.weights)):
            raise OptionError("the optimizer has none of the model's parameters: make it from model.parameters()")
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.scheduler = scheduler
        self.accumulate = accumulate
        self.batch_norm = batch_norm
        self.clip = clip
        self.ema = ema
        self.autocast = autocast
        self.iterations = 0
        self.updates = 0
        self.largest_batch = 0
        self.state: dict[str, Tensor] = {}
        self.statistics = Statistics(model) if batch_norm == "separate" else None
        self._eps_schedule = eps_schedule
        device = self.weights[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=autocast is torch.float16)
        self._pending = 0
        outer = Outer(model, objective, autocast, self.statistics)
        self._devices = engine(model, outer, compile=compile is True, parallel=parallel, replica=replica)
        # Only now do all processes have the same weights.
        self.averages = [weight.detach().clone() for weight in model.parameters()] if ema is not None else []

    # --- One batch ----------------------------------------------------------------------------------------------------

    def step(self, x: Tensor, y: Tensor) -> Metrics:
        """Attack a batch and update the weights.

        Args:
            x: Clean inputs ``(N, ...)``, floating point, on the model's device, within the attack's ``bounds``.
            y: Labels ``(N,)``, int64.

        Raises:
            AttackError: The inputs are unfit, see ``Attack.__call__``. Nothing has changed.
            TrainingError: The loss is NaN or infinite, or no weight gets a gradient. Weights and buffers are those of
                before.
        """
        if not self._pending:
            self.optimizer.zero_grad()
        self.largest_batch = max(self.largest_batch, len(x))
        buffers = self._buffers()
        try:
            loss, logits = self.objective.iterate(self, x, y)
        except BaseException:
            self.optimizer.zero_grad()
            self._pending = 0
            _restore(buffers)  # batch norm has seen what made the loss NaN
            raise
        self.iterations += 1
        return Metrics(loss, (logits.argmax(1) == y).sum(), len(x))

    def scheduled(self, attack: Attack) -> Any:
        """``attack`` at the radius that is scheduled for now."""
        if self._eps_schedule is None:
            return attack
        factor = self._eps_schedule(self.updates)
        if not 0 <= factor <= 1:
            raise OptionError(f"eps_schedule has to return numbers from 0 to 1, not {factor!r}")
        lengths = {name: getattr(attack, name, None) for name in ("eps", "step_size")}
        return replace(attack, **{name: factor * value for name, value in lengths.items() if value is not None})

    def attack(self, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial examples of a batch, shaped like ``x``, at the radius scheduled for now."""
        with self.statistics.in_model() if self.statistics else nullcontext():
            return self.scheduled(attack)(self._devices.whole(), x, y, runtime=self._sized(self._runtime))  # type: ignore[no-any-return]

    def backward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        """Run the outer step: add the gradients of the loss to those of the weights, and of ``x_adv`` if it wants.

        Raises:
            TrainingError: The loss is NaN or infinite.
        """
        waits = self._pending + 1 < self.accumulate
        with self._devices.collecting() if waits else nullcontext():
            return self._backward(x, x_adv, y)

    def _backward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Outcome:
        loss, logits = self._devices.run(x, x_adv, y)
        self.scaler.scale(loss / self.accumulate).backward()
        loss = self._devices.mean(loss.detach())
        if not bool(loss.isfinite()):
            raise TrainingError(
                f"the loss is {float(loss)} after {self.updates} updates: lower the learning rate, set clip, or use "
                "bfloat16 in place of float16. The weights are those of before"
            )
        return loss, logits

    def gradients(self, x: Tensor, x_adv: Tensor, y: Tensor) -> list[Tensor | None]:
        """Gradients of the outer loss by ``layers()``; ``.grad`` and batch-norm statistics stay as they are."""
        before = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = None
        buffers = self._buffers()
        try:
            self._backward(x, x_adv, y)
            return [weight.grad for weight in self.layers()]
        finally:
            _restore(buffers)
            for weight, gradient in zip(self.weights, before, strict=True):
                weight.grad = gradient

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """All that a forward pass may write to, with a copy of each."""
        statistics = self.statistics.adversarial.values() if self.statistics else ()
        return [(buffer, buffer.clone()) for buffer in (*self.model.buffers(), *statistics)]

    def layers(self) -> list[nn.Parameter]:
        """The weights of layers, without biases and normalisation."""
        return [
            weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad and weight.ndim > 1 and name.rpartition(".")[2] == "weight"
        ]

    @contextmanager
    def perturbed(self, changes: Sequence[Tensor | None]) -> Iterator[None]:
        """Within the block, ``changes`` are added to ``layers()``; behind it these are what they were, exactly."""
        layers = self.layers()
        values = [
            w.detach() if change is None else w.detach() + change for w, change in zip(layers, changes, strict=True)
        ]
        with _holding(layers, values):
            yield

    def update(self) -> None:
        """Update the weights, once gradients of ``accumulate`` batches are there."""
        self._pending += 1
        if self._pending < self.accumulate:
            return
        self._pending = 0
        if all(weight.grad is None for weight in self.weights):
            raise TrainingError(
                "no weight has got a gradient: pass the model itself, not one that was compiled for attacks"
            )
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.weights, self.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self._devices.share_buffers()
        self.updates += 1
        if self.scheduler is not None and self.scaler.get_scale() >= scale:  # else it has skipped the update
            self.scheduler.step()
        if self.ema is not None:
            get_ema_multi_avg_fn(self.ema)(self.averages, list(self.model.parameters()), self.updates)

    # --- Between batches ----------------------------------------------------------------------------------------------

    @property
    def is_between_updates(self) -> bool:
        """Whether no gradients are accumulated, so that the state can be saved."""
        return self._pending == 0

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Within the block the model has the moving average of its weights, if there is one; yields what to run."""
        with ExitStack() as stack:
            if self.averages:
                stack.enter_context(_holding(list(self.model.parameters()), self.averages))
            yield self._devices.whole()

    def _sized(self, runtime: Runtime) -> Runtime:
        """``runtime`` for pieces of the largest batch so far: results must not depend on what else was attacked."""
        return replace(runtime, batch_size=self.largest_batch or None)

    def evaluate(self, loader: Iterable[Any], attack: Attack | None = None) -> tuple[float, float | None]:
        """Clean and robust accuracy, of the moving average of the weights if there is one.

        The model is in evaluation mode, and is left as it was.

        Args:
            loader: Returns inputs and labels, as that of ``fit``; with several processes, each its share.
            attack: ``None`` for clean accuracy alone.

        Returns:
            Shares from 0 to 1; the second is ``None`` without an attack.
        """
        runtime = self._sized(replace(self._runtime, mode="eval"))
        counts = torch.zeros(3, dtype=torch.int64)
        with self.averaged() as model:
            for x, y in checked_batches(loader, self.device):
                with runtime.attack(model, x) as query:
                    counts[0] += len(x)
                    counts[1] += (query.logits(x).argmax(1) == y).sum().cpu()
                    if attack is not None:
                        x_adv = attack(model, x, y, runtime=runtime)
                        counts[2] += (query.logits(x_adv).argmax(1) == y).sum().cpu()
        samples, clean, robust = parallel.sum_counts(counts).tolist()
        if not samples:
            raise TrainingError("the validation data has no batches")
        return clean / samples, None if attack is None else robust / samples

    # --- State --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.weights[0].device

    def settings(self) -> dict[str, Any]:
        """Everything that determines what a step does, apart from weights and data."""
        return {
            "objective": self.objective,
            "optimizer": (type(self.optimizer).__name__, self.optimizer.defaults),
            "eps_schedule": self._eps_schedule,
            "batch_norm": self.batch_norm,
            "autocast": self.autocast,
            "clip": self.clip,
            "accumulate": self.accumulate,
            "ema": self.ema,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, apart from random states; between updates only.

        Raises:
            TrainingError: Gradients of some batches wait for an update.
        """
        if not self.is_between_updates:
            raise TrainingError(f"{self._pending} of {self.accumulate} batches are accumulated: save behind the update")
        return {
            "model": parallel.model_state(self.model),
            "optimizer": parallel.optimizer_state(self.optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": parallel.averages_state(self.model, self.averages),
            "statistics": {} if self.statistics is None else self.statistics.adversarial,
            "state": parallel.gather({name: value.cpu() for name, value in self.state.items()}),
            "iterations": self.iterations,
            "updates": self.updates,
            "largest_batch": self.largest_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put everything back where it was when ``state_dict`` was called.

        Raises:
            TrainingError: The state is of another model.
        """
        try:
            parallel.load_model_state(self.model, state["model"])
            parallel.load_optimizer_state(self.optimizer, state["optimizer"])
            parallel.load_averages_state(self.model, self.averages, state["averages"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(f"the checkpoint is of another model: {str(error).splitlines()[0]}") from error
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        statistics = {} if self.statistics is None else self.statistics.adversarial
        with torch.no_grad():
            for name, value in statistics.items():
                value.copy_(state["statistics"][name])
        own: dict[str, Tensor] = parallel.scatter(state["state"])
        self.state = {name: value.to(self.device) for name, value in own.items()}
        self.iterations, self.updates = state["iterations"], state["updates"]
        self.largest_batch = state["largest_batch"]


def _restore(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


@contextmanager
def _holding(weights: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Within the block ``weights`` hold ``values``."""
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def checked_batches(loader: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """The batches of a loader, on ``device``.

    Raises:
        TrainingError: It returns something else than inputs and labels.
    """
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(v, Tensor) for v in batch)):
            raise TrainingError(
                f"the loader has to return inputs and labels, two tensors, and returns {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            )
        x, y = batch
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
