"""Fixtures of all tests. Test files import ``helpers`` and ``zoo`` by name: pytest puts this folder on the path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.graph
from helpers import interpreted
from torch._functorch import config as functorch_config

from gradprune.passes import prepack_convolutions


def pytest_configure(config: pytest.Config) -> None:
    """Run every test on one thread, and pack every convolution: those of tests are too small for either to pay off.

    No test is to find a step that another one has stored.
    """
    torch.set_num_threads(1)
    prepack_convolutions.WORTH_FLOPS = 0
    functorch_config.enable_autograd_cache = False
    if config.getoption("markexpr") == "not inductor":
        torch._inductor.graph.GraphLowering.run = refuse_to_lower


def refuse_to_lower(*args: object, **options: object) -> None:
    raise AssertionError("a kernel is compiled: mark the test with @pytest.mark.inductor")


@pytest.fixture(autouse=True)
def independent() -> Iterator[None]:
    """Let no test see the random state or the compiled code of another."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_code() -> Iterator[None]:
    """Graphs go through all of gradprune and are then run as they are; no kernels are generated."""
    with interpreted():
        yield
