"""Where the tests of this folder run: on a GPU, or rehearsed on the CPU, see ``gpu_testing``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from gpu_testing import REHEARSAL
from helpers import interpreted

if "PYTEST_XDIST_WORKER" in os.environ:
    torch._inductor.config.compile_threads = 2  # for each of many processes


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; the CPU in a rehearsal."""
    if REHEARSAL:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device; GRADPRUNE_GPU_REHEARSE=1 rehearses on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """For what has no counterpart on a CPU."""
    if device.type != "cuda":
        pytest.skip("only a GPU can show it")
    return device


@pytest.fixture
def kernels() -> None:
    """For what generated kernels have to show: has them compiled in a short rehearsal too."""


@pytest.fixture(autouse=True)
def short_rehearsal(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a short rehearsal, run graphs as they are."""
    if REHEARSAL == "1" and "kernels" not in request.fixturenames:
        with interpreted():
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    """Begin without TF32, which cuDNN has on by default."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [one.allow_tf32 for one in flags]
    for one in flags:
        one.allow_tf32 = False
    yield
    for one, allowed in zip(flags, before, strict=True):
        one.allow_tf32 = allowed
