"""What private torch is read to be: that it is so, and that what is not is named."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import gradprune
from gradprune.compiler import lower
from gradprune.torch_compat import dynamo, probe


@pytest.fixture(autouse=True)
def unprobed() -> Any:
    probe.probe.cache_clear()
    probe.warn.cache_clear()
    yield
    probe.probe.cache_clear()
    probe.warn.cache_clear()


@pytest.mark.inductor
def test_this_torch_is_as_expected():
    assert probe.probe() == ()
    assert probe.probe_step() == []


@pytest.mark.inductor
def test_as_a_program(capsys: pytest.CaptureFixture[str]):
    assert probe.main() == 0
    assert capsys.readouterr().out == f"torch {torch.__version__}: all as expected\n"


PIECES = [(where, name) for where, names, _ in probe.EXPECTED for name in names]


@pytest.mark.parametrize(("where", "name"), PIECES)
def test_what_a_piece_has_lost_is_named(where: str, name: str, monkeypatch: pytest.MonkeyPatch):
    piece = probe._find(where)
    assert piece is not None
    if dataclasses.is_dataclass(piece):
        monkeypatch.setattr(piece, "__dataclass_fields__", {})
        monkeypatch.delattr(piece, name, raising=False)
    elif inspect.isfunction(piece):
        monkeypatch.setattr(piece, "__signature__", inspect.Signature(), raising=False)
    elif inspect.ismodule(piece) and hasattr(piece, "_config"):  # which keeps its settings elsewhere
        monkeypatch.delitem(piece._config, name)
    else:
        owners = inspect.getmro(piece) if inspect.isclass(piece) else [piece]
        monkeypatch.delattr(next(owner for owner in owners if name in vars(owner)), name)
    assert (where, name) in [(finding.piece, finding.expected) for finding in probe.probe()]


@pytest.mark.parametrize("where", ["torch._dynamo.no_such_module", "torch._dynamo.source:NoSuchSource"])
def test_a_piece_that_is_gone_is_named(where: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "EXPECTED", [(where, ("base",), "nothing is pruned")])
    assert list(map(str, probe.probe())) == [f"{where} is gone: nothing is pruned"]


def test_the_first_compilation_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(probe, "EXPECTED", [("torch", ("wheels",), "it does not roll")])
    gm = fx.symbolic_trace(lambda x: x.sin())
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["example_value"] = torch.rand(3)
    for _ in range(2):
        lower.compile_graph(gm, [torch.rand(3)], gradprune.Options(), inner_compile=lambda gm, *_, **__: gm.forward)
    messages = [record.getMessage() for record in caplog.records if "wheels" in record.getMessage()]
    assert messages == [
        f"gradprune: torch {torch.__version__} is not what gradprune knows: torch has no wheels: it does not roll"
    ]
    assert caplog.records[0].levelno == logging.WARNING


LOST: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "flag": (lambda patch: patch.setattr(dynamo, "scope_to_backend", lambda *_: None), "gradient call"),
    "weights": (lambda patch: patch.setattr(dynamo, "is_module_state", lambda node: False), "source in a module"),
    "origins": (lambda patch: patch.setattr(dynamo, "dynamo_nodes", lambda node: set()), "'from_node'"),
}


@pytest.mark.inductor
@pytest.mark.parametrize("what", LOST)
def test_what_torch_does_not_note_is_named(what: str, monkeypatch: pytest.MonkeyPatch):
    lose, expected = LOST[what]
    lose(monkeypatch)
    assert expected in [finding.expected for finding in probe.probe_step()]


def test_settings_of_inductor_that_are_gone(monkeypatch: pytest.MonkeyPatch):
    looked = probe._has
    monkeypatch.setattr(probe, "_has", lambda piece, name: name != "joint_custom_pre_pass" and looked(piece, name))
    assert [finding.expected for finding in probe.probe()] == ["joint_custom_pre_pass"]
