"""Read the graph that Dynamo captured: which form it has, what its inputs and outputs are to the attack.

Classification happens here because only Dynamo's graph knows where a value comes from. Pruning happens later, on the
ATen graph; the one change made here is to bring weight gradients to where the ATen passes see them, as outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from gradprune.errors import CompileError, PassError, TrainingStepError
from gradprune.graph.step_graph import Form, InputRole, OutputRole, set_outputs, source_line
from gradprune.torch_compat.aot import functorch_grad
from gradprune.torch_compat.dynamo import (
    compiling_name,
    example_of,
    is_module_state,
    module_state_of_grad,
    optimized_parameters,
    rebound_before_grad,
    source_name,
)

from .dropped import note_dropped
from .perturbations import is_perturbation


@dataclass
class Capture:
    """What the Dynamo graph says about itself.

    Attributes:
        form: ``"step"`` if a gradient is taken inside the graph, else ``"model"``.
        inputs: Role of every Dynamo input.
        outputs: Role of the Dynamo outputs that are not plain updates, by position.
        kept_because: Why a weight gradient among the outputs has to be computed, by position.
        gradient_calls: Names of the Dynamo nodes that take a gradient.
        visible_outputs: How many outputs Dynamo expects; what follows them was added for the passes.
        training_only: The model's output is differentiable with respect to weights and nothing else.
    """

    form: Form
    inputs: list[InputRole]
    outputs: dict[int, OutputRole] = field(default_factory=dict)
    kept_because: dict[int, str] = field(default_factory=dict)
    gradient_calls: frozenset[str] = frozenset()
    visible_outputs: int = 0
    training_only: bool = False

    @property
    def tensor_inputs(self) -> list[InputRole]:
        """Roles of the inputs that are tensors."""
        return [role for role in self.inputs if role is not InputRole.SIZE]


def capture(gm: fx.GraphModule, *, forward_only: bool = False) -> Capture:
    """Classify a Dynamo graph and prepare it for AOTAutograd, in place.

    Args:
        gm: The graph.
        forward_only: Take a graph without gradients for a step that needs none.

    Raises:
        TrainingStepError: The graph takes gradients, and all of them are weights'.
        PassError: Torch did not note where an input comes from, so that weights cannot be told from data.
    """
    for node in _placeholders(gm.graph):
        if getattr(node, "_dynamo_source", None) is None:
            raise PassError(f"torch noted no source ('_dynamo_source') for the graph's input {node.name}")
    calls = _gradient_calls(gm.graph)
    if calls:
        prepared = _prepare_step(gm, calls)
    elif forward_only and not any(_requires_grad(value) for value in _graph_outputs(gm.graph)):
        roles = [_input_role(node, attacked=False) for node in _placeholders(gm.graph)]
        prepared = Capture("step", roles, visible_outputs=len(_graph_outputs(gm.graph)))
    else:
        prepared = _prepare_model(gm)
    gm.graph.lint()
    gm.recompile()
    return prepared


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


def _requires_grad(value: Any) -> bool:
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return isinstance(example, torch.Tensor) and example.requires_grad


def _graph_outputs(graph: fx.Graph) -> list[Any]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _input_role(placeholder: fx.Node, *, attacked: bool) -> InputRole:
    if attacked:
        return InputRole.PERTURBATION
    if _is_weight(placeholder):
        return InputRole.WEIGHT
    is_tensor = isinstance(placeholder.meta.get("example_value"), torch.Tensor)
    return InputRole.DATA if is_tensor else InputRole.SIZE


def _is_weight(placeholder: fx.Node) -> bool:
    """Whether an input is a parameter or buffer of a module that was not marked as a perturbation."""
    return is_module_state(placeholder) and not is_perturbation(example_of(placeholder))


# --- Model form -------------------------------------------------------------------------------------------------------


def _prepare_model(gm: fx.GraphModule) -> Capture:
    roles = []
    for node in _placeholders(gm.graph):
        roles.append(_input_role(node, attacked=_requires_grad(node) and not _is_weight(node)))
    outputs = _graph_outputs(gm.graph)
    prepared = Capture("model", roles, visible_outputs=len(outputs))
    if InputRole.PERTURBATION not in roles and any(_requires_grad(value) for value in outputs):
        weights = [n for n, role in zip(_placeholders(gm.graph), roles, strict=True) if role is InputRole.WEIGHT]
        prepared.training_only = any(_requires_grad(weight) for weight in weights)
        # Without a perturbation there is nothing to save for backward: what is compiled is the plain forward pass.
        _detach(gm.graph, weights, list(gm.graph.nodes))
    return prepared


# --- Step form --------------------------------------------------------------------------------------------------------


def _gradient_calls(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and node.target in (torch.autograd.grad, functorch_grad)
    ]


def _differentiated(call: fx.Node) -> list[fx.Node]:
    """What a gradient call differentiates with respect to."""
    inputs = call.args[1] if len(call.args) > 1 else call.kwargs["inputs"]
    return [inputs] if isinstance(inputs, fx.Node) else list(inputs)  # type: ignore[arg-type]


_SAME_VALUE = frozenset({"detach", "clone", "requires_grad_", "alias", "contiguous", "to"})


def _origin(node: fx.Node) -> fx.Node:
    """The node whose value ``node`` carries, followed back through detaching and copying."""
    while True:
        is_method = node.op == "call_method" and node.target in _SAME_VALUE
        is_function = node.op == "call_function" and getattr(node.target, "__name__", "") in {
            "_wrap_for_grad",
            *_SAME_VALUE,
        }
        if not (is_method or is_function) or not isinstance(node.args[0], fx.Node):
            return node
        node = node.args[0]


def _leaf(node: fx.Node) -> fx.Node:
    """The node that a gradient is taken with respect to, without what only marks it for that."""
    while getattr(node.target, "__name__", node.target) in ("_wrap_for_grad", "requires_grad_"):
        if not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def _local_name(placeholder: fx.Node) -> str:
    """Name of the local variable that an input is, or an empty string."""
    name = source_name(placeholder)
    return name[3:-2] if name.startswith("L['") and name.endswith("']") else ""


def _is_frozen(placeholder: fx.Node) -> bool:
    return isinstance(example_of(placeholder), torch.nn.Parameter) and not _requires_grad(placeholder)


def _prepare_step(gm: fx.GraphModule, calls: list[fx.Node]) -> Capture:
    graph = gm.graph
    placeholders = _placeholders(graph)
    weights = {node for node in placeholders if _is_weight(node)}
    leaves = [_leaf(node) for call in calls for node in _differentiated(call)]
    if all(node in weights for node in leaves):
        # Beside frozen parameters, what is not frozen is what the gradient is taken for.
        if not any(_is_frozen(node) for node in weights):
            raise TrainingStepError(_training_message(calls))
        weights.difference_update(leaves)
    # A leaf that is made of a buffer is a perturbation, and what follows from it changes from step to step.
    origins = {_origin(node) for node in leaves if node not in weights}
    weights -= origins
    roles = []
    for node in placeholders:
        roles.append(_input_role(node, attacked=node in origins))
    rebound = rebound_before_grad()
    for node in origins:
        if (name := _local_name(node)) in rebound:
            raise CompileError(
                f"{name}.grad is used behind an assignment such as {name} += ..., after which Dynamo no longer knows "
                f"that it is the gradient of {name}; gradients would add up. Write {name}.add_(...) in "
                "its place, or see to the gradient before it"
            )
    names = frozenset(call.name for call in calls)
    prepared = Capture("step", roles, gradient_calls=names, visible_outputs=len(_graph_outputs(graph)))
    optimized = optimized_parameters()
    items, slots = _gradient_items(calls), _slots(placeholders)
    _mark_explicit_weight_gradients(graph, items, weights, prepared)
    for weight in (node for node in placeholders if node in weights):  # in the same order in every process
        slots_of_weight = slots.get(getattr(weight, "_dynamo_source", None), [])
        _expose_accumulated_gradient(graph, weight, items.get(weight, []), slots_of_weight, prepared, optimized)
    _detach_inside_functorch(graph, weights.difference(leaves))
    return prepared


def _training_message(calls: list[fx.Node]) -> str:
    where = source_line(calls[0])
    return (
        f"every gradient taken in this step{f' ({where})' if where else ''} is that of a module's weight: this is a "
        "training step, and gradprune compiles attack steps. Compile it with torch.compile's default backend instead. "
        "If it is an attack, its perturbation does not require grad: call x_adv = x_adv.detach().requires_grad_(True) "
        "before the forward pass; if what it attacks is a module's own parameter, mark it: "
        "gradprune.perturbation(parameter_or_module)"
    )


def _gradient_items(calls: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that hold the gradient of a value, one for each call that takes it, by the value."""
    items: dict[fx.Node, list[fx.Node]] = {}
    for call in calls:
        inputs = _differentiated(call)
        for user in call.users:
            if user.target is operator.getitem:
                items.setdefault(inputs[user.args[1]], []).append(user)  # type: ignore[index]
    return items


