"""The table of narrowing rules, and the table of operators that are known to have none.

Both are keyed by operator name rather than by operator, because not every build of torch has every operator. Keys are
what ``str(node.target)`` gives: ``aten.convolution_backward.default``, or ``flex_attention_backward`` for an operator
without overloads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx


class Narrowed(NamedTuple):
    """The call that replaces a node: same operator, same number of outputs, unused ones not asked for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Rule: TypeAlias = Callable[[fx.Node, frozenset[int]], Narrowed | None]
"""``rule(node, used)``: the narrower call, or ``None`` if the node already asks for no more than ``used``.

``used`` is never empty: a node without a used output is dead, and is erased rather than narrowed. Used outputs keep
value, shape, dtype and strides. What stands at an unused position afterwards is up to the kernel: ``None``, an
undefined tensor, or a gradient that was computed all the same.
"""

RULES: dict[str, Rule] = {}
"""Every rule, by operator name."""

WHOLE: dict[str, str] = {}
"""Why an operator can only be computed whole, by operator name."""

SHAPE_ONLY: dict[str, int] = {}
"""Position of the operand that an operator reads for its shape alone, by operator name."""


def register(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators.

    Args:
        names: Names such as ``"aten.convolution_backward.default"``.

    Raises:
        ValueError: If an operator already has a rule or is registered as whole.
    """

    def add(rule: Rule) -> Rule:
        _check_new(names)
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def register_whole(reason: str, *names: str) -> None:
    """Register operators that compute all of their outputs whichever of them are used.

    Args:
        reason: What a report says about them.
        names: Names such as ``"aten._flash_attention_backward.default"``.

    Raises:
        ValueError: If an operator already has a rule or is registered as whole.
    """
    _check_new(names)
    WHOLE.update(dict.fromkeys(names, reason))


def register_shape_only(position: int, *names: str) -> None:
    """Register operators that read no element of one of their operands.

    Args:
        position: Of the operand.
        names: Names such as ``"aten.avg_pool2d_backward.default"``.

    Raises:
        ValueError: If an operator is registered already.
    """
    for name in names:
        if name in SHAPE_ONLY:
            raise ValueError(f"two operands of {name} that are read for their shape alone: register it once")
    SHAPE_ONLY.update(dict.fromkeys(names, position))


def shape_only_operators() -> list[torch._ops.OpOverload]:
    """The operators of ``SHAPE_ONLY`` that this build of torch has."""
    found = []
    for name in SHAPE_ONLY:
        namespace, packet, overload = name.split(".")
        with suppress(AttributeError):
            found.append(getattr(getattr(getattr(torch.ops, namespace), packet), overload))
    return found


def _check_new(names: tuple[str, ...]) -> None:
    for name in names:
        if name in RULES or name in WHOLE:
            raise ValueError(f"two narrowing rules for {name}: register each operator once")


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a node's operator, if there is one."""
    return RULES.get(str(node.target)) if isinstance(node.target, torch._ops.OpOverload) else None


def is_unnarrowable(node: fx.Node) -> str | None:
    """Why a backward operator with several outputs has to be computed whole.

    Returns:
        A reason to put in a report; ``None`` for operators with a rule, for those with one output, and for those that
        are no backward operators.
    """
    if not isinstance(node.target, torch._ops.OperatorBase) or rule_for(node) is not None:
        return None
    name = str(node.target)
    if name in WHOLE:
        return WHOLE[name]
    return "no narrowing rule for this operator" if "backward" in name and _has_several_outputs(node) else None


def _has_several_outputs(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        return len(returns) > 1 or any(isinstance(result.type, torch.ListType) for result in returns)
    return any(user.target is operator.getitem for user in node.users)


def argument(node: fx.Node, name: str) -> Any:
    """Value of a schema argument of ``node``, wherever it was passed, its default if it was not.

    Raises:
        KeyError: If the operator has no such argument.
    """
    position, declared = _declared(node, name)
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, declared.default_value)


def with_arguments(node: fx.Node, changes: dict[str, Any]) -> Narrowed:
    """The arguments of ``node`` with some of them replaced, each passed the way it was: by position or by keyword.

    Raises:
        KeyError: If the operator has no such argument.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in changes.items():
        position, _ = _declared(node, name)
        if position < len(args):
            args[position] = value
        else:
            kwargs[name] = value
    return Narrowed(tuple(args), kwargs)


def _declared(node: fx.Node, name: str) -> tuple[int, torch._C.Argument]:
    for position, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            return position, declared
    raise KeyError(f"{node.target} has no argument {name!r}")
