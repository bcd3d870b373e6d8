"""Compiles a few functions with other backends and prints what they got; with ``after`` gradprune is used before."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
recurrent = nn.LSTM(4, 3, batch_first=True)
x, y = torch.rand(2, 3, 4, 4), torch.tensor([1, 3])


def by_backward(x: Tensor) -> Any:
    x = x.detach().requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    return x.grad


def by_autograd_grad(x: Tensor) -> Any:
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]


def by_func_grad(x: Tensor) -> Any:
    return torch.func.grad(lambda z: F.cross_entropy(model(z), y))(x)


def training(x: Tensor) -> Any:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def forward(x: Tensor) -> Any:
    return model(x)


def with_lstm(x: Tensor) -> Any:
    return recurrent(x.flatten(1, 2))[0].tanh()


FUNCTIONS: tuple[Callable[[Tensor], Any], ...] = (
    by_backward,
    by_autograd_grad,
    by_func_grad,
    training,
    forward,
    with_lstm,
)


def use_gradprune() -> None:
    import gradprune

    for function in (by_backward, by_autograd_grad, by_func_grad):
        gradprune.explain(function, x)
    gradprune.accelerate(model)(x.clone().requires_grad_(True)).sum().backward()


def compiled_by(name: str, function: Callable[[Tensor], Any]) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    graphs: list[str] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm.code)
        return lookup_backend(name)(gm, example_inputs)

    result = torch.compile(function, backend=backend)(x)
    breaks = sum(counters["graph_break"].values())
    return {"graphs": graphs, "breaks": breaks, "sum": float(result.detach().sum())}


def main() -> None:
    if "after" in sys.argv:
        use_gradprune()
    record: dict[str, Any] = {"settings": torch._dynamo.config.get_hash().hex()}
    for name in ("eager", "aot_eager"):
        for function in FUNCTIONS:
            record[f"{name} {function.__name__}"] = compiled_by(name, function)
    record["inductor by_backward"] = compiled_by("inductor", by_backward)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
