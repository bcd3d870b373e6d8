"""What is here, and does a compiled step work on it at all? ``python -m gradprune.bench.smoke --output DIR``."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gradprune
from gradprune.support.environment import environment
from gradprune.support.files import write_json

from .attack_step import pgd_step
from .cases import RESNET8
from .harness import synchronize
from .timing import relative_errors

PACKAGES = ("numpy", "triton", "torchvision", "timm", "pytest", "pytest-xdist", "matplotlib", "tqdm", "jax")
"""What a day with a GPU has a use for."""

TOLERANCE = 0.02
"""Allowed error of the gradient in the Euclidean norm against eager; one ReLU that tips over costs 0.3 %."""

MODES = None, "reduce-overhead"


def versions(device: str) -> dict[str, Any]:
    """Versions of all that figures depend on, and what the device is."""
    found: dict[str, Any] = {**environment(), "packages": {name: _version(name) for name in PACKAGES}}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """What the driver's own tool says of version, clocks and power; ``None`` where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    done = subprocess.run([tool, asked, "--format=csv"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()


def smoke(device: str, mode: str | None) -> dict[str, Any]:
    """Compile the step of a small ResNet, take three, and compare each with eager.

    Returns:
        Seconds of the first call, the largest error, the kernels, and why it failed, ``None`` if it did not.
    """
    work = RESNET8.prepare(device)
    eager = pgd_step(work.model, work.case)
    step = gradprune.compile(pgd_step(work.model, work.case), mode=mode)
    x_adv, seconds, worst = (work.x + 0.01).clamp(0, 1), [], 0.0
    for _ in range(3):
        _, exact = eager(x_adv, work.x, work.y)
        started = time.perf_counter()
        moved, gradient = step(x_adv, work.x, work.y)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        worst = max(worst, relative_errors(gradient, exact.double())[1])
        x_adv = moved
    reports = [report.to_dict() for report in gradprune.reports(step)]
    reasons = [report["fallback"] for report in reports if report["fallback"]]
    if not worst <= TOLERANCE:
        reasons.append(f"the gradient is off by {worst:.1%}")
    kernels = sum(kernel["count"] for report in reports for kernel in report["kernels"])
    return {
        "mode": mode,
        "seconds": seconds,
        "error": worst,
        "graphs": len(reports),
        "kernels": kernels,
        "failed": "; ".join(reasons) or None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``smoke.json``: the versions before anything is compiled, then the outcome of each mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    path = arguments.output / "smoke.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = versions(arguments.device)
    write_json(path, found)
    outcomes = []
    for mode in MODES:
        try:
            outcomes.append(smoke(arguments.device, mode))
        except Exception as error:  # whatever a compiler may raise: the other mode is tried all the same
            outcomes.append({"mode": mode, "failed": f"{type(error).__name__}: {error}"})
        write_json(path, {**found, "smoke": outcomes})
        print(outcomes[-1], flush=True)
    return int(any(outcome["failed"] for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
