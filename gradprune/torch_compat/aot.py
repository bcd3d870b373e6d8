"""What gradprune reads of AOTAutograd, of autograd and of fake tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import (
    BackwardTokenAOTOutput,
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.schemas import OutputType
from torch._functorch.eager_transforms import _autograd_grad as functorch_grad
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "FakeTensorMode",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "ShapeEnv",
    "TangentAOTInput",
    "at_end_of_backward",
    "current_graph_task",
    "declare_absent_outputs",
    "declare_no_donated_buffers",
    "functorch_config",
    "functorch_grad",
    "is_fake",
    "is_plain_call",
    "output_descriptors",
    "requests_weight_gradient",
    "separate_output_strides",
    "size_hint",
    "without_modes",
]


separate_output_strides = torch._guards.TracingContext.report_output_strides
"""Within it, AOTAutograd does not take the strides of what is compiled for those of the graph being compiled."""


def declare_no_donated_buffers() -> None:
    """Say for the graph being compiled that its backward pass reuses no saved tensor's memory."""
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []


def output_descriptors(graph: fx.Graph) -> list[Any]:
    """What AOTAutograd noted on every output of a graph.

    Torch threads a token through operators with effects. When it takes the tokens out of a graph it takes them from the
    outputs, and leaves what it noted on them.

    Raises:
        ValueError: It noted more, or less, than there are outputs.
    """
    output = graph.output_node()
    values, descriptors = list(output.args[0]), list(output.meta["desc"])  # type: ignore[arg-type]
    if len(descriptors) > len(values):
        tokens = ForwardTokenAOTOutput, BackwardTokenAOTOutput
        descriptors = [descriptor for descriptor in descriptors if not isinstance(descriptor, tokens)]
    if len(descriptors) != len(values):
        raise ValueError(f"torch noted {len(descriptors)} descriptors ('desc') for {len(values)} outputs")
    return descriptors


def declare_absent_outputs(graph: fx.Graph) -> None:
    """Say for the graph being compiled which of its outputs are None.

    With symbolic sizes, AOTAutograd notes at run time on every output which of its sizes are dynamic, and expects a
    tensor wherever there was one when the graph was traced.
    """
    context = torch._guards.TracingContext.try_get()
    output = graph.output_node()
    if context is None or context.fw_metadata is None or output.meta.get("desc") is None:
        return
    for value, descriptor in zip(output.args[0], output_descriptors(graph), strict=True):  # type: ignore[arg-type]
        if value is None and isinstance(descriptor, PlainAOTOutput):
            info = context.fw_metadata.output_info
            info[descriptor.idx] = dataclasses.replace(info[descriptor.idx], dynamic_dims=None)


def is_plain_call() -> bool:
    """Whether the graph being compiled only computes outputs from inputs, so that calling its code is all of a call.

    AOTAutograd does the rest for others: writes inputs, makes views of outputs, hands on tokens and random states.
    """
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is None:
        return False
    more = (
        metadata.tokens,
        metadata.num_intermediate_bases,
        metadata.num_graphsafe_rng_states,
        metadata.grad_enabled_mutation is not None,
        any(one.mutates_data or one.mutates_metadata for one in metadata.input_info),
        any(one.output_type is not OutputType.non_alias for one in metadata.output_info),
        any(one.requires_grad for one in metadata.output_info),
        any(
            not issubclass(one.raw_type, torch.Tensor) and one.raw_type is not type(None)
            for one in metadata.output_info
        ),
    )
    return not any(more)


def size_hint(size: Any) -> int:
    """An integer for a size that may be symbolic, without guarding on it; 0 if nothing is known about it."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


def requests_weight_gradient(weights: Sequence[bool]) -> bool:
    """Whether the running backward pass was asked explicitly for the gradient of one of the current node's inputs.

    To be called while autograd executes the node. ``loss.backward()`` runs every node and asks for nothing in
    particular; ``autograd.grad(loss, weight)`` and ``loss.backward(inputs=[weight])`` name what they want.

    Args:
        weights: For every tensor the node was applied to, whether it is a weight.
    """
    functions = [function for function, _ in torch._C._current_autograd_node().next_functions]
    if len(functions) != len(weights):
        return False  # torch wrapped the inputs, and which is which is unknown
    asked, everything = False, True
    for function, is_weight in zip(functions, weights, strict=True):
        if function is None:
            continue
        try:
            runs = torch._C._will_engine_execute_node(function)
        except RuntimeError:  # torch's answer for a leaf that autograd.grad captures
            if is_weight:
                return True
            runs = False
        everything = everything and runs
        asked = asked or (runs and is_weight)
    return asked and not everything


def current_graph_task() -> int:
    """Number of the running backward pass."""
    return torch._C._current_graph_task_id()


def is_transformed() -> bool:
    """Whether a function is running inside of ``torch.func.grad``, ``vmap`` or another transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(tensor: object) -> bool:
    """Whether a tensor stands for many, as those inside of ``torch.vmap`` and ``is_grads_batched`` do."""
    kinds = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return isinstance(tensor, torch.Tensor) and any(is_kind(tensor) for is_kind in kinds)


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Have something called behind the running backward pass; what it raises, ``backward()`` raises."""
    torch.autograd.Variable._execution_engine.queue_callback(call)
