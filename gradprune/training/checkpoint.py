"""Checkpoints: written as a whole or not at all, read without running code, refused if they are of something else."""

from __future__ import annotations

import os
import pickle
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradprune.errors import TrainingError
from gradprune.support.files import replacing

FORMAT = "gradprune training checkpoint"
VERSION = 1


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; the file before it stays whole until this one is on the disk.

    Args:
        path: The file.
        content: Tensors, numbers, strings and containers of these.

    Raises:
        TrainingError: It cannot be written. What was there is still there.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            torch.save(dict(content), stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:  # torch says the latter where its writer met the former
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = f"{path} is the one before" if path.exists() else "there is none from before"
        raise TrainingError(f"cannot write the checkpoint {path}: {reason}: make room or access; {kept}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, without running any code that it may contain.

    Raises:
        TrainingError: It cannot be read, is damaged, or was written by something else.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise TrainingError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    try:
        with stream:
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}): move it away to start anew, or put a copy "
            "in its place"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TrainingError(f"{path} was not written by this trainer: move it away, or train in another folder")
    if content.get("version") != VERSION:
        raise TrainingError(
            f"{path} has version {content.get('version')!r} of the format, and this gradprune reads {VERSION}: go on "
            "with the one that wrote it, or train in another folder"
        )
    return content


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process has left behind of its attempts to write ``path``."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


def check_settings(path: Path, saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Make sure that a checkpoint is of the training that is to go on.

    Raises:
        TrainingError: It was written with other settings; names them.
    """
    other = [
        f"{name} was {saved.get(name, 'not set')} and is {current.get(name, 'not set')}"
        for name in {**saved, **current}
        if saved.get(name) != current.get(name)
    ]
    if other:
        raise TrainingError(
            f"{path} is of a training with other settings: {'; '.join(other)}: go on with those, or in another folder"
        )


def text_of(value: object) -> str:
    """How a setting prints, without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


# --- Random numbers ---------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of every global generator that training may draw from."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *(float(value) for value in rest)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back where it was."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
