"""Data sets as a training reads them."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradprune.errors import AttackError, OptionError
from gradprune.support.distributed import Ranks
from gradprune.training.data import (
    AUGMENTATIONS,
    Samples,
    check_labels,
    crop,
    flip,
    load_parts,
    training_loader,
    validation_loader,
)
from gradprune.workloads.data_sets import DataOptions, load_data

ALONE = Ranks()


def arrays(path: Path, samples: int = 20, classes: int = 4) -> DataOptions:
    """Samples that are told apart by their pixels."""
    x = np.arange(samples * 3 * 16).reshape(samples, 3, 4, 4).astype(np.float32)
    np.savez(path / "data.npz", x=x / x.max(), y=np.arange(samples) % classes)
    return DataOptions(str(path / "data.npz"))


def photos(folder: Path, names: list[str], count: int = 2, sides: tuple[int, ...] = (12,)) -> None:
    random = np.random.default_rng(len(names))
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            side = sides[number % len(sides)]
            Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
                folder / name / f"{number}.png"
            )


def everything(loader: torch.utils.data.DataLoader) -> torch.Tensor:
    return torch.cat([x.flatten(1) for x, _ in loader])


# Augmentation


def test_flips_mirror_some_images_and_leave_the_others() -> None:
    x = torch.rand(64, 3, 4, 6)
    flipped = flip(x)
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    same = (flipped == x).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 10 < mirrored.sum() < 54


def test_crops_are_moved_by_up_to_an_eighth() -> None:
    x = torch.rand(300, 2, 16, 16) + 0.1
    moved = crop(x)
    seen = set()
    for image, result in zip(x, moved, strict=True):
        framed = torch.zeros(2, 20, 20)
        framed[:, 2:-2, 2:-2] = image
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(framed[:, i : i + 16, j : j + 16], result)]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) == 25


# Loaders


def test_a_batch_is_its_samples(tmp_path: Path) -> None:
    samples = Samples(load_data(arrays(tmp_path)))
    loader = training_loader(samples, 6, ALONE, workers=0, seed=0)
    (x, y), *others = list(loader)
    assert x.shape == (6, 3, 4, 4)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert [len(x) for x, _ in others] == [6, 6]  # two samples wait for the next epoch
    known = {samples[row][0].sum().item(): samples[row][1].item() for row in range(20)}
    assert [known[image.sum().item()] for image in x] == y.tolist()


def test_fewer_samples_than_a_batch_are_one(tmp_path: Path) -> None:
    loader = training_loader(Samples(load_data(arrays(tmp_path))), 64, ALONE, workers=0, seed=0)
    assert [len(x) for x, _ in loader] == [20]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_follow_from_torchs_seed(tmp_path: Path, workers: int) -> None:
    samples = Samples(load_data(arrays(tmp_path)), list(AUGMENTATIONS))
    loader = training_loader(samples, 5, ALONE, workers=workers, seed=0)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(everything(loader))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_processes_share_the_samples(tmp_path: Path) -> None:
    data = load_data(arrays(tmp_path, samples=21))
    parts = [validation_loader(data, 4, Ranks(rank, 2), workers=0) for rank in range(2)]
    shares = [everything(part) for part in parts]
    assert sorted(map(len, shares)) == [10, 11]
    assert len(torch.cat(shares).unique(dim=0)) == 21
    even = load_data(DataOptions(data.name, limit=20))
    loaders = [training_loader(Samples(even), 5, Ranks(rank, 2), workers=0, seed=0) for rank in range(2)]
    assert len(torch.cat([everything(loader) for loader in loaders]).unique(dim=0)) == 20


def test_images_of_two_sizes_are_named(tmp_path: Path) -> None:
    photos(tmp_path, ["cat"], sides=(12, 10))
    loader = training_loader(Samples(load_data(DataOptions(str(tmp_path)))), 2, ALONE, workers=0, seed=0)
    with pytest.raises(AttackError, match="--image-size"):
        next(iter(loader))


# Parts


def test_digits_are_trained_on_without_those_that_are_evaluated() -> None:
    train, validation = load_parts(DataOptions("digits"), None, 0)
    assert validation is not None
    assert (len(train), len(validation)) == (1212, 135)
    assert set(train.index).isdisjoint(validation.index)
    assert train.labels == (0, 9)
    evaluated = load_data(DataOptions("digits"))
    images = [data.batch(0, len(data))[0].flatten(1) for data in (train, validation, evaluated)]
    # Some digits of the whole data set are there twice, but not hundreds of them.
    assert len(torch.cat(images).unique(dim=0)) > 1790


def test_what_is_held_out_depends_on_share_and_seed_alone(tmp_path: Path) -> None:
    options = arrays(tmp_path)
    train, validation = load_parts(options, 0.25, 3)
    assert validation is not None
    assert sorted([*train.index, *validation.index]) == list(range(20))
    assert len(validation) == 5
    again, other = load_parts(options, 0.25, 3)[1], load_parts(options, 0.25, 4)[1]
    assert again is not None
    assert other is not None
    assert again.index == validation.index != other.index
    assert load_parts(options, 0.0, 3)[1] is None
    with pytest.raises(OptionError, match="too few"):
        load_parts(arrays(tmp_path, samples=1), 0.5, 0)


def test_a_folder_that_is_divided_already(tmp_path: Path) -> None:
    photos(tmp_path / "train", ["cat", "dog"], count=3)
    photos(tmp_path / "val", ["cat", "dog"], count=1)
    train, validation = load_parts(DataOptions(str(tmp_path)), None, 0)
    assert validation is not None
    assert (len(train), len(validation)) == (6, 2)
    assert train.batch(0, 6)[1].tolist() == [0, 0, 0, 1, 1, 1]
    train, validation = load_parts(DataOptions(str(tmp_path)), 0.5, 0)  # of the images in train
    assert validation is not None
    assert (len(train), len(validation)) == (3, 3)
    (tmp_path / "val" / "eel").mkdir()
    with pytest.raises(OptionError, match="eel"):
        load_parts(DataOptions(str(tmp_path)), None, 0)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_training_part_of_a_torchvision_data_set(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 4)):
        images = np.full((count, 28, 28), count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, count, 28, 28) + images.tobytes())
        labels = bytes(number % 10 for number in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels)
    options = DataOptions("torchvision:MNIST", root=tmp_path)
    train, validation = load_parts(options, 0.25, 0)
    assert validation is not None
    assert (len(train), len(validation), train.labels) == (9, 3, (0, 9))
    x, _ = train.batch(0, 9)
    assert x.shape == (9, 1, 28, 28)
    assert torch.allclose(x, torch.tensor(12 / 255))
    assert len(load_data(options)) == 4
    assert (
        load_data(options).fingerprint
        != load_data(DataOptions("torchvision:MNIST", root=tmp_path, train=True)).fingerprint
    )


def test_labels_have_to_be_classes_of_the_model(tmp_path: Path) -> None:
    data = load_data(arrays(tmp_path))
    check_labels(data, 4)
    with pytest.raises(OptionError, match="from 0 to 3, and the model has 3 classes"):
        check_labels(data, 3)
    np.savez(tmp_path / "odd.npz", x=np.zeros((2, 3)), y=np.array([-1, 0]))
    with pytest.raises(OptionError, match="from -1 to 0"):
        check_labels(load_data(DataOptions(str(tmp_path / "odd.npz"))), 3)
