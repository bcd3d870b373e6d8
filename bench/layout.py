"""gradprune with each decision about memory layout and 1x1 convolutions turned round, for GPUs."""

from __future__ import annotations

import argparse
from typing import Any

from .ablation import AblationBenchmark
from .baselines import GRADPRUNE, Baseline, compiled_by_us
from .store import Settings

DEFAULT = ("resnet18-224-b32", "mobilenetv2-224-b32", "convnext_atto-224-b32")

TURNED: dict[str, dict[str, Any]] = {
    GRADPRUNE: {},
    "weights as they are": {"disable": ("channels-last-weights",)},
    "no channels last": {"disable": ("channels-last-weights",), "inductor": {"layout_optimization": False}},
    "channels last always": {"inductor": {"force_layout_optimization": True}},
    "1x1 as products": {"inductor": {"conv_1x1_as_mm": True}},
}
"""Options by the names in the table. What Inductor does by itself depends on the groups and widths of convolutions."""


class LayoutBenchmark(AblationBenchmark):
    """``bench layout``."""

    name = "layout"
    help = "gradprune with each decision about memory layout turned round, for GPUs"
    label = "time per step with it / as shipped (right of 1: what is shipped is faster), quartiles of the rounds"
    legend = """\
- without / with: how many times as long a step takes as shipped takes, by rounds, quartiles in brackets. Below 1 what
  is shipped is the slower.
- weights as they are: not converted to channels last in the prologue. no channels last: nor does Inductor convert
  anything. channels last always: also where Inductor expects to lose. 1x1 as products: 1x1 convolutions are matrix
  products. With --channels-last, images and weights are given so.
- saved MB by gradprune's report, peak MB measured, compile s with empty disk caches."""

    default = DEFAULT

    def baselines(self, arguments: argparse.Namespace, settings: Settings) -> list[Baseline]:
        """What to measure."""
        return [Baseline(name, name, compiled_by_us(name, **options)) for name, options in TURNED.items()]
