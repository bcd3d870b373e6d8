"""Generated Triton kernels as functions for Triton's interpreter, and how they would be launched."""

from __future__ import annotations

import inspect
import itertools
import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import TRITON_MAX_BLOCK

_SIZES = {
    "XBLOCK": "xnumel",
    "YBLOCK": "ynumel",
    "ZBLOCK": "znumel",
    "R0_BLOCK": "r0_numel",
    "R1_BLOCK": "r1_numel",
}
"""Which size each block divides."""
_ROOM = 1 << 18
"""Elements of one program where blocks are made as big as they may be."""


_numbers = itertools.count()


@dataclass(frozen=True)
class InterpretedKernel:
    """A kernel that has been loaded while ``TRITON_INTERPRET`` is set.

    Attributes:
        name: Its name.
        function: Triton's interpreted function.
        arguments: Names of what it is called with, without block sizes.
        blocks: Names of its block sizes.
        first: Block sizes that are tried first on a GPU.
        aligned: Arguments that are promised to be multiples of 16.
        meta: What Inductor says of its grid.
    """

    name: str
    function: Any
    arguments: tuple[str, ...]
    blocks: tuple[str, ...]
    first: Mapping[str, int]
    aligned: tuple[str, ...]
    meta: Mapping[str, Any]

    def big_blocks(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Blocks as big as they may be, so that there are few programs.

        Inductor leaves out a mask where the largest block it allows divides a size, or the size is one.

        Args:
            sizes: Of the arguments that are integers, by name.
        """
        found, room = {}, _ROOM
        for name in reversed(self.blocks):  # what is reduced comes first, then x
            size = sizes[_SIZES[name]]
            is_unmasked = size % TRITON_MAX_BLOCK[name.replace("BLOCK", "")] == 0
            block = size & -size if is_unmasked else 1 << max(0, (size - 1).bit_length())
            found[name] = max(1, min(block, room))
            room = max(1, room // found[name])
        return found

    def grid(self, blocks: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """How many programs there are, in each direction."""
        expression = triton_heuristics.GridExpr.from_meta(dict(self.meta), {**self.first, **blocks})
        x, y, z = expression.eval_slow({**blocks, **sizes})
        return x, y, z


def load_kernel(name: str, source: str, libdevice: Any) -> InterpretedKernel:
    """Load a kernel from its generated source.

    Args:
        name: Its name.
        source: What Inductor generated for it.
        libdevice: What has the device functions that it calls.
    """
    kept: dict[str, Any] = {}

    def keep(
        size_hints: Any, configs: Any, triton_meta: Any, heuristic_type: Any, inductor_meta: Any = None, **rest: Any
    ) -> Any:
        kept.update(configs=configs, triton=triton_meta, meta=inductor_meta)
        return lambda function: function

    file = f"<{name} {next(_numbers)}>"  # parts of a step have kernels of the same name
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace: dict[str, Any] = {"__name__": name, "__file__": file}
    with (
        mock.patch.object(triton_heuristics, "cached_autotune", keep),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        exec(compile(source, file, "exec"), namespace)
    namespace["libdevice"] = libdevice
    function = namespace[name]
    parameters = list(inspect.signature(function.fn).parameters)
    arguments = tuple(one for one in parameters if not one.endswith("BLOCK"))
    promised = [
        position
        for config in kept["triton"]["configs"]
        for (position,), properties in getattr(config, "items", dict)()
        if ["tt.divisibility", 16] in properties
    ]
    return InterpretedKernel(
        name,
        function,
        arguments,
        tuple(one for one in parameters if one.endswith("BLOCK")),
        dict(kept["configs"][0].kwargs),
        tuple(arguments[position] for position in promised),
        kept["meta"],
    )


def replacing_libdevice(library: Any) -> Any:
    """A context in which generated kernels and what they call find another library of device functions."""
    return mock.patch.object(triton_helpers, "libdevice", library)
