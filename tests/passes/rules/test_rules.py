"""The contract of every narrowing rule; see ``rule_contract`` for what it demands and ``rule_cases`` for the calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rule_cases import CASES, SCHEMA_ONLY
from rule_contract import (
    FLAGS,
    MASKS,
    Case,
    call_node,
    check_case,
    check_edit,
    expected_setting,
    narrow,
    operator_named,
    position_of,
    settings,
    subsets,
)

from gradprune.passes.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operands are so small that threads would do little but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_rule_has_a_case():
    run = {case.operator for case in CASES}
    if not torch.backends.mkldnn.is_available():
        run |= {name for name in RULES if "mkldnn" in name}
    assert run | SCHEMA_ONLY == RULES.keys()
    assert not run & SCHEMA_ONLY


def test_case_names_are_unique():
    assert [name for name, count in Counter(map(str, CASES)).items() if count > 1] == []


def test_the_contract_covers_every_rule():
    assert MASKS.keys() | FLAGS.keys() == RULES.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_used_outputs_do_not_change(case: Case):
    try:
        narrowings = check_case(case)
    except NotImplementedError as error:
        pytest.skip(f"this torch has no kernel: {str(error).splitlines()[0]}")
    assert narrowings > 0


def synthetic_arguments(operator: torch._ops.OpOverload, setting: dict[str, Any]) -> list[Any]:
    """Something for every argument an operator declares: a tensor for tensors, the setting's value, or its name."""
    made = []
    for declared in operator._schema.arguments:
        if declared.name in setting:
            made.append(setting[declared.name])
        elif isinstance(declared.type, torch.TensorType):
            made.append(torch.empty(0))
        else:
            made.append(declared.name)
    return made


@pytest.mark.parametrize("name", sorted(MASKS))
def test_mask_has_one_flag_per_output(name: str):
    schema = operator_named(name)._schema
    mask = next(argument for argument in schema.arguments if argument.name == MASKS[name])
    assert str(mask.type) == "List[bool]"
    assert len(schema.returns) == mask.N


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_flags_stand_for_outputs(name: str):
    schema = operator_named(name)._schema
    declared = {argument.name: str(argument.type) for argument in schema.arguments}
    for flag, outputs in FLAGS[name].items():
        assert declared[flag] == "bool"
        assert outputs <= set(range(len(schema.returns)))


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_edit_nothing_else(name: str, keyword: bool):
    operator = operator_named(name)
    declared = operator._schema.arguments
    narrowings = 0
    for setting, asked in settings(operator, len(operator._schema.returns)):
        values = synthetic_arguments(operator, setting)
        first = min(position_of(operator, argument) for argument in setting)
        by_position = [v for i, v in enumerate(values) if not declared[i].kwarg_only and not (keyword and i >= first)]
        by_keyword = {declared[i].name: values[i] for i in range(len(by_position), len(values))}
        node, _ = call_node(operator, tuple(by_position), by_keyword)
        for used in subsets(asked):
            expected = expected_setting(name, setting, used)
            narrowed = narrow(node, used)
            if expected == setting:
                assert narrowed is None
            else:
                assert narrowed is not None
                check_edit(node, narrowed, expected)
                # What a rule returns is what a node accepts, and narrowing it again changes nothing.
                copy = node.graph.node_copy(node)
                copy.args, copy.kwargs = narrowed
                assert narrow(copy, used) is None
                narrowings += 1
    assert narrowings > 0


@pytest.mark.parametrize("name", sorted(MASKS))
def test_a_mask_is_never_emptied(name: str):
    operator = operator_named(name)
    outputs = len(operator._schema.returns)
    setting = {MASKS[name]: [True] + [False] * (outputs - 1)}
    node, _ = call_node(operator, tuple(synthetic_arguments(operator, setting)), {})
    assert narrow(node, frozenset({1})) is None
