"""The libraries that attacks are compared with, imported in one place; ``make`` installs them."""

from __future__ import annotations

from gradprune.workloads.vision import let_torchvision_import

let_torchvision_import()

import foolbox  # noqa: E402
import torchattacks  # noqa: E402
from art.attacks import evasion as art  # noqa: E402
from art.estimators.classification import PyTorchClassifier as ArtClassifier  # noqa: E402

__all__ = ["ArtClassifier", "art", "foolbox", "torchattacks"]
