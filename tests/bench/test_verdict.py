"""``gradprune bench verdict``: what follows from its figures, its tables, and a small run without a compiler."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradprune.attacks import Runtime
from gradprune.bench import verdict
from gradprune.bench.attack_candidates import (
    TORCHATTACKS_COMPILED,
    TORCHATTACKS_FROZEN,
    UNCOMPILED,
    Method,
    our_contender,
    whole,
)
from gradprune.bench.attacks import Contest
from gradprune.bench.baselines import GRADPRUNE, Baseline, Contender
from gradprune.bench.cases import RESNET8, TINY, Workload
from gradprune.bench.harness import Budget
from gradprune.bench.store import Results, Settings
from gradprune.bench.verdict import AUTO, DEFAULT, PART, Judged, Length, VerdictBenchmark, even_after
from gradprune.cli import bench as command
from gradprune.cli.main import main

SHORT = Length(steps=3, queries=4, targets=2)
HERE = {"cpu": "A processor", "blas": "mkl", "onednn": "3", "torch": "2"}


def judged(candidate: str, *seconds: float, **more: Any) -> Judged:
    return Judged(PART, "tiny-b4", "apgd", candidate, seconds=list(seconds), eps=0.25, success_rate=0.5, **more)


RECORDS = [
    judged(TORCHATTACKS_FROZEN, 4.0, 4.0, 4.0),
    judged(TORCHATTACKS_COMPILED, 3.0, 3.0, 3.0, cold_seconds=13.0, other_verdicts=0, missed=0),
    judged(UNCOMPILED, 2.0, 2.0, 2.0, missed=1),
    judged(GRADPRUNE, 1.0, 1.0, 1.0, cold_seconds=31.0, compilations=2, other_verdicts=0, missed=1),
    Judged(PART, "tiny-b4", "apgd", AUTO, failed="a reason"),
]


def test_compilations_pay_after_some_samples() -> None:
    (contest,) = Contest.all(RECORDS, PART)
    theirs, theirs_compiled, eager, ours, auto = contest.records
    # 30 seconds at 3/4 a sample against eager, 20 at 2/4 against the compiled one, whose compilation took 10.
    assert even_after(contest, ours, 4) == 40
    slow = dataclasses.replace(ours, seconds=[3.5] * 3)
    assert even_after(Contest([theirs, theirs_compiled, slow], PART, "tiny-b4", "apgd"), slow, 4) == math.inf
    assert even_after(contest, eager, 4) is None
    assert even_after(contest, auto, 4) is None


def test_tables(tmp_path: Path) -> None:
    benchmark = VerdictBenchmark()
    results = Results(tmp_path / "verdict.json", Judged, Settings(), HERE, [*RECORDS])
    text = "\n".join(benchmark.sections(results))
    assert "eps 0.25" in text
    assert f"**{AUTO} failed:** a reason (apgd)" in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| apgd, {GRADPRUNE} "))
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [
        *("0", "31", "4.00x", "3.00x", "2.00x", "40", "2", "50.0%", "0", "1")
    ]
    benchmark.draw(results)


def test_parts_are_those_of_the_standard_ensemble_in_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchattacks")
    from gradprune.bench.attack_candidates import torchattacks

    model = nn.Linear(1, 1)
    method = verdict.methods(Length())["autoattack"]
    theirs: Any = method.theirs(torchattacks(), model, TINY)
    ours: Any = method.ours(TINY)
    apgd, targeted, fab, square = ours.parts
    assert [part.steps for part in theirs.attacks[:3]] == [apgd.steps, targeted.steps, fab.steps] == [100] * 3
    assert theirs.attacks[1].n_target_classes == theirs.attacks[2].n_target_classes == targeted.targets == fab.targets
    assert theirs.attacks[3].n_queries == square.queries == 5000


@pytest.fixture(scope="module")
def work() -> Workload:
    return dataclasses.replace(TINY, batch=4).prepare()


def made(method: Method) -> list[Baseline]:
    """The ways that need neither a compiler nor another library; the second one finds nothing."""

    def clean(work: Workload, settings: Settings) -> Contender:
        def step(x: Tensor, y: Tensor) -> Tensor:
            return x

        return Contender(GRADPRUNE, nn.Identity(), whole(step))

    eager = [
        Baseline("", name, partial(our_contender, name, method.ours, Runtime(compile=False)), compiles=False)
        for name in (TORCHATTACKS_FROZEN, UNCOMPILED)
    ]
    return [*eager, Baseline("", GRADPRUNE, clean, compiles=False)]


@pytest.mark.parametrize("attack", verdict.ATTACKS)
def test_verdicts_are_compared(attack: str, work: Workload) -> None:
    method = verdict.methods(SHORT)[attack]
    large = dataclasses.replace(work, case=dataclasses.replace(work.case, eps=0.5, step_size=0.1))
    theirs, ours, nothing = verdict.measure_verdict(method, SHORT, large, Settings(), Budget(1), made(method))
    assert (ours.missed, ours.other_verdicts, len(ours.seconds)) == (0, None, 1)
    fooled = round(4 * (theirs.success_rate or 0))
    assert fooled > 0
    assert (nothing.missed, nothing.other_verdicts) == (fooled, fooled)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "ways", made)
    monkeypatch.setattr(command, "check_compiler", lambda: None)
    words = ["bench", "verdict", "--cases", "tiny-b4", "--output", str(tmp_path), "--rounds", "1", "--steps", "3"]
    words += ["--queries", "4", "--targets", "2", "--threads", str(torch.get_num_threads()), "--device", "cpu"]
    assert main([*words, "--attacks", "apgd"]) == 0
    before = (tmp_path / "verdict.json").read_text()
    assert main([*words, "--attacks", "apgd", "pgd-50"]) == 0
    records = json.loads((tmp_path / "verdict.json").read_text())["records"]
    assert records[:3] == json.loads(before)["records"]
    assert [one["attack"] for one in records] == ["apgd"] * 3 + ["pgd-50"] * 3
    assert "## tiny-b4" in (tmp_path / "verdict.md").read_text()


def test_the_networks_are_four_in_two_batches() -> None:
    stems = [name.rpartition("-b")[0] for name in DEFAULT]
    assert len(DEFAULT) == 8
    assert all(stems.count(stem) == 2 for stem in stems)
    work = dataclasses.replace(RESNET8, batch=2).prepare()
    assert work.model(work.x).shape == (2, 10)
