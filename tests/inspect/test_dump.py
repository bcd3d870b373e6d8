"""The dump folder: what is in it, and that nothing that goes wrong with it disturbs a compilation."""

from __future__ import annotations

import ast
import errno
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import compiled, convolutional, folder_of, images, network, read
from torch import Tensor
from torch._dynamo.utils import counters

import gradprune
from gradprune.errors import OptionError, PassError
from gradprune.inspect import dump as dump_module
from gradprune.passes.early_masks import EarlyMasks
from gradprune.passes.pipeline import PASS_NAMES
from gradprune.support import files

# --- What is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_every_stage_in_order(tmp_path: Path):
    report = compiled(convolutional(), tmp_path)
    folder = folder_of(report)
    first, *later = PASS_NAMES
    stages = ["dynamo", first, "captured", *later, "prologue", "step", "kernels-step"]
    assert sorted(path.name for path in folder.glob("[0-9]*.py")) == [
        f"{number:02d}.{stage}.py" for number, stage in enumerate(stages)
    ]
    others = {path.name for path in folder.iterdir() if not path.name[0].isdigit()} - {"graph.svg"}
    assert others == {"repro.py", "report.json", "report.txt", "page.html", "graph.dot"}
    for path in folder.glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))


def test_programs_say_where_they_come_from(tmp_path: Path, no_code: None):
    report = compiled(convolutional(), tmp_path)
    (path,) = folder_of(report).glob("*.narrow-outputs.py")
    text = path.read_text(encoding="utf-8")
    (record,) = (record for record in report.passes if record.name == "narrow-outputs")
    header = text.splitlines()[0]
    assert "narrow-outputs (exact)" in header
    assert f"{record.ops_before} -> {record.ops_after} operators" in header
    assert " ms" in header
    assert "loss(model(x_adv, *context), y).backward()" in text  # the user's code
    assert "weight L['model']._modules['0']._parameters['weight']" in text
    assert "[True, False, False]" in text
    assert "[True, True, True]" not in text


def test_report_is_the_one_of_the_compilation(tmp_path: Path, no_code: None):
    report = compiled(convolutional(), tmp_path)
    folder = folder_of(report)
    assert read(folder) == report.to_dict()
    assert read(folder)["schema_version"] == 1
    assert (folder / "report.txt").read_text(encoding="utf-8").rstrip("\n") == str(report)


