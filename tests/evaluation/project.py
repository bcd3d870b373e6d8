"""What the tests of this folder have in common."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradprune.cli.main import main

SOURCE = """
import torch
from torch import nn


def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))


def broken():
    model = net()
    model[3].weight.data[0, 0] = float("nan")
    return model


def failing():
    raise ValueError("no weights today")


number = 3
module = net()
"""


@dataclass(frozen=True)
class Project:
    """A directory with a module and ``images.npz``."""

    folder: Path
    module: str

    def run(
        self,
        command: str,
        *arguments: str,
        model: str = "net",
        output: str = "out",
        batch: int = 8,
        compile: bool = False,
    ) -> int:
        """Run a command on them, eagerly unless ``compile``."""
        return main(
            [
                *(command, "--model", f"{self.module}:{model}", "--data", "images.npz"),
                *("--device", "cpu", "--batch-size", str(batch), "--output", output),
                *(() if compile else ("--no-compile",)),
                *arguments,
            ]
        )

    def records(self, output: str = "out") -> dict[str, dict[str, Any]]:
        """What evaluate wrote, by label, eps and steps."""
        found = {}
        for file in (self.folder / output / "results").glob("*/record.json"):
            record = json.loads(file.read_text())
            found[f"{record['label']} {record['eps']} {record['steps']}"] = record
        return found

    def examples(self, output: str = "out") -> dict[str, np.ndarray]:
        """The adversarial examples that attack wrote."""
        with np.load(self.folder / output / "adversarial.npz") as file:
            return {name: file[name] for name in file.files}

    def files(self, output: str = "out") -> list[str]:
        """All files below the output folder."""
        folder = self.folder / output
        return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
