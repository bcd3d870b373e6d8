"""From a captured Dynamo graph to a compiled callable: the passes inside Inductor's compilation, caches keyed right."""

from __future__ import annotations

import functools
import hashlib
import logging
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from gradprune import passes
from gradprune.errors import DoubleBackwardError, PassError, TrainingStepError, WeightGradientError
from gradprune.graph.regions import mark_backward
from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph
from gradprune.inspect.observe import Observer
from gradprune.passes import fold_batch_norm, gather_max_pool
from gradprune.passes.base import Tier
from gradprune.passes.pipeline import PassRecord, run_passes, select_passes
from gradprune.report.report import Report
from gradprune.torch_compat import aot, dynamo, inductor

from .capture import Capture
from .hoisted_step import HoistedStep
from .options import Options
from .split import Split, split

log = logging.getLogger(__name__)

Callback = Callable[..., Any]
InnerCompile = Callable[..., Any]


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    capture: Capture,
    options: Options,
    report: Report,
    inner_compile: InnerCompile,
    observer: Observer,
    *,
    run_prologue: bool = True,
) -> Callback:
    """Compile a captured graph.

    Args:
        gm: The Dynamo graph, as ``capture`` left it.
        example_inputs: Its inputs.
        capture: What it is.
        options: The backend's options.
        report: Filled in on the way.
        inner_compile: What turns an ATen graph into a callable.
        observer: Told of every stage.
        run_prologue: Whether to split the graph into a prologue and a step. Not for a graph that never computes.

    Returns:
        A callable with the calling convention Dynamo expects of ``gm``.
    """
    if capture.form == "step" and options.fold_batch_norm and not options.exact_order:
        _fold_batch_norm(gm, options, report, observer)
    pruning = PruningPass(capture, options, report, observer, inductor.inductor_config.joint_custom_pre_pass)
    compile_graph = functools.partial(_compile_graph, inner_compile, capture, options, report, observer, run_prologue)
    compiled = _compile_fx(
        gm,
        example_inputs,
        inner_compile=compile_graph,
        patches={**options.inductor_settings, "joint_custom_pre_pass": pruning},
        keep=_kept_operators(options),
    )
    return _with_calling_convention(compiled, capture)


def _kept_operators(options: Options) -> Sequence[torch._ops.OpOverload]:
    """Operators that a pass has to see whole."""
    selected = [step.name for step in select_passes(options.disable, options.exact_order)]
    return gather_max_pool.KEPT_OPERATORS if gather_max_pool.GatherMaxPool.name in selected else ()


def _fold_batch_norm(gm: fx.GraphModule, options: Options, report: Report, observer: Observer) -> None:
    """Run the one pass that has to come before autograd; on a failure leave the graph as it was, unless ``strict``."""
    if fold_batch_norm.NAME in options.disable:
        return
    backup = copy_graph(gm.graph)
    started = time.perf_counter()
    ops = sum(node.op in ("call_function", "call_method") for node in gm.graph.nodes)
    try:
        result = fold_batch_norm.fold_batch_norm(gm.graph, dynamo.is_module_state)
        gm.graph.lint()
    except Exception as error:
        reason = f"pass {fold_batch_norm.NAME!r} failed: {error!r}"
        if options.strict:
            raise PassError(reason) from error
        restore_graph(gm.graph, backup)
        report.fallback = reason
        log.warning("gradprune did not fold batch norm: %s", reason, exc_info=error)
    else:
        after = sum(node.op in ("call_function", "call_method") for node in gm.graph.nodes)
        seconds = time.perf_counter() - started
        report.passes.append(PassRecord(fold_batch_norm.NAME, Tier.REORDERS_FLOAT, seconds, ops, after, result))
        observer.folded(report.passes[-1], gm.graph)
    gm.recompile()


def compile_as_captured(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, inner_compile: InnerCompile
) -> Callback:
    """Compile a graph without looking into it, as torch's default backend would."""
    return _compile_fx(gm, example_inputs, inner_compile, options.inductor_settings)


