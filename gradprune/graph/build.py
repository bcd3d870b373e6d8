"""Insert nodes into an ATen graph together with their metadata."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from .regions import BACKWARD

_KEPT = ("stack_trace", "from_node", "partitioner_tag", "seq_nr", BACKWARD)


class Builder:
    """Inserts calls before a node, as parts of what will replace it.

    Args:
        before: The node; where it came from and which pass it belongs to is noted on every inserted node.
    """

    def __init__(self, before: fx.Node) -> None:
        self._before = before

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call and compute its fake value."""
        with self._before.graph.inserting_before(self._before):
            node = self._before.graph.call_function(target, args, kwargs)
        values = tree_map(_value, (args, kwargs))
        mode = next(node.meta["val"] for node in node.all_input_nodes).fake_mode
        with mode, torch.no_grad():
            value = target(*values[0], **values[1])
        node.meta = {**{key: self._before.meta[key] for key in _KEPT if key in self._before.meta}, "val": value}
        return node


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument
