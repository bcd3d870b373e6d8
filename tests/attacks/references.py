"""The libraries that attacks are compared with, imported in one place; ``make`` installs them."""

from __future__ import annotations

import os
import tempfile
from unittest import mock

from gradprune.workloads.vision import let_torchvision_import

let_torchvision_import()

import foolbox  # noqa: E402
import torchattacks  # noqa: E402

# ART writes its settings into the home directory, where another process of the tests may read half of them.
with tempfile.TemporaryDirectory() as _home, mock.patch.dict(os.environ, HOME=_home):
    from art.attacks import evasion as art
    from art.estimators.classification import PyTorchClassifier as ArtClassifier

__all__ = ["ArtClassifier", "art", "foolbox", "torchattacks"]
