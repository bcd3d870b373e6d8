"""``gradprune demo``: its command line, its two workloads, and one small run from end to end."""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from gradprune.bench import demo
from gradprune.bench import timing as measure
from gradprune.bench.attack_step import Ball, attack, pgd_step
from gradprune.bench.baselines import COMPILED_MODEL, EAGER_BACKWARD, FROZEN, GRADPRUNE
from gradprune.bench.cases import Case, Workload
from gradprune.bench.demo import CANDIDATES, RESNET_14, RESNET_50, Shown
from gradprune.bench.step import Record
from gradprune.cli import demo as command
from gradprune.cli.main import main
from gradprune.support import files
from gradprune.workloads.digits import Digits, load_digits, train_digits
from gradprune.workloads.networks import DigitsNet, ResNet, calibrated_resnet
from gradprune.workloads.photos import photo_batch, photographs


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def trained(digits: Digits) -> DigitsNet:
    return train_digits(digits)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return calibrated_resnet(RESNET_14, photo_batch(8, 32))


# Command line


def test_help_lists_the_commands_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "backward-graph pruning" in shown
    assert "gradprune demo --output" in shown


def test_help_of_demo_names_every_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--output", "--quick", "--steps", "--batch", "--size", "--rounds", "--threads"):
        assert option in shown
    assert "default: demo-output" in shown
    assert f"default: {command.FULL.size}, quick: {command.QUICK.size}" in " ".join(shown.split())
    for name in CANDIDATES:
        assert name in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("gradprune ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "0"], "from 1 to 1000, got '0'"),
        (["--steps", "many"], "got 'many'"),
        (["--batch", "-1"], "from 1 to 1024, got '-1'"),
        (["--size", "8"], "from 32 to 1024, got '8'"),
        (["--rounds", "1.5"], "got '1.5'"),
        (["--threads", "0"], "from 1 to 1024, got '0'"),
        (["--stpes", "3"], "unrecognized arguments: --stpes"),
    ],
)
def test_a_bad_value_is_named_and_exits_with_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began although the demo could not succeed")

    monkeypatch.setattr(demo, "measure", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("below", ["", "folder"])
def test_an_unwritable_directory_is_refused_before_any_work(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file in its place keeps even root from making the directory.
    file = tmp_path / "file"
    file.write_text("")
    assert main(["demo", "--output", str(file / below)]) == 2
    told = capsys.readouterr().err
    assert str(file) in told
    assert "--output DIR" in told


@pytest.mark.usefixtures("no_work")
def test_a_missing_extra_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "EXTRAS", {"no_such_module": "no-such-package"})
    assert main(["demo", "--output", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "no-such-package" in told
    assert 'pip install "gradprune[demo]"' in told
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_work")
def test_a_missing_compiler_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert main(["demo", "--output", str(tmp_path / "out")]) == 1
    assert "no-compiler" in capsys.readouterr().err


# Photographs and digits


def test_photographs_are_colour_pictures_in_range() -> None:
    pictures = photographs()
    assert len(pictures) >= 2
    for picture in pictures:
        assert picture.dtype is torch.float32
        assert picture.shape[0] == 3
        assert 0 <= picture.min() < 0.2
        assert 0.8 < picture.max() <= 1


def test_a_photo_batch_has_the_shape_and_range_asked_for_and_is_deterministic() -> None:
    batch = photo_batch(12, 48)
    assert batch.shape == (12, 3, 48, 48)
    assert batch.dtype is torch.float32
    assert batch.min() >= 0
    assert batch.max() <= 1
    assert torch.equal(batch, photo_batch(12, 48))


def test_all_photos_of_a_batch_differ() -> None:
    batch = photo_batch(16, 32).flatten(1)
    apart = torch.cdist(batch, batch) + torch.eye(16) * 1e9
    assert apart.min() > 1


def test_photos_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradprune.workloads.photos._from_skimage", list)
    assert len(photographs()) == 2
    assert photo_batch(5, 32).shape == (5, 3, 32, 32)


def test_digits_are_split_without_overlap(digits: Digits) -> None:
    assert len(digits.train_x) + len(digits.test_x) == 1797
    assert digits.test_x.shape[1:] == (1, 8, 8)
    assert digits.test_x.min() == 0
    assert digits.test_x.max() == 1
    train = {image.numpy().tobytes() for image in digits.train_x}
    assert not any(image.numpy().tobytes() in train for image in digits.test_x)


# Networks


def test_resnet_50_is_the_known_network() -> None:
    model = ResNet(RESNET_50).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    strided = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert strided == ["stem.0"] + [
        f"stages.{block}.{part}" for block in (3, 7, 13) for part in ("conv2", "shortcut.0")
    ]


def test_calibration_is_deterministic_and_leaves_sane_activations(resnet: nn.Module) -> None:
    again = calibrated_resnet(RESNET_14, photo_batch(8, 32))
    assert all(
        torch.equal(a, b) for a, b in zip(resnet.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not resnet.training
    with torch.no_grad():
        logits = resnet(photo_batch(8, 32))
    assert 0.01 < logits.std() < 10


def test_making_a_network_leaves_the_global_generator_alone(digits: Digits) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    calibrated_resnet(RESNET_14, photo_batch(1, 32).repeat(2, 1, 1, 1))
    assert torch.equal(torch.rand(1), expected)


def test_digits_network_learns(trained: DigitsNet, digits: Digits) -> None:
    assert not trained.training
    assert any(isinstance(module, nn.BatchNorm2d) for module in trained.modules())
    assert measure.accuracy(trained, digits.test_x, digits.test_y) > 0.95


# Attack


def test_pgd_step_stays_in_the_ball_and_in_range(trained: DigitsNet, digits: Digits) -> None:
    x, y = digits.test_x[:64], digits.test_y[:64]
    eps, step_size = 0.1, 0.07
    x_adv = x.clone()
    for _ in range(3):
        before = x_adv
        x_adv, gradient = pgd_step(trained, Ball(eps, step_size), backward=True)(x_adv, x, y)
        assert gradient.shape == x.shape
        assert (x_adv - before).abs().max() <= step_size + 1e-6
        assert (x_adv - x).abs().max() <= eps + 1e-6
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
    # It did move as far as the ball allows, and not back and forth around the clean images.
    assert (x_adv - x).abs().max() > eps - 1e-6
    assert not x_adv.requires_grad


def test_pgd_fools_the_digits_network(trained: DigitsNet, digits: Digits) -> None:
    x, y = digits.test_x, digits.test_y
    adversarial = attack(pgd_step(trained, Ball(0.2, 0.05), backward=True), x, y, steps=10)
    assert measure.accuracy(trained, adversarial, y) < 0.5
    assert torch.equal(x, digits.test_x)


def test_frozen_parameters_do_not_change_the_gradient(resnet: nn.Module) -> None:
    x = photo_batch(2, 32)
    y = torch.tensor([1, 2])
    live, frozen = copy.deepcopy(resnet), copy.deepcopy(resnet).requires_grad_(False)
    _, full = pgd_step(live, Ball(0.1, 0.1), backward=True)(x.clone(), x, y)
    _, pruned = pgd_step(frozen, Ball(0.1, 0.1), backward=True)(x.clone(), x, y)
    assert full.abs().max() > 0
    torch.testing.assert_close(full, pruned)
    assert all(parameter.grad is not None for parameter in live.parameters())
    assert all(parameter.grad is None for parameter in frozen.parameters())


# Figures


def test_float32_is_close_to_float64(trained: DigitsNet, digits: Digits) -> None:
    x, y = digits.test_x[:16], digits.test_y[:16]
    exact = measure.float64_gradient(trained, x.clone(), x, y)
    assert exact.dtype is torch.float64
    _, gradient = pgd_step(copy.deepcopy(trained), Ball(0.1, 0.1), backward=True)(x.clone(), x, y)
    assert max(measure.relative_errors(gradient, exact)) < 1e-4
    largest, euclidean = measure.relative_errors(2 * exact.float(), exact)
    assert largest == pytest.approx(1, abs=1e-5)
    assert euclidean == pytest.approx(1, abs=1e-5)
    assert next(trained.parameters()).dtype is torch.float32


def test_flops_and_saved_bytes_of_one_linear_layer() -> None:
    batch, inputs, outputs = 4, 32, 8
    live = nn.Linear(inputs, outputs)
    frozen = copy.deepcopy(live).requires_grad_(False)
    x, y = torch.rand(batch, inputs), torch.zeros(batch, dtype=torch.long)
    one = 2 * batch * inputs * outputs
    assert measure.flops(pgd_step(live, Ball(1, 1), backward=True), x.clone(), x, y) == 3 * one
    assert measure.flops(pgd_step(frozen, Ball(1, 1), backward=True), x.clone(), x, y) == 2 * one
    # The layer saves its weight and the image batch, which are alive anyway; the loss log-probabilities and a scalar.
    assert (
        measure.saved_bytes(pgd_step(frozen, Ball(1, 1), backward=True), frozen, x.clone(), x, y)
        == batch * outputs * 4 + 4
    )


def test_differing_share() -> None:
    first = torch.zeros(4)
    assert measure.differing_share(first, torch.tensor([0, 1e-7, 1e-3, 1])) == 0.5


# Output


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    files.write_text(path, "first")

    def fail() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file.txt"]


def shown(reports: list[dict[str, object]]) -> Shown:
    x = torch.zeros(1, 1, 2, 2)
    case = Case("some", 1, (1, 2, 2), nn.Identity, eps=8 / 255, step_size=2 / 255)
    seconds = {EAGER_BACKWARD: 0.3, FROZEN: 0.2, COMPILED_MODEL: 0.4, GRADPRUNE: 0.1}
    records = [
        Record("some-b1", name, seconds=[t], cold_seconds=None if "eager" in name else 10.0, flops=2 * 10**9)
        for name, t in seconds.items()
    ]
    work = Workload(case, nn.Flatten(), x, torch.zeros(1, dtype=torch.long))
    return Shown("title", "Note.", work, steps=10, records=records, reports=reports)


def test_table_names_candidates_ratios_and_break_even() -> None:
    report = {
        "flops": {"before": {"weight_grad": 10**9}, "after": {"weight_grad": 0}},
        "saved_bytes": {"before": 2 * 10**6, "after": 10**6},
        "fallback": None,
    }
    text = "\n".join(demo.section(shown([report])))
    row = next(line for line in text.splitlines() if line.startswith(f"| {GRADPRUNE}")).split("|")[1:7]
    assert [cell.strip() for cell in row] == [GRADPRUNE, "10", "100.0", "0", "3.00x", "2.00x"]
    assert "weight gradients 1 -> 0 GFLOP" in text
    assert "saved for backward 2 -> 1 MB" in text
    assert "after 100 steps" in text
    assert "eps 8/255" in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1


def test_table_says_when_there_is_no_single_graph_or_a_fallback() -> None:
    assert "compiled 0 graphs" in demo.section(shown([]))[-2]
    counts = {"before": {"weight_grad": 0}, "after": {"weight_grad": 0}}
    fallen = {"flops": counts, "saved_bytes": {"before": 0, "after": 0}, "fallback": "a reason"}
    assert any("fell back: a reason" in line for line in demo.section(shown([fallen])))


@pytest.mark.slow
def test_a_quick_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--quick", "--steps", "2", "--rounds", "1", "--size", "32", "--threads", "1"]
    assert main(["demo", "--output", str(tmp_path), *options]) == 0
    assert torch.get_num_threads() == threads
    assert sorted(os.listdir(tmp_path)) == ["demo.json", "demo.md", "demo.png"]

    printed = capsys.readouterr().out
    for name in CANDIDATES:
        assert sum(line.startswith(f"| {name} ") for line in printed.splitlines()) == 2
    assert printed.splitlines()[-3].startswith(f"Saved in {tmp_path}")

    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["settings"] == {"steps": 2, "batch": command.QUICK.batch, "size": 32, "rounds": 1}
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["threads"] == 1
    for workload in written["workloads"]:
        by_name = {candidate["candidate"]: candidate for candidate in workload["candidates"]}
        assert tuple(by_name) == CANDIDATES
        eager, frozen, ours = by_name[EAGER_BACKWARD], by_name[FROZEN], by_name[GRADPRUNE]
        (report,) = workload["reports"]
        assert report["form"] == "step"
        assert report["fallback"] is None
        assert report["flops"]["after"]["weight_grad"] == 0
        assert ours["flops"] == frozen["flops"] < eager["flops"]
        assert ours["saved_bytes"] < eager["saved_bytes"]
        assert eager["weight_gradients"] > 0
        assert frozen["weight_gradients"] == ours["weight_gradients"] == 0
        # At least as close to float64 as four times what eager manages; ReLU ties alone can cost a few percent.
        assert ours["gradient_error_l2"] < max(4 * eager["gradient_error_l2"], 0.05)
        assert 1 - ours["success_rate"] < workload["clean_accuracy"]
    assert written["workloads"][1]["clean_accuracy"] > 0.8

    document = (tmp_path / "demo.md").read_text()
    assert document.count(f"| {GRADPRUNE} ") == 2
    assert "## Environment" in document

    assert "In the background" in document
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 500
    assert height > 500
