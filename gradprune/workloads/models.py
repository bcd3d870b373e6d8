"""Models by name, with weights from a checkpoint and the normalisation of their inputs inside."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.errors import OptionError

from .vision import let_torchvision_import

DIGITS, TIMM = "digits", "timm:"
FORMS = "module:name of this directory, timm:NAME or digits"
NESTED = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
"""Where checkpoints keep their state dict if they hold more than that."""
NAMES_SHOWN = 3


class Normalized(nn.Module):
    """A model of normalised inputs as one of inputs in their own range, so that eps has a meaning.

    Args:
        model: Takes ``(x - mean) / std``.
        mean: One number for each channel, or one for all.
        std: The same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(N, C, H, W)``.

        Raises:
            OptionError: There are more or fewer channels than numbers.
        """
        if self.mean.numel() not in (1, x.shape[1]):
            raise OptionError(f"--mean and --std have {self.mean.numel()} numbers, the images {x.shape[1]} channels")
        return self.model((x - self.mean) / self.std)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ModelOptions:
    """Which model.

    Attributes:
        name: In one of the ``FORMS``.
        checkpoint: A state dict to load.
        mean: To subtract from each channel; ``None`` for what a timm model wants, nothing for others.
        std: To divide each channel by.
        pretrained: Have timm load its weights, which may download them.
        classes: How many classes a timm model is to have; ``None`` for its own number.
        trained: Whether the small network for digits is to be trained on the spot, if it has no checkpoint.
    """

    name: str
    checkpoint: Path | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    pretrained: bool = False
    classes: int | None = None
    trained: bool = True


def load_model(options: ModelOptions, seed: int) -> nn.Module:
    """The model asked for, in evaluation mode, on the CPU.

    Args:
        options: Which model.
        seed: Of the weights of a model that draws its own.

    Raises:
        OptionError: There is no such model, or the checkpoint does not fit it.
    """
    if (options.mean is None) != (options.std is None):
        raise OptionError("--mean and --std belong together: pass both, one number for each channel")
    if options.std is not None and not all(value > 0 for value in options.std):
        raise OptionError(f"--std has to be positive, not {' '.join(f'{value:g}' for value in options.std)}")
    if options.pretrained and not options.name.startswith(TIMM):
        raise OptionError(f"--pretrained is for timm:NAME, not {options.name!r}: pass --checkpoint FILE")
    if options.classes is not None and not options.name.startswith(TIMM):
        raise OptionError(f"--classes is for timm:NAME: {options.name!r} has the classes that it has")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if options.name == DIGITS:
            model = _digits(trained=options.trained and options.checkpoint is None)
        elif options.name.startswith(TIMM):
            model = _timm(options.name.removeprefix(TIMM), options)
        else:
            model = _imported(options.name)
    mean, std = options.mean, options.std
    if mean is None and options.name.startswith(TIMM):
        config = getattr(model, "pretrained_cfg", None) or {}
        mean, std = config.get("mean"), config.get("std")
    if mean is not None and std is not None:
        if len(mean) != len(std):
            raise OptionError(f"--mean has {len(mean)} numbers and --std {len(std)}: pass one of each for each channel")
        model = Normalized(model, mean, std)
    if options.checkpoint is not None:
        load_checkpoint(model, options.checkpoint)
    return model.eval()


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``; it may be nested under a usual name, or be that of a ``DataParallel``.

    Into a normalised model goes its own, as training writes it, or that of the model inside.

    Raises:
        OptionError: The file cannot be read without running code of its own, or does not fit the model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OptionError(f"cannot read --checkpoint {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise OptionError(
            f"--checkpoint {path} holds no plain state dict: write one with torch.save(model.state_dict(), path)"
        ) from error
    state = _innermost(model, state, path)
    while state and (prefix := next((one for one in PREFIXES if all(name.startswith(one) for name in state)), None)):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if isinstance(model, Normalized) and not {"mean", "std"} <= state.keys():
        model = model.model
    own = model.state_dict()
    problems = {
        "it lacks": [name for name in own if name not in state],
        "the model does not have": [name for name in state if name not in own],
        "of another shape are": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    found = [f"{what} {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise OptionError(f"--checkpoint {path} is of another model: {'; '.join(found)}")
    model.load_state_dict(state)


def _innermost(model: nn.Module, content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: all of it, or what is under one of the usual names, or the one that there is.

    Raises:
        OptionError: There is none, or one cannot tell which.
    """
    while isinstance(content, Mapping) and not (content and all(map(_is_tensor, content.values()))):
        inner = {
            str(name): value for name, value in content.items() if isinstance(value, Mapping) and _holds_tensors(value)
        }
        usual = [name for name in NESTED if name in inner]
        fitting = [name for name in inner if _names(inner[name]) & set(model.state_dict())]
        chosen = usual[:1] or (fitting if len(fitting) == 1 else list(inner))
        if len(chosen) > 1:
            raise OptionError(
                f"--checkpoint {path} holds several state dicts ({', '.join(chosen)}): write the one that is meant "
                "with torch.save(checkpoint[name], path)"
            )
        content = inner[chosen[0]] if chosen else None
    if not isinstance(content, Mapping):
        raise OptionError(
            f"--checkpoint {path} holds no plain state dict: write one with torch.save(model.state_dict(), path)"
        )
    return dict(content)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether a state dict is in there."""
    values = list(content.values())
    nested = [value for value in values if isinstance(value, Mapping)]
    return bool(values) and (all(map(_is_tensor, values)) or any(map(_holds_tensors, nested)))


def _names(content: Mapping[Any, Any]) -> set[str]:
    """The names in a state dict, without prefixes."""
    names = set(map(str, content))
    while names and (prefix := next((one for one in PREFIXES if all(name.startswith(one) for name in names)), None)):
        names = {name.removeprefix(prefix) for name in names}
    return names


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's structure, as it prints itself, and of all its weights and buffers."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digits(*, trained: bool) -> nn.Module:
    from .digits import load_digits, train_digits
    from .networks import DigitsNet

    if not trained:
        return DigitsNet()
    threads = torch.get_num_threads()
    try:
        # Sums depend on how they are split among threads; the weights must be the same in every process.
        torch.set_num_threads(1)
        return train_digits(load_digits())
    finally:
        torch.set_num_threads(threads)


def _timm(name: str, options: ModelOptions) -> nn.Module:
    let_torchvision_import()
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:NAMES_SHOWN]
        hint = f": there are {', '.join(close)}" if close else ": timm.list_models() has their names"
        raise OptionError(f"timm has no model {name!r}{hint}")
    classes: dict[str, Any] = {} if options.classes is None else {"num_classes": options.classes}
    return timm.create_model(name, pretrained=options.pretrained, **classes)


def import_named(name: str, option: str = "--model") -> Any:
    """What ``module:name`` is, the module being one of the current folder or an installed one.

    Args:
        name: The name, dots after the colon leading to attributes.
        option: What the name was given as, for messages.

    Raises:
        OptionError: There is no such thing, or importing it fails.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise OptionError(f"{option} {name!r} is not of the form {FORMS}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if "/" in module_name or "\\" in module_name or module_name.endswith(".py"):
        path = Path(module_name)
        spelling = ".".join(path.with_suffix("").parts) if not path.is_absolute() else path.stem
        raise OptionError(f"{option} {name!r} is a path, not the name of a module: pass {spelling}:{attribute}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise OptionError(f"{option} {name}: importing {module_name} failed: {error}") from error
        raise OptionError(
            f"{option} {name}: there is no module {error.name!r} in {Path.cwd()} or installed: run it where it is"
        ) from error
    except Exception as error:  # whatever the user's module raises
        raise OptionError(
            f"{option} {name}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise OptionError(f"{option} {name}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    return found


def _imported(name: str) -> nn.Module:
    """What ``module:name`` is or, called without arguments, returns."""
    found, attribute = import_named(name), name.partition(":")[2]
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:  # whatever the user's function raises
            raise OptionError(f"--model {name}: {attribute}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise OptionError(
            f"--model {name} is no torch.nn.Module and returns none when called without arguments, but "
            f"{type(found).__name__}"
        )
    return found


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
