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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import fx

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """A piece of torch that is not what it was read to be.

    Attributes:
        piece: Its name.
        expected: What it was read to have; empty if it is gone itself.
        costs: What does not work without it.
    """

    piece: str
    expected: str
    costs: str

    def __str__(self) -> str:
        return (
            f"{self.piece} has no {self.expected}: {self.costs}"
            if self.expected
            else f"{self.piece} is gone: {self.costs}"
        )


def _has(piece: Any, name: str) -> bool:
    """Whether a class, function or module has something by name: a field, a parameter, an attribute."""
    if dataclasses.is_dataclass(piece) and name in {field.name for field in dataclasses.fields(piece)}:
        return True
    return name in inspect.signature(piece).parameters if inspect.isfunction(piece) else hasattr(piece, name)


_NOT_TRACED = "gradient calls and recurrent layers break a step into pieces that nothing is pruned from"
_NO_ROLES = "weights cannot be told from data, and nothing is pruned"
_NOT_TOLD = "what is not compiled runs eagerly without a word"
_NO_REPORT = "gradprune.reports finds nothing"
_NO_PASSES = "passes do not run"
_NOT_FOUND = "steps that an earlier process compiled are compiled anew, or not at all"
_SLOW = "compilations take longer"
_WRONG_METADATA = "steps with absent outputs, or models whose graph is kept, fail when they run"

_DYNAMO, _AOT, _INDUCTOR = "torch._dynamo", "torch._functorch._aot_autograd", "torch._inductor"

EXPECTED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (f"{_DYNAMO}.config", ("trace_autograd_ops", "allow_rnn"), _NOT_TRACED),
    (f"{_DYNAMO}.source:GradSource", ("base",), _NO_ROLES),
    (f"{_DYNAMO}.source:AttrSource", ("base", "member"), _NO_ROLES),
    (f"{_DYNAMO}.source", ("is_from_unspecialized_nn_module_source",), _NO_ROLES),
    (f"{_DYNAMO}.symbolic_convert:InstructionTranslator", ("current_tx",), _NO_REPORT),
    ("torch", ("_TorchCompileWrapper",), _NO_REPORT),
    (f"{_DYNAMO}.callback:CompilationCallbackHandler", ("end_callbacks",), _NOT_TOLD),
    (f"{_DYNAMO}.output_graph", ("graph_break_reasons",), _NOT_TOLD),
    (f"{_DYNAMO}.config", ("skip_nnmodule_hook_guards",), "hooks that come or go after a compilation are not seen"),
    (f"{_DYNAMO}.variables.constant", ("CONSTANT_VARIABLE_NONE",), "frames behind a step may fail to compile"),
    (f"{_AOT}.descriptors:PlainAOTInput", ("idx",), _NO_ROLES),
    (f"{_AOT}.descriptors:PlainAOTOutput", ("idx",), _NO_ROLES),
    (f"{_AOT}.descriptors:GradAOTOutput", ("grad_of",), _NO_ROLES),
    (f"{_AOT}.descriptors:InputMutationAOTOutput", ("mutated_input",), _NO_ROLES),
    (f"{_AOT}.schemas:ViewAndMutationMeta", ("bw_donated_idxs", "output_info"), _WRONG_METADATA),
    (f"{_AOT}.schemas:OutputAliasInfo", ("dynamic_dims",), _WRONG_METADATA),
    (
        "torch._functorch.config",
        ("enable_autograd_cache", "donated_buffer"),
        "cached code may be found that was never pruned",
    ),
    (
        f"{_INDUCTOR}.config",
        ("joint_custom_pre_pass", "layout_optimization", "size_asserts", "alignment_asserts"),
        _NO_PASSES,
    ),
    (f"{_INDUCTOR}.compile_fx:compile_fx", ("inner_compile", "config_patches", "decompositions"), _NO_PASSES),
    (f"{_INDUCTOR}.custom_graph_pass:CustomGraphPass", ("uuid",), _NO_PASSES),
    (f"{_INDUCTOR}.graph:GraphLowering.decide_layout_opt", ("is_inference",), "layouts are not known"),
    (
        f"{_INDUCTOR}.mkldnn_ir",
        ("is_contiguous_storage_and_layout",),
        "convolutions of one channel whose batch is symbolic give wrong results",
    ),
    (f"{_INDUCTOR}.output_code:CompiledFxGraph", ("source_code",), "reports list no kernels"),
    (
        f"{_INDUCTOR}.codecache:CppPythonBindingsCodeCache",
        ("load_pybinding", "load_async"),
        "kernels do not compile",
    ),
    (f"{_INDUCTOR}.codecache:PyCodeCache", ("load",), _NOT_FOUND),
    (f"{_INDUCTOR}.codecache", ("torch_key", "write_atomic"), _NOT_FOUND),
    (f"{_AOT}.schemas", ("OutputType",), _NOT_FOUND),
    ("torch.compiler._cache:CacheArtifactManager", ("record_artifact",), _NOT_FOUND),
    (f"{_INDUCTOR}.async_compile:AsyncCompile", ("cpp_pybinding", "wait", "submit"), "kernels compile one by one"),
    (f"{_INDUCTOR}.codegen.cpp", ("stride_at_vec_range",), _SLOW),
    (f"{_INDUCTOR}.dtype_propagation:DtypePropagationOpsHandler", ("_instance",), _SLOW),
    (
        f"{_INDUCTOR}.cpu_vec_isa",
        ("valid_vec_isa_list", "supported_vec_isa_list", "x86_isa_checker"),
        _SLOW,
    ),
    (
        "torch._C",
        ("_will_engine_execute_node", "_current_autograd_node"),
        "asking a compiled model for a weight gradient is not refused",
    ),
)
"""Where a piece is, as ``module:name``, what it has to have, and what does not work without."""


def _find(where: str) -> Any:
    """The piece, or ``None`` if it is gone."""
    module, _, path = where.partition(":")
    try:
        return functools.reduce(getattr, path.split(".") if path else (), import_module(module))
    except (ImportError, AttributeError):
        return None


@functools.cache
def probe() -> tuple[Finding, ...]:
    """Look at every piece, once in a process."""
    return tuple(_look())


def _look() -> Iterator[Finding]:
    for where, expected, costs in EXPECTED:
        piece = _find(where)
        if piece is None:
            yield Finding(where, "", costs)
        else:
            yield from (Finding(where, name, costs) for name in expected if not _has(piece, name))


@functools.cache
def warn() -> None:
    """Log what was found, once in a process."""
    for finding in probe():
        log.warning("gradprune: torch %s is not what gradprune knows: %s", torch.__version__, finding)


def probe_step() -> list[Finding]:
    """Compile a step as gradprune does, with passes that only look, and say what torch did not note."""
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx, custom_graph_pass

    from . import dynamo

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
    found = list(probe())
    try:
        found += probe_step()
    except Exception as error:
        found.append(Finding("a small step", f"compilation ({error!r})", "nothing compiles"))
    for finding in found:
        print(finding)
    print(f"torch {torch.__version__}: {len(found) or 'all'} {'findings' if found else 'as expected'}")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
