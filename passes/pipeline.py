"""The passes, in the order in which they run. This list is the order, the printed list and part of the cache key."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradprune.errors import PassError
from gradprune.graph.captured_graph import CapturedGraph
from gradprune.graph.step_graph import StepGraph

from .attention_by_products import AttentionByProducts
from .base import Pass, PassResult, Stage, Tier
from .blocked_image_gradients import blocked_image_gradients
from .channels_last_weights import channels_last_weights
from .dgrad_as_convolution import dgrad_as_convolution
from .early_masks import EarlyMasks
from .fold_batch_norm import FoldBatchNorm
from .gather_max_pool import GatherMaxPool
from .hoist_invariants import HoistInvariants
from .narrow_outputs import NarrowOutputs
from .narrow_rows import NarrowRows
from .prepack_convolutions import PrepackConvolutions
from .prepack_linears import prepack_linears
from .rewrite import LocalRewrite
from .select_outputs import SelectOutputs
from .shape_only_operands import shape_only_operands
from .unfuse_bias import unfuse_bias
from .verify import Verifier
from .winograd_convolutions import winograd_convolutions

PIPELINE: tuple[Pass, ...] = (
    FoldBatchNorm(),
    SelectOutputs(),
    NarrowOutputs(),
    AttentionByProducts(),
    NarrowRows(),
    dgrad_as_convolution,
    shape_only_operands,
    GatherMaxPool(),
    EarlyMasks(),
    blocked_image_gradients,
    channels_last_weights,
    winograd_convolutions,
    PrepackConvolutions(),
    prepack_linears,
    unfuse_bias,
    HoistInvariants(),
)

PASS_NAMES: tuple[str, ...] = tuple(step.name for step in PIPELINE)
"""All passes, the one that runs before autograd first."""


@dataclass(frozen=True)
class PassRecord:
    """One pass of one compilation.

    Attributes:
        name: Name of the pass.
        tier: What it does to the numbers.
        seconds: Time it took.
        ops_before: Operators in the graph before it ran.
        ops_after: Operators in the graph after it ran.
        result: What it did.
    """

    name: str
    tier: Tier
    seconds: float
    ops_before: int
    ops_after: int
    result: PassResult


def count_ops(graph: CapturedGraph | StepGraph) -> int:
    """Number of operators in the graph."""
    return sum(1 for _ in graph.calls())


def select_passes(
    disable: Collection[str] = (), exact_order: bool = False, extra: Sequence[Pass] = ()
) -> tuple[Pass, ...]:
    """The passes to run, in order.

    Args:
        disable: Names of passes to leave out; those that need one of them are left out too.
        exact_order: Leave out those that reorder floating point.
        extra: Passes of the user's own. They come last, but before the one that hoists, so that what they make of
            weights is hoisted.
    """
    *before, last = PIPELINE
    chosen = [
        step
        for step in (*before, *extra, last)
        if step.name not in disable and not (exact_order and step.tier is Tier.REORDERS_FLOAT)
    ]
    while lacking := [step for step in chosen if not step.needs <= {other.name for other in chosen}]:
        chosen = [step for step in chosen if step not in lacking]
    return tuple(chosen)


def kept_operators(passes: Collection[Pass]) -> set[torch._ops.OpOverload]:
    """Operators that one of the passes has to see whole."""
    return {operator for step in passes for operator in step.keeps}


def pass_identity(step: Pass) -> bytes | None:
    """What tells a pass from any other in a cache key: its ``uuid()``, or its source and the values of its fields.

    Returns:
        ``None`` if it has neither, so that nothing it had a part in may be cached.
    """
    own = getattr(step, "uuid", None)
    if own is not None:
        return None if own() is None else repr(own()).encode()
    code: Any = step.function if isinstance(step, LocalRewrite) else type(step)
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        return None
    fields: dict[str, Any] = dataclasses.asdict(step) if dataclasses.is_dataclass(step) else {}
    return hashlib.sha256(f"{step.name} {step.tier} {source} {fields}".encode()).digest()


def run_passes(
    graph: CapturedGraph | StepGraph,
    passes: Sequence[Pass],
    *,
    verify: bool = False,
    observe: Callable[[PassRecord], None] | None = None,
) -> list[PassRecord]:
    """Run those of ``passes`` that work on such a graph, in place.

    Args:
        graph: The graph.
        passes: The passes, in order.
        verify: Check the graph after every pass. One from before autograd is checked in any case.
        observe: Called after every pass, while the graph is as that pass left it.

    Raises:
        PassError: A pass failed or left an invalid graph.
    """
    stage = Stage.CAPTURED if isinstance(graph, CapturedGraph) else Stage.JOINT
    verifier = Verifier(graph) if verify and isinstance(graph, StepGraph) else None
    records = []
    for step in passes:
        if step.stage is not stage or graph.form not in step.forms:
            continue
        ops_before = count_ops(graph)
        start = time.perf_counter()
        try:
            result = step.run(graph)
            if stage is Stage.CAPTURED:
                graph.graph.lint()
        except Exception as error:
            raise PassError(f"pass {step.name!r} failed: {error!r}") from error
        seconds = time.perf_counter() - start
        records.append(PassRecord(step.name, step.tier, seconds, ops_before, count_ops(graph), result))
        if isinstance(graph, StepGraph) and verifier is not None:
            verifier.check(graph, after=step.name)
        if observe is not None:
            observe(records[-1])
    return records
