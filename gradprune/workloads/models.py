"""Models by name, with weights from a checkpoint and the normalisation of their inputs inside."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
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
"""Where checkpoints usually keep their state dict if they hold more than that."""
PREFIXES = ("module.", "_orig_mod.")
"""What ``DataParallel`` and ``torch.compile`` put in front of names."""
NO_STATE_DICT = "holds no plain state dict: write one with torch.save(model.state_dict(), path)"
NAMES_SHOWN = 3
DEPTH = 3
"""How many names may lead to a state dict."""
Place = tuple[Any, ...]
"""The names that lead to something in a checkpoint."""


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
        """Logits of images ``(N, C, H, W)``."""
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
    if options.mean is not None and options.std is not None and len(options.mean) != len(options.std):
        raise OptionError(
            f"--mean has {len(options.mean)} numbers and --std {len(options.std)}: pass one of each for each channel"
        )
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
        model = Normalized(model, mean, std)
    if options.checkpoint is not None:
        load_checkpoint(model, options.checkpoint)
    return model.eval()


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``; it may be nested in a larger checkpoint, or be that of a wrapped model.

    Into a normalised model goes its own, as training writes it, or that of the model inside. Of several that fit, the
    one under a usual name is taken, which is said.

    Raises:
        OptionError: The file cannot be read without running code of its own, holds nothing that fits the model, or
            several state dicts that do.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OptionError(f"cannot read --checkpoint {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise OptionError(f"--checkpoint {path} {NO_STATE_DICT}") from error
    parts = [model, model.model] if isinstance(model, Normalized) else [model]
    owners = [(part, part.state_dict()) for part in parts]
    tried = [
        (place, part, own, state)
        for place, found in _state_dicts(content)
        for state in _unwrapped(found)
        for part, own in owners
    ]
    if not tried:
        raise OptionError(f"--checkpoint {path} {NO_STATE_DICT}")
    fitting: dict[Place, tuple[nn.Module, dict[str, Tensor]]] = {}
    for place, part, own, state in tried:
        if not _differences(own, state):
            fitting.setdefault(place, (part, state))  # as it is, rather than without a prefix
    if not fitting:
        place, _, own, state = max(tried, key=lambda one: len(one[2].keys() & one[3].keys()))
        raise OptionError(f"--checkpoint {path}{_at(place)} is of another model: {'; '.join(_differences(own, state))}")
    usual = sorted((place for place in fitting if set(place) <= set(NESTED)), key=lambda one: [*map(NESTED.index, one)])
    if len(fitting) > 1 and not usual:
        raise OptionError(
            f"--checkpoint {path} holds several state dicts that fit ({_some([*map(_at, fitting)])}): write the one "
            f"that is meant, with torch.save(torch.load(path){_at(next(iter(fitting)))}, other_path) for example"
        )
    taken = usual[0] if usual else next(iter(fitting))
    if others := [place for place in fitting if place != taken]:
        print(f"--checkpoint {path}: took {_at(taken)}, not {_some([*map(_at, others)])}", file=sys.stderr)
    part, state = fitting[taken]
    part.load_state_dict(state)


def _state_dicts(content: Any, place: Place = ()) -> Iterator[tuple[Place, dict[str, Tensor]]]:
    """All state dicts in a checkpoint, and where they are."""
    if not isinstance(content, Mapping) or (place and not content):
        return
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        yield place, dict(content)
    elif len(place) < DEPTH:
        for name, value in content.items():
            yield from _state_dicts(value, (*place, name))


def _unwrapped(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A state dict as it is, then without the prefixes that all its names have, one after the other."""
    yield state
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            yield from _unwrapped({name.removeprefix(prefix): value for name, value in state.items()})


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """How a state dict differs from a model's own in names and shapes."""
    problems = {
        "it lacks": [name for name in own if name not in state],
        "the model does not have": [name for name in state if name not in own],
        "of another shape are": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    return [f"{what} {_some(names)}" for what, names in problems.items() if names]


def _at(place: Place) -> str:
    """A place as it is written in Python, such as ``['ema']``."""
    return "".join(f"[{name!r}]" for name in place)


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
    module_name, colon, attribute = name.rpartition(":")
    if not (colon and module_name and attribute):
        raise OptionError(f"{option} {name!r} is not of the form {FORMS}")
    if "/" in module_name or os.sep in module_name or module_name.endswith(".py"):
        raise OptionError(f"{option} {name!r} is a path, not the name of a module: {_spelling(module_name, attribute)}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
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


def _spelling(given: str, attribute: str) -> str:
    """How to name what is in a file that was given by its path."""
    path = Path(os.path.relpath(given.removesuffix(".py")))
    if not path.name or any("." in part for part in path.parts if part != os.pardir):
        return f"a module has no dots in its name: rename what has, and pass {FORMS}"
    if os.pardir in path.parts or path.is_absolute():
        return f"run the command in {path.resolve().parent} and pass {path.name}:{attribute}"
    return f"pass {'.'.join(path.parts)}:{attribute}"


def _imported(name: str) -> nn.Module:
    """What ``module:name`` is or, called without arguments, returns."""
    found, attribute = import_named(name), name.rpartition(":")[2]
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
