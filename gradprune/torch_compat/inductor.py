"""What gradprune uses of Inductor."""

from __future__ import annotations

from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir
from torch._inductor.utils import fresh_cache, run_and_get_code

__all__ = [
    "CustomGraphPass",
    "compile_fx",
    "compile_fx_inner",
    "computes_in_channels_last",
    "fresh_cache",
    "inductor_cache_dir",
    "inductor_config",
    "list_mode_options",
    "run_and_get_code",
    "select_decomp_table",
]


def computes_in_channels_last(graph: fx.Graph) -> bool:
    """Whether Inductor will compute a step graph in channels-last order, as its settings and heuristics have it."""
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module or fx.GraphModule({}, graph)
    return bool(GraphLowering.decide_layout_opt(module, is_inference=True))
