"""What is done on a day with a GPU: stages, and the parts they are made of, in the order of what is worth most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .tables import TITLES

STAGES = {
    0: "versions, and whether a compiled step works",
    1: "tests/gpu",
    2: "a step kernel by kernel; bench step at batch 32, in TF32, fp16 and fp32, with CUDA graphs and max-autotune",
    3: "layouts, and kernels by themselves",
    4: "the tables at the paper's sizes",
    5: "adversarial training",
}

OUTPUT = "{output}"
"""Stands for the folder of a part in its command."""

LOCK = "{lock}"
"""Stands for the file in the command of parts that run side by side and are timed one at a time."""

PATIENCE = "100"
"""Seconds that a candidate of these has to compile."""

CASES = (
    "resnet18-224-b32",
    "resnet50-224-b32",
    "mobilenetv2-224-b32",
    "convnext_atto-224-b32",
    "vit_small-224-b32",
    "bert-64-b32",
)
PRECISIONS: dict[str, tuple[str, ...]] = {"tf32": ("--tf32",), "fp16": ("--autocast", "fp16"), "fp32": ()}
CANDIDATES = ("backward", "frozen", "compile-model", "compile-model-graphs", "gradprune", "gradprune-graphs")
TUNED = ("frozen", "compile-model-tuned", "gradprune", "gradprune-tuned")
LAYOUT_CASES = ("resnet18-224-b32", "mobilenetv2-224-b32", "convnext_atto-224-b32")
TINY = "tiny-b2"
"""What a rehearsal has in place of every network."""


@dataclass(frozen=True)
class Part:
    """A piece of a stage: a process of its own, with a time limit and a result of its own.

    Attributes:
        stage: Its stage.
        name: Of its files, without the stage.
        command: What Python is called with; ``{output}`` is the folder for what it writes.
        limit: Seconds after which it is ended; infinite for what goes on in the next slice from where it was.
        needs: Modules without which it cannot be done.
    """

    stage: int
    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()

    @property
    def shares(self) -> bool:
        """Whether it may run beside others: what compiles long and is timed alone."""
        return "--lock" in self.command

    @property
    def title(self) -> str:
        """Name of its files."""
        return f"{self.stage}-{self.name}"

    @property
    def benchmark(self) -> str | None:
        """The command of ``python -m bench`` that it calls, if it does."""
        return self.command[2] if self.command[:2] == ("-m", "bench") else None


def all_parts(*, rehearse: bool, has: Callable[[str], bool]) -> list[Part]:
    """All parts in their order.

    Args:
        rehearse: On the CPU, with sizes so small that all of it takes minutes; of what differs in its network alone,
            one part stands for all.
        has: Whether a module is installed.
    """
    device = ("--device", "cpu" if rehearse else "cuda")
    parts = [Part(0, "smoke", ("-m", "gradprune.bench.smoke", *device, "--output", OUTPUT), 120)]
    parallel = ("-n", "12") if has("xdist") and not rehearse else ()
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *parallel)
    parts.append(Part(1, "tests", (*command, f"--junitxml={OUTPUT}/tests.xml", "tests/gpu"), 300, ("pytest",)))
    return [*parts, *(_rehearsed() if rehearse else _measured())]


def _bench(stage: int, name: str, limit: float, *words: str, timm: bool = False) -> Part:
    command = ("-m", "bench", *words, "--no-plot", "--output", OUTPUT)
    return Part(stage, name, command, limit, ("timm",) if timm else ())


def _profile(case: str, name: str, *settings: str) -> Part:
    candidates = ("--candidates", "compile-model-graphs", "gradprune-graphs")
    command = ("-m", "gradprune.bench.profile_step", "--case", case, *candidates, *settings, "--output", OUTPUT)
    return Part(2, f"profile-{case}-{name}", command, 150, () if case == TINY else ("timm",))


def _step(cases: Sequence[str], candidates: Sequence[str], *more: str) -> tuple[str, ...]:
    side_by_side = ("--lock", LOCK, "--patience", PATIENCE)
    return ("step", "--cases", *cases, "--candidates", *candidates, "--distinct", *side_by_side, *more)


def _measured() -> list[Part]:
    """The stages that measure, on a GPU."""
    timing = ("--device", "cuda", "--rounds", "7", "--seconds", "8")

    def from_timm(case: str) -> bool:
        return not case.startswith("bert")

    parts = [
        _profile(case, name, "--device", "cuda", *PRECISIONS[name]) for case in CASES[:3] for name in ("tf32", "fp16")
    ]
    parts += [
        _bench(2, f"step-{case}-{name}", 300, *_step([case], CANDIDATES, *timing, *precision), timm=from_timm(case))
        for name, precision in PRECISIONS.items()
        for case in CASES
    ]
    parts += [
        _bench(2, f"tuned-{case}-{name}", 400, *_step([case], TUNED, *timing, *PRECISIONS[name]), timm=from_timm(case))
        for name in ("tf32", "fp16")
        for case in CASES
    ]
    for name in ("tf32", "fp16"):
        parts.append(_bench(3, f"micro-{name}", 200, "micro", "--device", "cuda", *PRECISIONS[name]))
        for case in LAYOUT_CASES:
            for suffix, last in (("", ()), ("-channels-last", ("--channels-last",))):
                words = ("layout", "--cases", case, "--distinct", *timing, *PRECISIONS[name], *last)
                parts.append(_bench(3, f"layout-{case}-{name}{suffix}", 300, *words, timm=True))
    for table in TITLES:
        words = ("tables", "--scale", "paper", "--table", table, "--device", "cuda", "--rounds", "1")
        parts.append(_bench(4, f"table-{table}", math.inf, *words, timm=True))
    for case, name, precision in (
        ("resnet18-32-b128", "tf32", ("--tf32",)),
        ("resnet18-32-b128", "bf16", ("--autocast", "bf16")),
        ("mnist-cnn-b128", "tf32", ("--tf32",)),
    ):
        words = ("training", "--cases", case, "--attack-steps", "1", "7", "10", *timing, *precision)
        parts.append(_bench(5, f"training-{case}-{name}", 300, *words, timm=case.startswith("resnet18")))
    return parts


def _rehearsed() -> list[Part]:
    """The same commands on the CPU, each once."""
    timing = ("--device", "cpu", "--rounds", "1", "--threads", "1")
    short = (*timing, "--steps", "2")
    parts = [_profile(TINY, "fp32", "--device", "cpu", "--threads", "1")]
    parts.append(_bench(2, f"step-{TINY}", 120, *_step([TINY], CANDIDATES, *short)))
    half = _step([TINY], ("frozen", "gradprune"), *short, *PRECISIONS["fp16"])
    parts.append(_bench(2, f"step-{TINY}-fp16", 120, *half))
    parts.append(_bench(3, "micro", 120, "micro", *timing, "--small", "--groups", "masks", "input"))
    parts.append(_bench(3, f"layout-{TINY}", 120, "layout", "--cases", TINY, "--distinct", *short, "--channels-last"))
    parts.append(_bench(4, "table-1", 120, "tables", "--scale", "toy", "--table", "1", "--device", "cpu"))
    parts.append(_bench(5, f"training-{TINY}", 120, "training", "--cases", TINY, "--attack-steps", "1", *timing))
    return parts
