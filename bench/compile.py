"""How long a user waits for the first step: a process of its own with empty caches, and one more with those it left."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradprune
from gradprune.support.progress import stage

from .baselines import Baseline, choose, for_case
from .benchmark import Benchmark, Plan, add_cases, add_settings, already, chosen_cases, packages_of
from .cases import Case, find_case
from .harness import configured, load_average, synchronize
from .report import SECOND, Bar, draw_bars, failures, figure, grid
from .step import Record
from .store import Results, Settings

PROGRAM = "from gradprune.bench.compile import main; main()"
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}
"""What says where the caches are; Inductor keeps precompiled headers with the temporary files."""


@dataclass(frozen=True)
class FirstStep(Record):
    """The first step of one candidate.

    Attributes:
        cold_processor_seconds: What all processors spent on it, in this process and in compilers, with empty caches.
            Unlike the duration, it hardly depends on what else the machine does.
        warm_processor_seconds: The same with the caches that an earlier process left.
    """

    cold_processor_seconds: float | None = None
    warm_processor_seconds: float | None = None


def measure_first_step(case: Case, baseline: Baseline, settings: Settings) -> FirstStep:
    """Run the first step of one candidate in two processes, one after the other."""
    asked = json.dumps({"case": case.name, "baseline": baseline.key, "settings": asdict(settings)})
    search = os.pathsep.join(filter(None, (str(Path(gradprune.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    seconds, processor_seconds, load = [], [], load_average()
    with tempfile.TemporaryDirectory(prefix="gradprune-bench-") as folder:
        places = {name: os.path.join(folder, below) for name, below in CACHES.items()}
        for place in places.values():
            os.mkdir(place)
        environment = {**os.environ, **places, "PYTHONPATH": search}
        for when in ("cold", "warm"):
            with stage(f"{case.name}: first step of {baseline.name}, {when}"):
                command = [sys.executable, "-c", PROGRAM, asked]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                return FirstStep(case.name, baseline.name, failed=f"{when}: {last}")
            duration, spent = map(float, done.stdout.split()[-2:])
            seconds.append(duration)
            processor_seconds.append(spent)
    return FirstStep(
        case.name,
        baseline.name,
        cold_seconds=seconds[0],
        warm_seconds=seconds[1],
        load=load,
        cold_processor_seconds=processor_seconds[0],
        warm_processor_seconds=processor_seconds[1],
    )


def _processor_seconds() -> float:
    """What this process and those it waited for have spent."""
    return sum(os.times()[:4])


def main() -> None:
    """Build what the argument names, take one step, print how many seconds that took, and how many processors spent."""
    asked = json.loads(sys.argv[1])
    settings = Settings(**asked["settings"])
    (baseline,) = choose([asked["baseline"]], settings.device)
    with configured(settings):
        work = find_case(asked["case"]).prepare(settings.device, channels_last=settings.channels_last)
        contender = baseline.build(work, settings)
        x_adv = work.case.inputs(1).to(work.x)  # see Note [Distinct tensors]
        with contender.context():
            started, spent = time.perf_counter(), _processor_seconds()
            contender.step(x_adv, work.x, work.y)
            synchronize(settings.device)
            print(time.perf_counter() - started, _processor_seconds() - spent)


class CompileBenchmark(Benchmark):
    """``bench compile``."""

    name = "compile"
    help = "seconds until the first step has run, with empty and with filled caches, in processes of their own"
    record = FirstStep
    legend = """\
- Seconds from the call of the first step until it has run, in a process of its own: cold with empty disk caches, warm
  with those that the cold process left. Importing torch and building the model are not part of it, importing the
  compiler is.
- Processor seconds are those of the process and of the compilers that it started, on all cores together. They hardly
  depend on what else the machine does; the duration does. The load is that of the machine when it began."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add_cases(parser)
        text = "as listed by bench --help (default: all that fit)"
        parser.add_argument("--candidates", nargs="+", metavar="NAME", help=text)
        add_settings(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        cases, baselines = chosen_cases(arguments), choose(arguments.candidates, settings.device)

        def measure(results: Results[FirstStep]) -> None:
            for case in cases:
                wanted = for_case(baselines, case)
                missing = results.missing(case.name, [baseline.name for baseline in wanted])
                if not missing:
                    already(case.name, results)
                for baseline in wanted:
                    if baseline.name in missing:
                        results.add([measure_first_step(case, baseline, settings)])

        return [Plan(self, measure, packages_of(cases), any(baseline.compiles for baseline in baselines))]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        head = ["case", "candidate", "cold s", "warm s", "cold processor s", "warm processor s", "load"]
        rows = (
            [
                one.case,
                one.candidate,
                figure(one.cold_seconds),
                figure(one.warm_seconds),
                figure(one.cold_processor_seconds),
                figure(one.warm_processor_seconds),
                figure(one.load),
            ]
            for one in results.records
        )
        return [grid(head, rows), *failures(results.records)]

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        panels: dict[str, list[Bar]] = {}
        for one in results.records:
            if not one.failed:
                pair = [Bar(one.candidate, one.cold_seconds or 0), Bar("", one.warm_seconds or 0, color=SECOND)]
                panels.setdefault(one.case, []).extend(pair)
        return draw_bars(panels, "seconds until the first step has run: cold (dark) and warm (light)")
