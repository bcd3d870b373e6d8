"""Compile one graph that Dynamo captured: classify it and run the passes inside Inductor's compilation."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx

from gradprune.graph.captured_graph import CapturedGraph
from gradprune.graph.step_graph import InputRole
from gradprune.ops import winograd
from gradprune.passes.pipeline import PassRecord, kept_operators, run_passes
from gradprune.passes.winograd_convolutions import winograd_convolutions
from gradprune.torch_compat import aot, background, dynamo, inductor, probe
from gradprune.torch_compat.codegen import quick_codegen
from gradprune.torch_compat.instructions import find_early
from gradprune.torch_compat.kernels import compiling_together

from . import devices, stored
from .apart import Job, Meanwhile
from .capture import capture
from .compilation import Callback, Compilation, InnerCompile
from .devices import out_of_cuda_graphs
from .events import Fallback, Listener
from .first_call import FirstCall, without_metadata
from .hoisted_step import HoistedStep
from .misuse import like_eager, with_calling_convention
from .options import Options
from .prologue import make_prologue
from .pruning import PruningPass
from .split import Split, erase_stand_ins, forward_of

log = logging.getLogger(__name__)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    listeners: Sequence[Listener] = (),
    *,
    inner_compile: InnerCompile = inductor.compile_fx_inner,
    run_prologue: bool = True,
) -> Callback:
    """Compile one Dynamo graph.

    Args:
        gm: The graph; it is changed.
        example_inputs: Its inputs.
        options: The backend's options.
        listeners: Are told of every stage.
        inner_compile: What turns an ATen graph into a callable.
        run_prologue: Whether to divide a step into a prologue and the rest. Not for a graph that never computes.

    Returns:
        A callable with the calling convention Dynamo expects of ``gm``.

    Raises:
        GradpruneError: As the backend does.
    """
    probe.warn()
    dynamo.forget_sources_of_constants()
    compilation = Compilation(options, listeners, inner_compile, run_prologue)
    compilation.tell("captured", gm.graph, example_inputs)
    with _compiling(compilation):
        return _compile(gm, example_inputs, compilation)


def compile_job(job: Job, compilation: Compilation) -> Callback:
    """Compile what another process captured, or this one to be compiled by another.

    Args:
        job: The job.
        compilation: The compilation of it; its listeners are told of every stage, and one of them stores it.

    Returns:
        A callable that takes and returns what Dynamo's graph does.
    """
    compilation.is_apart = False
    with _compiling(compilation):
        module = job.module()
        inputs = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        return _compile_classified(module, inputs, compilation)


@contextmanager
def _compiling(compilation: Compilation) -> Iterator[None]:
    """Tell listeners how a compilation ends, and leave nothing behind that goes on."""
    try:
        yield
    except BaseException as error:
        compilation.tell("abandoned", error)
        raise
    finally:
        background.wait()  # what is left of it may lose the folder it compiles in
    if not compilation.is_apart:
        compilation.tell("finished")


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], compilation: Compilation) -> Callback:
    options, start = compilation.options, time.perf_counter()

    def classify() -> None:
        compilation.capture = capture(gm, forward_only=options.forward_only)
        placeholders = gm.graph.find_nodes(op="placeholder")
        compilation.module_state = frozenset(node.name for node in placeholders if dynamo.is_module_state(node))

    classified = compilation.attempt(
        Fallback.CAPTURED, gm.graph, classify, "the captured graph could not be classified"
    )
    gm.recompile()
    if not classified:  # compiled without looking into it, as torch's default backend would
        compilation.tell("classified", "model")
        return _compile_fx(gm, example_inputs, _told(compilation), options.inductor_settings)
    compilation.tell("classified", compilation.capture.form)
    if compilation.run_prologue and not any(
        devices.on_gpu(one) for one in example_inputs if isinstance(one, torch.Tensor)
    ):
        _begin_to_compile(gm.graph, compilation)
    key = stored.key_of(gm, example_inputs, compilation)
    is_checked = options.check != "never" and compilation.run_prologue
    captured = without_metadata(gm, compilation.capture) if is_checked or options.background else None

    def checked(compiled: Callback) -> Callback:
        if captured is None or not (is_checked and compilation.was_traced):
            return compiled
        return FirstCall(compiled, captured, compilation, time.perf_counter() - start)

    if key:
        compilation.listeners = [*compilation.listeners, stored.Storing(key, compilation)]
    found = stored.load(key, compilation) if key else None
    if found is None and options.background and captured is not None:
        found = _compile_meanwhile(key, gm, example_inputs, compilation, captured, checked)
        if found is not None:
            return with_calling_convention(found, compilation.capture)
    compiled = found or _compile_classified(gm, example_inputs, compilation)
    return with_calling_convention(checked(compiled), compilation.capture)


def _compile_meanwhile(
    key: str,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compilation: Compilation,
    captured: fx.GraphModule,
    checked: Callable[[Callback], Callback],
) -> Callback | None:
    """Have another process compile a step, and run the captured graph until it has; ``None`` if that cannot be."""
    job = Job.of(key, gm, example_inputs, compilation) if key else None
    if job is None:
        log.info("gradprune: compiled at once and not in the background, see the option 'background'")
        return None

    def load() -> Callback | None:
        compiled = stored.load(key, compilation)
        if compiled is None:
            return None
        compilation.tell("finished")
        return checked(compiled)

    compilation.is_apart = True
    return Meanwhile(job, captured, load, lambda job: checked(compile_job(job, compilation)))


def _compile_classified(gm: fx.GraphModule, example_inputs: Sequence[Any], compilation: Compilation) -> Callback:
    """Run the passes and compile what they make of it; without them, should that fail."""
    compiled: Callback

    def compile_pruned() -> None:
        nonlocal compiled
        _run_passes_before_autograd(gm, compilation)
        compiled = _compile_pruned(gm, example_inputs, compilation)

    failure = "what the passes made of it did not compile"
    if not compilation.attempt(Fallback.PASSES, gm.graph, compile_pruned, failure):
        compilation.prunes, compilation.parts = False, None
        gm.recompile()
        compiled = _compile_pruned(gm, example_inputs, compilation)
    if not compilation.was_traced and any(node.op not in ("placeholder", "output") for node in gm.graph.nodes):
        reason = "torch noted no descriptors ('desc') on the outputs of the graph, and its passes ran on none of it"
        compilation.fall_back(Fallback.CAPTURED, reason, None)
    return compiled


def _begin_to_compile(graph: fx.Graph, compilation: Compilation) -> None:
    """Have what Inductor and the passes will ask for be compiled while the graph is traced."""
    find_early()
    weights = [node.args[1] for node in graph.find_nodes(op="call_function", target=torch.conv2d) if len(node.args) > 1]
    shapes = [weight.meta["example_value"].shape[2:] for weight in weights if isinstance(weight, fx.Node)]
    if (3, 3) in shapes and winograd_convolutions in compilation.passes:
        winograd.prepare()


def _compile_pruned(gm: fx.GraphModule, example_inputs: Sequence[Any], compilation: Compilation) -> Callback:
    pruning = PruningPass(compilation, inductor.inductor_config.joint_custom_pre_pass)
    return _compile_fx(
        gm,
        example_inputs,
        functools.partial(_compile_part, compilation),
        {**compilation.options.inductor_settings, "joint_custom_pre_pass": pruning},
        keep=kept_operators(compilation.passes),
    )


def _run_passes_before_autograd(gm: fx.GraphModule, compilation: Compilation) -> None:
    graph, options = gm.graph, compilation.options
    weights = frozenset(node for node in graph.find_nodes(op="placeholder") if node.name in compilation.module_state)
    captured = CapturedGraph(graph, compilation.capture.form, weights)

    def observe(record: PassRecord) -> None:
        compilation.tell("passed", record, graph, None)

    def run() -> None:
        run_passes(captured, compilation.passes, verify=options.verify, observe=observe)

    compilation.attempt(Fallback.FOLDING, graph, run, "a pass before autograd failed")
    gm.recompile()


def _compile_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner_compile: InnerCompile,
    patches: dict[str, Any],
    keep: Collection[torch._ops.OpOverload] = (),
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


def _told(compilation: Compilation) -> InnerCompile:
    """Inductor's compilation of one ATen graph, which listeners are told of."""

    @functools.wraps(compilation.inner_compile)
    def compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        part = "step" if compilation.capture.form == "step" else "forward"
        part = "backward" if kwargs.get("is_backward") else part
        compilation.tell("compiling", part, gm.graph)
        with compiling_together(), quick_codegen():
            compiled = compilation.inner_compile(gm, inputs, **kwargs)
        compilation.tell("compiled", part, compiled)
        return compiled

    return compile


