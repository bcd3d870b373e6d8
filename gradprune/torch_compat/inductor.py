"""What gradprune uses of Inductor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.codecache import PyCodeCache, torch_key
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir
from torch._inductor.utils import fresh_cache, run_and_get_code

from .kernels import compiling_together

__all__ = [
    "CustomGraphPass",
    "code_of",
    "compile_fx",
    "compile_fx_inner",
    "computes_in_channels_last",
    "fresh_cache",
    "inductor_cache_dir",
    "inductor_config",
    "list_mode_options",
    "load_code",
    "may_store",
    "run_and_get_code",
    "select_decomp_table",
    "settings",
]


def computes_in_channels_last(graph: fx.Graph) -> bool:
    """Whether Inductor will compute a step graph in channels-last order, as its settings and heuristics have it."""
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module or fx.GraphModule({}, graph)
    return bool(GraphLowering.decide_layout_opt(module, is_inference=True))


# --- Code that was generated before ----------------------------------------------------------------------------------

_HOOKS = ("custom_pre_pass", "custom_post_pass", "custom_partitioner_fn", "post_fusion_custom_pass", "custom_pass")
"""How settings of Inductor end that hold functions, of which nothing is known."""


def may_store() -> bool:
    """Whether torch's settings let what is compiled be stored, and say all that it depends on."""
    known = inductor_config.get_config_copy()
    hooks = any(value for name, value in known.items() if name.endswith(_HOOKS))
    caches = inductor_config.fx_graph_cache and functorch_config.enable_autograd_cache
    return bool(caches) and not inductor_config.force_disable_caches and not hooks


def settings() -> list[str]:
    """What code that Inductor generates for a CPU depends on, beside the graph."""
    return [
        torch_key().hex(),
        repr(sorted(inductor_config.save_config_portable().items())),
        repr(sorted(functorch_config.save_config_portable().items())),
        torch.backends.cpu.get_cpu_capability(),
        os.environ.get("ATEN_CPU_CAPABILITY", ""),
        repr(
            (
                torch.get_num_threads(),
                torch.get_default_dtype(),
                torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(),
                torch.backends.mkldnn.enabled,
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
            )
        ),
    ]


def code_of(compiled: object) -> str:
    """The Python module that Inductor generated, if that is all there is to what it compiled; else an empty string."""
    more = ("constants", "torchbind_constants", "frozen_param_names", "mutated_input_idxs", "inputs_to_check")
    if any(getattr(compiled, name, None) for name in more):
        return ""
    return str(getattr(compiled, "source_code", None) or "")


def load_code(code: str) -> Callable[[list[Any]], Any]:
    """What a module that Inductor generated calls; takes a list, which it empties."""
    with compiling_together():
        return PyCodeCache.load(code).call  # type: ignore[no-any-return]
