"""Inductor's cache: an equal compilation is found again, another one never is, and the report is always complete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import backward_step, images, input_gradient, network
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import gradprune
from gradprune.compiler import pruning
from gradprune.compiler.capture import Capture
from gradprune.compiler.compilation import Compilation
from gradprune.compiler.options import Options
from gradprune.graph.build import Builder
from gradprune.graph.step_graph import InputRole, OutputRole
from gradprune.passes.base import Tier
from gradprune.passes.rewrite import rewrite


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    with fresh_cache(), torch._inductor.config.patch(fx_graph_cache=True, fx_graph_remote_cache=False):
        yield


def compile_again(form: str = "step", **options: Any) -> tuple[dict[str, int], gradprune.Report]:
    """Compile the same thing in what could be a new process; what the cache said, and the report."""
    torch._dynamo.reset()
    counters.clear()
    model, (x_adv, x, y) = network(), images()
    if form == "step":
        compiled: Any = torch.compile(backward_step(model), backend="gradprune", options=options)
        result, expected = compiled(x_adv, x, y)[1], backward_step(network())(x_adv, x, y)[1]
    else:
        compiled = torch.compile(model, backend="gradprune", options=options)
        result, expected = input_gradient(compiled, x, y), input_gradient(network(), x, y)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    (report,) = gradprune.reports(compiled)[-1:]
    seen = counters["inductor"]
    return {what: seen[f"fxgraph_cache_{what}"] for what in ("hit", "miss", "bypass")}, report


@pytest.mark.parametrize(("form", "graphs"), [("step", 1), ("model", 2)])
def test_equal_compilation_is_found_and_reported(form: str, graphs: int):
    cold, first = compile_again(form)
    warm, second = compile_again(form)
    assert cold == {"hit": 0, "miss": graphs, "bypass": 0}
    assert warm == {"hit": graphs, "miss": 0, "bypass": 0}
    assert [record.name for record in second.passes] == [record.name for record in first.passes]
    assert (second.ops, second.flops, second.saved_bytes) == (first.ops, first.flops, first.saved_bytes)
    assert second.removed == first.removed


def test_other_options_are_not_found(monkeypatch: pytest.MonkeyPatch):
    compile_again()
    seen, report = compile_again(disable=("dgrad-as-convolution",))
    assert (seen["hit"], seen["miss"]) == (0, 1)
    assert "dgrad-as-convolution" not in [record.name for record in report.passes]
    # Nor is anything that was compiled by another version of the passes.
    monkeypatch.setattr(pruning, "source_hash", lambda: "another version")
    assert compile_again()[0] == {"hit": 0, "miss": 1, "bypass": 0}
    monkeypatch.undo()
    assert compile_again()[0] == {"hit": 1, "miss": 0, "bypass": 0}


# --- What identifies a compilation ------------------------------------------------------------------------------------


def uuid_of(capture: Capture | None = None, user_pass: Any = None, **options: Any) -> bytes | None:
    capture = capture or Capture("step", [InputRole.WEIGHT, InputRole.PERTURBATION], {1: OutputRole.WEIGHT_GRAD})
    return pruning.PruningPass(Compilation(Options(**options), capture=capture), user_pass).uuid()


def test_equal_passes_have_one_uuid():
    assert uuid_of() is not None
    assert uuid_of() == uuid_of()


@pytest.mark.parametrize(
    "options", [{"disable": ("early-masks",)}, {"exact_order": True}, {"verify": True}, {"strict": True}], ids=str
)
def test_options_are_part_of_the_uuid(options: dict[str, Any]):
    assert uuid_of(**options) != uuid_of()


@pytest.mark.parametrize(
    "capture",
    [
        Capture("model", [InputRole.WEIGHT, InputRole.PERTURBATION], {1: OutputRole.WEIGHT_GRAD}),
        Capture("step", [InputRole.DATA, InputRole.PERTURBATION], {1: OutputRole.WEIGHT_GRAD}),
        Capture("step", [InputRole.WEIGHT, InputRole.PERTURBATION], {1: OutputRole.KEPT_WEIGHT_GRAD}),
        Capture("step", [InputRole.WEIGHT, InputRole.PERTURBATION], {0: OutputRole.WEIGHT_GRAD}),
    ],
    ids=["form", "inputs", "outputs", "positions"],
)
def test_roles_are_part_of_the_uuid(capture: Capture):
    assert uuid_of(capture) != uuid_of()


def test_source_is_part_of_the_uuid(monkeypatch: pytest.MonkeyPatch):
    before = uuid_of()
    monkeypatch.setattr(pruning, "source_hash", lambda: "another version")
    assert uuid_of() != before


def test_source_of_the_passes_is_hashed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    before = pruning.source_hash()
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "more.py").write_text("1")
    monkeypatch.setattr(pruning.passes, "__file__", str(tmp_path / "__init__.py"))
    pruning.source_hash.cache_clear()
    other = pruning.source_hash()
    (tmp_path / "rules" / "more.py").write_text("2")
    pruning.source_hash.cache_clear()
    another = pruning.source_hash()
    pruning.source_hash.cache_clear()
    assert len({before, other, another}) == 3


class Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
    """A pass of the user's own."""

    def __init__(self, uuid: str | None) -> None:
        self.name, self.graphs = uuid, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> str | None:
        return self.name


def test_passes_among_the_options_are_part_of_the_uuid():
    @rewrite(torch.ops.aten.mm.default, name="one", tier=Tier.EXACT, reason="")
    def one(node: torch.fx.Node, build: Builder) -> None:
        """Does nothing."""

    @rewrite(torch.ops.aten.mm.default, name="one", tier=Tier.EXACT, reason="")
    def other(node: torch.fx.Node, build: Builder) -> None:
        """Does nothing either."""

    assert uuid_of(passes=[one]) == uuid_of(passes=[one])
    assert len({uuid_of(), uuid_of(passes=[one]), uuid_of(passes=[other])}) == 3
    scope: dict[str, Any] = {"rewrite": rewrite, "aten": torch.ops.aten, "Tier": Tier}
    exec('@rewrite(aten.mm.default, name="x", tier=Tier.EXACT, reason="")\ndef x(node, build): pass', scope)
    assert uuid_of(passes=[scope["x"]]) is None  # nobody knows its source


def test_passes_of_the_users_own_are_part_of_the_uuid():
    assert uuid_of(user_pass=Pass("one")) == uuid_of(user_pass=Pass("one"))
    assert len({uuid_of(), uuid_of(user_pass=Pass("one")), uuid_of(user_pass=Pass("other"))}) == 3


@pytest.mark.parametrize("unknown", [Pass(None), lambda graph: None], ids=["no uuid", "function"])
def test_what_cannot_be_identified_is_not_cached(unknown: Any):
    assert uuid_of(user_pass=unknown) is None


def test_a_pass_of_the_users_own_still_runs(no_code: None):
    own = Pass("one")
    with torch._inductor.config.patch(joint_custom_pre_pass=own):
        _, report = compile_again()
    assert own.graphs == 1
    assert report.passes


def test_cache_artifacts_are_taken_to_another_machine():
    compile_again()
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    with fresh_cache():
        assert compile_again()[0] == {"hit": 0, "miss": 1, "bypass": 0}
    with fresh_cache():
        torch.compiler.load_cache_artifacts(saved[0])
        assert compile_again()[0] == {"hit": 1, "miss": 0, "bypass": 0}
