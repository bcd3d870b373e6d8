"""A step graph as plain data, for the page that shows it."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from gradprune.graph.cost import count_flops, flops_by_node
from gradprune.graph.invariance import hoisted_values
from gradprune.graph.liveness import is_view, live_bytes, peak_bytes, saved_readers, tensor_bytes, total_bytes
from gradprune.graph.regions import backward_nodes, descendants, weight_gradient_nodes, weight_only_nodes
from gradprune.graph.step_graph import OutputRole, StepGraph, overload_name, source_line
from gradprune.passes.pipeline import count_ops

INPUTS, UPDATE, BEFORE_MODEL, AFTER_MODEL = "(inputs)", "(update)", "(before the model)", "(after the model)"
"""Where nodes are listed that belong to no module."""


def graph_data(step_graph: StepGraph) -> dict[str, Any]:
    """Everything the page shows of a graph as it stands, as data that ``json.dump`` takes.

    Args:
        step_graph: The graph. Nodes that two calls see are recognised by their name.

    Returns:
        A dictionary of

        - ``modules``: ``path`` relative to the model and ``type`` of each module, and of the four groups for nodes
          outside of modules, whose path is in parentheses;
        - ``sources``: lines of the user's code;
        - ``nodes``, in graph order: ``name``, ``op``, ``phase`` (input, forward, backward, update or output),
          ``module`` and ``source`` (positions in the lists above), ``value`` (dtype and shape), ``bytes``, ``flops``
          by class, ``inputs`` (positions in this list), ``role`` of an input or of what is returned, and the flags
          ``weight_grad``, ``weight_only``, ``prologue`` (computed ahead if anything is hoisted) and ``view``. What is
          zero, empty or unknown is left out;
        - ``saved``: pairs of a node and the nodes of the backward pass that read its buffer;
        - ``memory``: bytes alive while each operator runs;
        - ``totals``: ``ops``, ``flops``, ``saved_bytes`` and ``peak_bytes``, as in a report.
    """
    order = list(step_graph.graph.nodes)
    position = {node: index for index, node in enumerate(order)}
    phases = _phases(step_graph)
    flops = flops_by_node(step_graph)
    weight_only, weight_gradients = weight_only_nodes(step_graph), weight_gradient_nodes(step_graph)
    prologue = _with_operands(hoisted_values(step_graph))
    roles = _roles(step_graph)
    modules, sources = _Interned(), _Interned()
    nodes = []
    for node, (path, kind) in zip(order, _modules(step_graph, phases), strict=True):
        value = node.meta.get("val") if node.op != "output" else None
        source = source_line(node)
        fields = {
            "name": node.name,
            "op": overload_name(node) if node.op == "call_function" else node.op,
            "phase": phases[node],
            "module": modules.index((path, kind)),
            "source": sources.index(source) if source else None,
            "value": _describe(value),
            "bytes": tensor_bytes(value),
            "flops": flops.get(node),
            "inputs": [position[operand] for operand in node.all_input_nodes],
            "role": roles.get(node),
            "weight_grad": node in weight_gradients or _stores(node, weight_gradients),
            "weight_only": node in weight_only and node.op == "call_function",
            "prologue": node in prologue,
            "view": is_view(node),
        }
        nodes.append({key: field for key, field in fields.items() if field or key in ("module", "source")})
        if nodes[-1]["source"] is None:
            del nodes[-1]["source"]
    saved = saved_readers(step_graph)
    return {
        "modules": [{"path": path, "type": kind} for path, kind in modules.values],
        "sources": sources.values,
        "nodes": nodes,
        "saved": [[position[owner], [position[reader] for reader in readers]] for owner, readers in saved.items()],
        "memory": live_bytes(step_graph),
        "totals": {
            "ops": count_ops(step_graph),
            "flops": count_flops(step_graph),
            "saved_bytes": total_bytes(saved),
            "peak_bytes": peak_bytes(step_graph),
        },
    }


class _Interned:
    """Distinct values in the order in which they came up."""

    def __init__(self) -> None:
        self._index: dict[Any, int] = {}

    def index(self, value: Any) -> int:
        return self._index.setdefault(value, len(self._index))

    @property
    def values(self) -> list[Any]:
        return list(self._index)


def _phases(step_graph: StepGraph) -> dict[fx.Node, str]:
    backward = backward_nodes(step_graph)
    update = descendants(step_graph, backward) - backward
    phases = {"placeholder": "input", "get_attr": "input", "output": "output"}
    return {
        node: phases.get(node.op) or ("backward" if node in backward else "update" if node in update else "forward")
        for node in step_graph.graph.nodes
    }


def _roles(step_graph: StepGraph) -> dict[fx.Node, str]:
    roles = {node: role.value for node, role in step_graph.inputs.items()}
    for node, role in zip(step_graph.output_values(), step_graph.outputs, strict=True):
        if node is not None and node.op == "call_function":
            roles[node] = f"returned, {role.value}" if role is not OutputRole.UPDATE else "returned"
    return roles


def _with_operands(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and every call they are computed by."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _stores(node: fx.Node, gradients: set[fx.Node]) -> bool:
    """Whether ``node`` reads weight gradients; in the update it can only put them into ``.grad``."""
    return node.op == "call_function" and not gradients.isdisjoint(node.all_input_nodes)


def _describe(value: object) -> str:
    """Dtype and shape, ``float32[8, 3, 224, 224]``; several of them for a tuple."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_describe, value)))
    return "" if value is None else str(value)


# --- Modules ----------------------------------------------------------------------------------------------------------

