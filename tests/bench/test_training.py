"""``gradprune bench training``: its arithmetic, its checks, its files, and small runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradprune.bench import training
from gradprune.bench.baselines import GRADPRUNE
from gradprune.bench.cases import SMALL_RESNET, TINY, Case, Workload, find_case
from gradprune.bench.harness import Budget, CheckFailed
from gradprune.bench.store import Results, Settings
from gradprune.bench.training import (
    COMPILED_GRADIENT,
    COMPILED_TRAINING,
    EAGER_TRAINING,
    FROZEN_TRAINING,
    Iteration,
    Reference,
    Trained,
    Trainee,
    TrainingBenchmark,
)
from gradprune.cli import bench as command
from gradprune.cli.main import main

HERE = {"cpu": "A processor", "blas": "mkl", "onednn": "3", "torch": "2"}
EAGER = (EAGER_TRAINING, FROZEN_TRAINING)
CASE = "tiny-b1"
STEPS = (1, 2)


def small() -> nn.Module:
    """With batch norm, so that the mode of the model matters."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


@pytest.fixture(scope="module")
def work() -> Workload:
    return Case("small", 8, (3, 8, 8), small).prepare()


@pytest.fixture(scope="module")
def batch(work: Workload) -> tuple[Tensor, Tensor]:
    return training.draw_batches(work)[0]


@pytest.fixture(scope="module")
def reference(work: Workload, batch: tuple[Tensor, Tensor]) -> Reference:
    return Reference.of(work, *batch, STEPS, Settings())


# Arithmetic, files, tables


def timed(steps: int, candidate: str, *seconds: float, **more: Any) -> Trained:
    errors = {"loss_error": 1e-7, "update_error": 2e-5, "eager_loss_error": 3e-7, "eager_update_error": 4e-5}
    return Trained(CASE, steps, candidate, seconds=list(seconds), load=1.0, peak_bytes=10**6, **errors, **more)


RECORDS = [
    timed(7, EAGER_TRAINING, 4.0, 4.0, 4.0, recompilations=0),
    timed(7, FROZEN_TRAINING, 3.0, 3.0, 3.0, recompilations=0),
    timed(7, COMPILED_TRAINING, 2.5, 2.5, 2.5, compile_seconds=9.0, recompilations=0),
    Trained(CASE, 7, COMPILED_GRADIENT, failed="a reason"),
    timed(7, GRADPRUNE, 2.0, 1.0, 2.0, compile_seconds=12.5, recompilations=3),
    timed(1, EAGER_TRAINING, 1.0),
    Trained(CASE, 1, GRADPRUNE, failed="another reason"),
]


def file(folder: Path, records: Sequence[Trained] = ()) -> Results[Trained]:
    return Results(folder / "training.json", Trained, Settings(), HERE, [*records])


def test_an_iteration_is_one_number_of_steps_on_one_case() -> None:
    one, seven = Iteration.all(RECORDS, CASE)
    assert (one.steps, seven.steps) == (1, 7)
    assert Iteration.all(RECORDS, "another") == []
    assert (one.predicted_ratio, seven.predicted_ratio) == (1.2, 48 / 34)
    assert seven.best_alternative == COMPILED_TRAINING
    assert one.best_alternative is None
    ratio = seven.ratio(GRADPRUNE, EAGER_TRAINING)
    assert ratio is not None
    assert ratio.median == 2.0
    assert seven.ratio(GRADPRUNE, COMPILED_GRADIENT) is None
    assert one.ratio(GRADPRUNE, one.best_alternative) is None
    derived = seven.derived(GRADPRUNE)
    assert (derived["median_seconds"], derived["best_alternative"]) == (2.0, COMPILED_TRAINING)
    assert derived["ratios"][FROZEN_TRAINING]["median"] == 1.5
    assert one.derived(GRADPRUNE) == {}


def test_records_survive_the_file(tmp_path: Path) -> None:
    written = file(tmp_path)
    written.add(RECORDS)
    assert Results.read(written.path, Trained) == written
    content = json.loads(written.path.read_text())
    assert content["records"][4]["derived"]["predicted_ratio"] == 48 / 34
    assert content["records"][3]["derived"] == {}


