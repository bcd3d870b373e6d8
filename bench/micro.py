"""Kernels and patterns of an attack step by themselves, beside what the machine's memory and arithmetic allow."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradprune.report.kernels import called_kernels
from gradprune.support.progress import stage
from gradprune.torch_compat.inductor import fresh_cache, run_and_get_code

from .baselines import DTYPES
from .benchmark import WHOLE, Benchmark, Plan, add_budget, add_settings, already
from .harness import start_compiler
from .kernels import Ways, time_ways, ways_of
from .micro_patterns import DGRADS, FULL, GROUPS, ON_GPU, SMALL, Pattern, Size, layers, patterns
from .report import Bar, draw_bars, figure, grid
from .store import Results, Settings

CEILINGS, COPY, PRODUCT = "ceilings", "copy", "matrix product"

T4_BANDWIDTH, T4_FLOPS, T4_HALF_FLOPS, T4_LAUNCH = 320e9, 8.1e12, 65e12, 3e-6
"""By its data sheet, bytes and FLOPs per second: memory, float32, and float16 in libraries; seconds of a launch."""


@dataclass(frozen=True)
class Micro:
    """What was measured of a kernel or pattern.

    Attributes:
        case: Its group, or ``"ceilings"``.
        candidate: What it is.
        seconds: Median seconds by way; ``None`` where the way cannot be used or computes something else.
        bytes: Read and written if each operand and result is touched once.
        flops: Of contractions; 0 where there are none.
        launches: Kernels that the compiled way runs; for a library's kernel 1.
        is_half: Whether it computes in half precision.
    """

    case: str
    candidate: str
    seconds: dict[str, float | None]
    bytes: int
    flops: int = 0
    launches: int = 1
    is_half: bool = False

    @property
    def best(self) -> tuple[float, str]:
        """Seconds of the fastest way, and which that is."""
        return min((value, name) for name, value in self.seconds.items() if value is not None)

    def bound(self, bandwidth: float, peak: float) -> float:
        """Seconds that it takes at least, by bytes and FLOPs per second."""
        return max(self.bytes / bandwidth, self.flops / peak)

    @property
    def predicted(self) -> float:
        """Seconds on a T4 if memory or arithmetic were used to the full, and its launches."""
        peak = T4_HALF_FLOPS if self.is_half else T4_FLOPS
        return self.bound(T4_BANDWIDTH, peak) + self.launches * T4_LAUNCH

    def share(self, records: Sequence[Micro]) -> float | None:
        """Share of the ceiling measured in the same run that the fastest way reaches; ``None`` without ceilings."""
        ceilings = {one.candidate: one for one in records if one.case == CEILINGS}
        if self.case == CEILINGS or not {COPY, PRODUCT} <= ceilings.keys():
            return None
        copy, product = ceilings[COPY], ceilings[PRODUCT]
        return self.bound(copy.bytes / copy.best[0], product.flops / product.best[0]) / self.best[0]

    def derived(self, records: Sequence[Micro]) -> dict[str, Any]:
        """All that follows from the figures, for the readers of a JSON file."""
        seconds, way = self.best
        return {
            "best": way,
            "bytes_per_second": self.bytes / seconds,
            "flops_per_second": self.flops / seconds,
            "share_of_ceiling": self.share(records),
            "t4_predicted_seconds": self.predicted,
        }


# --- Measuring --------------------------------------------------------------------------------------------------------


def ceilings(size: Size, settings: Settings, rounds: int) -> list[Micro]:
    """Bandwidth by a copy, and FLOP/s by a matrix product in the type of the run."""
    dtype = DTYPES[settings.autocast] or torch.float32
    source = torch.rand(size.copied, device=settings.device)
    target = torch.empty_like(source)
    one, other = (torch.randn(size.side, size.side, device=settings.device, dtype=dtype) for _ in range(2))
    copied = time_ways({"eager": lambda: lambda: target.copy_(source)}, settings.device, rounds)
    multiplied = time_ways({"eager": lambda: lambda: one @ other}, settings.device, rounds)
    in_product = sum(tensor.nbytes for tensor in (one, other, one))
    return [
        Micro(CEILINGS, COPY, copied, 2 * source.nbytes),
        Micro(CEILINGS, PRODUCT, multiplied, in_product, 2 * size.side**3, is_half=settings.autocast is not None),
    ]


def measure_pattern(pattern: Pattern, settings: Settings, rounds: int) -> Micro:
    """Time a pattern eagerly and compiled."""
    torch.compiler.reset()
    compiled = torch.compile(pattern.function, fullgraph=True, dynamic=False)
    launches = 0

    def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
        return result if isinstance(result, Tensor) else result[0]

    def prepare() -> Any:
        nonlocal launches
        with fresh_cache():  # with what is found in a cache, no code is told
            _, codes = run_and_get_code(compiled, *pattern.inputs)
        launches = sum(kernel.count for code in codes for kernel in called_kernels(code, "step"))
        return lambda: first(compiled(*pattern.inputs))

    ways: Ways = {"eager": lambda: lambda: first(pattern.function(*pattern.inputs)), "compiled": prepare}
    seconds = time_ways(ways, settings.device, rounds, recorded=True)
    results = pattern.function(*pattern.inputs)
    outputs = (results,) if isinstance(results, Tensor) else results
    touched = sum(tensor.nbytes for tensor in (*pattern.inputs, *outputs))
    return Micro(pattern.group, pattern.name, seconds, touched, 0, launches)


def measure_dgrads(size: Size, settings: Settings, rounds: int) -> Iterator[Micro]:
    """Time each way to the input gradient of each layer."""
    width = (DTYPES[settings.autocast] or torch.float32).itemsize
    for layer in layers(size):
        _, ways = ways_of(layer, settings, unpacked=True)
        seconds = time_ways(ways, settings.device, rounds, recorded=True)
        touched = width * sum(map(math.prod, (layer.x, layer.out, layer.weight)))
        yield Micro(DGRADS, str(layer), seconds, touched, layer.flops, is_half=settings.autocast is not None)


def measure_micro(results: Results[Micro], groups: Sequence[str], size: Size, settings: Settings, rounds: int) -> None:
    """Measure the groups that ``results`` lack, and the ceilings with them; save after each."""
    wanted = [group for group in groups if group not in results.cases]
    for group in groups:
        if group not in wanted:
            already(group, results)
    if not wanted:
        return
    with torch.no_grad():
        with stage("ceilings"):
            results.add(ceilings(size, settings, rounds), instead_of=CEILINGS)
        if set(wanted) != {DGRADS}:
            start_compiler()
        found: dict[str, list[Micro]] = {}
        for pattern in patterns(size, settings.device, DTYPES[settings.autocast] or torch.float32):
            if pattern.group in wanted:
                with stage(f"{pattern.group}: {pattern.name}"):
                    found.setdefault(pattern.group, []).append(measure_pattern(pattern, settings, rounds))
        for records in found.values():
            results.add(records)
        if DGRADS in wanted:
            with stage(DGRADS):
                results.add(list(measure_dgrads(size, settings, rounds)))


# --- The benchmark ----------------------------------------------------------------------------------------------------


class MicroBenchmark(Benchmark):
    """``bench micro``."""

    name: ClassVar[str] = "micro"
    help: ClassVar[str] = "kernels and patterns of a step by themselves, beside what memory and arithmetic allow"
    record = Micro
    about: ClassVar[str] = "Random values."
    legend: ClassVar[str] = """\
