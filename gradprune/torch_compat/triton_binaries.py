"""Machine code of generated Triton kernels, by Triton's compiler and ptxas, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch._inductor import config as inductor_config
from torch._inductor.runtime import triton_helpers

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one of the configurations that are tried when it first runs.

    Attributes:
        config: Block sizes by name.
        warps: Of a block.
        registers: Of a thread.
        stack_bytes: Of a thread, in local memory: what does not fit into registers is spilled there.
        shared_bytes: Of a block.
        ptx: The assembly.
        cubin: The machine code.
    """

    config: dict[str, int]
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes


def compile_kernel(name: str, source: str, folder: Path) -> Iterator[Binary]:
    """Compile a kernel in every configuration that Inductor's heuristics list, within ``fake_cuda``.

    Args:
        name: Of the kernel.
        source: What Inductor generated for it.
        folder: Exists. Takes ``NAME.py``, and for each configuration ``NAME.0.cubin``.
    """
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    found = importlib.util.spec_from_file_location(f"gradprune_emitted_{name}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    launcher = "use_static_triton_launcher"
    launcher = launcher if hasattr(inductor_config, launcher) else "use_static_cuda_launcher"
    with (
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        inductor_config.patch({launcher: False}),
    ):
        found.loader.exec_module(module)
        kernel: Any = getattr(module, name)
        kernel.precompile(warm_cache_only=True)
    for number, result in enumerate(kernel.compile_results):
        compiled = result.kernel
        cubin = compiled.asm["cubin"]
        registers, stack, static_shared = _usage(cubin, folder / f"{name}.{number}.cubin")
        yield Binary(
            dict(result.config.kwargs),
            int(compiled.metadata.num_warps),
            registers,
            stack,
            max(int(compiled.metadata.shared), static_shared),
            compiled.asm["ptx"],
            cubin,
        )


def _usage(cubin: bytes, path: Path) -> tuple[int, int, int]:
    """Registers, stack and static shared memory, as the machine code says."""
    import triton

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    usage = _USAGE.search(done.stdout)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of the registers of {path.stem}: {done.stdout[-500:]}")
    registers, stack, shared, _ = map(int, usage.groups())
    return registers, stack, shared
