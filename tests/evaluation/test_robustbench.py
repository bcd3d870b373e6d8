"""Results in the form that RobustBench keeps them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from project import Project
from torch import nn

from gradprune.attacks import AutoAttack
from gradprune.errors import OptionError
from gradprune.evaluation import benchmark
from gradprune.evaluation.robustbench import check_about
from gradprune.runtime import Runtime

EXAMPLE = {
    "link": "",
    "name": "A Paper",
    "authors": "A. Author, B. Author",
    "additional_data": True,
    "number_forward_passes": 2,
    "dataset": "digits",
    "venue": "",
    "architecture": "A network",
    "eps": "8/255",
    "clean_acc": "75.00",
    "reported": "",
    "autoattack_acc": "50.00",
    "footnote": "",
    "unreliable": False,
}
"""Fields and types of the files of RobustBench."""


def test_benchmark_writes_what_robustbench_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = functools.partial(AutoAttack, steps=2, queries=5)
    monkeypatch.setattr("gradprune.evaluation.robust_accuracy.AutoAttack", short)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    x = torch.rand(4, 1, 4, 4)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    about = {name: EXAMPLE[name] for name in ("name", "authors", "additional_data", "number_forward_passes")}
    about["architecture"] = "A network"
    settings: dict[str, Any] = {"runtime": Runtime(compile=False), "folder": tmp_path, "about": about}
    clean, robust = benchmark(
        model, x, y, "Linf", 8 / 255, to_disk=True, model_name="Mine2026", dataset="digits", **settings
    )
    written = json.loads((tmp_path / "model_info" / "digits" / "Linf" / "Mine2026.json").read_text())
    assert clean == 0.75
    assert written == {**EXAMPLE, "autoattack_acc": f"{100 * robust:.2f}"}
    assert list(written) == list(EXAMPLE)
    with pytest.raises(OptionError, match="pass model_name"):
        benchmark(model, x, y, to_disk=True)


@pytest.mark.parametrize(
    ("name", "about", "message"),
    [
        ("../Mine", {}, "cannot be the name"),
        ("", {}, "cannot be the name"),
        ("Mine", {"clean_acc": "99"}, "clean_acc is measured"),
        ("Mine", {"architectur": "ResNet"}, "architecture"),
    ],
)
def test_what_cannot_be_written_is_named(name: str, about: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_about(name, about)


def test_evaluate_writes_it_and_notes_what_is_not_standard(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--set", "steps=2", "--set", "queries=5", "--set", "targets=2", "--limit", "6")
    words = ("--attack", "autoattack", "--eps", "8/255", *short, "--robustbench", "Mine2026")
    assert project.run("evaluate", *words, "architecture=A network", "additional_data=true") == 0
    (file,) = (project.folder / "out" / "model_info").rglob("*.json")
    assert file.parts[-2:] == ("Linf", "Mine2026.json")
    written = json.loads(file.read_text())
    (record,) = (
        json.loads(path.read_text()) for path in (project.folder / "out" / "results").glob("autoattack*/record.json")
    )
    assert written["autoattack_acc"] == f"{100 * record['robust_accuracy']:.2f}"
    assert written["clean_acc"] == f"{100 * record['clean_accuracy']:.2f}"
    assert (written["architecture"], written["additional_data"], written["eps"]) == ("A network", True, "8/255")
    notes = "6 samples; AutoAttack with steps 2; AutoAttack with queries 5; AutoAttack with targets 2"
    assert written["footnote"] == notes
    assert "Mine2026.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attack", "pgd", "--robustbench", "Mine"), "pass --attack autoattack once"),
        (("--attack", "autoattack", "--eps", "0.1", "0.2", "--robustbench", "Mine"), "and one --eps"),
        (("--attack", "autoattack", "--robustbench", "Mine", "architecture"), "is no FIELD=VALUE"),
        (("--attack", "autoattack", "--robustbench", "Mine", "additional_data=some"), "is true or false"),
        (("--attack", "autoattack", "--robustbench", "Mine", "number_forward_passes=a"), "is a whole number"),
    ],
)
def test_evaluate_refuses_what_it_cannot_write(
    project: Project, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.run("evaluate", *words) != 0
    assert message in capsys.readouterr().err