- MB: read and written if every operand and result is touched once; what a pattern keeps between its launches comes on
  top. GFLOP: of contractions, a multiply-add as two. launches: kernels in the code that Inductor generated here.
- us: median of the samples, on a GPU of a CUDA graph, without the overhead of Python. best by: the fastest way, and
  how many times as fast as the first, which is what eager does.
- of ceiling: the time that a copy's bytes per second or a matrix product's FLOP/s, measured in the same run, would
  allow, over the time taken. Above 100 %: what fits into a cache is not copied through memory.
- T4, predicted: no measurement. The larger of MB at 320 GB/s and GFLOP at 8.1 TFLOP/s (in half precision 65), and 3 us
  for each launch; a lower bound where a library or several launches move more."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        names = [name.split()[0] for name in GROUPS]
        text = f"which of {', '.join(names)} (default: all)"
        parser.add_argument("--groups", nargs="+", choices=names, default=names, metavar="GROUP", help=text)
        parser.add_argument("--batch", help=f"images in a batch (default: {FULL.batch})", **WHOLE)
        parser.add_argument("--small", action="store_true", help="sizes to try the command with (default: off)")
        add_budget(parser, None)
        add_settings(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        size = SMALL if arguments.small else ON_GPU if settings.device == "cuda" else FULL
        if arguments.batch:
            size = dataclasses.replace(size, batch=arguments.batch)
        groups = [name for name in GROUPS if name.split()[0] in arguments.groups]

        def measure(results: Results[Micro]) -> None:
            measure_micro(results, groups, size, settings, arguments.rounds)

        return [Plan(self, measure, environment={"size": dataclasses.asdict(size)})]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        body = []
        for group in results.cases:
            rows = [_row(record, results.records) for record in results.records if record.case == group]
            body += [f"## {group[0].upper()}{group[1:]}", grid(HEAD, rows)]
        return body

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        panels: dict[str, list[Bar]] = {}
        for record in results.records:
            share = record.share(results.records)
            if share is not None:
                panels.setdefault(record.case, []).append(Bar(record.candidate, 100 * share))
        return draw_bars(panels, "percent of the ceiling that the fastest way reaches")


HEAD = ("", "MB", "GFLOP", "launches", "us", "best by", "GB/s", "GFLOP/s", "of ceiling", "T4 us, predicted")


def _row(record: Micro, records: Sequence[Micro]) -> list[str]:
    seconds, way = record.best
    first = next(iter(record.seconds.values()))
    times = f", {first / seconds:.2f}x" if first and len(record.seconds) > 1 else ""
    share = record.share(records)
    row = [record.candidate, figure(record.bytes, 1e6), figure(record.flops or None, 1e9), str(record.launches)]
    row += [figure(seconds, 1e-6), f"{way}{times}", figure(record.bytes / seconds, 1e9)]
    row += [figure(record.flops / seconds or None, 1e9), "-" if share is None else f"{share:.0%}"]
    return [*row, figure(record.predicted, 1e-6)]
