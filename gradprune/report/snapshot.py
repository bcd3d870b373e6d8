"""The nodes of a graph as they were at one moment, without the graph: passes and Inductor go on changing that."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph, overload_name, source_line

INPUT_ROLES = {
    InputRole.WEIGHT: "weight",
    InputRole.PERTURBATION: "perturbation",
    InputRole.DATA: "data",
    InputRole.SIZE: "size",
    InputRole.TANGENT: "tangent",
}

OUTPUT_ROLES = {
    OutputRole.UPDATE: "a value that is asked for",
    OutputRole.INPUT_GRAD: "the gradient of an input",
    OutputRole.WEIGHT_GRAD: "a weight gradient that nothing reads",
    OutputRole.KEPT_WEIGHT_GRAD: "a weight gradient that is read",
    OutputRole.MUTATION: "the new value of an input that is written in place",
}


@dataclass(frozen=True)
class NodeSummary:
    """One node.

    Attributes:
        operator: Its operator, or the role of an input.
        source: ``file:line`` of the user's code.
        inputs: Names of the nodes it reads.
        is_call: Whether it computes something.
    """

    operator: str
    source: str
    inputs: tuple[str, ...]
    is_call: bool


@dataclass
class Snapshot:
    """All nodes by name, in graph order, and what is returned.

    Attributes:
        nodes: The nodes.
        outputs: For every position of the output, the node (``None`` where nothing is returned), what it is, and why it
            is computed if that needs a reason.
    """

    nodes: dict[str, NodeSummary] = field(default_factory=dict)
    outputs: list[tuple[str | None, str, str]] = field(default_factory=list)

    @staticmethod
    def of(step_graph: StepGraph) -> Snapshot:
        """The graph as it is now."""
        nodes = {}
        for node in step_graph.graph.nodes:
            if node.op != "output":
                role = step_graph.inputs.get(node)
                operator = overload_name(node) if role is None else INPUT_ROLES[role]
                inputs = tuple(operand.name for operand in node.all_input_nodes)
                nodes[node.name] = NodeSummary(operator, source_line(node), inputs, node.op == "call_function")
        outputs = []
        for position, (value, role_) in enumerate(zip(step_graph.output_values(), step_graph.outputs, strict=True)):
            name = value.name if isinstance(value, fx.Node) else None
            outputs.append((name, OUTPUT_ROLES[role_], step_graph.kept_because.get(position, "")))
        return Snapshot(nodes, outputs)

    def meaning(self, output: int) -> str:
        """What an output is, and why it is computed if that needs a reason."""
        _, role, because = self.outputs[output]
        return role + (f" ({because})" if because else "")

    def path(self, node: str) -> tuple[tuple[str, ...], int | None]:
        """The shortest way from ``node`` to an output, and the position of that output, ``None`` if none needs it."""
        positions: dict[str, int] = {}
        for position, (name, _, _) in enumerate(self.outputs):
            if name is not None:
                positions.setdefault(name, position)
        users: dict[str, list[str]] = {}
        for name, seen in self.nodes.items():
            for operand in seen.inputs:
                users.setdefault(operand, []).append(name)
        paths: dict[str, tuple[str, ...]] = {node: (node,)}
        waiting = [node]
        for name in waiting:  # grows while it is walked: breadth first
            if name in positions:
                return paths[name], positions[name]
            for user in users.get(name, ()):
                if user not in paths:
                    paths[user] = (*paths[name], user)
                    waiting.append(user)
        return (node,), None


@dataclass(frozen=True)
class Why:
    """Why a node is computed, or why not any more. Prints as an explanation.

    Attributes:
        node: Name of the node.
        operator: Its operator, or the role of an input.
        source: ``file:line`` of the user's code.
        kept: Whether it is in the graph that is compiled.
        chain: The nodes from it to the output that needs it, first and last included, with their operators.
        output: Position of that output; ``None`` if there is none.
        reason: What the output is and why it is computed; of a node that is gone, which pass removed it and why.
    """

    node: str
    operator: str
    source: str
    kept: bool
    chain: tuple[tuple[str, str], ...]
    output: int | None
    reason: str

    def __str__(self) -> str:
        where = f"  ({self.source})" if self.source else ""
        lines = [f"{self.node}: {self.operator}{where}"]
        if not self.kept:
            return "\n".join([*lines, f"  is not computed: {self.reason}"])
        shown = self.chain[1:]
        if len(shown) > CHAIN_SHOWN:
            half = CHAIN_SHOWN // 2
            shown = (*shown[:half], ("...", f"{len(shown) - 2 * half} more"), *shown[-half:])
        lines += [f"  is read by {name}: {operator}" for name, operator in shown]
        where = "" if self.output is None else f"is output {self.output}: "
        return "\n".join([*lines, f"  {where}{self.reason}"])


CHAIN_SHOWN = 24
