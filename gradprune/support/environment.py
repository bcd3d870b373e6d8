"""What the figures depend on and the reader cannot see: versions, processor, threads, BLAS."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """The environment of this process, ready for JSON."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "gradprune": _package_version("gradprune"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "blas": blas.group(1) if blas else "unknown",
        "onednn": onednn_version(),
    }


def cpu_name() -> str:
    """The processor as its maker calls it, or the architecture where the system does not say."""
    try:
        listing = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        listing = ""
    found = re.search(r"^model name\s*:\s*(.+)$", listing, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def onednn_version() -> str:
    """The version of oneDNN that torch was built with."""
    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
