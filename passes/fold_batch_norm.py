"""Fold batch norm in evaluation mode into the convolution or linear layer before it.

    %c = conv2d(%x, %w, %b)                      %s = rsqrt(%var + eps) * %gamma
    %n = batch_norm(%c, %mean, %var,             %n = conv2d(%x, %w * %s, (%b - %mean) * %s + %beta)
                    %gamma, %beta)

Works on the graph that Dynamo captured, before autograd sees it, so that the backward pass is that of the folded layer.
Legal when the norm uses its running statistics, nothing else reads the layer's output, and all that is folded depends
on weights alone, so that a step computes it once per attack. Behind anything else, the norm becomes one multiply-add.
Does nothing in training mode, where the statistics are those of the batch. Reorders float.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from gradprune.graph.captured_graph import CapturedGraph

from .base import Change, Pass, PassResult, Stage, Tier

Arguments = dict[str, Any]

_BATCH_NORM = inspect.signature(F.batch_norm)

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LAYERS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONVOLUTION),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED),
    F.linear: ("input", "weight", "bias"),
}
"""Layers that a norm can be folded into, and the names of their arguments."""

_ORIGIN = ("nn_module_stack", "source_fn_stack", "stack_trace")
"""Metadata that says which module a node was called in: a folded convolution is still that of its own module."""


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every batch norm of a captured graph that can be."""

    name = "fold-batch-norm"
    tier = Tier.REORDERS_FLOAT
    stage = Stage.CAPTURED

    def run(self, captured: CapturedGraph) -> PassResult:
        """Fold norms into the layer before them, or make a multiply-add of them."""
        result = PassResult()
        graph = captured.graph
        constant = _depending_on_weights_alone(captured)
        for node in list(graph.nodes):
            norm = _evaluation_arguments(node)
            if norm is None:
                continue
            operands = [value for name, value in norm.items() if name != "input" and isinstance(value, fx.Node)]
            if not constant.issuperset(operands):
                continue
            layer = norm["input"]
            change = Change.at(node, f"folded into {layer.name}")
            if _is_foldable(layer, constant) and all(operand < layer for operand in operands):
                with graph.inserting_before(layer):
                    folded = _folded_layer(graph, layer, norm)
                origin = {key: layer.meta[key] for key in _ORIGIN if key in layer.meta}
            else:
                change = Change.at(node, "one multiply-add instead of a normalization")
                with graph.inserting_before(node):
                    folded = _multiply_add(graph, norm)
                origin = {}
            folded.meta = {**node.meta, **origin}
            node.replace_all_uses_with(folded)
            graph.erase_node(node)
            if not layer.users:
                graph.erase_node(layer)
            result.narrowed.append(change)
        return result


