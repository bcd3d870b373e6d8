"""Training on several devices, one process each, as ``torchrun`` starts them, on torch's own engines.

Note [Where training communicates]: the attack never does; every process attacks its own share of the batch with whole
weights. The outer step does as it always does: gradients are averaged (DDP), or averaged and scattered (FSDP2), during
the backward pass, and the loss is averaged, so that one that is not finite ends training everywhere. After an update
the buffers of the first process are sent to the others, in one piece: with DDP's own way, at the next forward pass, the
attacks in between would meet other batch-norm statistics on every process. With FSDP2 the attack runs on a replica,
into which the weights are gathered once per iteration; what is sharded is gradients, optimizer state and the weights of
the outer step, so that the replica is what an inner loop without communication costs.

Everything here may be called without other processes, and then communicates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .trainer import AdversarialTrainer

T = TypeVar("T")

Parallel = Literal["auto", "none"]


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
    total = counts.clone()
    if processes() > 1:
        dist.all_reduce(total)
    return total


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def model_state(trainer: AdversarialTrainer) -> dict[str, Any]:
    """``state_dict()`` of the model, whole and on the CPU: on the first process; all have to call, the others get ``{}``.

    It is the same whatever engine made it, and can be loaded with any other and any number of processes.
    """
    return _whole(trainer.model.state_dict())


def optimizer_state(trainer: AdversarialTrainer) -> dict[str, Any]:
    """``state_dict()`` of the optimizer, as ``model_state`` returns that of the model."""
    return _whole(trainer.optimizer.state_dict())


def averages_state(trainer: AdversarialTrainer) -> dict[str, Any]:
    """The moving average of the weights by their names, as ``model_state`` returns the weights; empty without one."""
    names = [name for name, _ in trainer.model.named_parameters()]
    return _whole(dict(zip(names, trainer.averages, strict=False)))


def load_states(
    trainer: AdversarialTrainer,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
    averages_state: dict[str, Any] | None = None,
) -> None:
    """Load what the functions above returned on the first process; every process has to pass all of it."""
    trainer.model.load_state_dict(model_state)
    trainer.optimizer.load_state_dict(optimizer_state)
    if averages_state:
        for (name, _), average in zip(trainer.model.named_parameters(), trainer.averages, strict=True):
            average.copy_(averages_state[name])


def _whole(value: Any) -> Any:
    """A nested dictionary with its tensors whole and on the CPU."""
    if isinstance(value, dict):
        parts = {key: _whole(part) for key, part in value.items()}
        return parts if is_first() else {}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return value.detach().cpu() if isinstance(value, Tensor) else value
