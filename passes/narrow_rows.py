"""Compute only the rows that are read: where a model reads one token, its last block computes one.

    %x = block(...)                  # (N, tokens, C)      %r = block(...)          # (N, 1, C)
    %s = select(%x, 1, 0)                                  %s = reshape(%r, (N, C))
    ...                                                    ...
    %g = select_scatter(zeros, %gs, 1, 0)
    %h = mm(reshape(%g), %w)                               %h = mm(%gs, %w)

A vision transformer's head and BERT's pooler read the first token. What the others become behind the last attention is
computed for nobody, and the gradient of all of it is zero. Three steps: going forward, which tensors are zero but for
one row, by the operators that keep it so; going back, of which only one row is asked for, by the operators that compute
rows one by one; then each of both is computed for its row alone, taken from what others need whole or put between zeros
for them. Legal where other rows hold no infinity or NaN, which a product with zero would spread. A matrix product of
fewer rows may add up in another order. Does nothing where no contraction becomes smaller.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import StepGraph, tensor_of

from .base import Change, Pass, PassResult, Tier
from .dce import eliminate_dead_code

aten = torch.ops.aten

RESHAPES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
        *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    }
)
COPIES = frozenset({aten.clone.default, aten.alias.default, torch.ops.prims.convert_element_type.default})
PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default})
REDUCTIONS = frozenset(
    {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var_mean.correction}
)
SOFTMAX = frozenset({aten._softmax.default, aten._log_softmax.default})
SOFTMAX_BACKWARD = frozenset({aten._softmax_backward_data.default, aten._log_softmax_backward_data.default})
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
CONTRACTIONS = PRODUCTS | {ATTENTION, ATTENTION_BACKWARD}


@dataclass(frozen=True)
class Row:
    """One row of a tensor, whatever shape it is given by views: in order, elements ``(outer, size, inner)``.

    Attributes:
        outer: How many blocks of rows there are.
        size: Rows of a block.
        inner: Elements of a row.
        index: The row of each block.
    """

    outer: int
    size: int
    inner: int
    index: int

    def place(self, shape: Sequence[int]) -> Place | None:
        """Where it is in a tensor of this shape; ``None`` if it is not within one of its dimensions."""
        if math.prod(shape) != self.outer * self.size * self.inner:
            return None
        blocks = 1
        for axis, length in enumerate(shape):
            if blocks * length > self.outer:
                before, rest = divmod(self.outer, blocks)
                after, left = divmod(length, before * self.size)
                return None if rest or left else Place(axis, before, self.size, after, self.index)
            blocks *= length
        return None


@dataclass(frozen=True)
class Place:
    """A row within the dimension ``axis``, which is ``(before, size, after)`` flattened; see ``Row``."""

    axis: int
    before: int
    size: int
    after: int
    index: int

    def row(self, shape: Sequence[int], axis: int) -> Row | None:
        """The same row in another tensor, whose dimension ``axis`` is the same."""
        if shape[axis] != self.before * self.size * self.after:
            return None
        outer, inner = math.prod(shape[:axis]) * self.before, self.after * math.prod(shape[axis + 1 :])
        return Row(outer, self.size, inner, self.index)

    def alone(self, shape: Sequence[int]) -> list[int]:
        """Shape of the row by itself."""
        return [*shape[: self.axis], self.before * self.after, *shape[self.axis + 1 :]]

    def apart(self, shape: Sequence[int]) -> list[int]:
        """The shape with dimensions of their own for what is flattened."""
        return [*shape[: self.axis], self.before, self.size, self.after, *shape[self.axis + 1 :]]


WHOLE = None
"""All rows are asked for."""

Asked: TypeAlias = "Row | None"


@dataclass(frozen=True)
class NarrowRows(Pass):
    """Compute one row of what is read, or differs from zero, in one row only."""

    name = "narrow-rows"
    tier = Tier.REORDERS_FLOAT

    def run(self, step_graph: StepGraph) -> PassResult:
        """Find such rows, and compute them alone if that makes a contraction smaller."""
        result = PassResult()
        if not all(_has_fixed_shape(node) for node in step_graph.graph.nodes):  # to compare a symbolic size fixes it
            return result
        if not any(_read_row(node) or _scattered_row(node) for node in step_graph.calls()):
            return result
        zero = _zero_but_one_row(step_graph)
        asked = _asked_rows(step_graph, zero)
        narrow = {node: row for node, row in asked.items() if row is not WHOLE} | {
            node: row for node, row in zero.items() if node in asked
        }
        changes = [node for node in narrow if node.target in CONTRACTIONS]
        changes += [node for node in step_graph.calls() if node in asked and _narrowed_attention_backward(node, zero)]
        if not changes:
            return result
        result.narrowed += [Change.at(node, "only one row of it is read, or is not zero") for node in changes]
        rewriter = _Rewriter(narrow, zero)
        rewriter.run(step_graph)
        result.removed += eliminate_dead_code(step_graph.graph)
        return result


# --- How operators treat rows -----------------------------------------------------------------------------------------


def _shape(node: object) -> list[int] | None:
    value = tensor_of(node) if isinstance(node, fx.Node) else None
    return None if value is None else list(value.shape)


def _placed(node: fx.Node, row: Row) -> tuple[list[int], Place]:
    """The shape of a node that has a row, and where in it that is."""
    shape = _shape(node)
    assert shape is not None
    place = row.place(shape)
    assert place is not None
    return shape, place


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _has_fixed_shape(node: fx.Node) -> bool:
    shape = _shape(node)
    return shape is None or all(isinstance(size, int) for size in shape)


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if target in COPIES:
        return True
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _read_row(node: fx.Node) -> Row | None:
    """The row of its first operand that a node returns."""
    if node.target is aten.select.int:
        return _one_row(*_args(node)[:3])
    return _one_of_slice(_args(node)[0], _args(node)[1:]) if node.target is aten.slice.Tensor else None


def _scattered_row(node: fx.Node) -> Row | None:
    """The row that a node puts between zeros."""
    if node.target not in (aten.select_scatter.default, aten.slice_scatter.default):
        return None
    zeros = _args(node)[0]
    if not (isinstance(zeros, fx.Node) and zeros.target is aten.full.default and zeros.args[1] == 0):
        return None
    if node.target is aten.select_scatter.default:
        return _one_row(zeros, *_args(node)[2:4])
    return _one_of_slice(zeros, _args(node)[2:])


def _one_row(tensor: object, axis: object, index: object) -> Row | None:
    shape = _shape(tensor)
    if shape is None or not isinstance(axis, int) or not isinstance(index, int):
        return None
    axis %= len(shape)
    if shape[axis] == 1:
        return None
    return Place(axis, 1, shape[axis], 1, index % shape[axis]).row(shape, axis)


def _one_of_slice(tensor: object, options: Sequence[Any]) -> Row | None:
    shape = _shape(tensor)
    whole: tuple[Any, ...] = (0, None, None, 1)
    axis, *ends = (*options, *whole[len(options) :])
    if shape is None or not isinstance(axis, int) or any(isinstance(end, fx.Node) for end in ends):
        return None
    indices = range(*slice(*ends).indices(shape[axis]))
    return _one_row(tensor, axis, indices[0]) if len(indices) == 1 else None


def _needed_rows(node: fx.Node, row: Row) -> dict[fx.Node, Asked] | None:
    """Which rows of its operands one row of a node takes; ``None`` if it cannot be computed by itself."""
    shape, target, args = _shape(node), node.target, _args(node)
    if shape is None:  # several outputs: rows are told by the first
        shape = list(node.meta["val"][0].shape)
    place = row.place(shape)
    if place is None:
        return None
    if target is operator.getitem:
        whole = args[0].meta["val"][0]
        needed = place.row(whole.shape, place.axis) if isinstance(whole, torch.Tensor) else None
        return None if needed is None else {args[0]: needed}
    operands = {operand: _shape(operand) for operand in node.all_input_nodes}
    if None in operands.values() and not _is_pointwise(node):
        return None
    if _is_pointwise(node) or (target in SOFTMAX_BACKWARD and int(args[2]) % len(shape) != place.axis):
        return {operand: _broadcast_row(place, shape, own or []) for operand, own in operands.items()}
    first = args[1] if target is aten.addmm.default else args[0] if args else None
    if not isinstance(first, fx.Node):
        return None
    own = operands[first]
    assert own is not None
    axis: int | None = None
    rest: dict[fx.Node, Asked] = dict.fromkeys(operands, WHOLE)
    if target in RESHAPES:
        return {first: row} if row.place(own) is not None else None
    if target is aten.permute.default:
        axis = int(args[1][place.axis]) % len(own)
    elif target in PRODUCTS:
        bias = operands[args[0]] if target is aten.addmm.default else None
        if place.axis == len(shape) - 2 and sum(arg is first for arg in args) == 1 and len(bias or [1]) == 1:
            axis = place.axis
    elif target in REDUCTIONS:
        kept = _kept_axes(node, len(own), len(shape))
        axis = kept[place.axis] if place.axis < len(kept) else None
    elif target in SOFTMAX:
        axis = None if int(args[1]) % len(own) == place.axis else place.axis
    elif target is ATTENTION:
        axis = 2 if place == Place(2, 1, own[2], 1, place.index) and _is_plain_attention(node) else None
    if axis is None:
        return None
    needed = place.row(own, axis)
    return None if needed is None else {**rest, first: needed}


def _broadcast_row(place: Place, shape: Sequence[int], own: Sequence[int]) -> Asked:
    """The row of an operand that is broadcast to ``shape``."""
    axis = place.axis - (len(shape) - len(own))
    return place.row(own, axis) if axis >= 0 and own[axis] == shape[place.axis] else WHOLE


def _kept_axes(node: fx.Node, before: int, after: int) -> list[int | None]:
    """For each dimension of a reduction's result, that of its operand; ``None`` where there were several."""
    dims: Any = _args(node)[1] if len(node.args) > 1 else node.kwargs.get("dim")
    reduced = {int(dim) % before for dim in dims} if dims else set(range(before))
    if after == before:
        return [None if axis in reduced else axis for axis in range(before)]
    return [axis for axis in range(before) if axis not in reduced]


