"""The studies by name."""

from __future__ import annotations

from .lab import LabStudy
from .study import Study

STUDIES: dict[str, Study] = {one.name: one for one in (LabStudy(),)}
"""In the order in which they are listed, and run by ``all``."""
