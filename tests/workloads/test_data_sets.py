"""Data sets by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradprune.errors import AttackError, OptionError
from gradprune.workloads.data_sets import DataOptions, load_data


def save(path: Path, **arrays: object) -> str:
    np.savez(path / "data.npz", **arrays)
    return str(path / "data.npz")


def test_the_built_in_digits() -> None:
    data = load_data(DataOptions("digits"))
    x, y = data.batch(0, len(data))
    assert x.shape == (450, 1, 8, 8)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)


def test_integers_are_divided_by_255_and_floats_are_not(tmp_path: Path) -> None:
    x = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    y = np.array([1, 0])
    for kind in (np.uint8, np.int64):
        got, labels = load_data(DataOptions(save(tmp_path, x=x.astype(kind), y=y.astype(np.uint8)))).batch(0, 2)
        assert torch.equal(got, torch.from_numpy(x.astype(np.float32)) / 255)
        assert labels.tolist() == [1, 0]
    got, _ = load_data(DataOptions(save(tmp_path, x=x / 95.0, y=y))).batch(1, 2)
    assert torch.equal(got, torch.from_numpy((x / 95.0).astype(np.float32))[1:])


def test_a_limit_is_spread_evenly(tmp_path: Path) -> None:
    name = save(tmp_path, x=np.zeros((10, 2)), y=np.arange(10))
    data = load_data(DataOptions(name, limit=4))
    assert list(data.index) == [0, 2, 5, 7]
    assert data.batch(1, 9)[1].tolist() == [2, 5, 7]
    assert len(load_data(DataOptions(name, limit=99))) == 10


def test_a_fingerprint_is_of_what_is_in_it(tmp_path: Path) -> None:
    x, y = np.zeros((4, 2)), np.arange(4)
    first = load_data(DataOptions(save(tmp_path, x=x, y=y))).fingerprint
    assert load_data(DataOptions(save(tmp_path, x=x, y=y))).fingerprint == first
    x[3, 1] = 1e-9
    assert load_data(DataOptions(save(tmp_path, x=x, y=y))).fingerprint != first
    x[3, 1] = 0
    assert load_data(DataOptions(save(tmp_path, x=x, y=y), limit=2)).fingerprint != first


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x": np.zeros((2, 3))}, "has to hold x, inputs"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(3, np.int64)}, "shape"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(2)}, "float64"),
        ({"x": np.zeros((2, 3), "U1"), "y": np.zeros(2, np.int64)}, "numbers in x"),
        ({"x": np.array([None, None]), "y": np.zeros(2, np.int64)}, "cannot read"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0, np.int64)}, "no samples"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, arrays: dict, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        load_data(DataOptions(save(tmp_path, **arrays)))


@pytest.mark.parametrize("content", [b"x,y\n1,2\n", b"\x93NUMPY", b""])
def test_what_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.npz").write_bytes(content)
    with pytest.raises(OptionError, match=r"text\.npz is no archive of arrays: write one with numpy\.savez"):
        load_data(DataOptions(str(tmp_path / "text.npz")))


def test_what_is_in_an_archive_may_be_no_array_or_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x", "1 2")
        archive.writestr("y", "1 2")
    with pytest.raises(OptionError, match=r"text\.npz has to hold x, inputs"):
        load_data(DataOptions(str(tmp_path / "text.npz")))
    np.savez_compressed(tmp_path / "packed.npz", x=np.random.default_rng(0).random((4, 3)), y=np.arange(4))
    content = bytearray((tmp_path / "packed.npz").read_bytes())
    content[80:140] = bytes(60)
    (tmp_path / "packed.npz").write_bytes(content)
    with pytest.raises(OptionError, match=r"cannot read --data .*packed\.npz"):
        load_data(DataOptions(str(tmp_path / "packed.npz")))


@pytest.mark.parametrize("name", ["labels.txt", "photo.png"])
def test_a_file_that_is_no_data_is_not_said_to_be_absent(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("0")
    with pytest.raises(OptionError, match=f"{name}' is no data set"):
        load_data(DataOptions(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.npz", "damaged.npz", "torchvision:MNISTT", "."])
def test_what_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.npz").write_bytes(b"PK and no more")
    Path("empty").mkdir()
    with pytest.raises(OptionError) as raised:
        load_data(DataOptions(name))
    assert name.removeprefix("torchvision:") in str(raised.value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for label, (folder, shape) in enumerate({"cat": (12, 10, 3), "dog": (10, 14, 3), "eel": (10, 10)}.items()):
        (tmp_path / folder).mkdir()
        for number in range(2):
            pixels = random.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}{label}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_images(photos: Path) -> None:
    data = load_data(DataOptions(str(photos), image_size=8))
    x, y = data.batch(0, 6)
    assert x.shape == (6, 3, 8, 8)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    assert 0 <= x.min() < x.max() <= 1
    assert torch.equal(x[5, 0], x[5, 2])  # a grey one
    grey, _ = load_data(DataOptions(str(photos), image_size=8, grey=True)).batch(4, 6)
    assert grey.shape == (2, 1, 8, 8)
    assert load_data(DataOptions(str(photos), image_size=9)).fingerprint != data.fingerprint


def test_images_are_read_as_they_are(photos: Path) -> None:
    x, _ = load_data(DataOptions(str(photos))).batch(1, 2)
    expected = np.asarray(Image.open(photos / "cat" / "10.png")).transpose(2, 0, 1)
    assert torch.allclose(x[0] * 255, torch.from_numpy(expected.astype(np.float32)))


def test_images_of_two_sizes_and_damaged_ones_are_named(photos: Path) -> None:
    data = load_data(DataOptions(str(photos)))
    with pytest.raises(AttackError, match="--image-size"):
        data.batch(1, 3)
    (photos / "cat" / "00.png").write_bytes(b"damaged")
    with pytest.raises(AttackError, match="00.png"):
        data.batch(0, 1)


def test_a_changed_file_changes_the_fingerprint(photos: Path) -> None:
    before = load_data(DataOptions(str(photos))).fingerprint
    Image.fromarray(np.zeros((12, 10, 3), np.uint8)).save(photos / "cat" / "00.png")
    assert load_data(DataOptions(str(photos))).fingerprint != before


def test_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    data = load_data(DataOptions("torchvision:FakeData", image_size=16, limit=3))
    x, y = data.batch(0, 3)
    assert x.shape == (3, 3, 16, 16)
    assert x.max() <= 1
    assert y.dtype is torch.int64
    with pytest.raises(OptionError, match="--download"):
        load_data(DataOptions("torchvision:MNIST", root=tmp_path))
