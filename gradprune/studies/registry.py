"""The studies by name."""

from __future__ import annotations

from .capacity import CapacityStudy
from .lab import LabStudy
from .lottery import LotteryStudy
from .robustness import RobustnessStudy
from .study import Study
from .usefulness import UsefulnessStudy

STUDIES: dict[str, Study] = {
    one.name: one for one in (CapacityStudy(), UsefulnessStudy(), LotteryStudy(), LabStudy(), RobustnessStudy())
}
"""In the order in which they are listed, and run by ``all``."""
