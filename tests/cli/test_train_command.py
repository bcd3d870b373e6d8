"""``gradprune train`` from end to end, eagerly but for one test, and what its options stand for."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from gradprune.attacks import FGSM, PGD, RSFGSM
from gradprune.cli import train as command
from gradprune.cli.main import main
from gradprune.cli.train import (
    BY_NAME,
    build_evaluation,
    build_objective,
    build_optimizer,
    effective,
    learning_rate,
    parsed,
    read_config,
)
from gradprune.training import AWP, MART, TRADES, AdversarialTrainer, Fast, Free, NearPGD, PGDTraining, Plain

NETS = """
from torch import nn


def tiny():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
"""
SMALL = ("--limit", "100", "--batch-size", "16", "--steps", "2", "--eps", "0.1", "--evaluate-attack", "pgd-3")
ITERATIONS = 5
"""Of an epoch with these options: of 100 samples 90 are trained on."""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module of models."""
    (tmp_path / "tiny_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train(*arguments: str, output: str = "run", data: str = "digits", model: str = "tiny_nets:tiny") -> int:
    """The command on small data, eagerly; arguments may name its options again."""
    named = ("--model", model, "--data", data, "--output", output, "--device", "cpu")
    return main(["train", *named, *SMALL, "--no-compile", *arguments])


def metrics(output: str = "run") -> list[dict[str, Any]]:
    """What was recorded, but for times."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights(output: str = "run", name: str = "last.pt") -> dict[str, torch.Tensor]:
    return torch.load(Path(output) / name, weights_only=True)["model"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


# From end to end


def test_a_run_and_the_command_it_recommends(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--epochs", "2", "--tensorboard", "--lr", "1e-2") == 0
    shown = capsys.readouterr()
    assert "epoch 1/2: loss" in shown.err
    names = ["best.pt", "config.yaml", "curves.png", "last.pt", "metrics.jsonl", "tensorboard"]
    assert sorted(file.name for file in Path("run").iterdir()) == names
    epochs = [line for line in metrics() if line["kind"] == "epoch"]
    assert [line["iteration"] for line in epochs] == [ITERATIONS, 2 * ITERATIONS]
    for line in (epochs[-1], max(epochs, key=lambda line: line["robust"])):
        assert f"{line['clean']:.2%}" in shown.out
        assert f"{line['robust']:.2%}" in shown.out
    (recommended,) = (line for line in shown.out.splitlines() if line.startswith("Measure it: "))
    words = shlex.split(recommended.removeprefix("Measure it: gradprune "))
    words[words.index("autoattack")] = "fgsm"
    assert main([*words, "--no-compile", "--limit", "30", "--device", "cpu"]) == 0
    assert "best.pt" in capsys.readouterr().out
    assert list(Path("run/evaluation/results").glob("fgsm-linf-eps0.1*"))


def test_a_compiled_run_is_as_good_as_an_eager_one() -> None:
    arguments = ("--epochs", "1", "--augment", "none", "--set", "random_start=false", "--lr", "1e-3")
    assert train(*arguments, output="eager") == 0
    config = yaml.safe_load(Path("eager/config.yaml").read_text())
    Path("compiled.yaml").write_text(yaml.safe_dump({**config, "no-compile": False}))
    assert main(["train", "--config", "compiled.yaml", "--output", "compiled"]) == 0
    pairs = zip(metrics("eager"), metrics("compiled"), strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], rel=1e-2) for one, other in pairs)


@pytest.mark.parametrize("after", [2, ITERATIONS + 2])
def test_an_interrupted_run_goes_on_exactly(monkeypatch: pytest.MonkeyPatch, after: int, capsys: Any) -> None:
    arguments = ("--epochs", "3", "--augment", "crop+flip", "--ema", "0.5", "--eps-warmup", "2", "--clip", "1")
    always = ("--checkpoint-minutes", "0")
    monkeypatch.setattr(command, "JsonLines", lambda: JsonLinesEach())
    assert train(*arguments, output="whole") == 0
    step = AdversarialTrainer.step

    def until(self: AdversarialTrainer, *batch: torch.Tensor) -> Any:
        if self.iterations == after:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as context:
        context.setattr(AdversarialTrainer, "step", until)
        assert train(*arguments, *always) == 130
    assert "interrupted" in error_of(capsys)
    assert train(*arguments, *always) == 0
    assert f"going on from run: {after // ITERATIONS} epochs done" in error_of(capsys)
    assert metrics() == metrics("whole")
    assert same(weights(), weights("whole"))
    assert same(weights(name="best.pt"), weights("whole", "best.pt"))


class JsonLinesEach(command.JsonLines):
    """A line for each iteration, for there are few."""

    def __init__(self) -> None:
        super().__init__(every=1)


def test_a_finished_run_is_lengthened(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--epochs", "1", "--schedule", "constant") == 0
    before = weights()
    assert train("--epochs", "1", "--schedule", "constant") == 0  # there is nothing to do
    assert same(before, weights())
    assert capsys.readouterr().out.count("Saved in run") == 2
    assert train("--epochs", "3", "--schedule", "constant") == 0
    assert train("--epochs", "3", "--schedule", "constant", output="whole") == 0
    assert metrics() == metrics("whole")
    assert same(weights(), weights("whole"))


@pytest.mark.parametrize("objective", ["plain", "awp", "free", "fast"])
def test_objectives_without_the_usual_attack(objective: str) -> None:
    small = {"limit": 100, "batch-size": 16, "eps": 0.1, "model": "tiny_nets:tiny", "data": "digits"}
    Path("small.yaml").write_text(yaml.safe_dump({**small, "no-compile": True, "epochs": 1, "output": "run"}))
    assert main(["train", "--config", "small.yaml", "--objective", objective]) == 0
    (line,) = (line for line in metrics() if line["kind"] == "epoch")
    assert line["clean"] is not None
    assert (line["robust"] is None) == (objective == "plain")
    assert line["updates"] == ITERATIONS * (8 if objective == "free" else 1)


def test_training_stops_when_it_gets_no_better(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--lr", "0", "--weight-decay", "0", "--epochs", "9", "--patience", "2") == 0
    assert sum(line["kind"] == "epoch" for line in metrics()) < 9
    assert "Stopped early" in capsys.readouterr().out


def test_folders_of_images_are_augmented_and_normalised(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 4)):
        for name in ("cat", "dog"):
            (project / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (12, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(project / "photos" / part / name / f"{number}.png")
    seen: list[Any] = []
    fit = AdversarialTrainer.fit

    def spy(self: AdversarialTrainer, loader: Any, *arguments: Any, **settings: Any) -> Any:
        seen.extend((loader.dataset.augmentations, len(settings["validation"].dataset)))
        return fit(self, loader, *arguments, **settings)

    monkeypatch.setattr(AdversarialTrainer, "fit", spy)
    normalised = ("--mean", ".5", ".5", ".5", "--std", ".25", ".25", ".25", "--image-size", "12", "--workers", "1")
    assert train(*normalised, "--epochs", "1", data="photos", model="tiny_nets:colour") == 0
    assert seen == [["crop", "flip"], 8]
    assert {"mean", "std"} <= weights().keys()
    recommended = capsys.readouterr().out.split("gradprune ")[-1]
    assert "--data photos/val" in recommended
    words = shlex.split(recommended.replace("autoattack", "fgsm"))
    assert main([*words, "--no-compile", "--device", "cpu"]) == 0


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_timm_model_with_other_classes(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.rand(12, 3, 32, 32)
    np.savez("colours.npz", x=x, y=np.arange(12) % 3)
    arguments = ("--classes", "3", "--epochs", "1", "--batch-size", "4", "--validation", "0.5")
    assert train(*arguments, data="colours.npz", model="timm:test_resnet.r160_in1k") == 0
    assert weights()["mean"].shape == (3, 1, 1)
    words = shlex.split(capsys.readouterr().out.split("gradprune ")[-1].replace("autoattack", "fgsm"))
    assert main([*words, "--no-compile", "--device", "cpu"]) == 0
    assert train(*arguments, "--classes", "2", data="colours.npz", model="timm:test_resnet.r160_in1k", output="b") == 2
    assert "from 0 to 2, and the model has 2 classes" in error_of(capsys)


def test_two_processes_train_together(project: Path) -> None:
    source = Path(command.__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*SMALL, "--batch-size", "8", "--no-compile", "--epochs", "1", "--output", "run"]
    done = subprocess.run(
        [*torchrun, "-m", "gradprune", "train", "--model", "tiny_nets:tiny", "--data", "digits", *options],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=project,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in run") == 1
    assert done.stderr.count("epoch 1/1") == 1
    (line,) = (line for line in metrics() if line["kind"] == "epoch")
    assert line["iteration"] == 45 // 8


# Configuration files


def options_of(*arguments: str) -> argparse.Namespace:
    """Parsed options with a model and data."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parsed(effective(vars(parser.parse_args(["--model", "m", "--data", "d", *arguments]))))


def test_flags_win_over_files_and_files_over_defaults(project: Path) -> None:
    config = {"eps": "4/255", "epochs": 7, "batch_size": 9, "set": ["restarts=2"], "tensorboard": True, "lr": "1e-3"}
    Path("some.yaml").write_text(yaml.safe_dump({**config, "grey": False, "warmup": None}))
    options = options_of("--config", "some.yaml", "--epochs", "8")
    assert (options.eps, options.epochs, options.batch_size, options.lr) == (4 / 255, 8, 9, 1e-3)
    assert (options.set, options.tensorboard, options.grey, options.warmup) == ([("restarts", 2)], True, False, None)
    assert (options.objective, options.seed) == ("pgd", 0)


def test_settings_that_were_written_are_read_again() -> None:
    texts = effective({})
    texts.update({"model": "m", "data": "7", "eps": "8/255", "lr": "1e-3", "bounds": ["-1", "1"], "grey": True})
    texts.update({"norm": "l2", "mean": [".5"], "set": ["restarts=2", "loss=dlr"], "std": ["0.25"]})
    command.write_config(Path("config.yaml"), texts)
    again = read_config(Path("config.yaml"))
    assert again.keys() == texts.keys()
    assert all(option.value(again.get(name)) == option.value(texts.get(name)) for name, option in BY_NAME.items())
    assert "eps: 8/255\n" in Path("config.yaml").read_text()
    assert "epochs: 30\n" in Path("config.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("epoch: 3", "no option 'epoch': did you mean 'epochs'"),
        ("epochs: [1, 2]", "epochs has to be a number or a word"),
        ("epochs: {a: 1}", "epochs has to be"),
        ("tensorboard: 3", "tensorboard has to be true or false"),
        ("lr: true", "lr has to be"),
        ("- epochs", "has to hold options"),
        ("epochs: [1", "no YAML"),
        ("epochs: 0", "--epochs: expected a whole number"),
        ("norm: l-inf", "--norm: no choice 'l-inf': did you mean 'linf'"),
    ],
)
def test_files_that_are_not_what_they_should_be(content: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("some.yaml").write_text(content)
    assert train("--config", "some.yaml") == 2
    assert told in error_of(capsys)
    assert not Path("run").exists()


# Errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--config", "nowhere.yaml"), "cannot read --config nowhere.yaml"),
        (("--model", "tiny_nets:nothing"), "has no 'nothing'"),
        (("--data", "nowhere"), "does not exist"),
        (("--objective", "pdg"), "did you mean 'pgd'"),
        (("--objective", "trades", "--gamma", "1"), "--gamma is for --objective awp"),
        (("--objective", "fast"), "--steps is for --objective"),
        (("--beta", "1"), "--beta is for --objective mart or trades, not pgd"),
        (("--optimizer", "adam", "--momentum", ".5"), "--momentum is for --optimizer sgd"),
        (("--milestones", "3"), "--milestones is for --schedule multistep"),
        (("--eps", "0"), "--objective plain"),
        (("--eps", "eight"), "--eps: expected a number"),
        (("--label-smoothing", "1"), "from 0 to below 1"),
        (("--augment", "crop+flop"), "did you mean 'flip'"),
        (("--bounds", "1", "0"), "--bounds has to be a smaller and a larger"),
        (("--set", "restart=2"), "did you mean 'restarts'"),
        (("--evaluate-attack", "pgdd-20"), "no attack 'pgdd'"),
        (("--batch-norm", "separate"), "separate"),
        (("--patience", "1", "--validation", "0"), "patience"),
        (("--classes", "3"), "--classes is for timm"),
        (("--device", "abacus"), "is no device"),
        (("--output", "tiny_nets.py"), "cannot write"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_begun(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*arguments) == 2
    assert told in error_of(capsys)
    assert not Path("run/last.pt").exists()
    assert not Path("run/metrics.jsonl").exists()


def test_a_model_that_does_not_take_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model="tiny_nets:colour") == 1
    assert "does not take the data's inputs of shape (1, 8, 8)" in error_of(capsys)


def test_a_model_and_data_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "digits"]) == 2
    assert "--model is missing" in error_of(capsys)


