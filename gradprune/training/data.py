"""Data to train on and to validate with, in torch's own terms, over the readers in ``workloads``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from gradprune.errors import OptionError
from gradprune.support.distributed import Ranks
from gradprune.workloads.data_sets import Data, DataOptions, load_data

TRAIN, VALIDATION = "train", "val"
"""Sub-folders of a folder of images that is divided already."""
HELD_OUT = 0.1
CROP = 8
"""A crop is moved by up to the side divided by this, as 4 pixels are of 32."""


def crop(x: Tensor) -> Tensor:
    """Move every image ``(N, C, H, W)`` at random; what comes in from outside is zero.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.
    """
    height, width = x.shape[-2:]
    reach = max(1, min(height, width) // CROP)
    padded = F.pad(x, (reach,) * 4).permute(0, 2, 3, 1)
    top, left = torch.randint(2 * reach + 1, (2, len(x), 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    moved = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def flip(x: Tensor) -> Tensor:
    """Mirror half of the images ``(N, C, H, W)``, left to right."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"crop": crop, "flip": flip}
"""What can be done to images while training, by name. Random numbers come from torch's own generator."""


@dataclass(frozen=True)
class Samples(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose samples are read, and augmented, a batch at a time.

    Attributes:
        data: Where they are read.
        augmentations: Of ``AUGMENTATIONS``, in this order.
    """

    data: Data
    augmentations: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([row])
        return x[0], y[0]

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs ``(N, ...)`` and labels ``(N,)``; a ``DataLoader`` prefers this to one sample at a time."""
        x, y = self.data.take(rows)
        for name in self.augmentations:
            x = AUGMENTATIONS[name](x)
        return x, y


def load_parts(options: DataOptions, held_out: float | None, seed: int) -> tuple[Data, Data | None]:
    """Data to train on, and to validate with.

    Args:
        options: Which data, see there; what is not divided into parts is divided here.
        held_out: Share of the data that is validated with instead of trained on; 0 for no validation. ``None`` is for
            the sub-folder ``val`` if there is one, and ``HELD_OUT`` otherwise.
        seed: Of the division.

    Raises:
        OptionError: There is no such data, or not enough of it.
    """
    train, validation = Path(options.name) / TRAIN, Path(options.name) / VALIDATION
    own: Data | None = None
    if train.is_dir():
        if validation.is_dir() and held_out is None:
            _check_classes(train, validation)
            own = load_data(replace(options, name=str(validation), limit=None))
        options = replace(options, name=str(train))
    data = load_data(replace(options, train=True))
    if own is not None or held_out == 0:
        return data, own
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(len(data) * (HELD_OUT if held_out is None else held_out)))
    if count >= len(data):
        raise OptionError(f"--data {options.name} has {len(data)} samples: too few to hold {count} out for validation")
    parts = [[data.index[row] for row in sorted(rows)] for rows in (order[count:], order[:count])]
    return replace(data, index=parts[0]), replace(data, index=parts[1])


def check_labels(data: Data, classes: int) -> None:
    """Make sure that labels are classes of the model, as far as they are known.

    Raises:
        OptionError: They are not.
    """
    least, most = data.labels or (0, 0)
    if least < 0 or most >= classes:
        raise OptionError(
            f"--data {data.name} has labels from {least} to {most}, and the model has {classes} classes, 0 to "
            f"{classes - 1}: pass a model with more (timm: --classes {most + 1}), or other labels"
        )


def training_loader(samples: Samples, batch_size: int, ranks: Ranks, *, workers: int, seed: int) -> DataLoader[Any]:
    """Batches of one size in random order; with several processes, this one's share.

    The samples behind the last whole batch wait for another epoch: a batch of another size would be compiled once more,
    and batch norm would normalise by the statistics of a few.

    Args:
        samples: The data.
        batch_size: Samples in a batch of this process.
        ranks: The processes that train together.
        workers: Processes that read ahead; 0 reads in this one.
        seed: Of the order with several processes, which must agree about it; one draws from torch's generator.
    """
    sampler = (
        DistributedSampler(samples, ranks.size, ranks.rank, seed=seed) if ranks.size > 1 else RandomSampler(samples)
    )
    return DataLoader(
        samples,
        min(batch_size, len(samples) // ranks.size),
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def validation_loader(data: Data, batch_size: int, ranks: Ranks, *, workers: int) -> DataLoader[Any]:
    """Batches in the order of the data; with several processes, this one's share, in which no sample is another's."""
    own = replace(data, index=data.index[ranks.rank :: ranks.size])
    return DataLoader(Samples(own), batch_size, num_workers=workers, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    """What ``Samples`` returns is a batch already; a function of its own because workers are sent its name."""
    return batch


def _check_classes(train: Path, validation: Path) -> None:
    """Classes are numbered by the order of their folders: these have to be the same on both sides."""
    names = [{folder.name for folder in part.iterdir() if folder.is_dir()} for part in (train, validation)]
    if other := sorted(names[0] ^ names[1]):
        raise OptionError(
            f"{train} and {validation} have to hold folders for the same classes, and only one of them has "
            f"{', '.join(other[:3])}: add the folders, empty if there are no images"
        )
