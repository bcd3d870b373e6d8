"""Compute attention by matrix products, where that is faster on a GPU than torch's fused kernel.

    %a = efficient_attention(%q, %k, %v)        %s = bmm(%q, %k^T)
                                                %p = softmax(%s * scale)
                                                %a = bmm(%p, %v)
    %g = efficient_attention_backward(%ga, ...) five more products

In float32 torch's fused attention has no fast kernel: half of a step of a ViT goes into it. For sequences as short as
an image's, products of a BLAS and a softmax take a fraction of it; the probabilities are stored, which are no more than
query, key, value and result together where a sequence is at most ``LONGEST`` times as long as a head is wide. Which is
faster is measured. Keys are filled up to a multiple of ``ALIGNED``, without which a BLAS leaves the tensor cores alone.
Legal without dropout, without causality, without a gradient of the bias, and for known sizes. Reorders float.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.ops.kernel_choice import is_faster

from .base import Change, Pass, PassResult, Tier
from .dce import eliminate_dead_code
from .narrow_outputs import used_outputs

aten = torch.ops.aten

FORWARD = aten._scaled_dot_product_efficient_attention.default
BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default

DEVICES = ("cuda",)
"""Where it applies."""

LONGEST = 4
"""How many times as long as a head is wide a sequence of keys may be."""

ALIGNED = 8


@dataclass(frozen=True)
class AttentionByProducts(Pass):
    """Replace fused attention of float32 by products and a softmax."""

    name = "attention-by-products"
    tier = Tier.REORDERS_FLOAT

    def run(self, step_graph: StepGraph) -> PassResult:
        """Replace each attention together with its gradient."""
        result, graph = PassResult(), step_graph.graph
        for node in graph.find_nodes(op="call_function", target=FORWARD):
            attention = Attention.of(node)
            if attention is None or not attention.is_faster():
                continue
            result.narrowed.append(Change.at(node, "by products and a softmax, whose probabilities are stored"))
            attention.replace()
            for old in (*attention.gradients, node):
                for output in list(old.users):
                    graph.erase_node(output)
                graph.erase_node(old)
        if result.narrowed:
            result.removed += eliminate_dead_code(graph)
        return result


@dataclass(frozen=True)
class Attention:
    """An attention that can be replaced.

    Attributes:
        node: Its forward pass.
        gradients: What computes gradients of it.
        query: ``(N, heads, rows, width)``.
        key: ``(N, heads, keys, width)``.
        value: ``(N, heads, keys, out)``.
        bias: What is added to the scores; ``(N, heads, rows, keys)``, or sizes of 1 in place of these.
        scale: What scores are multiplied by.
    """

    node: fx.Node
    gradients: tuple[fx.Node, ...]
    query: fx.Node
    key: fx.Node
    value: fx.Node
    bias: fx.Node | None
    scale: float

    @staticmethod
    def of(node: fx.Node) -> Attention | None:
        """``None`` if it has to stay."""
        arguments: tuple[Any, ...] = node.args
        (query, key, value, bias), options = arguments[:4], arguments[5:]
        dropout, is_causal = (options + (0.0, False)[len(options) :])[:2]
        tensors = [tensor_of(one) for one in (query, key, value)]
        if dropout or is_causal or any(one is None for one in tensors):
            return None
        q, k, _ = tensors
        assert q is not None
        assert k is not None
        if q.device.type not in DEVICES or q.dtype is not torch.float32 or k.shape[2] > LONGEST * q.shape[3]:
            return None
        if not all(isinstance(size, int) for one in tensors for size in one.shape):  # type: ignore[union-attr]
            return None
        gradients = tuple(user for output in node.users for user in output.users if user.target is BACKWARD)
        gradients = tuple(dict.fromkeys(gradients))
        statistics = [output for output in node.users if output.args[1] != 0]
        if any(user not in gradients for output in statistics for user in output.users):
            return None
        if any(3 in _used(one) for one in gradients):
            return None
        scale: Any = node.kwargs.get("scale")
        return Attention(node, gradients, query, key, value, bias, scale or q.shape[3] ** -0.5)

    def is_faster(self) -> bool:
        """Whether products are faster than the fused kernels on this machine."""
        shapes = [list(_tensor(one).shape) for one in (self.query, self.key, self.value)]
        device = _tensor(self.query).device

        def make() -> tuple[Callable[[], object], Callable[[], object]]:
            q, k, v = (torch.randn(shape, device=device) for shape in shapes)
            gradient = torch.randn([*shapes[0][:3], shapes[2][3]], device=device)

            def products() -> object:
                ours = Products(self.scale)
                output, kept = ours.forward(q, k, v, None)
                return output, ours.backward(gradient, kept, (True, True, True)) if self.gradients else None

            def fused() -> object:
                output, *statistics = aten._scaled_dot_product_efficient_attention(
                    q, k, v, None, bool(self.gradients), scale=self.scale
                )
                return self.gradients and aten._scaled_dot_product_efficient_attention_backward(
                    *(gradient, q, k, v, None, output, *statistics, 0.0, [True, True, True, False]), scale=self.scale
                )

            return products, fused

        passes = "forward and backward" if self.gradients else "forward"
        return is_faster(f"attention by products {shapes}, {passes}", make, device)

    def replace(self) -> None:
        """Insert products before what they replace, and have its users read them."""
        forward = Builder(self.node)
        output, kept = Products(self.scale, forward).forward(self.query, self.key, self.value, self.bias)
        _use(self.node, forward, [output])
        for node in self.gradients:
            backward, mask = Builder(node), [place in _used(node) for place in range(3)]
            _use(node, backward, Products(self.scale, backward).backward(node.args[0], kept, mask))


class Products:
    """Attention by products, of tensors or, with a builder, of the nodes of a graph."""

    def __init__(self, scale: float, build: Builder | None = None) -> None:
        self._scale = scale
        self._build = build

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs) if self._build is None else self._build.call(target, *args, **kwargs)

    def forward(self, query: Any, key: Any, value: Any, bias: Any) -> tuple[Any, tuple[Any, ...]]:
        """The result ``(N, heads, rows, out)``, and what ``backward`` needs."""
        call, (batch, heads, rows, _) = self._call, _tensor(query).shape
        keys = _tensor(key).shape[2]
        more = -keys % ALIGNED
        q, k, v = (
            call(aten.reshape.default, one, [batch * heads, *_tensor(one).shape[2:]]) for one in (query, key, value)
        )
        if more:
            k, v = (call(aten.constant_pad_nd.default, one, [0, 0, 0, more]) for one in (k, v))
        scores = call(aten.mul.Tensor, call(aten.bmm.default, q, self._turned(k)), self._scale)
        if bias is not None:
            scores = call(aten.reshape.default, scores, [batch, heads, rows, keys + more])
            if more:
                bias = call(aten.expand.default, bias, [*_tensor(bias).shape[:3], keys])
                bias = call(aten.constant_pad_nd.default, bias, [0, more], -torch.inf)
            scores = call(aten.add.Tensor, scores, bias)
            scores = call(aten.reshape.default, scores, [batch * heads, rows, keys + more])
        elif more:
            kind = {"dtype": torch.int64, "device": _tensor(query).device, "requires_grad": False}
            places = call(torch.ops.prims.iota.default, keys + more, start=0, step=1, **kind)
            is_key = call(aten.lt.Scalar, places, keys)
            scores = call(aten.where.ScalarOther, is_key, scores, -torch.inf)
        largest = call(aten.amax.default, scores, [-1], True)
        if bias is not None:  # a query without a key pays attention to nothing
            largest = call(aten.clamp_min.default, largest, torch.finfo(torch.float32).min)
        terms = call(aten.exp.default, call(aten.sub.Tensor, scores, largest))
        total = call(aten.sum.dim_IntList, terms, [-1], True)
        if bias is not None:
            total = call(aten.clamp_min.default, total, torch.finfo(torch.float32).tiny)
        probabilities = call(aten.div.Tensor, terms, total)
        output = call(aten.bmm.default, probabilities, v)
        output = call(aten.reshape.default, output, [batch, heads, rows, _tensor(value).shape[3]])
        return output, (q, k, v, probabilities, [_tensor(one).shape for one in (query, key, value)])

    def backward(self, gradient: Any, kept: tuple[Any, ...], mask: Sequence[bool]) -> list[Any]:
        """The gradients of query, key and value, or ``None`` for those that ``mask`` leaves out."""
        call, (q, k, v, probabilities, shapes) = self._call, kept
        gradient = call(aten.reshape.default, gradient, [_tensor(q).shape[0], *_tensor(gradient).shape[2:]])
        results: list[Any] = [None, None, None]
        if mask[0] or mask[1]:
            inner = call(aten.bmm.default, gradient, self._turned(v))
            weighted = call(aten.mul.Tensor, inner, probabilities)
            total = call(aten.sum.dim_IntList, weighted, [-1], True)
            inner = call(aten.sub.Tensor, weighted, call(aten.mul.Tensor, probabilities, total))
            inner = call(aten.mul.Tensor, inner, self._scale)
            if mask[0]:
                results[0] = call(aten.bmm.default, inner, k)
            if mask[1]:
                results[1] = call(aten.bmm.default, self._turned(inner), q)
        if mask[2]:
            results[2] = call(aten.bmm.default, self._turned(probabilities), gradient)
        for place, result in enumerate(results):
            if result is not None:
                if _tensor(result).shape[1] != shapes[place][2]:
                    result = call(aten.slice.Tensor, result, 1, 0, shapes[place][2])
                results[place] = call(aten.reshape.default, result, list(shapes[place]))
        return results

    def _turned(self, matrices: Any) -> Any:
        return self._call(aten.permute.default, matrices, [0, 2, 1])


def _tensor(value: Any) -> Tensor:
    """A tensor, or the fake one of a node."""
    result: Tensor = value.meta["val"] if isinstance(value, fx.Node) else value
    return result


def _used(node: fx.Node) -> frozenset[int]:
    """Which outputs of an operator with several are used."""
    used = used_outputs(node)
    assert used is not None
    return used


def _use(node: fx.Node, build: Builder, results: Sequence[fx.Node | None]) -> None:
    """Have users of a node's outputs read others, in the same order in memory: views further on rely on it."""
    for output in list(node.users):
        assert output.target is operator.getitem
        place = output.args[1]
        result = results[place] if place < len(results) else None  # type: ignore[operator,index]
        if result is not None:
            output.replace_all_uses_with(_in_order_of(output.meta["val"], result, build))


def _in_order_of(like: Tensor, node: fx.Node, build: Builder) -> fx.Node:
    """A copy whose dimensions have the order in memory that those of ``like`` have."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda axis: -strides[axis])
    if order == list(range(like.dim())):
        return node
    turned = build.call(aten.permute.default, node, order)
    copy = build.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    return build.call(aten.permute.default, copy, [order.index(axis) for axis in range(like.dim())])
