"""What gradprune would do to a step, and what torch.compile alone would, without running or compiling a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from gradprune.compiler.events import Listener
from gradprune.compiler.lower import compile_graph
from gradprune.compiler.options import Options
from gradprune.errors import NoPerturbationError
from gradprune.graph.cost import FLOP_CLASSES, node_flops
from gradprune.report.figures import saved_by
from gradprune.report.recorder import Recorder
from gradprune.report.report import Report
from gradprune.torch_compat import aot, dynamo, inductor

from .observe import Observer


@dataclass(frozen=True)
class Analysis:
    """What became of one call.

    Attributes:
        report: That of the graph that takes the gradient; if a graph break leaves several, of the costliest one.
        weights: Parameters that the graphs read.
    """

    report: Report
    weights: list[torch.Tensor]


def explain(fn: Callable[..., Any], *args: Any, **options: Any) -> Report:
    """What gradprune would do to a step or a model, without running or compiling any kernel.

    The function is captured and analysed as ``torch.compile`` would; where a compiled graph would run, uninitialised
    memory of the right shape is returned instead. Arguments are copied; weights, buffers and their ``.grad`` are left
    as they are. What the function does in Python, such as appending to a list, is done.

    Args:
        fn: An attack step or a model.
        args: Its arguments, tensors or anything else. Of a model, at least one has to require grad.
        options: See ``gradprune.Options``.

    Returns:
        The report of the graph that takes the gradient; if a graph break leaves several, of the costliest one.

    Raises:
        NoPerturbationError: No graph takes the gradient of an input.
        GradpruneError: As the backend does.
    """
    return analyse(fn, args, Options.parse(options)).report


def analyse(
    fn: Callable[..., Any],
    args: Sequence[Any],
    options: Options,
    *,
    inner_compile: Callable[..., Any] | None = None,
    listeners: Sequence[Listener] = (),
    run_prologue: bool = False,
    backward: bool = False,
) -> Analysis:
    """Capture and prune what a call computes, see ``gradprune.explain``.

    Args:
        fn: An attack step or a model.
        args: Its arguments. Tensors may be fake ones, and then those of the model have to be, of the same mode.
        options: Of the backend.
        inner_compile: What turns an ATen graph into a callable; ``pretend`` unless it is passed.
        listeners: Are told of every stage as well.
        run_prologue: Whether to divide the step from its prologue.
        backward: Whether to have the backward graph of a model compiled, too.

    Raises:
        NoPerturbationError: No graph takes the gradient of an input.
        GradpruneError: As the backend does.
    """
    found: list[Report] = []
    weights: dict[int, torch.Tensor] = {}

    def compile_one(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in gm.graph.find_nodes(op="placeholder"):
            example = getattr(node.meta.get("grapharg"), "example", None)
            if isinstance(example, torch.Tensor) and dynamo.is_module_state(node):
                weights[id(example)] = example
        recorder = Recorder(dynamo.compiling_name())
        compiled = compile_graph(
            *(gm, example_inputs, options, (recorder, Observer(recorder.report, options), *listeners)),
            inner_compile=inner_compile or pretend,
            run_prologue=run_prologue,
        )
        found.append(recorder.report)
        return compiled

    call_compiled(fn, args, compile_one, flags=tuple(dynamo.TRACED_FLAGS), backward=backward)
    with_gradient = [report for report in found if report.takes_gradient]
    if not with_gradient:
        raise NoPerturbationError(
            "nothing in this call takes the gradient of an input: a step has to call torch.autograd.grad, "
            "loss.backward() or torch.func.grad on a tensor that requires grad (x_adv.detach().requires_grad_(True)), "
            "and an argument of a model has to require grad"
        )
    costliest = max(with_gradient, key=lambda report: sum(report.flops.get("before", {}).values()))
    return Analysis(costliest, [weight for weight in weights.values() if weight.requires_grad])


@dataclass
class Counted:
    """What a compilation computes and saves, counted in the graphs that it made kernels of.

    Attributes:
        ops: Operators.
        flops: By class, as in ``Report.flops``.
        saved_bytes: Bytes that forward hands to backward.
    """

    ops: int = 0
    flops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FLOP_CLASSES, 0))
    saved_bytes: int = 0


def count_frozen_compile(fn: Callable[..., Any], args: Sequence[Any], weights: Sequence[torch.Tensor]) -> Counted:
    """What ``torch.compile`` with its own backend makes of the same call while ``weights`` do not require grad.

    Without traced gradient calls Dynamo divides a step at the call; AOTAutograd and Inductor's partitioner divide
    forward from backward. All of these graphs are counted.
    """
    counted = Counted()

    def count(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        counted.ops += len(calls)
        for node in calls:
            flops = node_flops(node)
            if node.target is torch.ops.aten.convolution_backward.default:
                mask: Any = node.args[-1]
                counted.flops["weight_grad"] += flops * bool(mask[1])
                flops *= bool(mask[0])
            counted.flops["input_grad" if kwargs.get("is_backward") else "forward"] += flops
        if not kwargs.get("is_backward") and not kwargs.get("is_inference"):
            counted.saved_bytes += saved_by(gm.graph)
        return pretend(gm, inputs)

    compile_frozen(fn, args, weights, count)
    return counted


def compile_frozen(
    fn: Callable[..., Any], args: Sequence[Any], weights: Sequence[torch.Tensor], inner_compile: Callable[..., Any]
) -> None:
    """Have ``torch.compile``'s own backend compile a call while ``weights`` do not require grad.

    Args:
        fn: An attack step or a model.
        args: Its arguments.
        weights: Parameters to freeze meanwhile.
        inner_compile: Is called in place of Inductor's ``compile_fx_inner``, and may not compute anything.
    """

    def compile_one(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with aot.functorch_config.patch(enable_autograd_cache=False):
            compiled: Any = inductor.compile_fx(gm, list(example_inputs), inner_compile=inner_compile)
        return compiled  # type: ignore[no-any-return]

    for weight in weights:
        weight.requires_grad_(False)
    try:
        call_compiled(fn, args, compile_one, backward=True)
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def call_compiled(
    fn: Callable[..., Any],
    args: Sequence[Any],
    compile_graph: Callable[..., Any],
    *,
    flags: Sequence[str] = (),
    backward: bool = False,
) -> None:
    """Call a function whose graphs are compiled by ``compile_graph``; stored gradients are taken back.

    What is compiled is called with what the function is, and should compute nothing. ``flags`` are Dynamo's. With
    ``backward``, what is returned is differentiated: only then does torch compile a model's backward graph.
    """
    fn = getattr(fn, "_gradprune_original", fn)
    fn = getattr(fn, "_torchdynamo_orig_callable", fn)
    gradients: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for leaf in dynamo.leaves(gm.graph):
            gradients.setdefault(id(leaf), (leaf, leaf.grad))  # what runs after the graph may store another one
        compiled: Callable[..., Any] = compile_graph(gm, example_inputs)
        return compiled

    for flag in flags:
        dynamo.scope_to_backend(flag, backend)
    copies = tree_map(_copy_argument, tuple(args))
    try:
        results = torch.compile(_unseen(fn), backend=backend)(*copies)
        if backward:
            sums = [
                leaf.sum() for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor) and leaf.requires_grad
            ]
            torch.autograd.backward(sums)
    finally:
        for flag in flags:
            dynamo.forget_backend(flag, backend)
        for leaf, gradient in gradients.values():
            leaf.grad = gradient


def _unseen(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``fn`` and has a code object of its own.

    Dynamo keeps what it compiled with the code object and allows a few compilations for each, so that explaining a
    step again and again would reach the limit, and use up what ``torch.compile`` may need.
    """

    def call(*args: Any) -> Any:
        return fn(*args)

    name = getattr(fn, "__name__", type(fn).__name__)
    return FunctionType(call.__code__.replace(co_name=name), call.__globals__, closure=call.__closure__)


