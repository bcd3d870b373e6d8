"""How large ``bench tables`` is: as the paper has it, for two cores, or hardly at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .cases import TINY, Case, timm_case
from .table_attacks import BATCHES, NETWORKS, Lengths, Row
from .verdict import Length

MakeCase = Callable[[str, int], Case]
"""Of one of ``NETWORKS`` and a batch."""


@dataclass(frozen=True)
class Scale:
    """Sizes of all that is measured.

    Attributes:
        name: On the command line.
        text: What it is for.
        batches: What stands for each batch of the paper.
        lengths: Of the attacks.
        make: Makes a case.
        packages: What its networks come from.
    """

    name: str
    text: str
    make: MakeCase
    batches: Mapping[int, int] = field(default_factory=lambda: {batch: batch for batch in BATCHES})
    lengths: Lengths = field(default_factory=Lengths)
    packages: frozenset[str] = frozenset({"timm"})

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def _networks(pixels: int, network: str, batch: int) -> Case:
    name = NETWORKS[network]
    options: dict[str, Any] = {"img_size": pixels} if network.startswith("ViT") else {}
    return timm_case(f"{name}-{pixels}" if not options else f"vit_base-{pixels}", batch, name, pixels, **options)


def _tiny(network: str, batch: int) -> Case:
    return replace(TINY, batch=batch)


SHORT = Lengths(
    pgd=3,
    iterations=3,
    queries=10,
    ensemble=2,
    apgd=5,
    cw=5,
    momentum=1,
    recommended=5,
    standard=Length(steps=2, queries=10, targets=2),
)

SCALES = {
    scale.name: scale
    for scale in (
        Scale("paper", "the paper's sizes, for a GPU", partial(_networks, 224)),
        Scale(
            "small",
            "images of 64 pixels, half the batches, short attacks, for two cores",
            partial(_networks, 64),
            {batch: batch // 2 for batch in BATCHES},
            SHORT,
        ),
        Scale(
            "toy",
            "one tiny network in place of all, to try the command",
            _tiny,
            {batch: 2 + i for i, batch in enumerate(BATCHES)},
            SHORT,
            frozenset(),
        ),
    )
}
"""By their names."""


def case_of(scale: Scale, row: Row) -> Case:
    """What a row is measured on."""
    return scale.make(row.network, scale.batches[row.batch])
