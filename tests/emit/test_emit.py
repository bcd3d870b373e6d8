"""``gradprune emit``: what is generated for a GPU that is not there, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emitting import emit_several, names, part, request, skip_unless_possible, write_targets

from gradprune.cli.main import main
from gradprune.emit import run
from gradprune.emit.record import Request
from gradprune.errors import GradpruneError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with targets in it."""
    skip_unless_possible()
    path = tmp_path_factory.mktemp("targets")
    write_targets(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the command prints; ``compiled`` is the folder that it writes."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gradprune", "emit", "targets:tiny", "--batch", "4", "--image-size", "16"),
            *("--against", "frozen-compile", "--output", "compiled"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(printed: str, folder: Path) -> dict[str, Any]:
    emitted: dict[str, Any] = json.loads((folder / "compiled/emission.json").read_text())
    return emitted


@pytest.fixture(scope="module")
def several(folder: Path) -> dict[str, dict[str, Any]]:
    return emit_several(
        folder,
        again=request(),
        half=request(gpu="sm_80", autocast="float16"),
        model=request(form="model"),
        double=request(target="targets:double"),
        reads=request(target="targets:reads"),
        autocast_step=request(target="targets:double", autocast="float16"),
        unknown=request(target="targets:nothing"),
    )


def test_step_is_divided_and_convolutions_are_of_a_library(compiled: dict[str, Any]):
    assert [one["name"] for one in compiled["parts"]] == ["prologue", "step"]
    assert compiled["fallback"] is None
    assert compiled["hoisted_bytes"] > 0
    step = part(compiled, "step")
    assert names(step["calls"], "external").count("convolution") == 4
    assert {call["name"] for call in step["calls"] if call["kind"] == "external"} <= {"convolution", "mm", "addmm"}
    assert {call["kind"] for call in part(compiled, "prologue")["calls"]} == {"generated"}


def test_convolutions_are_channels_last(compiled: dict[str, Any], folder: Path):
    code = (folder / "compiled/step.py").read_text()
    assert "assert_size_stride(buf1, (4, 8, 16, 16), (2048, 1, 128, 8)" in code
    assert "tl.atomic" not in code


def test_backward_reads_masks_of_a_byte_and_no_activation(compiled: dict[str, Any]):
    calls = part(compiled, "step")["calls"]
    (loss,) = (position for position, call in enumerate(calls) if "log_softmax" in call["name"])
    kept = {name: size for call in calls[:loss] for name, size in call["writes"].items()}
    read = []
    for call in calls[loss + 1 :]:
        read += [kept.pop(name) for name in call["reads"] if name in kept]
        for name in call["writes"]:  # memory that is used again
            kept.pop(name, None)
    # Of each of two activations, on a quarter of its elements: what was pooled and where it came from.
    pooled = 4 * 8 * 8 * 8, 4 * 16 * 4 * 4
    assert sorted(read) == sorted(2 * pooled)


def test_edges_point_backwards_and_carry_bytes(compiled: dict[str, Any]):
    for position, call in enumerate(part(compiled, "step")["calls"]):
        for source, moved in call["sources"].items():
            assert int(source) < position
            assert 0 < moved <= sum(call["reads"].values())


def test_every_kernel_compiles(compiled: dict[str, Any], folder: Path):
    launched = {(one["name"], call["name"]) for one in compiled["parts"] for call in one["calls"]}
    assert {(kernel["part"], kernel["name"]) for kernel in compiled["kernels"]} <= launched
    assert len(compiled["kernels"]) == len({pair for pair in launched if pair[1].startswith("triton_")})
    for kernel in compiled["kernels"]:
        for number, config in enumerate(kernel["configs"]):
            stem = folder / "compiled/kernels" / kernel["part"] / f"{kernel['name']}.{number}"
            assert Path(f"{stem}.cubin").read_bytes()[:4] == b"\x7fELF"
            assert ".target sm_75" in Path(f"{stem}.ptx").read_text()
            assert 0 < config["registers"] <= 255
            assert config["stack_bytes"] <= 16
            assert config["shared_bytes"] <= 64 << 10
            assert 0 < config["occupancy"] <= 1


def test_totals_leave_out_the_prologue_and_stand_beside_frozen_compile(compiled: dict[str, Any]):
    ours, theirs = compiled["totals"]["gradprune"], compiled["totals"]["frozen-compile"]
    calls = part(compiled, "step")["calls"]
    assert ours["launches"] == len(names(calls, "generated"))
    moved = [sum(call["reads"].values()) + sum(call["writes"].values()) for call in calls]
    assert ours["generated_bytes"] + ours["external_bytes"] == sum(moved)
    assert ours["external_flops"] == theirs["external_flops"]
    assert ours["generated_bytes"] < theirs["generated_bytes"]
    assert ours["peak_bytes"] < theirs["peak_bytes"]
    assert compiled["label"] == "static estimate"
    assert json.loads(json.dumps(compiled)) == compiled


def test_same_source_on_repetition(compiled: dict[str, Any], several: dict[str, dict[str, Any]], folder: Path):
    for name in ("prologue.py", "step.py"):
        assert (folder / "again" / name).read_text() == (folder / "compiled" / name).read_text()


def test_autocast_and_another_gpu(compiled: dict[str, Any], several: dict[str, dict[str, Any]], folder: Path):
    assert "cc=80" in (folder / "half/step.py").read_text()
    convolutions = [
        [call for call in part(emitted, "step")["calls"] if call["name"] == "convolution"]
        for emitted in (compiled, several["half"])
    ]
    (_, full, *_), (_, half, *_) = convolutions
    assert (full["rate"], half["rate"]) == ("fp32", "fp16")
    assert sum(full["writes"].values()) == 2 * sum(half["writes"].values())
    assert half["flops"] == full["flops"]


def test_model_form_saves_what_backward_was_compiled_for(several: dict[str, dict[str, Any]], folder: Path):
    assert [one["name"] for one in several["model"]["parts"]] == ["prologue", "forward", "backward"]
    forward, backward = ((folder / "model" / f"{name}.py").read_text() for name in ("forward", "backward"))
    handed = set(re.findall(r"empty_strided_cuda\((\(4, \d+, \d+, \d+\)), (\(.*?\)), torch.bool", forward))
    taken = set(re.findall(r"= rand_strided\((\(4, \d+, \d+, \d+\)), (\(.*?\)), .*torch.bool", backward))
    assert taken
    assert taken <= handed
    assert all(stride.split(", ")[1] == "1" for _, stride in taken)  # channels-last


def test_float64_is_not_channels_last(several: dict[str, dict[str, Any]], folder: Path):
    assert "(2, 4, 6, 6), (144, 36, 6, 1)" in (folder / "double/step.py").read_text()


def test_command_prints_the_table(printed: str):
    assert "static estimate: generated and compiled, not run" in printed
    assert "for sm_75 (Tesla T4)" in printed
    assert len(re.findall(r"^ +\d+  convolution ", printed, re.MULTILINE)) == 4
    assert re.search(r"prologue, once per attack: \d+ calls", printed)
    assert re.search(r"configurations of \d+ kernels, prologue included, compile: at most \d+ registers", printed)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("reads", r"GradpruneError: targets:reads could not be emitted: .*by .item\(\)"),
        ("autocast_step", "OptionError: autocast is for a model, and targets:double is a step: write torch.autocast"),
        ("unknown", "OptionError: .*targets has no 'nothing'"),
    ],
)
def test_target_is_refused(several: dict[str, dict[str, Any]], name: str, error: str):
    assert re.match(error, several[name]["error"], re.DOTALL)


