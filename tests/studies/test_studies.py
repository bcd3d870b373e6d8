"""Every study at toy scale, and what each computes on the way."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gradprune
from gradprune.attacks import Runtime
from gradprune.cli.main import main
from gradprune.errors import OptionError, TrainingError
from gradprune.studies import lottery, robustness, usefulness
from gradprune.studies.context import Context, Options
from gradprune.studies.convolution import UnfoldConv2d
from gradprune.studies.data import Images, load_images
from gradprune.studies.lottery import LotteryStudy, pruned
from gradprune.studies.networks import BinaryNet, TicketNet
from gradprune.studies.page import write_pages
from gradprune.studies.records import read_lines
from gradprune.studies.registry import STUDIES
from gradprune.studies.robustness import RobustnessStudy
from gradprune.studies.usefulness import UsefulnessStudy, Votes
from gradprune.studies.vision import Attention, Block, build, resnet18
from gradprune.studies.written import as_written


def figures(folder: Path) -> list[Any]:
    return [(line["cell"], line["figures"]) for line in read_lines(folder / "record.jsonl")[1:]]


def test_all_studies_and_their_index(tmp_path: Path) -> None:
    options = ("--scale", "toy", "--eager", "--data", "digits", "--output", str(tmp_path), "--no-tensorboard")
    assert main(["study", "all", *options]) == 0
    page, text = (tmp_path / "index.html").read_text(), (tmp_path / "index.md").read_text()
    named = re.findall(r'<img src="([^"]+)"', page)
    for name, study in STUDIES.items():
        own = [file for file in named if file.startswith(f"{name}-eager/")]
        assert own
        assert all((tmp_path / file).stat().st_size > 5000 for file in own)
        assert f"## {study.title}" in text
        outcome = json.loads((tmp_path / f"{name}-eager" / "outcome.json").read_text())
        assert outcome["claims"]
        assert outcome["tables"]
        for table in outcome["tables"]:
            assert all(len(row) == len(table["head"]) for row in table["rows"])
    assert not list(tmp_path.rglob("*.pt"))


# --- Usefulness -------------------------------------------------------------------------------------------------------


def test_votes_and_usefulness() -> None:
    net = BinaryNet((1, 8, 8), 2, 3, 5)
    x, y = torch.rand(7, 1, 8, 8), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    votes = Votes(net)(x)
    features, weight = net.features(x), net.classifier.weight[0]
    assert torch.allclose(net(x)[:, 1], (features * weight).sum(1) + net.classifier.bias)
    expected = (2 * y - 1)[:, None] * (2 * (features * weight).sigmoid() - 1)
    assert torch.allclose(usefulness.usefulness(votes, y), expected, atol=1e-6)
    for feature in range(5):
        lost = usefulness.lost(votes, 2 * feature + y)
        assert torch.allclose(-lost, expected[:, feature], atol=1e-6)


def test_features_attacked_together_are_those_attacked_one_by_one(tmp_path: Path) -> None:
    scale = usefulness.Scale(rows=6, features=5)
    net = BinaryNet((1, 8, 8), 2, 3, 5)
    with torch.no_grad():
        net.classifier.weight.mul_(20)
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    images = Images("noise", 2, x, y, x, y)
    context = Context.open("usefulness", Options(tmp_path), images, scale)
    context.runtime = lambda batch: Runtime(compile=False, batch_size=batch)  # type: ignore[method-assign]
    votes = Votes(net).eval()
    for attack in usefulness.attacks(scale).values():
        together = UsefulnessStudy()._worst(context, scale, votes, attack, x, y, range(5))
        one_by_one = usefulness.one_by_one(votes, as_written(attack), x, y, range(5))
        assert torch.allclose(together, one_by_one, atol=1e-5)
        assert bool((together < usefulness.usefulness(votes(x), y)).any())


# --- Lottery ----------------------------------------------------------------------------------------------------------


def test_the_smallest_of_the_weights_left_are_pruned() -> None:
    weight = torch.tensor([[0.1, -5.0, 0.0, 2.0], [3.0, -0.2, 0.3, 4.0]])
    mask = torch.ones(2, 4)
    mask[0, 1] = 0  # gone already, however large
    assert pruned(weight, mask, 0.5).tolist() == [[0, 0, 0, 1], [1, 0, 0, 1]]


def lottery_run(folder: Path, images: Images, **settings: Any) -> Any:
    scale = lottery.Scale(100, 40, rounds=3, share=0.5, epochs=1, batch=20, neurons=(16, 8))
    return LotteryStudy().run(Options(folder, "toy", tensorboard=False, **settings), images, scale)


def test_no_round_recompiles_and_results_are_those_of_eager(tmp_path: Path) -> None:
    images = load_images("digits", tmp_path)
    compiled, eager = (lottery_run(tmp_path, images, eager=eager) for eager in (False, True))
    runs = [line["run"] for line in read_lines(tmp_path / "lottery" / "record.jsonl")[1:]]
    assert [run["graphs"] for run in runs] == [1, 0, 0, 0, 0, 0]
    assert all(run["weight_gradient_flops"] == 0 < run["input_gradient_flops"] for run in runs)
    assert compiled.run["times_as_fast"] > 0
    assert eager.run["graphs"] == 0
    both = zip(figures(tmp_path / "lottery"), figures(tmp_path / "lottery-eager"), strict=True)
    for (key, ours), (other, theirs) in both:
        assert key == other
        for way in lottery.COLORS:  # of 40 images, rounding may turn a few
            assert ours[way] == pytest.approx(theirs[way], abs=0.08)
    write_pages(tmp_path, ["lottery"])
    (row,) = (line for line in (tmp_path / "index.md").read_text().splitlines() if line.startswith("| lottery |"))
    assert f"{eager.run['seconds']:.0f}" in row.split(" | ")


def test_rounds_go_on_where_they_were_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images("digits", tmp_path)
    lottery_run(tmp_path / "whole", images, eager=True)
    write = lottery.write_masks
    calls: list[int] = []

    def interrupted(context: Context, training: str, masks: dict[int, list[Tensor]]) -> None:
        calls.append(1)
        if len(calls) in (2, 4):  # before the masks of a round are kept, and behind it
            raise KeyboardInterrupt
        write(context, training, masks)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(lottery, "write_masks", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            lottery_run(tmp_path / "parts", images, eager=True)
    lottery_run(tmp_path / "parts", images, eager=True)
    assert figures(tmp_path / "parts/lottery-eager") == figures(tmp_path / "whole/lottery-eager")
    shares = [one["left"] for _, one in figures(tmp_path / "parts/lottery-eager")]
    assert shares == pytest.approx([1, 0.5, 0.25] * 2, rel=0.01)


def test_lost_masks_are_an_error(tmp_path: Path) -> None:
    images = load_images("digits", tmp_path).only(20, 20)
    context = Context.open("lottery", Options(tmp_path), images, None)
    with pytest.raises(TrainingError, match="masks-normal"):
        lottery.read_masks(context, "normal", 1)


def test_masked_weights_stay_away() -> None:
    net = TicketNet((1, 4, 4), 3, (6, 5))
    lottery.set_masks(net, [torch.zeros_like(mask) for mask in net.masks])
    assert torch.equal(net(torch.rand(2, 1, 4, 4)), net.layers[-1].bias.expand(2, 3))
    assert all(isinstance(layer, nn.Linear) for layer in net.layers)


# --- Data -------------------------------------------------------------------------------------------------------------


def test_the_best_digits_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    images = load_images(None, tmp_path)
    assert images.name == "1,797 digits (scikit-learn)"
    assert images.shape == (1, 8, 8)
    assert len(images.only(7, 3).train_x) == 7


def test_photographs_of_a_folder_or_a_rehearsal(tmp_path: Path) -> None:
    for label in ("cats", "dogs"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(5):
            pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "pets" / label / f"{number}.png")
    study, scale = RobustnessStudy(), robustness.Scale(16, 2, (3, 2), train=5, test=2)
    images = study.load(str(tmp_path / "pets"), tmp_path, scale)
    assert (images.name, images.classes, images.shape) == ("pets", 2, (3, 16, 16))
    assert (len(images.train_x), len(images.test_x)) == (5, 2)
    rehearsal = study.load("digits", tmp_path, scale)
    assert "rehearsal" in rehearsal.name
    assert rehearsal.train_x.shape == (6, 3, 16, 16)
    assert sorted(rehearsal.test_y.tolist()) == [0, 0, 1, 1]
    assert 0 <= float(rehearsal.train_x.min()) < float(rehearsal.train_x.max()) <= 1
    with pytest.raises(OptionError, match="did you mean 'vit'"):
        study.run(Options(tmp_path, "toy", arch=("vet",), eager=True, tensorboard=False), rehearsal, scale)


# --- Robustness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", robustness.GEOMETRIES, ids=str)
def test_own_convolution_is_torchs(geometry: tuple[int, int, int, int, int]) -> None:
    inputs, outputs, kernel, stride, padding = geometry
    own = UnfoldConv2d(inputs, outputs, kernel, stride, padding).double()
    x = torch.randn(2, inputs, 11, 12, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.conv2d(x, own.weight, own.bias, stride, padding)
    wanted = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(result, [x, own.weight, own.bias], wanted) for result in (own(x), expected))
    assert torch.allclose(own(x), expected, rtol=0, atol=1e-10)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-10)


def test_own_convolution_computes_what_is_needed_and_an_attack_through_it_is_pruned() -> None:
    net = nn.Sequential(UnfoldConv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x, y = torch.rand(2, 3, 6, 6), torch.tensor([1, 4])
    (gradient,) = torch.autograd.grad(net(x.requires_grad_(True)).square().sum(), x)
    assert gradient.shape == x.shape
    assert net[0].weight.grad is None

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_(True)
        nn.functional.cross_entropy(net(x_adv), y).backward()
        assert x_adv.grad is not None
        return x_adv.detach() + 0.1 * x_adv.grad.sign()

    report = gradprune.explain(step, x.detach().clone(), x.detach(), y)
    assert report.flops["after"]["weight_grad"] == 0
    assert sum(report.flops["after"].values()) < sum(report.flops["before"].values())


def test_windowed_attention_does_not_look_outside_of_a_window() -> None:
    torch.manual_seed(0)
    local, everywhere = Attention(16, 2, 2), Attention(16, 2, None)
    x = torch.randn(1, 4, 4, 16)
    changed = x.clone()
    changed[0, 0, 0] += 1
    for attention, touched in ((local, 4), (everywhere, 16)):
        moved = (attention(x) - attention(changed)).abs().amax(-1)[0] > 1e-6
        assert int(moved.sum()) == touched
    assert moved.all()


def test_stochastic_depth_is_idle_in_evaluation_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = Block(16, 2, 2, 0.5)
    ones = torch.ones(4000, 1, 1, 16)
    assert torch.equal(block.eval()._dropped(ones), ones)
    dropped = block.train()._dropped(ones)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.1)


def test_a_checkpoint_of_resnet18_is_fine_tuned(tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    whole = resnet18(1000)
    torch.save(whole.state_dict(), tmp_path / "resnet18.pt")
    net = build("resnet18", 3, 32, 8)
    robustness.load_backbone(net, tmp_path / "resnet18.pt")
    assert torch.equal(net.model.conv1.weight, whole.conv1.weight)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 3)
