"""How a backward operator is told which of its outputs to compute: one ``bool[]`` mask, or separate ``bool`` flags."""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from .registry import Narrowed, Rule, argument, with_arguments


def narrow_mask(mask_argument: str, keep: Set[int] = frozenset()) -> Rule:
    """A rule that clears the flags of unused outputs in the operator's mask; flag ``i`` stands for output ``i``.

    Args:
        mask_argument: Name of the mask.
        keep: Positions of flags that a kernel cannot do without; they stay as they are.
    """

    def rule(node: fx.Node, used: frozenset[int]) -> Narrowed | None:
        mask = [bool(flag) for flag in argument(node, mask_argument)]
        narrow = [flag and (index in used or index in keep) for index, flag in enumerate(mask)]
        # A mask that asks for nothing is left alone: no caller of these kernels passes one, so none has to accept it.
        if narrow == mask or not any(narrow):
            return None
        return with_arguments(node, {mask_argument: narrow})

    return rule


def narrow_flags(gates: dict[str, Set[int]]) -> Rule:
    """A rule that clears every flag none of whose outputs is used.

    Args:
        gates: The positions of the outputs which each ``bool`` argument switches on. An output that no flag stands for
            is always computed.
    """

    def rule(node: fx.Node, used: frozenset[int]) -> Narrowed | None:
        unused = {flag: False for flag, outputs in gates.items() if argument(node, flag) and used.isdisjoint(outputs)}
        return with_arguments(node, unused) if unused else None

    return rule
