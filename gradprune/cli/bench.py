"""Options of ``gradprune bench`` and the order of its work."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradprune.bench import gpu
from gradprune.bench.ablation import AblationBenchmark
from gradprune.bench.attacks import AttacksBenchmark
from gradprune.bench.benchmark import Benchmark, settings_of
from gradprune.bench.compile import CompileBenchmark
from gradprune.bench.emitted import EmitBenchmark
from gradprune.bench.harness import configured
from gradprune.bench.kernels import KernelsBenchmark
from gradprune.bench.layout import LayoutBenchmark
from gradprune.bench.micro import MicroBenchmark
from gradprune.bench.objectives import ObjectivesBenchmark
from gradprune.bench.report import document
from gradprune.bench.scaling import ScalingBenchmark
from gradprune.bench.step import OverheadBenchmark, StepBenchmark
from gradprune.bench.store import Results, Settings
from gradprune.bench.tables import TablesBenchmark
from gradprune.bench.training import TrainingBenchmark
from gradprune.bench.verdict import VerdictBenchmark
from gradprune.errors import GradpruneError, OptionError
from gradprune.support.figures import save_figure
from gradprune.support.files import write_text

from .options import check_compiler, prepare_directory

DESCRIPTION = """\
Measure one step of PGD in the Linf ball, on random weights and random inputs, every way side by side:

  backward       eager backward(): loss.backward() on live parameters, as attack libraries do
  grad           eager autograd.grad, live parameters
  frozen         frozen eager: requires_grad_(False) on every parameter
  compile-model  frozen + compile(model): torch.compile(model) within an eager step
  compile-step   compile(step): torch.compile(step) with autograd traced
  gradprune      the code of "backward", compiled with backend="gradprune"
  jax            jit(grad) in JAX, for mnist-cnn, if JAX is installed
  compile-model-graphs, gradprune-graphs   the same with mode="reduce-overhead", CUDA graphs (by default on CUDA only)
  compile-model-tuned, gradprune-tuned     the same with mode="max-autotune" (by default on CUDA only)

All run in turn in one process. Each is first checked against float64 at two points and with x_adv = x; what fails is
shown as failed and not timed. Everything is written as raw JSON with the environment, a Markdown table and a plot.

"attacks" runs whole attacks instead, beside the same ones of Torchattacks where that is installed, and "verdict" those
that robust accuracies are reported with. "training" runs iterations of adversarial training: attack, forward and
backward pass, update. "objectives" trains with each. "tables" runs attacks of other libraries as shipped, frozen,
frozen and compiled, accelerated and patched, as the paper's tables have them.
"""

EPILOG = """\
examples:
  gradprune bench step --threads 1                            all cases; an hour or so on one core
  gradprune bench step --cases resnet18-112-b8 --rounds 5     one of them
  gradprune bench step --cases resnet18-112-b8 --limit        and how far it is from its kernels alone
  gradprune bench step --device cuda --autocast fp16          on a GPU, in half precision
  gradprune bench scaling --cases resnet50-112 --batches 1 8 64
  gradprune bench ablation --cases resnet18-112-b8            each pass off in turn
  gradprune bench attacks --cases mnist-cnn --attacks pgd-50  one whole attack, and the other two tables
  gradprune bench verdict --cases resnet8-32 --steps 10 --queries 100   a short AutoAttack, PGD and APGD
  gradprune bench training --threads 2                        adversarial training by attack steps; 25 minutes
  gradprune bench training --cases mnist-cnn --attack-steps 7 one network, one number of steps
  gradprune bench tables --scale small --threads 2            the tables of the paper, with six attack libraries
  gradprune bench tables --scale paper --table 1              one of them at the paper's size, for a GPU
  gradprune bench objectives --objectives plain pgd fast      train with three of the objectives
  gradprune bench micro --threads 1 --groups losses masks     pieces of a step beside what memory and arithmetic allow
  gradprune bench emit --cases resnet18-b32 resnet18-b32-fp16@sm_80   what steps become on GPUs, without one
  gradprune bench gpu --rehearse --output rehearsal           what bench/gpu.sh does on a GPU, in minutes on the CPU
  gradprune bench table --output bench/results/cpu-1-thread   tables and plots again from the JSON there

