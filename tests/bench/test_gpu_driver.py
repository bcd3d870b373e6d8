"""``gradprune bench gpu``: that its commands exist, and what becomes of parts that fail, hang or run out of time."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gradprune.bench import gpu, smoke
from gradprune.bench.cases import find_case
from gradprune.bench.gpu import CUT, DONE, FAILED, LACKING, TIMED_OUT, Day, execute, gather, in_batches, prepared
from gradprune.bench.gpu_parts import LOCK, STAGES, Part, all_parts
from gradprune.bench.step import Record
from gradprune.bench.store import Results, Settings
from gradprune.cli.main import build_parser, main

ROOT = Path(__file__).parents[2]


# --- The parts --------------------------------------------------------------------------------------------------------


def known() -> dict[str, Any]:
    """The commands of ``python -m bench``."""
    (commands,) = (one for one in build_parser(["bench"])._actions if one.dest == "command")
    assert commands.choices is not None
    (kinds,) = (one for one in commands.choices["bench"]._actions if one.dest == "kind")
    assert isinstance(kinds.choices, dict)
    return kinds.choices


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("xdist", [False, True])
def test_every_command_can_be_parsed(rehearse: bool, xdist: bool) -> None:
    parts = all_parts(rehearse=rehearse, has=lambda module: xdist)
    assert len({part.title for part in parts}) == len(parts)
    assert {part.stage for part in parts} == set(STAGES)
    assert [part.stage for part in parts] == sorted(part.stage for part in parts)
    commands = known()
    for part in parts:
        assert part.limit <= gpu.BUDGET or part.benchmark == "tables"
        if part.benchmark is not None:
            assert part.benchmark in commands
            arguments = build_parser(["bench"]).parse_args(part.command[1:])
            for case in getattr(arguments, "cases", None) or []:
                required = find_case(case).requires
                assert required is None or required in part.needs
            assert arguments.device == ("cpu" if rehearse else "cuda")
        elif part.command[1] == "pytest":
            assert (ROOT / part.command[-1]).exists()


def test_every_benchmark_of_a_rehearsal_is_one_of_the_day_and_the_other_way_round() -> None:
    def benchmarks(*, rehearse: bool) -> set[str | None]:
        return {part.benchmark for part in all_parts(rehearse=rehearse, has=lambda module: True)}

    assert benchmarks(rehearse=True) == benchmarks(rehearse=False)


# --- The driver -------------------------------------------------------------------------------------------------------


def python(name: str, code: str, *, stage: int = 0, limit: float = 60, needs: tuple[str, ...] = ()) -> Part:
    return Part(stage, name, ("-c", code), limit, needs)


SAYS = python("says", "print('hello'); open(r'{output}/file', 'x').write('kept')")
FAILS = python("fails", "print('what went wrong'); raise SystemExit(3)")
HANGS = python("hangs", "import time; print('begun', flush=True); time.sleep(60)", stage=1, limit=1)
LONG = python("long", "import time; time.sleep(60)", stage=1)
LACKS = python("lacks", "raise SystemExit('was run all the same')", stage=2, needs=("no_such_module",))
UNKNOWN = Part(2, "unknown", ("-m", "bench", "no-such-benchmark"), 60)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SHORTEST", 0.5)
    monkeypatch.setattr(gpu, "GRACE", 0.5)


def day_in(folder: Path, **more: Any) -> Day:
    return Day(folder, dict(os.environ), lambda module: module != "no_such_module", {"step"}, **more)


def soon(seconds: float = 60) -> float:
    return time.monotonic() + seconds


def outcomes(day: Day, *parts: Part) -> list[str | None]:
    return [result.outcome if (result := day.result(part)) else None for part in parts]


def test_each_part_has_a_result_and_none_holds_up_the_next(tmp_path: Path) -> None:
    parts = [FAILS, HANGS, LACKS, UNKNOWN, SAYS]
    (tmp_path / "results").mkdir()
    day = day_in(tmp_path / "results", pack=tmp_path / "packed.tar.gz")
    assert day.work_through(parts, soon()) == 1
    assert outcomes(day, *parts) == [FAILED, TIMED_OUT, LACKING, LACKING, DONE]
    read = {part.name: json.loads((tmp_path / "results" / f"{part.title}.json").read_text()) for part in parts}
    assert (read["fails"]["returncode"], read["fails"]["tail"]) == (3, ["what went wrong"])
    assert (read["hangs"]["returncode"], read["hangs"]["tail"][0]) == (None, "begun")
    assert read["hangs"]["seconds"] < 20
    assert read["lacks"]["lacks"] == ["no_such_module"]
    assert read["unknown"]["lacks"] == ["bench no-such-benchmark"]
    assert (tmp_path / "results/0-says/file").read_text() == "kept"
    assert "what went wrong" in (tmp_path / "results/gpu.md").read_text()
    with tarfile.open(tmp_path / "packed.tar.gz") as archive:
        assert {"./0-says/file", "./0-says.json", "./0-says.log", "./gpu.md"} <= set(archive.getnames())


def test_parts_that_share_the_machine_run_at_the_same_time(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
own, other = (Path(sys.argv[2]).with_name(name) for name in sys.argv[3:])
own.touch()
while not other.exists():
    time.sleep(0.01)
"""
    names = ("one", "two")
    parts = [Part(1, own, ("-c", code, "--lock", LOCK, own, other), 60) for own, other in (names, names[::-1])]
    day = day_in(tmp_path, together=2)
    assert day.work_through([SAYS, *parts, FAILS], soon()) == 1
    assert outcomes(day, SAYS, *parts, FAILS) == [DONE, DONE, DONE, FAILED]


