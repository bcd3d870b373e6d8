"""Options that several commands have: how their texts are read, and what they stand for."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from gradprune.attacks.registry import StepSize
from gradprune.errors import GradpruneError, OptionError
from gradprune.support.arguments import parse_whole
from gradprune.workloads.data_sets import Data, DataOptions
from gradprune.workloads.models import ModelOptions

AUTOCAST = {"fp16": "float16", "bf16": "bfloat16"}
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}
"""Modules whose packages have other names."""

# --- Texts ------------------------------------------------------------------------------------------------------------


def parse_setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value a number, true, false or a word."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    name = name.replace("-", "_")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_number(text: str) -> float:
    """A number from 0 on, also as a fraction such as ``8/255``."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, such as 0.1 or 8/255, got {text!r}")
    return value


def parse_step_size(text: str) -> StepSize:
    """A number, or a part of eps such as ``eps/4``."""
    start, slash, below = text.partition("/")
    if start != "eps":
        return StepSize(parse_number(text), is_relative=False)
    part = parse_number(f"1/{below}" if slash else "1")
    return StepSize(part, is_relative=True)


# --- Model, data and device -------------------------------------------------------------------------------------------


def add_model_and_data(group: argparse._ArgumentGroup) -> None:
    """Add the options that say which model and which data."""
    group.add_argument("--model", required=True, metavar="NAME", help="see below")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="state dict to load into the model")
    group.add_argument("--pretrained", action="store_true", help="timm's own weights, may download (default: random)")
    group.add_argument("--classes", type=parse_whole, metavar="N", help="of a timm model (default: its own)")
    group.add_argument("--mean", type=float, nargs="+", metavar="M", help="subtracted from each channel (default: 0)")
    group.add_argument("--std", type=float, nargs="+", metavar="S", help="what each is divided by then (default: 1)")
    group.add_argument("--data", required=True, metavar="NAME", help="see below")
    group.add_argument("--limit", type=parse_whole, metavar="N", help="that many samples, spread evenly (default: all)")
    group.add_argument(
        "--image-size", type=parse_whole, metavar="N", help="resize and crop images (default: as they are)"
    )
    group.add_argument("--grey", action="store_true", help="read the images of a folder as grey (default: in colour)")
    group.add_argument(
        "--data-root", type=Path, default=Path("data"), metavar="DIR", help="for torchvision (default: %(default)s)"
    )
    group.add_argument("--download", action="store_true", help="let torchvision download data (default: off)")


def model_options(arguments: argparse.Namespace) -> ModelOptions:
    """Which model was asked for."""
    return ModelOptions(
        name=arguments.model,
        checkpoint=arguments.checkpoint,
        mean=arguments.mean,
        std=arguments.std,
        pretrained=arguments.pretrained,
        classes=arguments.classes,
    )


def data_options(arguments: argparse.Namespace) -> DataOptions:
    """Which data were asked for."""
    return DataOptions(
        name=arguments.data,
        root=arguments.data_root,
        download=arguments.download,
        image_size=arguments.image_size,
        grey=arguments.grey,
        limit=arguments.limit,
    )


def check_channels(arguments: argparse.Namespace, data: Data) -> None:
    """Make sure that ``--mean`` and ``--std`` have a number for each channel of the data, or one for all.

    Raises:
        OptionError: They have not, or the data has no channels.
    """
    given = {"mean": arguments.mean, "std": arguments.std}
    if all(numbers is None for numbers in given.values()):
        return
    x, _ = data.batch(0, 1)
    if x.ndim != 4:
        raise OptionError(
            f"--mean and --std are for images (C, H, W), and {data.name} has inputs of shape {tuple(x[0].shape)}: "
            "leave them out"
        )
    for name, numbers in given.items():
        if numbers is not None and len(numbers) not in (1, x.shape[1]):
            raise OptionError(
                f"--{name} has {_counted(len(numbers), 'number')}, and the images of {data.name} have "
                f"{_counted(x.shape[1], 'channel')}: pass one for each channel, or one for all"
            )


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def choose_device(name: str | None, local: int) -> torch.device:
    """The device asked for; of several processes on a machine with GPUs, each has one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name!r} is no device: pass cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if ":" not in name and count:
            device = torch.device("cuda", local % count)
        if not count or device.index >= count:
            raise OptionError(f"--device {name}: there are {count} CUDA devices: pass another, or cpu")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise OptionError(f"--device {name} is not supported: pass cpu, cuda or cuda:1")
    return device


def autocast_type(name: str | None) -> torch.dtype | None:
    """The type that ``--autocast`` names."""
    return None if name is None else getattr(torch, AUTOCAST[name])


def add_target_options(group: Any, *, batch: int | None, shown: object) -> None:
    """Add what a stock attack to be inspected or emitted depends on.

    Args:
        group: Where to add the options.
        batch: Images unless asked otherwise.
        shown: What the help says of that.
    """
    add = group.add_argument
    add("--form", choices=("step", "model"), default="step", help="compile the step, or only its model (default: step)")
    add("--batch", type=parse_whole, default=batch, metavar="N", help=f"images (default: {shown})")
    add("--image-size", type=parse_whole, metavar="N", help="height and width (default: the model's)")
    add("--disable", nargs="+", action="extend", default=[], metavar="PASS", help="leave out passes")
    add("--exact-order", action="store_true", help="leave out passes that may round differently")


# --- What has to be there ---------------------------------------------------------------------------------------------


def modules_of(model: str, data: str) -> set[str]:
    """Modules that a model and a data set need."""
    needed = set()
    if "digits" in (model, data):
        needed.add("sklearn")
    if model.startswith("timm:"):
        needed.add("timm")
    if data.startswith("torchvision:"):
        needed |= {"torchvision", "PIL"}
    elif Path(data).is_dir():
        needed.add("PIL")
    return needed


def check_modules(modules: set[str]) -> None:
    """Raise a ``GradpruneError`` that says how to install what is missing of some modules."""
    missing = sorted(module for module in modules if importlib.util.find_spec(module) is None)
    if missing:
        packages = " ".join(PACKAGES.get(module, module) for module in missing)
        raise GradpruneError(f"this needs {' and '.join(missing)}: run pip install {packages}")


def check_compiler() -> None:
    """Make sure that Inductor will find a C++ compiler.

    Raises:
        GradpruneError: There is none.
    """
    named = os.environ.get("CXX")
    wanted = [named] if named else ["g++", "clang++", "c++", "cl"]
    if not any(shutil.which(name) for name in wanted):
        raise GradpruneError(
            f"torch.compile needs a C++ compiler and none of {', '.join(wanted)} was found: install one or set CXX"
        )


def prepare_directory(directory: Path) -> None:
    """Create ``directory`` unless it exists, and make sure that files can be written there.

    Raises:
        OptionError: It cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(
            f"cannot write to {directory} ({reason}): pass --output DIR with a directory you may write"
        ) from error
