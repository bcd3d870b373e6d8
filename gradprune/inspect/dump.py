"""The dump folder: every stage of one compilation as a file.

DUMP/                       the option ``dump``, or GRADPRUNE_DUMP
  [rank1/]                  where RANK is set, as torchrun does
    graph-00-attack_step/   one for each graph; numbers go on where an earlier run ended
      00.dynamo.py          what Dynamo captured
      01.fold-batch-norm.py
      02.captured.py        forward and backward in ATen operators
      03.select-outputs.py  after each pass
      ...
      15.prologue.py        what runs once per attack
      16.step.py            what Inductor gets, after passes of its own
      17.kernels-step.py    what Inductor generated or found in its cache
      repro.py              runs the captured and the pruned graph and compares them
      report.json           ``Report.to_dict()``; report.txt the same as it prints
      page.html             before and after side by side
      graph.dot             the captured graph, with what became of every node
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from gradprune.support.files import write_text

VARIABLE = "GRADPRUNE_DUMP"


class DumpFolder:
    """A folder of its own for one compilation.

    Args:
        root: Where to create it.
        name: Ends its name.

    Raises:
        OSError: It cannot be created or written.
    """

    def __init__(self, root: str | os.PathLike[str], name: str) -> None:
        parent = Path(root).expanduser()
        rank = os.environ.get("RANK", "")
        if rank.isdigit():
            parent /= f"rank{rank}"
        parent.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", name)[:60].strip("_") or "graph"
        self.path = next(filter(None, (_claim(parent, f"{n:02d}", name) for n in itertools.count())))
        self._stages = 0

    def write(self, name: str, text: str) -> None:
        """Write one file, as a whole or not at all."""
        write_text(self.path / name, text)

    def write_stage(self, name: str, text: str) -> None:
        """Write the next of the numbered files, ``name`` being without its number."""
        number, self._stages = self._stages, self._stages + 1
        self.write(f"{number:02d}.{name}", text)

    def write_with(self, name: str, write: Callable[[Path], object]) -> None:
        """Have one file written by a function that is given the path."""
        from gradprune.support.files import replacing

        with replacing(self.path / name) as temporary:
            write(temporary)

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def _claim(parent: Path, number: str, name: str) -> Path | None:
    """Create the folder with this number unless there is one; whoever creates it owns it."""
    if any(parent.glob(f"graph-{number}-*")):
        return None
    try:
        (path := parent / f"graph-{number}-{name}").mkdir()
    except FileExistsError:
        return None
    return path