def test_batches() -> None:
    shared = [Part(2, str(number), ("--lock",), 60) for number in range(5)]
    batches = [SAYS, *shared[:3], FAILS, *shared[3:]]
    assert list(in_batches(batches, 2)) == [[SAYS], shared[:2], shared[2:3], [FAILS], shared[3:]]


def test_what_parts_measured_is_gathered_by_precision(tmp_path: Path) -> None:
    def measured(case: str, **settings: Any) -> None:
        path = tmp_path / f"2-step-{case}-{len(settings)}" / "step.json"
        path.parent.mkdir()
        results = Results(path, Record, Settings(device="cuda", **settings), {"gpu": "some"})
        results.add([Record(case, name, seconds=[0.1]) for name in ("frozen eager", "gradprune")])

    measured("one", tf32=True)
    measured("two", tf32=True)
    measured("one")
    gather(tmp_path)
    gather(tmp_path)
    for precision, cases in (("tf32", ["one", "two"]), ("fp32", ["one"])):
        results = Results.read(tmp_path / f"step-{precision}" / "step.json", Record)
        assert results.cases == cases
        assert len(results.records) == 2 * len(cases)


def test_what_has_a_result_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    day, parts = day_in(tmp_path), [FAILS, SAYS]
    day.work_through(parts, soon())
    before = {part: day.result(part) for part in parts}
    assert day.work_through(parts, soon()) == 0
    assert {part: day.result(part) for part in parts} == before
    assert "2 of 2 parts have a result" in capsys.readouterr().out
    day.work_through(parts, soon(), retry=True)
    assert day.result(FAILS) != before[FAILS]
    assert day.result(SAYS) == before[SAYS]
    day.work_through(parts, soon(), again=True)
    assert day.result(SAYS) != before[SAYS]


def test_what_is_done_again_begins_anew_and_what_was_cut_goes_on(tmp_path: Path) -> None:
    """A benchmark goes on from the file that it finds, and takes a failure in it for a result."""
    code = """
import pathlib, time
times = pathlib.Path(r"{output}/times")
times.write_text(times.read_text() + "x" if times.exists() else "x")
if len(times.read_text()) == 1:
    time.sleep({seconds})
raise SystemExit({status})
"""
    day = day_in(tmp_path)
    cut = python("cut", code.replace("{seconds}", "60").replace("{status}", "0"))
    failing = python("failing", code.replace("{seconds}", "0").replace("{status}", "1"))
    day.work_through([cut], soon(2))
    assert outcomes(day, cut) == [CUT]
    assert day.work_through([cut], soon()) == 0
    assert (tmp_path / cut.title / "times").read_text() == "xx"
    for _ in range(2):
        assert day.work_through([failing], soon(), retry=True) == 1
        assert (tmp_path / failing.title / "times").read_text() == "x"


