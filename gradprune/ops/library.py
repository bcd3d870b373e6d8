"""The torch library that gradprune's operators live in."""

import torch

LIBRARY = torch.library.Library("gradprune", "DEF")
