"""Compiled steps on disk, found by what Dynamo captured: a later process neither traces a step again nor prunes it.

Note [Stored steps]: what is stored is the code that Inductor generated, the prologue as a graph, which inputs each of
them takes, and the report. Values of weights are not: the prologue computes them in every process. The key says
everything that the code depends on, see ``key_of``; where that is not known for certain, and for a graph that does more
than compute outputs from inputs, nothing is stored. So it is for models, whose backward pass is autograd's business,
for what runs on a GPU, for passes of one's own, symbolic sizes, and wherever a dump, a trace or a full log is written.

The folder is one of Inductor's cache, and its code has to be trusted as much as all else there.
``torch._functorch.config.enable_autograd_cache``, or ``TORCHINDUCTOR_AUTOGRAD_CACHE=0``, turns it off, for this takes
the place of AOTAutograd's cache, which knows nothing of passes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gradprune.graph import plain
from gradprune.graph.step_graph import source_line
from gradprune.torch_compat import aot, artifacts, inductor

from .compilation import Callback, Compilation
from .events import Fallback, Listener
from .hoisted_step import HoistedStep
from .prologue import Prologue
from .pruning import source_hash
from .split import Split

log = logging.getLogger(__name__)

UNSTORED_OPTIONS = ("passes",)
"""Options with which nothing is stored."""

OTHER_OPTIONS = ("background", "dump", "dump_inputs")
"""Options that change nothing of what is compiled; all others are part of the key."""


def key_of(gm: fx.GraphModule, inputs: Sequence[Any], compilation: Compilation) -> str:
    """What a step is stored under; empty if it is not to be.

    The captured graph with the lines it was traced from, the inputs' sizes, strides and types, roles, options, the
    settings and versions of torch, the source of gradprune, the processor and its threads.

    Args:
        gm: The graph, classified.
        inputs: Its inputs.
        compilation: The compilation of it.
    """
    options, capture = compilation.options, compilation.capture
    chosen = dict(vars(options))
    if capture.form != "step" or any(chosen.pop(name) for name in UNSTORED_OPTIONS) or not inductor.may_store():
        return ""
    if any(listener.needs_stages for listener in compilation.listeners):
        return ""
    for name in OTHER_OPTIONS:
        del chosen[name]
    if compilation.inner_compile is not inductor.compile_fx_inner or not compilation.run_prologue:
        return ""
    try:
        graph = plain.to_data(gm.graph)
        described = [Input.of(value) for value in inputs]
    except plain.NotPlain as reason:
        log.debug("gradprune: what is compiled is not stored: %s", reason)
        return ""
    storages = [value.untyped_storage()._cdata for value in inputs]
    if len(set(storages)) < len(storages):
        return ""
    parts = [
        graph,
        [source_line(node) for node in gm.graph.nodes],
        described,
        [repr(_in_order(getattr(capture, field.name))) for field in dataclasses.fields(capture)],
        repr(_in_order(chosen)),
        inductor.settings(),
        source_hash(),
        [platform.machine(), platform.python_version()],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _in_order(value: Any) -> Any:
    """A value whose text is the same in every process."""
    if isinstance(value, dict):
        return sorted((name, _in_order(one)) for name, one in value.items())
    return sorted(value) if isinstance(value, (set, frozenset)) else value


class Input(NamedTuple):
    """What code may depend on of an input, as ``json`` writes it."""

    shape: list[int]
    strides: list[int]
    offset: int
    dtype: str
    requires_grad: bool
    is_parameter: bool
    is_conj: bool
    is_neg: bool

    @staticmethod
    def of(value: Any) -> Input:
        """Describe a value.

        Raises:
            NotPlain: It is more than memory of this machine with strides.
        """
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) and not aot.is_fake(value):
            raise plain.NotPlain(f"an input that is a {type(value).__name__}")
        sizes = [*value.shape, *value.stride(), value.storage_offset()]
        if value.layout is not torch.strided or not value.is_cpu or not all(type(size) is int for size in sizes):
            raise plain.NotPlain("an input that is not strided memory of this machine, or of symbolic size")
        memory = list(value.shape), list(value.stride()), value.storage_offset(), str(value.dtype)
        kind = value.requires_grad, isinstance(value, nn.Parameter), value.is_conj(), value.is_neg()
        return Input(*memory, *kind)


class Storing(Listener):
    """Stores a step once it is compiled, unless something went wrong, and forgets it if its first call does.

    Args:
        key: What to store it under.
        compilation: The compilation that this listens to.
    """

    def __init__(self, key: str, compilation: Compilation) -> None:
        self._key = key
        self._compilation = compilation
        self._code = ""
        self._parts: dict[str, Any] | None = None
        self._is_whole = True

    def split(self, parts: Split) -> None:
        """Note the division, unless the prologue cannot be written."""
        try:
            self._parts = _parts_to_data(parts)
        except plain.NotPlain as reason:
            log.debug("gradprune: what is compiled is not stored: %s", reason)
            self._is_whole = False

    def compiled(self, part: str, result: object) -> None:
        """Note the code, if calling it is all there is to a call of the step."""
        code = inductor.code_of(result)
        self._is_whole = self._is_whole and part == "step" and bool(code) and not self._code and aot.is_plain_call()
        self._code = code

    def fell_back(self, what: Fallback, reason: str, graph: fx.Graph | None) -> None:
        """What had to do without something is compiled anew in every process, which then says so."""
        self._is_whole = False
        artifacts.forget(self._key)

    def finished(self) -> None:
        """Store it."""
        compilation = self._compilation
        if not (self._is_whole and self._code and compilation.was_traced) or compilation.written:
            return
        notes: dict[str, Any] = {}
        compilation.tell("storing", notes)
        data = {"code": self._code, "parts": self._parts, "unrepeatable": compilation.unrepeatable, "notes": notes}
        artifacts.store(self._key, json.dumps(data))


def load(key: str, compilation: Compilation) -> Callback | None:
    """The step that is stored under ``key``, ``None`` if there is none; listeners are told what was noted of it."""
    try:
        text = artifacts.find(key)
        if text is None:
            return None
        stored = json.loads(text)
        step = inductor.load_code(stored["code"])
        if stored["parts"] is not None:
            parts = _parts_from_data(stored["parts"])
            step = HoistedStep(
                parts,
                step,
                Prologue(parts),
                always_refresh=compilation.options.always_refresh,
                may_repeat=not stored["unrepeatable"],
            )
        notes, compilation.unrepeatable = stored["notes"], stored["unrepeatable"]
    except Exception as error:  # a file that somebody damaged is as good as none
        where = artifacts.path_of(key)
        log.warning("gradprune: the stored step %s cannot be used, and is compiled anew: %r", where, error)
        return None
    compilation.was_traced = True
    compilation.tell("restored", notes)

    def call(*args: Any) -> Any:
        with torch.no_grad():
            return step(list(args))

    return call


def _parts_to_data(parts: Split) -> dict[str, Any]:
    return {
        "prologue": plain.to_data(parts.prologue.graph),
        "prologue_inputs": parts.prologue_inputs,
        "step_inputs": parts.step_inputs,
        "values": [[list(v.shape), list(v.stride()), str(v.dtype).removeprefix("torch.")] for v in parts.values],
    }


def _parts_from_data(data: dict[str, Any]) -> Split:
    with aot.FakeTensorMode():
        values = [
            torch.empty_strided(shape, strides, dtype=getattr(torch, dtype)) for shape, strides, dtype in data["values"]
        ]
    prologue = fx.GraphModule(nn.Module(), plain.from_data(data["prologue"]))
    return Split(prologue, data["prologue_inputs"], fx.Graph(), data["step_inputs"], values)
