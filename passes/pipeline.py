"""The passes, in the order in which they run. This list is the order, the printed list and part of the cache key."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gradprune.errors import PassError
from gradprune.graph.step_graph import StepGraph

from . import fold_batch_norm
from .base import Pass, PassResult, Tier
from .channels_last_weights import ChannelsLastWeights
from .dgrad_as_convolution import DgradAsConvolution
from .early_masks import EarlyMasks
from .gather_max_pool import GatherMaxPool
from .hoist_invariants import HoistInvariants
from .narrow_outputs import NarrowOutputs
from .prepack_convolutions import PrepackConvolutions
from .prepack_linears import PrepackLinears
from .select_outputs import SelectOutputs
from .shape_only_operands import ShapeOnlyOperands
from .unfuse_bias import UnfuseBias
from .verify import Verifier
from .winograd_convolutions import WinogradConvolutions

PIPELINE: tuple[Pass, ...] = (
    SelectOutputs(),
    NarrowOutputs(),
    DgradAsConvolution(),
    ShapeOnlyOperands(),
    GatherMaxPool(),
    EarlyMasks(),
    ChannelsLastWeights(),
    WinogradConvolutions(),
    PrepackConvolutions(),
    PrepackLinears(),
    UnfuseBias(),
    HoistInvariants(),
)

PASS_NAMES: tuple[str, ...] = (fold_batch_norm.NAME, *(step.name for step in PIPELINE))
"""All passes, the one that runs before autograd first."""

NEED_HOISTING = frozenset(
    {ChannelsLastWeights.name, WinogradConvolutions.name, PrepackConvolutions.name, PrepackLinears.name}
)
"""Passes that only pay, or only work, when what they do to weights is done once per attack."""


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


def count_ops(step_graph: StepGraph) -> int:
    """Number of operators in the graph."""
    return sum(1 for _ in step_graph.calls())


def select_passes(disable: Collection[str] = (), exact_order: bool = False) -> tuple[Pass, ...]:
    """The pipeline without disabled passes, without those that need one of them and, with ``exact_order``, without
    those that reorder floating point.
    """
    return tuple(
        step
        for step in PIPELINE
        if step.name not in disable
        and not (step.name in NEED_HOISTING and HoistInvariants.name in disable)
        and not (exact_order and step.tier is Tier.REORDERS_FLOAT)
    )


def run_passes(
    step_graph: StepGraph,
    passes: tuple[Pass, ...],
    *,
    verify: bool = False,
    observe: Callable[[PassRecord], None] | None = None,
) -> list[PassRecord]:
    """Run ``passes`` over ``step_graph`` in place.

    Args:
        step_graph: The graph.
        passes: The passes, in order.
        verify: Check the graph after every pass.
        observe: Called after every pass, while the graph is as that pass left it.

    Raises:
        PassError: A pass failed or, with ``verify``, left an invalid graph.
    """
    verifier = Verifier(step_graph) if verify else None
    records = []
    for step in passes:
        ops_before = count_ops(step_graph)
        start = time.perf_counter()
        try:
            result = step.run(step_graph)
        except Exception as error:
            raise PassError(f"pass {step.name!r} failed: {error!r}") from error
        seconds = time.perf_counter() - start
        records.append(PassRecord(step.name, step.tier, seconds, ops_before, count_ops(step_graph), result))
        if verifier is not None:
            verifier.check(step_graph, after=step.name)
        if observe is not None:
            observe(records[-1])
    return records