def _mark_explicit_weight_gradients(
    graph: fx.Graph, items: Mapping[fx.Node, list[fx.Node]], weights: Iterable[fx.Node], prepared: Capture
) -> None:
    """A weight gradient that the step returns was asked for, so it is computed and reported."""
    outputs = _graph_outputs(graph)
    for weight in weights:
        for item in items.get(weight, []):
            for position, value in enumerate(outputs):
                if value is item:
                    prepared.outputs[position] = OutputRole.KEPT_WEIGHT_GRAD
                    prepared.kept_because[position] = "the step returns this weight gradient"


def _expose_accumulated_gradient(
    graph: fx.Graph,
    weight: fx.Node,
    items: list[fx.Node],
    slots: list[fx.Node],
    prepared: Capture,
    optimized: list[Any],
) -> None:
    """Turn the accumulation of a weight's gradient into ``weight.grad`` into graph outputs with role WEIGHT_GRAD.

    Dynamo traces ``loss.backward()`` as ``autograd.grad`` with respect to every leaf, followed by, for each of them::

        new = empty_like(weight); new.copy_(gradient)         # weight.grad was None: new is returned, and stored later
        new = empty_like(weight); new.copy_(gradient); weight.grad.add_(new)                     # it was a tensor

    If nothing else reads the buffers, the ``add_`` is erased, so that an existing ``weight.grad`` stays untouched, and
    ``new`` becomes an output that the passes drop. Anything unexpected leaves all of it as it is: not recognised means
    computed, never dropped. Neither is what an optimizer waits for, whose parameters are ``optimized``. The weight's
    gradients are ``items``, the inputs that are its ``.grad`` are ``slots``.
    """
    buffers = [
        user.args[0] for item in items for user in item.users if _is_method(user, "copy_") and user.args[1] is item
    ]
    accumulators: list[fx.Node] = [*buffers, *slots]  # type: ignore[list-item]
    if not buffers or any(buffer.target is not torch.empty_like for buffer in buffers):  # type: ignore[union-attr]
        return
    parameter = example_of(weight)
    if any(parameter is other for other in optimized):
        _keep(graph, accumulators, "an optimizer in this step reads it", prepared)
        return
    additions = set()
    for accumulator in accumulators:
        for user in accumulator.users:
            if user is graph.output_node():
                continue
            writes = user.op == "call_method" and user.args[0] is accumulator and not user.users
            is_addend = _is_method(user, "add_") and user.args[0] in accumulators and not user.users
            if is_addend and user.args[1] in buffers:
                additions.add(user)
            elif writes and user.target == "copy_" and user.args[1] in items:
                continue  # the gradient arriving in its buffer
            elif writes and user.target == "zero_" and accumulator in slots:
                continue  # optimizer.zero_grad(set_to_none=False): asked for, so it happens
            else:
                _keep(graph, accumulators, f"read by {user.name} {source_line(user)}".rstrip(), prepared)
                return
    for addition in additions:
        graph.erase_node(addition)
    if parameter is not None:
        note_dropped([(source_name(weight), parameter)], f"the step {compiling_name()}".rstrip())
    outputs = _graph_outputs(graph)
    for buffer in buffers:
        if buffer not in outputs:
            outputs.append(buffer)
        prepared.outputs[outputs.index(buffer)] = OutputRole.WEIGHT_GRAD
    set_outputs(graph, outputs)


