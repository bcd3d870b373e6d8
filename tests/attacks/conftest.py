"""Digits, and networks that were trained on them in three ways, shared by all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from digit_networks import DigitNetworks, load_networks

from gradprune.workloads.digits import Digits, load_digits


@pytest.fixture(scope="session")
def digits() -> Digits:
    """The digits of scikit-learn."""
    return load_digits()


@pytest.fixture(scope="session")
def networks() -> DigitNetworks:
    """A plain, an FGSM-trained and a PGD-trained network. No test may change them."""
    return load_networks()


@pytest.fixture
def double() -> Iterator[None]:
    """Make float64 the default: reference libraries allocate with the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
