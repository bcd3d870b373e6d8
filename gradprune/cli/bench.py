"""Options of ``gradprune bench`` and the order of its work."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradprune.errors import GradpruneError, OptionError

from .options import check_compiler, prepare_directory

if TYPE_CHECKING:
    from gradprune.bench.baselines import Baseline
    from gradprune.bench.cases import Case
    from gradprune.bench.measure import Budget
    from gradprune.bench.record import Results, Settings

DESCRIPTION = """\
Measure one step of PGD in the Linf ball, on random weights and random inputs, every way side by side:

  backward       eager backward(): loss.backward() on live parameters, as attack libraries do
  grad           eager autograd.grad, live parameters
  frozen         frozen eager: requires_grad_(False) on every parameter
  compile-model  frozen + compile(model): torch.compile(model) within an eager step
  compile-step   compile(step): torch.compile(step) with autograd traced
  gradprune      the code of "backward", compiled with backend="gradprune"
  jax            jit(grad) in JAX, for mnist-cnn, if JAX is installed
  compile-model-tuned, gradprune-tuned   the same with mode="max-autotune" (by default on CUDA only)

All run in turn in one process. Each is first checked against float64 at two points and with x_adv = x; what fails is
shown as failed and not timed. Everything is written as raw JSON with the environment, a Markdown table and a plot.

"attacks" runs whole attacks instead, beside the same ones of Torchattacks where that is installed. "training" runs
iterations of adversarial training: attack, forward and backward pass, update. "objectives" trains with each.
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
  gradprune bench training --threads 2                        adversarial training by attack steps; 25 minutes
  gradprune bench training --cases mnist-cnn --attack-steps 7 one network, one number of steps
  gradprune bench objectives --objectives plain pgd fast      train with three of the objectives
  gradprune bench table --output bench/results/cpu-1-thread   tables and plots again from the JSON there

A run that was interrupted goes on where it stopped when it is started again: a case that is in the JSON with all
candidates asked for is not measured again. After a change of the code, begin anew with --fresh.
"""

HELP = {
    "step": "the main comparison: time, memory and correctness of every candidate on every case",
    "scaling": "the same over the batch",
    "ablation": "gradprune with each pass off in turn, and each option that is on by default",
    "overhead": "the same as step on a network so small that only the overhead of a call is left",
    "compile": "seconds until the first step has run, with empty and with filled caches, in processes of their own",
    "kernels": "the isolated-kernel limit: convolutions and linear layers alone, by every kernel at hand",
    "attacks": "whole attacks beside Torchattacks; what the runtime costs, and what the active set saves",
    "training": "seconds per iteration of PGD adversarial training, by the number of attack steps",
    "objectives": "what every objective of adversarial training comes to on handwritten digits",
    "table": "write tables and plots again from JSON files, without measuring",
}

TIMED = ("step", "scaling", "ablation", "overhead")
DEFAULT_CASES = {
    "scaling": ("resnet18-112-b8",),
    "ablation": ("resnet18-112-b8",),
    "attacks": ("mnist-cnn-b128", "resnet18-112-b8"),
    "training": ("mnist-cnn-b128", "resnet18-32-b16"),
}
"""Of the benchmarks that do not run on all cases by default."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)
RESULTS = Path("bench/results")
EXTRAS = ("matplotlib", "tqdm")
"""What the benchmarks need beyond gradprune's own dependencies."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune bench``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    kinds = parser.add_subparsers(title="benchmarks", dest="kind", metavar="BENCHMARK", required=True)
    for kind, text in HELP.items():
        own = kinds.add_parser(
            kind,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_options(own, kind)
        own.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the options that make sense for one benchmark."""
    whole: Any = {"type": _whole_number, "metavar": "N"}
    add = parser.add_argument
    below = "every folder" if kind == "table" else "one named after device and threads"
    add("--output", type=Path, metavar="DIR", help=f"where the files are (default: {below} in {RESULTS})")
    if kind == "table":
        return
    if kind == "objectives":
        from gradprune.bench.objectives import EPOCHS

        add("--objectives", nargs="+", metavar="NAME", help="such as pgd, trades, free (default: all)")
        add("--epochs", default=EPOCHS, help=f"for each (default: {EPOCHS})", **whole)
        add("--threads", help="CPU threads (default: torch's choice)", **whole)
        add("--fresh", action="store_true", help="begin the file anew instead of going on (default: off)")
        parser.set_defaults(device="cpu", autocast=None, tf32=False, channels_last=False)
        return
    if kind != "overhead":
        default = " ".join(DEFAULT_CASES.get(kind, ("all",)))
        add("--cases", nargs="+", metavar="CASE", help=f"such as resnet18-112-b8, any batch (default: {default})")
    if kind == "scaling":
        add("--batches", nargs="+", default=BATCHES, help="batches to compare (default: 1 2 4 ... 64)", **whole)
    elif kind != "overhead":
        add("--batch", help="batch of all cases (default: that in their names)", **whole)
    if kind not in ("ablation", "kernels", "attacks", "training"):
        add("--candidates", nargs="+", metavar="NAME", help="as listed by bench --help (default: all that fit)")
    if kind in TIMED:
        add("--steps", default=10, help="steps of an attack (default: 10)", **whole)
        add("--seconds", default=120, help="timing per case, but at least 3 rounds (default: 120)", **whole)
    if kind == "attacks":
        from gradprune.bench.record import PARTS

        add("--attacks", nargs="+", metavar="NAME", help="such as fgsm, pgd-50, apgd-ce (default: all)")
        parts = "beside Torchattacks, beside the bare step, with samples leaving (default: all three)"
        add("--parts", nargs="+", choices=PARTS, default=PARTS, help=parts)
        add("--seconds", default=60, help="timing per attack, but at least 3 rounds (default: 60)", **whole)
    if kind == "training":
        from gradprune.bench.record import ATTACK_STEPS

        shown = " ".join(map(str, ATTACK_STEPS))
        add(
            "--attack-steps",
            nargs="+",
            default=ATTACK_STEPS,
            help=f"numbers of attack steps (default: {shown})",
            **whole,
        )
        add("--seconds", default=120, help="timing per number of steps, but at least 3 rounds (default: 120)", **whole)
    if kind != "compile":
        add("--rounds", default=9, help="measurements of each, at most (default: 9)", **whole)
    if kind == "step":
        add("--limit", action="store_true", help="run bench kernels for the same cases first (default: off)")
    add("--device", choices=("cpu", "cuda"), help="where to run (default: cuda if there is one)")
    add("--threads", help="CPU threads (default: torch's choice)", **whole)
    add("--autocast", choices=("fp16", "bf16"), help="type to run the model in (default: float32)")
    add("--tf32", action="store_true", help="allow TF32 in float32 products on CUDA (default: off)")
    add("--channels-last", action="store_true", help="images and weights channels last, for all (default: off)")
    add("--fresh", action="store_true", help="begin the file anew instead of going on (default: off)")


