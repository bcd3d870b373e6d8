"""Graphs as Python programs that people can read and, for ATen graphs, Python can run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import fx

_IMPORTS = {
    "inf": "from math import inf",
    "nan": "from math import nan",
    "NoneType": "from types import NoneType",
    "device": "from torch import device",
    "fx_pytree": "import torch.fx._pytree as fx_pytree",
    "pytree": "import torch.utils._pytree as pytree",
    "operator": "import operator",
}
"""What fx calls by a name of its own in the code that it prints."""


def program(graph: fx.Graph, name: str, header: Iterable[str] = (), roles: Mapping[str, str] | None = None) -> str:
    """A graph as a Python file with one function.

    Args:
        graph: The graph; source lines of the user's code become comments.
        name: Name of the function.
        header: Lines of comment to begin with.
        roles: What inputs are, by name.
    """
    lines = [f"# {line}".rstrip() for text in header for line in text.splitlines() or [""]]
    if roles:
        width = max(map(len, roles))
        lines += ["#", "# inputs:", *(f"#   {node:<{width}}  {role}" for node, role in roles.items())]
    code, imports = function(graph, name)
    return "\n".join([*lines, "", *imports, "", "", code])


def function(graph: fx.Graph, name: str) -> tuple[str, list[str]]:
    """The source of a function that computes ``graph``, and the import statements that it needs.

    Attributes of the graph's module, such as constants, are read from the function's first argument.
    """
    printed = graph.python_code("self", verbose=True)
    code = "\n".join(line.rstrip() for line in printed.src.strip().splitlines())
    code = code.replace("def forward(self", f"def {name}(self", 1)
    imports = ["import torch", *(line for used, line in _IMPORTS.items() if re.search(rf"\b{used}\b", code))]
    if "torch.ops.gradprune." in code:
        imports.append("import gradprune.backend  # has the operators torch.ops.gradprune.*")
    return code + "\n", sorted(dict.fromkeys(imports))


def runnable(graph: fx.Graph) -> fx.Graph:
    """A copy of an ATen graph to run operator by operator.

    Kernels may choose other strides than the trace has, so views become reshapes, as they do in Inductor.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    return copy
