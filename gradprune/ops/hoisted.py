"""What stands for a hoisted value in the graph of a model until torch has divided it into forward and backward."""

import torch
from torch.fx.node import has_side_effect

from .library import LIBRARY

LIBRARY.define("hoisted(Tensor weight, int position) -> Tensor")

# Torch would take it out of a forward pass that does not read it, and have the backward pass compute it.
hoisted = has_side_effect(torch.ops.gradprune.hoisted.default)
"""``hoisted(weight, position)``: the hoisted value of that position, which depends on a weight. It is replaced by an
input before anything is compiled, so it is never computed."""