def _copy_argument(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


def pretend(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """An inner compiler whose result returns memory of the right shape and computes nothing."""
    output = gm.graph.output_node()
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    descriptors = output.meta.get("desc") or [None] * len(output.args[0])  # type: ignore[arg-type]
    mutated = {
        node.meta["desc"]: position for position, node in enumerate(placeholders) if node.meta.get("desc") is not None
    }
    recipes: list[Any] = []
    for value, descriptor in zip(output.args[0], descriptors, strict=False):  # type: ignore[arg-type]
        if isinstance(descriptor, aot.InputMutationAOTOutput):
            recipes.append(mutated.get(descriptor.mutated_input))  # handed back as it is, so that it stays as it is
        elif isinstance(value, fx.Node):
            recipes.append(placeholders.index(value) if value in placeholders else value.meta.get("val"))
        else:
            recipes.append(value)

    def run(args: list[Any]) -> list[Any]:
        results = []
        for recipe in recipes:
            if isinstance(recipe, torch.Tensor):
                sizes = [int(size) for size in recipe.shape], [int(stride) for stride in recipe.stride()]
                results.append(torch.empty_strided(*sizes, dtype=recipe.dtype, device=recipe.device))
            else:
                results.append(args[recipe] if isinstance(recipe, int) else recipe)
        args.clear()
        return results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
