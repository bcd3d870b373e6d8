"""``gradprune bench attacks``: its arithmetic, its checks, its files, and small runs without a compiler."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradprune.attacks import AutoAttack, Runtime
from gradprune.bench import attack_candidates, attacks, baselines
from gradprune.bench.attack_candidates import (
    METHODS,
    RIVALS,
    TORCHATTACKS,
    TORCHATTACKS_COMPILED,
    TORCHATTACKS_FROZEN,
    UNCOMPILED,
    Method,
    choose_methods,
    our_contender,
)
from gradprune.bench.attacks import (
    ACTIVE_SET,
    BARE_STEP,
    FULL_BATCH,
    NOTHING_DROPPED,
    RUNTIME,
    Attacked,
    AttacksBenchmark,
    Contest,
)
from gradprune.bench.baselines import GRADPRUNE, Baseline, Contender
from gradprune.bench.cases import TINY, Case, Workload
from gradprune.bench.harness import Budget, CheckFailed
from gradprune.bench.store import Results, Settings
from gradprune.cli import bench as command
from gradprune.cli.main import main
from gradprune.errors import GradpruneError, OptionError
from gradprune.runtime import Query

HERE = {"cpu": "A processor", "blas": "mkl", "onednn": "3", "torch": "2"}
EAGER = Runtime(compile=False)
ONCE = Budget(1)
METHOD = {method.key: method for method in METHODS}


@pytest.fixture(scope="module")
def work() -> Workload:
    return dataclasses.replace(TINY, batch=4).prepare()


# Arithmetic, files, tables


def timed(part: str, attack: str, candidate: str, *seconds: float, **more: Any) -> Attacked:
    more = {"norm": "linf", "success_rate": 0.5, "distance": 0.25, "eps": 0.25, "load": 1.0, **more}
    case = "digits-b2" if part == "active-set" else "tiny-b1"
    return Attacked(part, case, attack, candidate, seconds=list(seconds), **more)


RECORDS = [
    timed("attacks", "fgsm", TORCHATTACKS, 3.0, 3.0, 3.0, differing=0.0, shown=4),
    timed("attacks", "fgsm", TORCHATTACKS_FROZEN, 2.0, 2.0, 2.0),
    Attacked("attacks", "tiny-b1", "fgsm", TORCHATTACKS_COMPILED, failed="a reason"),
    timed("attacks", "fgsm", UNCOMPILED, 1.0, 1.0, 1.0, shown=5),
    timed("attacks", "fgsm", GRADPRUNE, 2.0, 4.0, 2.0, cold_seconds=12.0, compilations=2, differing=0.125),
    Attacked("attacks", "tiny-b1", "cw", TORCHATTACKS_COMPILED, failed="a reason"),
    timed("overhead", "pgd-50", BARE_STEP, 1.0, 1.0, 1.0),
    timed("overhead", "pgd-50", RUNTIME, 1.25, 1.25, 1.25, steps=50, outside=[0.01, 0.03, 0.02]),
    timed("active-set", "pgd-50", ACTIVE_SET, 1.0, 1.0, 1.0, other_verdicts=1, compilations=3, success_rate=0.75),
    timed("active-set", "pgd-50", FULL_BATCH, 2.0, 2.0, 2.0, other_verdicts=0),
]


def file(folder: Path, records: list[Attacked]) -> Results[Attacked]:
    return Results(folder / "attacks.json", Attacked, Settings(), HERE, [*records])


def test_a_contest_is_one_attack_on_one_case() -> None:
    fgsm, cw = Contest.all(RECORDS, "attacks")
    assert (fgsm.attack, cw.attack) == ("fgsm", "cw")
    assert Contest.all(RECORDS, "attacks", "another") == []
    ratio = fgsm.ratio(GRADPRUNE, TORCHATTACKS)
    assert ratio is not None
    assert ratio.median == 1.5
    assert fgsm.ratio(GRADPRUNE, TORCHATTACKS_COMPILED) is None
    assert cw.measured == {}
    derived = fgsm.derived(GRADPRUNE)
    assert (derived["median_seconds"], derived["compile_seconds"]) == (2, 10)
    assert derived["ratios"][UNCOMPILED]["median"] == 0.5
    assert fgsm.derived(TORCHATTACKS_COMPILED) == {}
    (overhead,) = Contest.all(RECORDS, "overhead")
    assert overhead.derived(RUNTIME)["outside_share"] == 0.02
    assert overhead.derived(BARE_STEP)["outside_share"] is None


def test_records_survive_the_file(tmp_path: Path) -> None:
    written = file(tmp_path, [])
    written.add(RECORDS)
    assert Results.read(written.path, Attacked) == written
    content = json.loads(written.path.read_text())
    assert content["records"][4]["derived"]["ratios"][TORCHATTACKS]["median"] == 1.5


def test_tables_show_losses_like_wins(tmp_path: Path) -> None:
    lines = command.write(AttacksBenchmark(), file(tmp_path, RECORDS)).splitlines()

    def row(start: str) -> list[str]:
        (line,) = (line for line in lines if line.startswith(f"| {start}"))
        return [cell.strip() for cell in line.split("|")[1:-1]]

    summary = row("tiny-b1, fgsm")
    assert summary[2:] == ["1.50x (1.12-1.50)", "1.00x (0.75-1.00)", "-", "0.50x (0.38-0.50)", "1.25x"]
    ours = row("fgsm, gradprune  ")
    assert ours[1:7] == ["2", "1", "1.50x", "1.00x", "-", "0.50x"]
    assert ours[7:] == ["10", "2", "-", "50.0%", "0.25 linf", "12.5%"]
    assert row(f"fgsm, {TORCHATTACKS_COMPILED}")[1:] == ["-"] * 12
    assert f"**{TORCHATTACKS_COMPILED} failed:** a reason (fgsm, cw)" in lines
    assert row(f"tiny-b1, pgd-50, {RUNTIME}")[3:7] == ["25", "0.80x (0.80-0.80)", "125.0% (125.0%-125.0%)", "2.00%"]
    active = row(f"pgd-50, {ACTIVE_SET}")
    assert active[1:] == ["0.25", "1", "0", "50.0% (50.0%-50.0%)", "-", "25.0%", "1", "-", "3"]


def test_plot_has_a_bar_for_every_ratio(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = file(tmp_path, RECORDS)
    bars = AttacksBenchmark().bars(results.records, "tiny-b1")
    assert [(bar.label, bar.value) for bar in bars] == [("fgsm, 1.2x the inputs", 1.5), ("", 0.5)]
    assert [(bar.label, bar.value) for bar in AttacksBenchmark().bars(results.records, "digits-b2")] == [("pgd-50", 2)]
    command.write(AttacksBenchmark(), results)
    assert (tmp_path / "attacks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# Attacks


def test_attacks_are_found_by_name() -> None:
    assert choose_methods(None) == list(METHODS)
    assert [method.key for method in choose_methods(["pgd-50", "fgsm"])] == ["fgsm", "pgd-50"]
    with pytest.raises(OptionError, match="no attack 'pgd-5': did you mean 'pgd-50'"):
        choose_methods(["pgd-5"])


class Lines(nn.Module):
    """More classes than ten."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :12]


