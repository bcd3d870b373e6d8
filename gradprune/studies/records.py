"""What a study has measured so far: a file of JSON lines, from which an interrupted study goes on.

The first line says what all others depend on. Every other line is a cell: what is measured in one piece, such as one
network that is trained and attacked. Its ``figures`` are the same for the same seed; its ``run`` is not, being seconds
and what had to be compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradprune.errors import OptionError
from gradprune.support.files import write_text

Figures = dict[str, Any]
"""Figures by name, ready for JSON."""


@dataclass
class Records:
    """One file.

    Attributes:
        path: The file.
        settings: What its cells depend on.
        environment: Where they were measured; kept, but not compared.
        cells: By their keys, in the order in which they were measured.
    """

    path: Path
    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, dict[str, Figures]] = field(default_factory=dict)

    def resume(self) -> None:
        """Take up the cells of an earlier run in the same file, if there is one.

        Raises:
            OptionError: It was written with other settings, or by something else.
        """
        lines = read_lines(self.path)
        if not lines:
            return
        head, *cells = lines
        try:
            own = json.loads(json.dumps(self.settings))
            others = [
                f"{name} was {head['settings'].get(name)!r} and is {own.get(name)!r}"
                for name in {**head["settings"], **own}
                if head["settings"].get(name) != own.get(name)
            ]
            self.cells = {line["cell"]: {"figures": line["figures"], "run": line["run"]} for line in cells}
        except (KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"{self.path} is no record of a study: pass --fresh to replace it") from error
        if others:
            raise OptionError(
                f"{self.path} was made with other settings: {'; '.join(others)}: pass --fresh to replace it, or "
                "--output DIR to write elsewhere"
            )

    def add(self, key: str, figures: Figures, run: Figures) -> None:
        """Take up a cell, and write the file, whole or not at all."""
        self.cells[key] = {"figures": figures, "run": run}
        head: Mapping[str, Any] = {"settings": self.settings, "environment": self.environment}
        lines = [head, *({"cell": name, **cell} for name, cell in self.cells.items())]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def get(self, key: str, compute: Callable[[], tuple[Figures, Figures]]) -> Figures:
        """The figures of a cell, which are computed, and written, unless they are there."""
        if key not in self.cells:
            # As they are read again: what comes of an interrupted study is then the same to the last bit.
            figures, run = (json.loads(json.dumps(part)) for part in compute())
            self.add(key, figures, run)
        return self.cells[key]["figures"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; none if there is no such file.

    Raises:
        OptionError: It is something else.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read {path} ({error}): pass --fresh to replace it") from error