def _keep(graph: fx.Graph, accumulators: list[fx.Node], reason: str, prepared: Capture) -> None:
    for position, value in enumerate(_graph_outputs(graph)):
        if value in accumulators:
            prepared.outputs[position] = OutputRole.KEPT_WEIGHT_GRAD
            prepared.kept_because[position] = reason


def _is_method(node: fx.Node, name: str) -> bool:
    return node.op == "call_method" and node.target == name


def _slots(placeholders: Iterable[fx.Node]) -> dict[Any, list[fx.Node]]:
    """The ``.grad`` of weights among the inputs, by the source of the weight."""
    slots: dict[Any, list[fx.Node]] = {}
    for node in placeholders:
        owner = module_state_of_grad(node)
        if owner is not None:
            slots.setdefault(owner, []).append(node)
    return slots


def _detach_inside_functorch(graph: fx.Graph, weights: Iterable[fx.Node]) -> None:
    """Detach weights wherever ``torch.func.grad`` differentiates through them.

    ``torch.func.grad`` builds a graph that can be differentiated again, by the weights too, so AOTAutograd would add a
    second backward pass for them. Uses outside of the transform keep their connection to the weights.
    """
    depth = 0
    inside = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_grad_increment_nesting":
            depth += 1
        elif name == "_grad_decrement_nesting":
            depth -= 1
        elif depth:
            inside.append(node)
    if inside:
        _detach(graph, weights, inside)


def _detach(graph: fx.Graph, weights: Iterable[fx.Node], users: list[fx.Node]) -> None:
    """Have ``users`` read the detached values of those ``weights`` that require grad."""
    last_placeholder = _placeholders(graph)[-1]
    chosen = set(users)
    for weight in weights:
        if not _requires_grad(weight) or not chosen.intersection(weight.users):
            continue
        with graph.inserting_after(last_placeholder):
            detached = graph.call_method("detach", (weight,))
        detached.meta["example_value"] = weight.meta["example_value"].detach()
        for user in list(weight.users):
            if user in chosen:
                user.replace_input_with(weight, detached)
