"""A tiny model in a module of the current directory, and images that it reads as labelled, but for the first two."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from project import SOURCE, Project

from gradprune.evaluation import evaluation as work
from gradprune.evaluation import plots

counter = itertools.count()


@pytest.fixture(scope="session")
def arrays() -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(22, 1, 8, 8, generator=generator)
    scope: dict = {}
    exec(SOURCE, scope)
    with torch.no_grad():
        y = scope["net"]()(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return {"x": x.numpy(), "y": y.numpy()}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, np.ndarray]) -> Iterator[Project]:
    """The current directory for the test."""
    name = f"tiny_project_{next(counter)}"  # modules are imported once in a process
    (tmp_path / f"{name}.py").write_text(SOURCE)
    np.savez(tmp_path / "images.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    # Most of the time would go into drawing, see ``drawing_project``.
    monkeypatch.setattr(work, "save_examples", lambda path, examples: path.touch())
    monkeypatch.setattr(work, "save_accuracy", lambda path, records: path.touch() or True)
    path = list(sys.path)
    yield Project(tmp_path, name)
    sys.path[:] = path
    sys.modules.pop(name, None)


@pytest.fixture
def drawing_project(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The same, with real pictures."""
    monkeypatch.setattr(work, "save_examples", plots.save_examples)
    monkeypatch.setattr(work, "save_accuracy", plots.save_accuracy)
    return project
