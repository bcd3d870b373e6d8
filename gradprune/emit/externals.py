"""What generated code calls of cuDNN, cuBLAS and torch's attention kernels, computed by ATen on the CPU.

Products of half precision are computed as a tensor core has them: exact products, summed in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALVES = torch.float16, torch.bfloat16


class ExternKernels:
    """Stands for ``extern_kernels``."""

    @staticmethod
    def convolution(x: Tensor, weight: Tensor, *, bias: Tensor | None, **settings: Any) -> Tensor:
        """A convolution as Inductor calls it."""
        names = "stride", "padding", "dilation", "transposed", "output_padding", "groups"
        result: Tensor = _wide(torch.ops.aten.convolution)(x, weight, bias, *(settings[name] for name in names))
        return result

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Any other function of torch."""
        return _wide(getattr(torch, name))


def _wide(compute: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
        half = next((one.dtype for one in args if isinstance(one, Tensor) and one.dtype in HALVES), None)
        if half is not None:
            args = tuple(one.float() if isinstance(one, Tensor) and one.dtype == half else one for one in args)
        result = compute(*args, **kwargs)
        if half is not None:
            result = result.to(half)
        return result if out is None else out.copy_(result)

    return call


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """What attention takes the softmax of."""
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = _weights(query, key, bias, is_causal, scale or query.shape[-1] ** -0.5)
    output = (scores.softmax(-1) @ value.float()).to(query.dtype)
    rows = scores.shape[2]
    log_sumexp = scores.new_full((*scores.shape[:2], -(-rows // 32) * 32 if compute_log_sumexp else 0), torch.nan)
    if compute_log_sumexp:  # padded, and what is behind the rows is nobody's
        log_sumexp[:, :, :rows] = scores.logsumexp(-1)
    zero = torch.zeros((), dtype=torch.long)
    return output, log_sumexp, zero, zero.clone()


def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    log_sumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout_p: float,
    mask: Sequence[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factor, rows = scale or query.shape[-1] ** -0.5, query.shape[2]
    weights = (_weights(query, key, bias, is_causal, factor) - log_sumexp[:, :, :rows, None]).exp()
    wide = gradient.float()
    inner = weights * (wide @ value.float().transpose(-1, -2) - (wide * output.float()).sum(-1, keepdim=True))
    return (
        (inner @ key.float() * factor).to(query.dtype),
        (inner.transpose(-1, -2) @ query.float() * factor).to(query.dtype),
        (weights.transpose(-1, -2) @ wide).to(query.dtype),
        inner.to(query.dtype) if mask[3] else torch.empty(0),
    )


def register_attention() -> torch.library.Library:
    """Have the CPU know the attention that a GPU has; until what is returned is gone."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_efficient_attention", _attention, "CPU")
    library.impl("_scaled_dot_product_efficient_attention_backward", _attention_backward, "CPU")
    return library
