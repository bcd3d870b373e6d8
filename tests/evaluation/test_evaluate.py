"""The evaluation as a function of Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from project import Project

from gradprune.attacks import FGSM, PGD
from gradprune.errors import GradpruneError
from gradprune.evaluation import evaluate
from gradprune.workloads.data_sets import DataOptions, load_data
from gradprune.workloads.models import ModelOptions, load_model

ATTACKS = {"fgsm": FGSM(eps=0.1, seed=0), "pgd": PGD(eps=0.1, step_size=0.025, seed=0)}


def test_is_what_the_command_does(project: Project) -> None:
    model, data = load_model(ModelOptions(f"{project.module}:net"), 0), load_data(DataOptions("images.npz"))
    records = evaluate(model, data, ATTACKS, project.folder / "ours", batch_size=8, compile=False)
    assert [record.label for record in records] == ["clean", "fgsm", "pgd"]
    assert project.run("evaluate", "--attack", "fgsm", "pgd", "--eps", "0.1", batch=8, output="theirs") == 0
    ours, theirs = (
        sorted(path.parent.name for path in (project.folder / name / "results").glob("*/record.json"))
        for name in ("ours", "theirs")
    )
    assert ours == theirs  # the names have a hash of everything that determines the result
    assert all(record.robust_accuracy <= records[0].robust_accuracy for record in records)


def test_goes_on_where_it_ended(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = load_model(ModelOptions(f"{project.module}:net"), 0), load_data(DataOptions("images.npz"))
    first = evaluate(model, data, {"fgsm": ATTACKS["fgsm"]}, "results", batch_size=8, compile=False)
    again = evaluate(model, data, list(ATTACKS.items()), "results", batch_size=8, compile=False)
    assert again[:2] == first
    assert capsys.readouterr().err.count("found in") == 2


def test_a_model_that_does_not_take_the_data_is_refused(project: Project) -> None:
    data = load_data(DataOptions("images.npz"))
    with pytest.raises(GradpruneError):
        evaluate(torch.nn.Linear(3, 2).eval(), data, ATTACKS, "results", compile=False)
    assert not list(Path("results").iterdir())
