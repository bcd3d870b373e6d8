"""Starts the process that emits, and takes what it leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradprune.errors import GradpruneError, OptionError
from gradprune.support.files import write_json

from .device import CAPABILITY, build
from .gpus import GPUS
from .record import Request

CHECKED = ("2.13",)
"""Versions of torch whose private parts ``torch_compat.fake_cuda`` was written for."""
TAIL = 3000
"""Characters shown of what a worker said before it failed."""


def check_requirements() -> None:
    """Make sure that code can be generated here.

    Raises:
        GradpruneError: Triton is missing, or torch is not one whose private parts are known.
    """
    if importlib.util.find_spec("triton") is None:
        raise GradpruneError('emit needs Triton: run pip install "gradprune[emit]" (it compiles without a GPU)')
    found = version("torch")
    if not found.startswith(tuple(f"{one}." for one in CHECKED)):
        raise GradpruneError(
            f"emit replaces parts of torch that differ from version to version, and knows those of "
            f"{', '.join(CHECKED)}, not of {found}: install torch=={CHECKED[-1]}.0 beside triton in an environment of "
            "its own"
        )


def emit(request: Request, output: Path | None = None) -> dict[str, Any]:
    """Generate, read and compile the GPU code of a step, in a process of its own with caches of its own.

    Args:
        request: What to emit.
        output: Folder for everything there is: generated code, assembly, machine code, ``emission.json``. It must not
            exist, or be empty; ``None`` keeps none of it.

    Returns:
        ``Emission.to_dict()``.

    Raises:
        OptionError: The target does not exist, or ``output`` cannot be written.
        GradpruneError: It cannot be emitted.
    """
    check_requirements()
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f"--output {output} exists: pass a folder that does not, or an empty one")
    return _work(request, None, output)


def check(request: Request, *, real_blocks: bool = False, races: bool = False, steps: int = 2) -> dict[str, Any]:
    """Execute on the CPU what is generated for a GPU, and compare it with eager, in a process of its own.

    Args:
        request: What to check; its target is a model.
        real_blocks: Take the block sizes that a GPU would try first, not the biggest: many times as slow.
        races: Look for addresses that two programs share.
        steps: Steps of the attack.

    Returns:
        ``CheckOutcome.to_dict()``; ``wrong`` is empty if it passes.

    Raises:
        OptionError: The target is no model.
        GradpruneError: It cannot be emitted, or a kernel does what it must not.
    """
    check_requirements()
    return _work(request, {"real_blocks": real_blocks, "races": races, "steps": steps}, None)


def _work(request: Request, checks: dict[str, Any] | None, output: Path | None) -> dict[str, Any]:
    """Have a worker carry a request out."""
    library = build()
    with tempfile.TemporaryDirectory(prefix="gradprune-emit-") as temporary:
        folder = Path(temporary, "emission")
        folder.mkdir()
        job, result = Path(temporary, "job.json"), folder / "emission.json"
        write_json(job, {"request": dataclasses.asdict(request), "check": checks})
        environment = {
            **os.environ,
            CAPABILITY: str(GPUS[request.gpu].capability),
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(temporary, "inductor")),
            "TRITON_CACHE_DIR": str(Path(temporary, "triton")),
            "TRITON_DEFAULT_FP_FUSION": "1",
            "TRITON_INTERPRET": str(int(checks is not None)),
        }
        command = [sys.executable, "-m", "gradprune.emit.worker", str(library), str(job), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not result.exists():
            raise GradpruneError(f"the process that emits ended with status {done.returncode}: {done.stderr[-TAIL:]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if "error" in found:
            if found["kind"] == "option":
                raise OptionError(found["error"])
            said = f"\n{done.stderr[-TAIL:]}" if found["kind"] == "unforeseen" else ""
            raise GradpruneError(f"{found['error']}{said}")
        if output is not None:
            _keep(folder, output)
    return found


def _keep(folder: Path, output: Path) -> None:
    """Move a finished folder to where it was asked for, as a whole or not at all."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        unfinished = output.with_name(f".{output.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(folder, unfinished)
        os.replace(unfinished, output)
    except OSError as error:
        raise OptionError(f"cannot write --output {output}: {error.strerror or error}") from error
