"""Which of two kernels is faster on this machine: measured once, remembered, and the same answer ever after.

What is the fastest kernel for a shape depends on the processor, the number of threads and the BLAS that torch was built
with; on a GPU, on its libraries and on how they may round. Asked for the first time, both are timed; the answer is kept
in Inductor's cache folder, so that later processes compile the same graph, round the same way and find it in the cache.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch

from gradprune.support.environment import cpu_name, onednn_version
from gradprune.torch_compat import background
from gradprune.torch_compat.aot import without_modes
from gradprune.torch_compat.inductor import inductor_cache_dir

MARGIN = 1.1
"""Ratio of times from which on the candidate is said to be faster: it has to win beyond noise."""

TRIES = 7

TOGETHER = 10
"""Calls that are timed together on a GPU, which does the first of them while it is told of the others."""

CPU = torch.device("cpu")

_answers: dict[str, dict[str, bool]] = {}
"""By device, since each has a file of its own."""

_unmeasured: ContextVar[tuple[list[str], bool] | None] = ContextVar("unmeasured", default=None)


@contextmanager
def not_measuring(*, assumed: bool = False) -> Iterator[list[str]]:
    """Within it nothing is timed.

    Args:
        assumed: The answer to what has not been measured before, and to all questions about a GPU, which need not be
            there.

    Yields:
        What would have been measured, filled in on the way.
    """
    asked: list[str] = []
    token = _unmeasured.set((asked, assumed))
    try:
        yield asked
    finally:
        _unmeasured.reset(token)


def is_faster(
    what: str, make: Callable[[], tuple[Callable[[], object], Callable[[], object]]], device: torch.device = CPU
) -> bool:
    """Whether a candidate kernel beats a baseline by ``MARGIN`` on this machine.

    Args:
        what: Names the two kernels and all that their speed depends on, apart from the machine and, on a GPU, torch's
            settings of precision.
        make: Makes candidate and baseline, on tensors of their own. Called only if the answer is not known.
        device: Where they run.
    """
    unmeasured = _unmeasured.get()
    if unmeasured is not None and device.type != "cpu":
        unmeasured[0].append(what)
        return unmeasured[1]
    if device.type == "cpu":
        key = f"{what}, {torch.get_num_threads()} threads"
    else:
        flags = torch.backends.cudnn, torch.backends.cuda.matmul
        key = f"{what}, TF32 {[flag.allow_tf32 for flag in flags]}"
    answers = _answers.setdefault(str(device), {})
    if key not in answers:
        answers.update(_load(device))
    if key not in answers and unmeasured is not None:
        unmeasured[0].append(what)
        return unmeasured[1]
    if key not in answers:
        background.wait()  # a compiler would slow one of the two down
        with without_modes(), torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            candidate, baseline = make()
            ratio = _shortest(baseline, device) / _shortest(candidate, device)
        answers.update(_load(device))  # what other processes have found out meanwhile
        answers[key] = ratio > MARGIN
        _save(answers, device)
    return answers[key]


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    run()
    times = []
    for _ in range(TRIES):
        if device.type == "cpu":
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
            continue
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(TOGETHER):
            run()
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) / TOGETHER)
    return min(times)


def _file(device: torch.device = CPU) -> Path:
    machine = f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}"
    libraries = f"oneDNN {onednn_version()}"
    if device.type != "cpu":
        machine = torch.cuda.get_device_name(device)
        libraries = f"CUDA {torch.version.cuda} cuDNN {torch.backends.cudnn.version()}"
    machine = f"{machine} torch {torch.__version__} {libraries}"
    return Path(inductor_cache_dir()) / "gradprune" / f"kernels-{re.sub(r'[^A-Za-z0-9.]+', '-', machine)}.json"


def _load(device: torch.device) -> dict[str, bool]:
    try:
        answers = json.loads(_file(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): bool(value) for key, value in answers.items()} if isinstance(answers, dict) else {}


def _save(answers: dict[str, bool], device: torch.device) -> None:
    with suppress(OSError):  # a cache that cannot be written is no reason to fail
        file = _file(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(answers, stream, indent=0, sort_keys=True)
        os.replace(name, file)
