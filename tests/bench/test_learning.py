"""``gradprune bench objectives``: small runs, and what is written about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradprune import OptionError
from gradprune.bench import objectives
from gradprune.bench.objectives import ObjectiveRecord, ObjectivesBenchmark
from gradprune.bench.store import Results, Settings
from gradprune.cli import bench as command
from gradprune.cli.main import main
from gradprune.training import OBJECTIVES

HERE = {"cpu": "A processor", "blas": "mkl", "onednn": "3", "torch": "2"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results[ObjectiveRecord]:
    path = tmp_path_factory.mktemp("objectives") / "objectives.json"
    found = Results(path, ObjectiveRecord, Settings(), HERE)
    objectives.measure_objectives(found, ["plain", "fast"], 2, compile=False)
    return found


def test_records(results: Results[ObjectiveRecord]) -> None:
    plain, fast = results.records
    assert isinstance(plain, ObjectiveRecord)
    assert isinstance(fast, ObjectiveRecord)
    for record in (plain, fast):
        assert [len(each) for each in (record.seconds, record.loss, record.clean, record.robust)] == [2] * 4
        assert record.updates == 2 * (1347 // 64)
        assert all(0 <= robust <= clean <= 1 for robust, clean in zip(record.robust, record.clean, strict=True))
    assert plain.clean[-1] > 0.8
    assert plain.loss[-1] < fast.loss[-1]  # attacked inputs are harder


def test_what_is_there_is_not_trained_again(
    results: Results[ObjectiveRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    again = Results(results.path, ObjectiveRecord, results.settings, HERE)
    again.resume()
    objectives.measure_objectives(again, ["plain", "fast"], 2, compile=False)
    assert again.records == results.records
    assert "already in" in capsys.readouterr().err


def test_table_and_plot(results: Results[ObjectiveRecord]) -> None:
    text = command.write(ObjectivesBenchmark(), results)
    plain, fast = results.records
    gain = 100 * (fast.robust[-1] - plain.robust[-1])
    (row,) = [line for line in text.splitlines() if line.startswith("| fast")]
    assert f"{fast.robust[-1]:.1%}" in row
    assert f"{gain:+.1f}" in row
    assert results.path.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(results.path.read_text())["benchmark"] == "objectives"


def test_every_objective_is_there() -> None:
    assert list(objectives.MAKE) == list(OBJECTIVES)
    assert all(make().name == name for name, make in objectives.MAKE.items())


def test_unknown_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="did you mean 'trades'"):
        objectives.choose_objectives(["trade"])
    assert main(["bench", "objectives", "--objectives", "trade", "--output", str(tmp_path / "out")]) == 2
    assert "did you mean 'trades'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
