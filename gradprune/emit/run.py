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

from .device import CAPABILITY, build
from .gpus import GPUS
from .record import Request

TAIL = 3000
"""Characters shown of what a worker said before it failed."""


def check_requirements() -> None:
    """Make sure that code can be generated here.

    Raises:
        GradpruneError: Triton is missing, or torch is not one whose private parts are known.
    """
    from gradprune.torch_compat.fake_cuda import CHECKED

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
    library = build()
    with tempfile.TemporaryDirectory(prefix="gradprune-emit-") as temporary:
        folder = Path(temporary, "emission")
        folder.mkdir()
        asked, result = Path(temporary, "request.json"), folder / "emission.json"
        asked.write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
        environment = {
            **os.environ,
            CAPABILITY: str(GPUS[request.gpu].capability),
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(temporary, "inductor")),
            "TRITON_CACHE_DIR": str(Path(temporary, "triton")),
            "TRITON_DEFAULT_FP_FUSION": "1",
        }
        command = [sys.executable, "-m", "gradprune.emit.worker", str(library), str(asked), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not result.exists():
            raise GradpruneError(f"the process that emits ended with status {done.returncode}: {done.stderr[-TAIL:]}")
        emitted: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if "error" in emitted:
            if emitted["kind"] == "option":
                raise OptionError(emitted["error"])
            said = f"\n{done.stderr[-TAIL:]}" if emitted["kind"] == "unforeseen" else ""
            raise GradpruneError(f"{emitted['error']}{said}")
        if output is not None:
            _keep(folder, output)
    return emitted


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
