"""``repro.py`` runs by itself and agrees; where the graphs differ, it says so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import interpreted, relative_error
from steps import STEPS, compiled, folder_of
from torch import Tensor


def dumped(name: str, tmp_path: Path, **options: Any) -> Path:
    with interpreted():
        return folder_of(compiled(STEPS[name](), tmp_path, **options))


def module(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("repro", folder / "repro.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("name", STEPS)
def test_it_runs_and_agrees(name: str, tmp_path: Path):
    command = [sys.executable, str(dumped(name, tmp_path) / "repro.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees: output 0" in done.stdout
    assert "DIFFERS" not in done.stdout
    (largest,) = (line for line in done.stdout.splitlines() if line.startswith("largest difference"))
    assert float(largest.split()[-1]) < 1e-3


@pytest.mark.parametrize("name", STEPS)
def test_with_the_saved_inputs_it_returns_what_the_step_returns(name: str, tmp_path: Path):
    """Both of its graphs, against the step itself run eagerly."""
    repro = module(dumped(name, tmp_path, dump_inputs=True))
    step, args = STEPS[name]()
    expected = step(*args)
    for graph in (repro.captured, repro.pruned):
        outputs, _ = repro.run(graph, repro.saved())
        tensors = [value for value in outputs if isinstance(value, Tensor) and value.shape == args[0].shape]
        for reference in expected:
            assert min(relative_error(value, reference) for value in tensors) < 1e-4


def test_inputs_that_are_made_up_look_like_those_of_the_step(tmp_path: Path):
    repro = module(dumped("tokens", tmp_path))
    inputs = repro.made_up(0)
    for (name, _, *spec), value in zip(repro.INPUTS, inputs, strict=True):
        shape, strides, dtype, *_ = spec
        assert (list(value.shape), list(value.stride()), str(value.dtype)) == (shape, strides, dtype), name
        if dtype == "torch.int64":
            assert 0 <= int(value.min()) <= int(value.max()) < 11
    assert {role for _, role, *_ in repro.INPUTS} == {"weight", "perturbation", "data"}
    assert all(torch.equal(a, b) for a, b in zip(inputs, repro.made_up(0), strict=True))


def test_a_difference_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    folder = dumped("convolutional", tmp_path)
    script = folder / "repro.py"
    captured, pruned, rest = script.read_text(encoding="utf-8").partition("def pruned(")
    assert "aten.sign.default(" in rest
    script.write_text(captured + pruned + rest.replace("aten.sign.default(", "aten.neg.default(", 1), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["repro.py"])
    assert module(folder).main() == 1
    assert "DIFFERS: output 0" in capsys.readouterr().out


def test_saved_inputs_have_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = dumped("convolutional", tmp_path)
    assert not (folder / "inputs.pt").exists()
    monkeypatch.setattr(sys, "argv", ["repro.py", "--saved"])
    with pytest.raises(SystemExit, match="'dump_inputs': True"):
        module(folder).main()