def test_tables_show_what_was_measured_and_what_failed(tmp_path: Path) -> None:
    text = command.write(TrainingBenchmark(), file(tmp_path, RECORDS))
    lines = text.splitlines()

    def row(start: str) -> list[str]:
        (line,) = (line for line in lines if line.startswith(f"| {start} "))
        return [cell.strip() for cell in line.split("|")[1:-1]]

    best = f"2.5 {COMPILED_TRAINING}"
    assert row(f"{CASE}, 7 steps")[1:] == ["2", "1.41x", "2.00x (2.00-3.00)", best, "1.25x (1.25-1.88)"]
    assert row(f"{CASE}, 1 step")[1:] == ["-", "1.20x", "-", "-", "-"]
    assert row(f"7, {GRADPRUNE}")[1:8] == ["2", "0.5", "2.00x", "1.50x", "1.25x", "-", "1.41x"]
    assert row(f"7, {GRADPRUNE}")[8:] == ["12.5", "3", "1", "1e-07", "3e-07", "2e-05", "4e-05"]
    assert row(f"7, {EAGER_TRAINING}")[7:9] == ["-", "-"]
    assert f"**{COMPILED_GRADIENT} failed:** a reason" in lines
    assert "labels are random" in text


def test_the_plot_has_a_line_for_everybody_and_one_for_the_prediction(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = file(tmp_path, RECORDS)
    command.write(TrainingBenchmark(), results)
    assert (tmp_path / "training.png").stat().st_size > 10_000
    times, ratios = TrainingBenchmark().draw(results).axes
    assert len(times.lines) == 4
    assert [len(line.get_xdata()) for line in times.lines] == [2, 1, 1, 1]
    assert len(ratios.lines) == 4
    assert ratios.lines[-1].get_ydata() == pytest.approx([1.2, 48 / 34])


@pytest.mark.skipif(find_spec("timm") is None, reason="the network comes from timm")
def test_the_small_resnet_keeps_all_pixels() -> None:
    assert find_case("resnet18-32") == SMALL_RESNET
    network = SMALL_RESNET.build()
    shapes = []
    network.layer1.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert shapes == [(1, 64, 32, 32)]


# What is checked


def test_a_float64_iteration_is_that_of_the_textbook(
    work: Workload, batch: tuple[Tensor, Tensor], reference: Reference
) -> None:
    exact = dataclasses.replace(work, model=find_double(work))
    x, y = batch[0].double(), batch[1]
    trainee = training.by_hand("float64", frozen=False)(exact, Settings())
    for steps in STEPS:
        trainee.restore(exact)
        outcome = training.Outcome.of(trainee.model, lambda steps=steps: trainee.iterate(x, y, steps))
        assert max(outcome.errors(reference.exact[steps])) < 1e-9
    assert reference.exact[1].loss > reference.exact[0].loss
    assert all(0 < error < 1e-3 for error in reference.eager_errors(1))


def find_double(work: Workload) -> nn.Module:
    double = small().double()
    double.load_state_dict(work.model.state_dict())
    return double


@pytest.mark.parametrize("name", EAGER)
def test_baselines_pass(name: str, work: Workload, batch: tuple[Tensor, Tensor], reference: Reference) -> None:
    trainee = training.WAYS[name](work, Settings())
    before = {key: value.clone() for key, value in work.model.state_dict().items()}
    for steps in (2, 1, 1):
        trainee.restore(work)
        outcome = training.Outcome.of(trainee.model, lambda steps=steps: trainee.iterate(*batch, steps))
        reference.check(outcome, steps)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trainee.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in work.model.state_dict().items())


def wrong(kind: str) -> training.Build:
    """An iteration with a mistake in it."""

    def build(work: Workload, settings: Settings) -> Trainee:
        right = training.by_hand(kind)(work, settings)

        def iterate(x: Tensor, y: Tensor, steps: int) -> Tensor:
            if kind == "without attack":
                return right.iterate(x, y, 0)
            if kind == "one step too many":
                return right.iterate(x, y, steps + 1)
            if kind == "updates twice":
                right.iterate(x, y, steps)
            if kind == "learns in evaluation mode":
                norm = right.model[1]  # type: ignore[index]
                assert isinstance(norm, nn.BatchNorm2d)
                norm.train = lambda mode=True: norm  # type: ignore[method-assign, misc, assignment]
            loss = right.iterate(x, y, steps)
            return loss + 0.1 if kind == "another loss" else loss

        return dataclasses.replace(right, iterate=iterate)

    return build