def _is_plain_attention(node: fx.Node) -> bool:
    """Whether each query is treated for itself: there is neither a mask, nor causality, nor dropout."""
    target: Any = node.target
    given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False)) | node.kwargs
    return not (given.get("is_causal") or given.get("dropout_p") or given.get("attn_mask") is not None)


# --- Which rows -------------------------------------------------------------------------------------------------------


def _zero_but_one_row(step_graph: StepGraph) -> dict[fx.Node, Row]:
    """Tensors of which all rows but one are zero."""
    zero: dict[fx.Node, Row] = {}
    for node in step_graph.calls():
        row = _scattered_row(node) or _zero_by_operands(node, zero)
        if row is not None:
            zero[node] = row
    return zero


def _zero_by_operands(node: fx.Node, zero: Mapping[fx.Node, Row]) -> Row | None:
    target, shape = node.target, _shape(node)
    if target is operator.getitem:
        backward, output = _args(node)
        if output == 0 and isinstance(backward, fx.Node) and _narrowed_attention_backward(backward, zero):
            return _query_row(backward, zero)
        return None
    if shape is None:
        return None
    name = getattr(target, "__name__", "").partition(".")[0]
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        sources = [operand for operand in _args(node) if operand in zero][:1]
    elif target in (aten.add.Tensor, aten.sub.Tensor):
        sources = list(_args(node)[:2]) if all(operand in zero for operand in _args(node)[:2]) else []
    elif (
        target in RESHAPES | COPIES | PRODUCTS - {aten.addmm.default} | SOFTMAX_BACKWARD
        or target in (aten.permute.default, aten.neg.default, aten.div.Tensor, aten.div.Scalar)
        or target in (aten.sum.dim_IntList, aten.mean.dim)
        or (name.endswith("_backward") and _is_pointwise(node))
    ):
        sources = [operand for operand in _args(node)[:1] if operand in zero]
    else:
        sources = []
    rows = {_forward_row(node, source, zero[source]) for source in sources}
    return rows.pop() if len(rows) == 1 else None


