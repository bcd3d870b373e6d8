"""The graph that passes work on: an ATen graph whose inputs and outputs have a role in the attack."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

Form = Literal["step", "model"]


class InputRole(enum.Enum):
    """What a graph input is to the attack."""

    WEIGHT = "weight"
    """Parameter or buffer of an ``nn.Module``, known by where it comes from, not by its type."""
    PERTURBATION = "perturbation"
    """A tensor whose gradient the attack takes."""
    DATA = "data"
    """Anything else: clean images, labels, step sizes."""
    SIZE = "size"
    """No tensor but a number that varies from call to call, such as the batch size."""
    TANGENT = "tangent"
    """Gradient that flows into the joint graph of the model form from outside."""


class OutputRole(enum.Enum):
    """What a graph output is to the attack."""

    UPDATE = "update"
    """A value the caller asked for: the next iterate, the logits, the loss."""
    INPUT_GRAD = "input gradient"
    """Gradient of something that is not a weight."""
    WEIGHT_GRAD = "weight gradient"
    """Gradient that only ever lands in the ``.grad`` of a weight."""
    KEPT_WEIGHT_GRAD = "weight gradient that is read"
    """Gradient of a weight that something else than ``.grad`` depends on; it is computed."""
    MUTATION = "mutation"
    """New value of an input that is written in place, such as a running mean."""


@dataclass
class StepGraph:
    """An ATen graph, functional but for trailing ``copy_`` nodes, and the roles of its inputs and outputs.

    Attributes:
        graph: The graph. Its output node holds a flat list or tuple of nodes and ``None``.
        form: ``"step"`` when forward, backward and update are one graph; ``"model"`` when it is the joint graph of a
            model whose backward is called from outside.
        inputs: Role of every placeholder.
        outputs: Role of every position of the output node.
        kept_because: For positions with role ``KEPT_WEIGHT_GRAD``, why the gradient is computed all the same.
    """

    graph: fx.Graph
    form: Form
    inputs: dict[fx.Node, InputRole]
    outputs: list[OutputRole]
    kept_because: dict[int, str] = field(default_factory=dict)

    @property
    def output_node(self) -> fx.Node:
        """The node that returns the graph's values."""
        return self.graph.output_node()

    def output_values(self) -> list[fx.Node | None]:
        """What is returned, position by position."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    def set_output_values(self, values: list[fx.Node | None]) -> None:
        """Replace what is returned."""
        set_outputs(self.graph, values)

    def copy(self) -> StepGraph:
        """A copy that shares no node with this one."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        values = graph.graph_copy(self.graph, copies)
        graph.output(values).meta = dict(self.output_node.meta)
        inputs = {copies[node]: role for node, role in self.inputs.items()}
        return StepGraph(graph, self.form, inputs, list(self.outputs), dict(self.kept_because))

    def weights(self) -> list[fx.Node]:
        """Placeholders that hold a parameter or a buffer."""
        return [node for node, role in self.inputs.items() if role is InputRole.WEIGHT]

    def calls(self) -> Iterator[fx.Node]:
        """Nodes that compute something, in order."""
        return (node for node in self.graph.nodes if node.op == "call_function")


def set_outputs(graph: fx.Graph, values: Sequence[Any]) -> None:
    """Have ``graph`` return other values, in a container of the same type."""
    node = graph.output_node()
    node.args = (list(values) if isinstance(node.args[0], list) else tuple(values),)


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor a node produces, ``None`` if it produces anything else."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers; one that may drop out values, such as attention, may drop none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            value = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(value != 0)
    return True


def overload_name(node: fx.Node) -> str:
    """Operator of a call node as users write it, ``aten.convolution_backward`` for example."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def source_line(node: fx.Node) -> str:
    """The user's ``file:line`` a node was traced from, or an empty string."""
    location = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        line = line.strip()
        if line.startswith('File "'):
            path, _, rest = line[len('File "') :].partition('"')
            number = rest.removeprefix(", line ").partition(",")[0]
            location = f"{path}:{number}"
    return location
