"""``gradprune inspect``: what it prints, what it refuses, and that it computes and allocates nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gradprune.cli import inspect as command
from gradprune.cli.main import main
from gradprune.torch_compat.aot import is_fake
from gradprune.workloads.target import TargetOptions, load_target
from gradprune.workloads.vision import let_torchvision_import

PROJECT = """
import torch
import torch.nn.functional as F
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

class Weird(nn.Module):
    def forward(self, x):
        return x * 2

def pgd():
    model = net()
    def attack_step(x_adv, x, y):
        x_adv = x_adv.detach().requires_grad_(True)
        F.cross_entropy(model(x_adv), y).backward()
        return x_adv.detach() + 0.01 * x_adv.grad.sign()
    x = torch.rand(4, 3, 8, 8)
    return attack_step, (x, x.clone(), torch.zeros(4, dtype=torch.long))

def reads():
    def attack_step(x):
        x = x.detach().requires_grad_(True)
        loss = (x * x).sum()
        if loss.item() > 1e9:
            return x
        loss.backward()
        return x.grad
    return attack_step, (torch.rand(3, 3),)

def reads_at_once():
    step, args = pgd()
    return step, (*args[:2], torch.zeros(int(torch.ones(4).sum()), dtype=torch.long))

def needs(x, y=1): ...
def number(): return 3
def no_gradient(): return (lambda x: x * 2), (torch.rand(3),)
seven = 7
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder; its name is its own, for what has been imported stays."""
    name = f"project_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", "--help"])
    text = capsys.readouterr().out
    for word in ("timm:NAME", "mine:pgd", "return attack_step, (x,", "--against", "--why", "--dump", "--real"):
        assert word in text


def test_the_step_in_the_help_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As it is written there, with the imports that it leaves out."""
    _, _, after = command.EPILOG.partition("# mine.py\n")
    code, _, _ = after.partition("$ gradprune")
    start = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    start += "make_model = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5))\n"
    (tmp_path / "mine.py").write_text(start + textwrap.dedent(code))
    assert "attack step, one graph" in printed(capsys, "mine:pgd")


def test_a_step(project: str, capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, f"{project}:pgd")
    assert text.startswith("gradprune: attack step, one graph\n")
    assert "FLOP weight grad" in text


@pytest.mark.parametrize("name", ["net", "digits"])
@pytest.mark.parametrize("form", ["step", "model"])
def test_a_stock_attack(project: str, name: str, form: str, capsys: pytest.CaptureFixture[str]):
    target = name if name == "digits" else f"{project}:{name}"
    report = json.loads(printed(capsys, target, "--image-size", "8", "--batch", "3", "--form", form, "--json"))
    assert report["form"] == form
    assert report["flops"]["after"]["weight_grad"] == 0
    assert report["flops"]["before"]["weight_grad"] > 0


def test_batch_and_size_scale(project: str, capsys: pytest.CaptureFixture[str]):
    flops = []
    for batch in ("1", "5"):
        text = printed(capsys, f"{project}:net", "--image-size", "8", "--batch", batch, "--json")
        flops.append(json.loads(text)["flops"]["before"]["forward"])
    assert flops[1] == 5 * flops[0]


def test_passes_can_be_left_out(project: str, capsys: pytest.CaptureFixture[str]):
    report = json.loads(printed(capsys, f"{project}:pgd", "--json", "--disable", "early-masks", "hoist-invariants"))
    names = [record["name"] for record in report["passes"]]
    assert "narrow-outputs" in names
    assert not {"early-masks", "hoist-invariants"} & set(names)
    assert report["hoisted"] == []


def test_why(project: str, capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, f"{project}:pgd", "--why", "sign", "--why", "arg0_1")
    assert "sign: aten.sign" in text
    assert "is output 0: a value that is asked for" in text
    assert "arg0_1: perturbation" in text
    assert main(["inspect", f"{project}:pgd", "--why", "sing"]) == 1
    assert "did you mean 'sign" in capsys.readouterr().err


def test_against(project: str, capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, f"{project}:pgd", "--against", "frozen-compile")
    assert "frozen + compile" in text
    text = printed(capsys, f"{project}:pgd", "--against", "frozen-compile", "--json")
    report = json.loads(text)
    theirs, ours = report["against"], report["flops"]["after"]
    assert theirs["flops"] == ours
    assert theirs["saved_bytes"] >= report["saved_bytes"]["after"]


def test_dump_and_dot(project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, f"{project}:pgd", "--dump", "out", "--dot", "graph.dot")
    assert "graph-00-attack_step" in text
    assert (tmp_path / "out" / "graph-00-attack_step" / "repro.py").exists()
    assert (tmp_path / "graph.dot").read_text().startswith("digraph")


def test_nothing_opens_unless_asked(
    project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    before = set(tmp_path.iterdir())
    printed(capsys, f"{project}:pgd")
    assert opened == []
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"__pycache__"}
    printed(capsys, f"{project}:pgd", "--open", "--dump", "out")
    assert opened == [(tmp_path / "out" / "graph-00-attack_step" / "page.html").as_uri()]


def test_a_dump_that_cannot_be_written_fails_the_command_only(
    project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "taken").write_text("")
    assert main(["inspect", f"{project}:pgd", "--dump", "taken"]) == 1
    text = capsys.readouterr().out
    assert "not written: the dump cannot be written to 'taken'" in text
    assert "FLOP total" in text


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "regnetz_005"])
def test_models_that_read_values_while_they_are_built(name: str, capsys: pytest.CaptureFixture[str]):
    let_torchvision_import()
    pytest.importorskip("timm")
    assert "FLOP" in printed(capsys, f"timm:{name}", "--batch", "2")


@pytest.mark.parametrize("name", ["test_vit", "hiera_tiny_224", "convit_tiny", "sequencer2d_s"])
def test_no_tensor_of_a_model_of_timm_has_memory(name: str):
    """Hiera reads its weights while it is built, ConViT computes some, Sequencer has an LSTM, which keeps a list."""
    let_torchvision_import()
    pytest.importorskip("timm")
    target = load_target(TargetOptions(f"timm:{name}", form="model", batch=2))
    assert isinstance(target.function, torch.nn.Module)
    for module in target.function.modules():
        tensors = [leaf for leaf in tree_leaves(vars(module)) if isinstance(leaf, torch.Tensor)]
        assert all(map(is_fake, tensors))
    parameters = list(target.function.parameters())
    assert all(isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad for parameter in parameters)
    assert not is_fake(torch.nn.Linear(2, 2).weight)


REFUSED: dict[str, tuple[int, str]] = {
    "resnet18": (2, "no target 'resnet18': pass module:name"),
    "timm:resnet1": (2, "timm has no model 'resnet1'"),
    "nowhere:net": (2, "there is no module 'nowhere'"),
    "{}:nothing": (2, "has no 'nothing'"),
    "{}:seven": (2, "is of type int: a target is"),
    "{}:needs": (2, "needs arguments (x): a target is"),
    "{}:number": (2, "returned what is of type int: a target is"),
    "{}:no_gradient": (1, "nothing in this call takes the gradient"),
    "{}:reads": (1, "tensors have no values: if the step reads some, by .item()"),
    "{}:reads_at_once": (1, "Unless --real is passed, tensors have shapes but no values"),
}


@pytest.mark.parametrize("target", REFUSED)
def test_what_is_refused(target: str, project: str, capsys: pytest.CaptureFixture[str]):
    status, message = REFUSED[target]
    assert main(["inspect", target.format(project)]) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_real_tensors_have_values(project: str, capsys: pytest.CaptureFixture[str]):
    assert "FLOP" in printed(capsys, f"{project}:reads_at_once", "--real")


def test_code_for_a_gpu_is_for_the_page(
    project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = []
    monkeypatch.setattr("gradprune.cli.inspect.emit", lambda request: asked.append(request) or {"gpu": "Tesla T4"})
    monkeypatch.setattr("gradprune.cli.inspect.check_requirements", lambda: None)
    for options, message in ((), "pass --dump or --open"), (("--dump", "out", "--real"), "leave out --real"):
        assert main(["inspect", f"{project}:pgd", "--gpu", "sm_75", *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    printed(capsys, f"{project}:pgd", "--gpu", "sm_75", "--dump", "out", "--exact-order")
    (page,) = (tmp_path / "out").glob("*/page.html")
    assert '"emission":{"gpu":"Tesla T4"}' in page.read_text()
    assert [(one.target, one.gpu, one.exact_order) for one in asked] == [(f"{project}:pgd", "sm_75", True)]


def test_unknown_passes_and_sizes(project: str, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", f"{project}:pgd", "--disable", "early-mask"]) == 2
    assert "did you mean 'early-masks'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", f"{project}:pgd", "--batch", "0"])


def test_nothing_is_timed_or_left_behind(
    project: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Which kernel is faster is not asked of the machine, and the process is as it was."""

    def timed(run: Any, device: torch.device) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr("gradprune.ops.kernel_choice._shortest", timed)
    monkeypatch.setattr("gradprune.ops.kernel_choice._answers", {})
    monkeypatch.setattr("gradprune.ops.kernel_choice._load", lambda device: {})
    assert "not timed on this machine" in printed(capsys, f"{project}:pgd")
    assert type(torch.rand(2)) is torch.Tensor


LARGE = """
import resource, sys
from gradprune.cli.main import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = main(["inspect", "timm:resnet18", "--batch", "1024", "--json"])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(before, after, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_a_step_of_tens_of_gigabytes_takes_less_than_one():
    """The batch alone would take 0.6 GB three times, what is saved for backward 12."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["saved_bytes"]["before"] > 5e9
    before, after = map(int, done.stderr.splitlines()[-1].split())
    assert (after - before) * 1024 < 0.5e9
