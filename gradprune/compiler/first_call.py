"""Compare what was compiled with the graph that Dynamo captured, run eagerly on the same inputs.

Both run on the call's own inputs, on copies of those that they write, before the call itself; with a model, the
gradient of a random combination of its outputs is compared too. Values may differ by what rounding explains. Where they
differ by more than ``LIMITS`` have it, the captured graph runs again on inputs that were moved by about as much as
rounding moves values, and if that does not explain it, in float64: what is compiled must not be further from that than
a few times what the captured graph in its own type is. So signs of gradients near zero raise no alarm, and a sign that
is wrong does.

What cannot be run twice with the same result is not compared: random operators, operators with effects, collectives,
inputs that are written and share memory.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from gradprune.graph.editing import copy_graph
from gradprune.graph.step_graph import InputRole, OutputRole, is_random, set_outputs
from gradprune.torch_compat import aot, dynamo

from .events import Fallback

if TYPE_CHECKING:
    from .capture import Capture
    from .compilation import Callback, Compilation

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Difference that is not looked into, relative to the Euclidean norm of the value, by type."""

WITHOUT_FLOAT64 = 1e-2
"""Difference that is taken for rounding where float64 cannot decide."""

MARGIN = 4.0
"""How many times as large as what rounding explains a difference may be."""

NOISE = 1e-5
"""How far inputs are moved to see what rounding explains, relative to their root mean square."""

SHARE = 0.1
"""Part of the compilation's time that one eager step may take, by default."""

EAGER = {"step": 2.0, "model": 6.0}
"""Eager steps take so many times as long as one call of what is compiled; a model's is the forward pass alone."""


