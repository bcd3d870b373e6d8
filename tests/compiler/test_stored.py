"""Steps on disk: found again where nothing that they depend on is another, and only there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import in_one_piece
from tiny import backward_step, images, input_gradient, network
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor.utils import fresh_cache

import gradprune
from gradprune.compiler import first_call, pruning
from gradprune.torch_compat import artifacts

pytestmark = [pytest.mark.inductor, in_one_piece]


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    with fresh_cache(), functorch_config.patch(enable_autograd_cache=True):
        yield


def stored() -> list[Path]:
    return sorted(artifacts.path_of("").parent.glob("*.json"))


def run(step: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, gradprune.Report]:
    """Compile and call a step as a new process would."""
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="gradprune", dynamic=False, options=options)
    result = compiled(*(args or images()))
    return result, gradprune.reports(compiled)[-1]


def test_a_later_process_traces_nothing_and_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    first, cold = run(backward_step(network()))
    monkeypatch.setattr(pruning.PruningPass, "__call__", None)
    second, warm = run(backward_step(network()), strict=False)
    assert (cold.is_stored, warm.is_stored) == (False, True)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert warm.fallback is None
    data = [{**report.to_dict(), "check": ""} for report in (cold, warm)]
    assert data[0] == data[1]
    assert str(warm.why(cold.hoisted[0].node)) == str(cold.why(cold.hoisted[0].node))
    assert str(warm.why(cold.removed[0].node)) == str(cold.why(cold.removed[0].node))


def test_weights_are_read_in_every_process():
    run(backward_step(network()))
    model = network()
    step = backward_step(model)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        found, report = run(step)
        assert report.is_stored
        torch.testing.assert_close(found[1], step(*images())[1], rtol=1e-4, atol=1e-6)
        model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="gradprune", dynamic=False)
    x_adv, x, y = images()
    for _ in range(3):
        found = compiled(x_adv, x, y)
        torch.testing.assert_close(found[1], step(x_adv, x, y)[1], rtol=1e-4, atol=1e-6)
        model.zero_grad()
        x_adv = found[0]
        with torch.no_grad():
            model[0].weight.mul_(0.9)  # in the middle of the attack
    assert gradprune.reports(compiled)[-1].is_stored


def test_a_stored_step_is_compared_with_eager_too():
    run(backward_step(network()), check="first")
    (file,) = stored()
    text = file.read_text()
    assert "aten.rsqrt" in text  # in the prologue, which folds batch norm
    file.write_text(text.replace("aten.rsqrt", "aten.sqrt"))
    found, report = run(backward_step(network()), check="first")
    assert report.is_stored
    assert "is not what the captured graph computes" in report.check
    torch.testing.assert_close(found[1], backward_step(network())(*images())[1])
    assert not stored()  # and is not found again


def closed_over(factor: float) -> Callable[..., Any]:
    def step(x: Tensor, weight: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((x * weight).sin().sum() * factor, x)
        return x.detach() + gradient

    return step


ONE = closed_over(1.0)


def test_what_a_step_depends_on_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch):
    x, weight = torch.rand(4, 3), torch.rand(4, 3)
    number = 0

    def is_found(step: Callable[..., Any] = ONE, *args: Any, **options: Any) -> bool:
        nonlocal number
        result, report = run(step, *(args or (x, weight)), **options)
        torch.testing.assert_close(result, step(*(args or (x, weight))))
        number += not report.is_stored
        assert len(stored()) == number
        return report.is_stored

    assert not is_found()
    assert is_found()
    assert not is_found(closed_over(2.0))
    assert not is_found(ONE, x[:2], weight[:2])
    assert not is_found(ONE, x.t(), weight.t())
    assert not is_found(ONE, x.double(), weight.double())
    assert not is_found(ONE, x, nn.Parameter(weight))
    assert not is_found(disable=("early-masks",))
    assert not is_found(inductor={"cpp.simdlen": 1})
    with torch._inductor.config.patch(max_autotune=True):
        assert not is_found()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert not is_found()
    monkeypatch.undo()
    monkeypatch.setattr("gradprune.compiler.stored.source_hash", lambda: "another version")
    assert not is_found()
    monkeypatch.undo()
    assert is_found()


def writes(x: Tensor, buffer: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad((x * x).sum(), x)
    buffer.copy_(gradient)
    return x.detach() + gradient


def returns_a_view(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad((x * other).sin().sum(), x)
    return gradient, other[0]


def of_two_views(x: Tensor, other: Tensor) -> Tensor:
    return ONE(x, other)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", ["writes", "view", "shared memory", "symbolic", "dump", "off", "model"])
def test_what_does_more_than_compute_is_not_stored(case: str, tmp_path: Path):
    x, other = torch.rand(4, 3), torch.rand(4, 3)
    for _ in range(2):
        torch._dynamo.reset()
        options: dict[str, Any] = {"dump": str(tmp_path)} if case == "dump" else {}
        step: Any = {"writes": writes, "view": returns_a_view}.get(case, of_two_views)
        step = network() if case == "model" else step
        compiled = torch.compile(step, backend="gradprune", dynamic=case == "symbolic", options=options)
        if case == "model":
            _, x_clean, y = images()
            input_gradient(compiled, x_clean, y)
        elif case == "shared memory":
            whole = torch.rand(8, 3)
            torch.testing.assert_close(compiled(whole[:4], whole[2:6]), step(whole[:4], whole[2:6]))
        else:
            with functorch_config.patch(enable_autograd_cache=case != "off"):
                found = compiled(x, other)
            torch.testing.assert_close(found, step(x, other))
        report = gradprune.reports(compiled)[-1]
        assert not report.is_stored
    assert not stored()


def test_a_damaged_file_is_as_good_as_none(caplog: pytest.LogCaptureFixture):
    first, _ = run(backward_step(network()))
    (file,) = stored()
    whole = file.read_text()
    file.write_text(whole[:100])
    with caplog.at_level(logging.WARNING):
        second, report = run(backward_step(network()))
    assert not report.is_stored
    assert torch.equal(first[1], second[1])
    assert "is compiled anew" in caplog.text
    assert json.loads(file.read_text()).keys() == json.loads(whole).keys()
    assert run(backward_step(network()))[1].is_stored


def test_a_failure_is_not_stored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pruning, "run_passes", lambda *args, **options: 1 / 0)
    _, report = run(backward_step(network()))
    assert report.fallback is not None
    assert not stored()


def test_one_that_was_wrong_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_call.FirstCall, "_compare", lambda *args: ("it is wrong", True))
    _, report = run(backward_step(network()))
    assert "it is wrong" in (report.fallback or "")
    assert not stored()


def test_a_random_step_draws_anew_in_every_call():
    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.dropout(x).square().sum(), x)
        return gradient

    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="gradprune", dynamic=False)
        x = torch.rand(64)
        assert not torch.equal(compiled(x), compiled(x))
        torch.manual_seed(0)
        one = compiled(x)
        torch.manual_seed(0)
        assert torch.equal(one, compiled(x))


def test_cache_artifacts_take_it_along():
    run(backward_step(network()))
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    with fresh_cache():
        assert not stored()
        torch.compiler.load_cache_artifacts(saved[0])
        assert run(backward_step(network()))[1].is_stored