def _compile_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner_compile: InnerCompile,
    patches: dict[str, Any],
    keep: Sequence[torch._ops.OpOverload] = (),
) -> Callback:
    """Inductor's compilation with other settings; operators in ``keep`` are not decomposed."""
    decompositions = None
    if keep:
        table = inductor.select_decomp_table()
        decompositions = {operator: rule for operator, rule in table.items() if operator not in keep}
    # See Note [Caches].
    with aot.functorch_config.patch(enable_autograd_cache=False, donated_buffer=False):
        compiled: Any = inductor.compile_fx(
            gm,
            list(example_inputs),
            inner_compile=inner_compile,
            config_patches=patches,
            decompositions=decompositions,
        )
    return compiled  # type: ignore[no-any-return]


# Note [Caches]
#
# Inductor's FX graph cache keys on the ATen graph after the passes and on the uuid of custom passes, so it can stay on:
# another option or another pass means another uuid or another graph. AOTAutograd's own cache keys on the graph before
# the passes and hands back a finished artifact without running them: there would be no report, and whatever the key
# misses would return an old artifact. It is off for these compilations; tracing runs every time.
#
# Donated buffers are off because attack libraries call backward with retain_graph=True, which donation forbids. Torch
# reads the setting again when backward runs, outside of the patch, and takes "not collected" for "some": hence
# ``declare_no_donated_buffers``.


class PruningPass(inductor.CustomGraphPass):
    """Runs the pipeline on the joint graph (model form) or on the step graph, before Inductor's own joint passes."""

    def __init__(
        self, capture: Capture, options: Options, report: Report, observer: Observer, user_pass: Any = None
    ) -> None:
        self.capture = capture
        self.options = options
        self.report = report
        self.observer = observer
        self.user_passes = list(user_pass) if isinstance(user_pass, (list, tuple)) else [user_pass] * bool(user_pass)

    def __call__(self, graph: fx.Graph) -> None:
        """Prune ``graph`` in place; on a failure of a pass leave it as it was, unless ``strict``."""
        for user_pass in self.user_passes:
            user_pass(graph)
        step_graph = build_step_graph(graph, self.capture)
        if step_graph is None:
            return
        backup = copy_graph(graph)
        earlier = list(self.report.passes)
        try:
            self.report.measure(step_graph, "before")
            self.observer.captured(step_graph)
            self.report.passes += run_passes(
                step_graph,
                select_passes(self.options.disable, self.options.exact_order),
                verify=self.options.verify,
                observe=functools.partial(self.observer.passed, step_graph=step_graph),
            )
            self.report.measure(step_graph, "after")
            self.observer.pruned(step_graph)
        except Exception as error:
            reason = str(error) if isinstance(error, PassError) else f"a pass failed: {error!r}"
            self.observer.gave_up(step_graph, reason)
            if self.options.strict:
                raise error if isinstance(error, PassError) else PassError(reason) from error
            restore_graph(graph, backup)
            _drop_weight_gradients(graph, self.capture)
            self.report.passes = earlier
            self.report.fallback = reason
            log.warning("gradprune compiled a graph as captured: %s", reason, exc_info=error)

    def uuid(self) -> bytes | None:
        """Identity of the passes for Inductor's cache: their source, the options, the roles of this graph."""
        user_ids = [user_pass.uuid() for user_pass in self.user_passes if hasattr(user_pass, "uuid")]
        if len(user_ids) < len(self.user_passes) or None in user_ids:
            return None  # someone's pass cannot be identified, so nothing may be cached
        options = (self.options.disable, self.options.exact_order, self.options.verify, self.options.strict)
        roles = (self.capture.form, self.capture.inputs, sorted(self.capture.outputs.items(), key=lambda item: item[0]))
        return hashlib.sha256(pickle.dumps((source_hash(), options, roles, user_ids))).digest()


