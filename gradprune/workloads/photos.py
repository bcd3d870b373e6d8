"""Real photographs that are already on the disk, cut into as many different pictures as a batch needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SEED = 0

SKIMAGE_FILES = ("astronaut.png", "coffee.png", "chelsea.png")
"""Colour photographs that scikit-image ships inside its wheel."""


def photographs() -> list[Tensor]:
    """The whole photographs.

    scikit-learn's two are always there. scikit-image's are read from its installed files rather than by
    ``skimage.data``, whose functions may turn to the network for a file that is missing.

    Returns:
        Tensors ``(3, H, W)``, float32 in [0, 1].
    """
    from sklearn.datasets import load_sample_images

    pictures = [np.asarray(image, dtype=np.float32) / 255 for image in load_sample_images().images]
    pictures += _from_skimage()
    return [torch.from_numpy(np.ascontiguousarray(picture[..., :3].transpose(2, 0, 1))) for picture in pictures]


def photo_batch(count: int, size: int) -> Tensor:
    """Different square crops of the photographs.

    The first crops are the largest square in the middle of each photograph; further ones are smaller and lie anywhere.
    The same arguments always give the same crops.

    Args:
        count: How many.
        size: Side in pixels.

    Returns:
        Photographs ``(count, 3, size, size)``, float32 in [0, 1].
    """
    sources = photographs()
    generator = torch.Generator().manual_seed(SEED)
    crops = []
    for index in range(count):
        source = sources[index % len(sources)]
        _, height, width = source.shape
        where = torch.rand(3, generator=generator)
        whole = index < len(sources)
        side = int(min(height, width) * (1.0 if whole else 0.5 + 0.4 * float(where[0])))
        top = int((height - side) * (0.5 if whole else float(where[1])))
        left = int((width - side) * (0.5 if whole else float(where[2])))
        crop = source[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops).clamp(0, 1)


def _from_skimage() -> list[np.ndarray]:
    """The photographs of scikit-image that are there: arrays ``(H, W, C)`` in [0, 1]."""
    try:
        import skimage
    except ImportError:
        return []
    from matplotlib.image import imread

    folder = Path(skimage.__file__).parent / "data"
    return [imread(folder / name).astype(np.float32) for name in SKIMAGE_FILES if (folder / name).is_file()]
