"""What compilers do while a graph is traced. It is over before anything is timed, and before the compilation ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_begun: list[Future[Any]] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begun.clear)  # the threads are not there


def begin(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a thread of its own."""
    future = ThreadPoolExecutor(1, "gradprune").submit(function, *arguments)
    _begun.append(future)
    return future


def wait() -> None:
    """Wait for all that was begun, whether it succeeds or not."""
    for future in list(_begun):
        future.exception()
    _begun[:] = [future for future in _begun if not future.done()]
