"""The day a GPU is at hand: all there is to find out on one, in parts that fit into slices of a few minutes.

Each part is a process of its own. Its result is written at once, whatever it is, and what comes behind goes on. A part
that has a result is not done again, so that the next slice begins where the last one ended; one that ran out of the
slice's time has none, but is done after those that have not been tried.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from gradprune.errors import OptionError
from gradprune.support.arguments import parse_whole
from gradprune.support.files import replacing, write_json, write_text

from .gpu_parts import LOCK, OUTPUT, STAGES, Part, all_parts
from .report import grid
from .step import Record
from .store import Results

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

TOGETHER = max(1, (os.cpu_count() or 1) // 2)
"""Parts that compile side by side, by default: each keeps two processors busy."""

SHARING = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
"""Environment variables, unless set, of parts that compile side by side."""

BUDGET = 520
"""Seconds of a slice, by default."""

SHORTEST = 20.0
"""Seconds that have to be left for a part to be begun."""

GRACE = 5.0
"""Seconds that a part has to write what it has when it is told to end."""

TAIL = 15
"""Lines of output that a result holds; all of it is in the log."""

ENTRY_POINT = "[torch_dynamo_backends]\ngradprune = gradprune.backend:gradprune\n"
"""How torch finds the backend by its name."""

DONE, FAILED, TIMED_OUT, LACKING, CUT = "done", "failed", "timed out", "lacking", "cut"

EPILOG = "stages:\n" + "".join(f"  {number}  {text}\n" for number, text in STAGES.items())


@dataclass(frozen=True)
class Outcome:
    """The result of a part.

    Attributes:
        stage: Its stage.
        name: Its name.
        command: What Python was called with.
        outcome: ``"done"``; ``"failed"``; ``"timed out"``: it took longer than its limit; ``"lacking"``: something it
            needs is missing; ``"cut"``: the slice was over, which is no result.
        returncode: Exit status; ``None`` if it was not begun or had to be ended.
        seconds: How long it took.
        began: When, in seconds of the Unix epoch.
        lacks: What is missing.
        tail: The last lines it wrote.
        tries: How often it was cut so far.
    """

    stage: int
    name: str
    command: list[str]
    outcome: str
    returncode: int | None = None
    seconds: float = 0.0
    began: float = 0.0
    lacks: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    tries: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune bench gpu``."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="where results are, from earlier slices as well")
    add("--rehearse", action="store_true", help="on the CPU, with sizes so small that all takes minutes")
    add("--stage", type=int, nargs="+", choices=tuple(STAGES), metavar="N", help="which (default: all)")
    text = f"seconds after which no part goes on (default: {BUDGET})"
    add("--budget", type=parse_whole, default=BUDGET, metavar="SECONDS", help=text)
    text = f"how many parts that are timed alone compile side by side (default: {TOGETHER})"
    add("--together", type=parse_whole, default=TOGETHER, metavar="N", help=text)
    add("--again", action="store_true", help="do parts that have a result again as well (default: off)")
    add("--retry", action="store_true", help="do parts that are not done again: failed, timed out, lacking")
    add("--wheels", type=Path, metavar="DIR", help="install these wheels for the parts, without a network")
    add("--pack", type=Path, metavar="FILE", help="write all of --output there as well, a .tar.gz, after each part")


def run(arguments: argparse.Namespace, known: Collection[str]) -> int:
    """Do what has no result yet, until the budget is spent.

    Args:
        arguments: As parsed.
        known: Commands of ``python -m bench`` that there are.

    Returns:
        0 if every part that was begun is done, 1 otherwise.

    Raises:
        OptionError: There is no GPU and this is no rehearsal, or no checkout to run in.
    """
    ends = time.monotonic() + arguments.budget
    if not (ROOT / "tests" / "gpu").is_dir():
        raise OptionError("bench gpu runs what is in a checkout of gradprune: call it there, as bench/gpu.sh")
    if not arguments.rehearse and not torch.cuda.is_available():
        raise OptionError("torch finds no CUDA device: pass --rehearse to go through all of it on the CPU")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with prepared(arguments.wheels, rehearse=arguments.rehearse) as (environment, has):
        parts = all_parts(rehearse=arguments.rehearse, has=has)
        day = Day(arguments.output.resolve(), environment, has, known, arguments.pack, arguments.together)
        chosen = [part for part in parts if arguments.stage is None or part.stage in arguments.stage]
        return day.work_through(chosen, ends, again=arguments.again, retry=arguments.retry)


class Day:
    """Results of all slices in one folder, and what the parts are called with.

    Args:
        folder: Of the results.
        environment: Environment variables of the parts.
        has: Whether the parts can import a module.
        known: Commands of ``python -m bench`` that there are.
        pack: Where to pack the folder to, if at all.
        together: How many of the parts that may share the machine run at a time.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        has: Callable[[str], bool],
        known: Collection[str],
        pack: Path | None = None,
        together: int = 1,
    ) -> None:
        self._folder, self._environment, self._has, self._known, self._pack = folder, environment, has, known, pack
        self._together = together

    def work_through(self, parts: Sequence[Part], ends: float, *, again: bool = False, retry: bool = False) -> int:
        """Do ``parts`` until ``ends``, by the monotonic clock; see ``run``."""
        results = {part.title: self.result(part) for part in parts}
        finished = {DONE} if retry else {DONE, FAILED, TIMED_OUT, LACKING}
        open_parts = [part for part in parts if again or (_outcome(results[part.title]) not in finished)]
        if left := len(parts) - len(open_parts):
            print(f"{left} of {len(parts)} parts have a result already", flush=True)
        open_parts.sort(key=lambda part: _tries(results[part.title]))  # stable: those not yet cut come first
        all_done = True
        for batch in in_batches(open_parts, self._together):
            if ends - time.monotonic() < SHORTEST:
                print("the budget is spent: call it again to go on", flush=True)
                break
            for part in batch:
                if _outcome(results[part.title]) != CUT:  # benchmarks go on from what they find, failures included
                    shutil.rmtree(self._folder / part.title, ignore_errors=True)
            with ThreadPoolExecutor(len(batch)) as pool:
                doing = {pool.submit(self._do, part, ends, _tries(results[part.title])): part for part in batch}
                for done in as_completed(doing):
                    all_done &= done.result().outcome == DONE
                    self._write(doing[done], done.result())
        gather(self._folder)
        return int(not all_done)

    def result(self, part: Part) -> Outcome | None:
        """What is known of a part; ``None`` if it was never tried, or if its file cannot be read."""
        try:
            return Outcome(**json.loads(self._file(part).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _file(self, part: Part) -> Path:
        return self._folder / f"{part.title}.json"

    def _do(self, part: Part, ends: float, tries: int) -> Outcome:
        lacks = [name for name in part.needs if not self._has(name)]
        if part.benchmark is not None and part.benchmark not in self._known:
            lacks.append(f"bench {part.benchmark}")
        output, lock = str(self._folder / part.title), str(self._folder / "lock")
        command = [word.replace(OUTPUT, output).replace(LOCK, lock) for word in part.command]
        if lacks:
            print(f"{part.title}: lacking {', '.join(lacks)}", flush=True)
            return Outcome(part.stage, part.name, command, LACKING, lacks=lacks)
        (self._folder / part.title).mkdir(exist_ok=True)
        print(f"{part.title} ...", flush=True)
        began, started = time.time(), time.monotonic()
        left = ends - started - GRACE
        log = self._folder / f"{part.title}.log"
        environment = {**SHARING, **self._environment} if part.shares else self._environment
        status = execute([sys.executable, *command], environment, log, min(part.limit, left))
        seconds = time.monotonic() - started
        outcome = DONE if status == 0 else FAILED
        if status is None:
            outcome = TIMED_OUT if part.limit <= left else CUT
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        print(f"{part.title}: {outcome} after {seconds:.0f} s", flush=True)
        if outcome != DONE:
            print("".join(f"    {line}\n" for line in tail), end="", flush=True)
        tries += outcome == CUT
        return Outcome(part.stage, part.name, command, outcome, status, seconds, began, [], tail, tries)

    def _write(self, part: Part, outcome: Outcome) -> None:
        write_json(self._file(part), asdict(outcome))
        write_text(self._folder / "gpu.md", self._table())
        if self._pack is not None:
            with replacing(self._pack.resolve()) as temporary, tarfile.open(temporary, "w:gz") as archive:
                archive.add(self._folder, arcname=".")

    def _table(self) -> str:
        rows = []
        for path in sorted(self._folder.glob("[0-9]-*.json")):
            one: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            said = ", ".join(one["lacks"]) or next((line for line in reversed(one["tail"]) if line.strip()), "")
            said = said.strip()[:100].replace("|", "\\|")
            rows.append([path.stem, one["outcome"], f"{one['seconds']:.0f}", said])
        return "# gradprune bench gpu\n\n" + grid(["part", "outcome", "s", "its last word"], rows) + "\n"


def _outcome(result: Outcome | None) -> str:
    return CUT if result is None else result.outcome


def _tries(result: Outcome | None) -> int:
    return 0 if result is None else result.tries


def gather(folder: Path) -> None:
    """Put what ``bench step`` measured in parts of its own into one file for each precision, as one run writes it."""
    gathered: dict[Path, Results[Record]] = {}
    for path in sorted(folder.glob("2-step-*/step.json")):
        one = Results.read(path, Record)
        precision = one.settings.autocast or ("tf32" if one.settings.tf32 else "fp32")
        target = folder / f"step-{precision}" / "step.json"
        target.parent.mkdir(exist_ok=True)
        into = gathered.setdefault(target, Results(target, Record, one.settings, one.environment))
        for case in one.cases:
            into.add([record for record in one.records if record.case == case], instead_of=case)


def in_batches(parts: Sequence[Part], together: int) -> Iterator[list[Part]]:
    """The parts in their order: at most ``together`` of those that share the machine at a time, others alone."""
    for shares, group in itertools.groupby(parts, key=lambda part: part.shares):
        members, size = list(group), together if shares else 1
        for first in range(0, len(members), size):
            yield members[first : first + size]


def execute(command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float) -> int | None:
    """Run a command in the checkout, with a time limit.

    Args:
        command: The program and its arguments.
        environment: All of its environment variables.
        log: File for what it writes.
        limit: Seconds after which it is interrupted, together with what it has started; ``GRACE`` later it is killed.

    Returns:
        Its exit status; ``None`` if it had to be ended.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a process and all that it has started end, if they have not."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def prepared(
    wheels: Path | None, *, rehearse: bool = False
) -> Iterator[tuple[Mapping[str, str], Callable[[str], bool]]]:
    """A folder for what the parts import beside what is installed.

    It is no virtual environment: one that is made inside of another does not see the packages of that one.

    Args:
        wheels: Folder of wheels to install into it.
        rehearse: Whether the parts are to see no GPU, and tests are to be rehearsed.

    Yields:
        The environment variables of the parts, and a function that says whether they can import a module.
    """
    with tempfile.TemporaryDirectory(prefix="gradprune-gpu-") as name:
        site = Path(name)
        if wheels is not None:
            install(wheels, site)
        if "gradprune" not in {point.name for point in entry_points(group="torch_dynamo_backends")}:
            announce(site)
        paths = [name, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        if rehearse:
            environment.update(CUDA_VISIBLE_DEVICES="", GRADPRUNE_GPU_REHEARSE="1")

        def has(module: str) -> bool:
            found = importlib.machinery.PathFinder.find_spec(module, [name]) or importlib.util.find_spec(module)
            return found is not None

        yield environment, has


def announce(site: Path) -> None:
    """Have a folder tell torch of the backend, and everybody of the version, as an installation does."""
    found = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    number = found[1] if found else "0"
    folder = site / f"gradprune-{number}.dist-info"
    folder.mkdir()
    write_text(folder / "METADATA", f"Metadata-Version: 2.1\nName: gradprune\nVersion: {number}\n")
    write_text(folder / "entry_points.txt", ENTRY_POINT)


def install(wheels: Path, site: Path) -> None:
    """Install all wheels of a folder into another one; what cannot be is said, and missed where it is needed."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        print(f"no wheels in {wheels}", file=sys.stderr, flush=True)
        return
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    command = [sys.executable, "-m", "pip", "install", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the wheels of {wheels} were not installed:\n{done.stderr or done.stdout}", file=sys.stderr, flush=True)