def test_what_the_budget_cuts_is_done_in_a_later_slice_behind_the_others(tmp_path: Path) -> None:
    day = day_in(tmp_path)
    assert day.work_through([LONG, SAYS], soon(2)) == 1
    assert outcomes(day, LONG, SAYS) == [CUT, None]
    day.work_through([LONG, SAYS], soon(3))
    assert outcomes(day, LONG, SAYS) == [CUT, DONE]
    result = day.result(LONG)
    assert result is not None
    assert result.tries == 2


def test_a_file_that_was_damaged_is_no_result(tmp_path: Path) -> None:
    (tmp_path / f"{SAYS.title}.json").write_text('{"stage": 0')
    day = day_in(tmp_path)
    assert day.work_through([SAYS], soon()) == 0
    assert outcomes(day, SAYS) == [DONE]


def test_what_a_part_has_started_ends_with_it(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {stubborn!r}])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    status = execute([sys.executable, "-c", code], os.environ, tmp_path / "log", 2)
    assert status is None
    child = Path("/proc") / (tmp_path / "child").read_text()
    for _ in range(50):  # until whoever inherits it has noticed
        if not child.exists() or "Z" in (child / "stat").read_text().rpartition(")")[2].split()[:1]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child runs on")


# --- What the parts see -----------------------------------------------------------------------------------------------


def test_the_backend_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradprune is not installed, as in a checkout on somebody else's machine."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"].items()
    written = [f"[{group}]\n{name} = {what}\n" for group, own in entries for name, what in own.items()]
    assert written == [gpu.ENTRY_POINT]
    monkeypatch.setattr(gpu, "entry_points", lambda group: [])
    with prepared(None, rehearse=True) as (environment, has):
        site, root = environment["PYTHONPATH"].split(os.pathsep)[:2]
        told = Path(site) / f"gradprune-{project['version']}.dist-info" / "entry_points.txt"
        assert told.read_text() == gpu.ENTRY_POINT
        assert Path(root) == ROOT
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        assert has("torch")
        assert not has("no_such_module")
        (Path(site) / "no_such_module.py").touch()
        assert has("no_such_module")
    assert not Path(site).exists()


# Asked in the usual way, setuptools takes this process for pip, and other tests find another distutils.
@pytest.mark.skipif(importlib.machinery.PathFinder.find_spec("pip") is None, reason="there is no pip here")
def test_wheels_are_installed_for_the_parts_alone(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
        metadata = "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\nRequires-Dist: not-to-be-had\n"
        wheel.writestr("carried-1.0.dist-info/METADATA", metadata)
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    with prepared(tmp_path) as (environment, has):
        assert has("carried")
        assert importlib.util.find_spec("carried") is None
        assert execute([sys.executable, "-c", "import carried"], environment, tmp_path / "log", 60) == 0


def test_without_wheels_in_it_a_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with prepared(tmp_path):
        assert f"no wheels in {tmp_path}" in capsys.readouterr().err


def test_without_a_gpu_there_is_only_the_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu", "--output", str(tmp_path / "out")]) == 2
    assert "pass --rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "all_parts", lambda rehearse, has: [SAYS, HANGS])
    assert main(["bench", "gpu", "--rehearse", "--stage", "0", "--output", str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["0-says", "0-says.json", "0-says.log", "gpu.md"]


def test_versions_are_written_before_anything_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: str, mode: str | None) -> dict[str, Any]:
        assert json.loads((tmp_path / "smoke.json").read_text())["torch"] == torch.__version__
        raise RuntimeError("no kernel")

    monkeypatch.setattr(smoke, "smoke", fails)
    assert smoke.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    outcomes = json.loads((tmp_path / "smoke.json").read_text())["smoke"]
    assert [one["failed"] for one in outcomes] == ["RuntimeError: no kernel"] * 2
