"""Written as a user would: a narrowing rule in ten lines, a local pass in twenty, and what becomes of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import in_one_piece, interpreted
from torch import Tensor, fx, nn
from torch.nn import functional as F

import gradprune
from gradprune.graph.build import Builder
from gradprune.passes.base import Pass, PassResult, Tier
from gradprune.passes.rewrite import Skip, rewrite
from gradprune.passes.rules import RULES, Narrowed, register

aten = torch.ops.aten

pytestmark = in_one_piece

# --- A rule -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("exercise::product_backward", mutates_args=())
def product_backward(grad: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    nothing = grad.new_empty(0)
    return (grad @ w if mask[0] else nothing), (grad.T @ x if mask[1] else nothing)


@product_backward.register_fake
def _(grad: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    nothing = grad.new_empty(0)
    return (torch.empty_like(x) if mask[0] else nothing), (torch.empty_like(w) if mask[1] else nothing)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return product_backward(grad, *ctx.saved_tensors, [True, True])


def product_rule(node: fx.Node, used: frozenset[int]) -> Narrowed | None:
    """The mask says which of both gradients to compute."""
    *operands, mask = node.args
    wanted = [index in used for index in range(2)]
    return None if wanted == list(mask) else Narrowed((*operands, wanted), {})


@pytest.fixture
def rule() -> Iterator[None]:
    register("exercise.product_backward.default")(product_rule)
    yield
    del RULES["exercise.product_backward.default"]


def attack_step(model: Any) -> Any:
    def step(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        F.cross_entropy(model(x), y).backward()
        return x.grad

    return step


def test_a_rule_takes_ten_lines(rule: None):
    lines = [*inspect.getsourcelines(product_rule)[0], 'register("exercise.product_backward.default")(product_rule)']
    assert len(lines) <= 10

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.rand(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.w)

    model, x, y = Model(), torch.rand(3, 6), torch.tensor([0, 1, 2])
    expected = attack_step(model)(x, y)
    model.w.grad = None
    step = gradprune.compile(attack_step(model), strict=True, verify=True)
    with interpreted():
        torch.testing.assert_close(step(x, y), expected)
    assert model.w.grad is None
    (report,) = gradprune.reports(step)
    (change,) = (change for change in report.narrowed if "product_backward" in change.operator)
    assert change.reason == "only outputs [0] are used"


# --- A pass -----------------------------------------------------------------------------------------------------------


@rewrite(
    aten.pow.Tensor_Scalar,
    name="powers-as-products",
    tier=Tier.REORDERS_FLOAT,
    reason="a product instead of a power",
)
def powers_as_products(node: fx.Node, build: Builder) -> fx.Node | Skip | None:
    """Compute small whole powers by multiplication."""
    base, exponent = node.args
    if exponent not in (2, 3):
        return Skip(f"the exponent {exponent} is not 2 or 3")
    if node.kwargs:
        return None
    product = build.call(aten.mul.Tensor, base, base)
    return product if exponent == 2 else build.call(aten.mul.Tensor, product, base)


def cubes(model: nn.Module) -> Any:
    return attack_step(lambda x: model(x) ** 3 + model(x) ** 2 + (model(x) ** 2 + 1) ** 0.5)


def test_a_local_pass_takes_twenty_lines():
    assert len(inspect.getsourcelines(powers_as_products.function)[0]) <= 20
    model, x, y = nn.Linear(6, 4).double(), torch.rand(3, 6).double(), torch.tensor([0, 1, 2])
    expected = cubes(model)(x, y)
    options = {"passes": [powers_as_products], "strict": True, "verify": True}
    step = torch.compile(cubes(model), backend="gradprune", options=options)
    with interpreted():
        torch.testing.assert_close(step(x, y), expected)
    (report,) = gradprune.reports(step)
    names = [record.name for record in report.passes]
    assert names[-2:] == ["powers-as-products", "hoist-invariants"]
    result = report.passes[-2].result
    assert {change.reason for change in result.narrowed} == {"a product instead of a power"}
    assert "the exponent 0.5 is not 2 or 3" in {change.reason for change in result.skipped}
    assert "powers-as-products" in str(report)


def test_what_a_pass_makes_of_weights_is_hoisted():
    @rewrite(aten.mm.default, name="scaled-weights", tier=Tier.REORDERS_FLOAT, reason="scaled", forms=["step"])
    def scaled_weights(node: fx.Node, build: Builder) -> fx.Node | None:
        rows, weight = node.args
        if not build.is_invariant(weight) or weight.target is aten.div.Tensor:
            return None
        return build.call(aten.mm.default, build.call(aten.mul.Tensor, rows, 2), build.call(aten.div.Tensor, weight, 2))

    model, x, y = nn.Linear(6, 4, bias=False).double(), torch.rand(3, 6).double(), torch.tensor([0, 1, 2])
    expected = attack_step(model)(x, y)
    step = gradprune.compile(attack_step(model), passes=[scaled_weights], strict=True)
    with interpreted():
        torch.testing.assert_close(step(x, y), expected)
    (report,) = gradprune.reports(step)
    assert "aten.div.Tensor" in {change.operator for change in report.hoisted}


def test_a_pass_of_ones_own_can_be_left_out():
    step = gradprune.compile(cubes(nn.Linear(6, 4)), passes=[powers_as_products], disable=["powers-as-products"])
    with interpreted():
        step(torch.rand(3, 6), torch.tensor([0, 1, 2]))
    assert "powers-as-products" not in [record.name for record in gradprune.reports(step)[0].passes]


class Nameless(Pass):
    def run(self, graph: Any) -> PassResult:
        return PassResult()


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (3, "must be a list of passes, not 3"),
        ("abc", "must be a list of passes, not 'abc'"),
        ([len], "is no pass: derive its class from gradprune.passes.base.Pass"),
        ([Nameless()], "does not say its name and its tier"),
        ([powers_as_products, powers_as_products], "the name 'powers-as-products' is taken: choose another"),
    ],
    ids=["number", "text", "function", "nameless", "twice"],
)
def test_what_is_no_list_of_passes_is_refused(passes: Any, told: str):
    with pytest.raises(gradprune.OptionError, match=told):
        gradprune.compile(cubes(nn.Linear(6, 4)), passes=passes)
