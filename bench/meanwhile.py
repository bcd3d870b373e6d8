"""The first attacks with the option ``background``: eager until another process has compiled the step."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from gradprune.compiler.apart import unfinished
from gradprune.torch_compat.inductor import fresh_cache

from .attack_step import attack
from .baselines import FROZEN, GRADPRUNE, Contender, choose, compiled_by_us
from .cases import Workload
from .store import Settings

PATIENCE = 40.0
"""Seconds to wait for the compilation, which has what the attacks leave of the processors."""

BEFORE, BEHIND = 5, 5
"""Attacks by frozen eager before the first, and with the compiled step behind the last."""


@dataclass(frozen=True)
class Meanwhile:
    """Seconds of attacks that follow each other, with empty disk caches.

    Attributes:
        eager: By frozen eager, the median.
        first: The first one in the background, Dynamo's part in it.
        others: The median of those that began before the step was compiled, but for the first; ``None`` if there is
            none.
        attacks: How many there were until then.
        until: Seconds from the beginning until then.
        compiled: With the compiled step, the median; ``None`` if it was not compiled within ``PATIENCE``.
    """

    eager: float
    first: float
    others: float | None
    attacks: int
    until: float
    compiled: float | None

    def __str__(self) -> str:
        others = "" if self.others is None else f", the others until then {self.others:.2f} s"
        then = f"not compiled after {self.until:.1f} s and {self.attacks} attacks."
        if self.compiled is not None:
            then = f"compiled after {self.until:.1f} s and {self.attacks} attacks, {self.compiled:.2f} s from then on."
        return (
            f"In the background (options={{'background': True}}): the first attack took {self.first:.2f} s{others} "
            f"({FROZEN} alone {self.eager:.2f} s); {then}"
        )


def measure_meanwhile(work: Workload, settings: Settings) -> Meanwhile:
    """Attack again and again until the step is compiled, and a few times more."""
    (eager,) = choose(["frozen"], settings.device)
    contender = eager.build(work, settings)
    before = [_seconds(contender, work, settings) for _ in range(BEFORE)]
    ours = compiled_by_us(GRADPRUNE, background=True)(work, settings)
    with fresh_cache():
        began = time.perf_counter()
        seconds = [_seconds(ours, work, settings)]
        while unfinished() and time.perf_counter() - began < PATIENCE:
            seconds.append(_seconds(ours, work, settings))
        until = time.perf_counter() - began
        behind = [] if unfinished() else [_seconds(ours, work, settings) for _ in range(BEHIND)]
    return Meanwhile(
        eager=statistics.median(before),
        first=seconds[0],
        others=statistics.median(seconds[1:]) if seconds[1:] else None,
        attacks=len(seconds),
        until=until,
        compiled=statistics.median(behind) if behind else None,
    )


def _seconds(contender: Contender, work: Workload, settings: Settings) -> float:
    started = time.perf_counter()
    attack(contender.step, work.x, work.y, settings.steps)
    return time.perf_counter() - started
