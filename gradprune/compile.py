"""``gradprune.compile`` and ``gradprune.explain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import fx
from torch.utils._pytree import tree_map

from . import _torch
from .backend import compile_graph, gradprune
from .errors import NoPerturbationError
from .inspect.report import Report
from .options import Options

F = TypeVar("F", bound=Callable[..., Any])


def compile(fn: F, *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any) -> F:
    """Compile an attack step or a model: ``torch.compile(fn, backend="gradprune")`` with its options checked at once.

    Args:
        fn: A function that runs forward, takes the gradient of the perturbation and returns what it returns; or an
            ``nn.Module`` whose backward is called from outside.
        fullgraph: Raise at a graph break instead of compiling the pieces.
        dynamic: As in ``torch.compile``.
        options: See ``gradprune.options.Options``.

    Returns:
        The compiled function or module. Compilation happens at the first call.

    Raises:
        OptionError: An option or a value is unknown.
    """
    Options.parse(options)
    backend: Any = gradprune
    return torch.compile(fn, backend=backend, fullgraph=fullgraph, dynamic=dynamic, options=options or None)  # type: ignore[return-value]


def explain(fn: Callable[..., Any], *args: Any, **options: Any) -> Report:
    """What gradprune would do to a step or a model, without running or compiling any kernel.

    The function is captured and analysed as ``torch.compile`` would; where a compiled graph would run, uninitialised
    memory of the right shape is returned instead. Arguments are copied; weights, buffers and their ``.grad`` are left
    as they are. What the function does in Python, such as appending to a list, is done.

    Args:
        fn: An attack step or a model.
        args: Its arguments, tensors or anything else. Of a model, at least one has to require grad.
        options: See ``gradprune.options.Options``.

    Returns:
        The report of the graph that takes the gradient; if a graph break leaves several, of the costliest one.

    Raises:
        NoPerturbationError: No graph takes the gradient of an input.
        GradpruneError: As the backend does.
    """
    parsed = Options.parse(options)
    fn = getattr(fn, "_gradprune_original", fn)
    fn = getattr(fn, "_torchdynamo_orig_callable", fn)
    found: list[Report] = []
    gradients: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for leaf in _torch.leaves(gm.graph):
            gradients.setdefault(id(leaf), (leaf, leaf.grad))  # what runs after the graph may store another one
        compiled, report = compile_graph(gm, example_inputs, parsed, _pretend, run_prologue=False)
        found.append(report)
        return compiled

    for flag in _torch.TRACED_FLAGS:
        _torch.scope_to_backend(flag, analyse)
    copies = tree_map(_copy_argument, args)
    try:
        torch.compile(_unseen(fn), backend=analyse)(*copies)
    finally:
        for flag in _torch.TRACED_FLAGS:
            _torch.forget_backend(flag, analyse)
        for leaf, gradient in gradients.values():
            leaf.grad = gradient
    with_gradient = [report for report in found if report.takes_gradient]
    if not with_gradient:
        raise NoPerturbationError(
            "nothing in this call takes the gradient of an input: a step has to call torch.autograd.grad, "
            "loss.backward() or torch.func.grad on a tensor that requires grad (x_adv.detach().requires_grad_(True)), "
            "and an argument of a model has to require grad"
        )
    return max(with_gradient, key=lambda report: sum(report.flops.get("before", {}).values()))


def _unseen(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``fn`` and has a code object of its own.

    Dynamo keeps what it compiled with the code object and allows a few compilations for each, so that explaining a
    step again and again would reach the limit, and use up what ``torch.compile`` may need.
    """

    def call(*args: Any) -> Any:
        return fn(*args)

    return FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)


def _copy_argument(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


def _pretend(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """An inner compiler whose result returns memory of the right shape and computes nothing."""
    output = gm.graph.output_node()
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    descriptors = output.meta.get("desc") or [None] * len(output.args[0])  # type: ignore[arg-type]
    mutated = {
        node.meta["desc"]: position for position, node in enumerate(placeholders) if node.meta.get("desc") is not None
    }
    recipes: list[Any] = []
    for value, descriptor in zip(output.args[0], descriptors, strict=False):  # type: ignore[arg-type]
        if isinstance(descriptor, _torch.InputMutationAOTOutput):
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
