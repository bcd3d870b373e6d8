"""``bench emit``: what cases ask for, and what the tables say of what was emitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradprune.bench import emitted
from gradprune.bench.emitted import AGAINST, DEFAULT, EmitBenchmark, measure_emission, request_of
from gradprune.bench.store import Results, Settings
from gradprune.emit.record import Part, Request, totals_of
from gradprune.errors import GradpruneError


def test_cases_say_what_to_emit():
    assert request_of("vit_small_patch16_224-b16") == Request(
        "timm:vit_small_patch16_224", "sm_75", batch=16, against=AGAINST
    )
    half = request_of("resnet18-b32-fp16@sm_80")
    assert (half.target, half.batch, half.gpu, half.autocast) == ("timm:resnet18", 32, "sm_80", "float16")
    assert len({request_of(case) for case in DEFAULT}) == len(DEFAULT)


@pytest.mark.parametrize("case", ["resnet18", "resnet18-bx", "-b8", "resnet18-b8@sm_10"])
def test_what_is_no_case_is_named(case: str):
    with pytest.raises(GradpruneError, match="is no case: write"):
        request_of(case)


def totals(factor: int) -> dict[str, Any]:
    names = vars(totals_of([Part("step", [], 0, 0)]))
    return dict.fromkeys(names, factor * 100)


def test_shares_failures_and_the_worst_of_all_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def emit(request: Request) -> dict[str, Any]:
        if request.gpu == "sm_90":
            raise GradpruneError("no such thing\nand more")
        config = {"registers": 30, "stack_bytes": 0, "shared_bytes": 512, "occupancy": 0.5}
        kernels = [{"configs": [config, {**config, "registers": 90, "occupancy": 1.0}]}]
        return {"totals": {"gradprune": totals(1), AGAINST: totals(2)}, "kernels": kernels}

    monkeypatch.setattr(emitted, "emit", emit)
    results = Results(tmp_path / "emit.json", emitted.Emitted, Settings(), {})
    for case in ("resnet18-b8", "resnet18-b8@sm_90"):
        results.add(measure_emission(case))
    results = Results.read(results.path, emitted.Emitted)
    ours = results.records[0]
    assert ours.derived(results.records) == {"generated_bytes": 0.5, "peak_bytes": 0.5, "launches": 0.5}
    assert (ours.registers, ours.occupancy) == (90, 0.5)
    table, _, facts, *failed = EmitBenchmark().sections(results)
    assert "50.0%" in table
    assert "|        90 |" in facts
    assert failed == ["**gradprune failed:** no such thing", f"**{AGAINST} failed:** no such thing"]
