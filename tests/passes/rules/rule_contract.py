"""What every narrowing rule promises, and how a case checks it.

A case is one call of an operator. The contract runs it with every mask that is legal there, narrows it to every set of
used outputs, and demands that

* exactly the outputs in the set are still asked for, and every other argument is what it was;
* the used outputs have the value, shape, dtype, layout and strides they had before;
* a node that asks for no more than the set is left alone.

What the kernel returns at an unused position is not looked at: it may be ``None``, an undefined tensor, or a gradient
that was computed all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from gradprune.passes.rules import RULES, Narrowed

MASKS = {
    "aten._batch_norm_impl_index_backward.default": "output_mask",
    "aten._cudnn_rnn_backward.default": "output_mask",
    "aten._fused_rms_norm_backward.default": "output_mask",
    "aten._scaled_dot_product_efficient_attention_backward.default": "grad_input_mask",
    "aten._scaled_dot_product_fused_attention_overrideable_backward.default": "grad_input_mask",
    "aten._slow_conv2d_backward.output_mask": "output_mask",
    "aten._sparse_mm_reduce_impl_backward.default": "output_mask",
    "aten.batch_norm_backward.default": "output_mask",
    "aten.convolution_backward.default": "output_mask",
    "aten.convolution_backward_overrideable.default": "output_mask",
    "aten.grid_sampler_2d_backward.default": "output_mask",
    "aten.grid_sampler_3d_backward.default": "output_mask",
    "aten.linear_backward.default": "output_mask",
    "aten.matmul_backward.default": "mask",
    "aten.miopen_rnn_backward.default": "output_mask",
    "aten.mkldnn_linear_backward.default": "output_mask",
    "aten.mps_convolution_backward.default": "output_mask",
    "aten.mps_convolution_transpose_backward.default": "output_mask",
    "aten.native_batch_norm_backward.default": "output_mask",
    "aten.native_group_norm_backward.default": "output_mask",
    "aten.native_layer_norm_backward.default": "output_mask",
}
"""Operators told by a mask what to compute, and the mask's name."""

FLAGS: dict[str, dict[str, set[int]]] = {
    "aten._efficient_attention_backward.default": {"bias_requires_grad": {3}},
    "aten._thnn_fused_gru_cell_backward.default": {"has_bias": {3, 4}},
    "aten._thnn_fused_lstm_cell_backward.default": {"has_bias": {3, 4}},
    "aten._thnn_fused_lstm_cell_backward_impl.default": {"has_bias": {2}},
    "aten.batch_norm_backward_reduce.default": {"input_g": {0, 1}, "weight_g": {2}, "bias_g": {3}},
    "aten.mkldnn_linear_backward_weights.default": {"bias_defined": {1}},
}
"""Operators told by separate flags what to compute, and the outputs that each flag stands for."""

