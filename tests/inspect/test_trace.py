"""What tlparse and TORCH_LOGS show of a compilation, each in a process of its own, as they are read at its start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
torch.set_num_threads(1)

def step(x, w):
    x = x.detach().requires_grad_(True)
    torch.relu(x @ w).sum().backward()
    return x.detach() + x.grad.sign()

torch.compile(step, backend="gradprune")(torch.rand(2, 3), torch.rand(3, 4))
"""


def run(tmp_path: Path, **environment: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TORCH_LOGS_FORMAT": "short", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_tlparse_renders_the_graphs_and_the_report(tmp_path: Path):
    tlparse = shutil.which("tlparse", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if tlparse is None:
        pytest.skip("tlparse is not installed: pip install tlparse")
    assert "gradprune" not in run(tmp_path, TORCH_TRACE=str(tmp_path / "trace"))  # no log unless asked
    (log,) = (tmp_path / "trace").glob("*.log")
    rendered = tmp_path / "rendered"
    done = subprocess.run(
        [tlparse, str(log), "-o", str(rendered), "--no-browser"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {path.name.rsplit("_", 1)[0]: path for path in rendered.rglob("gradprune_*")}
    assert pages.keys() >= {"gradprune_captured", "gradprune_pruned", "gradprune_report", "gradprune_report_text"}
    assert "torch.ops.aten.mm.default" in pages["gradprune_captured"].read_text()
    assert pages["gradprune_report"].suffix == ".json"
    assert json.loads(pages["gradprune_report"].read_text())["form"] == "step"
    index = (rendered / "index.html").read_text()
    assert "gradprune_captured" in index
    assert "gradprune_report_text" in index


def test_torch_logs(tmp_path: Path):
    """A line per graph; with a plus, passes and graphs as well."""
    lines = [line for line in run(tmp_path, TORCH_LOGS="gradprune").splitlines() if "operators" in line]
    assert len(lines) == 1
    assert "step (step):" in lines[0]
    assert "-> " in lines[0]
    verbose = run(tmp_path, TORCH_LOGS="+gradprune")
    assert "After narrow-outputs (exact), which took" in verbose
    assert "def narrow_outputs(self" in verbose
    assert lines[0].partition("step (step):")[2].partition("kernels")[0] in verbose
