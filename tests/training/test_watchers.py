"""What watchers show and write, told by hand what happens in a training."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradprune.attacks import PGD
from gradprune.errors import GradpruneError, OptionError
from gradprune.training import watchers as watch
from gradprune.training.watchers import Curves, JsonLines, Progress, Start, TensorBoard, Watcher, read_metrics

BATCHES = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Restless(Net):
    """A model that cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            raise ValueError("not here")
        return super().forward(x)


def start_in(folder: Path | None, **changes: Any) -> Start:
    start = Start(
        folder=folder,
        epochs=3,
        batches=BATCHES,
        epoch=0,
        iteration=0,
        model=Net(),
        example=torch.rand(2, 3, 8, 8),
        attack=PGD(eps=0.1, step_size=0.05, steps=2, seed=0),
    )
    return replace(start, **changes)


def figures(iteration: int, **changes: Any) -> dict[str, Any]:
    record = {
        "epoch": (iteration - 1) // BATCHES,
        "iteration": iteration,
        "updates": iteration,
        "loss": 2.5 / iteration,
    }
    return {**record, "accuracy": 0.5, "lr": 0.1, "eps": 0.1, "samples": 8, "seconds": 0.25, **changes}


def epoch_of(iteration: int, **changes: Any) -> dict[str, Any]:
    ended = {"epoch": iteration // BATCHES, "clean": 0.75, "robust": iteration / 100, "best": True}
    return {**figures(iteration), **ended, **changes}


def follow(watchers: list[Watcher], start: Start, last: int = 3 * BATCHES, **changes: Any) -> None:
    """A run from where it starts up to a batch, with an epoch behind every sixth."""
    for watcher in watchers:
        watcher.begin(start)
    for iteration in range(start.iteration + 1, last + 1):
        for watcher in watchers:
            watcher.iteration(figures(iteration))
            if iteration % BATCHES == 0:
                watcher.epoch(epoch_of(iteration, **changes))
    for watcher in watchers:
        watcher.end()


# JSON lines


def test_a_line_for_every_epoch_and_every_other_iteration(tmp_path: Path) -> None:
    follow([JsonLines(every=2)], start_in(tmp_path), last=7)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["iteration"]) for line in lines] == [
        ("iteration", 2),
        ("iteration", 4),
        ("iteration", 6),
        ("epoch", 6),
    ]
    assert lines[3] == {"kind": "epoch", **epoch_of(6)}


