"""How the tests of passes come by graphs, and what they demand of every pass.

Graphs are either captured, from a small step or model that goes through the backend, or built node by node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from helpers import interpret
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from gradprune.compiler import pruning
from gradprune.compiler.lower import compile_graph
from gradprune.compiler.options import Options
from gradprune.graph.regions import BACKWARD
from gradprune.graph.step_graph import Form, InputRole, OutputRole, StepGraph, tensor_of
from gradprune.passes.base import Pass, PassResult, Tier
from gradprune.passes.pipeline import run_passes
from gradprune.passes.verify import Verifier
from gradprune.torch_compat import dynamo

aten = torch.ops.aten


# --- Capturing --------------------------------------------------------------------------------------------------------


def step_of(model: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """From an input to the gradient of the sum of what the model makes of it, squared."""

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    return step


def captured(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> StepGraph:
    """The graph of a step, or the joint graph of a model, as the first pass sees it."""
    found: list[StepGraph] = []

    def instead_of_passes(step_graph: StepGraph, *_: Any, **__: Any) -> list[Any]:
        found.append(copied(step_graph))
        return []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, Options(strict=True), inner_compile=interpret)

    torch._dynamo.reset()
    for flag in dynamo.TRACED_FLAGS:
        dynamo.scope_to_backend(flag, backend)
    try:
        with mock.patch.object(pruning, "run_passes", instead_of_passes):
            torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=dynamo.TRACES_REQUIRES_GRAD)(*args)
    finally:
        for flag in dynamo.TRACED_FLAGS:
            dynamo.forget_backend(flag, backend)
    if dynamo.TRACES_REQUIRES_GRAD:
        assert len(found) == 1
    return found[-1]


def copied(step_graph: StepGraph) -> StepGraph:
    """A copy that shares no node with the original."""
    return step_graph.copy()


# --- Building by hand -------------------------------------------------------------------------------------------------


@dataclass
class Builder:
    """Builds a step graph node by node; every node gets the fake value its operator computes."""

    form: Form = "step"
    graph: fx.Graph = field(default_factory=fx.Graph)
    fake: FakeTensorMode = field(default_factory=FakeTensorMode)
    roles: dict[fx.Node, InputRole] = field(default_factory=dict)
    device: str = "cpu"

    def input(
        self, name: str, *shape: int, role: InputRole = InputRole.DATA, dtype: torch.dtype = torch.float32
    ) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.fake:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=self.device)
        self.roles[node] = role
        return node

    def weight(self, name: str, *shape: int) -> fx.Node:
        return self.input(name, *shape, role=InputRole.WEIGHT)

    def call(self, target: Callable[..., Any], *args: Any, backward: bool = False, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, kwargs))
        with self.fake:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        if backward:
            node.meta[BACKWARD] = True
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index, backward=BACKWARD in node.meta)

    def build(self, *outputs: tuple[fx.Node | None, OutputRole] | fx.Node) -> StepGraph:
        """Outputs are nodes with a role; a bare node is an update."""
        pairs = [(output, OutputRole.UPDATE) if isinstance(output, fx.Node) else output for output in outputs]
        self.graph.output(tuple(value for value, _ in pairs))
        return StepGraph(self.graph, self.form, self.roles, [role for _, role in pairs])


# --- What holds for every pass ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """The graph's text before and after a pass, and what the pass said."""

    before: str
    after: str
    result: PassResult

    @property
    def changed(self) -> bool:
        return self.before != self.after


def apply(step: Pass, step_graph: StepGraph) -> Applied:
    """Run a pass and check what every pass promises.

    The graph stays valid; what it returns stays the same, bit for bit if the pass says it is exact; the pass says that
    it changed something if and only if it did; a second run changes nothing.
    """
    verifier = Verifier(step_graph)
    arguments = random_arguments(step_graph)
    before, expected = str(step_graph.graph), evaluate(step_graph, arguments)
    result = run(step, step_graph)
    verifier.check(step_graph, after=step.name)
    after, actual = str(step_graph.graph), evaluate(step_graph, arguments)
    for role, new, old in zip(step_graph.outputs, actual, expected, strict=True):
        if new is None:
            assert old is None or role is OutputRole.WEIGHT_GRAD
        elif step.tier is Tier.EXACT:
            torch.testing.assert_close(new, old, rtol=0, atol=0)
        elif old.dtype is torch.float32:  # an element may be a small difference of large ones
            scale = float(old.abs().max()) if old.numel() else 0.0
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5 * max(scale, 1.0))
        else:
            torch.testing.assert_close(new, old)
    assert result.changed == (before != after)
    again = run(step, step_graph)
    assert not again.changed
    assert str(step_graph.graph) == after
    return Applied(before, after, result)


def run(step: Pass, step_graph: StepGraph) -> PassResult:
    """What a pass does where the pipeline lets it."""
    records = run_passes(step_graph, [step])
    return records[0].result if records else PassResult()


def random_arguments(step_graph: StepGraph) -> list[torch.Tensor]:
    """A value for every placeholder: small integers, booleans, or normally distributed numbers."""
    generator = torch.Generator().manual_seed(0)
    arguments = []
    for node in step_graph.graph.find_nodes(op="placeholder"):
        like = tensor_of(node)
        assert like is not None, f"{node} is no tensor"
        value = torch.randn(like.shape, generator=generator)
        arguments.append(value.to(like.dtype) if like.dtype.is_floating_point else (value > 0).to(like.dtype))
    return arguments


def evaluate(step_graph: StepGraph, arguments: list[torch.Tensor]) -> list[Any]:
    """What the graph returns; the arguments stay as they are.

    Kernels may choose other strides than the trace has, so views become reshapes, as they do in Inductor.
    """
    graph = copied(step_graph).graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        interpreter = fx.Interpreter(fx.GraphModule({}, graph))
        return list(interpreter.run(*(argument.clone() for argument in arguments)))


def find(step_graph: StepGraph, target: Any) -> list[fx.Node]:
    """The nodes that call an operator."""
    return list(step_graph.graph.find_nodes(op="call_function", target=target))