def _compile_part(compilation: Compilation, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callback:
    """Compile one ATen graph: the step, or the forward or backward part of a model."""
    kwargs.pop("get_decomp_fn", None)  # everything is decomposed by now, and a table of one's own cannot be a cache key
    inner_compile, capture, options = _told(compilation), compilation.capture, compilation.options
    compiled: Callback
    if kwargs.get("is_inference"):
        aot.declare_absent_outputs(gm.graph)
        parts = compilation.parts
        with inductor.inductor_config.patch({**_layout_settings(gm.graph), **options.inductor_settings}):
            if parts is None:
                compiled = inner_compile(gm, inputs, **kwargs)
                return _keep_outputs(compilation, compiled, kwargs)
            return _compile_divided(compilation, parts, gm, inputs, **kwargs)
    if kwargs.get("is_backward"):
        known = compilation.strides
        strides = [known.get(one) for one in aot.output_descriptors(gm.graph)] if known else None
        with nullcontext() if compilation.parts is None else _layout_asserts(compilation.parts):
            erase_stand_ins(gm.graph)
            compiled = inner_compile(gm, inputs, **kwargs)
        weights = [role is InputRole.WEIGHT for role in capture.tensor_inputs]
        return like_eager(compiled, weights, strides)
    aot.declare_no_donated_buffers()
    if compilation.parts is not None:
        return _compile_divided(compilation, forward_of(compilation.parts, gm.graph), gm, inputs, **kwargs)
    compiled = inner_compile(gm, inputs, **kwargs)
    return compiled


def _compile_divided(
    compilation: Compilation, parts: Split, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any
) -> Callback:
    """Compile what takes hoisted values as inputs, behind those of the whole."""
    prologue = make_prologue(compilation, parts)
    kept = [inputs[index] for index in parts.step_inputs]
    static = set(kwargs.get("static_input_idxs") or ())
    kwargs["static_input_idxs"] = [
        *(position for position, index in enumerate(parts.step_inputs) if index in static),
        *range(len(kept), len(kept) + len(parts.values)),
    ]
    with _layout_asserts(parts):
        step = _told(compilation)(gm, [*kept, *parts.values], **kwargs)
    is_step = compilation.capture.form == "step"
    step = _keep_outputs(compilation, step, kwargs)
    return HoistedStep(
        parts,
        step,
        prologue,
        always_refresh=compilation.options.always_refresh,
        returns_iterates=is_step,
        may_repeat=not (compilation.written or compilation.unrepeatable),
    )


def _keep_outputs(compilation: Compilation, compiled: Callback, kwargs: Mapping[str, Any]) -> Callback:
    """Have a step return what the next call does not free; what a model returns is as with torch's default backend."""
    # Torch notes in it whether the graph that it has just compiled is run as a CUDA graph.
    is_recorded = bool(kwargs.get("cudagraphs"))
    return out_of_cuda_graphs(compiled) if is_recorded and compilation.capture.form == "step" else compiled


def _layout_asserts(parts: Split) -> AbstractContextManager[object]:
    """Without Inductor's asserts on a CPU, where a packed weight has no strides that could be asserted."""
    if all(map(devices.on_gpu, parts.values)):
        return nullcontext()
    return inductor.inductor_config.patch(size_asserts=False, alignment_asserts=False)  # type: ignore[no-any-return]


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