def test_networks_have_ten_classes_at_most(work: Workload) -> None:
    assert attack_candidates.with_ten_classes(work) is work
    x = work.x.clone()
    x[:, 0, 1, 3] = 2  # the last of the twelve is the largest
    few = attack_candidates.with_ten_classes(Workload(work.case, Lines().eval(), x, x.flatten(1)[:, :12].argmax(1)))
    assert few.model(x).shape == (4, 10)
    assert few.y.max() < 10
    assert not few.model.training


def uncompiled(method: Method) -> list[Baseline]:
    build = partial(our_contender, make=method.ours, runtime=EAGER)
    return [
        Baseline("", name, lambda work, settings, name=name: build(name, work=work, settings=settings), compiles=False)
        for name in (UNCOMPILED, GRADPRUNE)
    ]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "ways", uncompiled)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_every_attack_runs_and_is_checked(method: Method, work: Workload) -> None:
    both = attacks.measure_method(method, work, Settings(), ONCE)
    for one in both:
        assert one.failed is None
        assert (one.part, one.case, one.attack, len(one.seconds)) == ("attacks", "tiny-b4", method.key, 1)
        assert one.eps == (TINY.eps * method.ball if method.bounded else None)
        assert one.success_rate is not None
        assert one.cold_seconds is None
        assert one.shown is not None
        assert one.shown >= 4
        # Whatever is random is seeded, so that a second run returns the same.
        assert one.differing == (0 if method.deterministic else None)
    assert both[0].success_rate == both[1].success_rate


@pytest.mark.usefixtures("no_compiler")
def test_what_the_network_is_shown_is_counted(work: Workload) -> None:
    counting_classes, steps, batch = 1, 10, 4
    both = attacks.measure_method(METHOD["pgd-10"], work, Settings(), ONCE)
    assert both[0].shown == counting_classes + steps * batch


