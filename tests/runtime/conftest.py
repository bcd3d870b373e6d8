from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import interpreted


@pytest.fixture
def no_code() -> Iterator[None]:
    """Graphs go through all of gradprune and are then run as they are; no kernels are generated."""
    with interpreted():
        yield