MISTAKES = ("without attack", "one step too many", "updates twice", "learns in evaluation mode", "another loss")


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_computes_something_else_fails(
    kind: str, work: Workload, batch: tuple[Tensor, Tensor], reference: Reference
) -> None:
    trainee = wrong(kind)(work, Settings())
    outcome = training.Outcome.of(trainee.model, lambda: trainee.iterate(*batch, 1))
    with pytest.raises(CheckFailed, match="off by"):
        reference.check(outcome, 1)


def test_what_fails_is_not_timed(tmp_path: Path, work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(work: Workload, settings: Settings) -> Trainee:
        raise ValueError("no such thing\nin detail")

    monkeypatch.setattr(training, "start_compiler", lambda: None)
    ways = {"right": training.by_hand("right"), "without attack": wrong("without attack"), "broken": broken}
    monkeypatch.setattr(training, "WAYS", ways)
    results = file(tmp_path)
    training.measure_training(results, [work.case], [2], Budget(2))
    right, failed, raised = results.records
    assert isinstance(right, Trained)
    assert (right.failed, len(right.seconds)) == (None, 2)
    assert isinstance(failed, Trained)
    assert failed.failed is not None
    assert failed.failed.endswith("allowed are 0.10%")
    assert failed.seconds == []
    assert isinstance(raised, Trained)
    assert raised.failed == "ValueError: no such thing"


# Whole runs


def run(output: Path, *more: str) -> int:
    options = ["--cases", "tiny-b8", "--threads", "1", "--rounds", "2", "--attack-steps"]
    return main(["bench", "training", "--output", str(output), *options, *more])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, apart from what gradprune compiles of an attack."""
    compile = torch.compile

    def compiled(*args: Any, **options: Any) -> Any:
        return compile(*args, **{"backend": "aot_eager", **options})

    monkeypatch.setattr(torch, "compile", compiled)


@pytest.mark.usefixtures("quick")
def test_a_run_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    assert run(tmp_path, "1", "2") == 0
    assert (tmp_path / "training.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "training.png").exists()
    results = Results.read(tmp_path / "training.json", Trained)
    keys = [(one.case, one.steps, one.candidate) for one in results.records if isinstance(one, Trained)]
    assert keys == [("tiny-b8", steps, name) for steps in STEPS for name in training.WAYS]
    for one in results.records:
        assert isinstance(one, Trained)
        assert one.failed is None
        assert (len(one.seconds), one.recompilations) == (2, 0)
        assert (one.compile_seconds is None) == (one.candidate in EAGER)
        assert one.peak_bytes is not None
        assert one.peak_bytes > 0
        for error, allowed in ((one.loss_error, one.loss_tolerance), (one.update_error, one.update_tolerance)):
            assert error is not None
            assert allowed is not None
            assert error <= allowed

    # The same again has nothing left to do; one number of steps more is measured alone.
    asked = []

    def measured(results: Results[Trained], case: Case, steps: Sequence[int], budget: Budget) -> None:
        asked.append((case.name, steps))

    monkeypatch.setattr(training, "measure_case", measured)
    assert run(tmp_path, "1", "2") == 0
    assert "tiny-b8: already in" in capsys.readouterr().err
    assert run(tmp_path, "3", "2") == 0
    assert asked == [("tiny-b8", [3])]


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "1", "--autocast", "fp16") == 2
    assert "pass bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recompilations_are_counted(work: Workload, batch: tuple[Tensor, Tensor]) -> None:
    recompilations = training.Recompilations()
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)

    def iterate(x: Tensor, y: Tensor, steps: int) -> Tensor:
        compiled(x[:steps])
        return x.sum()

    trainee = dataclasses.replace(training.by_hand("one")(work, Settings()), iterate=iterate)
    for steps in (1, 1, 2, 2, 1):
        recompilations.count(trainee, *batch, steps)
    assert recompilations.graphs == {"one": 2}


def test_the_tiny_case_can_be_trained_on() -> None:
    labels = [y for _, y in training.draw_batches(dataclasses.replace(TINY, batch=4).prepare())]
    assert len(labels) == training.BATCHES
    assert len(torch.cat(labels).unique()) > 5
