"""``repro.py``: a captured step and its pruned graph in a file of their own, which runs both and compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gradprune.graph.step_graph import StepGraph
from gradprune.report.snapshot import INPUT_ROLES, OUTPUT_ROLES
from gradprune.torch_compat.aot import is_fake, size_hint

from .program import function, runnable

INPUTS, CONSTANTS = "inputs.pt", "constants.pt"


@dataclass(frozen=True)
class Repro:
    """What ``repro.py`` is made of.

    Attributes:
        captured: Source of the captured graph.
        imports: What it imports.
        inputs: For each input: name, role, and what is needed to make it up.
        outputs: What is returned.
        constants: Tensors that belong to the graph.
        unsupported: Why the graph cannot run by itself, empty if it can.
    """

    captured: str
    imports: list[str]
    inputs: list[tuple[Any, ...]]
    outputs: list[str]
    constants: dict[str, torch.Tensor]
    unsupported: str

    @staticmethod
    def of(step_graph: StepGraph, examples: Mapping[str, Any]) -> Repro:
        """Take down a captured graph.

        Args:
            step_graph: The graph, before the passes.
            examples: Values of its inputs at hand, by name.
        """
        captured, imports = function(runnable(step_graph.graph), "captured")
        inputs = [
            _input(node, INPUT_ROLES[role], examples.get(node.name, node.meta.get("val")))
            for node, role in step_graph.inputs.items()
        ]
        constants: dict[str, torch.Tensor] = {}
        unsupported = ""
        module = step_graph.graph.owning_module
        for node in step_graph.graph.find_nodes(op="get_attr"):
            value = getattr(module, str(node.target), None)
            if isinstance(value, torch.Tensor) and not is_fake(value):
                constants[str(node.target)] = value.detach()
            else:
                unsupported = f"the graph calls a function of its own, {node.target}, which is not written here"
        outputs = [OUTPUT_ROLES[role] for role in step_graph.outputs]
        return Repro(captured, imports, inputs, outputs, constants, unsupported)

    def script(self, pruned: fx.Graph) -> str:
        """The file, given the graph after the passes."""
        source, imports = function(runnable(pruned), "pruned")
        lines = [*_SCRIPT_IMPORTS, *sorted({*imports, *self.imports})]
        inputs = "".join(f"    {entry!r},\n" for entry in self.inputs)
        return _SCRIPT.format(
            imports="\n".join(lines),
            unsupported=repr(self.unsupported),
            inputs=inputs,
            outputs="".join(f"    {role!r},\n" for role in self.outputs),
            captured=self.captured,
            pruned=source,
        )


def _input(node: fx.Node, role: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, torch.Tensor):
        return node.name, role, size_hint(value) if isinstance(value, (int, torch.SymInt)) else value
    low, high = 0, 1
    if not value.dtype.is_floating_point and value.numel() and not is_fake(value) and value.dtype is not torch.bool:
        # Labels and tokens are indices: others than those at hand might lie outside of what they point into.
        low, high = int(value.min()), int(value.max())
    shape, strides = [[size_hint(n) for n in sizes] for sizes in (value.shape, value.stride())]
    return node.name, role, shape, strides, str(value.dtype), str(value.device), low, high


_SCRIPT_IMPORTS = ["import argparse", "import sys", "from pathlib import Path", "from types import SimpleNamespace"]

_SCRIPT = '''\
"""One step by itself: as it was captured, and as gradprune pruned it. Runs both and compares what they return.

    python repro.py                  inputs and weights made up, of the same shapes, strides and types
    python repro.py --saved          those of the compilation, if they were saved (option dump_inputs)

