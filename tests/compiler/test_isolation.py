"""Other backends compile what they compiled before: gradprune's settings hold while it compiles, and only then."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch.nn.functional as F
from tiny import backward_step, images, network
from torch import Tensor

import gradprune
from gradprune.torch_compat import dynamo

SCRIPT = Path(__file__).with_name("isolation_script.py")


def run_script(*arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # Dynamo's settings contain sets, hashed in their order
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_other_backends_compile_the_same_before_and_after():
    before, after = run_script(), run_script("after")
    assert before.keys() == after.keys()
    for what in before:
        assert before[what] == after[what], what
    # Without gradprune, a gradient call breaks the graph: were the setting on for all, these would be zero.
    assert before["eager by_backward"]["breaks"] > 0
    assert before["eager by_autograd_grad"]["breaks"] > 0
    assert before["eager with_lstm"]["breaks"] > 0


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_backend_is_found_without_importing_gradprune():
    code = """
import sys, torch
norm = torch.nn.RMSNorm(3, eps=0.0)
def step(x):
    x = x.detach().requires_grad_(True)
    (norm.weight * x).square().sum().backward()
    return x.grad
assert "gradprune" not in sys.modules
assert "gradprune" in torch._dynamo.list_backends()
gradient = torch.compile(step, backend="gradprune")(torch.arange(3.0))
print(gradient.tolist(), norm.weight.grad, "gradprune" in sys.modules)
"""
    assert run_python(code) == "[0.0, 2.0, 4.0] None True"


def test_importing_gradprune_changes_no_setting():
    """Importing torch's compiler does, so it is imported first."""
    code = """
import torch, torch._dynamo.config as dynamo, torch._functorch.config as functorch, torch._inductor.config as inductor
import torch._inductor.compile_fx
configs = (dynamo, functorch, inductor)
before = [config.get_hash() for config in configs], [config.get_config_copy() for config in configs]
import gradprune
after = [config.get_hash() for config in configs], [config.get_config_copy() for config in configs]
print(before == after, torch._C._is_any_autocast_enabled(), torch.is_grad_enabled())
"""
    assert run_python(code) == "True False True"


# --- The setting itself -----------------------------------------------------------------------------------------------


@pytest.fixture(params=dynamo.TRACED_FLAGS)
def flag(request: pytest.FixtureRequest) -> Iterator[str]:
    before = {name: getattr(dynamo_config, name) for name in dynamo.TRACED_FLAGS}
    yield request.param
    for name, value in before.items():
        setattr(dynamo_config, name, value)


def test_flag_is_as_usual_outside_of_a_compilation(flag: str):
    value, usual = getattr(dynamo_config, flag), not dynamo.TRACED_FLAGS[flag]
    assert bool(value) is usual
    assert value == usual
    assert json.loads(json.dumps(bool(value))) is usual
    assert pickle.loads(pickle.dumps(value)) is usual
    assert copy.deepcopy(value) is usual


@pytest.mark.filterwarnings("ignore:torch._dynamo.config:FutureWarning")
def test_flag_can_be_saved_hashed_and_restored(flag: str):
    usual = not dynamo.TRACED_FLAGS[flag]
    digest = dynamo_config.get_hash()
    saved = dynamo_config.save_config()
    assert repr(getattr(dynamo_config, flag)) == repr(usual)
    assert dynamo_config.get_config_copy()[flag] == usual
    setattr(dynamo_config, flag, not usual)
    assert dynamo_config.get_hash() != digest
    dynamo_config.load_config(saved)
    assert bool(getattr(dynamo_config, flag)) is usual
    assert dynamo_config.get_hash() == digest


def test_flag_can_be_patched(flag: str):
    usual = not dynamo.TRACED_FLAGS[flag]
    with dynamo_config.patch({flag: not usual}):
        assert getattr(dynamo_config, flag) is not usual
    assert bool(getattr(dynamo_config, flag)) is usual


def autograd_grad(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(x.square().sum(), x)[0]


def graphs_of(backend_settings: dict[str, Any]) -> int:
    """How many graphs another backend gets for a step."""
    graphs = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(any(node.target is torch.autograd.grad for node in gm.graph.nodes))
        return gm

    torch._dynamo.reset()
    with dynamo_config.patch(backend_settings):
        torch.compile(autograd_grad, backend=backend)(torch.rand(3))
    return sum(graphs)


def test_a_user_who_sets_the_flag_has_it_for_every_backend():
    assert graphs_of({}) == 0
    assert graphs_of({"trace_autograd_ops": True}) == 1
    assert graphs_of({}) == 0


@pytest.mark.parametrize("value", [True, False])
def test_gradprune_works_whatever_the_user_sets(value: bool, no_code: None):
    with dynamo_config.patch(trace_autograd_ops=value):
        step = gradprune.compile(backward_step(network()))
        torch.testing.assert_close(step(*images()), backward_step(network())(*images()), rtol=1e-5, atol=1e-6)
    assert gradprune.reports(step)


def test_the_flag_is_off_again_when_a_compilation_fails(no_code: None):
    def training(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    model, (_, x, y) = network(), images()
    with pytest.raises(gradprune.TrainingStepError):
        gradprune.compile(training)(x, y)
    assert graphs_of({}) == 0


def test_a_step_that_clears_gradients_does_not_break_later_compilations(no_code: None):
    """What Dynamo remembers of a gradient that was set to None must not reach the next function."""
    model = network()
    step = backward_step(model)

    def clearing_step(*arguments: Tensor) -> Any:
        model.zero_grad()
        result = step(*arguments)
        return result, [parameter.grad is None for parameter in model.parameters()]

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradprune.compile(clearing_step)(*images())
    assert graphs_of({}) == 0  # breaks after requires_grad_(), and has to write a None


def test_explain_leaves_no_backend_behind():
    registered = [list(getattr(dynamo_config, flag).backends) for flag in dynamo.TRACED_FLAGS]
    gradprune.explain(backward_step(network()), *images())
    with pytest.raises(gradprune.NoPerturbationError):
        gradprune.explain(network(), images()[0])
    assert [getattr(dynamo_config, flag).backends for flag in dynamo.TRACED_FLAGS] == registered


def test_settings_of_a_compilation_do_not_outlast_it(no_code: None):
    settings = torch._inductor.config.get_config_copy(), torch._functorch.config.get_config_copy()
    step = gradprune.compile(backward_step(network()), inductor={"max_autotune": True, "fallback_random": True})
    step(*images())
    assert (torch._inductor.config.get_config_copy(), torch._functorch.config.get_config_copy()) == settings
