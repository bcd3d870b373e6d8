"""What all benchmarks measure with: candidates in turn, round after round, in time and memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gradprune.support.environment import environment

from .attack_step import Step, attack
from .baselines import Contender
from .cases import Workload
from .store import Settings

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        rounds: Attacks timed per candidate, at most.
        seconds: Seconds of timing per case after which no further round begins; three rounds are run in any case.
        patience: Seconds that a candidate has to compile and to be checked.
        lock: Shared with processes that run at the same time, see ``turns.side_by_side``.
    """

    rounds: int = 9
    seconds: float = 120.0
    patience: float | None = None
    lock: Path | None = None


class CheckFailed(Exception):
    """A candidate does not compute the step it should."""


@contextlib.contextmanager
def configured(settings: Settings) -> Iterator[dict[str, Any]]:
    """Let torch run as ``settings`` say, and yield the environment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every profile writes two lines to standard error
    here = environment()
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = settings.tf32
        here.update(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    try:
        yield here
    finally:
        torch.set_num_threads(threads)


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def load_average() -> float | None:
    """Load average of the machine over a minute, where the system tells it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def start_compiler(device: str = "cpu") -> None:
    """Compile something trivial.

    What Inductor does once per process and once per machine, such as its imports and the headers it precompiles, would
    otherwise count against the first candidate that compiles.
    """
    torch.compile(lambda tensor: (tensor + 1).relu())(torch.ones(64, device=device))


def time_rounds(
    contenders: Sequence[Contender], work: Workload, steps: int, budget: Budget, finished: Callable[[], object]
) -> dict[str, list[float]]:
    """Run the attacks of all contenders in turn, round after round, so that a slow minute hits all alike.

    Args:
        contenders: Already warm.
        work: What they attack.
        steps: Steps of an attack.
        budget: When to stop.
        finished: Called after every attack.

    Returns:
        By name, for every round, the seconds of the attack divided by its steps, so that what a contender does once per
        attack is part of the figure.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    began = time.perf_counter()
    for turn in range(budget.rounds):
        if turn >= MIN_ROUNDS and (time.perf_counter() - began) * (turn + 1) / turn > budget.seconds:
            break
        # The start rotates: nobody always runs in the cache and the heat that the same other one left.
        first = turn % max(1, len(contenders))
        for contender in [*contenders[first:], *contenders[:first]]:
            contender.clear_gradients()
            with contender.context():
                synchronize(work.x.device)
                started = time.perf_counter()
                attack(contender.step, work.x, work.y, steps)
                synchronize(work.x.device)
                seconds[contender.name].append((time.perf_counter() - started) / steps)
            finished()
    return seconds


def peak_bytes(step: Step, x: Tensor, y: Tensor) -> int:
    """Most bytes that a step in the middle of an attack holds allocated at once beyond what was allocated before it."""
    x_adv, gradient = step(x.clone(), x, y)
    del gradient
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(x_adv, x, y)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step(x_adv, x, y)
    recorded: Any = profiler.profiler
    held = peak = 0
    events = (event for event in recorded.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result  # kept until here so that its release is not among the events
    return peak


def reason(error: Exception) -> str:
    """One line about why a candidate cannot be measured."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return first if isinstance(error, CheckFailed) else f"{type(error).__name__}: {first}"
