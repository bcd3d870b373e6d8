"""What gradprune uses of Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir
from torch._inductor.utils import fresh_cache

__all__ = [
    "CustomGraphPass",
    "compile_cpp",
    "compile_fx",
    "compile_fx_inner",
    "computes_in_channels_last",
    "fresh_cache",
    "inductor_cache_dir",
    "inductor_config",
    "list_mode_options",
    "select_decomp_table",
]


def computes_in_channels_last(graph: fx.Graph) -> bool:
    """Whether Inductor will compute a step graph in channels-last order, as its settings and heuristics have it."""
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module or fx.GraphModule({}, graph)
    return bool(GraphLowering.decide_layout_opt(module, is_inference=True))


def compile_cpp(argument_types: Sequence[str], source: str) -> Callable[..., None]:
    """Compile a C++ function named ``kernel`` as Inductor does its own, cached on disk.

    Args:
        argument_types: C types of its arguments: pointers, for which tensors are passed, and ``int64_t``.
        source: The code.
    """
    return CppPythonBindingsCodeCache.load_pybinding(list(argument_types), source)  # type: ignore[no-any-return]
