"""How long a user waits for the first step: a process of its own with empty caches, and one more with those it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import gradprune
from gradprune.support.progress import stage

from .baselines import Baseline, choose
from .cases import Case, find_case
from .measure import configured, synchronize
from .record import Record, Settings

PROGRAM = "from gradprune.bench.first_step import main; main()"
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}
"""What says where the caches are; Inductor keeps precompiled headers with the temporary files."""


def measure_first_step(case: Case, baseline: Baseline, settings: Settings) -> Record:
    """Run the first step of one candidate in two processes, one after the other."""
    asked = json.dumps({"case": case.name, "baseline": baseline.key, "settings": asdict(settings)})
    search = os.pathsep.join(filter(None, (str(Path(gradprune.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    seconds = []
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
                return Record(case.name, baseline.name, failed=f"{when}: {last}")
            seconds.append(float(done.stdout.split()[-1]))
    return Record(case.name, baseline.name, cold_seconds=seconds[0], warm_seconds=seconds[1])


def main() -> None:
    """Build what the argument names, take one step, print how many seconds that took."""
    asked = json.loads(sys.argv[1])
    settings = Settings(**asked["settings"])
    (baseline,) = choose([asked["baseline"]], settings.device)
    with configured(settings):
        work = find_case(asked["case"]).prepare(settings.device, channels_last=settings.channels_last)
        contender = baseline.build(work, settings)
        x_adv = work.case.inputs(1).to(work.x)  # see Note [Distinct tensors]
        with contender.context():
            started = time.perf_counter()
            contender.step(x_adv, work.x, work.y)
            synchronize(settings.device)
            print(time.perf_counter() - started)
