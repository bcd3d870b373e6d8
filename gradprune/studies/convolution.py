"""A 2-D convolution of one's own, forward and backward: ``unfold`` and matrix products [HW 1]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UnfoldConvolution(torch.autograd.Function):
    """Y = W X over the columns X of the input; dX = fold(W^T dY), dW = sum of dY X^T, db = sum of dY.

    Each gradient is computed only if it is needed, so that an attack computes the first alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
        """The convolution ``(N, out, H', W')`` of ``x`` ``(N, in, H, W)`` with ``weight`` ``(out, in, K, K)``."""
        columns = F.unfold(x, weight.shape[2:], stride=stride, padding=padding)
        ctx.save_for_backward(columns, weight)
        ctx.geometry = x.shape[2:], stride, padding
        height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
        return (weight.flatten(1) @ columns + bias[:, None]).view(len(x), len(weight), height, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """The gradients of input, weight and bias."""
        columns, weight = ctx.saved_tensors
        size, stride, padding = ctx.geometry
        gradient = gradients[0].flatten(2)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_columns = weight.flatten(1).T @ gradient
            of_x = F.fold(of_columns, size, weight.shape[2:], stride=stride, padding=padding)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient @ columns.mT).sum(0).view_as(weight)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2))
        return of_x, of_weight, of_bias, None, None


class UnfoldConv2d(nn.Conv2d):
    """``nn.Conv2d`` of square kernels with a bias, computed by ``UnfoldConvolution``."""

    def forward(self, x: Tensor) -> Tensor:
        """See ``nn.Conv2d``."""
        return UnfoldConvolution.apply(x, self.weight, self.bias, self.stride[0], self.padding[0])  # type: ignore[no-any-return]
