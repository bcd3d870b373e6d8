"""Progress on standard error: what is under way and for how long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

REFRESH_SECONDS = 0.5


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Show ``description`` and the seconds since it began, for work that cannot report how far it is.

    Where standard error is no terminal, one line is printed at the end instead of a line that rewrites itself.

    Args:
        description: What is being done, such as ``"compiling gradprune"``.
    """
    started = time.perf_counter()
    if not sys.stderr.isatty():
        yield
        print(f"{description}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        return
    done = threading.Event()
    with tqdm(desc=description, bar_format="{desc} [{elapsed}]", file=sys.stderr) as bar:

        def tick() -> None:
            while not done.wait(REFRESH_SECONDS):
                bar.refresh()

        # A compilation is one long call: only another thread can move the clock meanwhile.
        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()


@contextmanager
def counter(description: str, total: int) -> Iterator[tqdm[None]]:
    """A bar over ``total`` pieces of work; the caller calls ``update()`` on what it yields after each.

    Args:
        description: What is being done.
        total: How many pieces there are.
    """
    if not sys.stderr.isatty():
        with stage(description), tqdm(total=total, disable=True) as silent:
            yield silent
        return
    with tqdm(total=total, desc=description, file=sys.stderr) as bar:
        yield bar