def _drop_weight_gradients(graph: fx.Graph, capture: Capture) -> None:
    """Return no weight gradients from a graph that is otherwise compiled as captured: ``.grad`` stays untouched."""
    step_graph = build_step_graph(graph, capture)
    assert step_graph is not None
    values = zip(step_graph.output_values(), step_graph.outputs, strict=True)
    step_graph.set_output_values([None if role is OutputRole.WEIGHT_GRAD else value for value, role in values])


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of the source of gradprune, passes included."""
    digest = hashlib.sha256()
    folders = {Path(__file__).parent, Path(passes.__file__ or "").parent}
    for file in sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")}):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def build_step_graph(graph: fx.Graph, capture: Capture) -> StepGraph | None:
    """Give an ATen graph its roles; ``None`` if it is not the graph of the whole capture (a nested region)."""
    output = graph.output_node()
    descriptors = output.meta.get("desc")
    if descriptors is None:
        return None
    inputs = {}
    for node in graph.find_nodes(op="placeholder"):
        descriptor = node.meta.get("desc")
        if isinstance(descriptor, aot.PlainAOTInput):
            inputs[node] = capture.inputs[descriptor.idx]
        else:
            is_tangent = type(descriptor).__name__ == "TangentAOTInput"
            inputs[node] = InputRole.TANGENT if is_tangent else InputRole.DATA
    outputs = []
    kept_because = {}
    for position, descriptor in enumerate(descriptors):
        role = OutputRole.UPDATE
        if isinstance(descriptor, aot.PlainAOTOutput):
            role = capture.outputs.get(descriptor.idx, OutputRole.UPDATE)
            if descriptor.idx in capture.kept_because:
                kept_because[position] = capture.kept_because[descriptor.idx]
        elif isinstance(descriptor, aot.InputMutationAOTOutput):
            role = OutputRole.MUTATION
        elif isinstance(descriptor, aot.GradAOTOutput):
            role = OutputRole.INPUT_GRAD
            source = descriptor.grad_of
            if isinstance(source, aot.PlainAOTInput) and capture.inputs[source.idx] is InputRole.WEIGHT:
                role = OutputRole.WEIGHT_GRAD
                if capture.form == "step":
                    role = OutputRole.KEPT_WEIGHT_GRAD
                    kept_because[position] = "what the step returns can be differentiated by this weight"
        outputs.append(role)
    step_graph = StepGraph(graph, capture.form, inputs, outputs, kept_because)
    mark_backward(step_graph, capture.gradient_calls)
    return step_graph


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` to restore it from."""
    copy = fx.Graph()
    _copy_nodes(graph, copy)
    return copy


def restore_graph(graph: fx.Graph, backup: fx.Graph) -> None:
    """Make ``graph`` what it was when ``backup`` was copied from it."""
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


def _compile_graph(
    inner_compile: InnerCompile,
    capture: Capture,
    options: Options,
    report: Report,
    observer: Observer,
    run_prologue: bool,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    **kwargs: Any,
) -> Callback:
    """Compile one ATen graph: the step, or the forward or backward part of a model."""
    kwargs.pop("get_decomp_fn", None)  # everything is decomposed by now, and a table of one's own cannot be a cache key
    if kwargs.get("is_inference"):
        aot.declare_absent_outputs(gm.graph)
        with inductor.inductor_config.patch({**_layout_settings(gm.graph), **options.inductor_settings}):
            parts = _split(gm, capture, report) if run_prologue or observer.dumps else None
            if parts is not None:
                observer.split(parts)
            if parts is None or not run_prologue:
                return inner_compile(gm, inputs, **kwargs)  # type: ignore[no-any-return]
            kept = [inputs[index] for index in parts.step_inputs]
            static = set(kwargs.get("static_input_idxs") or ())
            kwargs["static_input_idxs"] = [
                *(position for position, index in enumerate(parts.step_inputs) if index in static),
                *range(len(kept), len(kept) + len(parts.values)),
            ]
            # A packed weight has no strides that could be asserted.
            with inductor.inductor_config.patch(size_asserts=False, alignment_asserts=False):
                step = inner_compile(parts.step, [*kept, *parts.values], **kwargs)
            return HoistedStep(parts, step, always_refresh=options.always_refresh)
    compiled: Callback
    if kwargs.get("is_backward"):
        compiled = inner_compile(gm, inputs, **kwargs)
        return _refuse_weight_gradients(compiled, [role is InputRole.WEIGHT for role in capture.tensor_inputs])
    report.measure_saved(gm.graph)
    aot.declare_no_donated_buffers()
    compiled = inner_compile(gm, inputs, **kwargs)
    return compiled


