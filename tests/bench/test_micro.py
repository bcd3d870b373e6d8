"""``gradprune bench micro``: what follows from its figures, and that all ways of a piece compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradprune.bench import micro
from gradprune.bench.kernels import time_ways, ways_of
from gradprune.bench.micro import CEILINGS, COPY, PRODUCT, Micro, MicroBenchmark, measure_pattern
from gradprune.bench.micro_patterns import _MASKS, DGRADS, FULL, GROUPS, MASKS, SMALL, UPDATES, layers, patterns
from gradprune.bench.store import Results, Settings
from gradprune.cli.main import main

RECORDS = [
    Micro(CEILINGS, COPY, {"eager": 0.5}, bytes=10_000_000_000),  # 20 GB/s
    Micro(CEILINGS, PRODUCT, {"eager": 0.5}, bytes=1, flops=50_000_000_000),  # 100 GFLOP/s
    Micro(UPDATES, "bound by memory", {"eager": 4.0, "compiled": 2.0}, bytes=20_000_000_000, launches=2),
    Micro(DGRADS, "bound by arithmetic", {"a": 5.0, "b": None}, bytes=1, flops=400_000_000_000),
    Micro(DGRADS, "in half", {"a": 5.0}, bytes=1, flops=650_000_000_000, is_half=True),
]


def test_figures_follow_from_ceilings_of_the_same_run() -> None:
    shares = [record.share(RECORDS) for record in RECORDS]
    assert shares[:2] == [None, None]
    assert shares[2:] == pytest.approx([0.5, 0.8, 1.3])
    assert all(record.share(RECORDS[2:]) is None for record in RECORDS)
    predicted = [record.derived(RECORDS)["t4_predicted_seconds"] for record in RECORDS[2:]]
    assert predicted == pytest.approx([20 / 320 + 6e-6, 400 / 8100 + 3e-6, 0.01 + 3e-6])


def test_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    benchmark = MicroBenchmark()
    results = Results(tmp_path / "micro.json", Micro, Settings(), {}, RECORDS)
    text = "\n".join(benchmark.sections(results))
    (row,) = (line for line in text.splitlines() if line.startswith("| bound by memory"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["20,000", "-", "2", "2,000,000", "compiled, 2.00x", "10", "-", "50%", "62,506"]
    benchmark.draw(results)


def test_all_ways_to_an_input_gradient_agree() -> None:
    """What computes something else, or cannot be used, has no seconds."""
    kinds = set()
    for layer in layers(SMALL):
        _, ways = ways_of(layer, Settings(), unpacked=True)
        assert None not in time_ways(ways, "cpu", 1).values(), str(layer)
        assert not layer.stride or {"transposed conv", "masked conv backward, contiguous"} <= ways.keys()
        assert ("flipped conv" in ways) == (layer.stride == (1, 1))
        kinds.add(layer.kind)
    assert kinds == {layer.kind for layer in layers(FULL)}
    assert kinds == {"conv other", "conv 3x3", "conv 1x1", "depthwise", "linear"}


def test_patterns_compute_what_they_are_called() -> None:
    found = {(one.group, one.name): one for one in patterns(SMALL, "cpu", torch.float32)}
    assert {group for group, _ in found} == set(GROUPS) - {DGRADS}
    results = {key: one.function(*one.inputs) for key, one in found.items()}
    x = found[MASKS, "ReLU, mask as bits"].inputs[0]
    gradients = {name: results[MASKS, f"ReLU's backward by {name}"] for name in _MASKS}
    gradient = found[MASKS, "ReLU's backward by bits"].inputs[1]
    for name in _MASKS:
        assert torch.equal(gradients[name], torch.where(x > 0, gradient, 0)), name  # type: ignore[arg-type]
    packed = results[MASKS, "ReLU, mask as bits"][1]
    assert packed.numel() * packed.itemsize == x.numel() / 8
    moved, (x_adv, x, _) = results[UPDATES, "Linf step"], found[UPDATES, "Linf step"].inputs
    assert isinstance(moved, torch.Tensor)
    assert 0 < (moved - x).abs().max() <= 8 / 255 + 1e-6
    assert (moved - x_adv).abs().max() <= 2 / 255 + 8 / 255


def test_launches_of_a_compiled_pattern_are_counted() -> None:
    step = next(iter(patterns(SMALL, "cpu", torch.float32)))
    record = measure_pattern(step, Settings(), 1)
    assert record.launches == 1
    assert record.bytes == 4 * sum(one.nbytes for one in step.inputs) // 3
    assert None not in record.seconds.values()


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "micro", "--small", "--rounds", "1", "--threads", "1", "--device", "cpu", "--no-plot"]
    words += ["--output", str(tmp_path), "--groups", "input"]
    assert main(words) == 0
    content = json.loads((tmp_path / "micro.json").read_text())
    assert [one["case"] for one in content["records"]] == [CEILINGS] * 2 + [DGRADS] * len(layers(SMALL))
    assert all(one["derived"]["share_of_ceiling"] > 0 for one in content["records"][2:])
    assert "T4 us, predicted" in (tmp_path / "micro.md").read_text()
    assert not (tmp_path / "micro.png").exists()
    monkeypatch.setattr(micro, "ceilings", pytest.fail)
    assert main(words) == 0
    assert f"{DGRADS}: already in" in capsys.readouterr().err