def _forward_row(node: fx.Node, operand: fx.Node, row: Row) -> Row | None:
    """The row of a node that one row of its operand becomes."""
    shape, own = _shape(node), _shape(operand)
    assert shape is not None
    assert own is not None
    place = row.place(own)
    if place is None:
        return None
    if node.target in RESHAPES:
        found: Row | None = row
    elif _is_pointwise(node) or node.target in SOFTMAX_BACKWARD:
        found = place.row(shape, place.axis + len(shape) - len(own))
    else:
        axes: list[int | None] = list(range(len(own)))
        if node.target is aten.permute.default:
            axes = [int(axis) % len(own) for axis in _args(node)[1]]
        elif node.target in REDUCTIONS:
            axes = _kept_axes(node, len(own), len(shape))
        found = place.row(shape, axes.index(place.axis)) if place.axis in axes else None
    needed = None if found is None else _needed_rows(node, found)
    return found if needed is not None and needed.get(operand) == row else None


def _narrowed_attention_backward(node: fx.Node, zero: Mapping[fx.Node, Row]) -> bool:
    """Whether it is a backward pass of attention that one query has a gradient for."""
    return node.target is ATTENTION_BACKWARD and _query_row(node, zero) is not None


def _query_row(node: fx.Node, zero: Mapping[fx.Node, Row]) -> Row | None:
    gradient, query = _args(node)[:2]
    row = zero.get(gradient)
    own, shape = _shape(gradient), _shape(query)
    if row is None or own is None or shape is None or not _is_plain_attention(node):
        return None
    place = row.place(own)
    return place.row(shape, 2) if place == Place(2, 1, own[2], 1, row.index) else None