def _depending_on_weights_alone(captured: CapturedGraph) -> set[fx.Node]:
    """Nodes computed from weights that nothing in the graph writes to."""
    written = _written(captured.graph)
    constant: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            is_constant = node in captured.weights
        else:
            is_constant = bool(node.all_input_nodes) and constant.issuperset(node.all_input_nodes)
        if is_constant and node not in written:
            constant.add(node)
    return constant


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "matmul", "and", "or", "xor")
_FRESH = {"clone", *(f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn"))}
_IN_PLACE = {"setitem", *(f"i{name}" for name in _OPERATORS)}


def _written(graph: fx.Graph) -> set[fx.Node]:
    """What is written to in place, and all that it may share memory with."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in _IN_PLACE or (name.endswith("_") and not name.startswith("_") and name != "requires_grad_"):
            target = node.args[0] if node.args else None
        else:
            target = node.kwargs.get("out")
        while isinstance(target, fx.Node) and target not in written:
            written.add(target)
            is_fresh = getattr(target.target, "__name__", str(target.target)) in _FRESH
            target = target.args[0] if target.args and not is_fresh else None
    return written


def _evaluation_arguments(node: fx.Node) -> Arguments | None:
    """Arguments of a batch norm by name; ``None`` if the node is none, or one that uses the statistics of its batch."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    bound = _BATCH_NORM.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    norm = bound.arguments
    if norm["training"] is not False or norm["running_mean"] is None or norm["running_var"] is None:
        return None
    return dict(norm)


def _value(node: fx.Node) -> torch.Tensor:
    value: torch.Tensor = node.meta["example_value"]
    return value


def _layer_arguments(layer: fx.Node) -> Arguments:
    return {"bias": None, **dict(zip(_LAYERS[layer.target], layer.args, strict=False)), **layer.kwargs}


def _is_foldable(layer: fx.Node, constant: set[fx.Node]) -> bool:
    if layer.op != "call_function" or layer.target not in _LAYERS or len(layer.users) != 1:
        return False
    if layer.target is F.linear and _value(layer).dim() != 2:
        return False  # the norm's channels are not the layer's
    weight, bias = (_layer_arguments(layer)[name] for name in ("weight", "bias"))
    if weight not in constant or (bias is not None and bias not in constant):
        return False
    # Without a batch, the norm takes a convolution's positions for channels.
    return layer.target is F.linear or _value(layer).dim() == _value(weight).dim()


def _folded_layer(graph: fx.Graph, layer: fx.Node, norm: Arguments) -> fx.Node:
    arguments = _layer_arguments(layer)
    weight = arguments["weight"]
    scale, shift = _scale_and_shift(graph, norm, arguments["bias"])
    shape = list(_value(weight).shape)
    kernel = [1] * (len(shape) - 2)
    if _LAYERS[layer.target] is _TRANSPOSED:
        # The output channels are the second dimension of the weight, those of one group after the other.
        groups = arguments.get("groups", 1)
        scale = graph.call_method("reshape", (scale, [groups, 1, shape[1], *kernel]))
        by_group = graph.call_method("reshape", (weight, [groups, shape[0] // groups, *shape[1:]]))
        scaled = graph.call_method("reshape", (graph.call_function(torch.mul, (by_group, scale)), shape))
    else:
        scaled = graph.call_function(torch.mul, (weight, graph.call_method("reshape", (scale, [-1, 1, *kernel]))))
    arguments["weight"] = _cast(graph, scaled, _value(weight), norm)
    arguments["bias"] = _cast(graph, shift, _value(weight), norm)
    names = itertools.takewhile(arguments.__contains__, _LAYERS[layer.target])
    operands = tuple(arguments.pop(name) for name in list(names))
    return graph.call_function(layer.target, operands, arguments)  # type: ignore[arg-type]


def _multiply_add(graph: fx.Graph, norm: Arguments) -> fx.Node:
    value = norm["input"]
    scale, shift = _scale_and_shift(graph, norm, None)
    shape = [1, -1, *[1] * (_value(value).dim() - 2)]
    scale, shift = (graph.call_method("reshape", (vector, shape)) for vector in (scale, shift))
    product = graph.call_function(torch.mul, (value, scale))
    return _cast(graph, graph.call_function(torch.add, (product, shift)), _value(value), norm)


def _scale_and_shift(graph: fx.Graph, norm: Arguments, bias: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    """What the norm multiplies a layer's output by and adds to it, the layer's own bias included; shape ``(C,)``."""

    def call(function: Callable[..., Any], *args: Any) -> fx.Node:
        return graph.call_function(function, args)

    scale = call(torch.rsqrt, call(torch.add, norm["running_var"], norm["eps"]))
    if norm["weight"] is not None:
        scale = call(torch.mul, scale, norm["weight"])
    mean = norm["running_mean"]
    shift = call(torch.mul, call(torch.neg, mean) if bias is None else call(torch.sub, bias, mean), scale)
    if norm["bias"] is not None:
        shift = call(torch.add, shift, norm["bias"])
    return scale, shift


def _cast(graph: fx.Graph, node: fx.Node, like: torch.Tensor, norm: Arguments) -> fx.Node:
    """``node`` in the type of ``like``, which may be narrower than that of the statistics it was computed with."""
    return node if _value(norm["running_var"]).dtype == like.dtype else graph.call_method("to", (node, like.dtype))
