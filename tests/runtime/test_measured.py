"""``Runtime(compile="auto")``: what is compiled and when, with seconds that the tests say instead of a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradprune.attacks import PGD, Runtime
from gradprune.runtime import measured
from gradprune.runtime.functions import Functions
from gradprune.runtime.measured import SIZES, Measured

EAGER_FIXED, EAGER_PER_ROW = 1.0, 0.1


class Watched:
    """A function of rows that tells how it was called.

    Args:
        compiled_seconds: What a compiled call takes for a size; an eager one takes ``EAGER_FIXED`` and
            ``EAGER_PER_ROW``, and a first one ten seconds more.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, compiled_seconds: Callable[[int], float]) -> None:
        self.calls: list[tuple[str, int]] = []
        seconds = 0.0

        def eager(model: Any, x: Tensor, scale: Tensor) -> Tensor:
            nonlocal seconds
            self.calls.append(("eager", len(x)))
            seconds = EAGER_FIXED + EAGER_PER_ROW * len(x)
            return x * scale

        def compile_one(plain: Any) -> Any:
            def compiled(model: Any, x: Tensor, scale: Tensor) -> Tensor:
                nonlocal seconds
                is_first = ("compiled", len(x)) not in self.calls
                self.calls.append(("compiled", len(x)))
                seconds = compiled_seconds(len(x)) + 10 * is_first
                return x * scale

            return compiled

        def timed(call: Any, *arguments: Any) -> tuple[float, Any]:
            result = call(*arguments)
            return seconds, result

        monkeypatch.setattr(measured, "_timed", timed)
        self.function = Measured(eager, compile_one)

    def call(self, rows: int, **options: Any) -> list[tuple[str, int]]:
        """How the function was called in the end to compute so many rows."""
        x = torch.arange(float(rows))[:, None]
        self.calls.clear()
        assert torch.equal(self.function(None, x, torch.tensor(2.0), **options), 2 * x)
        return self.calls


def test_it_is_compiled_when_eager_calls_have_taken_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lambda size: 0.05 * size)
    calls = [watched.call(rows)[-1] for rows in (40, 30, 30, 30, 30, 30)]  # 5 and 4 seconds each
    assert calls == [("eager", 40), *[("eager", 30)] * 3, *[("compiled", 40)] * 2]
    assert watched.call(12)[-1] == ("compiled", 40)  # 2 seconds against 2.2
    assert watched.call(8) == [("eager", 8)]  # against 1.8
    assert watched.call(50) == [("eager", 50)]


def test_what_stays_eager_may_be_compiled_for_a_size_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lambda size: 0.05 * size)
    for _ in range(5):
        watched.call(40)
    calls = [watched.call(8)[-1] for _ in range(12)]
    assert calls[0] == ("eager", 8)
    assert calls[-1] == ("compiled", 8)
    assert watched.call(20)[-1] == ("compiled", 40)
    for rows in (100, 200, 300, 400, 500):
        for _ in range(20):
            watched.call(rows)
    assert watched.function.compilations == SIZES


def test_what_is_slower_compiled_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lambda size: 0.2 * size)
    calls = [watched.call(rows)[-1] for _ in range(20) for rows in (40, 5)]
    assert {how for how, _ in calls} == {"eager"}
    assert watched.function.compilations == 1


def test_rows_that_see_each_other_are_not_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lambda size: 0.01)
    calls = [watched.call(rows, separable=False)[-1][1] for _ in range(20) for rows in (40, 5)]
    assert calls == [40, 5] * 20


def test_batch_size_bounds_what_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lambda size: 0.01)
    assert watched.call(10, batch=4) == [("eager", 4), ("eager", 4), ("eager", 2)]
    for _ in range(5):
        watched.call(10, batch=4)
    assert watched.call(10, batch=4) == [("compiled", 4)] * 3


@pytest.mark.parametrize("patience", [0.0, 1e9], ids=["compiled at once", "never compiled"])
def test_results_are_those_of_an_eager_attack(patience: float, no_code: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "FIRST_SECONDS", patience)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.rand(6, 3, 2, 2)
    y = model(x).argmax(1)
    attack = PGD(eps=0.1, step_size=0.02, steps=5, seed=0, restarts=2, stop_at_success=True)
    state = torch.random.get_rng_state()
    found = attack(model, x, y, runtime=Runtime(compile="auto"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(found, attack(model, x, y, runtime=Runtime(compile=False)))
    assert (Functions.of(model).compilations > 0) == (patience == 0)