@pytest.mark.parametrize("saved", [4, 6, 7, 12])
def test_lines_beyond_the_checkpoint_are_written_again(tmp_path: Path, saved: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    follow([JsonLines(every=1)], start_in(whole))
    follow([JsonLines(every=1)], start_in(parts), last=14)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "iter')  # where it was killed
    follow([JsonLines(every=1)], start_in(parts, epoch=saved // BATCHES, iteration=saved))
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_the_end_of_an_epoch_that_was_not_saved_is_written_again(tmp_path: Path) -> None:
    """A checkpoint behind the last batch of an epoch, but before its evaluation."""
    follow([JsonLines(every=1)], start_in(tmp_path), last=6)
    JsonLines(every=1).begin(start_in(tmp_path, epoch=0, iteration=6))
    assert [line["kind"] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["iteration"] * 6


def test_a_run_that_starts_anew_has_a_file_of_its_own(tmp_path: Path) -> None:
    follow([JsonLines(every=1)], start_in(tmp_path), last=6)
    follow([JsonLines(every=1)], start_in(tmp_path), last=2)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_watcher_that_writes_needs_a_folder() -> None:
    for watcher in (JsonLines(), TensorBoard()):
        with pytest.raises(OptionError, match="folder"):
            watcher.begin(start_in(None))
        watcher.end()


# Curves


@pytest.mark.parametrize(
    ("every", "changes"),
    [
        (2, {}),
        (100, {}),
        (2, {"clean": None, "robust": None, "best": False}),
        (2, {"robust": None}),
        (2, {"eps": None}),
    ],
)
def test_curves_are_drawn_whatever_is_known(tmp_path: Path, every: int, changes: dict[str, Any]) -> None:
    follow([JsonLines(every), Curves()], start_in(tmp_path), **changes)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_curves_show_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(watch, "save_figure", lambda figure, path: drawn.append(figure))
    lines = [{"kind": "iteration", **figures(i, eps=i / 100)} for i in range(1, 13)]
    watch.draw_curves(tmp_path, [*lines, *({"kind": "epoch", **epoch_of(i)} for i in (6, 12))])
    loss, accuracy, schedule, radius = drawn[0].axes
    assert loss.lines[0].get_ydata().tolist() == [2.5 / i for i in range(1, 13)]
    assert loss.lines[0].get_xdata()[-1] == 2
    by_label = {line.get_label(): line for line in accuracy.lines}
    assert list(by_label["robust"].get_ydata()) == [6, 12]
    assert list(by_label["clean"].get_ydata()) == [75, 75]
    assert list(by_label["best: 12.0% in epoch 2"].get_xdata()) == [2]
    assert list(schedule.lines[0].get_ydata()) == [0.1] * 12
    assert radius.lines[0].get_ydata()[-1] == pytest.approx(0.12)


# TensorBoard


def events(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    read.Reload()
    return read


def test_tensorboard_has_figures_examples_and_graph(tmp_path: Path) -> None:
    start = start_in(tmp_path)
    start.model.train()
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    numbers = torch.get_rng_state()
    follow([TensorBoard(every=3)], start)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())
    assert all(module.training for module in start.model.modules())
    read = events(tmp_path)
    assert [(event.step, event.value) for event in read.Scalars("training/loss")] == [
        (i, pytest.approx(2.5 / i)) for i in range(3, 19, 3)
    ]
    assert [event.step for event in read.Scalars("validation/accuracy")] == [6, 12, 18]
    assert read.Scalars("validation/robust accuracy")[1].value == pytest.approx(0.12)
    assert {"training/accuracy", "training/learning rate", "training/eps"} <= set(read.Tags()["scalars"])
    assert "Conv2d" in str(read.Graph())
    kinds = ("original", "adversarial", "perturbation")
    panels = {kind: read.Images(f"examples/{kind}") for kind in kinds}
    assert {kind: len(images) for kind, images in panels.items()} == dict.fromkeys(kinds, 3)
    assert len({images[0].encoded_image_string for images in panels.values()}) == 3


def test_a_network_that_cannot_be_traced_has_no_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow([TensorBoard()], start_in(tmp_path, model=Restless()), last=6)
    assert capsys.readouterr().out == ""
    read = events(tmp_path)
    assert not read.Tags()["graph"]
    assert read.Scalars("validation/accuracy")


def test_without_examples_there_are_figures(tmp_path: Path) -> None:
    follow([TensorBoard()], start_in(tmp_path, example=None, attack=None), last=6, clean=None, robust=None)
    assert events(tmp_path).Tags()["scalars"] == []
    follow([TensorBoard(every=1)], start_in(tmp_path, example=torch.rand(2, 5), attack=None), last=6)
    assert events(tmp_path).Tags()["images"] == []


def test_figures_beyond_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    follow([TensorBoard(every=1)], start_in(tmp_path), last=11)
    follow([TensorBoard(every=1)], start_in(tmp_path, epoch=1, iteration=7))
    assert [event.step for event in events(tmp_path).Scalars("training/loss")] == list(range(1, 19))


def test_a_missing_tensorboard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with pytest.raises(GradpruneError, match=r"pip install .*training"):
        TensorBoard()


# Progress


def test_one_line_an_epoch_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow([Progress()], start_in(tmp_path, epoch=1, iteration=6), clean=0.5, best=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"going on from {tmp_path}: 1 epochs done"
    assert lines[1] == "epoch 2/3: loss 0.208, accuracy 50.0%, clean 50.0%, robust 12.0%, lr 0.1, 0.2 s"
    assert len(lines) == 3


def test_a_bar_for_each_epoch_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    follow([Progress()], start_in(tmp_path, epoch=1, iteration=8), robust=None)
    shown = terminal.getvalue()
    assert "epoch 2/3" in shown
    assert "6/6" in shown
    assert "clean 75.0%, lr 0.1, best" in shown
    assert "robust" not in shown