# Note [Modules of backward nodes]
#
# AOTAutograd notes with every node which module it was called in. With a node of the backward pass it notes that of the
# forward node if autograd ran outside of the graph, and nothing if the gradient call is part of the graph, as in a
# step. There the module is inferred. A gradient is computed from the gradient of the layer behind and from what the
# layer's own forward pass read or made, so its layer is the last one before the layer behind that touches one of the
# forward values at hand; a weight is touched by one layer alone and decides. What has no forward operand, such as the
# sum of two gradients, is listed with what reads it.


def _modules(step_graph: StepGraph, phases: dict[fx.Node, str]) -> list[tuple[str, str]]:
    """Path and type of the module of each node, in graph order."""
    order = list(step_graph.graph.nodes)
    at = {node: index for index, node in enumerate(order)}
    stacks = {node: _stack(node) for node in order}
    labels = _labels([stack[0] for stack in stacks.values() if stack])
    named = {node: _relative(stack, labels) for node, stack in stacks.items() if stack}
    inside = [at[node] for node in named if phases[node] == "forward"]
    first, last = min(inside, default=len(order)), max(inside, default=-1)

    # The forward node, by its position, that each node goes with.
    weight_only = weight_only_nodes(step_graph)
    anchor: dict[fx.Node, int] = {}
    for node in order:
        if node in named and phases[node] == "forward":
            anchor[node] = at[node]
        elif phases[node] == "forward" and node not in weight_only:
            operands = [anchor[operand] for operand in node.all_input_nodes if operand in anchor]
            anchor[node] = max(operands) if operands and at[node] < last else at[node]
    for node in reversed(order):
        if node in weight_only and node not in anchor:
            users = [anchor[user] for user in node.users if user in anchor]
            if users:
                anchor[node] = min(users)
    _anchor_backward([node for node in order if phases[node] == "backward"], anchor, weight_only)

    # What stores them is listed with them.
    gradients = weight_gradient_nodes(step_graph)

    def module(node: fx.Node) -> tuple[str, str]:
        if phases[node] in ("input", "output"):
            return INPUTS if phases[node] == "input" else UPDATE, ""
        if node in named:
            return named[node]
        source = node
        if phases[node] == "update":
            if not _stores(node, gradients):
                return UPDATE, ""
            source = next(operand for operand in node.all_input_nodes if operand in gradients)
        target = anchor.get(source, len(order))
        if target < len(order) and order[target] in named:
            return named[order[target]]
        return BEFORE_MODEL if target < first else AFTER_MODEL, ""

    return [module(node) for node in order]


def _anchor_backward(backward: list[fx.Node], anchor: dict[fx.Node, int], weight_only: set[fx.Node]) -> None:
    """Find the forward node of each node of the backward pass, see Note [Modules of backward nodes]."""
    members = set(backward)
    gradients: set[fx.Node] = set()
    touched: dict[fx.Node, set[int]] = {}
    """Of what is computed from forward values alone, such as a mask: the forward nodes that touch those."""
    reached: dict[fx.Node, int] = {}
    """How far towards the input of the model the gradients are."""
    for node in backward:
        operands = node.all_input_nodes
        incoming = [operand for operand in operands if operand in gradients]
        weights = {anchor[operand] for operand in operands if operand in weight_only and operand in anchor}
        candidates = set(weights)
        for operand in operands:
            if operand in touched:
                candidates |= touched[operand]
            elif not weights and operand in anchor and operand not in members:
                candidates |= {anchor[operand], *(anchor[u] for u in operand.users if u in anchor and u not in members)}
        if not incoming and not (weights and members.intersection(operands)):
            touched[node] = candidates
            # The output of a layer rather than the input of the next one.
            made = [anchor[operand] for operand in operands if operand in anchor]
            if made:
                anchor[node] = max(made)
            continue
        gradients.add(node)
        limit = min((reached[operand] for operand in incoming if operand in reached), default=None)
        before = {candidate for candidate in candidates if limit is None or candidate < limit}
        if weights or before:
            anchor[node] = max(weights or before)
        elif node.target is operator.getitem and incoming[0] in anchor:
            anchor[node] = anchor[incoming[0]]
        if node in anchor or limit is not None:
            reached[node] = anchor.get(node, limit or 0)
    for node in reversed(backward):
        users = {anchor[user] for user in node.users if user in anchor and user in members}
        if users and (node not in anchor or (len(users) == 1 and users <= touched.get(node, set()))):
            anchor[node] = max(users)  # a sum of gradients is needed where it is read first
    for node in backward:
        operands = node.all_input_nodes
        siblings = [anchor[u] for o in operands if o in members for u in o.users if u in anchor]
        made = siblings or [anchor[operand] for operand in operands if operand in anchor]
        if node not in anchor and made:
            anchor[node] = max(made)


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """Names and types of the modules around a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return [
        (re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]|getattr\((.*), ['\"](.*)['\"]\)", _plain, name), _type_name(kind))
        for name, kind in stack.values()
    ]


def _plain(match: re.Match[str]) -> str:
    """An attribute or item as Dynamo's guards spell it, dotted."""
    return f".{match[1]}" if match[1] else f"{match[2]}.{match[3]}"


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _labels(roots: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What the paths in each of several models start with: its type, and a number if that is not enough."""
    distinct = dict(roots)
    if len(distinct) < 2:
        return dict.fromkeys(distinct, "")
    kinds = list(distinct.values())
    return {
        name: kind if kinds.count(kind) == 1 else f"{kind} {kinds[: index + 1].count(kind)}"
        for index, (name, kind) in enumerate(distinct.items())
    }


def _relative(stack: list[tuple[str, str]], labels: dict[str, str]) -> tuple[str, str]:
    """Path within the model, and the module's type."""
    root, (name, kind) = stack[0][0], stack[-1]
    path = (name[len(root) :] if name.startswith(root) else name).replace("._modules", "").strip(".")
    return ".".join(filter(None, [labels[root], path])), kind
