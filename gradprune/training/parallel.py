"""Training on several devices, one process each, as ``torchrun`` starts them, on torch's own engines.

Note [Where training communicates]: the attack never does; every process attacks its own share of the batch with whole
weights. The outer step does as it always does: gradients are averaged (DDP), or averaged and scattered (FSDP2), during
the backward pass, and the loss is averaged, so that one that is not finite ends training everywhere. After an update
the buffers of the first process are sent to the others, in one piece: with DDP's own way, at the next forward pass, the
attacks in between would meet other batch-norm statistics on every process. With FSDP2 the attack runs on a replica,
into which the weights are gathered once per iteration; what is sharded is gradients, optimizer state and the weights of
the outer step, so that the replica is what an inner loop without communication costs. An error that one process alone
meets, such as inputs that are unfit to be attacked, ends that process, and ``torchrun`` then ends the others.

    replica = copy.deepcopy(model)  # FSDP2; for DDP nothing needs to be done
    fully_shard(model)
    trainer = AdversarialTrainer(model, SGD(model.parameters(), lr=0.1), PGDTraining(), replica=replica)

Everything here may be called without other processes, and then communicates nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprune.errors import OptionError

from .outer import Outer

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

Parallel = Literal["auto", "none"]
"""``"auto"``: FSDP2 for a model that it has sharded, else DDP where several processes train; ``"none"``: neither."""


# --- Processes --------------------------------------------------------------------------------------------------------


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return 0 if processes() == 1 else dist.get_rank()


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        dist.barrier()


def gather(value: T) -> list[T] | None:
    """What every process passes, by rank, on the first one; ``None`` on the others. Tensors have to be on the CPU."""
    if processes() == 1:
        return [value]
    values: list[Any] | None = [None] * processes() if is_first() else None
    dist.gather_object(value, values)
    return values


def scatter(values: Sequence[T] | None) -> T:
    """Of what the first process passes, one for each, this process's; the others pass ``None``."""
    if processes() == 1:
        assert values is not None
        return values[0]
    received: list[Any] = [None]
    dist.scatter_object_list(received, list(values) if values is not None else None)
    return received[0]  # type: ignore[no-any-return]