KEPT = {"aten.native_group_norm_backward.default": {0}}
"""Flags of a mask that a rule leaves as they are, because some kernel of the operator fails without them."""


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        operator: Its name, as in ``RULES``.
        label: What is special about the call.
        args: Makes the positional arguments. A place is kept for the mask or flags, with any value.
        kwargs: Keyword arguments.
        impossible: Outputs that cannot be asked for here, such as the gradient of a weight that is absent.
        required: Outputs that the kernel cannot do without.
        rounding: By how many machine epsilons of its largest element an output may change. Zero, that is bit for bit,
            unless the kernel is known to compute an output another way when it is alone.
        implementation: What runs instead of the operator's kernel: the decomposition that Inductor uses.
    """

    operator: str
    label: str
    args: Callable[[], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    impossible: frozenset[int] = frozenset()
    required: frozenset[int] = frozenset()
    rounding: int = 0
    implementation: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.operator.removeprefix('aten.').removesuffix('.default')}-{self.label}"


def operator_named(name: str) -> torch._ops.OpOverload:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def subsets(items: set[int] | frozenset[int] | range) -> Iterator[frozenset[int]]:
    """Every subset but the empty one: a node without a used output is erased, and never reaches a rule."""
    for size in range(1, len(items) + 1):
        yield from map(frozenset, itertools.combinations(sorted(items), size))


def position_of(operator: torch._ops.OpOverload, argument: str) -> int:
    return next(i for i, declared in enumerate(operator._schema.arguments) if declared.name == argument)


def settings(operator: torch._ops.OpOverload, outputs: int) -> Iterator[tuple[dict[str, Any], frozenset[int]]]:
    """Every way to ask an operator for something: values of its mask or flags, and the outputs asked for."""
    name = str(operator)
    if name in MASKS:
        for asked in subsets(range(outputs)):
            yield {MASKS[name]: [index in asked for index in range(outputs)]}, asked
        return
    gates = FLAGS[name]
    for values in itertools.product([True, False], repeat=len(gates)):
        flags = dict(zip(gates, values, strict=True))
        off = {output for flag, gated in gates.items() if not flags[flag] for output in gated}
        if asked := frozenset(range(outputs)) - off:
            yield flags, asked


def expected_setting(name: str, setting: dict[str, Any], used: frozenset[int]) -> dict[str, Any]:
    """The mask or flags that ask for ``used`` and, as far as the operator can tell outputs apart, for nothing else."""
    if name in MASKS:
        wanted = used | KEPT.get(name, set())
        return {mask: [flag and index in wanted for index, flag in enumerate(flags)] for mask, flags in setting.items()}
    return {flag: value and not used.isdisjoint(FLAGS[name][flag]) for flag, value in setting.items()}


def call_node(
    operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.Node, dict[fx.Node, torch.Tensor]]:
    """A graph with one call, in which every tensor is a placeholder; the call and what the placeholders hold."""
    graph = fx.Graph()
    values: dict[fx.Node, torch.Tensor] = {}

    def lift(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            placeholder = graph.placeholder(f"arg{len(values)}")
            values[placeholder] = value
            return placeholder
        return value

    node = graph.call_function(operator, tuple(lift(arg) for arg in args), {k: lift(v) for k, v in kwargs.items()})
    graph.output(node)
    return node, values


def narrow(node: fx.Node, used: frozenset[int]) -> Narrowed | None:
    return RULES[str(node.target)](node, used)


def check_case(case: Case) -> int:
    """Check one case; returns how many narrowings were compared, so that a case cannot pass by checking nothing."""
    operator = operator_named(case.operator)
    arguments = case.args()
    compared = 0
    for setting, asked in settings(operator, len(operator._schema.returns)):
        possible = asked - case.impossible
        if (case.operator in MASKS and possible != asked) or not case.required <= asked:
            continue
        args = list(arguments)
        for argument, value in setting.items():
            args[position_of(operator, argument)] = value
        node, values = call_node(operator, tuple(args), case.kwargs)
        wide = _run(node, values, case.implementation)
        for used in subsets(possible):
            expected = expected_setting(case.operator, setting, used)
            narrowed = narrow(node, used)
            if expected == setting:
                assert narrowed is None, f"{setting} asks for {sorted(used)} and no more"
                continue
            assert narrowed is not None, f"{setting} asks for more than {sorted(used)}"
            check_edit(node, narrowed, expected)
            copy = node.graph.node_copy(node)
            copy.args, copy.kwargs = narrowed
            outputs = _run(copy, values, case.implementation)
            node.graph.erase_node(copy)
            assert len(outputs) == len(wide)
            for index in used:
                assert_same(
                    outputs[index], wide[index], f"output {index} of {expected}, before {setting}: ", case.rounding
                )
            compared += 1
    return compared


def check_edit(node: fx.Node, narrowed: Narrowed, expected: dict[str, Any]) -> None:
    """A narrowed call differs from the node in the mask or flags, and nowhere else; each stays where it was passed."""
    operator = node.target
    assert isinstance(operator, torch._ops.OpOverload)
    positions = {position_of(operator, argument): argument for argument in expected}
    assert len(narrowed.args) == len(node.args)
    assert narrowed.kwargs.keys() == node.kwargs.keys()
    for position, (new, old) in enumerate(zip(narrowed.args, node.args, strict=True)):
        assert new == (expected[positions[position]] if position in positions else old)
    for name, new in narrowed.kwargs.items():
        assert new == expected.get(name, node.kwargs[name])


def _run(node: fx.Node, values: dict[fx.Node, torch.Tensor], implementation: Callable[..., Any] | None) -> tuple:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return tuple((implementation or node.target)(*args, **kwargs))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, message: str, rounding: int = 0) -> None:
    """Same shape, dtype, layout and strides; same values, but for ``rounding`` (see ``Case``)."""
    assert isinstance(actual, torch.Tensor), message
    assert (actual.shape if not expected.is_nested else None, actual.dtype, actual.layout) == (
        expected.shape if not expected.is_nested else None,
        expected.dtype,
        expected.layout,
    ), message
    if expected.is_nested:
        for one, other in zip(actual.unbind(), expected.unbind(), strict=True):
            assert_same(one, other, message, rounding)
    elif expected.is_meta:
        assert actual.stride() == expected.stride(), message
    elif expected.is_mkldnn:
        assert_same(actual.to_dense(), expected.to_dense(), message, rounding)
    else:
        atol = rounding * torch.finfo(expected.dtype).eps * expected.abs().max().item() if rounding else 0.0
        dense = expected.layout == torch.strided
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=atol, check_stride=dense, msg=lambda difference: message + difference
        )