def test_what_is_no_adversarial_example_is_not_timed(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: dict[str, Callable[[Tensor], Tensor]] = {
        "far": lambda x: (x + 0.5).clamp(0, 1),
        "invalid": lambda x: torch.full_like(x, 1.01),
        "nan": lambda x: x * float("nan"),
        "shape": lambda x: x[:, :1],
    }

    def build(name: str, work: Workload, settings: Settings) -> Contender:
        if name == "broken":
            raise RuntimeError("\nno such thing\nand more")
        return Contender(name, nn.Identity(), attack_candidates.whole(lambda x, y: wrong[name](x)))

    made = [Baseline("", name, partial(build, name), compiles=False) for name in (*wrong, "broken")]
    monkeypatch.setattr(attacks, "ways", lambda method: [*made, *uncompiled(method)])
    found = attacks.measure_method(METHOD["fgsm"], work, Settings(), ONCE)
    failed = {one.candidate: one.failed for one in found if not one.seconds}
    assert set(failed) == {*wrong, "broken"}
    assert "outside of the ball" in (failed["far"] or "")
    assert "outside of the bounds by 1.0e-02" in (failed["invalid"] or "")
    assert "not finite" in (failed["nan"] or "")
    assert "another shape" in (failed["shape"] or "")
    assert failed["broken"] == "RuntimeError: no such thing"
    assert [one.failed for one in found[-2:]] == [None, None]
    # Nothing to compare with: the first did not pass.
    assert found[-1].differing is None


def test_an_attack_that_is_not_bounded_may_leave_the_ball(work: Workload) -> None:
    far = (work.x + 0.5).clamp(0, 1)
    attacks.check_examples(work, None, far)
    with pytest.raises(CheckFailed):
        attacks.check_examples(work, work.case.eps, far)


# Torchattacks


def test_without_torchattacks_its_columns_say_why(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(attack_candidates.importlib, "import_module", missing)
    chosen = [one for one in attack_candidates.ways(METHOD["fgsm"]) if not one.compiles]
    monkeypatch.setattr(attacks, "ways", lambda method: chosen)
    live, frozen, ours = attacks.measure_method(METHOD["fgsm"], work, Settings(), ONCE)
    for one in (live, frozen):
        assert "No module named 'torchattacks'" in (one.failed or "")
        assert "pip install --no-deps torchattacks" in (one.failed or "")
    assert ours.failed is None


def test_torchattacks_is_for_images_between_zero_and_one(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_candidates, "torchattacks", lambda: None)
    free = dataclasses.replace(work, case=dataclasses.replace(work.case, bounds=None))
    with pytest.raises(GradpruneError, match="in \\[0, 1\\] only"):
        attack_candidates.ways(METHOD["fgsm"])[0].build(free, Settings())


def test_ways_of_an_attack() -> None:
    found = attack_candidates.ways(METHOD["cw"])
    assert [way.name for way in found] == [*RIVALS, GRADPRUNE]
    assert [way.compiles for way in found] == [False, False, True, False, True]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_torchattacks_does_the_same(method: Method, work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        attack_candidates.torchattacks()
    except GradpruneError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(attacks, "ways", lambda m: [one for one in attack_candidates.ways(m) if not one.compiles])
    live, frozen, ours = attacks.measure_method(method, work, Settings(), ONCE)
    assert [one.failed for one in (live, frozen, ours)] == [None, None, None]
    if method.deterministic:
        assert frozen.differing == 0
    if method.key in ("fgsm", "pgd-10", "pgd-50", "mifgsm", "nifgsm", "sinifgsm"):
        assert ours.differing is not None
        assert ours.differing < 0.01
    assert ours.success_rate is not None
    assert live.success_rate is not None
    assert abs(ours.success_rate - live.success_rate) <= 0.25


# Overhead


def test_overhead_is_measured_around_the_functions(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "OVERHEAD_STEPS", 3)
    monkeypatch.setattr(attacks, "choose", lambda keys, device: baselines.choose(["frozen"], device))
    monkeypatch.setattr(attacks, "start_compiler", lambda: None)
    bare, runtime = attacks.measure_overhead(work, Settings(), ONCE, EAGER)
    assert (bare.candidate, runtime.candidate) == (BARE_STEP, RUNTIME)
    assert (bare.failed, runtime.failed) == (None, None)
    assert runtime.attack == "pgd-3"
    assert runtime.differing is not None
    assert runtime.differing < 0.01
    assert len(runtime.outside) == 1
    assert 0 < runtime.outside[0] < 1
    assert bare.outside == []


# Active set


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLES": 24, "CHANNELS": 4, "EPOCHS": 8, "STEPS": 3, "QUERIES": 5}.items():
        monkeypatch.setattr(attacks, name, value)


@pytest.mark.usefixtures("small")
def test_the_active_set_changes_no_verdict() -> None:
    pytest.importorskip("sklearn")
    trained = attacks.half_robust(Settings())
    assert attacks.digits_name() == trained.case.name == "digits-4-8-b24"
    assert len(trained.x) == 24
    for attack, make in attacks.ACTIVE.items():
        found = attacks.measure_active_set(attack, make, trained, Settings(), ONCE, EAGER)
        names = [ACTIVE_SET, FULL_BATCH, *[NOTHING_DROPPED] * (attack == "autoattack")]
        assert [one.candidate for one in found] == names
        assert [(one.failed, one.other_verdicts) for one in found[:2]] == [(None, 0)] * 2
        assert found[0].success_rate is not None
        assert 0.25 < found[0].success_rate < 0.85
        assert found[-1].other_verdicts is not None


def test_half_of_the_samples_are_fooled_in_the_ball_that_is_found() -> None:
    # What changes the class of a sample is its distance to zero, that is 0.01 to 0.10.
    x = 0.5 + torch.arange(1, 11).view(10, 1) / 100
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.bias.copy_(torch.tensor([0.5, -0.5]))
    case = Case("line", 10, (1,), lambda: model)
    found = attacks.half_fooled(Workload(case, model, x, torch.ones(10, dtype=torch.int64)))
    assert found.case.eps == pytest.approx(0.05, abs=attacks.LARGEST_EPS / 2**attacks.HALVINGS + 1e-6)
    assert found.case.eps >= 0.05
    assert found.case.step_size == pytest.approx(found.case.eps / 4)


def test_the_whole_ensemble_drops_nothing(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    y = work.y.clone()
    y[0] = (y[0] + 1) % 10  # fooled from the start
    case = dataclasses.replace(work.case, eps=0.03)  # in which some are fooled and some are not
    shown: dict[type[AutoAttack], set[int]] = {}
    verdicts = []
    for kind in (AutoAttack, attacks.WholeEnsemble):
        attack = attacks.auto_attack(case, kind)
        sizes: list[int] = []
        gradient = Query.gradient

        def counted(self: Query, x: Tensor, *others: Any, sizes: list[int] = sizes, real: Any = gradient) -> Any:
            sizes.append(len(x))
            return real(self, x, *others)

        with monkeypatch.context() as patch:
            patch.setattr(Query, "gradient", counted)
            x_adv = attack(work.model, work.x, y, runtime=dataclasses.replace(EAGER, active_set=False))
        shown[kind] = set(sizes)
        verdicts.append(work.model(x_adv).argmax(1) != y)
    assert min(shown[AutoAttack]) < 3  # what it has fooled is gone
    assert shown[attacks.WholeEnsemble] - {4} <= {3}  # FAB has nothing to do for what is misclassified as it is
    assert torch.equal(*verdicts)


# Command line


def run(output: Path, *more: str) -> int:
    return main(["bench", "attacks", "--output", str(output), "--threads", "1", "--rounds", "1", *more])


@pytest.mark.usefixtures("no_compiler")
def test_a_run_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    options = ["--cases", "tiny-b2", "--parts", "attacks", "--attacks", "fgsm", "deepfool"]
    assert run(tmp_path, *options) == 0
    assert (tmp_path / "attacks.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "attacks.png").exists()
    content = json.loads((tmp_path / "attacks.json").read_text())
    assert "torchattacks" in content["environment"]
    keys = [(one["case"], one["attack"], one["candidate"]) for one in content["records"]]
    assert keys == [("tiny-b2", attack, name) for attack in ("fgsm", "deepfool") for name in (UNCOMPILED, GRADPRUNE)]

    # The same again has nothing left to do; one attack more is measured alone.
    asked = []

    def measured(method: Method, *_: object) -> list[Attacked]:
        asked.append(method.key)
        return [Attacked("attacks", "tiny-b2", method.key, GRADPRUNE, failed="made up")]

    monkeypatch.setattr(attacks, "measure_method", measured)
    assert run(tmp_path, *options, "cw") == 0
    assert asked == ["cw"]
    shown = capsys.readouterr()
    assert "tiny-b2, attacks, fgsm: already in" in shown.err
    assert "**gradprune failed:** made up (cw)" in shown.out


def test_what_does_not_exist_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "--attacks", "fgsn") == 2
    assert "no attack 'fgsn': did you mean 'fgsm'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
