"""What tests share: attack steps, measures of error and cost, and a compiler that is cheap to wait for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import gradprune.backend
from gradprune.passes import prepack_convolutions
from gradprune.torch_compat import dynamo
from gradprune.workloads.vision import let_torchvision_import

SHIPPED_WORTH_FLOPS = prepack_convolutions.WORTH_FLOPS
"""What tests set to zero, as it is shipped."""

# --- Attack steps -----------------------------------------------------------------------------------------------------

EPS, STEP_SIZE = 0.03, 0.01

Loss = Callable[[Tensor, Tensor], Tensor]


class Step(Protocol):
    """One step of an attack: returns the next iterate and the gradient."""

    def __call__(self, x_adv: Tensor, x: Tensor, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]: ...


def update(x_adv: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """A signed step, projected to the ball around ``x``."""
    return x + (x_adv + STEP_SIZE * grad.sign() - x).clamp(-EPS, EPS)


def step_by_autograd_grad(model: nn.Module, loss: Loss) -> Step:
    """A step that takes the gradient by ``torch.autograd.grad``."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = x_adv.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(model(x_adv, *context), y), x_adv)
        return update(x_adv.detach(), x, grad), grad

    return step


def step_by_backward(model: nn.Module, loss: Loss) -> Step:
    """A step that takes the gradient by ``loss.backward()``."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = x_adv.detach().requires_grad_(True)
        loss(model(x_adv, *context), y).backward()
        grad = x_adv.grad
        assert grad is not None
        return update(x_adv.detach(), x, grad), grad

    return step


def step_by_func_grad(model: nn.Module, loss: Loss) -> Step:
    """A step that takes the gradient by ``torch.func.grad``."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.func.grad(lambda x_adv: loss(model(x_adv, *context), y))(x_adv)
        return update(x_adv, x, grad), grad

    return step


# --- Compilation ------------------------------------------------------------------------------------------------------


def interpret(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """An inner compiler that runs the graph as it is, operator by operator.

    Kernels may choose other strides than the trace has, so views become reshapes, as they do in Inductor.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    gm.recompile()

    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        return gm.forward(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it, graphs go through all of gradprune and are then run as they are instead of compiled by Inductor."""
    original = gradprune.backend.compile_graph
    gradprune.backend.compile_graph = functools.partial(original, inner_compile=interpret)  # type: ignore[assignment]
    try:
        yield
    finally:
        gradprune.backend.compile_graph = original


# --- Measures ---------------------------------------------------------------------------------------------------------


def relative_error(a: Tensor, reference: Tensor) -> float:
    """Largest deviation from ``reference``, relative to its largest element, in float64."""
    assert a.shape == reference.shape
    a, reference = a.detach().double(), reference.detach().double()
    return float((a - reference).abs().max() / reference.abs().max())


def eager_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the contractions that a call runs, counted by torch while it runs."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    unknown_to_torch = {attention: _attention_flops, attention_backward: _attention_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=unknown_to_torch)
    with counter:
        function(*args)
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def eager_saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that eager autograd keeps from the forward pass of an attack to its backward pass.

    Storages are counted once however many tensors share them. What the caller owns is not counted: parameters, buffers
    and the input.
    """
    x = x.detach().clone().requires_grad_(True)
    owned = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # holds on to the tensors, lest an address be used twice

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in owned)


def peak_allocated_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Largest number of bytes that a call holds allocated at once beyond what was allocated before, on the CPU."""
    function(*args)  # compiles
    function(*args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function(*args)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result  # kept until here so that its release is not among the events
    return peak


@dataclass
class ModelState:
    """All that an attack must leave as it is in a model. Gradients are compared by identity and by value."""

    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    grad_values: dict[str, Tensor | None]
    requires_grad: dict[str, bool]
    training: dict[str, bool]

    @staticmethod
    def of(model: nn.Module) -> ModelState:
        """The state a model is in now."""
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return ModelState(
            tensors,
            {name: tensor.detach().clone() for name, tensor in tensors.items()},
            {name: tensor.grad for name, tensor in tensors.items()},
            {name: None if tensor.grad is None else tensor.grad.clone() for name, tensor in tensors.items()},
            {name: tensor.requires_grad for name, tensor in tensors.items()},
            {name: module.training for name, module in model.named_modules()},
        )

    def assert_untouched(self, model: nn.Module, written: Sequence[str] = ()) -> None:
        """Assert that a model is still in this state.

        Args:
            model: The model.
            written: Names of buffers whose values may differ.
        """
        now = ModelState.of(model)
        assert self.tensors.keys() == now.tensors.keys()
        for name, tensor in self.tensors.items():
            assert now.tensors[name] is tensor, f"{name} is another tensor"
            assert name in written or torch.equal(now.values[name], self.values[name]), f"{name} was written"
            assert now.grads[name] is self.grads[name], f"{name}.grad is another tensor"
            before, after = self.grad_values[name], now.grad_values[name]
            assert before is after or (before is not None and after is not None and torch.equal(before, after)), (
                f"{name}.grad was written"
            )
        assert now.requires_grad == self.requires_grad
        assert now.training == self.training


# --- Packages that tests borrow networks from -------------------------------------------------------------------------


def timm_model(name: str, **options: Any) -> nn.Module:
    """A network of timm without pretrained weights, in evaluation mode."""
    let_torchvision_import()
    import timm

    model: nn.Module = timm.create_model(name, **options)
    return model.eval()


in_one_piece = pytest.mark.skipif(
    not dynamo.TRACES_REQUIRES_GRAD, reason="this torch compiles a step that calls requires_grad_() in two pieces"
)
"""For tests that look at the one graph of such a step."""
