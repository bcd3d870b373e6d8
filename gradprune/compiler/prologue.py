"""What computes hoisted values: into new memory on a CPU, into that of the last ones on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from gradprune.graph.editing import copy_graph
from gradprune.torch_compat import aot, inductor

from . import devices
from .compilation import Callback, Compilation
from .events import Fallback
from .split import Split


class Prologue:
    """Computes the hoisted values of a split.

    Attributes:
        on_gpu: Whether all values are on GPUs.
        in_place: Whether values are written to the memory of the last ones, one by one: a recorded CUDA graph reads the
            addresses it was recorded with, and a GPU has no room for both. Not what a forward pass saved, which stays
            as it is.
        module: The graph, which takes the values to write to behind the weights if it writes in place.
        run: What is called in place of the graph; takes a list and may empty it.
    """

    def __init__(self, parts: Split) -> None:
        self._expected = parts.values
        self.on_gpu = all(map(devices.on_gpu, parts.values))
        self.in_place = self.on_gpu and not parts.saved and not any(0 in value.stride() for value in parts.values)
        self.module = _writing(parts) if self.in_place else parts.prologue
        self.run: Callback = lambda args: self.module(*args)

    def __call__(self, weights: Sequence[Tensor], last: list[Tensor] | None) -> list[Tensor]:
        """The values; ``last`` are those of the last call, if there are any."""
        if not self.in_place:
            return [_in_layout(v, e) for v, e in zip(self.run(list(weights)), self._expected, strict=True)]
        values = last or [_empty(e) for e in self._expected]
        self.run([*weights, *values])
        return values


def make_prologue(compilation: Compilation, parts: Split) -> Prologue:
    """The prologue of a split, compiled if it runs on a GPU: on a CPU it would take longer to compile than it gains."""
    prologue = Prologue(parts)
    graph = prologue.module.graph

    def compile() -> None:
        module = fx.GraphModule(prologue.module, copy_graph(graph))
        inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
        with aot.separate_output_strides(), inductor.inductor_config.patch({"triton.cudagraphs": False}):
            prologue.run = compilation.inner_compile(
                module, inputs, is_inference=True, static_input_idxs=list(range(len(inputs)))
            )

    if prologue.on_gpu:
        compilation.attempt(Fallback.PROLOGUE, graph, compile, "the prologue could not be compiled")
    return prologue


def _writing(parts: Split) -> fx.GraphModule:
    """The prologue, writing each value to where the last one is as soon as it is computed."""
    graph = copy_graph(parts.prologue.graph)
    output = graph.output_node()
    last = list(graph.find_nodes(op="placeholder"))[-1:]
    for position, (node, expected) in enumerate(zip(output.args[0], parts.values, strict=True)):  # type: ignore[arg-type]
        with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes))):
            target = graph.placeholder(f"value_{position}")
        target.meta["val"] = expected
        last = [target]
        with graph.inserting_after(node):
            copy = graph.call_function(torch.ops.aten.copy_.default, (target, node))
        copy.meta["val"] = expected
    output.args = ((),)
    graph.lint()
    return fx.GraphModule(parts.prologue, graph)


def _in_layout(value: Tensor, expected: Tensor) -> Tensor:
    """``value`` in memory of its own, with the strides that the step was compiled for."""
    if value.is_mkldnn or value.stride() == expected.stride():
        return value
    return _empty(expected).copy_(value)


def _empty(expected: Tensor) -> Tensor:
    return torch.empty_strided(expected.shape, expected.stride(), dtype=expected.dtype, device=expected.device)
