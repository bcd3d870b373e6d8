"""What is particular to GPUs: what they are told to do is done later, and CUDA graphs use their memory again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def storages(values: Sequence[Any]) -> set[int]:
    """Where the tensors among ``values`` have their memory; packed ones do not say."""
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_mkldnn]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def out_of_cuda_graphs(compiled: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Have a function whose outputs lie in the memory of a CUDA graph return copies of them.

    The next call frees that memory before it reads its inputs, and ``x_adv = step(x_adv, x, y)`` gives it an output of
    the call before. Outputs that share memory share it again; arguments that are returned are no copies.
    """

    def call(args: list[Any]) -> list[Any]:
        given = storages(args)
        outputs = list(compiled(args))
        copies: dict[int, torch.UntypedStorage] = {}
        for position, output in enumerate(outputs):
            if isinstance(output, Tensor) and not storages([output]) <= given:
                storage = output.untyped_storage()
                if storage._cdata not in copies:
                    copies[storage._cdata] = storage.clone()
                copy = torch.empty(0, dtype=output.dtype, device=output.device)
                memory = copies[storage._cdata]
                outputs[position] = copy.set_(memory, output.storage_offset(), output.shape, output.stride())
        return outputs

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