def test_dot_shows_what_became_of_nodes(tmp_path: Path, no_code: None):
    report = compiled(convolutional(), tmp_path)
    text = (folder_of(report) / "graph.dot").read_text(encoding="utf-8")
    removed = next(change.node for change in report.removed if change.operator == "aten.sum.dim_IntList")
    kept = next(name for name, seen in report.graphs["after"].nodes.items() if seen.operator == "aten.sign")
    lines = {name: next(line for line in text.splitlines() if f'"{name}" [' in line) for name in (removed, kept)}
    assert "dashed" in lines[removed]
    assert "dashed" not in lines[kept]
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(("status", "drawn"), [(0, True), (1, False)])
def test_svg_where_graphviz_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_code: None, status: int, drawn: bool
):
    """A stand-in for it, which takes a graph and gives a picture, or fails."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "dot"
    stand_in.write_text(f'#!/bin/sh\ntest "$1" = -Tsvg && grep -q digraph && echo "<svg/>"\nexit {status}\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    folder = folder_of(compiled(convolutional(), tmp_path / "dump"))
    assert (folder / "graph.svg").exists() == drawn
    if drawn:
        assert (folder / "graph.svg").read_text() == "<svg/>\n"


def test_symbolic_sizes(tmp_path: Path, no_code: None):
    """Dynamo begins anew when it meets some; what it did before leaves no folder."""
    step, args = convolutional()
    run = gradprune.compile(step, dynamic=True, dump=tmp_path)
    run(*args)
    assert list(tmp_path.iterdir()) == [folder_of(report) for report in gradprune.reports(run)]
    assert "('arg0_1', 'size', 2)" in (tmp_path / "graph-00-step" / "repro.py").read_text(encoding="utf-8")


def test_several_graphs_have_a_folder_each(tmp_path: Path, no_code: None):
    def step(x: Tensor) -> Tensor:
        x = x.sin()
        print(end="")
        return x.cos()

    run = gradprune.compile(step, dump=tmp_path)
    run(torch.rand(3))
    folders = [folder_of(report) for report in gradprune.reports(run)]
    assert len(set(folders)) == 2
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    for folder in folders:
        assert read(folder)["form"] == "model"


def test_a_later_run_goes_on_with_the_numbers(tmp_path: Path, no_code: None):
    for number in range(2):
        assert folder_of(compiled(convolutional(), tmp_path)).name == f"graph-{number:02d}-step"
        torch._dynamo.reset()


@pytest.mark.inductor
def test_backward_of_a_model_is_there_after_it_was_called(tmp_path: Path):
    """Torch compiles it when it is called first, after the rest has been written."""
    model = gradprune.compile(network(), dump=tmp_path)
    model(images()[0].requires_grad_(True)).sum().backward()
    (report,) = gradprune.reports(model)
    folder = folder_of(report)
    assert len(list(folder.glob("*.kernels-*.py"))) == 2
    assert {kernel["part"] for kernel in read(folder)["kernels"]} == {"forward", "backward"}


def test_explain_dumps_too(tmp_path: Path):
    step, args = convolutional()
    folder = folder_of(gradprune.explain(step, *args, dump=tmp_path))
    assert {"prologue", "step"} <= {path.name.split(".")[1] for path in folder.glob("[0-9]*.py")}
    assert not list(folder.glob("*kernels*"))
    assert read(folder)["kernels"] == []


def test_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_code: None):
    monkeypatch.setenv("GRADPRUNE_DUMP", str(tmp_path / "variable"))
    assert folder_of(compiled(convolutional())).parent == tmp_path / "variable"
    torch._dynamo.reset()
    assert folder_of(compiled(convolutional(), tmp_path / "option")).parent == tmp_path / "option"


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_code: None):
    monkeypatch.delenv("GRADPRUNE_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    report = compiled(convolutional())
    assert (report.dump, report.dump_error) == (None, None)
    assert list(tmp_path.iterdir()) == []


# --- Caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_kernels_come_from_the_cache_as_well(tmp_path: Path):
    """Dumping is not part of the cache's key, and a hit is dumped like a miss."""
    plain = compiled(convolutional())
    torch._dynamo.reset()
    counters.clear()
    report = compiled(convolutional(), tmp_path)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert report.kernels == plain.kernels != []
    (code,) = folder_of(report).glob("*.kernels-step.py")
    assert "def call(" in code.read_text(encoding="utf-8")


# --- What may go wrong ------------------------------------------------------------------------------------------------


def gradient(report: gradprune.Report) -> bool:
    """Whether a report is that of a graph that was pruned as always."""
    return report.fallback is None and report.flops["after"]["weight_grad"] == 0


@pytest.mark.parametrize("root", ["taken", "taken/below", "zero\0byte", "x" * 300], ids=ascii)
def test_a_folder_that_cannot_be_made(tmp_path: Path, root: str, no_code: None, caplog: pytest.LogCaptureFixture):
    (tmp_path / "taken").write_text("a file")
    with caplog.at_level(logging.WARNING, "gradprune"):
        report = compiled(convolutional(), tmp_path / root, strict=True)
    assert gradient(report)
    assert report.dump is None
    assert report.dump_error is not None
    assert "cannot be written" in report.dump_error
    assert report.to_dict()["dump_error"] == report.dump_error
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("gradprune")]
    assert len(warnings) == 1
    assert "options={'dump': FOLDER}" in warnings[0]