Prints the largest difference. Exits with 1 if an output differs by more than the tolerance, in the Euclidean norm and
relative to the output: single elements may differ by a step where a gradient is zero up to rounding.
"""

{imports}

HERE = Path(__file__).parent
UNSUPPORTED = {unsupported}

# Of tensors: name, role, shape, strides, type, device, smallest and largest value if they are integers.
INPUTS = [
{inputs}]

OUTPUTS = [
{outputs}]


{captured}

{pruned}

def made_up(seed):
    """Inputs that keep activations in range: weights with a variance of one over their fan-in, the rest from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for name, role, *spec in INPUTS:
        if len(spec) == 1:
            inputs.append(spec[0])
            continue
        shape, strides, dtype, device, low, high = spec
        dtype = getattr(torch, dtype.removeprefix("torch."))
        # Values for the memory, not for the shape: an expanded tensor has fewer than its shape says.
        length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if 0 not in shape else 0
        if dtype is torch.bool:
            memory = torch.rand(length, generator=generator) < 0.5
        elif not (dtype.is_floating_point or dtype.is_complex):
            memory = torch.randint(low, high + 1, (length,), generator=generator)
        elif role == "weight" and len(shape) > 1:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            memory = torch.randn(length, generator=generator) / fan_in**0.5
        elif role == "weight":
            memory = torch.rand(length, generator=generator) + 0.5  # scales and variances are positive
        else:
            # Alike but for a little: a perturbed input far from the clean one would be clamped back, whatever the step.
            alike = torch.rand(length, generator=torch.Generator().manual_seed(seed + length))
            memory = 0.1 + 0.8 * alike + 1e-3 * torch.rand(length, generator=generator)
        inputs.append(memory.to(device=device, dtype=dtype).as_strided(shape, strides))
    return inputs


def saved():
    """The inputs of the compilation, where there are any; what flows in from outside is made up."""
    values = torch.load(HERE / "inputs.pt", weights_only=True)
    return [values.get(name, value) for (name, *_), value in zip(INPUTS, made_up(0))]


def run(graph, inputs, seed=0):
    """Outputs of a graph, and the inputs after it, which it may have written to."""
    file = HERE / "constants.pt"
    constants = torch.load(file, weights_only=True) if file.exists() else {{}}
    inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
    torch.manual_seed(seed)
    with torch.no_grad():
        outputs = graph(SimpleNamespace(**constants), *inputs)
    return list(outputs), inputs


def difference(value, reference):
    """Largest difference, and the norm of the difference relative to that of the reference."""
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return float("inf"), float("inf")
    exact = torch.complex128 if value.is_complex() else torch.float64
    value, reference = value.detach().to("cpu", exact), reference.detach().to("cpu", exact)
    same = (value == reference) | (value.isnan() & reference.isnan())
    delta = torch.where(same, 0, (value - reference).abs())
    norm = torch.linalg.vector_norm(reference.nan_to_num())
    return float(delta.max()) if delta.numel() else 0.0, float(torch.linalg.vector_norm(delta) / norm.clamp_min(1e-300))


def tolerance(dtype):
    """What rounding may amount to."""
    return {{torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 3e-2, torch.bfloat16: 1e-1}}.get(dtype, 1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved", action="store_true", help="use the inputs that were saved in inputs.pt")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs that are made up (default: 0)")
    parser.add_argument("--tolerance", type=float, help="relative, for all types (default: by type, float32 1e-3)")
    arguments = parser.parse_args()
    if UNSUPPORTED:
        sys.exit("this graph cannot run by itself: " + UNSUPPORTED)
    if arguments.saved and not (HERE / "inputs.pt").exists():
        sys.exit("there is no inputs.pt here: compile with options={{'dump': ..., 'dump_inputs': True}}")
    inputs = saved() if arguments.saved else made_up(arguments.seed)
    results = [run(graph, inputs) for graph in (captured, pruned)]
    (before, inputs_before), (after, inputs_after) = results
    rows = [(f"output {{k}}, {{role}}", *pair) for k, (role, *pair) in enumerate(zip(OUTPUTS, before, after))]
    names = [name for name, *_ in INPUTS]
    rows += [(f"input {{name}} afterwards", *pair) for name, *pair in zip(names, inputs_before, inputs_after)]
    failed, dropped, largest = False, 0, 0.0
    for what, reference, value in rows:
        if not isinstance(reference, torch.Tensor):
            continue
        if value is None:
            dropped += 1
            continue
        most, relative = difference(value, reference)
        largest = max(largest, most)
        limit = tolerance(reference.dtype) if arguments.tolerance is None else arguments.tolerance
        agrees = relative <= limit
        failed = failed or not agrees
        if what.startswith("output") or not agrees:
            verdict = "agrees" if agrees else "DIFFERS"
            print(f"{{verdict}}: {{what}}: largest difference {{most:.2e}}, relative norm {{relative:.2e}}")
    print(f"{{dropped}} outputs of the captured graph are not computed any more")
    print(f"largest difference: {{largest:.2e}}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
'''
