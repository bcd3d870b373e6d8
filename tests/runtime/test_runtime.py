"""The runtime compiles a model for two sizes, computes the prologue once per attack, and leaves the model as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gradprune
from gradprune.attacks import FGSM, PGD, Runtime, Square
from gradprune.compiler.hoisted_step import HoistedStep, _steps
from gradprune.runtime import functions
from gradprune.runtime.functions import FEW, Functions, Sized, small_size

EAGER = Runtime(compile=False)


class Network(nn.Module):
    """Convolution, batch norm, ReLU and a linear layer, for 8x8 images in three channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(512, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).flatten(1))


def samples(count: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=generator), torch.randint(5, (count,), generator=generator)


def compilations(model: nn.Module) -> int:
    return Functions.of(model).compilations


@pytest.fixture
def steps() -> Callable[[], list[HoistedStep]]:
    """Asks for the steps that have been compiled while the test runs."""
    before = set(_steps)
    return lambda: [step for step in _steps if step not in before]


# --- Sizes ------------------------------------------------------------------------------------------------------------


def double(seen: list[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of rows, which notes how many it is given."""

    def function(model: Any, x: Tensor, scale: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        assert len(other) == len(x)
        return x * scale, other.clone()

    return function


def computed(function: Sized, seen: list[int], rows: int) -> list[int]:
    """How many rows at a time are computed of ``rows``."""
    x, other = torch.arange(float(rows))[:, None], torch.arange(rows)
    seen.clear()
    doubled, same = function(None, x, torch.tensor(2.0), other)
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(same, other)
    return list(seen)


ROWS = st.lists(st.integers(1, 70), min_size=1, max_size=6)


@given(rows=ROWS)
def test_any_number_of_rows_is_computed_in_two_sizes(rows: list[int]):
    seen: list[int] = []
    function, largest = Sized(double(seen), lambda plain: plain), max(rows)
    for count in [largest, *rows]:
        sizes, small = computed(function, seen, count), small_size(largest)
        assert set(sizes) <= {largest, small}
        assert sum(sizes) < count + small
    assert function.compilations <= 2


@given(rows=ROWS)
def test_any_number_of_rows_is_computed_as_it_is_with_a_symbolic_size(rows: list[int]):
    seen: list[int] = []
    function, largest = Sized(double(seen), lambda plain: plain, lambda plain: plain), max(rows)
    for count in [largest, *rows]:
        least = 1 if count == largest else FEW if largest > FEW else 2
        assert computed(function, seen, count) == [max(count, least)]
    assert function.compilations <= 2


def test_few_rows_are_compiled_for_when_they_come_often(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(functions, "OFTEN", 3)
    seen: list[int] = []
    function = Sized(double(seen), lambda plain: plain, lambda plain: plain)
    assert computed(function, seen, 64) == [64]
    assert [computed(function, seen, 5) for _ in range(4)] == [[FEW]] * 3 + [[5]]
    assert computed(function, seen, 1) == [2]


@given(rows=ROWS)
def test_the_largest_need_not_be_compiled_apart(rows: list[int]):
    seen: list[int] = []
    function = Sized(double(seen), lambda plain: plain, lambda plain: plain, has_own_largest=False)
    largest = max(rows)
    for count in [largest, *rows]:
        assert computed(function, seen, count) == [max(count, FEW if count < largest and largest > FEW else 2)]
    assert function.compilations == 1


@pytest.mark.parametrize("fixes_its_batch", [False, True])
def test_compiled_for_any_number_of_rows(no_code: None, fixes_its_batch: bool):
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = [x[i] for i in range(x.shape[0])] if fixes_its_batch else x
            return 2 * (torch.stack(rows) if isinstance(rows, list) else rows).flatten(1)

    model = Net()
    with Runtime().attack(model, torch.rand(40, 1, 2, 2)) as query:
        for rows in (40, 30, 20, 17, 3, 1):
            x = torch.rand(rows, 1, 2, 2)
            torch.testing.assert_close(query.logits(x), 2 * x.flatten(1))
    assert compilations(model) == (2 if fixes_its_batch else 1)


def test_rows_that_see_each_other_are_computed_together():
    function = Sized(lambda model, x: x - x.mean(0), lambda plain: plain)
    x = torch.rand(8, 2)
    function(None, x, separable=False)
    assert torch.equal(function(None, x[:5], separable=False), x[:5] - x[:5].mean(0))


def test_batch_size_bounds_what_is_computed_at_once():
    seen: list[int] = []

    def function(model: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        return x + 1

    for compile_one in (None, lambda plain: plain):
        seen.clear()
        assert torch.equal(Sized(function, compile_one)(None, torch.zeros(10, 1), batch=4), torch.ones(10, 1))
        assert max(seen) <= 4


# --- Compilations -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_frames(no_code: None) -> None:
    counters.clear()


def frames() -> int:
    return int(counters["frames"]["ok"])


def test_nothing_recompiles(compiled_frames: None):
    model = Network()
    x, y = samples(8)
    PGD(eps=0.1, step_size=0.02, steps=3, seed=0)(model, x, y)
    assert (compilations(model), frames()) == (1, 1)
    PGD(eps=0.1, step_size=0.02, steps=3, seed=0)(model, x[:3], y[:3])  # the last, smaller batch of a data set
    assert (compilations(model), frames()) == (2, 2)
    for eps in (0.05, 0.2):
        for step_size in (0.01, 0.03):
            for rows in (8, 7, 5, 3, 1):
                PGD(eps=eps, step_size=step_size, steps=2, seed=0)(model, x[:rows], y[:rows])
    for loss in ("margin", "dlr"):
        PGD(eps=0.1, loss=loss, stop_at_success=True, restarts=2, seed=0)(model, x, y)
    model.train()
    FGSM(eps=0.1)(model, x, y)
    model.eval()
    PGD(norm="l2", eps=1.0, step_size=0.5, targeted="least-likely", seed=0)(model, x, y)
    # The clean logits of a targeted attack, and what is judged at the end, are a forward pass without a gradient.
    assert compilations(model) <= 4
    assert frames() == compilations(model)


def test_prologue_runs_once_per_attack(steps: Callable[[], list[HoistedStep]]):
    model = Network()
    x, y = samples()
    attack = PGD(eps=0.1, step_size=0.02, steps=6, seed=0)
    attack(model, x, y)
    (step,) = steps()
    assert step.refreshes == 1
    before = attack(model, x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
    after = attack(model, x, y)
    assert step.refreshes == 2
    assert not torch.equal(before, after)
    # Signs of a gradient that is nearly zero may differ; of these networks' gradients few are.
    expected = attack(model, x, y, runtime=EAGER)
    assert (after - expected).abs().gt(1e-5).float().mean() < 0.02


def test_weights_of_the_attack_in_progress_are_noticed_when_torch_shows_the_change():
    """A custom step that trains the model between two gradients is odd, and still not served stale values."""
    x, y = samples()

    def training(model: Network):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            return x_adv + step_size * gradient / gradient.abs().amax()

        return step

    results = []
    for runtime in (Runtime(), EAGER):
        model = Network()
        attack = PGD(eps=1.0, step_size=0.05, steps=4, random_start=False, step=training(model))
        results.append(attack(model, x, y, runtime=runtime))
    assert relative_error(results[0] - x, results[1] - x) < 1e-3


def test_forward_queries_share_one_prologue(steps: Callable[[], list[HoistedStep]]):
    model = Network()
    x, _ = samples()
    y = model(x).argmax(1)
    attack = Square(eps=0.01, queries=5, seed=0)
    result = attack(model, x, y)
    torch.testing.assert_close(result, attack(model, x, y, runtime=EAGER))
    assert all(step.refreshes == 1 for step in steps())  # type: ignore[attr-defined]
    assert steps()


def test_function_without_gradient_is_hoisted_and_never_stale():
    model = Network()
    x, _ = samples()

    @torch.no_grad()
    def query(x: Tensor) -> Tensor:
        return model(x)

    compiled = gradprune.compile(query, forward_only=True)
    torch.testing.assert_close(compiled(x), query(x))
    (report,) = gradprune.reports(compiled)
    assert report.hoisted
    assert report.form == "step"
    for parameter in model.parameters():
        parameter.data += 0.1
    torch.testing.assert_close(compiled(x), query(x))


def test_forward_only_leaves_a_model_that_is_differentiated_as_it_is(no_code: None):
    model = Network()
    x, y = samples()
    gradients = []
    for callee in (model, gradprune.compile(model, forward_only=True)):
        x_adv = x.clone().requires_grad_(True)
        F.cross_entropy(callee(x_adv), y).backward()
        gradients.append(x_adv.grad)
    torch.testing.assert_close(*gradients)


def test_functions_go_with_the_model(no_code: None):
    model = Network()
    x, y = samples()
    FGSM(eps=0.1)(model, x, y)
    assert compilations(model) == 1
    assert compilations(copy.deepcopy(model)) == 0
    saved = pickle.dumps(model)
    assert b"gradprune" not in saved
    assert compilations(pickle.loads(saved)) == 0
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["function", "torch.compile", "accelerate"])
def test_any_callable(form: str, no_code: None):
    model = Network()
    x, y = samples()
    given_model = {
        "function": lambda x: model(x),
        "torch.compile": torch.compile(model),
        "accelerate": gradprune.accelerate(model),
    }[form]
    expected = FGSM(eps=0.1)(model, x, y, runtime=EAGER)
    assert (FGSM(eps=0.1)(given_model, x, y) - expected).abs().gt(1e-5).float().mean() < 0.02


def test_half_precision_keeps_the_perturbation_in_float32(no_code: None):
    model = Network()
    x, y = samples()
    seen: list[torch.dtype] = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    result = PGD(eps=0.1, seed=0)(model, x, y, runtime=Runtime(autocast=torch.bfloat16, compile=False))
    assert result.dtype is torch.float32
    assert set(seen) == {torch.bfloat16}
    assert (result - x).abs().amax() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    "runtime", [Runtime(mode="keep"), Runtime(mode="keep", compile=False)], ids=["compiled", "eager"]
)
def test_batch_norm_in_training_mode(runtime: Runtime, no_code: None):
    """The attack sees batch statistics; the buffers are what they were."""
    model = Network()
    model.norm.train()
    x, y = samples()
    state = ModelState.of(model)
    result = FGSM(eps=0.1)(model, x, y, runtime=runtime)
    state.assert_untouched(model)
    x_adv = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(x_adv), y, reduction="sum"), x_adv)
    expected = (x + 0.1 * gradient.sign()).clamp(0, 1)
    assert (result - expected).abs().gt(1e-5).float().mean() < 0.02


def test_training_mode_is_evaluation_mode_during_the_attack(no_code: None):
    model = Network().train()
    x, y = samples()
    state = ModelState.of(model)
    result = FGSM(eps=0.1)(model, x, y)
    state.assert_untouched(model)
    assert model.training
    assert model.norm.training
    assert torch.equal(result, FGSM(eps=0.1)(model.eval(), x, y))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_restored_when_the_attack_is_cut_short(error: type[BaseException]):
    model = Network().train()
    x, y = samples()
    calls = []

    def interrupt(module: nn.Module, args: object) -> None:
        calls.append(None)
        if len(calls) > 3:
            raise error("cut short")

    model.fc.register_forward_pre_hook(interrupt)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    state = ModelState.of(model)
    with pytest.raises(error, match="cut short"):
        PGD(eps=0.1)(model, x, y, runtime=EAGER)
    state.assert_untouched(model)
    assert model.norm.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_grad_mode_of_the_caller_does_not_matter(context: type, no_code: None):
    model = Network()
    x, y = samples()
    expected = FGSM(eps=0.1)(model, x, y)
    with context():
        x, y = samples()
        result = FGSM(eps=0.1)(model, x, y)
    assert torch.equal(result, expected)


# --- Active set -------------------------------------------------------------------------------------------------------


def test_samples_that_are_fooled_leave():
    model = Network()
    x, _ = samples(32)
    y = model(x).argmax(1)
    verdicts, rows = [], []
    for active_set in (True, False):
        runtime = Runtime(compile=False, active_set=active_set)
        attack = PGD(eps=0.05, step_size=0.01, steps=10, stop_at_success=True, seed=0)
        with runtime.attack(model, x) as query:
            labels = torch.stack([y, y], 1)
            result = attack.run(query, x, labels, torch.Generator().manual_seed(0))
        verdicts.append(model(result).argmax(1) != y)
        rows.append(query.gradients)
    assert torch.equal(*verdicts)
    assert 0 < int(verdicts[0].sum()) < 32
    assert rows[0] < rows[1] == 320


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "train"}, "no mode 'train'"),
        ({"compile": "always"}, 'compile has to be True, False or "auto"'),
        ({"batch_size": 0}, "batch_size has to be at least 1"),
        ({"autocast": torch.float64}, "autocast has to be"),
        ({"options": {"strictt": True}}, "did you mean 'strict'"),
    ],
)
def test_wrong_setting(arguments: dict[str, object], message: str):
    with pytest.raises(gradprune.OptionError, match=message):
        Runtime(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [lambda x: x, lambda x: (x.flatten(1), x)], ids=["images", "tuple"])
def test_model_that_returns_no_logits(model: Callable[..., object]):
    x, y = samples()
    with pytest.raises(gradprune.AttackError, match=r"logits \(N, classes\)"):
        FGSM(eps=0.1)(model, x, y)


def test_exchanged_head_has_other_classes():
    model = Network()
    x, y = samples()
    FGSM(eps=0.1)(model, x, y, runtime=EAGER)
    model.fc = nn.Linear(512, 7)
    FGSM(eps=0.1)(model, x, torch.full_like(y, 6), runtime=EAGER)
    model.fc = nn.Linear(512, 3)
    with pytest.raises(gradprune.AttackError, match="0 to 2"):
        FGSM(eps=0.1)(model, x, torch.full_like(y, 4), runtime=EAGER)