def _asked_rows(step_graph: StepGraph, zero: Mapping[fx.Node, Row]) -> dict[fx.Node, Asked]:
    """For each node that is needed, its row that is asked for; those that are zero elsewhere give it in any case."""
    asked: dict[fx.Node, Asked] = {}

    def ask(operand: fx.Node, row: Asked) -> None:
        asked[operand] = row if asked.get(operand, row) == row else WHOLE

    for node in reversed(step_graph.graph.nodes):
        if not node.users:  # the output, and what is called for what it does
            asked[node] = WHOLE
        if node not in asked:
            continue
        if node.op in ("placeholder", "get_attr"):
            asked[node] = WHOLE
            continue
        row = zero.get(node, asked[node])
        needed: Mapping[fx.Node, Asked] | None
        if _scattered_row(node) is not None:
            needed = {_args(node)[1]: WHOLE}
        elif row is not WHOLE and node.target is operator.getitem and node in zero:
            needed = {_args(node)[0]: WHOLE}
        elif row is not WHOLE:
            needed = _needed_rows(node, row)
        elif _narrowed_attention_backward(node, zero):
            needed = _of_attention_backward(node, zero)
        else:
            read = _read_row(node)
            needed = None if read is None else {_args(node)[0]: read}
        if needed is None:
            asked[node] = WHOLE
            needed = dict.fromkeys(node.all_input_nodes, WHOLE)
        for operand, wanted in needed.items():
            ask(operand, wanted)
    for node in asked:
        if node.target is operator.getitem and asked.get(_args(node)[0]) is WHOLE:
            asked[node] = WHOLE  # taken from what another output needs whole
    return asked


def _of_attention_backward(node: fx.Node, zero: Mapping[fx.Node, Row]) -> dict[fx.Node, Asked]:
    gradient, query, key, value, out, logsumexp = _args(node)[:6]
    row = _query_row(node, zero)
    assert row is not None
    needed: dict[fx.Node, Asked] = {}
    for operand in (gradient, query, out, logsumexp):
        shape = _shape(operand)
        assert isinstance(operand, fx.Node)
        assert shape is not None
        needed[operand] = Place(2, 1, shape[2], 1, row.index).row(shape, 2)
    return needed | dict.fromkeys((key, value), WHOLE)


# --- The rewrite ------------------------------------------------------------------------------------------------------


