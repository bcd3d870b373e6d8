"""How large ``bench tables`` is: as the paper has it, for two cores, or hardly at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .cases import SMALL_RESNET, TINY, Case, timm_case
from .table_attacks import BATCHES, NETWORKS, Lengths, Row
from .table_text import TextLengths
from .verdict import Length

MakeCase = Callable[[str, int], Case]
"""Of one of ``NETWORKS`` and a batch."""


@dataclass(frozen=True)
class Scale:
    """Sizes of all that is measured.

    Attributes:
        name: On the command line.
        purpose: What it is for.
        batches: What stands for each batch of the paper.
        lengths: Of the attacks.
        make: Makes a case.
        any_batch: Whether the batches of Table 2 share code that is compiled for any batch, which saves compilations.
        training: What Figure 2 trains.
        training_steps: Of the attacks of Figure 2.
        text: Of the attacks of Table 4.
        texts: How many sentences Table 4 attacks.
        packages: What its networks come from.
    """

    name: str
    purpose: str
    make: MakeCase
    batches: Mapping[int, int] = field(default_factory=lambda: {batch: batch for batch in BATCHES})
    lengths: Lengths = field(default_factory=Lengths)
    any_batch: bool = False
    training: Case = replace(SMALL_RESNET, batch=128)  # noqa: RUF009 (a frozen value)
    training_steps: tuple[int, ...] = (1, 3, 7, 10, 20)
    text: TextLengths = field(default_factory=TextLengths)
    texts: int = 1
    packages: frozenset[str] = frozenset({"timm"})

    def __str__(self) -> str:
        return f"{self.name}: {self.purpose}"


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
    apgd=4,
    cw=4,
    momentum=1,
    recommended=4,
    standard=Length(steps=2, queries=10, targets=2),
)

SHORT_TEXT = TextLengths(
    layers=2, words=8, synonyms=4, population=4, generations=2, candidates=6, iterations=5, tries=10
)

SCALES = {
    scale.name: scale
    for scale in (
        Scale("paper", "the paper's sizes, for a GPU", partial(_networks, 224)),
        Scale(
            "small",
            "images of 64 pixels, smaller batches, short attacks, for two cores",
            partial(_networks, 64),
            dict(zip(BATCHES, (2, 4, 8, 16, 24, 32), strict=True)),
            SHORT,
            True,
            SMALL_RESNET,
            (1, 3, 7),
            SHORT_TEXT,
        ),
        Scale(
            "toy",
            "one tiny network in place of all, to try the command",
            _tiny,
            {batch: 2 + i for i, batch in enumerate(BATCHES)},
            SHORT,
            True,
            replace(TINY, batch=4),
            (1, 2),
            replace(SHORT_TEXT, layers=1, hidden=64, words=5),
            1,
            frozenset(),
        ),
    )
}
"""By their names."""


def case_of(scale: Scale, row: Row) -> Case:
    """What a row is measured on."""
    return scale.make(row.network, scale.batches[row.batch])
