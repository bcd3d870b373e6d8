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
        self._differs = differs.to("cpu", non_blocking=differs.is_cuda)  # into pinned memory
        self._event = torch.cuda.current_stream(differs.device).record_event() if differs.is_cuda else None

    def are_equal(self) -> bool:
        """Wait for the outcome, and for nothing that was begun after the comparison."""
        if self._event is not None:
            self._event.synchronize()
        return not self._differs


def compare(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> Later:
    """Begin to compare tensors on GPUs with copies of them."""
    pairs = list(zip(tensors, copies, strict=True))
    floats = [pair for pair in pairs if _has_arithmetic(pair[0])]
    differences: list[Tensor] = []
    with torch.no_grad():
        if floats:
            ours, theirs = map(list, zip(*floats, strict=True))
            differences += torch._foreach_norm(torch._foreach_sub(ours, theirs), float("inf"))
        for tensor, copy in pairs:
            if not _has_arithmetic(tensor):
                as_bytes = tensor.is_floating_point()
                one, other = (value.view(torch.uint8) if as_bytes else value for value in (tensor, copy))
                differences.append((one != other).any())
        # NaN, which is equal to nothing, is not zero either.
        return Later(torch.stack([one.to(tensors[0].device) for one in differences]).any())


def _has_arithmetic(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


class StreamOrder:
    """Has the streams of one GPU wait for each other, where one makes what another uses.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._maker: torch.cuda.Stream | None = None
        self._made: torch.cuda.Event | None = None
        self._users: list[torch.cuda.Stream] = []

    def before_making(self) -> None:
        """Have the current stream wait until nobody uses what it is about to overwrite or to free."""
        current = torch.cuda.current_stream(self._device)
        for stream in (self._maker, *self._users):
            if stream is not None and stream != current:
                current.wait_stream(stream)
        self._maker, self._users = None, []

    def made(self) -> None:
        """Note that the current stream has been told to make all there is."""
        self._maker = torch.cuda.current_stream(self._device)
        self._made = self._maker.record_event()

    def before_use(self, tensors: Sequence[Tensor]) -> None:
        """Have the current stream wait until what it is about to use is made."""
        current = torch.cuda.current_stream(self._device)
        if self._maker is None or self._made is None or current in (self._maker, *self._users):
            return
        if torch.cuda.is_current_stream_capturing():
            return  # what a recording waits for must be in it, and torch has waited for all else
        current.wait_event(self._made)
        for tensor in tensors:
            if tensor.device == self._device:
                tensor.record_stream(current)  # should it be freed, its memory is not used again before that
        self._users.append(current)


def stream_orders(values: Sequence[Tensor]) -> list[StreamOrder]:
    """One for each GPU that there are values on."""
    return [StreamOrder(device) for device in dict.fromkeys(value.device for value in values) if device.type == "cuda"]


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, and does not take a detour through float32."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


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