def test_a_folder_of_another_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--epochs", "1") == 0
    before = {file.name: file.read_bytes() for file in Path("run").iterdir() if file.is_file()}
    assert train("--epochs", "2", "--eps", "0.2", "--schedule", "constant", "--workers", "1") == 2
    message = error_of(capsys)
    assert "--eps was 0.1 and is 0.2; --schedule was cosine and is constant: pass the same" in message
    assert "workers" not in message
    assert {file.name: file.read_bytes() for file in Path("run").iterdir() if file.is_file()} == before
    Path("run/config.yaml").unlink()
    assert train("--epochs", "2") == 2
    assert "no config.yaml" in error_of(capsys)
    assert not Path("run/config.yaml").exists()


@pytest.mark.parametrize("module", ["matplotlib", "tqdm", "yaml", "sklearn", "tensorboard"])
def test_what_is_not_installed_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))
    assert train("--tensorboard") == 1
    assert "pip install" in error_of(capsys)
    assert not Path("run").exists()


# What options stand for


def test_objectives_are_built_of_options() -> None:
    attack = ("--eps", "0.1", "--norm", "l2", "--steps", "3", "--step-size", "eps/2", "--bounds", "-1", "1")
    shared = {"norm": "l2", "eps": 0.1, "steps": 3, "step_size": 0.05, "bounds": (-1.0, 1.0), "seed": None}
    pgd = build_objective(options_of(*attack, "--clean", ".5", "--set", "random_start=false", "restarts=2"))
    assert pgd == PGDTraining(clean=0.5, attack=PGD(**shared, random_start=False, restarts=2))
    trades = build_objective(options_of(*attack, "--objective", "trades", "--beta", "2", "--label-smoothing", ".1"))
    assert trades == TRADES(attack=NearPGD(**shared, loss="kl"), beta=2, label_smoothing=0.1)
    mart = build_objective(options_of(*attack, "--objective", "mart"))
    assert mart == MART(attack=NearPGD(**shared))
    awp = options_of(*attack, "--objective", "awp", "--awp-of", "trades", "--beta", "2", "--gamma", ".01")
    assert build_objective(awp) == AWP(objective=TRADES(attack=NearPGD(**shared, loss="kl"), beta=2), gamma=0.01)
    assert build_objective(options_of("--objective", "free", "--replays", "3")) == Free(
        replays=3, attack=FGSM(eps=8 / 255)
    )
    fast = build_objective(options_of("--objective", "fast", "--eps", "0.1"))
    assert fast == Fast(attack=RSFGSM(eps=0.1))
    assert build_objective(options_of("--objective", "plain")) == Plain()
    assert build_objective(options_of()) == PGDTraining()
    assert build_evaluation(options_of()) is None
    evaluation = build_evaluation(options_of("--eps", "0.1", "--evaluate-attack", "pgd-7", "--seed", "3"))
    assert evaluation == PGD(eps=0.1, step_size=0.025, steps=7, seed=3)


