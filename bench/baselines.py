"""The ways to run an attack step that are compared. Each has a copy of the model of its own.

Note [Distinct tensors]
    A compiler that is shown ``step(x, x, y)`` may take both arguments to be one for good and return a step that ignores
    ``x_adv``. So the first call of everything here has distinct tensors, and what comes out is checked at several.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradprune.errors import OptionError, unknown
from gradprune.torch_compat.dynamo import dynamo_config

from .attack_step import Step, pgd_step
from .cases import Case, MnistCnn, Workload
from .store import Settings

EAGER_BACKWARD = "eager backward()"
EAGER_GRAD = "eager autograd.grad"
FROZEN = "frozen eager"
COMPILED_MODEL = "frozen + compile(model)"
COMPILED_STEP = "compile(step)"
RECORDED_MODEL = "frozen + compile(model, reduce-overhead)"
TUNED_MODEL = "frozen + compile(model, max-autotune)"
GRADPRUNE = "gradprune"
RECORDED_GRADPRUNE = "gradprune reduce-overhead"
TUNED_GRADPRUNE = "gradprune max-autotune"
JAX = "jax jit(grad)"

NAMED = (EAGER_BACKWARD, EAGER_GRAD, FROZEN, COMPILED_MODEL, COMPILED_STEP)
"""What every candidate is compared with by name."""

ALTERNATIVES = (FROZEN, COMPILED_MODEL, COMPILED_STEP, RECORDED_MODEL, TUNED_MODEL)
"""What a user could do today; the fastest of these is "the best alternative"."""

DTYPES = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contender:
    """One way to run an attack.

    Attributes:
        name: Its name in the tables.
        model: The model its step attacks. Each has a copy of its own, so that neither frozen parameters nor gradients
            that accumulate in one can show in another, nor in the model that was given.
        step: The attack step.
        compiled: Whether its first call compiles.
        reports: What gradprune says it did, as dictionaries; empty for everybody else and before the first call.
        context: Entered around its compilation and its attacks.
        autograd: Whether autograd keeps what its backward pass needs, so that it can be counted.
        foreign: Whether it runs outside torch, where its memory cannot be seen.
    """

    name: str
    model: nn.Module
    step: Step
    compiled: bool = False
    reports: Callable[[], list[dict[str, Any]]] = list
    context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    autograd: bool = False
    foreign: bool = False

    def clear_gradients(self) -> None:
        """Forget the weight gradients that earlier steps left behind."""
        for parameter in self.model.parameters():
            parameter.grad = None


@dataclass(frozen=True)
class Baseline:
    """How to make a contender.

    Attributes:
        key: Its name on the command line.
        name: Its name in tables.
        build: Makes it of a workload and settings.
        compiles: Whether its first call compiles.
        cuda_only: Whether it is left out by default on a CPU.
    """

    key: str
    name: str
    build: Callable[[Workload, Settings], Contender]
    compiles: bool = True
    cuda_only: bool = False


def _eager(name: str, *, frozen: bool = False, backward: bool = False) -> Callable[[Workload, Settings], Contender]:
    def build(work: Workload, settings: Settings) -> Contender:
        model = copy.deepcopy(work.model).requires_grad_(not frozen)
        step = pgd_step(model, work.case, DTYPES[settings.autocast], backward=backward)
        return Contender(name, model, step, autograd=True)

    return build


def _compiled_model(name: str, mode: str | None = None) -> Callable[[Workload, Settings], Contender]:
    def build(work: Workload, settings: Settings) -> Contender:
        model = copy.deepcopy(work.model).requires_grad_(False)
        compiled = torch.compile(model, mode=mode)
        step = pgd_step(compiled, work.case, DTYPES[settings.autocast])
        return Contender(name, model, step, compiled=True, autograd=True)

    return build


def _compiled_step(work: Workload, settings: Settings) -> Contender:
    """With traced autograd, which Dynamo leaves off by default; a graph break would make it another candidate."""
    model = copy.deepcopy(work.model).requires_grad_(True)
    step = torch.compile(pgd_step(model, work.case, DTYPES[settings.autocast]), fullgraph=True)

    def context() -> AbstractContextManager[None]:
        return dynamo_config.patch(trace_autograd_ops=True)  # type: ignore[no-any-return]

    return Contender(COMPILED_STEP, model, step, compiled=True, context=context)


def compiled_by_us(name: str, mode: str | None = None, **options: Any) -> Callable[[Workload, Settings], Contender]:
    """The code of ``eager backward()`` on live parameters, compiled as a whole."""

    def build(work: Workload, settings: Settings) -> Contender:
        model = copy.deepcopy(work.model).requires_grad_(True)
        plain = pgd_step(model, work.case, DTYPES[settings.autocast], backward=True)
        step = torch.compile(plain, backend="gradprune", mode=mode, options=options or None)

        def reports() -> list[dict[str, Any]]:
            import gradprune

            return [report.to_dict() for report in gradprune.reports(step)]

        return Contender(name, model, step, compiled=True, reports=reports)

    return build


def _jax(work: Workload, settings: Settings) -> Contender:
    from .jax_mnist import jax_step

    assert isinstance(work.model, MnistCnn)
    step = jax_step(work.model, work.case, settings.threads)
    return Contender(JAX, work.model, step, compiled=True, foreign=True)


BASELINES = (
    Baseline("backward", EAGER_BACKWARD, _eager(EAGER_BACKWARD, backward=True), compiles=False),
    Baseline("grad", EAGER_GRAD, _eager(EAGER_GRAD), compiles=False),
    Baseline("frozen", FROZEN, _eager(FROZEN, frozen=True), compiles=False),
    Baseline("compile-model", COMPILED_MODEL, _compiled_model(COMPILED_MODEL)),
    Baseline("compile-step", COMPILED_STEP, _compiled_step),
    Baseline(
        "compile-model-graphs", RECORDED_MODEL, _compiled_model(RECORDED_MODEL, "reduce-overhead"), cuda_only=True
    ),
    Baseline("compile-model-tuned", TUNED_MODEL, _compiled_model(TUNED_MODEL, "max-autotune"), cuda_only=True),
    Baseline("gradprune", GRADPRUNE, compiled_by_us(GRADPRUNE)),
    Baseline(
        "gradprune-graphs", RECORDED_GRADPRUNE, compiled_by_us(RECORDED_GRADPRUNE, "reduce-overhead"), cuda_only=True
    ),
    Baseline("gradprune-tuned", TUNED_GRADPRUNE, compiled_by_us(TUNED_GRADPRUNE, "max-autotune"), cuda_only=True),
    Baseline("jax", JAX, _jax),
)


def choose(keys: Sequence[str] | None, device: str) -> list[Baseline]:
    """The candidates called ``keys``, in the order of the tables.

    Args:
        keys: Their names on the command line; ``None`` takes all that make sense on ``device``.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        OptionError: There is no such candidate, or its package is not installed.
    """
    known = {baseline.key: baseline for baseline in BASELINES}
    has_jax = importlib.util.find_spec("jax") is not None
    if keys is None:
        cuda = device == "cuda"
        return [one for one in BASELINES if (not cuda and has_jax if one.key == "jax" else cuda or not one.cuda_only)]
    for key in keys:
        if key not in known:
            raise OptionError(unknown("candidate", key, known))
    if "jax" in keys and not has_jax:
        raise OptionError('candidate "jax" needs JAX: run pip install jax, or leave it out of --candidates')
    return [one for one in BASELINES if one.key in keys]


def for_case(baselines: Sequence[Baseline], case: Case) -> list[Baseline]:
    """Those that exist for ``case``: there is one network written in JAX."""
    return [one for one in baselines if one.key != "jax" or case.network == "mnist-cnn"]
