"""Several benchmarks on one GPU: they compile side by side, where processors are many, and are timed one at a time."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def side_by_side(lock: Path | None) -> Iterator[Callable[[], None]]:
    """Be one of the processes that have the same lock; until the end of the block.

    Args:
        lock: A file, made if there is none; ``None`` is for a process that is by itself.

    Yields:
        A function that waits until none of the others is in such a block, or all of those wait as well, and that has
        everybody who comes behind wait until this block has ended.
    """
    if lock is None:
        yield lambda: None
        return
    import fcntl  # only where there is POSIX

    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def alone() -> None:
            fcntl.flock(file, fcntl.LOCK_UN)  # two that both wait for the other's share would wait for ever
            fcntl.flock(file, fcntl.LOCK_EX)

        yield alone


@contextlib.contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Have what takes longer than ``seconds`` say where it is, and fail; in the main thread.

    Raises:
        TimeoutError: In the block. Again and again, since some code drops what is raised in it.
    """
    if seconds is None:
        yield
        return

    def expired(number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(2, all_threads=False)
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