def test_a_full_folder_is_not_written_to(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["emit", "targets:tiny", "--output", "."]) == 2
    assert "--output . exists: pass a folder that does not, or an empty one" in capsys.readouterr().err


def test_bfloat16_on_turing_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["emit", "digits", "--autocast", "bf16"]) == 2
    assert "sm_75 has no bfloat16: pass --autocast fp16, or another --target" in capsys.readouterr().err


def test_without_triton(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(GradpruneError, match=r'emit needs Triton: run pip install "gradprune\[emit\]"'):
        run.emit(Request("digits", "sm_75"))


def test_with_another_torch(monkeypatch: pytest.MonkeyPatch):
    skip_unless_possible()
    monkeypatch.setattr(run, "version", lambda name: "2.99.1")
    with pytest.raises(GradpruneError, match=r"knows those of 2\.13, not of 2\.99\.1"):
        run.emit(Request("digits", "sm_75"))


def test_canaries_die_where_the_device_is_not_loaded(tmp_path: Path):
    """In a process that has not loaded it, everything else would go through, on a CPU."""
    skip_unless_possible()
    code = """
from pathlib import Path
from gradprune.emit.emission import emit_here
from gradprune.emit.record import Request
from gradprune.errors import GradpruneError
try:
    emit_here(Request("digits", "sm_75", binaries=False), Path("."))
except (GradpruneError, RuntimeError) as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused:"), done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


# --- A network of the usual size --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resnet18(tmp_path: Path):
    skip_unless_possible()
    folder = tmp_path / "resnet18"
    emitted = run.emit(Request("timm:resnet18", "sm_75", batch=32, against="frozen-compile"), folder)
    ours, theirs = emitted["totals"]["gradprune"], emitted["totals"]["frozen-compile"]
    assert ours["external"] == theirs["external"] == 42  # 20 convolutions and a linear layer, forward and backward
    assert ours["external_flops"] == theirs["external_flops"]
    assert ours["launches"] < 0.75 * theirs["launches"]
    assert ours["generated_bytes"] < 0.75 * theirs["generated_bytes"]
    assert ours["peak_bytes"] < 0.5 * theirs["peak_bytes"]
    assert set(names(part(emitted, "step")["calls"], "external")) == {"convolution", "addmm", "mm"}
    code = (folder / "step.py").read_text()
    assert len(re.findall(r"empty_strided_cuda\(.*torch.bool\)", code)) == 16  # of 17 activations; the last is at hand
    assert "tl.atomic" not in code
    configs = [config for kernel in emitted["kernels"] for config in kernel["configs"]]
    assert max(config["stack_bytes"] for config in configs) <= 16
    assert max(config["shared_bytes"] for config in configs) <= 64 << 10
    assert min(config["occupancy"] for config in configs) >= 0.25