class _Rewriter:
    """Computes rows alone.

    Args:
        narrow: Nodes that are computed for one row.
        zero: Those of them, and others, that are zero elsewhere.
    """

    def __init__(self, narrow: Mapping[fx.Node, Row], zero: Mapping[fx.Node, Row]) -> None:
        self._narrow, self._zero = narrow, zero
        self._alone: dict[tuple[fx.Node, Row], fx.Node] = {}
        self._several: dict[fx.Node, fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}

    def run(self, step_graph: StepGraph) -> None:
        """Rewrite a graph; what is not needed any more stays in it."""
        for node in list(step_graph.graph.nodes):
            if node.op == "output":
                self._give_whole(node, Builder(node))
            if node.op != "call_function":
                continue
            build, row = Builder(node), self._narrow.get(node)
            if row is not None:
                self._compute(node, row, build)
            elif _narrowed_attention_backward(node, self._zero):
                self._attention_backward(node, build)
            elif (read := _read_row(node)) is not None and self._narrow.get(_args(node)[0]) == read:
                new = build.call(aten.reshape.default, self._take(_args(node)[0], read, build), _shape(node))
                node.replace_all_uses_with(new)
            else:
                self._give_whole(node, build)

    def _compute(self, node: fx.Node, row: Row, build: Builder) -> None:
        if _scattered_row(node) is not None:
            shape, place = _placed(node, row)
            new = build.call(aten.reshape.default, self._all(_args(node)[1], build), place.alone(shape))
        elif node.target is operator.getitem:
            parent, output = _args(node)
            new = _output(self._several[parent], output)
        else:
            needed = _needed_rows(node, row)
            assert needed is not None
            new_of = {
                operand: self._take(operand, wanted, build) if wanted is not WHOLE else self._all(operand, build)
                for operand, wanted in needed.items()
            }
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: new_of[operand])
            if node.target in RESHAPES:
                shape, place = _placed(node, row)
                new = build.call(aten.reshape.default, args[0], place.alone(shape))
            else:
                target: Any = node.target
                new = build.call(target, *args, **kwargs)
        if tensor_of(node) is None:
            self._several[node] = new
        else:
            self._alone[node, row] = new

    def _attention_backward(self, node: fx.Node, build: Builder) -> None:
        needed = _of_attention_backward(node, self._zero)
        args = [arg if (row := needed[arg]) is WHOLE else self._take(arg, row, build) for arg in _args(node)[:6]]
        new = self._several[node] = build.call(ATTENTION_BACKWARD, *args, *_args(node)[6:], **node.kwargs)
        for user in list(node.users):
            if user not in self._zero:
                user.replace_input_with(node, new)

    def _take(self, operand: fx.Node, row: Row, build: Builder) -> fx.Node:
        """The row of an operand by itself."""
        if (operand, row) not in self._alone:
            shape, place = _placed(operand, row)
            source, axis = self._all(operand, build), place.axis
            if place.before * place.after > 1:
                source, axis = build.call(aten.reshape.default, source, place.apart(shape)), axis + 1
            source = build.call(aten.slice.Tensor, source, axis, place.index, place.index + 1)
            self._alone[operand, row] = build.call(aten.reshape.default, source, place.alone(shape))
        return self._alone[operand, row]

    def _all(self, operand: fx.Node, build: Builder) -> fx.Node:
        """All rows of an operand, with zeros for those that were not computed."""
        row, value = self._narrow.get(operand), tensor_of(operand)
        if row is None or value is None:
            return operand
        if operand not in self._whole:
            shape, place = _placed(operand, row)
            kind = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
            zeros = build.call(aten.full.default, place.apart(shape), 0, **kind)
            alone = [*place.apart(shape)]
            alone[place.axis + 1] = 1
            rows = build.call(aten.reshape.default, self._alone[operand, row], alone)
            whole = build.call(aten.slice_scatter.default, zeros, rows, place.axis + 1, place.index, place.index + 1)
            self._whole[operand] = build.call(aten.reshape.default, whole, shape)
        return self._whole[operand]

    def _give_whole(self, node: fx.Node, build: Builder) -> None:
        for operand in node.all_input_nodes:
            if operand in self._narrow and operand in self._zero:
                node.replace_input_with(operand, self._all(operand, build))


def _output(parent: fx.Node, output: int) -> fx.Node:
    """One of several outputs."""
    graph = parent.graph
    with graph.inserting_after(parent):
        node = graph.call_function(operator.getitem, (parent, output))
    node.meta = {**parent.meta, "val": parent.meta["val"][output]}
    return node
