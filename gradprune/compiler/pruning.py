"""The passes inside Inductor's compilation: gives the ATen graph its roles, runs them, divides the step."""

from __future__ import annotations

import functools
import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from gradprune import passes
from gradprune.errors import PassError
from gradprune.graph.regions import mark_backward
from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph, set_outputs, tensor_of
from gradprune.ops import kept_copy
from gradprune.passes.pipeline import PassRecord, pass_identity, run_passes
from gradprune.torch_compat import aot, dynamo, inductor

from .capture import Capture
from .compilation import Compilation
from .events import Fallback
from .first_call import unrepeatable, written_inputs
from .split import split


class PruningPass(inductor.CustomGraphPass):
    """Runs the pipeline on the joint graph (model form) or on the step graph, before Inductor's own joint passes."""

    def __init__(self, compilation: Compilation, user_pass: Any = None) -> None:
        self.compilation = compilation
        self.user_passes = list(user_pass) if isinstance(user_pass, (list, tuple)) else [user_pass] * bool(user_pass)

    def __call__(self, graph: fx.Graph) -> None:
        """Prune ``graph`` in place."""
        for user_pass in self.user_passes:
            user_pass(graph)
        compilation, capture = self.compilation, self.compilation.capture
        if graph.output_node().meta.get("desc") is None:
            return  # the body of a loop, a branch or the like inside the graph
        compilation.was_traced = True
        if compilation.prunes:
            compilation.written, shared = written_inputs(graph)
            compilation.unrepeatable = unrepeatable(graph) or shared
            compilation.prunes = compilation.attempt(
                Fallback.PASSES, graph, lambda: self._prune(graph), "pruning failed"
            )
        if not compilation.prunes:
            compilation.parts = None
            _drop_weight_gradients(graph, capture)
            if capture.form == "model":
                failure = "what the model overwrites cannot be kept for its backward pass"
                compilation.attempt(Fallback.PASSES, graph, lambda: save_what_is_overwritten(graph), failure)

    def _prune(self, graph: fx.Graph) -> None:
        """Run the passes, then divide a step at the values that they hoist."""
        compilation, options = self.compilation, self.compilation.options
        compilation.strides = _strides_of_gradients(graph)
        step_graph = build_step_graph(graph, compilation.capture)
        compilation.tell("traced", step_graph)

        def observe(record: PassRecord) -> None:
            compilation.tell("passed", record, graph, step_graph)

        records = run_passes(step_graph, compilation.passes, verify=options.verify, observe=observe)
        compilation.tell("pruned", step_graph)
        hoisted = {change.node for record in records for change in record.result.hoisted}
        if hoisted:
            # What is only looked at stays whole.
            parts = split(step_graph if compilation.run_prologue else step_graph.copy(), hoisted)
            compilation.tell("split", parts)
            compilation.parts = parts if compilation.run_prologue else None
        if compilation.capture.form == "model":
            save_what_is_overwritten(graph)

    def uuid(self) -> bytes | None:
        """Identity of the passes for Inductor's cache: their source, the options, the roles of this graph."""
        user_ids = [user_pass.uuid() if hasattr(user_pass, "uuid") else None for user_pass in self.user_passes]
        user_ids += map(pass_identity, self.compilation.options.passes)
        if None in user_ids:
            return None  # someone's pass cannot be identified, so nothing may be cached
        options, capture = self.compilation.options, self.compilation.capture
        chosen = (options.disable, options.exact_order, options.verify, options.strict)
        roles = (capture.form, capture.inputs, sorted(capture.outputs.items(), key=lambda item: item[0]))
        return hashlib.sha256(pickle.dumps((source_hash(), chosen, roles, user_ids))).digest()


def _drop_weight_gradients(graph: fx.Graph, capture: Capture) -> None:
    """Return no weight gradients from a graph that is otherwise compiled as traced: ``.grad`` stays untouched."""
    roles, _ = _output_roles(graph, capture)
    values = zip(graph.output_node().args[0], roles, strict=True)  # type: ignore[arg-type]
    set_outputs(graph, [None if role is OutputRole.WEIGHT_GRAD else value for value, role in values])


def _strides_of_gradients(graph: fx.Graph) -> dict[Any, tuple[Any, ...]]:
    """Strides of the gradients that a graph returns, by their descriptors."""
    described = zip(graph.output_node().args[0], aot.output_descriptors(graph), strict=True)  # type: ignore[arg-type]
    found = {}
    for value, descriptor in described:
        tensor = tensor_of(value) if isinstance(value, fx.Node) else None
        if tensor is not None and isinstance(descriptor, aot.GradAOTOutput):
            found[descriptor] = tensor.stride()
    return found


def save_what_is_overwritten(graph: fx.Graph) -> None:
    """Have the backward pass of a model read what its forward pass read of inputs that it writes to.

    Torch divides the graph where the least has to be saved, and computes again in the backward pass what follows from
    inputs. An input that the forward pass overwrites, such as a buffer, is another one by then.
    """
    writes = list(graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default))
    written = [node.args[0] for node in writes if isinstance(node.args[0], fx.Node)]
    if not written:
        return
    described = zip(graph.output_node().args[0], aot.output_descriptors(graph), strict=True)  # type: ignore[arg-type]
    pending = [value for value, one in described if isinstance(one, aot.GradAOTOutput) and value is not None]
    needed = set[fx.Node]()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    placeholders = list(graph.find_nodes(op="placeholder"))
    for placeholder in placeholders:
        if placeholder in needed and placeholder in written:
            with graph.inserting_after(placeholders[-1]):
                copy = graph.call_function(kept_copy, (placeholder,))
            copy.meta.update(val=placeholder.meta["val"].clone(), recompute=CheckpointPolicy.MUST_SAVE, ac_graph_id=0)
            for user in list(placeholder.users):
                if user is not copy and user not in writes:
                    user.replace_input_with(placeholder, copy)


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of the source of gradprune, passes included."""
    digest = hashlib.sha256()
    folders = {Path(__file__).parents[1], Path(passes.__file__ or "").parent}
    for file in sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")}):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def build_step_graph(graph: fx.Graph, capture: Capture) -> StepGraph:
    """Give an ATen graph its roles.

    Raises:
        PassError: Torch did not note what the roles are read from.
    """
    inputs = {}
    for node in graph.find_nodes(op="placeholder"):
        descriptor = node.meta.get("desc")
        if descriptor is None:
            raise PassError(f"torch noted no descriptor ('desc') for the graph's input {node.name}")
        if isinstance(descriptor, aot.PlainAOTInput):
            inputs[node] = capture.inputs[descriptor.idx]
        else:
            inputs[node] = InputRole.TANGENT if isinstance(descriptor, aot.TangentAOTInput) else InputRole.DATA
    outputs, kept_because = _output_roles(graph, capture)
    step_graph = StepGraph(graph, capture.form, inputs, outputs, kept_because)
    if capture.gradient_calls and not any(dynamo.dynamo_nodes(node) for node in step_graph.calls()):
        raise PassError("torch noted for no operator what it was traced from ('from_node')")
    mark_backward(step_graph, capture.gradient_calls)
    return step_graph


def _output_roles(graph: fx.Graph, capture: Capture) -> tuple[list[OutputRole], dict[int, str]]:
    """Role of every output, and why a weight gradient among them is computed."""
    outputs, kept_because = [], {}
    for position, descriptor in enumerate(aot.output_descriptors(graph)):
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
    return outputs, kept_because
