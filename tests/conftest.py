"""Fixtures of all tests. Test files import ``helpers`` and ``zoo`` by name: pytest puts this folder on the path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Run every test on one thread: operands are so small that threads would do little but wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def independent() -> Iterator[None]:
    """Let no test see the random state or the compiled code of another."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
