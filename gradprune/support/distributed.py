"""Several processes on one evaluation, as ``torchrun`` starts them.

What is dealt out are whole batches, whose results depend on nothing but their number; every process leaves its own in
the output folder, and the first one reads them all. So the result is that of one process, exactly. Nothing but a list
of keys is ever sent, from CPU to CPU, for which gloo suffices on any device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gradprune.errors import GradpruneError

PATIENCE = timedelta(days=7)
"""For the slowest process; one that fails is noticed by torchrun, which ends the others."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Attributes:
        rank: Its number.
        size: How many there are.
        local: Its number on this machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that merges and reports."""
        return self.rank == 0

    def share(self, batches: int) -> range:
        """The numbers of the batches that this process computes."""
        return range(self.rank, batches, self.size)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, keys: list[str], folder: Path) -> None:
        """Make sure that all processes are about to do the same, in the same folder.

        Raises:
            GradpruneError: Models or data differ, or the folder is not shared.
        """
        if self.size == 1:
            return
        token = folder / f".rank-{self.rank}"
        token.touch()
        everybodys: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everybodys, keys)
        shared = all((folder / f".rank-{rank}").exists() for rank in range(self.size))
        self.wait()
        token.unlink()
        if not shared:
            raise GradpruneError(f"the processes do not share {folder}: pass --output DIR on a file system they share")
        if any(theirs != keys for theirs in everybodys):
            raise GradpruneError("the processes have loaded different models or data: make loading them deterministic")


@contextmanager
def started() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; on its own, a process is the only one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    joins = not dist.is_initialized()
    if joins:
        # NCCL for the gradients of those that train; what this module sends goes from CPU to CPU.
        on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        if joins:
            dist.destroy_process_group()
