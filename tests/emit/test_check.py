"""What is generated for a GPU computes what eager does, and a check of that finds what is broken on purpose."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from emitting import request, skip_unless_possible, write_targets

from gradprune.cli.main import main
from gradprune.emit.device import build
from gradprune.emit.record import Request

skip_unless_possible()

from gradprune.emit.check import CheckOutcome, StepOutcome  # noqa: E402

Checks = dict[str, tuple[Request, dict[str, Any]]]

NETWORKS: Checks = {
    "tiny": (request(), {}),
    "mixed": (request(target="targets:Mixed", batch=2), {}),
    "overlapping": (request(target="targets:Overlapping", batch=2), {"steps": 1}),
    "mnist": (request(target="targets:Mnist", batch=2, image_size=None), {"steps": 1}),
    "half": (request(autocast="float16"), {"steps": 1}),
    "model": (request(form="model", gpu="sm_80"), {"steps": 1}),
    "assumed": (request(target="targets:Mixed", batch=2, assume_faster=True), {}),
    "as launched": (request(image_size=16, batch=2), {"real_blocks": True, "races": True, "steps": 1}),
}
BROKEN: Checks = {
    "maximum": (request(), {}),
    "mask": (request(), {}),
    "assertion": (request(target="targets:Overlapping", batch=2), {}),
    "bounds": (request(), {}),
    "strides": (request(form="model"), {}),
}
"""What is broken in each is in ``checking``."""
LARGE: Checks = {
    "resnet18": (Request("timm:resnet18", "sm_75", "step", 2, 32), {"steps": 1}),
    "resnet18 model": (Request("timm:resnet18", "sm_75", "model", 2, 32), {"steps": 1}),
    "mobilenetv2": (Request("timm:mobilenetv2_100", "sm_75", "step", 2, 32), {"steps": 1}),
    "convnext_atto": (Request("timm:convnext_atto", "sm_75", "step", 2, 32), {"steps": 1}),
    "vit_tiny": (request(target="targets:vit", batch=2, image_size=32), {"steps": 1}),
    "vit_tiny assumed": (request(target="targets:vit", batch=2, image_size=32, assume_faster=True), {"steps": 1}),
    "resnet18 assumed": (Request("timm:resnet18", "sm_80", "step", 2, 32, assume_faster=True), {"steps": 1}),
}


def run(folder: Path, checks: Checks) -> Mapping[str, dict[str, Any]]:
    """Carry out checks in one process."""
    write_targets(folder)
    fields = {name: (dataclasses.asdict(asked), options) for name, (asked, options) in checks.items()}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("checking.py")), str(build()), json.dumps(fields)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    broken = {name: (asked, {"break": name, "steps": 1}) for name, (asked, _) in BROKEN.items()}
    refused = {"step": (request(target="targets:double"), {})}
    return run(tmp_path_factory.mktemp("checks"), {**NETWORKS, **broken, **refused})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    return run(tmp_path_factory.mktemp("checks"), LARGE)


def assert_passes(outcome: Mapping[str, Any], steps: int) -> None:
    assert "error" not in outcome, outcome["error"]
    assert outcome["wrong"] == []
    assert len(outcome["steps"]) == steps
    for step in outcome["steps"]:
        assert 0 < step["generated_median"] < 1e-2
        assert step["usable"] > 0
    assert outcome["counts"]["launches"] > 4
    assert "ptxas" in outcome["not_shown"]


@pytest.mark.parametrize("name", NETWORKS)
def test_generated_code_computes_what_eager_does(outcomes: Mapping[str, dict[str, Any]], name: str):
    assert_passes(outcomes[name], NETWORKS[name][1].get("steps", 2))


def test_values_of_the_prologue_are_used_again(outcomes: Mapping[str, dict[str, Any]]):
    """The second step launches less than the first; what is broken in ``mask`` launches as much in its one step."""
    assert outcomes["tiny"]["counts"]["launches"] < 2 * outcomes["mask"]["counts"]["launches"]


def test_blocks_of_a_gpu_make_more_programs(outcomes: Mapping[str, dict[str, Any]]):
    assert outcomes["as launched"]["counts"]["programs"] > 2 * outcomes["as launched"]["counts"]["launches"]
    assert outcomes["tiny"]["counts"]["programs"] == outcomes["tiny"]["counts"]["launches"]


@pytest.mark.parametrize("name", ["maximum", "mask"])
def test_wrong_arithmetic_is_found(outcomes: Mapping[str, dict[str, Any]], name: str):
    assert any("the gradient is" in reason for reason in outcomes[name]["wrong"])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("assertion", "device_assert"),
        ("bounds", "out of bounds"),
        ("strides", "and the code was generated for"),
    ],
)
def test_what_must_not_be_is_found(outcomes: Mapping[str, dict[str, Any]], name: str, error: str):
    assert outcomes[name]["error"].startswith("KernelError: ")
    assert error in outcomes[name]["error"]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", LARGE)
def test_generated_code_of_large_networks(large: Mapping[str, dict[str, Any]], name: str):
    assert_passes(large[name], 1)


def outcome(autocast: str | None = None, **found: float) -> list[str]:
    values = {"generated": 1e-7, "eager": 1e-7, "generated_median": 1e-7, "eager_median": 1e-7, "loss": 0.0}
    step = StepOutcome(**{**values, "differing": 0, "usable": 10, **found})  # type: ignore[arg-type]
    checked = CheckOutcome(request(autocast=autocast), [step], {})
    checked.judge()
    return checked.wrong


def test_what_passes():
    assert outcome() == []
    assert outcome(generated=1.2e-6) == []
    assert len(outcome(generated=1.4e-6)) == 1
    assert len(outcome(generated=float("nan"))) == 1
    assert len(outcome(differing=1)) == 1
    assert outcome("float16", generated=1.0, differing=3) == []
    assert len(outcome("float16", generated_median=2.1e-7)) == 1


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write_targets(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["emit", "targets:tiny", "--check", "--image-size", "16", "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\npasses.\nNot shown by this: what ptxas makes of a kernel" in printed


def test_a_step_is_refused(outcomes: Mapping[str, dict[str, Any]]):
    assert outcomes["step"]["error"].startswith("OptionError: targets:double is a step of its own")