def _split(gm: fx.GraphModule, capture: Capture, report: Report) -> Split | None:
    """Separate what the passes said is hoisted; Inductor's own passes have been over the graph since."""
    step_graph = build_step_graph(gm.graph, capture) if report.hoisted else None
    return None if step_graph is None else split(gm, step_graph)


def _layout_settings(graph: fx.Graph) -> dict[str, Any]:
    """Inductor settings for the memory layout of a step graph on a CPU.

    Inductor takes a graph without autograd for inference and converts its convolutions to channels-last, weights
    included, at every call. For dense convolutions that costs more than it brings (one thread, ms per step without and
    with: resnet18 at 112 px 167 and 208, resnet50 238 and 257); depthwise ones gain all the same (mobilenetv2 42 and
    36, convnext_atto 53 and 42).
    """
    convolutions = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    on_cpu = all(node.meta["val"].device.type == "cpu" for node in convolutions)
    if convolutions and on_cpu and all(node.args[-1] == 1 for node in convolutions):
        return {"layout_optimization": False}
    return {}


# --- Calling conventions ----------------------------------------------------------------------------------------------


def _with_calling_convention(compiled: Callback, capture: Capture) -> Callback:
    """Return what Dynamo expects, and name the misuses that would otherwise end in an obscure error or in silence."""
    if capture.form == "step":

        def step(*args: Any) -> Sequence[Any]:
            return compiled(*args)[: capture.visible_outputs]  # type: ignore[no-any-return]

        return step

    def model(*args: Any) -> list[Any]:
        outputs = [_guard(output, capture.training_only) for output in compiled(*args)]
        return outputs

    return model


def _guard(output: Any, training_only: bool) -> Any:
    if not isinstance(output, torch.Tensor):
        return output
    if training_only and output.is_floating_point() and torch.is_grad_enabled():
        anchor = torch.empty(0, device=output.device, requires_grad=True)
        return _NoWeightGradient.apply(output, anchor)
    if output.grad_fn is not None:
        output.grad_fn.register_hook(_refuse_double_backward)
    return output


class _NoWeightGradient(torch.autograd.Function):
    """Identity whose backward says that only weights could receive a gradient here.

    The anchor is a leaf that requires grad, without which the result would not.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise TrainingStepError(
            "backward() was called on a model compiled with gradprune, and no input of the model requires grad: the "
            "only gradients would be those of weights, which gradprune does not compute. To attack, call "
            "x_adv.requires_grad_(True) before the forward pass; to train, use the model that was not compiled, "
            "or compile it with torch.compile's default backend"
        )


def _refuse_weight_gradients(compiled: Callback, weights: list[bool]) -> Callback:
    """A compiled backward pass that raises when a weight gradient is asked for."""

    def backward(args: list[Any]) -> Any:
        if aot.requests_weight_gradient(weights):
            raise WeightGradientError(
                "the gradient of a weight was asked for explicitly from a model compiled with gradprune, which "
                "computes gradients of inputs only. Take it from the model that was not compiled, or from one "
                "compiled with torch.compile's default backend; both share the weights"
            )
        return compiled(args)

    backward._boxed_call = True  # type: ignore[attr-defined]
    return backward


def _refuse_double_backward(grad_inputs: Sequence[torch.Tensor | None], grad_outputs: object) -> None:
    """Hook on the backward of a compiled model: with ``create_graph=True`` its results must not be differentiated."""
    if not torch.is_grad_enabled():
        return
    for gradient in grad_inputs:
        if gradient is not None and gradient.grad_fn is not None:
            gradient.grad_fn.register_prehook(_raise_double_backward)


def _raise_double_backward(grad_outputs: Sequence[torch.Tensor]) -> None:
    raise DoubleBackwardError(
        "the input gradient of a model compiled with gradprune was differentiated (double backward), which a "
        "separately compiled backward cannot do. Compile the whole step instead, with both gradient calls inside: "
        'torch.compile(attack_step, backend="gradprune")'
    )
