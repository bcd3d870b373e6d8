"""Small targets to emit, and what it takes to emit them here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gradprune.emit.device import build
from gradprune.emit.record import Request
from gradprune.emit.run import CHECKED

TARGETS = """
import torch
import torch.nn.functional as F
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.last = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.a(x))), 2)
        x = F.relu(self.b(x))
        return self.last(F.max_pool2d(x, 2).flatten(1))


def tiny():
    return Tiny().eval()


class Mixed(nn.Module):
    # One of each: batch norm, depthwise convolution, SiLU, GELU, group norm, clamps, average pooling.
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.batch = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.group = nn.GroupNorm(4, 12)
        self.last = nn.Linear(12, 10)

    def forward(self, x):
        x = F.silu(self.batch(self.a(x)))
        x = F.hardtanh(self.group(self.wide(x + F.gelu(self.depthwise(x)))))
        return self.last(F.avg_pool2d(x, 2).mean((2, 3)))


class Overlapping(nn.Module):
    # Pooling windows that overlap, as at the beginning of a ResNet.
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 3, 2, 1)
        return self.last((x + F.relu(self.b(x))).mean((2, 3)))


class Mnist(nn.Module):
    pretrained_cfg = {"input_size": (1, 28, 28)}

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 32, 5, padding=2)
        self.b = nn.Conv2d(32, 64, 5, padding=2)
        self.c = nn.Linear(64 * 7 * 7, 1024)
        self.last = nn.Linear(1024, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.max_pool2d(F.relu(self.b(x)), 2)
        return self.last(F.relu(self.c(x.flatten(1))))


def vit():
    from gradprune.workloads.vision import let_torchvision_import

    let_torchvision_import()
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)


def double():
    model = nn.Conv2d(3, 4, 3, dtype=torch.float64)

    def attack_step(x):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        return x.detach() + gradient.sign()

    return attack_step, (torch.rand(2, 3, 8, 8, dtype=torch.float64),)


def reads():
    def attack_step(x):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((x * x).sum() * x.sum().item(), x)
        return gradient

    return attack_step, (torch.rand(2, 3),)
"""


def skip_unless_possible() -> None:
    """Skip what cannot be done without Triton, or with a torch that is not known."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed", allow_module_level=True)
    if not torch.__version__.startswith(CHECKED):
        pytest.skip(f"emit knows torch {', '.join(CHECKED)}, not {torch.__version__}", allow_module_level=True)


def write_targets(folder: Path) -> None:
    """Put ``targets.py`` into a folder."""
    (folder / "targets.py").write_text(TARGETS, encoding="utf-8")


SEVERAL = """
import ctypes, json, sys

library, requests = sys.argv[1:]
ctypes.CDLL(library)
from pathlib import Path

import torch

from gradprune.emit.emission import emit_here
from gradprune.emit.device import build
from gradprune.emit.record import Request

for name, fields in json.loads(requests).items():
    torch._dynamo.reset()
    folder = Path(name)
    folder.mkdir()
    try:
        result = emit_here(Request(**{**fields, "disable": ()}), folder)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    (folder / "emission.json").write_text(json.dumps(result))
"""


def request(**options: Any) -> Request:
    """To emit the tiny network of ``targets.py`` in the current folder."""
    settings = {"target": "targets:tiny", "gpu": "sm_75", "batch": 4, "image_size": 16, "binaries": False}
    return Request(**{**settings, **options})


def emit_several(folder: Path, **requests: Request) -> dict[str, dict[str, Any]]:
    """Emit in one process, for to start one takes longer than to emit a tiny network; each in a folder of its name."""
    fields = json.dumps({name: dataclasses.asdict(one) for name, one in requests.items()})
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-c", SEVERAL, str(build()), fields]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / name / "emission.json").read_text()) for name in requests}


def part(emitted: dict[str, Any], name: str) -> dict[str, Any]:
    """One part by name."""
    (found,) = [one for one in emitted["parts"] if one["name"] == name]
    return found


def names(calls: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """Names of the calls of a kind, in order."""
    return [call["name"] for call in calls if call["kind"] == kind]