class FirstCall:
    """What was compiled, compared at its first call, or at every call; if it is wrong, the captured graph instead.

    Args:
        compiled: What was compiled, returning what Dynamo expects and, behind it, what was added for the passes.
        captured: The graph as Dynamo captured it.
        compilation: The compilation of it.
        seconds: How long it took.
    """

    def __init__(self, compiled: Callback, captured: fx.GraphModule, compilation: Compilation, seconds: float) -> None:
        self._compiled = compiled
        self._captured: fx.GraphModule | None = captured
        self._compilation = compilation
        self._seconds = seconds
        self._roles = compilation.capture.inputs
        self._names = [dynamo.source_name(node) for node in captured.graph.find_nodes(op="placeholder")]
        self._is_wrong = False

    def __call__(self, *args: Any) -> Any:
        """Call what was compiled."""
        if self._captured is not None and not self._is_wrong:
            self._check(args)
            if not self._is_wrong and self._compilation.options.check != "always":
                self._captured = None
        if self._is_wrong:
            assert self._captured is not None
            return self._run_captured(self._captured, args)
        return self._compiled(*args)

    def _run_captured(self, captured: fx.GraphModule, args: Sequence[Any]) -> list[Any]:
        """Run the captured graph, and leave the ``.grad`` of weights alone as what was compiled would."""
        if self._compilation.capture.form == "step":
            return list(captured(*args))
        inputs = [
            arg.detach() if role is InputRole.WEIGHT else arg for arg, role in zip(args, self._roles, strict=True)
        ]
        return list(captured(*inputs))

    def _check(self, args: Sequence[Any]) -> None:
        compilation = self._compilation
        reason = compilation.unrepeatable or self._obstacle(args)
        if reason:
            compilation.tell("checked", f"not compared with eager: {reason}")
            return
        with aot.without_modes():
            try:
                outcome, wrong = self._compare(args)
            except Exception as error:  # also for want of memory; the call itself is another matter
                outcome, wrong = f"not compared with eager: {type(error).__name__}: {error}", False
        compilation.tell("checked", outcome)
        if wrong:
            self._is_wrong = True
            reason = f"{outcome}; the captured graph runs eagerly instead"
            compilation.fall_back(Fallback.CHECK, reason, None)

    def _obstacle(self, args: Sequence[Any]) -> str:
        """Why these inputs cannot be used twice; empty if they can."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        foreign = [type(one) for one in tensors if type(one) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer)]
        if foreign:
            return f"an input is a {foreign[0].__name__}"
        if aot.is_transformed():
            return "it is called within a transform of torch.func"
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return "hooks are set on saved tensors"
        storages = [one.untyped_storage()._cdata for one in tensors]
        if self._compilation.written and len(set(storages)) < len(storages):
            return "inputs that share memory may be written"
        return ""

    def _compare(self, args: Sequence[Any]) -> tuple[str, bool]:
        """What there is to say, and whether what was compiled is wrong."""
        assert self._captured is not None
        form, options = self._compilation.capture.form, self._compilation.options
        call = _Call(self._roles, self._compilation.written, self._names, form == "model", args)
        actual = call.run(self._compiled)
        start = time.perf_counter()
        if options.check == "auto" and EAGER[form] * call.seconds > SHARE * self._seconds:
            call.run(self._compiled)  # the first time takes longer
            if EAGER[form] * call.seconds > SHARE * self._seconds:
                return "not compared with eager, which takes long beside the compilation: check='first' does it", False
        expected = call.run(self._captured)
        both = [what for what in expected if what in actual]
        distances = {what: _distance(actual[what], expected[what]) for what in both}
        limits = {what: LIMITS.get(expected[what].dtype, 0.0) for what in both}
        suspects = [what for what in both if distances[what] > limits[what]]
        if suspects:
            moved = call.run(self._captured, noise=NOISE)
            suspects = [
                what
                for what in suspects
                if distances[what] > MARGIN * _distance(moved[what], expected[what]) + limits[what]
            ]
        if suspects:
            wrong = self._wrong_in_float64(call, suspects, actual, expected, moved)
            if wrong:
                return f"{wrong[0]} is not what the captured graph computes: {wrong[1]}", True
        seconds, worst = time.perf_counter() - start, max(distances.values(), default=0.0)
        return f"compared with eager: largest difference {worst:.1e} of a value's norm ({seconds:.2f} s)", False

    def _wrong_in_float64(
        self, call: _Call, suspects: list[str], actual: _Values, expected: _Values, moved: _Values
    ) -> tuple[str, str] | None:
        """The value that is furthest from what it should be, and by how much; ``None`` if rounding explains them."""
        assert self._captured is not None
        exact: _Values = {}
        with suppress(Exception):  # a type that is written in the graph, an operator without a kernel
            exact = call.run(self._captured, torch.float64)
        worst, found = 1.0, None
        for what in suspects:
            distance = _distance(actual[what], exact.get(what, expected[what]))
            allowed = WITHOUT_FLOAT64
            if what in exact:
                by_rounding = max(_distance(value, exact[what]) for value in (expected[what], moved[what]))
                allowed = MARGIN * by_rounding + LIMITS.get(expected[what].dtype, 0.0)
            if not distance <= worst * allowed:
                worst, reason = distance / allowed if allowed else float("inf"), "its norm, where rounding explains"
                found = what, f"it differs by {distance:.2g} of {reason} {allowed:.2g}"
        return found


_Values = dict[str, Tensor]


class _Call:
    """A call that is made several times."""

    def __init__(
        self, roles: Sequence[InputRole], written: set[int], names: Sequence[str], is_model: bool, args: Sequence[Any]
    ) -> None:
        self.roles, self.written, self.names, self.is_model, self.args = roles, written, names, is_model, args
        self.seconds = 0.0

    def run(self, function: Callable[..., Any], cast: torch.dtype | None = None, noise: float = 0.0) -> _Values:
        """Call ``function`` on these inputs or copies of them; what it returned and wrote, by name."""
        generator = torch.Generator().manual_seed(0)
        inputs = [
            self._input(index, arg, cast, noise, generator) if isinstance(arg, Tensor) else arg
            for index, arg in enumerate(self.args)
        ]
        start = time.perf_counter()
        outputs = list(function(*inputs))
        found = {f"output {k}": value.detach().clone() for k, value in enumerate(outputs) if isinstance(value, Tensor)}
        self.seconds = time.perf_counter() - start
        if self.is_model:
            found.update(self._gradients(inputs, outputs))
        written = {f"what is written to {self.names[index]}": inputs[index].detach() for index in self.written}
        return {**found, **written}

    def _input(
        self, index: int, arg: Tensor, cast: torch.dtype | None, noise: float, generator: torch.Generator
    ) -> Tensor:
        value = arg.detach()
        if (cast is not None or noise) and value.is_floating_point():
            value = value.to(cast or value.dtype, copy=True)
            if noise and value.numel():
                sign = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
                value = value + sign * (noise * value.square().mean().sqrt())
        elif index in self.written:
            value = value.clone()
        is_weight = self.is_model and self.roles[index] is InputRole.WEIGHT
        return value.requires_grad_(arg.requires_grad and not is_weight)

    def _gradients(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> _Values:
        """Gradients of a random combination of a model's outputs with respect to what is attacked."""
        targets = [index for index, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]
        differentiable, directions = [], []
        for position, output in enumerate(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                generator = torch.Generator().manual_seed(position)
                differentiable.append(output)
                directions.append(torch.randn(output.shape, generator=generator).to(output))
        if not targets or not differentiable:
            return {}
        wanted = [inputs[index] for index in targets]
        gradients = torch.autograd.grad(differentiable, wanted, directions, allow_unused=True)
        return {
            f"the gradient of {self.names[index]}": gradient
            for index, gradient in zip(targets, gradients, strict=True)
            if gradient is not None
        }


def _distance(value: Tensor, reference: Tensor) -> float:
    """Euclidean norm of the difference, relative to that of the reference."""
    if value.shape != reference.shape:
        return float("inf")
    value, reference = (one.to(torch.complex128 if one.is_complex() else torch.float64) for one in (value, reference))
    same = (value == reference) | (value.isnan() & reference.isnan())
    difference = float(torch.where(same, 0.0, value - reference).norm())
    if difference == 0:
        return 0.0
    norm = float(torch.where(same & ~reference.isfinite(), 0.0, reference).norm())
    distance = difference / norm if norm else float("inf")
    return distance if distance == distance else float("inf")


def without_metadata(gm: fx.GraphModule, capture: Capture) -> fx.GraphModule:
    """A copy of a captured graph to run eagerly, which holds on to none of the tensors it was captured with.

    A step computes no weight gradient that nothing reads: it is not to take more memory and time than with frozen
    weights.
    """
    copy = fx.GraphModule(gm, copy_graph(gm.graph))
    for node in copy.graph.nodes:
        node.meta.clear()
    if capture.form == "step":
        _freeze(copy.graph, capture)
        copy.recompile()
    return copy


def _freeze(graph: fx.Graph, capture: Capture) -> None:
    """Take the weight gradients out of a captured step that are not among its visible results."""
    outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
    dropped = {position for position, role in capture.outputs.items() if role is OutputRole.WEIGHT_GRAD}
    buffers = [outputs[position] for position in dropped]
    set_outputs(graph, [None if position in dropped else value for position, value in enumerate(outputs)])
    for buffer in buffers:
        for user in list(buffer.users):
            if user.op == "call_method" and user.args[0] is buffer and not user.users:
                graph.erase_node(user)  # which writes the gradient to it
        if not buffer.users and buffer.op != "placeholder":
            graph.erase_node(buffer)
    wanted: set[fx.Node] = set()
    for call in [node for node in graph.nodes if node.name in capture.gradient_calls]:
        wanted.update(call.all_input_nodes)
        if call.target is not torch.autograd.grad or any(user.target is not operator.getitem for user in call.users):
            continue
        inputs = list(call.args[1]) if isinstance(call.args[1], (list, tuple)) else []
        items = {user: inputs[user.args[1]] for user in list(call.users)} if inputs else {}
        for item in [item for item in items if not item.users]:
            graph.erase_node(item)
            del items[item]
        if items:
            kept = [value for value in inputs if value in items.values()]
            call.args = (call.args[0], kept, *call.args[2:])
            for item, value in items.items():
                item.args = (call, kept.index(value))
            wanted.difference_update(set(inputs) - set(kept))
    last = list(graph.find_nodes(op="placeholder"))[-1]
    for node, role in zip(list(graph.find_nodes(op="placeholder")), capture.inputs, strict=True):
        if role is InputRole.WEIGHT and node.users and node not in wanted:
            with graph.inserting_after(last):
                detached = graph.call_method("detach", (node,))
            node.replace_all_uses_with(detached, delete_user_cb=lambda user, kept=detached: user is not kept)
    graph.lint()


def unrepeatable(graph: fx.Graph) -> str:
    """Why an ATen graph may not be run twice with the same result; empty if it may."""
    graphs = [graph]
    if graph.owning_module is not None:
        graphs += [
            module.graph
            for module in graph.owning_module.modules()
            if isinstance(module, fx.GraphModule) and module is not graph.owning_module
        ]
    for node in (node for one in graphs for node in one.nodes if node.op == "call_function"):
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if is_random(node):
                return f"{target} is random"
            if "c10d" in target.namespace:
                return f"{target} talks to other processes"
        elif getattr(target, "__name__", "") in ("with_effects", "run_and_save_rng_state", "run_with_rng_state"):
            return "an operator has effects"
    return ""


def written_inputs(graph: fx.Graph) -> tuple[set[int], str]:
    """Which of Dynamo's inputs an ATen graph writes, and why that is not known; empty if it is."""
    descriptors: list[Any] = [
        one.mutated_input for one in aot.output_descriptors(graph) if isinstance(one, aot.InputMutationAOTOutput)
    ]
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        target = node.args[0]
        if isinstance(target, fx.Node) and target.op == "placeholder":
            descriptors.append(target.meta.get("desc"))
    if all(isinstance(one, aot.PlainAOTInput) for one in descriptors):
        return {one.idx for one in descriptors}, ""
    return set(), "it writes inputs that share memory"
