"""Is the private torch that gradprune leans on what it was read to be? ``python -m gradprune.torch_compat.probe`` says.

What is looked at here are names, fields and parameters, which takes milliseconds and is done at the first compilation.
Run as a program, it also compiles a step and looks at what torch notes on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo import source, symbolic_convert
from torch._dynamo.variables import constant
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import descriptors, schemas
from torch._inductor import codecache, compile_fx, custom_graph_pass
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering

from . import dynamo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """A piece of torch that is not what it was read to be.

    Attributes:
        piece: Its name.
        expected: What it was read to have.
        costs: What does not work without it.
    """

    piece: str
    expected: str
    costs: str

    def __str__(self) -> str:
        return f"{self.piece} has no {self.expected}: {self.costs}"


def _has(piece: Any, name: str) -> bool:
    """Whether a class, function or module has something by name: a field, a parameter, an attribute."""
    if dataclasses.is_dataclass(piece) and name in {field.name for field in dataclasses.fields(piece)}:
        return True
    return name in inspect.signature(piece).parameters if inspect.isfunction(piece) else hasattr(piece, name)


_NOT_TRACED = "gradient calls and recurrent layers break a step into pieces that nothing is pruned from"
_NO_ROLES = "weights cannot be told from data, and nothing is pruned"
_NO_REPORT = "gradprune.reports finds nothing"
_NO_PASSES = "passes do not run"
_WRONG_METADATA = "steps with absent outputs, or models whose graph is kept, fail when they run"

EXPECTED: tuple[tuple[str, Callable[[], Any], tuple[str, ...], str], ...] = (
    ("torch._dynamo.config", lambda: dynamo_config, dynamo.TRACED_FLAGS, _NOT_TRACED),
    ("Dynamo's GradSource", lambda: source.GradSource, ("base",), _NO_ROLES),
    ("Dynamo's AttrSource", lambda: source.AttrSource, ("base", "member"), _NO_ROLES),
    ("Dynamo's InstructionTranslator", lambda: symbolic_convert.InstructionTranslator, ("current_tx",), _NO_REPORT),
    ("torch", lambda: torch, ("_TorchCompileWrapper",), _NO_REPORT),
    ("Dynamo's constants", lambda: constant, ("CONSTANT_VARIABLE_NONE",), "frames behind a step may fail to compile"),
    ("AOTAutograd's PlainAOTInput", lambda: descriptors.PlainAOTInput, ("idx",), _NO_ROLES),
    ("AOTAutograd's PlainAOTOutput", lambda: descriptors.PlainAOTOutput, ("idx",), _NO_ROLES),
    ("AOTAutograd's GradAOTOutput", lambda: descriptors.GradAOTOutput, ("grad_of",), _NO_ROLES),
    (
        "AOTAutograd's InputMutationAOTOutput",
        lambda: descriptors.InputMutationAOTOutput,
        ("mutated_input",),
        _NO_ROLES,
    ),
    (
        "AOTAutograd's metadata",
        lambda: schemas.ViewAndMutationMeta,
        ("bw_donated_idxs", "output_info"),
        _WRONG_METADATA,
    ),
    ("AOTAutograd's output metadata", lambda: schemas.OutputAliasInfo, ("dynamic_dims",), _WRONG_METADATA),
    (
        "torch._functorch.config",
        lambda: functorch_config,
        ("enable_autograd_cache", "donated_buffer"),
        "cached code may be found that was never pruned",
    ),
    (
        "torch._inductor.config",
        lambda: inductor_config,
        ("joint_custom_pre_pass", "layout_optimization", "size_asserts", "alignment_asserts"),
        _NO_PASSES,
    ),
    (
        "Inductor's compile_fx",
        lambda: compile_fx.compile_fx,
        ("inner_compile", "config_patches", "decompositions"),
        _NO_PASSES,
    ),
    ("Inductor's CustomGraphPass", lambda: custom_graph_pass.CustomGraphPass, ("uuid",), _NO_PASSES),
    ("Inductor's layout choice", lambda: GraphLowering.decide_layout_opt, ("is_inference",), "layouts are not known"),
    (
        "Inductor's C++ cache",
        lambda: codecache.CppPythonBindingsCodeCache,
        ("load_pybinding",),
        "there is no Winograd kernel",
    ),
    (
        "torch._C",
        lambda: torch._C,
        ("_will_engine_execute_node", "_current_autograd_node"),
        "asking a compiled model for a weight gradient is not refused",
    ),
)
"""Name, piece, what it has to have, and what does not work without."""


@functools.cache
def probe() -> tuple[Finding, ...]:
    """Look at every piece, once in a process."""
    return tuple(_look())


def _look() -> Iterator[Finding]:
    for name, piece, expected, costs in EXPECTED:
        try:
            looked_at = piece()
        except AttributeError as error:
            yield Finding(name, str(error), costs)
            continue
        yield from (Finding(name, each, costs) for each in expected if not _has(looked_at, each))


@functools.cache
def warn() -> None:
    """Log what was found, once in a process."""
    for finding in probe():
        log.warning("gradprune: torch %s is not what gradprune knows: %s", torch.__version__, finding)


def probe_step() -> list[Finding]:
    """Compile a step as gradprune does, with passes that only look, and say what torch did not note."""
    found: list[Finding] = []

    def expect(holds: bool, piece: str, expected: str, costs: str) -> None:
        if not holds:
            found.append(Finding(piece, expected, costs))

    class Looks(custom_graph_pass.CustomGraphPass):
        ran = False

        def __call__(self, graph: fx.Graph) -> None:
            self.ran = True
            calls = [node for node in graph.nodes if node.op == "call_function"]
            placeholders = graph.find_nodes(op="placeholder")
            expect("desc" in graph.output_node().meta, "an ATen graph's output", "'desc'", _NO_ROLES)
            expect(all("desc" in node.meta for node in placeholders), "an ATen graph's input", "'desc'", _NO_ROLES)
            expect(any(map(dynamo.dynamo_nodes, calls)), "an ATen operator", "'from_node'", _NO_ROLES)

        def uuid(self) -> bytes:
            return b"looks"

    looks = Looks()

    captured: list[fx.Node] = []  # of all pieces: where requires_grad_() is not traced there are two

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        captured.extend(gm.graph.nodes)
        patches = {"joint_custom_pre_pass": looks}
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx.compile_fx(gm, list(inputs), config_patches=patches)

    model = torch.nn.Linear(3, 2)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    for flag in dynamo.TRACED_FLAGS:
        dynamo.scope_to_backend(flag, backend)
    try:
        torch.compile(step, backend=backend)(torch.rand(4, 3))
    finally:
        for flag in dynamo.TRACED_FLAGS:
            dynamo.forget_backend(flag, backend)
    placeholders = [node for node in captured if node.op == "placeholder"]
    sources = [getattr(node, "_dynamo_source", None) for node in placeholders]
    expect(None not in sources, "an input of Dynamo's graph", "'_dynamo_source'", _NO_ROLES)
    expect(any(map(dynamo.is_module_state, placeholders)), "a weight", "source in a module", _NO_ROLES)
    expect(any(node.target is torch.autograd.grad for node in captured), "Dynamo's graph", "gradient call", _NOT_TRACED)
    expect(looks.ran, "Inductor's compilation", "call of joint_custom_pre_pass", _NO_PASSES)
    return list(dict.fromkeys(found))


def main() -> int:
    """Print what was found; the exit status is 1 if anything was."""
    found = [*probe(), *probe_step()]
    for finding in found:
        print(finding)
    print(f"torch {torch.__version__}: {len(found) or 'all'} {'findings' if found else 'as expected'}")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