@pytest.mark.parametrize("name", ["ünïcödé 日本\nline", "-a'b\"c`$(d);#{}%s\\e"], ids=ascii)
def test_odd_characters(tmp_path: Path, name: str, no_code: None):
    folder = folder_of(compiled(convolutional(), tmp_path / name))
    assert folder.parent == tmp_path / name
    assert read(folder)["dump"] == str(folder)
    ast.parse((folder / "repro.py").read_text(encoding="utf-8"))


def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_code: None, caplog: pytest.LogCaptureFixture
):
    written: list[Path] = []

    def write_text(path: Path, text: str) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        files.write_text(path, text)

    monkeypatch.setattr(dump_module, "write_text", write_text)
    with caplog.at_level(logging.WARNING, "gradprune"):
        report = compiled(convolutional(), tmp_path, strict=True)
    assert gradient(report)
    assert os.strerror(errno.ENOSPC) in (report.dump_error or "")
    assert len([record for record in caplog.records if record.name.startswith("gradprune")]) == 1
    assert sorted(written) == sorted(Path(report.dump or "").iterdir())  # nothing by halves


def test_an_error_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_code: None):
    def fails(*args: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("gradprune.inspect.observe.program", fails)
    report = compiled(convolutional(), tmp_path, strict=True)
    assert gradient(report)
    assert "ZeroDivisionError" in (report.dump_error or "")
    assert read(Path(report.dump or ""))["dump_error"] == report.dump_error


def test_no_temporary_files_stay(tmp_path: Path, no_code: None):
    folder = folder_of(compiled(convolutional(), tmp_path))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_ranks_write_to_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_code: None):
    folders = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        folders.append(folder_of(compiled(convolutional(), tmp_path)))
        torch._dynamo.reset()
    assert [folder.relative_to(tmp_path).parts for folder in folders] == [
        ("rank0", "graph-00-step"),
        ("rank1", "graph-00-step"),
    ]


def claim(root: Path, start: Any, claimed: Any) -> None:
    start.wait()
    for _ in range(20):
        claimed.put(dump_module.DumpFolder(root, "step").path)


def test_processes_at_once_share_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without RANK, as with two scripts and one GRADPRUNE_DUMP."""
    monkeypatch.delenv("RANK", raising=False)
    context = multiprocessing.get_context("fork")
    start, queue = context.Barrier(2), context.Queue()
    running = [context.Process(target=claim, args=(tmp_path, start, queue)) for _ in range(2)]
    for process in running:
        process.start()
    claimed = [queue.get(timeout=60) for _ in range(40)]
    for process in running:
        process.join()
    assert len(set(claimed)) == 40


def test_the_graph_that_a_pass_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_code: None):
    def run(self: EarlyMasks, step_graph: Any) -> Any:
        raise ValueError("on purpose")

    monkeypatch.setattr(EarlyMasks, "run", run)
    report = compiled(convolutional(), tmp_path)
    (failed,) = Path(report.dump or "").glob("*.failed.py")
    assert "on purpose" in failed.read_text(encoding="utf-8").splitlines()[0]
    assert "on purpose" in read(failed.parent)["fallback"]
    torch._dynamo.reset()
    with pytest.raises(PassError, match="on purpose"):
        compiled(convolutional(), tmp_path, strict=True)
    (failed,) = tmp_path.glob("graph-01-step/*.failed.py")
    assert "on purpose" in read(failed.parent)["fallback"]


@pytest.mark.parametrize("value", [3, True, "", b"", ["a"]], ids=ascii)
def test_what_is_no_path_is_an_option_error(value: object):
    with pytest.raises(OptionError, match="'dump' must be the path of a folder"):
        gradprune.compile(network(), dump=value)


def test_dump_inputs_has_to_be_a_boolean():
    with pytest.raises(OptionError, match="'dump_inputs' must be True or False"):
        gradprune.compile(network(), dump_inputs="yes")
