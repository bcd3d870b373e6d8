"""``gradprune bench tables``: that every row and column of the paper is there, and all ways find the same examples."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import interpreted

from gradprune.bench import table_ways, tables
from gradprune.bench.shims import load, versions
from gradprune.bench.store import Results, Settings
from gradprune.bench.table_attacks import BATCHES, NETWORKS, ROWS
from gradprune.bench.table_scales import SCALES, case_of
from gradprune.bench.table_text import ATTACKS
from gradprune.bench.table_ways import FROZEN, PATCHED, SHIPPED, WAYS, Entry
from gradprune.bench.tables import TablesBenchmark
from gradprune.cli import bench as command
from gradprune.cli.main import main
from gradprune.errors import GradpruneError

HERE = {"cpu": "A processor", "blas": "mkl", "onednn": "3", "torch": "2"}


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured, and run as they are."""
    monkeypatch.setattr(table_ways, "compile_model", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(tables, "start_compiler", lambda: None)
    monkeypatch.setattr(command, "check_compiler", lambda: None)
    with interpreted():
        yield


def run(folder: Path, *words: str) -> list[dict[str, Any]]:
    threads = str(torch.get_num_threads())
    options = ["--scale", "toy", "--rounds", "1", "--device", "cpu", "--threads", threads, "--output", str(folder)]
    assert main(["bench", "tables", *options, *words]) == 0
    records: list[dict[str, Any]] = json.loads((folder / "tables.json").read_text())["records"]
    return records


def test_rows_and_columns_are_those_of_the_paper() -> None:
    names = {table: [row.name for row in ROWS if row.table == table] for table in ("1", "2", "3")}
    assert names["1"] == ["Torchattacks", "Foolbox", "ART", "AdverTorch", "DeepRobust", "CleverHans"]
    assert names["2"] == [*(f"batch {batch}" for batch in BATCHES), *NETWORKS]
    assert [(row.name, row.library) for row in ROWS if row.table == "3"] == [
        *((name, "ART") for name in ("PGD", "AutoAttack", "BIM", "Square", "FGSM")),
        *((name, "Torchattacks") for name in ("APGD", "CW", "MI-FGSM", "SI-NI-FGSM", "VMI-FGSM")),
    ]
    ratios = [f"{row.paper[0] / row.paper[1]:.2f}" for row in ROWS if row.table == "1" and row.paper]
    assert ratios == ["1.45", "1.36", "1.42", "1.36", "1.46", "1.48"]
    for scale in ("paper", "small"):
        cases = [case_of(SCALES[scale], row) for row in ROWS]
        assert len({case.name for case in cases}) == len(BATCHES) + len(NETWORKS) - 1


def test_all_ways_find_the_same_examples_and_a_run_goes_on(
    tmp_path: Path, without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "not installed" in versions().values():
        pytest.skip(f"of {versions()} one is missing")
    kept = [row for row in ROWS if row.table != "2" or row.name in ("batch 4", "ViT-base")]
    names = {(row.table, row.name) for row in kept} | {("4", name) for name in ATTACKS}
    names |= {("figure2", "K = 1"), ("figure2", "K = 2")}
    monkeypatch.setattr(tables, "ROWS", kept)
    first = run(tmp_path, "--table", "1")
    assert [one["attack"] for one in first[::5]] == [row.name for row in kept if row.table == "1"]
    records = run(tmp_path)
    assert records[: len(first)] == first
    assert {(one["part"], one["attack"]) for one in records} == names
    assert [one["candidate"] for one in records] == [*WAYS] * len(names)
    for one in records:
        assert one["failed"] is None
        assert one["other_verdicts"] == 0
        assert one["differing"] == pytest.approx(0, abs=0.02)
        assert one["weight_flops"] in ((0,) if one["candidate"] in ("accelerate", PATCHED) else (None,))
    assert any(one["success_rate"] > 0 for one in records)
    text = (tmp_path / "tables.md").read_text()
    assert all(f"## {title}" in text for title in tables.TITLES.values())
    assert "Sizes: **toy**, one tiny network in place of all" in text
    assert "a driver issues the questions of its attacks" in text


def test_tables_show_the_paper_beside_the_measurement(tmp_path: Path) -> None:
    def entry(way: str, *seconds: float, **more: Any) -> Entry:
        return Entry("1", "tiny-b4", "Foolbox", way, seconds=list(seconds), samples=4, **more)

    records = [
        entry(SHIPPED, 6, 6),
        entry(FROZEN, 4, 4),
        entry(PATCHED, 2, 3, predicted=1.5),
        entry("accelerate", failed="why"),
    ]
    benchmark = TablesBenchmark()
    results = Results(tmp_path / "tables.json", Entry, Settings(), HERE, records)
    text = "\n".join(benchmark.sections(results))
    (row,) = (line for line in text.splitlines() if line.startswith("| Foolbox  "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["Foolbox", "4", "7.38 / 5.44", "1.36x", "1.50x", "1.50x", "-", "-", "2.50x", "1.67x", "-"]
    assert "ours is 1.67 times as fast as frozen" in text
    assert "**accelerate failed:** why (Foolbox)" in text
    benchmark.draw(results)


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(GradpruneError, match="DeepRobust cannot be imported .* pip install --no-deps deeprobust"):
        load("DeepRobust", "no_such_module_of_deeprobust")
