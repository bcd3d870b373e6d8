"""Graphs as plain data, which ``json`` writes, and from which the same graph can be built again.

Only flat graphs of functions of torch and Python can be written, so that a graph that was written says all there is to
know about what it computes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

NAMESPACES = ("aten", "prims", "gradprune", "mkldnn")
"""Of operators whose meaning the versions of torch and of gradprune fix."""

PACKAGES = ("torch", "operator", "_operator", "math", "builtins")
"""Of functions of which that is true."""

_PLAIN = (type(None), bool, int, float, str)
_NAMED: tuple[type, ...] = (torch.dtype, torch.layout, torch.memory_format)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "list": list, "size": torch.Size}


class NotPlain(ValueError):
    """A graph has something in it that cannot be written."""


def to_data(graph: fx.Graph) -> list[Any]:
    """A graph as plain data.

    Raises:
        NotPlain: It has a submodule, a constant tensor, a symbolic size or a function of somebody else's.
    """
    return [[node.op, node.name, _target(node), _value(node.args), _value(node.kwargs)] for node in graph.nodes]


def from_data(data: list[Any]) -> fx.Graph:
    """The graph that ``to_data`` wrote."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in data:
        found = find(target) if op == "call_function" else target
        node = graph.create_node(op, found, _built(args, nodes), _built(kwargs, nodes), name)
        if node.name != name:
            node._rename(name)
        nodes[name] = node
    graph.lint()
    return graph


def _target(node: fx.Node) -> str:
    if node.op in ("placeholder", "output", "call_method"):
        return str(node.target)
    if node.op != "call_function":
        raise NotPlain(f"{node.op} of {node.target}")
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in NAMESPACES:
            raise NotPlain(f"the operator {target}")
        return f"torch.ops.{target.namespace}.{target._schema.name.partition('::')[2]}.{target._overloadname}"
    name = _get_qualified_name(target)  # type: ignore[arg-type]
    try:
        is_found = name.partition(".")[0] in PACKAGES and find(name) is target
    except (ImportError, AttributeError):
        is_found = False
    if not is_found:
        raise NotPlain(f"the function {name}")
    return name


@functools.cache
def find(name: str) -> Any:
    """The function that is called so."""
    parts = name.split(".")
    found: Any = import_module(parts[0])
    for position, part in enumerate(parts[1:], 1):
        if not hasattr(found, part):
            import_module(".".join(parts[: position + 1]))
        found = getattr(found, part)
    return found


def _value(value: Any) -> Any:
    """An argument; what ``json`` does not know is a dictionary with one key, its kind."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"size": [_value(one) for one in value]}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        if type(value) not in (tuple, list, fx.immutable_collections.immutable_list):
            raise NotPlain(f"a {type(value).__name__}")
        return {kind: [_value(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[_value(key), _value(one)] for key, one in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_value(one) for one in (value.start, value.stop, value.step)]}
    if isinstance(value, _NAMED):
        return {"name": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": None}
    raise NotPlain(f"a {type(value).__name__}")


def _built(data: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([_built(one, nodes) for one in value])
    if kind == "dict":
        return {_built(key, nodes): _built(one, nodes) for key, one in value}
    if kind == "slice":
        return slice(*(_built(one, nodes) for one in value))
    if kind == "node":
        return nodes[value]
    if kind == "name":
        return operator.attrgetter(value.removeprefix("torch."))(torch)
    return torch.device(value) if kind == "device" else Ellipsis