A run that was interrupted goes on where it stopped when it is started again: a case that is in the JSON with all
candidates asked for is not measured again. After a change of the code, begin anew with --fresh.
"""

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        StepBenchmark(),
        ScalingBenchmark(),
        AblationBenchmark(),
        LayoutBenchmark(),
        OverheadBenchmark(),
        CompileBenchmark(),
        KernelsBenchmark(),
        MicroBenchmark(),
        EmitBenchmark(),
        AttacksBenchmark(),
        VerdictBenchmark(),
        TrainingBenchmark(),
        TablesBenchmark(),
        ObjectivesBenchmark(),
    )
}
"""By their names, in the order of ``--help``."""

RESULTS = Path("bench/results")
EXTRAS = ("matplotlib",)
"""What pictures need beyond gradprune's own dependencies."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune bench``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    kinds = parser.add_subparsers(title="benchmarks", dest="kind", metavar="BENCHMARK", required=True)

    def add(name: str, text: str, below: str) -> argparse.ArgumentParser:
        described = f"{text[0].upper()}{text[1:]}."
        formatter = argparse.RawDescriptionHelpFormatter
        own = kinds.add_parser(name, help=text, description=described, epilog=EPILOG, formatter_class=formatter)
        shown = f"where the files are (default: {below} in {RESULTS})"
        own.add_argument("--output", type=Path, metavar="DIR", help=shown)
        return own

    for benchmark in BENCHMARKS.values():
        own = add(benchmark.name, benchmark.help, "one named after device and threads")
        own.add_argument("--no-plot", action="store_true", help="no picture, for which matplotlib is needed")
        benchmark.add_options(own)
        own.set_defaults(run=partial(run, benchmark))
    table = add("table", "write tables and plots again from JSON files, without measuring", "every folder")
    table.set_defaults(run=rewrite)
    text = "all there is to find out on a GPU, in slices of a few minutes"
    day = kinds.add_parser(
        "gpu", help=text, description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu.add_options(day)
    day.set_defaults(run=lambda arguments: gpu.run(arguments, tuple(kinds.choices)))


def run(benchmark: Benchmark, arguments: argparse.Namespace) -> int:
    """Carry out a benchmark.

    Raises:
        OptionError: Something was asked for that does not exist, or the output cannot be written.
        GradpruneError: Something the benchmarks need is not installed.
    """
    # Whatever can be known to fail is found out here, not after minutes of measuring.
    settings = settings_of(arguments)
    plans = benchmark.plans(arguments, settings)
    drawn = not arguments.no_plot
    _check_packages({*(EXTRAS if drawn else ()), *(package for plan in plans for package in plan.packages)})
    if any(plan.compiles for plan in plans):
        check_compiler()
    folder = arguments.output or RESULTS / _folder_name(settings)
    prepare_directory(folder)
    with configured(settings) as here:
        files: list[Results[Any]] = []
        for plan in plans:
            # What takes no steps must not depend on how many the others take.
            own = settings if plan.benchmark.takes_steps else dataclasses.replace(settings, steps=1)
            path = folder / f"{plan.benchmark.name}.json"
            files.append(Results(path, plan.benchmark.record, own, {**here, **plan.environment}))
            if not arguments.fresh:
                files[-1].resume()
        for plan, results in zip(plans, files, strict=True):
            plan.measure(results)
            print(write(plan.benchmark, results, drawn=drawn), flush=True)
    endings = ("json", "md", "png")[: 3 if drawn else 2]
    files_written = (f"{plan.benchmark.name}.{ending}" for plan in plans for ending in endings)
    print(f"Saved in {folder}: {', '.join(files_written)}.")
    return 0


def write(benchmark: Benchmark, results: Results[Any], *, drawn: bool = True) -> str:
    """Write the table of a file beside it and, if it is ``drawn``, the plot; returns the table."""
    text = document(results, benchmark.about, benchmark.sections(results), benchmark.legend)
    write_text(results.path.with_suffix(".md"), text)
    if not drawn:
        return text
    figure = benchmark.draw(results)
    where = results.environment.get("gpu", results.environment["cpu"])
    figure.suptitle(f"bench {benchmark.name}: {where}, {results.settings}", fontsize=11)
    save_figure(figure, results.path.with_suffix(".png"))
    return text


def rewrite(arguments: argparse.Namespace) -> int:
    """Write the tables and plots of all JSON files below a folder.

    Raises:
        OptionError: There is none.
        GradpruneError: Something the benchmarks need is not installed.
    """
    _check_packages(EXTRAS)
    folder = arguments.output or RESULTS
    paths = [path for path in sorted(folder.rglob("*.json")) if path.stem in BENCHMARKS]
    if not paths:
        raise OptionError(f"no results below {folder}: run gradprune bench step first, or pass --output DIR")
    files: list[Results[Any]] = [Results.read(path, BENCHMARKS[path.stem].record) for path in paths]
    for results in files:
        write(BENCHMARKS[results.path.stem], results)
        print(f"{results.path.with_suffix('.md')} and .png written")
    return 0


def _folder_name(settings: Settings) -> str:
    """Such as ``cpu-1-thread`` or ``cuda-tesla-t4-fp16``: what tells the runs on one machine apart."""
    if settings.device == "cuda":
        parts = ["cuda", re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")]
    else:
        parts = ["cpu", f"{settings.threads}-thread{'s' * (settings.threads > 1)}"]
    flags = (settings.autocast, "tf32" * settings.tf32, "channels-last" * settings.channels_last)
    return "-".join([*parts, *filter(None, flags)])


def _check_packages(packages: Iterable[str]) -> None:
    """Make sure that optional dependencies are there."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise GradpruneError(f'the benchmarks need {", ".join(missing)}: run pip install "gradprune[bench]"')
