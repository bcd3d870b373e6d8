"""``gradprune attack`` and ``gradprune evaluate`` from end to end, on a tiny model, eagerly but for one test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from project import SOURCE, Project

from gradprune.attacks import APGD, FAB, PGD, Attack, AutoAttack
from gradprune.attacks.registry import ATTACKS
from gradprune.cli.main import main
from gradprune.errors import AttackError, GradpruneError
from gradprune.evaluation import run as evaluate
from gradprune.evaluation.records import read_arrays, write_arrays
from gradprune.support.distributed import Ranks
from gradprune.workloads.vision import let_torchvision_import

QUICK_AUTOATTACK = (
    "--attack",
    "autoattack",
    "--eps",
    "0.05",
    "--set",
    "steps=3",
    "--set",
    "queries=5",
    "--set",
    "targets=2",
)


def tiny_net() -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    return scope["net"]().eval()


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# What is written


def test_attack_writes_examples_record_and_pictures(
    drawing_project: Project, arrays: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    project = drawing_project
    assert project.run("attack", "--attack", "pgd", "--eps", "8/255", "--steps", "3", "--limit", "11") == 0
    assert project.files() == ["adversarial.npz", "pictures.png", "record.json"]
    assert is_png(project.folder / "out" / "pictures.png")
    found = project.examples()
    assert found["index"].tolist() == list(range(0, 22, 2))
    x = arrays["x"][found["index"]]
    delta = np.abs(found["x_adv"] - x)
    assert 0 < delta.max() <= 8 / 255 + 1e-6
    assert 0 <= found["x_adv"].min() <= found["x_adv"].max() <= 1
    assert (found["y"] == arrays["y"][found["index"]]).all()
    with torch.no_grad():
        model = tiny_net()
        assert model(torch.from_numpy(found["x_adv"])).argmax(1).tolist() == found["predictions"].tolist()
        assert model(torch.from_numpy(x)).argmax(1).tolist() == found["clean_predictions"].tolist()
    record = json.loads((project.folder / "out" / "record.json").read_text())
    right = found["predictions"] == found["y"]
    assert record["samples"] == 11
    assert record["clean_accuracy"] == pytest.approx(10 / 11)  # the first two are labelled wrongly
    assert record["accuracy"] == pytest.approx(right.mean())
    assert record["robust_accuracy"] == pytest.approx((right & (found["clean_predictions"] == found["y"])).mean())
    assert record["attack"]["name"] == "PGD"
    assert record["attack"]["step_size"] == pytest.approx(2 / 255)
    shown = capsys.readouterr().out
    assert "8/255" in shown
    assert "Saved in out" in shown


def test_evaluate_writes_records_table_plot_and_pictures(
    drawing_project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project = drawing_project
    arguments = ("--attack", "fgsm", "pgd", "--attack", "cw", "--eps", "0", ".02", ".05", "--steps", "3")
    assert project.run("evaluate", *arguments) == 0
    records = project.records()
    assert sorted(records) == sorted(
        ["clean None None", "cw None 3", "fgsm 0.02 1", "fgsm 0.05 1", "pgd 0.02 3", "pgd 0.05 3"]
    )
    clean = records["clean None None"]
    assert clean["robust_accuracy"] == clean["accuracy"] == clean["clean_accuracy"] == pytest.approx(20 / 22)
    for record in records.values():
        assert record["clean_accuracy"] == clean["clean_accuracy"]
        assert record["robust_accuracy"] <= record["accuracy"] <= 1
    assert records["fgsm 0.05 1"]["robust_accuracy"] < clean["accuracy"]
    assert records["fgsm 0.05 1"]["perturbation"]["max"] == pytest.approx(0.05, abs=1e-6)
    assert {"accuracy.md", "accuracy.png", "first-image.png"} <= set(project.files())
    pictures = list((project.folder / "out").rglob("*.png"))
    assert len(pictures) == 2 + 5
    assert all(map(is_png, pictures))
    shown, table = capsys.readouterr().out, (project.folder / "out" / "accuracy.md").read_text()
    for record in records.values():
        assert f"{record['robust_accuracy']:.2%}" in shown
        assert f"| {record['robust_accuracy']:.2%} |" in table
    for file in (project.folder / "out" / "results").glob("*/adversarial.npz"):
        assert len(read_arrays(file)["y"]) == 4


def test_evaluate_keeps_all_examples_if_asked(project: Project) -> None:
    arguments = ("--attack", "fgsm", "--eps", ".02")
    assert project.run("evaluate", *arguments) == 0
    assert project.run("evaluate", *arguments, "--keep-examples") == 0
    (file,) = (project.folder / "out" / "results").glob("fgsm*/adversarial.npz")
    assert read_arrays(file)["index"].tolist() == list(range(22))


def test_no_attack_at_all(project: Project, arrays: dict[str, np.ndarray]) -> None:
    assert project.run("attack", "--attack", "pgd", "--eps", "0") == 0
    assert (project.examples()["x_adv"] == arrays["x"]).all()
    assert project.run("evaluate", "--attack", "pgd", "--eps", "0", output="other") == 0
    assert list(project.records("other")) == ["clean None None"]


def test_targets_are_reached_and_counted(project: Project) -> None:
    arguments = ("--attack", "bim", "--targeted", "least-likely", "--step-size", "eps/10", "--steps", "10")
    assert project.run("evaluate", *arguments, "--eps", ".9") == 0
    record = project.records()["bim, least-likely, step eps/10 0.9 10"]
    assert record["target_rate"] == 1
    assert record["accuracy"] == 0
    assert "100.00%" in (project.folder / "out" / "accuracy.md").read_text()


@pytest.mark.parametrize(("norm", "eps"), [("linf", "0.05"), ("l2", "0.4"), ("l1", "2")])
def test_every_attack_passes_the_check_of_its_ball(project: Project, norm: str, eps: str) -> None:
    names = [name for name in ATTACKS if norm == "l2" or name not in ("cw", "deepfool")]
    settings = ("--steps", "4", "--set", "queries=9", "--set", "targets=2")
    assert project.run("evaluate", "--attack", *names, "--norm", norm, "--eps", eps, *settings, batch=22) == 0
    records = project.records().values()
    assert {record["label"].split(",")[0] for record in records} == {"clean", *names}
    for record in records:
        if record["eps"] is not None and record["perturbation"]:
            assert record["perturbation"]["max"] <= float(eps) + 1e-5


def test_inputs_that_are_no_images_have_no_pictures(project: Project) -> None:
    (project.folder / "flat.py").write_text("from torch import nn\ndef net(): return nn.Linear(7, 3)\n")
    np.savez("vectors.npz", x=np.random.default_rng(0).random((5, 7)), y=np.array([0, 1, 2, 0, 1]))
    arguments = ["attack", "--model", "flat:net", "--data", "vectors.npz", "--attack", "fgsm", "--no-compile"]
    assert main([*arguments, "--output", "out"]) == 0
    assert project.files() == ["adversarial.npz", "record.json"]
    arguments[arguments.index("fgsm")] = "autoattack"
    assert main([*arguments, "--output", "none"]) == 1
    assert project.files("none") == []


def test_the_records_of_two_calls_make_one_table(project: Project) -> None:
    arguments = ("--attack", "bim", "--targeted", "least-likely", "--step-size", "eps/10")
    assert project.run("evaluate", *arguments, "--steps", "2", "3", "--eps", ".031") == 0
    assert project.run("evaluate", *arguments, "--steps", "2", "--eps", ".015", ".046") == 0
    table = (project.folder / "out" / "accuracy.md").read_text()
    assert table.count("| bim, least-likely, step eps/10 |") == 4
    assert table.count("## ") == 1
    assert project.run("evaluate", *arguments, "--steps", "2", "--eps", ".015", model="module", batch=7) == 0
    assert (project.folder / "out" / "accuracy.md").read_text().count("## ") == 1  # the same weights
    assert project.run("evaluate", *arguments, "--steps", "2", "--eps", ".015", "--limit", "9") == 0
    assert (project.folder / "out" / "accuracy.md").read_text().count("## ") == 2


def test_the_built_in_digits_are_read_well_until_they_are_attacked(project: Project) -> None:
    arguments = ("--data", "digits", "--attack", "fgsm", "--eps", "0", ".1", ".3")
    assert project.run("evaluate", "--model", "digits", *arguments, batch=450) == 0
    records = project.records()
    shares = [records[name]["robust_accuracy"] for name in ("clean None None", "fgsm 0.1 1", "fgsm 0.3 1")]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.95
    assert shares[2] < 0.5


def test_a_compiled_model_is_attacked_as_an_eager_one(project: Project) -> None:
    arguments = ("--attack", "pgd", "--steps", "3", "--eps", ".02", ".05", "--keep-examples")
    assert project.run("evaluate", *arguments, batch=11, compile=True, output="compiled") == 0
    assert project.run("evaluate", *arguments, batch=11, output="eager") == 0
    compiled, eager = project.records("compiled"), project.records("eager")
    assert sorted(compiled) == sorted(["clean None None", "pgd 0.02 3", "pgd 0.05 3"])
    for name, record in compiled.items():
        # sign() makes a whole step of a rounding difference, here and there
        assert abs(record["robust_accuracy"] - eager[name]["robust_accuracy"]) <= 1 / 22
        assert record["settings"]["compile"]
        assert not eager[name]["settings"]["compile"]
        assert record["key"] != eager[name]["key"]


# Going on


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("what is done was done again")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_is_done_is_not_done_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--attack", "fgsm", "--eps", ".02", ".05")
    assert project.run("evaluate", *arguments) == 0
    assert project.run("attack", "--attack", "fgsm", output="single") == 0
    before = project.records()
    monkeypatch.setattr(evaluate, "_attacked", refuse)
    assert project.run("evaluate", *arguments) == 0
    assert project.run("attack", "--attack", "fgsm", output="single") == 0
    assert project.records() == before


@pytest.mark.parametrize(
    "change",
    [
        ("--seed", "1"),
        ("--limit", "21"),
        ("--batch-size", "9"),
        ("--autocast", "bf16"),
        ("--eps", "0.04"),
        ("--set", "restarts=2"),
        ("--checkpoint", "other.pt"),
    ],
)
def test_whatever_determines_a_result_makes_another_of_it(project: Project, change: tuple[str, str]) -> None:
    model = tiny_net()
    torch.nn.init.constant_(model[3].bias, 0.1)
    torch.save(model.state_dict(), "other.pt")
    arguments = ("--attack", "pgd", "--eps", "0.05", "--steps", "2")
    assert project.run("attack", *arguments) == 0
    before = json.loads((project.folder / "out" / "record.json").read_text())
    assert project.run("attack", *arguments, *change) == 0
    after = json.loads((project.folder / "out" / "record.json").read_text())
    assert after["key"] != before["key"]
    assert project.files() == ["adversarial.npz", "pictures.png", "record.json"]


def test_an_interrupted_result_goes_on_after_its_last_batch(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--attack", "pgd", "--eps", ".05", "--steps", "3", "--keep-examples")
    real, numbers = evaluate._attacked, []

    def two_batches(subject: Any, attack: Attack, place: Any, number: int, seed: int) -> Any:
        if isinstance(attack, PGD):
            numbers.append(number)
            if numbers == [0, 1, 2]:
                raise KeyboardInterrupt
        return real(subject, attack, place, number, seed)

    monkeypatch.setattr(evaluate, "_attacked", two_batches)
    assert project.run("evaluate", *arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    left = [file for file in project.files() if file.startswith("results/pgd")]
    assert [Path(file).name for file in left] == ["00000.npz", "00001.npz"]
    assert project.run("evaluate", *arguments) == 0
    assert numbers == [0, 1, 2, 2]
    assert not list((project.folder / "out").rglob("batches-*"))
    monkeypatch.setattr(evaluate, "_attacked", real)
    assert project.run("evaluate", *arguments, output="whole") == 0
    assert same_results(project, "out", "whole")


def same_results(project: Project, one: str, other: str) -> bool:
    """Whether two output folders hold the same results, but for the time they took."""
    files = [sorted((project.folder / output / "results").glob("*/adversarial.npz")) for output in (one, other)]
    assert [file.parent.name for file in files[0]] == [file.parent.name for file in files[1]] != []
    for first, second in zip(*files, strict=True):
        arrays = read_arrays(first), read_arrays(second)
        assert all((arrays[0][name] == arrays[1][name]).all() for name in arrays[0])
    figures = []
    for output in (one, other):
        records = project.records(output)
        for record in records.values():
            record.pop("seconds")
            record["settings"].pop("processes")
        figures.append(records)
    return figures[0] == figures[1]


def test_autoattack_goes_on_after_its_last_part(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(FAB, "run", interrupt)
        assert project.run("evaluate", *QUICK_AUTOATTACK, "--keep-examples") == 130
    (left,) = [file for file in project.files() if file.startswith("results/autoattack")]
    assert left.endswith("00000-parts.npz")
    real, called = APGD.run, []

    def watched(self: APGD, query: Any, x: Any, *rest: Any) -> Any:
        called.append(len(x))
        return real(self, query, x, *rest)

    monkeypatch.setattr(APGD, "run", watched)
    assert project.run("evaluate", *QUICK_AUTOATTACK, "--keep-examples") == 0
    assert len(called) == 2  # of three batches, the first has this part behind it
    assert project.run("evaluate", *QUICK_AUTOATTACK, "--keep-examples", output="whole") == 0
    assert same_results(project, "out", "whole")


def test_autoattack_in_parts_is_as_strong_as_in_one(project: Project, arrays: dict[str, np.ndarray]) -> None:
    assert project.run("evaluate", *QUICK_AUTOATTACK, batch=22) == 0
    (record,) = [record for record in project.records().values() if record["label"].startswith("autoattack")]
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    attack = AutoAttack(eps=0.05, steps=3, queries=5, targets=2, seed=0)
    model = tiny_net()
    from gradprune.attacks import Runtime

    x_adv = attack(model, x, y, runtime=Runtime(compile=False))
    with torch.no_grad():
        robust = float((model(x_adv).argmax(1) == y).float().mean())
    assert 0 < record["robust_accuracy"] < record["clean_accuracy"]
    assert record["robust_accuracy"] == pytest.approx(robust, abs=1.5 / 22)  # of other random numbers


def test_a_damaged_file_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = evaluate._attacked

    def one_batch(subject: Any, attack: Attack, place: Any, number: int, seed: int) -> Any:
        return real(subject, attack, place, number, seed) if number == 0 else interrupt()

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "_attacked", one_batch)
        assert project.run("attack", "--attack", "fgsm") == 130
    (batch,) = (project.folder / "out").glob("batches-*/00000.npz")
    batch.write_bytes(b"damaged")
    capsys.readouterr()
    assert project.run("attack", "--attack", "fgsm") == 1
    told = capsys.readouterr().err
    assert "00000.npz" in told
    assert "remove it" in told


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--attack", "pgdd"], "'pgd'"),
        (["--attack", "pgd", "--set", "restart=2"], "'restarts'"),
        (["--attack", "pgd", "--set", "restarts=0"], "at least 1"),
        (["--attack", "cw", "--norm", "linf"], "leave out --norm"),
        (["--attack", "pgd", "--bounds", "1", "0"], "--bounds"),
        (["--attack", "pgd", "--mean", "0.5"], "--std"),
        (["--attack", "pgd", "--mean", "0", "0", "0", "--std", "1", "1", "1"], "--mean has 3 numbers, and the images"),
        (["--attack", "pgd", "--mean", "0", "--std", "1", "1"], "--std has 2 numbers, and the images"),
        (["--attack", "pgd", "--device", "gpu"], "--device 'gpu'"),
        (["--attack", "pgd", "--device", "meta"], "--device meta"),
        (["--attack", "pgd", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--attack", "pgd", "--model", "net"], "module:name"),
        (["--attack", "pgd", "--data", "nowhere"], "nowhere"),
        (["--attack", "pgd", "--output", "images.npz/out"], "--output DIR"),
    ],
)
@pytest.mark.parametrize("command", ["attack", "evaluate"])
def test_a_usage_error_is_named_before_any_work_and_exits_with_2(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(evaluate, "_attacked", refuse)
    assert project.run(command, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert told in lines[-1]
    assert lines[-1].startswith(f"gradprune {command}: error: ")
    assert project.files() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--attack", "pgd", "--eps", "-1"],
        ["--attack", "pgd", "--steps", "0"],
        ["--attack", "pgd", "--targeted", "given"],
        ["--attack", "pgd", "--set", "restarts"],
        ["--attack", "pgd", "--limit", "0"],
        [],
    ],
)
def test_what_cannot_be_parsed_exits_with_2(project: Project, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        project.run("evaluate", *arguments)
    assert stop.value.code == 2
    assert project.files() == []


@pytest.mark.parametrize(
    ("shape", "count", "told"),
    [
        ((3, 8, 8), 2, "--mean has 2 numbers, and the images of images.npz have 3 channels"),
        ((1, 8, 8), 4, "--mean has 4 numbers, and the images of images.npz have 1 channel:"),
        ((5,), 1, "--mean and --std are for images (C, H, W), and images.npz has inputs of shape (5,)"),
    ],
)
def test_numbers_for_other_channels_are_refused_before_the_model_is_made(
    project: Project, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...], count: int, told: str
) -> None:
    np.savez("images.npz", x=np.zeros((6, *shape), np.float32), y=np.arange(6) % 5)
    for command in ("attack", "evaluate", "train"):
        numbers = (*("--mean", *["0.5"] * count), *("--std", *["1"] * count))
        named = ("--model", f"{project.module}:failing", "--data", "images.npz", "--device", "cpu", "--no-compile")
        attack = () if command == "train" else ("--attack", "pgd")
        assert main([command, *named, *attack, *numbers, "--output", "out"]) == 2
        assert told in capsys.readouterr().err


def test_a_timm_model_takes_grey_images_in_every_channel(project: Project) -> None:
    let_torchvision_import()
    pytest.importorskip("timm")
    np.savez("images.npz", x=np.random.default_rng(0).random((2, 1, 64, 64), np.float32), y=np.arange(2))
    assert project.run("attack", "--model", "timm:test_resnet", "--attack", "fgsm") == 0


def labels_out_of_range(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"x": arrays["x"], "y": arrays["y"] + 3}


def not_within_bounds(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"x": arrays["x"] * 2, "y": arrays["y"]}


def of_another_shape(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"x": arrays["x"][..., :6], "y": arrays["y"]}


@pytest.mark.parametrize(
    ("change", "model", "told"),
    [
        (labels_out_of_range, "net", "0 to 4"),
        (not_within_bounds, "net", "within the bounds 0 to 1"),
        (of_another_shape, "net", "does not take the data's inputs of shape (1, 8, 6)"),
        (dict, "broken", "NaN"),
    ],
)
@pytest.mark.parametrize("attack", ["fgsm", "autoattack"])
def test_what_cannot_be_attacked_is_one_line_and_leaves_nothing(
    project: Project,
    arrays: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
    change: Any,
    model: str,
    told: str,
    attack: str,
) -> None:
    np.savez("images.npz", **change(arrays))
    for command in ("attack", "evaluate"):
        capsys.readouterr()
        assert project.run(command, "--attack", attack, model=model) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert told in line
    assert project.files() == []


def test_examples_outside_of_the_ball_are_not_written(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PGD, "project", lambda self, x_adv, x: (x + 1.01 * self.eps).clamp(0, 1))
    assert project.run("attack", "--attack", "pgd", "--eps", ".1") == 1
    assert "norm 0.101" in capsys.readouterr().err
    assert project.files() == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x + torch.nan, "not finite"),
        (lambda x: x[:, :0], "another shape"),
        (lambda x: x - 0.02, "outside of the bounds"),
        (lambda x: (x + 0.12).clamp(0, 1), "perturbation of norm 0.12"),
    ],
)
def test_the_check_of_examples(change: Any, told: str) -> None:
    x = torch.linspace(0, 1, 60).view(2, 30)
    attack = PGD(eps=0.1)
    evaluate.check_examples(attack, x, (x + 0.1).clamp(0, 1), torch.tensor([0.1, 0.1]))
    x_adv = change(x)
    norms = (x_adv - x).abs().amax(1) if x_adv.shape == x.shape else torch.zeros(2)
    with pytest.raises(AttackError, match=told):
        evaluate.check_examples(attack, x, x_adv, norms)


def test_nan_is_no_class_and_no_right_answer() -> None:
    logits = torch.tensor([[0.0, 1, 2], [torch.nan, 1, 2]])
    assert evaluate._predictions(logits).tolist() == [2, -1]
    assert evaluate._in_top(torch.arange(14.0).view(2, 7), torch.tensor([2, 1])).tolist() == [True, False]


def test_arrays_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "arrays.npz"
    write_arrays(path, {"a": np.arange(3)})

    def half(file: Any, **_: object) -> None:
        file.write(b"PK half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        write_arrays(path, {"a": np.arange(4)})
    assert read_arrays(path)["a"].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["arrays.npz"]


# Several processes


def test_two_processes_come_to_the_result_of_one(project: Project) -> None:
    arguments = ["evaluate", "--model", f"{project.module}:net", "--data", "images.npz", "--no-compile"]
    arguments += ["--device", "cpu", "--batch-size", "8", "--attack", "pgd", "--eps", ".02", ".05", "--steps", "3"]
    arguments += ["--keep-examples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "gradprune", *arguments, "--output", "two"),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in two") == 1
    assert main([*arguments, "--output", "one"]) == 0
    assert {record["settings"]["processes"] for record in project.records("two").values()} == {2}
    assert same_results(project, "one", "two")
    assert [file for file in project.files("two") if "batches" in file or ".rank" in file] == []


@pytest.mark.parametrize(
    ("theirs", "are_there", "told"),
    [(["a"], True, "different models or data"), (["a", "b"], False, "do not share"), (["a", "b"], True, None)],
)
def test_processes_have_to_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: list[str], are_there: bool, told: str | None
) -> None:
    def gather(into: list[list[str]], own: list[str]) -> None:
        into[:] = own, theirs
        if are_there:
            (tmp_path / ".rank-1").touch()

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    with pytest.raises(GradpruneError, match=told) if told else nullcontext():
        Ranks(0, 2).agree(["a", "b"], tmp_path)
    assert not (tmp_path / ".rank-0").exists()
    assert [*Ranks(0, 2).share(5), *Ranks(1, 2).share(5)] == [0, 2, 4, 1, 3]