def test_optimizers_have_their_usual_settings() -> None:
    model = nn.Linear(2, 2)
    usual = build_optimizer(options_of(), model)
    assert isinstance(usual, SGD)
    assert {name: usual.defaults[name] for name in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    adam = build_optimizer(options_of("--optimizer", "adamw", "--weight-decay", "0.2"), model)
    assert isinstance(adam, torch.optim.AdamW)
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (1e-3, 0.2)


def rates(scheduler: LRScheduler, updates: int) -> list[float]:
    found = []
    for _ in range(updates):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_schedules_are_those_of_torch() -> None:
    updates, epochs = 10, 4
    total = updates * epochs

    def optimizer() -> SGD:
        return SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    expected = {
        "cosine": rates(CosineAnnealingLR(optimizer(), total), total),
        "multistep": rates(MultiStepLR(optimizer(), [20, 30]), total),
        "constant": [1.0] * total,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its ascent ends one step before that share of them.
        cycle = OneCycleLR(optimizer(), 1.0, total, pct_start=13 / 40, cycle_momentum=False)
        expected["onecycle"] = rates(cycle, total)
    for name, wanted in expected.items():
        own = learning_rate(options_of("--epochs", str(epochs), "--schedule", name), updates)
        assert [own(done) for done in range(total)] == pytest.approx(wanted, abs=1e-6), name
    milestones = options_of("--epochs", "4", "--schedule", "multistep", "--milestones", "1", "2.5")
    assert [round(learning_rate(milestones, updates)(done), 4) for done in (9, 10, 24, 25)] == [1, 0.1, 0.1, 0.01]
    warm = learning_rate(options_of("--epochs", "4", "--schedule", "constant", "--warmup", "0.5"), updates)
    assert [warm(done) for done in (0, 3, 4, 9)] == pytest.approx([0.2, 0.8, 1, 1])