def run(arguments: argparse.Namespace) -> int:
    """Carry out ``gradprune bench``.

    Raises:
        OptionError: Something was asked for that does not exist, or the output cannot be written.
        GradpruneError: Something the benchmarks need is not installed.
    """
    if arguments.kind == "table":
        _check_packages(EXTRAS)
        return _rewrite(arguments.output or RESULTS)
    from gradprune.bench.attack_candidates import choose_methods, torchattacks_version
    from gradprune.bench.attacks import measure_attacks
    from gradprune.bench.baselines import ablations, choose
    from gradprune.bench.measure import Budget, configured
    from gradprune.bench.record import Results
    from gradprune.bench.training import measure_training

    objectives: list[str] = []
    if arguments.kind == "objectives":
        from gradprune.bench.objectives import choose_objectives, measure_objectives

        objectives = choose_objectives(arguments.objectives)
    # Whatever can be known to fail is found out here, not after minutes of measuring.
    kinds = ["kernels", "step"] if getattr(arguments, "limit", False) else [arguments.kind]
    settings = _settings(arguments)
    cases = _cases(arguments)
    keys = getattr(arguments, "candidates", None)
    baselines = ablations() if arguments.kind == "ablation" else choose(keys, settings.device)
    methods, parts = choose_methods(getattr(arguments, "attacks", None)), getattr(arguments, "parts", ())
    digits = {"sklearn"} if "active-set" in parts or objectives else set()
    _check_packages({*EXTRAS, *digits, *(case.requires for case in cases if case.requires)})
    if arguments.kind != "kernels" and any(baseline.compiles for baseline in baselines):
        check_compiler()
    folder = arguments.output or RESULTS / _folder_name(settings)
    prepare_directory(folder)
    budget = Budget(getattr(arguments, "rounds", 1), getattr(arguments, "seconds", 0.0))
    with configured(settings) as here:
        files = []
        for kind in kinds:
            # What takes no steps must not depend on how many the others take.
            own = settings if kind in TIMED else dataclasses.replace(settings, steps=1)
            more = {"torchattacks": torchattacks_version()} if kind == "attacks" else {}
            files.append(Results(folder / f"{kind}.json", own, {**here, **more}))
            if not arguments.fresh:
                files[-1].resume()
        for results in files:
            if objectives:
                measure_objectives(results, objectives, arguments.epochs)
            elif results.kind == "training":
                measure_training(results, cases, arguments.attack_steps, budget)
            elif results.kind == "attacks":
                measure_attacks(results, cases, methods, parts, budget)
            else:
                _measure(results, cases, baselines, budget)
            print(_write(results), flush=True)
    print(f"Saved in {folder}: {', '.join(f'{kind}.json, {kind}.md, {kind}.png' for kind in kinds)}.")
    return 0


