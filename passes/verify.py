"""The verifier: what every graph must satisfy after every pass, as a short table of checks."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from gradprune.errors import PassError
from gradprune.graph.step_graph import OutputRole, StepGraph, is_random, overload_name, tensor_of
from gradprune.torch_compat.aot import FakeTensorMode


class Verifier:
    """Remembers what a graph returned when it was built, and checks each later state of it against that."""

    def __init__(self, step_graph: StepGraph) -> None:
        self._roles = list(step_graph.outputs)
        self._inputs = [node.name for node in step_graph.graph.find_nodes(op="placeholder")]
        self._signature = [_signature(value) for value in step_graph.output_values()]
        self._random = _random_operators(step_graph)

    def check(self, step_graph: StepGraph, after: str) -> None:
        """Check a graph.

        Args:
            step_graph: The graph.
            after: Name of the pass that ran last, for the message.

        Raises:
            PassError: Naming the pass, the node, its neighbours and what is wrong.
        """
        checks: tuple[Callable[[StepGraph], None], ...] = (
            _well_formed,
            _no_mutation_but_trailing_copies,
            _no_read_of_a_masked_output,
            _shapes_agree,
            self._same_interface,
            self._same_random_operators,
        )
        for check in checks:
            try:
                check(step_graph)
            except _Invalid as error:
                raise PassError(f"pass {after!r} left an invalid graph: {error}") from error

    def _same_interface(self, step_graph: StepGraph) -> None:
        inputs = [node.name for node in step_graph.graph.find_nodes(op="placeholder")]
        if inputs != self._inputs or list(step_graph.outputs) != self._roles:
            raise _Invalid("its inputs or the roles of its outputs changed")
        values = step_graph.output_values()
        if len(values) != len(self._signature):
            raise _Invalid(f"it returns {len(values)} values, not {len(self._signature)}")
        for position, (value, before) in enumerate(zip(values, self._signature, strict=True)):
            if value is None and self._roles[position] is OutputRole.WEIGHT_GRAD:
                continue
            if _signature(value) != before:
                raise _Invalid(f"output {position} was {before} and is {_signature(value)}", value)

    def _same_random_operators(self, step_graph: StepGraph) -> None:
        if _random_operators(step_graph) != self._random:
            raise _Invalid("its random operators are not the same, in the same order")


class _Invalid(Exception):
    """What is wrong, at which node."""

    def __init__(self, message: str, node: object = None) -> None:
        if isinstance(node, fx.Node):
            near = [node.prev, node, node.next]
            message += "\n" + "\n".join(f"  {n.format_node()}" for n in near if n.op != "root")
        super().__init__(message)


def _signature(value: object) -> object:
    tensor = tensor_of(value) if isinstance(value, fx.Node) else None
    if tensor is None:
        return type(value).__name__
    return tuple(tensor.shape), tensor.dtype, tensor.device, tuple(tensor.stride())


def _random_operators(step_graph: StepGraph) -> list[str]:
    return [overload_name(node) for node in step_graph.calls() if is_random(node)]


def _well_formed(step_graph: StepGraph) -> None:
    try:
        step_graph.graph.lint()
    except Exception as error:
        raise _Invalid(str(error)) from error
    if len(step_graph.outputs) != len(step_graph.output_values()):
        raise _Invalid("outputs and roles differ in number")
    for node in step_graph.inputs:
        if node.graph is not step_graph.graph:
            raise _Invalid("an input with a role is not in the graph", node)


def _no_mutation_but_trailing_copies(step_graph: StepGraph) -> None:
    for node in step_graph.calls():
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            written = node.args[0]
            if target is not torch.ops.aten.copy_.default or written not in step_graph.inputs:
                raise _Invalid("a mutating operator that is no copy to an input", node)
            assert isinstance(written, fx.Node)
            for user in written.users:
                if user > node and user.op == "call_function":
                    raise _Invalid(f"it reads {written.name}, which {node.name} has overwritten", user)


def _no_read_of_a_masked_output(step_graph: StepGraph) -> None:
    for node in step_graph.calls():
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            whole: Any = node.args[0].meta.get("val")
            if isinstance(whole, (tuple, list)) and whole[_position(node)] is None and node.users:
                raise _Invalid("it reads an output that is not computed", node)


def _position(getitem: fx.Node) -> int:
    position: Any = getitem.args[1]
    return int(position)


def _shapes_agree(step_graph: StepGraph) -> None:
    """Run every operator on fake tensors and compare with what the graph says."""
    for node in step_graph.calls():
        expected = tensor_of(node)
        if expected is None or not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            continue
        args, kwargs = tree_map(_fake, (node.args, node.kwargs))
        mode = getattr(expected, "fake_mode", None)
        if not isinstance(mode, FakeTensorMode):
            continue
        try:
            with mode, torch.no_grad():
                actual = node.target(*args, **kwargs)
        except Exception as error:
            raise _Invalid(f"the operator does not accept its operands: {error}", node) from error
        if not isinstance(actual, torch.Tensor):
            continue
        if tuple(actual.shape) != tuple(expected.shape) or actual.dtype != expected.dtype:
            raise _Invalid(f"it computes {list(actual.shape)} {actual.dtype}, the graph says otherwise", node)


def _fake(argument: object) -> object:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument
