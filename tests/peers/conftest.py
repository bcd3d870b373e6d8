"""Tests of one library share one accelerated network, which is compiled once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import interpreted
from peer_testing import Peers, network

from gradprune.workloads.vision import let_torchvision_import


@pytest.fixture(autouse=True)
def independent() -> None:
    """Let no test see the random state of another."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def compiled_for_the_module() -> Iterator[None]:
    """Keep compiled code for the tests of a file, without kernels: graphs are run as they are."""
    let_torchvision_import()
    with interpreted():
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def peers() -> Peers:
    """The network of most tests."""
    return Peers.of(network())
