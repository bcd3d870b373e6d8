"""Progress on standard error: what is under way and for how long."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

REFRESH_SECONDS = 0.5


class Counter(Protocol):
    """What counts pieces of work."""

    def update(self) -> object:
        """Note that a piece is done."""


class Unseen:
    """Counts for nobody."""

    def update(self) -> None:
        """As ``Counter.update``."""


def _can_rewrite() -> bool:
    """Whether standard error is a terminal, and there is tqdm to write to it."""
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Show ``description`` and the seconds since it began, for work that cannot report how far it is.

    Where standard error is no terminal, or tqdm is not installed, one line is printed at the end instead of a line that
    rewrites itself.

    Args:
        description: What is being done, such as ``"compiling gradprune"``.
    """
    started = time.perf_counter()
    if not _can_rewrite():
        yield
        print(f"{description}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        return
    from tqdm import tqdm

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
def counter(description: str, total: int) -> Iterator[Counter]:
    """A bar over ``total`` pieces of work; the caller calls ``update()`` on what it yields after each.

    Args:
        description: What is being done.
        total: How many pieces there are.
    """
    if not _can_rewrite():
        with stage(description):
            yield Unseen()
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=description, file=sys.stderr) as bar:
        yield bar
