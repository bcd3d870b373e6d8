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


def on_gpu(tensor: Tensor) -> bool:
    """Whether what is done with a tensor is done later than it is called."""
    return not tensor.is_cpu


class Later:
    """The outcome of a comparison that a GPU makes when it comes to it.

    Args:
        differs: Zero if what was compared is equal, on the GPU.
    """

    def __init__(self, differs: Tensor) -> None:
        self._differs = differs.to("cpu", non_blocking=True)  # into pinned memory
        self._event = torch.cuda.current_stream(differs.device).record_event() if differs.is_cuda else None

    def are_equal(self) -> bool:
        """Wait for the outcome, and for nothing that was begun after the comparison."""
        if self._event is not None:
            self._event.synchronize()
        return not self._differs


def compare(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> Later:
    """Begin to compare tensors on GPUs with copies of them."""
    differences: list[Tensor] = []
    floats = [pair for pair in zip(tensors, copies, strict=True) if pair[0].is_floating_point()]
    with torch.no_grad():
        if floats:
            ours, theirs = map(list, zip(*floats, strict=True))
            differences += torch._foreach_norm(torch._foreach_sub(ours, theirs), float("inf"))
        for tensor, copy in zip(tensors, copies, strict=True):
            if not tensor.is_floating_point():
                differences.append((tensor != copy).any())
        # NaN, which is equal to nothing, is not zero either.
        return Later(torch.stack([one.to(tensors[0].device) for one in differences]).any())


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
