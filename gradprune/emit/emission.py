"""Emits in the process that has the device: captures the step, generates its code, reads it, compiles its kernels."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from gradprune.compiler.events import Listener
from gradprune.compiler.options import Options
from gradprune.compiler.split import Split
from gradprune.errors import GradpruneError
from gradprune.inspect.explain import analyse, compile_frozen, pretend
from gradprune.ops.kernel_choice import not_measuring
from gradprune.torch_compat.fake_cuda import Generated, canaries, fake_cuda, generate
from gradprune.torch_compat.triton_binaries import compile_kernel
from gradprune.workloads.target import TargetOptions, load_target

from .calls import kernel_sources, read_part
from .gpus import GPUS, Gpu
from .record import Emission, Kernel, Part, Request


class Emitter(Listener):
    """An inner compiler that keeps what Inductor generates, and is told which part of a step that is."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, Generated]] = []
        self.hoisted_bytes = 0
        self._part = ""

    def split(self, parts: Split) -> None:
        """Note how much the prologue makes."""
        self.hoisted_bytes += sum(value.numel() * value.dtype.itemsize for value in parts.values)

    def compiling(self, part: str, graph: fx.Graph) -> None:
        """Note what comes next."""
        self._part = part

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Generate code for one graph."""
        part, self._part = self._part or "prologue", ""  # of which listeners are not told
        return self.keep(part, gm, inputs, **kwargs)

    def keep(self, part: str, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Generate code for one graph as ``part``."""
        inputs = list(inputs)
        nothing = pretend(gm, inputs)  # looks at the graph, which Inductor changes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generated = generate(gm, inputs, **kwargs)
        known = sum(name.partition(" ")[0] == part for name, _ in self.parts)
        if generated is not None:
            self.parts.append((f"{part} {known + 1}" if known else part, generated))
        return self.result(generated, nothing)

    def result(self, generated: Generated | None, nothing: Callable[..., Any]) -> Callable[..., Any]:
        """What is called in place of the graph: something that computes nothing."""
        return nothing


def emit_here(request: Request, folder: Path) -> dict[str, Any]:
    """Emit within this process, which has loaded the device.

    Args:
        request: What to emit.
        folder: Takes ``PART.py`` for each part and, in ``kernels``, the source, assembly and machine code of each
            kernel.

    Returns:
        ``Emission.to_dict()``.

    Raises:
        GradpruneError: The device is not taken for one with cuDNN, or the step cannot be captured.
    """
    gpu = GPUS[request.gpu]
    with fake_cuda(gpu.properties), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        wrong = canaries()
        if wrong:
            raise GradpruneError(
                f"torch {torch.__version__} does not take the device for a GPU with cuDNN, and what it would generate "
                f"is not what a GPU runs: {'; '.join(wrong)}"
            )
        emission = _emit(request, gpu)
        for part in emission.parts:
            (folder / f"{part.name.replace(' ', '-')}.py").write_text(part.code, encoding="utf-8")
        for part in emission.against:
            (folder / f"{request.against}-{part.name.replace(' ', '-')}.py").write_text(part.code, encoding="utf-8")
        if request.binaries:
            emission.kernels = _compile(emission.parts, gpu, folder / "kernels")
    return emission.to_dict()


def _emit(request: Request, gpu: Gpu) -> Emission:
    target = load_target(
        TargetOptions(
            *(request.target, request.form, request.batch, request.image_size),
            device="cuda",
            autocast=request.autocast,
        )
    )
    emitter, other = Emitter(), Emitter()
    options = Options(disable=request.disable, exact_order=request.exact_order, check="never")
    is_model = request.form == "model"
    with target.context, not_measuring(assumed=request.assume_faster) as unmeasured:
        try:
            analysis = analyse(
                *(target.function, target.args, options),
                inner_compile=emitter,
                listeners=[emitter],
                run_prologue=True,
                backward=is_model,
            )
            if request.against:
                compile_frozen(target.function, target.args, analysis.weights, _frozen(other))
        except GradpruneError:
            raise
        except Exception as error:
            raise GradpruneError(
                f"{request.target} could not be emitted: {type(error).__name__}: {error}. Nothing is run here, so that "
                "tensors have no values: if the step reads some, by .item() for example, leave that out"
            ) from error
    report = analysis.report
    return Emission(
        request=request,
        gpu=gpu.name,
        versions={name: version(name) for name in ("torch", "triton")},
        summary=report.summary(),
        parts=[read_part(name, generated, gpu) for name, generated in emitter.parts],
        fused_bytes=report.moved_bytes["after"],
        hoisted_bytes=emitter.hoisted_bytes,
        fallback=report.fallback,
        against=[read_part(name, generated, gpu) for name, generated in other.parts],
        unmeasured=unmeasured,
    )


def _frozen(emitter: Emitter) -> Callable[..., Any]:
    """An inner compiler for ``torch.compile`` as it is, whose parts have the names that they have here."""

    def compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        part = "backward" if kwargs.get("is_backward") else "rest" if kwargs.get("is_inference") else "forward"
        return emitter.keep(part, gm, inputs, **kwargs)

    return compile


def _compile(parts: Sequence[Part], gpu: Gpu, folder: Path) -> list[Kernel]:
    """Compile every kernel of every part."""
    kernels = []
    for part in parts:
        own = folder / part.name.replace(" ", "-")
        own.mkdir(parents=True)
        for name, source in kernel_sources(part.code).items():
            configs = []
            for number, binary in enumerate(compile_kernel(name, source, own)):
                (own / f"{name}.{number}.ptx").write_text(binary.ptx, encoding="utf-8")
                facts = {field.name: getattr(binary, field.name) for field in dataclasses.fields(binary)}
                del facts["ptx"], facts["cubin"]
                facts["occupancy"] = gpu.occupancy(binary.warps, binary.registers, binary.shared_bytes)
                configs.append({**facts, "cubin_bytes": len(binary.cubin)})
            kernels.append(Kernel(name, part.name, configs))
    return kernels
