"""Compile a step in a process of its own, and run the captured graph meanwhile.

Note [Apart]: not in a thread. While torch traces a graph it replaces what all threads see, such as the call of a module
and the setting of random states, and it holds the interpreter. The other process is given the captured graph as data
and stores what it compiled, see Note [Stored steps]; it has a lower priority, and what it measures and how it rounds is
what it would be here. Only Dynamo's part, to capture the step, is done in this one.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, fx, nn

from gradprune.graph import plain
from gradprune.graph.step_graph import InputRole, OutputRole, source_line
from gradprune.torch_compat import aot, inductor

from .capture import Capture
from .compilation import Callback, Compilation
from .options import Options
from .pruning import source_hash
from .stored import Input

log = logging.getLogger(__name__)

PROGRAM = "from gradprune.backend import compile_apart; compile_apart()"

PRIORITY = 3
"""How much less urgent the other process is, as ``nice`` counts."""


@dataclass
class Job:
    """A captured step as data, and all that its compilation depends on.

    Attributes:
        key: What it is stored under.
        graph: The graph.
        lines: Where in the user's code each node is from.
        inputs: What each input is; lists of the same once they were read.
        module_state: Names of the inputs that are parameters or buffers.
        capture: What the graph says about itself.
        options: The backend's options.
        settings: Of torch.
        threads: Of a kernel.
    """

    key: str
    graph: list[Any]
    lines: list[str]
    inputs: list[Input]
    module_state: list[str]
    capture: dict[str, Any]
    options: dict[str, Any]
    settings: list[str]
    threads: int

    @staticmethod
    def of(key: str, gm: fx.GraphModule, inputs: Sequence[Tensor], compilation: Compilation) -> Job | None:
        """The job of compiling a graph that may be stored; ``None`` if it cannot be given to another process."""
        capture = dataclasses.asdict(compilation.capture)
        capture.update(
            inputs=[role.value for role in capture["inputs"]],
            outputs=[[position, role.value] for position, role in capture["outputs"].items()],
            kept_because=list(capture["kept_because"].items()),
            gradient_calls=sorted(capture["gradient_calls"]),
        )
        chosen = dict(vars(compilation.options))
        try:
            json.dumps(chosen)
        except TypeError:
            return None
        described = [Input.of(value) for value in inputs]
        if any(one.offset or one.is_conj or one.is_neg for one in described):
            return None
        return Job(
            key=key,
            graph=plain.to_data(gm.graph),
            lines=[source_line(node) for node in gm.graph.nodes],
            inputs=described,
            module_state=sorted(compilation.module_state),
            capture=capture,
            options=chosen,
            settings=[source_hash(), *inductor.settings()],
            threads=torch.get_num_threads(),
        )

    def write(self, file: IO[str]) -> None:
        """Write it for another process."""
        json.dump(dataclasses.asdict(self), file)

    @staticmethod
    def read(file: IO[str]) -> Job:
        """Read what another process wrote, and be set as that is.

        Raises:
            RuntimeError: This process cannot be.
        """
        job = Job(**json.load(file))
        torch.set_num_threads(job.threads)
        if job.settings != [source_hash(), *inductor.settings()]:
            raise RuntimeError("settings of torch differ between the two processes, such as those set by a program")
        return job

    def compilation(self) -> Compilation:
        """The compilation of it."""
        roles = self.capture
        capture = Capture(
            form=roles["form"],
            inputs=[InputRole(role) for role in roles["inputs"]],
            outputs={position: OutputRole(role) for position, role in roles["outputs"]},
            kept_because=dict(roles["kept_because"]),
            gradient_calls=frozenset(roles["gradient_calls"]),
            visible_outputs=roles["visible_outputs"],
            training_only=roles["training_only"],
        )
        return Compilation(Options.parse(self.options), capture=capture, module_state=frozenset(self.module_state))

    def module(self) -> fx.GraphModule:
        """The graph, with the fake tensors and lines on its nodes that Dynamo notes."""
        graph = plain.from_data(self.graph)
        module = fx.GraphModule(nn.Module(), graph)
        for node, line in zip(graph.nodes, self.lines, strict=True):
            path, _, number = line.rpartition(":")
            node.meta["stack_trace"] = f'File "{path}", line {number}' if line else ""
        with aot.FakeTensorMode(shape_env=aot.ShapeEnv()):
            _Noting(module).run(*(_fake(Input(*one)) for one in self.inputs))
        return module


def _fake(one: Input) -> Tensor:
    dtype = getattr(torch, one.dtype.removeprefix("torch."))
    value = torch.empty_strided(one.shape, one.strides, dtype=dtype)
    return nn.Parameter(value, one.requires_grad) if one.is_parameter else value.requires_grad_(one.requires_grad)


class _Noting(fx.Interpreter):
    """Runs a graph and notes every value where Dynamo does."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


class Meanwhile:
    """Calls run the captured graph until another process has compiled it.

    Args:
        job: What the other process is to do.
        captured: The graph, which computes no weight gradient.
        load: Loads what was compiled; ``None`` if there is nothing.
        compile_here: Compiles it in this process, should the other process fail.
    """

    def __init__(
        self,
        job: Job,
        captured: Callback,
        load: Callable[[], Callback | None],
        compile_here: Callable[[Job], Callback],
    ) -> None:
        self._job = job
        self._captured = captured
        self._load = load
        self._compile_here = compile_here
        self._compiled: Callback | None = None
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115, as long as the process runs
        self._process = _begin(job, self._said)
        _unfinished.append(self)

    def __call__(self, *args: Any) -> Any:
        """Call what is compiled, or the captured graph."""
        if self._compiled is None and self._process.poll() is not None:
            self.finish()
        if self._compiled is None:
            return list(self._captured(*args))
        return self._compiled(*args)

    def finish(self) -> None:
        """Wait for the other process, and load what it compiled."""
        if self._compiled is not None:
            return
        self._process.wait()
        if self in _unfinished:
            _unfinished.remove(self)
        self._compiled = self._load()
        if self._compiled is None:
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or [f"exit status {self._process.returncode}"])[-1]
            log.warning("gradprune: what was to be compiled in the background is compiled now: %s", last)
            self._compiled = self._compile_here(self._job)
        self._said.close()

    def give_up(self) -> None:
        """End the other process."""
        self._process.terminate()
        self._process.wait()


_unfinished: list[Meanwhile] = []


def finish_all() -> None:
    """Wait until all that is being compiled in other processes is, and use it from then on."""
    for one in list(_unfinished):
        one.finish()


def unfinished() -> int:
    """How many steps still run eagerly, because they are being compiled or were not called since."""
    return len(_unfinished)


@atexit.register
def _give_up_all() -> None:
    for one in _unfinished:
        one.give_up()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unfinished.clear)  # they are not this process's


def _begin(job: Job, said: IO[str]) -> subprocess.Popen[str]:
    search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=said,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search),
            "TORCHINDUCTOR_CACHE_DIR": inductor.inductor_cache_dir(),
        },
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:
        job.write(pipe)
    return process


def be_less_urgent() -> None:
    """Leave the processors to who waits for them."""
    if hasattr(os, "nice"):
        os.nice(PRIORITY)