def _measure(results: Results, cases: Sequence[Case], baselines: Sequence[Baseline], budget: Budget) -> None:
    """Measure what ``results`` lack, and save after every case."""
    from gradprune.bench.baselines import BASELINES, for_case
    from gradprune.bench.first_step import measure_first_step
    from gradprune.bench.kernels import measure_kernels
    from gradprune.bench.measure import measure_case

    for case in cases:
        wanted = for_case(baselines, case)
        missing = results.missing(case.name, [baseline.name for baseline in wanted])
        if results.kind == "kernels" and case.name not in results.cases:
            results.add(measure_kernels(case, results.settings, budget.rounds))
        elif results.kind == "kernels" or not missing:
            print(f"{case.name}: already in {results.path}", file=sys.stderr)
        elif results.kind == "compile":
            for baseline in wanted:
                if baseline.name in missing:
                    results.add([measure_first_step(case, baseline, results.settings)])
        else:
            # Only candidates that ran in turn can be compared: what the case has is measured again with what it lacks.
            names = {baseline.name for baseline in wanted}
            others = [one for one in BASELINES if one.name not in names and not results.missing(case.name, [one.name])]
            records = measure_case(case, [*wanted, *others], results.settings, budget)
            results.add(records, instead_of=case.name)


def _write(results: Results) -> str:
    """Write table and plot of a file beside it; returns the table."""
    from gradprune.bench import plot, tables
    from gradprune.bench.record import Results
    from gradprune.support.files import write_text

    path = results.path.with_name("kernels.json")
    limits = Results.read(path) if path.exists() else None
    if limits and limits.settings != dataclasses.replace(results.settings, steps=1):
        limits = None
    text = tables.document(results, limits.records if limits else [])
    write_text(results.path.with_suffix(".md"), text)
    plot.save(results.path.with_suffix(".png"), results)
    return text


def _rewrite(folder: Path) -> int:
    """Write the tables and plots of all JSON files below a folder."""
    from gradprune.bench.record import KINDS, Results

    paths = [path for path in sorted(folder.rglob("*.json")) if path.stem in KINDS]
    if not paths:
        raise OptionError(f"no results below {folder}: run gradprune bench step first, or pass --output DIR")
    for results in [Results.read(path) for path in paths]:
        _write(results)
        print(f"{results.path.with_suffix('.md')} and .png written")
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """What the options say about the device."""
    import torch

    from gradprune.bench.record import Settings

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no CUDA device; leave --device out or pass --device cpu")
    if arguments.tf32 and device != "cuda":
        raise OptionError("--tf32 is about CUDA: leave it out on a CPU")
    if arguments.kind == "training" and arguments.autocast == "fp16":
        raise OptionError("bench training --autocast fp16: the first updates would only fit the scale; pass bf16")
    return Settings(
        device,
        arguments.threads or torch.get_num_threads(),
        getattr(arguments, "steps", 1),
        arguments.autocast,
        arguments.tf32,
        arguments.channels_last,
    )


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases asked for, each once."""
    from gradprune.bench.cases import CASES, TINY, find_case

    if arguments.kind == "objectives":
        return []
    if arguments.kind == "overhead":
        return [TINY]
    every = DEFAULT_CASES.get(arguments.kind) or [case.name for case in CASES]
    chosen = [find_case(name) for name in arguments.cases or every]
    if arguments.kind == "scaling":
        chosen = [dataclasses.replace(case, batch=batch) for case in chosen for batch in arguments.batches]
    elif arguments.batch:
        chosen = [dataclasses.replace(case, batch=arguments.batch) for case in chosen]
    return list({case.name: case for case in chosen}.values())


def _folder_name(settings: Settings) -> str:
    """Such as ``cpu-1-thread`` or ``cuda-tesla-t4-fp16``: what tells the runs on one machine apart."""
    import torch

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


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)