def share(value: T) -> T:
    """What the first process passes, on all of them."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def sum_counts(counts: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes() == 1:
        return counts
    total = counts.cuda() if dist.get_backend() == "nccl" else counts.clone()  # which knows no CPU
    dist.all_reduce(total)
    return total.to(counts.device)


# --- Engines ----------------------------------------------------------------------------------------------------------


class OneProcess:
    """Runs the outer step in this process alone; the others do as it does, and communicate.

    Attributes:
        model: The model that is trained.
        run: Loss and logits of a batch, as ``Outer`` has them.
    """

    def __init__(self, model: nn.Module, outer: Outer, *, compile: bool) -> None:
        self.model = model
        # One graph for each size of batch: a graph for all sizes is slower.
        self.run: Any = torch.compile(outer, dynamic=False) if compile else outer

    def collecting(self) -> AbstractContextManager[None]:
        """Around an outer step whose gradients wait for those of more batches."""
        return nullcontext()

    def mean(self, loss: Tensor) -> Tensor:
        """The mean over all processes."""
        return loss

    def share_buffers(self) -> None:
        """Give all processes the buffers of the first one."""

    def whole(self) -> nn.Module:
        """The model with its weights as they are now, to run as often as one likes without communication."""
        return self.model


class _Together(OneProcess):
    """What DDP and FSDP2 have in common."""

    def __init__(self, model: nn.Module, outer: Outer, *, compile: bool) -> None:
        super().__init__(model, outer, compile=compile)
        self._statistics = outer.statistics

    def mean(self, loss: Tensor) -> Tensor:
        """See ``OneProcess``."""
        return sum_counts(loss) / processes()

    def share_buffers(self) -> None:
        """See ``OneProcess``, and Note [Where training communicates]."""
        buffers = [buffer for buffer in (*self.model.buffers(), *(self._statistics or {}).values()) if buffer.numel()]
        if not buffers or processes() == 1:
            return
        with torch.no_grad():
            packed = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in buffers])
            dist.broadcast(packed, src=0)
            if not is_first():
                parts = packed.split([buffer.nbytes for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))  # cloned to be aligned


class Replicated(_Together):
    """DDP: every process has all weights; gradients are averaged during the backward pass, piece by piece.

    As ever with DDP, weights that the loss does not reach have to be frozen by ``requires_grad_(False)``.
    """

    def __init__(self, model: nn.Module, outer: Outer, *, compile: bool) -> None:
        super().__init__(model, outer, compile=compile)
        # The other order does the same, and warns. Either way torch compiles in pieces, so that the gradients of one
        # are averaged while the next one runs.
        self.run = nn.parallel.DistributedDataParallel(self.run, **_LEAVE_BUFFERS)
        self.share_buffers()

    def collecting(self) -> AbstractContextManager[None]:
        """See ``OneProcess``: gradients are averaged with those of the last batch."""
        return self.run.no_sync()  # type: ignore[no-any-return]


class Sharded(_Together):
    """FSDP2: every process has a part of the weights; the attack runs on a replica that has all of them.

    Gradients are averaged and scattered after every batch, however many are accumulated: they would have to be kept
    whole in between, which takes the memory that sharding saves.
    """

    def __init__(self, model: nn.Module, outer: Outer, replica: nn.Module, *, compile: bool) -> None:
        super().__init__(model, outer, compile=compile)
        self._replica = replica
        self.share_buffers()

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """See ``OneProcess``: the replica, into which the weights are gathered, unit by unit."""
        for module, copy in zip(self.model.modules(), self._replica.modules(), strict=True):
            copy.training = module.training
            if module is self.model or _is_unit(module):
                self._gather_unit(module, copy)
        for buffer, whole in zip(self.model.buffers(), self._replica.buffers(), strict=True):
            whole.copy_(buffer)
        return self._replica

    def _gather_unit(self, module: Any, copy: nn.Module) -> None:
        if _is_unit(module):
            module.unshard()
        for part, whole in _within_unit(module, copy):
            for weight, target in zip(part.parameters(recurse=False), whole.parameters(recurse=False), strict=True):
                target.copy_(weight)
        if _is_unit(module):
            module.reshard()


def engine(
    model: nn.Module, outer: Outer, *, compile: bool, parallel: Parallel, replica: nn.Module | None
) -> OneProcess:
    """What runs the outer step: by the number of processes, and by whether weights are sharded.

    Raises:
        OptionError: The model cannot be trained so.
    """
    if parallel == "none" or not (dist.is_available() and dist.is_initialized()):
        return OneProcess(model, outer, compile=compile)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise OptionError("pass the model itself, not wrapped by DDP: the trainer wraps what it runs, loss included")
    if any(_is_unit(module) for module in model.modules()):
        if replica is None:
            raise OptionError(
                "attacks on a model that FSDP has sharded run on a replica, which has to be made before: "
                "replica = copy.deepcopy(model); fully_shard(model); AdversarialTrainer(model, ..., replica=replica)"
            )
        return Sharded(model, outer, replica, compile=compile)
    if any(map(_is_sharded, model.parameters())):
        raise OptionError(
            'weights are distributed, and not by fully_shard: shard them with it, or pass parallel="none"'
        )
    return OneProcess(model, outer, compile=compile) if processes() == 1 else Replicated(model, outer, compile=compile)


_ddp_options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
# Up to torch 2.12 by its old name, which is deprecated since.
_LEAVE_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ddp_options else "broadcast_buffers": False
}


def _is_unit(module: Any) -> TypeGuard[FSDPModule]:
    """Whether FSDP2 gathers the weights of a module together."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _within_unit(module: nn.Module, copy: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A module and its copy, and all within them that is in no other unit."""
    yield module, copy
    for child, child_copy in zip(module.children(), copy.children(), strict=True):
        if not _is_unit(child):
            yield from _within_unit(child, child_copy)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def model_state(model: nn.Module) -> dict[str, Any]:
    """``state_dict()`` of a model, whole and on the CPU, on the first process; the others call, too, and get ``{}``.

    It is the same whatever engine made it, and can be loaded with any other and any number of processes.
    """
    return _whole(model.state_dict())  # type: ignore[no-any-return]


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``state_dict()`` of an optimizer, as ``model_state`` returns that of a model."""
    return _whole(optimizer.state_dict())  # type: ignore[no-any-return]


def averages_state(model: nn.Module, averages: Sequence[Tensor]) -> dict[str, Any]:
    """Moving averages of the weights by their names, as ``model_state`` returns the weights; empty without any."""
    names = [name for name, _ in model.named_parameters()]
    return _whole(dict(zip(names, averages, strict=False)))  # type: ignore[no-any-return]


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what ``model_state`` returned on the first process; every process has to pass all of it."""
    model.load_state_dict(_placed(state, model.state_dict()))


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what ``optimizer_state`` returned on the first process; every process has to pass all of it."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    like = {"state": {i: dict.fromkeys(state["state"].get(i, ()), weight) for i, weight in enumerate(weights)}}
    optimizer.load_state_dict(_placed(state, like))


def load_averages_state(model: nn.Module, averages: Sequence[Tensor], state: dict[str, Any]) -> None:
    """Load what ``averages_state`` returned on the first process; every process has to pass all of it."""
    for (name, _), average in zip(model.named_parameters(), averages, strict=False):
        average.detach().copy_(_placed(state[name], average))


def _is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is distributed over processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _whole(value: Any) -> Any:
    """A nested dictionary with its tensors whole and on the CPU."""
    if isinstance(value, dict):
        parts = {key: _whole(part) for key, part in value.items()}
        return parts if is_first() else {}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    if _is_sharded(value):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _placed(value: Any, like: Any) -> Any:
    """A nested dictionary with its tensors sharded where those in ``like`` are, and have their shape."""
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: _placed(part, like.get(key)) for key, part in value.items()}
    if not (isinstance(value, Tensor) and _is_sharded(like) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has all of it, and takes its part without communication.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
