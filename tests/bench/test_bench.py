"""``gradprune bench``: its arithmetic, its checks, its files, and small runs from end to end."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradprune.bench import ablation, baselines, cases, harness, kernels, report, step, store
from gradprune.bench import compile as first_step
from gradprune.bench.attack_step import Step, move, pgd_step
from gradprune.bench.baselines import (
    COMPILED_MODEL,
    COMPILED_STEP,
    EAGER_BACKWARD,
    FROZEN,
    GRADPRUNE,
    Baseline,
    Contender,
)
from gradprune.bench.benchmark import chosen_cases
from gradprune.bench.cases import CASES, TINY, Case, find_case
from gradprune.bench.kernels import Kernels
from gradprune.bench.step import Comparison, Record
from gradprune.bench.store import Ratio, Results, Settings
from gradprune.cli import bench as command
from gradprune.cli.main import main
from gradprune.errors import OptionError
from gradprune.passes.pipeline import PASS_NAMES
from gradprune.workloads.vision import let_torchvision_import

EAGER = ["backward", "grad", "frozen"]
HERE = {"cpu": "A processor", "blas": "mkl", "onednn": "3", "torch": "2"}

# Arithmetic


def test_quartiles() -> None:
    assert store.quartiles([3.0]) == (3, 3)
    assert store.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2, 4)


def test_a_ratio_is_taken_within_rounds() -> None:
    # The second round was slow for both: the medians of each (3 and 2) would say 1.5.
    ratio = Ratio.paired([2, 30, 3], [1, 10, 2])
    assert (ratio.median, ratio.low, ratio.high) == (2, 1.75, 2.5)


def timed(candidate: str, *seconds: float, cold: float | None = None, flops: int | None = None) -> Record:
    return Record("tiny-b1", candidate, seconds=list(seconds), cold_seconds=cold, flops=flops, load=0.5)


RECORDS = [
    timed(EAGER_BACKWARD, 0.3, 0.3, 0.3, flops=3 * 10**9),
    timed(FROZEN, 0.2, 0.2, 0.2, flops=2 * 10**9),
    timed(COMPILED_MODEL, 0.1, 0.15, 0.16, cold=10, flops=2 * 10**9),
    Record("tiny-b1", COMPILED_STEP, failed="a reason"),
    timed(GRADPRUNE, 0.1, 0.1, 0.1, cold=20, flops=2 * 10**9),
]


def test_comparison() -> None:
    one = Comparison(RECORDS, "tiny-b1")
    assert one.best_alternative == COMPILED_MODEL
    assert [failed.candidate for failed in one.failed] == [COMPILED_STEP]
    ratio = one.ratio(GRADPRUNE, COMPILED_MODEL)
    assert ratio is not None
    assert ratio.median == pytest.approx(1.5)
    assert one.ratio(GRADPRUNE, COMPILED_STEP) is None
    assert one.predicted_ratio(GRADPRUNE) == 1.5
    assert one.predicted_ratio(EAGER_BACKWARD) == 1
    assert one.break_even(GRADPRUNE) == pytest.approx((20 - 10) / 0.05)
    assert one.break_even(COMPILED_MODEL) is None
    assert one.break_even(FROZEN) is None
    assert Comparison(RECORDS, "another").best_alternative is None
    assert one.derived(COMPILED_STEP) == {}
    derived = one.derived(GRADPRUNE)
    assert derived["ratios"][FROZEN] == {"median": 2, "low": 2, "high": 2}
    assert (derived["median_seconds"], derived["iqr_seconds"]) == (0.1, 0)


def test_a_candidate_that_is_slower_never_breaks_even() -> None:
    assert Comparison([timed(FROZEN, 0.1), timed(GRADPRUNE, 0.2, cold=1)], "tiny-b1").break_even(GRADPRUNE) is None


LAYERS = [
    Kernels("tiny-b1", "a", "conv 3x3", "forward", 2, 10**6, {"conv": 2e-3, "packed conv": 1e-3}),
    Kernels("tiny-b1", "b", "conv 3x3", "forward", 1, 10**6, {"conv": 3e-3, "packed conv": None}),
]


def test_limit_is_the_sum_of_the_fastest() -> None:
    assert kernels.limit(LAYERS, "tiny-b1") == pytest.approx(5e-3)
    assert kernels.limit(LAYERS, "another") is None
    assert kernels.rates(LAYERS) == (pytest.approx(3e6 / 7e-3), pytest.approx(3e6 / 5e-3))


# Files


def results(folder: Path, kind: str = "step", **settings: object) -> Results[Any]:
    used = dataclasses.replace(Settings(), **settings)  # type: ignore[arg-type]
    return Results(folder / f"{kind}.json", command.BENCHMARKS[kind].record, used, HERE)


def document(file: Results[Any]) -> str:
    benchmark = command.BENCHMARKS[file.path.stem]
    return report.document(file, benchmark.about, benchmark.sections(file), benchmark.legend)


@pytest.mark.parametrize(("kind", "records"), [("step", RECORDS), ("kernels", LAYERS)])
def test_results_survive_the_file(kind: str, records: list[Record] | list[Kernels], tmp_path: Path) -> None:
    written = results(tmp_path, kind)
    written.add(records)
    assert Results.read(written.path, written.record) == written
    assert os.listdir(tmp_path) == [f"{kind}.json"]
    again = results(tmp_path, kind)
    again.resume()
    assert again.records == records


def test_the_json_has_what_follows_from_the_figures(tmp_path: Path) -> None:
    results(tmp_path).add(RECORDS)
    content = json.loads((tmp_path / "step.json").read_text())
    assert content["environment"] == HERE
    ours = content["records"][-1]
    assert ours["derived"]["best_alternative"] == COMPILED_MODEL
    assert ours["derived"]["ratios"][FROZEN]["median"] == 2


def test_new_rounds_replace_old_ones_of_the_same_case_only(tmp_path: Path) -> None:
    file = results(tmp_path)
    file.add(RECORDS)
    file.add([dataclasses.replace(RECORDS[0], case="tiny-b2")])
    file.add([timed(FROZEN, 1.0)], instead_of="tiny-b1")
    assert [(one.case, one.candidate) for one in file.records] == [("tiny-b2", EAGER_BACKWARD), ("tiny-b1", FROZEN)]


def test_figures_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    results(tmp_path).add(RECORDS)
    with pytest.raises(OptionError, match="threads 1, this run has 2: pass --fresh"):
        results(tmp_path, threads=2).resume()
    other = results(tmp_path)
    other.environment = {**HERE, "torch": "3"}
    with pytest.raises(OptionError, match="torch '2', this run has '3'"):
        other.resume()


@pytest.mark.parametrize("content", ["{", "[]", '{"records": [{}], "settings": {}, "environment": {}}'])
def test_a_file_that_is_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text(content)
    with pytest.raises(OptionError, match=r"step\.json is not a results file.*--fresh"):
        results(tmp_path).resume()


# Tables and plots


def test_table_shows_ratios_losses_and_failures(tmp_path: Path) -> None:
    file = results(tmp_path)
    file.records = [*RECORDS]
    results(tmp_path, "kernels").add(LAYERS)
    shown = document(file)
    assert "**1 thread, fp32**, BLAS **mkl**" in shown
    lines = shown.splitlines()
    summary = next(line for line in lines if line.startswith("| tiny-b1"))
    assert "1.50x (1.25-1.55)" in summary
    assert summary.split("|")[-2].strip() == "20"  # 100 ms of 5 ms
    row = next(line for line in lines if line.startswith(f"| {EAGER_BACKWARD}"))
    assert "0.67x" in row
    assert "**compile(step) failed:** a reason" in lines
    ours = next(line for line in lines if line.startswith("| gradprune")).split("|")
    assert [cell.strip() for cell in ours[2:6]] == ["100.0", "0", "3.00x", "-"]
    assert ours[-2].strip() == "200.0"


def test_table_says_when_compilation_never_pays(tmp_path: Path) -> None:
    file = results(tmp_path)
    file.records = [timed(FROZEN, 0.1), timed(GRADPRUNE, 0.2, cold=1)]
    shown = document(file)
    assert "0.50x (0.50-0.50)" in shown
    row = next(line for line in shown.splitlines() if line.startswith("| gradprune"))
    assert row.split("|")[-2].strip() == "never"


def test_tables_are_aligned() -> None:
    assert report.grid(["name", "n"], [["a", "1,000"]]).splitlines() == [
        "| name |     n |",
        "| ---- | ----: |",
        "| a    | 1,000 |",
    ]


def test_kernel_table(tmp_path: Path) -> None:
    file = results(tmp_path, "kernels")
    file.records = [*LAYERS]
    shown = document(file)
    assert "Limit **5 ms**; plain kernels 7 ms." in shown
    assert "packed conv 2, conv 1" in shown


@pytest.mark.parametrize("kind", [name for name, one in command.BENCHMARKS.items() if one.record in (Record, Kernels)])
def test_every_kind_has_a_table_and_a_plot(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = results(tmp_path, kind)
    file.records = [*LAYERS] if kind == "kernels" else [*RECORDS]
    assert f"# gradprune bench {kind}" in command.write(command.BENCHMARKS[kind], file)
    assert (tmp_path / f"{kind}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# Cases


def test_names_of_cases() -> None:
    assert [case.name for case in CASES][:3] == ["resnet18-112-b8", "resnet50-112-b8", "resnet50-112-b32"]
    assert all(find_case(case.name) == case for case in CASES)
    assert find_case("resnet50-112").batch == 8
    assert find_case("vit_small-224-b17").batch == 17
    with pytest.raises(OptionError, match="no case 'resnet19-112-b8': did you mean 'resnet18-112-b8'"):
        find_case("resnet19-112-b8")


SMALL = [
    *(
        dataclasses.replace(find_case(name), batch=2, shape=(3, 32, 32))
        for name in ("resnet18-112", "mobilenetv2-112", "convnext_atto-112")
    ),
    dataclasses.replace(
        find_case("vit_small-224"),
        batch=2,
        shape=(3, 32, 32),
        build=partial(find_case("vit_small-224").build, img_size=32, depth=2),
    ),
    dataclasses.replace(find_case("mnist-cnn"), batch=2),
    dataclasses.replace(
        find_case("bert-64"),
        batch=2,
        shape=(8, 32),
        build=partial(cases.Encoder, layers=2, hidden=32, heads=2, tokens=8),
    ),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.network)
def test_cases_are_deterministic_and_have_a_gradient(case: Case) -> None:
    if case.requires:
        let_torchvision_import()
        pytest.importorskip(case.requires)
    work, again = case.prepare(), case.prepare()
    assert torch.equal(work.x, again.x)
    assert all(torch.equal(a, b) for a, b in zip(work.model.parameters(), again.model.parameters(), strict=True))
    assert not any(module.training for module in work.model.modules())
    reference = step.Reference.of(work, Settings(steps=1))
    assert reference.errors[1] < 0.05
    # The check tells the gradients at its points apart.
    assert reference.tolerance >= 0.01
    drawn, other = (gradient for _, gradient in reference.points[:2])
    assert (drawn - other).norm() / drawn.norm() > 2 * reference.tolerance * 0.99


def test_inputs_outside_of_images_are_not_clamped() -> None:
    x = torch.zeros(1, 1)
    assert move(find_case("bert-64"), x, x, torch.tensor([[-1.0]])) < 0
    assert move(TINY, x, x, torch.tensor([[-1.0]])) == 0


# The check


@pytest.fixture(scope="module")
def reference() -> step.Reference:
    return step.Reference.of(dataclasses.replace(TINY, batch=4).prepare(), Settings(steps=2))


def test_the_eager_steps_pass_the_check(reference: step.Reference) -> None:
    for baseline in baselines.choose(EAGER, "cpu"):
        assert max(reference.check(baseline.build(reference.work, Settings()).step)) < 1e-5


def wrong_steps(work: cases.Workload) -> dict[str, Step]:
    right = pgd_step(work.model.requires_grad_(False), work.case)

    def ignores_x_adv(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return right(x, x, y)

    def ignores_x(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return right(x_adv, x_adv, y)

    def gradient_at_x(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gradient = right(x, x, y)[1]
        return move(work.case, x_adv, x, gradient), gradient

    def wrong_if_aliased(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return right(x_adv, x + 0.5 * (x_adv is x), y)

    def nan(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        moved, gradient = right(x_adv, x, y)
        return moved, gradient * float("nan")

    steps = (ignores_x_adv, ignores_x, gradient_at_x, wrong_if_aliased, nan)
    return {step.__name__: step for step in steps}


@pytest.mark.parametrize("name", ["ignores_x_adv", "ignores_x", "gradient_at_x", "wrong_if_aliased", "nan"])
def test_wrong_steps_fail_the_check(name: str, reference: step.Reference) -> None:
    with pytest.raises(harness.CheckFailed, match="x itself" if name == "wrong_if_aliased" else "at some x_adv"):
        reference.check(wrong_steps(reference.work)[name])


# Measuring


def contender(name: str, step: Step) -> Contender:
    return Contender(name, nn.Identity(), step)


def test_rounds_take_turns_and_end_with_the_budget(reference: step.Reference) -> None:
    order: list[str] = []

    def step_of(name: str) -> Step:
        def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            order.append(name)
            return x_adv, x_adv

        return step

    both = [contender(name, step_of(name)) for name in "ab"]
    seconds = harness.time_rounds(both, reference.work, 1, harness.Budget(9, seconds=0), lambda: None)
    assert "".join(order) == "abbaab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_candidate_that_fails_is_not_timed() -> None:
    def broken(work: cases.Workload, settings: Settings) -> Contender:
        raise RuntimeError("\nno such operator\nand a lot more")

    def wrong(work: cases.Workload, settings: Settings) -> Contender:
        return contender("wrong", wrong_steps(work)["ignores_x_adv"])

    tried = [Baseline("b", "broken", broken, compiles=False), Baseline("w", "wrong", wrong, compiles=False)]
    tried += baselines.choose(["frozen"], "cpu")
    found = step.measure_case(TINY, tried, Settings(steps=1), harness.Budget(1))
    assert [(one.candidate, len(one.seconds)) for one in found] == [("broken", 0), ("wrong", 0), (FROZEN, 1)]
    assert found[0].failed == "RuntimeError: no such operator"
    assert "at some x_adv" in (found[1].failed or "")
    assert found[2].failed is None


def test_gradprune_on_a_tiny_network() -> None:
    chosen = baselines.choose(["backward", "frozen", "gradprune"], "cpu")
    full, frozen, ours = step.measure_case(TINY, chosen, Settings(steps=2), harness.Budget(1))
    assert ours.failed is None
    assert ours.cold_seconds is not None
    assert frozen.cold_seconds is None
    assert full.flops is not None
    assert frozen.flops is not None
    assert ours.flops is not None
    assert full.flops > frozen.flops
    assert full.saved_bytes is not None
    assert ours.saved_bytes is not None
    assert ours.saved_bytes < full.saved_bytes
    assert min(one.peak_bytes or 0 for one in (full, frozen, ours)) > 0
    assert ours.differing is not None
    assert ours.differing < 0.01


def test_ablations_leave_out_every_pass() -> None:
    names = [baseline.name for baseline in ablation.ablations()]
    assert names[0] == GRADPRUNE
    assert {f"without {name}" for name in PASS_NAMES} <= set(names)
    assert len(names) == len(set(names))


def test_candidates_by_device() -> None:
    by_device = {device: {one.key for one in baselines.choose(None, device)} for device in ("cpu", "cuda")}
    ways = {f"{way}-{how}" for way in ("compile-model", "gradprune") for how in ("graphs", "tuned")}
    assert by_device["cuda"] - by_device["cpu"] == ways
    mnist, other = find_case("mnist-cnn"), TINY
    assert [len(baselines.for_case(baselines.BASELINES, case)) for case in (mnist, other)] == [11, 10]


# Kernels


class Layers(nn.Module):
    """Convolutions of every class, two alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.same = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.same:
            x = layer(x)
        x = self.pointwise(self.depthwise(self.strided(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_kernels_of_every_class_agree() -> None:
    case = Case("layers", 2, (3, 16, 16), Layers)
    found = kernels.measure_kernels(case, Settings(), rounds=1)
    forward = [one for one in found if one.direction == "forward"]
    assert [(one.kind, one.count) for one in forward] == [
        ("conv other", 1),
        ("conv 3x3", 2),
        ("conv 3x3", 1),
        ("depthwise", 1),
        ("conv 1x1", 1),
        ("linear", 1),
    ]
    assert forward[1].flops == 2 * (2 * 8 * 8 * 8) * 8 * 9
    # Every way can be used here; one that computed something else would be None.
    packed = torch.backends.mkldnn.is_available()
    for one in found:
        assert None not in one.seconds.values(), one.candidate
        assert not packed or len(one.seconds) >= 2
    assert (kernels.limit(found, "layers-b2") or 0) > 0


def test_a_way_that_computes_something_else_is_out() -> None:
    ones = torch.ones(2, 3)
    ways: kernels.Ways = {"right": lambda: lambda: ones, "wrong": lambda: lambda: 2 * ones}
    seconds = kernels.time_ways(ways, "cpu", rounds=1)
    assert seconds["right"] is not None
    assert seconds["wrong"] is None


# First steps


def test_first_steps_run_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (baseline,) = baselines.choose(["frozen"], "cpu")
    program = "import os; print(len(os.listdir(os.environ['TORCHINDUCTOR_CACHE_DIR'])), 0.5); {}"
    keep = "open(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '/x', 'w')"
    monkeypatch.setattr(first_step, "PROGRAM", program.format(keep))
    found = first_step.measure_first_step(TINY, baseline, Settings())
    assert (found.cold_seconds, found.warm_seconds, found.failed) == (0, 1, None)
    assert (found.cold_processor_seconds, found.warm_processor_seconds) == (0.5, 0.5)
    monkeypatch.setattr(first_step, "PROGRAM", "raise ValueError('no good')")
    found = first_step.measure_first_step(TINY, baseline, Settings())
    assert found.failed == "cold: ValueError: no good"


def test_the_process_takes_one_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"case": "tiny-b1", "baseline": "frozen", "settings": dataclasses.asdict(Settings())}
    monkeypatch.setattr("sys.argv", ["-c", json.dumps(asked)])
    first_step.main()
    assert all(float(seconds) >= 0 for seconds in capsys.readouterr().out.split())


# Command line


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("measured although there was nothing to measure")

    for module, name in ((step, "measure_case"), (kernels, "measure_kernels"), (first_step, "measure_first_step")):
        monkeypatch.setattr(module, name, work)


def run(kind: str, output: Path, *more: str) -> int:
    return main(["bench", kind, "--output", str(output), *more])


def eager(*more: str) -> list[str]:
    return ["--threads", "1", "--rounds", "1", "--steps", "2", "--candidates", *EAGER, "--cases", *more]


def test_a_run_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    threads = torch.get_num_threads()
    assert run("step", tmp_path, *eager("tiny-b1", "tiny-b2"), "--limit") == 0
    assert torch.get_num_threads() == threads
    written = {f"{kind}.{suffix}" for kind in ("step", "kernels") for suffix in ("json", "md", "png")}
    assert set(os.listdir(tmp_path)) == written
    shown = capsys.readouterr().out
    assert (tmp_path / "step.md").read_text() in shown
    content = json.loads((tmp_path / "step.json").read_text())
    assert content["settings"] == dataclasses.asdict(Settings(steps=2))
    assert [(one["case"], one["candidate"]) for one in content["records"]] == [
        (case, name) for case in ("tiny-b1", "tiny-b2") for name in (EAGER_BACKWARD, "eager autograd.grad", FROZEN)
    ]
    for one in content["records"]:
        assert one["failed"] is None
        assert len(one["seconds"]) == 1
        assert one["gradient_error"] < 1e-4
        assert one["differing"] == 0
        assert one["peak_bytes"] > 0
        assert one["derived"]["best_alternative"] == FROZEN

    # The same again has nothing left to do; a candidate more brings those that are there along.
    asked = []

    def measured(case: Case, chosen: list[Baseline], *_: object, **__: object) -> list[Record]:
        asked.append((case.name, [one.key for one in chosen]))
        return [Record(case.name, one.name, failed="made up") for one in chosen]

    monkeypatch.setattr(step, "measure_case", measured)
    assert run("step", tmp_path, *eager("tiny-b1", "tiny-b2"), "--limit") == 0
    assert asked == []
    assert "tiny-b2: already in" in capsys.readouterr().err
    more = ["--threads", "1", "--steps", "2", "--candidates", "gradprune", "--cases", "tiny-b2"]
    assert run("step", tmp_path, *more) == 0
    assert asked == [("tiny-b2", ["gradprune", *EAGER])]
    assert run("step", tmp_path, *eager("tiny-b3"), "--fresh") == 0
    assert {one.case for one in Results.read(tmp_path / "step.json", Record).records} == {"tiny-b3"}

    (tmp_path / "step.md").unlink()
    assert run("table", tmp_path) == 0
    assert "**frozen eager failed:** made up" in (tmp_path / "step.md").read_text()


def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(case: Case, chosen: list[Baseline], *_: object, **__: object) -> list[Record]:
        if case.batch == 2:
            raise KeyboardInterrupt
        return [Record(case.name, one.name, failed="made up") for one in chosen]

    monkeypatch.setattr(step, "measure_case", measured)
    options = ["--cases", "tiny", "--batches", "1", "2", "--candidates", "frozen", "--threads", "1"]
    assert run("scaling", tmp_path, *options) == 130
    assert {one.case for one in Results.read(tmp_path / "scaling.json", Record).records} == {"tiny-b1"}


def test_batches_and_default_cases() -> None:
    def names(*arguments: str) -> list[str]:
        from gradprune.cli.main import build_parser

        parsed = build_parser(["bench"]).parse_args(["bench", *arguments])
        benchmark = command.BENCHMARKS[parsed.kind]
        chosen = benchmark.cases(parsed) if isinstance(benchmark, step.StepBenchmark) else chosen_cases(parsed)
        return [case.name for case in chosen]

    assert names("step") == [case.name for case in CASES]
    assert names("overhead") == ["tiny-b1"]
    assert names("ablation") == ["resnet18-112-b8"]
    assert names("scaling", "--cases", "bert-64", "--batches", "1", "4") == ["bert-64-b1", "bert-64-b4"]
    assert names("kernels", "--cases", "resnet50-112-b8", "resnet50-112-b32", "--batch", "3") == ["resnet50-112-b3"]


def test_folders_tell_runs_apart() -> None:
    assert command._folder_name(Settings()) == "cpu-1-thread"
    assert command._folder_name(Settings(threads=2, autocast="bf16", channels_last=True)) == (
        "cpu-2-threads-bf16-channels-last"
    )


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cases", "resnet18-113-b8"], "did you mean 'resnet18-112-b8'"),
        (["--candidates", "gradprun"], "no candidate 'gradprun': did you mean 'gradprune'"),
        (["--tf32", "--device", "cpu"], "--tf32 is about CUDA"),
    ],
)
def test_what_does_not_exist_is_refused_before_any_work(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("step", tmp_path / "out", *arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_work")
def test_a_missing_gpu_package_or_folder_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("step", tmp_path, "--device", "cuda") == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run("step", tmp_path / "file", *eager("tiny")) == 2
    assert "pass --output DIR" in capsys.readouterr().err
    monkeypatch.setattr(command, "EXTRAS", ("no_such_module",))
    assert run("step", tmp_path, *eager("tiny")) == 1
    assert 'pip install "gradprune[bench]"' in capsys.readouterr().err
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert run("step", tmp_path, "--candidates", "jax") == 2
    assert "pip install jax" in capsys.readouterr().err


def test_a_table_of_nothing_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("table", tmp_path) == 2
    assert "run gradprune bench step first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--threads", "0"], "from 1 on, got '0'"), (["--rounds", "two"], "got 'two'"), (["--autocast", "x"], "fp16")],
)
def test_a_bad_value_is_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "step", *arguments])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ([], ["step"], ["scaling"], ["table"]):
        with pytest.raises(SystemExit) as stop:
            main(["bench", *kind, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert "gradprune bench scaling --cases" in shown
        assert kind or all(baseline.key in shown for baseline in baselines.BASELINES)
