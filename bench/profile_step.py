"""Where the time of a step goes, kernel by kernel: ``python -m gradprune.bench.profile_step --output DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from gradprune.support.files import write_json

from .attack_step import attack
from .baselines import Baseline, choose
from .benchmark import add_settings, settings_of
from .cases import Workload, find_case
from .harness import configured, reason, synchronize
from .report import grid
from .store import Settings

STEPS = 5
"""Steps that are profiled, and timed without a profiler."""

SHOWN = 12
"""Kernels in the table that is printed; all are in the file."""


def kernels_of(baseline: Baseline, work: Workload, settings: Settings) -> dict[str, Any]:
    """Warm one candidate and profile an attack of ``STEPS`` steps.

    Returns:
        Seconds of a step without a profiler; for each kernel on a GPU (operator on a CPU) how often a step launches it
        and its seconds in a step; and their sum, ``busy``.
    """
    contender = baseline.build(work, settings)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device == "cuda")
    with contender.context():
        for _ in range(3):  # CUDA graphs are recorded at the second call of each kind
            attack(contender.step, work.x, work.y, 2)
        synchronize(settings.device)
        started = time.perf_counter()
        attack(contender.step, work.x, work.y, STEPS)
        synchronize(settings.device)
        seconds = (time.perf_counter() - started) / STEPS
        with profile(activities=activities) as profiler:
            attack(contender.step, work.x, work.y, STEPS)
            synchronize(settings.device)
    wanted = DeviceType.CUDA if settings.device == "cuda" else DeviceType.CPU
    launches: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        if event.device_type == wanted:
            one = launches[event.name]
            one[0] += 1 / STEPS
            own = event.self_cpu_time_total if wanted == DeviceType.CPU else event.time_range.elapsed_us()
            one[1] += own * 1e-6 / STEPS
    kernels = [
        {"name": name, "count": count, "seconds": total}
        for name, (count, total) in sorted(launches.items(), key=lambda item: -item[1][1])
    ]
    return {"seconds": seconds, "busy": sum(kernel["seconds"] for kernel in kernels), "kernels": kernels}


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``profile.json`` after each candidate, and print where most of their time goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="resnet18-224-b32", help="as in bench step (default: resnet18-224-b32)")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="as in bench step (default: all)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    add_settings(parser)
    arguments = parser.parse_args(argv)
    settings, failed = settings_of(arguments), False
    arguments.output.mkdir(parents=True, exist_ok=True)
    with configured(settings) as environment:
        work = find_case(arguments.case).prepare(settings.device, channels_last=settings.channels_last)
        found: dict[str, Any] = {}
        for baseline in choose(arguments.candidates, settings.device):
            try:
                one = found[baseline.name] = kernels_of(baseline, work, settings)
            except Exception as error:  # whatever a compiler may raise: the others are profiled all the same
                found[baseline.name], failed = {"failed": reason(error)}, True
                print(f"{baseline.name} failed: {reason(error)}", flush=True)
            else:
                print(f"{baseline.name}: {one['seconds'] * 1e3:.3f} ms a step, {one['busy'] * 1e3:.3f} ms of it in:")
                rows = [
                    [kernel["name"][:80].replace("|", "/"), f"{kernel['count']:.1f}", f"{kernel['seconds'] * 1e6:.1f}"]
                    for kernel in one["kernels"][:SHOWN]
                ]
                print(grid(["kernel", "a step", "us a step"], rows), flush=True)
            content = {"case": arguments.case, "settings": vars(settings), "environment": environment}
            write_json(arguments.output / "profile.json", {**content, "candidates": found})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
