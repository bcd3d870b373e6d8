"""What comes of a study: the paper's claims, tested, tables, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .records import Figures


@dataclass(frozen=True)
class Claim:
    """Something that a paper says, tested at the scale that was run.

    Attributes:
        text: What it says, with the paper as REFERENCE.md calls it, such as ``[LR]``.
        criterion: When it counts as reproduced.
        found: What was measured.
        holds: Whether it was reproduced; ``None`` where this run cannot tell.
    """

    text: str
    criterion: str
    found: str
    holds: bool | None


@dataclass(frozen=True)
class Table:
    """A table: its title, its head, and rows of texts, of which the first is a name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure in the folder of its study, and what it shows."""

    file: str
    caption: str


@dataclass(frozen=True)
class Outcome:
    """What came of a study.

    Attributes:
        study: Its name.
        title: What it is about.
        about: What was done, in a few sentences, with whatever differs from the paper.
        data: What the figures call the data.
        scale: As in ``Options``.
        eager: As in ``Options``.
        claims: The paper's, tested.
        tables: With the paper's numbers beside.
        pictures: The figures.
        run: Seconds, compilations and FLOPs of weight gradients, of all cells together.
    """

    study: str
    title: str
    about: str
    data: str
    scale: str
    eager: bool
    claims: Sequence[Claim]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    run: Figures = field(default_factory=dict)
