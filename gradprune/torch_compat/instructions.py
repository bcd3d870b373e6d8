"""Which vector instructions Inductor compiles kernels for, without asking about those that it would not use.

Before its first kernel, Inductor compiles and loads two or three small libraries for each of AMX, AVX-512 with and
without VNNI and AVX2, one after the other, and takes the first set of instructions that works. Here they are tried in
that order until one works, in a thread and while the graph is traced. The choice is the same.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from torch._inductor import config, cpu_vec_isa

from .background import begin

_usual = cpu_vec_isa.valid_vec_isa_list


def _find() -> list[Any]:
    supported = cpu_vec_isa.x86_isa_checker()
    candidates = cpu_vec_isa.supported_vec_isa_list
    return next(([one] for one in candidates if all(flag in supported for flag in str(one).split()) and one), [])


@functools.cache
def find_early() -> Future[list[Any]]:
    """Begin to find out which instructions there are."""
    return begin(_find)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=find_early.cache_clear)  # the thread is not there


_lock = threading.Lock()
_inside = 0
"""How many blocks are being run; several threads compile at the same time."""


@contextmanager
def found_early() -> Iterator[None]:
    """Have Inductor ask no further than it has to in the block, unless it was asked for other instructions."""
    is_usual = sys.platform == "linux" and platform.machine() == "x86_64" and config.cpp.simdlen is None
    if not is_usual or os.environ.get("ATEN_CPU_CAPABILITY") or _usual.cache_info().currsize:
        yield
        return
    _enter(+1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(step: int) -> None:
    global _inside
    with _lock:
        _inside += step
        found: Any = (lambda: find_early().result()) if _inside else _usual
        cpu_vec_isa.valid_vec_isa_list = found
