"""Data sets by name, read one batch at a time."""

from __future__ import annotations

import hashlib
import inspect
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprune.errors import AttackError, OptionError, unknown

from .vision import let_torchvision_import

DIGITS, TORCHVISION = "digits", "torchvision:"
FORMS = "a folder with a folder of images for each class, a .npz file with x and y, torchvision:NAME or digits"
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
Array = np.ndarray[Any, Any]
Sample = tuple[Array, int]
"""An input ``(C, H, W)``, of integers from 0 to 255 or of floats, and its label."""


@dataclass(frozen=True)
class DataOptions:
    """Which data.

    Attributes:
        name: In one of the ``FORMS``.
        root: Where torchvision keeps its data sets.
        download: Let torchvision download them.
        image_size: Side that images are resized and cropped to; ``None`` to leave them as they are.
        grey: Read the images of a folder as grey ones ``(1, H, W)`` instead of ``(3, H, W)``.
        limit: How many samples, spread evenly over the data set; ``None`` for all.
        train: The part to train on instead of the part to test on, of data sets that have both.
    """

    name: str
    root: Path = Path("data")
    download: bool = False
    image_size: int | None = None
    grey: bool = False
    limit: int | None = None
    train: bool = False


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: What it is called in tables.
        fingerprint: A hash of what is in it.
        index: Which of its samples are used.
        read: The sample at a place.
        labels: Smallest and largest label; ``None`` if that is not known before all have been read.
    """

    name: str
    fingerprint: str
    index: Sequence[int]
    read: Callable[[int], Sample]
    labels: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The samples used from ``begin`` up to ``end``, see ``take``."""
        return self.take(range(begin, min(end, len(self))))

    def take(self, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Some of the samples used: inputs ``(N, ...)``, float32, and labels ``(N,)``, int64.

        Raises:
            AttackError: They cannot be read, or are not all of one shape.
        """
        samples = [self.read(self.index[row]) for row in rows]
        shapes = {image.shape for image, _ in samples}
        if len(shapes) > 1:
            first, second = sorted(shapes)[:2]
            raise AttackError(f"the samples of {self.name} are of shapes {first} and {second}: pass --image-size N")
        x = torch.from_numpy(np.stack([_scaled(image) for image, _ in samples]))
        return x, torch.tensor([label for _, label in samples], dtype=torch.int64)


def load_data(options: DataOptions) -> Data:
    """The data asked for.

    Raises:
        OptionError: There is no such data, or it is not what it should be.
    """
    path = Path(options.name)
    if options.name == DIGITS:
        count, mark, read, labels = _digits(options)
    elif options.name.startswith(TORCHVISION):
        count, mark, read, labels = _torchvision(options)
    elif path.suffix == ".npz":
        count, mark, read, labels = _arrays(path)
    elif path.is_dir():
        count, mark, read, labels = _folder(path, options)
    else:
        problem = "is no data set" if path.exists() else "does not exist"
        raise OptionError(f"--data {options.name!r} {problem}: pass {FORMS}")
    if not count:
        raise OptionError(f"--data {options.name} holds no samples")
    used = min(options.limit or count, count)
    index = [place * count // used for place in range(used)]
    digest = hashlib.sha256(f"{mark} {options.image_size} {used} of {count}".encode()).hexdigest()
    return Data(options.name, digest, index, read, labels)


Source = tuple[int, str, Callable[[int], Sample], tuple[int, int] | None]
"""How many samples there are, a hash or description of them, what reads one, and smallest and largest label."""


def _digits(options: DataOptions) -> Source:
    from .digits import load_digits

    data = load_digits()
    x, y = (data.train_x, data.train_y) if options.train else (data.test_x, data.test_y)
    return _of_arrays(x.numpy(), y.numpy())


def _arrays(path: Path) -> Source:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise OptionError(f"--data {path} is no archive of arrays: write one with numpy.savez({path.name!r}, x=x, y=y)")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("x", "y") if name in file}
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise OptionError(f"cannot read --data {path}: {error}") from error
    if not (set(arrays) == {"x", "y"} and all(isinstance(array, np.ndarray) for array in arrays.values())):
        raise OptionError(
            f"--data {path} has to hold x, inputs (N, C, H, W), and y, labels (N,): np.savez(path, x=, y=)"
        )
    x, y = arrays["x"], arrays["y"]
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or not np.issubdtype(y.dtype, np.integer):
        raise OptionError(
            f"--data {path} has to hold inputs (N, ...) and integer labels (N,), not x of shape {x.shape} and y of "
            f"{y.dtype} and shape {y.shape}"
        )
    if not (np.issubdtype(x.dtype, np.integer) or np.issubdtype(x.dtype, np.floating)):
        raise OptionError(f"--data {path} has to hold numbers in x, not {x.dtype}")
    return _of_arrays(x, y)


def _of_arrays(x: Array, y: Array) -> Source:
    digest = hashlib.sha256(f"{x.dtype} {x.shape} {y.dtype}".encode())
    digest.update(np.ascontiguousarray(x).data)
    digest.update(np.ascontiguousarray(y).data)
    labels = (int(y.min()), int(y.max())) if len(y) else None
    return len(x), digest.hexdigest(), lambda place: (x[place], int(y[place])), labels


def _folder(path: Path, options: DataOptions) -> Source:
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = [
        (file, label)
        for label, folder in enumerate(classes)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGES
    ]
    if not files:
        raise OptionError(f"--data {path} has no folders with images: put those of each class into one, by its name")
    mode = "L" if options.grey else "RGB"
    listing = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file, _ in files]

    def read(place: int) -> Sample:
        from PIL import Image

        file, label = files[place]
        try:
            with Image.open(file) as image:
                return _as_array(image.convert(mode), options.image_size), label
        except OSError as error:
            raise AttackError(f"cannot read the image {file}: {error}") from error

    return len(files), f"{mode} {listing}", read, (0, len(classes) - 1)


def _torchvision(options: DataOptions) -> Source:
    """The part asked for of one of torchvision's data sets."""
    let_torchvision_import()
    from torchvision import datasets

    name = options.name.removeprefix(TORCHVISION)
    if name not in datasets.__all__:
        raise OptionError(unknown("torchvision data set", name, datasets.__all__))
    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {}
    if "root" in parameters:
        arguments["root"] = str(options.root)
    if "train" in parameters:
        arguments["train"] = options.train
    elif "split" in parameters:
        test = "val" if name in ("ImageNet", "Places365", "Imagenette") else "test"
        arguments["split"] = {"Places365": "train-standard"}.get(name, "train") if options.train else test
    if "download" in parameters:
        arguments["download"] = options.download
    try:
        data = kind(**arguments)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise OptionError(
            f"--data {options.name}: {str(error).splitlines()[0]}: pass --data-root DIR with the data, or --download"
        ) from error

    def read(place: int) -> Sample:
        image, label = data[place]
        if not isinstance(label, int):
            raise AttackError(f"{options.name} is not for classification: its labels are {type(label).__name__}")
        return _as_array(image, options.image_size), label

    part = " train" if options.train else ""
    mark = hashlib.sha256(f"{name} {options.root.resolve()}{part}".encode())
    for place in {0, len(data) // 2, len(data) - 1} if len(data) else ():
        mark.update(read(place)[0].tobytes())
    classes = getattr(data, "classes", None)
    return len(data), mark.hexdigest(), read, (0, len(classes) - 1) if classes else None


def _as_array(image: Any, size: int | None) -> Array:
    """A PIL image as ``(C, H, W)``, resized by its smaller side and cropped in the middle to ``size``."""
    if size is not None:
        width, height = image.size
        scale = size / min(width, height)
        image = image.resize((max(size, round(width * scale)), max(size, round(height * scale))))
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _scaled(values: Array) -> Array:
    """Float32; integers, which run from 0 to 255, divided by 255."""
    scaled = values.astype(np.float32)
    return scaled / np.float32(255) if np.issubdtype(values.dtype, np.integer) else scaled
