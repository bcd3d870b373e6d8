"""Copy a graph, and put a copy back."""

from __future__ import annotations

from torch import fx


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` to restore it from."""
    copy = fx.Graph()
    _copy_nodes(graph, copy)
    return copy


def restore_graph(graph: fx.Graph, backup: fx.Graph) -> None:
    """Replace all that is in ``graph`` by a copy of what is in ``backup``."""
    for node in graph.nodes:
        node.args, node.kwargs = (), {}  # a graph that a failure left invalid has no order to erase it in
    for node in list(graph.nodes):
        graph.erase_node(node)
    _copy_nodes(backup, graph)


def _copy_nodes(source: fx.Graph, target: fx.Graph) -> None:
    copies: dict[fx.Node, fx.Node] = {}
    values = target.graph_copy(source, copies)
    target.output(values).meta = dict(source.output_node().meta)
    for node, copy in copies.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
