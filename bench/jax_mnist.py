"""The MNIST network and its attack step in JAX (checked with 0.10)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .attack_step import Step
from .cases import Case, MnistCnn


def jax_step(model: MnistCnn, case: Case, threads: int) -> Step:
    """``jit(grad)`` of the loss with the update, on the weights of ``model``.

    Args:
        model: Where the weights come from.
        case: The ball and the bounds.
        threads: How many threads XLA may use. It asks once per process, so the first call decides.

    Returns:
        A step from torch tensors to torch tensors; they are handed over without a copy.
    """
    with _processors(threads):
        import jax

        jax.devices()  # starts XLA's threads
    jnp, lax = jax.numpy, jax.lax
    weights = {name: jnp.asarray(parameter.detach().numpy()) for name, parameter in model.named_parameters()}
    low, high = case.bounds or (-jnp.inf, jnp.inf)

    def conv(x, name):  # type: ignore[no-untyped-def]
        return lax.conv(x, weights[f"{name}.weight"], (1, 1), "VALID") + weights[f"{name}.bias"][:, None, None]

    def loss(x, y):  # type: ignore[no-untyped-def]
        x = jax.nn.relu(conv(jax.nn.relu(conv(x, "conv1")), "conv2"))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID").reshape(len(x), -1)
        x = jax.nn.relu(x @ weights["linear1.weight"].T + weights["linear1.bias"])
        logits = x @ weights["linear2.weight"].T + weights["linear2.bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    @jax.jit
    def compiled(x_adv, x, y):  # type: ignore[no-untyped-def]
        gradient = jax.grad(loss)(x_adv, y)
        moved = jnp.clip(x_adv + case.step_size * jnp.sign(gradient), x - case.eps, x + case.eps)
        return jnp.clip(moved, low, high), gradient

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        given = (jax.dlpack.from_dlpack(tensor.detach()) for tensor in (x_adv, x, y.int()))
        moved, gradient = jax.block_until_ready(compiled(*given))
        return from_dlpack(moved), from_dlpack(gradient)

    return step


@contextmanager
def _processors(count: int) -> Iterator[None]:
    """Let threads that are started within think that there are ``count`` processors: it is how XLA counts its own."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed, older = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        # All may run anywhere again: pinned, a thread of XLA would wait for whatever else runs on its processor.
        for thread in {"0", *os.listdir("/proc/self/task")} - older:
            os.sched_setaffinity(int(thread), allowed)
