"""Options of ``gradprune train``, from the command line and from a file, and the order of its work."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gradprune.attacks import NORMS, Attack, Runtime
from gradprune.attacks.registry import DEFAULT_STEP_SIZE, AttackOptions, StepSize, build_attacks
from gradprune.errors import OptionError, unknown
from gradprune.evaluation.run import ModelOnData
from gradprune.evaluation.tables import aligned, eps_text
from gradprune.support.arguments import parse_whole
from gradprune.support.distributed import started
from gradprune.support.files import write_text
from gradprune.training.batches import LinearEps
from gradprune.training.data import (
    AUGMENTATIONS,
    HELD_OUT,
    VALIDATION,
    Samples,
    check_labels,
    load_parts,
    training_loader,
    validation_loader,
)
from gradprune.training.fit import BEST, LAST, History
from gradprune.training.objectives import OBJECTIVES, NearPGD, Objective
from gradprune.training.outer import BatchNorm
from gradprune.training.trainer import AdversarialTrainer
from gradprune.training.watchers import CURVES, METRICS, TENSORBOARD, Curves, JsonLines, Progress, TensorBoard, Watcher
from gradprune.workloads.data_sets import Data
from gradprune.workloads.models import load_model

from .options import (
    AUTOCAST,
    autocast_type,
    check_channels,
    check_compiler,
    check_modules,
    choose_device,
    data_options,
    model_options,
    modules_of,
    parse_number,
    parse_setting,
    parse_step_size,
    prepare_directory,
)

CONFIG = "config.yaml"
Texts = dict[str, Any]
"""Options by name as a user writes them: a string, a list of strings, or ``True``; what is not set is absent."""

DESCRIPTION = """\
Train a model adversarially. The attack is compiled without gradients of weights, the update with them, each once.
Writes last.pt (where to go on from), best.pt (weights of the best epoch by robust accuracy on held-out data),
metrics.jsonl, curves.png and config.yaml (all settings) to the output folder.
"""

EPILOG = f"""\
models (--model):
  digits              a small network for 8x8 digits
  timm:NAME           any model of timm, with the normalisation it expects; --classes N, --pretrained
  module:name         a torch.nn.Module, or what returns one, in module.py of this directory or installed
data (--data):
  digits              1347 digits; gradprune evaluate measures on 450 others
  FOLDER              a folder of images for each class; or of two such folders, train and val
  FILE.npz            x, inputs (N, C, H, W), and y, labels (N,)
  torchvision:NAME    the training part of a data set of torchvision, in --data-root
Integers are divided by 255, so that inputs are in [0, 1].
objectives (--objective):
  plain               cross entropy on the inputs as they are
  pgd                 on adversarial examples (Madry et al. 2018); --clean 0.5 for half the loss on clean inputs
  trades, mart        on both, with a divergence between them (Zhang et al. 2019; Wang et al. 2020); --beta
  awp                 one of these with adversarially perturbed weights (Wu et al. 2020); --awp-of, --gamma
  free                every batch --replays times, each pass for weights and perturbation (Shafahi et al. 2019)
  fast                on FGSM from a random start (Wong et al. 2020)

The same command goes on where it was interrupted (ctrl-c, kill, a crash), exactly; with more --epochs it goes on behind
the last. --config FILE reads options from YAML, such as the {CONFIG} of another run: "batch-size: 64", "set:
[random_start=false]"; options on the command line win.

examples:
  a minute:
    gradprune train --model digits --data digits --eps 0.2 --epochs 8 --output run1
    gradprune evaluate --model digits --data digits --checkpoint run1/best.pt --attack autoattack --eps 0.2
  the same with another objective:
    gradprune train --config run1/{CONFIG} --objective trades --beta 3 --output run2
  TRADES with weight perturbation, weights averaged, in half precision:
    gradprune train --model timm:resnet18 --classes 10 --data torchvision:CIFAR10 --download --objective awp \\
      --awp-of trades --epochs 100 --schedule multistep --ema 0.995 --autocast bf16 --tensorboard --output cifar
  fine-tuning on photographs, two processes:
    torchrun --nproc-per-node 2 -m gradprune train --model timm:resnet50 --pretrained --classes 5 --data photos \\
      --image-size 224 --eps 4/255 --steps 3 --lr 0.01 --epochs 10 --patience 3 --workers 4 --output photos-run
"""


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: Without the dashes in front.
        help: What it is about.
        parse: From its text to its value; a list of words allows these; ``None`` is for one that is on or off.
        default: As text.
        shown: The default in the help, where ``default`` does not say it.
        metavar: What stands for its value in the help.
        many: Whether it takes several values.
        may_change: Whether a run may go on with another value.
    """

    name: str
    help: str
    parse: Callable[[str], Any] | Sequence[str] | None = str
    default: str | None = None
    shown: str | None = None
    metavar: str = "N"
    many: bool = False
    may_change: bool = False

    @property
    def key(self) -> str:
        """Its name as that of an attribute."""
        return self.name.replace("-", "_")

    def value(self, text: Any) -> Any:
        """Its value.

        Args:
            text: As in ``Texts``; ``None`` if it is not set.

        Raises:
            OptionError: It cannot have this value.
        """
        if self.parse is None:
            return bool(text)
        if text is None:
            return [] if self.name == "set" else None
        return [self._one(part) for part in text] if self.many else self._one(text)

    def _one(self, text: str) -> Any:
        assert self.parse is not None
        if not callable(self.parse):
            if text not in self.parse:
                raise OptionError(f"--{self.name}: {unknown('choice', text, self.parse)}")
            return text
        try:
            return self.parse(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise OptionError(f"--{self.name}: {error}") from error

    def texts(self, value: Any) -> Any:
        """What a configuration file says, as in ``Texts``; ``None`` for nothing.

        Raises:
            OptionError: It is of the wrong kind.
        """
        if self.parse is None and isinstance(value, bool):
            return value or None
        parts = value if isinstance(value, list) and self.many else [value]
        if self.parse is None or not all(type(part) in (str, int, float) for part in parts):
            wanted = "true or false" if self.parse is None else "a list" if self.many else "a number or a word"
            raise OptionError(f"{self.name} has to be {wanted}, not {value!r}")
        return [str(part) for part in parts] if self.many else str(value)


def parse_share(text: str) -> float:
    """A number from 0 to below 1."""
    value = parse_number(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def parse_augmentations(text: str) -> list[str]:
    """Names joined by ``+``, or ``none``."""
    names = [] if text == "none" else text.split("+")
    for name in names:
        if name not in AUGMENTATIONS:
            raise argparse.ArgumentTypeError(unknown("augmentation", name, ["none", *AUGMENTATIONS]))
    return names


def parse_attack(text: str) -> tuple[str, int | None]:
    """The name of an attack, and its steps if there is a number behind it, as in ``pgd-20``."""
    name, dash, steps = text.rpartition("-")
    return (name, parse_whole(steps)) if dash and steps.isdecimal() else (text, None)


OPTIONS: dict[str, tuple[Option, ...]] = {
    "what to train": (
        Option("model", "see below (required)", metavar="NAME"),
        Option("checkpoint", "weights to begin with, a state dict", Path, metavar="FILE"),
        Option("pretrained", "begin with timm's own weights, may download", None),
        Option("classes", "of a timm model", parse_whole, shown="its own"),
        Option("mean", "subtracted from each channel", float, many=True, shown="0", metavar="M"),
        Option("std", "what each is divided by then", float, many=True, shown="1", metavar="S"),
    ),
    "on what": (
        Option("data", "see below (required)", metavar="NAME"),
        Option(
            "validation",
            "share to hold out, 0 for none",
            parse_share,
            shown=f"sub-folder {VALIDATION}, or {HELD_OUT}",
            metavar="P",
        ),
        Option(
            "augment",
            "crop, flip, crop+flip or none",
            parse_augmentations,
            shown="crop+flip for colour images",
            metavar="NAMES",
        ),
        Option("image-size", "resize and crop images", parse_whole, shown="as they are"),
        Option("grey", "read the images of a folder as grey", None),
        Option("limit", "that many samples, spread evenly", parse_whole, shown="all"),
        Option("data-root", "for torchvision", Path, "data", metavar="DIR", may_change=True),
        Option("download", "let torchvision download data", None, may_change=True),
        Option("bounds", "smallest and largest valid input", float, many=True, shown="0 1", metavar="X"),
    ),
    "objective": (
        Option("objective", "see below", list(OBJECTIVES), "pgd"),
        Option("eps", "radius, such as 0.1 or 8/255", parse_number, shown="8/255", metavar="E"),
        Option("norm", "of the perturbation", list(NORMS), shown="linf"),
        Option("step-size", "a number or part of eps", parse_step_size, shown="eps/4", metavar="A"),
        Option("steps", "of the attack", parse_whole, shown="10"),
        Option(
            "set",
            "any other setting of the attack, such as random_start=false",
            parse_setting,
            many=True,
            metavar="NAME=VALUE",
        ),
        Option("beta", "of trades and mart: weight of the divergence", parse_number, shown="6 and 5", metavar="B"),
        Option("gamma", "of awp: size of the perturbation of weights", parse_number, shown="0.005", metavar="G"),
        Option("awp-of", "which objective awp is of", ["pgd", "trades", "mart", "fast", "plain"], shown="pgd"),
        Option("replays", "of free: how often a batch is used", parse_whole, shown="8"),
        Option("clean", "of pgd and fast: weight of the loss on clean inputs", parse_share, shown="0", metavar="P"),
        Option("label-smoothing", "share of labels spread over all classes", parse_share, shown="0", metavar="P"),
        Option("batch-norm", "what it does in the attack", get_args(BatchNorm), "eval"),
        Option("eps-warmup", "epochs in which eps grows from 0", parse_number, "0"),
    ),
    "optimization": (
        Option("epochs", "in total", parse_whole, "30", may_change=True),
        Option("batch-size", "samples in a batch of one process", parse_whole, "128"),
        Option("optimizer", "of the weights", ["sgd", "adam", "adamw"], "sgd"),
        Option("lr", "learning rate", parse_number, shown="0.05 of sgd, 0.001 of the others", metavar="R"),
        Option("momentum", "of sgd", parse_number, shown="0.9", metavar="M"),
        Option(
            "weight-decay", "of the optimizer", parse_number, shown="5e-4 of sgd, 0 of adam, 0.01 of adamw", metavar="D"
        ),
        Option("schedule", "of the learning rate", ["constant", "cosine", "onecycle", "multistep"], "cosine"),
        Option(
            "milestones",
            "of multistep: epochs behind which it is divided by 10",
            parse_number,
            many=True,
            shown="1/2 and 3/4 of all",
        ),
        Option("warmup", "epochs in which the learning rate grows from 0", parse_number, shown="0; 0.3 of onecycle"),
        Option("clip", "largest norm of the gradient", parse_number, shown="any", metavar="L"),
        Option("accumulate", "batches for one update", parse_whole, "1"),
        Option("ema", "decay of a moving average of the weights, which is evaluated", parse_share, metavar="D"),
    ),
    "evaluation after epochs": (
        Option("evaluate-attack", "attack and steps", parse_attack, shown="pgd-20; none for plain", metavar="NAME"),
        Option("evaluate-every", "epochs from one to the next", parse_whole, "1"),
        Option(
            "patience",
            "stop after so many evaluations without a better one",
            parse_whole,
            shown="never",
            may_change=True,
        ),
    ),
    "how to run": (
        Option("device", "cpu, cuda, cuda:1, ...", shown="cuda if there is one", metavar="NAME", may_change=True),
        Option("autocast", "type to run the model in", list(AUTOCAST), shown="float32"),
        Option("no-compile", "run eagerly", None, may_change=True),
        Option("workers", "processes that read data ahead", int, "0", may_change=True),
        Option("seed", "of all random numbers", int, "0"),
        Option("checkpoint-minutes", "between checkpoints in an epoch", parse_number, "10", may_change=True),
        Option("output", "where to write", Path, "training", metavar="DIR", may_change=True),
        Option("tensorboard", "write curves, examples and graph for TensorBoard", None, may_change=True),
    ),
}
BY_NAME = {option.name: option for options in OPTIONS.values() for option in options}

ATTACKING = {"pgd", "trades", "mart", "fast", "free"}
ITERATED = {"pgd", "trades", "mart"}
ONLY_FOR = {
    "eps-warmup": ATTACKING,
    "set": ATTACKING,
    "step-size": ITERATED,
    "steps": ITERATED,
    "beta": {"trades", "mart"},
    "gamma": {"awp"},
    "awp-of": {"awp"},
    "replays": {"free"},
    "clean": {"pgd", "fast"},
}
"""Options that not every objective has."""
ONLY_WITH = {"momentum": ("optimizer", "sgd"), "milestones": ("schedule", "multistep")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune train``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with options, by their names")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add(group, option)
    parser.set_defaults(run=run)


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add an option whose text is taken as it is, and which is absent if it is not given."""
    if option.parse is None:
        group.add_argument(
            f"--{option.name}", action="store_true", default=argparse.SUPPRESS, help=f"{option.help} (default: off)"
        )
        return
    default = option.shown or option.default
    is_choice = not callable(option.parse)
    group.add_argument(
        f"--{option.name}",
        default=argparse.SUPPRESS,
        metavar="{" + ",".join(option.parse) + "}" if is_choice else option.metavar,  # type: ignore[arg-type]
        help=f"{option.help} (default: {default})" if default else option.help,
        **({"nargs": "+", "action": "extend"} if option.many else {}),  # type: ignore[arg-type]
    )


def effective(arguments: Mapping[str, Any]) -> Texts:
    """Defaults, on top of them what a configuration file says, and on top of that the command line.

    Args:
        arguments: The attributes that the parser has returned.

    Raises:
        OptionError: The file cannot be read, or has options that do not exist.
    """
    texts: Texts = {name: option.default for name, option in BY_NAME.items() if option.default is not None}
    if arguments.get("config") is not None:
        texts.update(read_config(arguments["config"]))
    texts.update({name: arguments[option.key] for name, option in BY_NAME.items() if option.key in arguments})
    return texts


def parsed(texts: Texts) -> argparse.Namespace:
    """The values of all options, by their keys.

    Raises:
        OptionError: One is missing, cannot have its value, or does not go with another.
    """
    for name in ("model", "data"):
        if name not in texts:
            raise OptionError(f"--{name} is missing: pass it, or --config FILE with it; see gradprune train --help")
    values = argparse.Namespace(**{option.key: option.value(texts.get(name)) for name, option in BY_NAME.items()})
    objectives = {values.objective, (values.awp_of or "pgd") if values.objective == "awp" else None}
    for name, wanted in ONLY_FOR.items():
        if texts.get(name) != BY_NAME[name].default and not objectives & wanted:
            raise OptionError(f"--{name} is for --objective {' or '.join(sorted(wanted))}, not {values.objective}")
    for name, (other, value) in ONLY_WITH.items():
        if name in texts and getattr(values, other) != value:
            raise OptionError(f"--{name} is for --{other} {value}, not {getattr(values, other)}")
    values.bounds = tuple(values.bounds or (0.0, 1.0))
    if len(values.bounds) != 2 or not values.bounds[0] < values.bounds[1]:
        raise OptionError(f"--bounds has to be a smaller and a larger number, not {' '.join(texts['bounds'])}")
    return values


# --- Configuration files ----------------------------------------------------------------------------------------------


def read_config(path: Path) -> Texts:
    """Options in a YAML file.

    Raises:
        OptionError: It cannot be read, or is not one of options that exist.
    """
    check_modules({"yaml"})
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read --config {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise OptionError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise OptionError(f"--config {path} has to hold options and their values, such as 'epochs: 30'")
    texts: Texts = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in BY_NAME:
            raise OptionError(f"--config {path}: {unknown('option', name, BY_NAME)}")
        try:
            text = None if value is None else BY_NAME[name].texts(value)
        except OptionError as error:
            raise OptionError(f"--config {path}: {error}") from error
        if text is not None:
            texts[name] = text
    return texts


def write_config(path: Path, texts: Texts) -> None:
    """Write options as ``read_config`` reads them, in the order of the help."""
    import yaml

    def plain(text: Any) -> Any:
        """A number where YAML reads one, so that it is not in quotes."""
        value = yaml.safe_load(text) if isinstance(text, str) else text
        return value if type(value) in (int, float, bool) else text

    content = {
        name: [plain(part) for part in texts[name]] if isinstance(texts[name], list) else plain(texts[name])
        for name in BY_NAME
        if name in texts
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def check_folder(folder: Path, texts: Texts) -> None:
    """Make sure that what is in a folder may go on with these options.

    Raises:
        OptionError: It is a run with others, or of something else.
    """
    if not (folder / LAST).exists():
        return
    if not (folder / CONFIG).exists():
        raise OptionError(f"{folder} holds a {LAST}, but no {CONFIG} of gradprune train: pass another --output")
    before = read_config(folder / CONFIG)
    other = [
        f"--{name} was {_shown(before.get(name))} and is {_shown(texts.get(name))}"
        for name, option in BY_NAME.items()
        if not option.may_change and option.value(before.get(name)) != option.value(texts.get(name))
    ]
    if other:
        raise OptionError(
            f"{folder} holds a run with other options: {'; '.join(other)}: pass the same to go on, or another --output "
            "to start anew"
        )


def _shown(text: Any) -> str:
    return "not set" if text is None else " ".join(text) if isinstance(text, list) else str(text)


# --- What options stand for -------------------------------------------------------------------------------------------


def build_objective(options: argparse.Namespace) -> Objective:
    """The objective asked for.

    Raises:
        OptionError: There is none with these settings.
    """
    kind: Any = OBJECTIVES[options.objective]
    if options.objective == "awp":
        inner = build_objective(argparse.Namespace(**{**vars(options), "objective": options.awp_of or "pgd"}))
        return kind(objective=inner, **_given(options, "gamma"))  # type: ignore[no-any-return]
    settings = _given(options, "label_smoothing", "beta", "replays", "clean")
    if options.objective == "plain":
        return kind(**settings)  # type: ignore[no-any-return]
    usual: Any = kind().attack
    if options.eps == 0:
        raise OptionError("--eps 0 leaves nothing to attack with: pass --objective plain, or a larger one")
    name = {"fast": "rs-fgsm", "free": "fgsm"}.get(options.objective, "pgd")
    attack: Attack = _attack(options, name, options.steps, options.step_size, options.set, seed=None)
    if isinstance(usual, NearPGD):
        attack = NearPGD(**{**vars(attack), "loss": dict(options.set).get("loss", usual.loss)})
    return kind(attack=attack, **settings)  # type: ignore[no-any-return]


def build_evaluation(options: argparse.Namespace) -> Attack | None:
    """The attack asked for to evaluate with; ``None`` for the one that is usual for the objective."""
    if options.evaluate_attack is None:
        return None
    name, steps = options.evaluate_attack
    return _attack(options, name, steps, None, [], seed=options.seed)


def _attack(
    options: argparse.Namespace,
    name: str,
    steps: int | None,
    step_size: StepSize | None,
    settings: Iterable[tuple[str, Any]],
    seed: int | None,
) -> Attack:
    asked = AttackOptions(
        names=[name],
        eps=[8 / 255 if options.eps is None else options.eps],
        norm=options.norm,
        steps=None if steps is None else [steps],
        step_size=step_size or DEFAULT_STEP_SIZE,
        bounds=options.bounds,
        seed=seed,
        settings=dict(settings),
    )
    found = build_attacks(asked)
    if not found:
        raise OptionError("--eps 0 leaves nothing to evaluate with: leave out --evaluate-attack, or pass a larger one")
    return found[0][1]


def build_optimizer(options: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer asked for."""
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    usual: dict[str, float] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4} if kind is torch.optim.SGD else {}
    settings = {**usual, **_given(options, "lr", "momentum", "weight_decay")}
    return kind(model.parameters(), **settings)  # type: ignore[no-any-return]


def learning_rate(options: argparse.Namespace, updates_per_epoch: float) -> Callable[[int], float]:
    """From the number of updates so far to what the learning rate is multiplied by.

    In closed form, so that a run may be lengthened: what is behind it then follows the longer one's curve.
    """
    total = options.epochs * updates_per_epoch
    rise = (options.warmup or 0.0) * updates_per_epoch
    if options.schedule == "onecycle" and options.warmup is None:
        rise = 0.3 * total
    milestones = options.milestones or [options.epochs / 2, options.epochs * 3 / 4]

    def factor(done: int) -> float:
        if options.schedule == "onecycle":
            # As torch's OneCycleLR: two halves of a cosine, from 1/25 up to 1, and down to 4e-6.
            if done < rise:
                return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / rise)) / 2
            way = min(1.0, (done - rise) / max(total - 1 - rise, 1))
            return 4e-6 + (1 - 4e-6) * (1 + math.cos(math.pi * way)) / 2
        warm = min(1.0, (done + 1) / rise) if rise else 1.0
        if options.schedule == "cosine":
            return warm * (1 + math.cos(math.pi * min(1.0, done / total))) / 2
        if options.schedule == "multistep":
            return warm / float(10 ** sum(done >= milestone * updates_per_epoch for milestone in milestones))
        return warm

    return factor


def _given(options: argparse.Namespace, *keys: str) -> dict[str, Any]:
    return {key: getattr(options, key) for key in keys if getattr(options, key) is not None}


# --- Work -------------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Carry out ``gradprune train``.

    Raises:
        OptionError: Something was asked for that does not exist or does not go together, or the output cannot be
            written, or holds another run.
        GradpruneError: The model cannot be trained on this data, or something is not installed.
        KeyboardInterrupt: It was interrupted, and goes on when it is called again.
    """
    texts = effective(vars(arguments))
    options = parsed(texts)
    objective, evaluation = build_objective(options), build_evaluation(options)
    check_modules({"matplotlib", "tqdm", "yaml", *modules_of(options.model, options.data)})
    if not options.no_compile:
        check_compiler()
    check_folder(options.output, texts)
    watchers: list[Watcher] = [Progress(), JsonLines(), Curves()]
    watchers += [TensorBoard()] if options.tensorboard else []
    prepare_directory(options.output)
    from gradprune.support.progress import stage  # imports tqdm, an optional dependency

    with started() as ranks:
        device = choose_device(options.device, ranks.local)
        with stage("loading model and data") if ranks.is_first else nullcontext():
            data, validation = load_parts(data_options(options), options.validation, options.seed)
            check_channels(options, data)
            model = load_model(replace(model_options(options), trained=False), options.seed).to(device)
        _check(model, data, device, options.bounds)
        samples = Samples(data, _augmentations(options, data))
        loader = training_loader(samples, options.batch_size, ranks, workers=options.workers, seed=options.seed)
        held_out = (
            validation_loader(validation, options.batch_size, ranks, workers=options.workers)
            if validation is not None
            else None
        )
        updates = len(loader) * getattr(objective, "replays", 1) / options.accumulate
        optimizer = build_optimizer(options, model)
        trainer = AdversarialTrainer(
            model,
            optimizer,
            objective,
            scheduler=LambdaLR(optimizer, learning_rate(options, updates)),
            eps_schedule=LinearEps(round(options.eps_warmup * updates)) if options.eps_warmup else None,
            batch_norm=options.batch_norm,
            autocast=autocast_type(options.autocast),
            clip=options.clip,
            accumulate=options.accumulate,
            ema=options.ema,
            compile=not options.no_compile,
        )
        if ranks.is_first:
            write_config(options.output / CONFIG, texts)
        history = trainer.fit(
            loader,
            options.epochs,
            validation=held_out,
            evaluation=evaluation,
            evaluate_every=options.evaluate_every,
            patience=options.patience,
            folder=options.output,
            checkpoint_seconds=60 * options.checkpoint_minutes,
            seed=options.seed,
            watchers=watchers,
        )
        if ranks.is_first:
            _report(options, texts, history)
        ranks.wait()
    return 0


def _check(model: nn.Module, data: Data, device: torch.device, bounds: tuple[float, float]) -> None:
    """Make sure that the model takes the data."""
    subject = ModelOnData(model, data, device, 1, Runtime(compile=False), bounds)
    subject.check()
    x, _ = subject.batch(0)
    check_labels(data, subject.logits(x).shape[1])


def _augmentations(options: argparse.Namespace, data: Data) -> list[str]:
    """What was asked for, or else what suits most photographs; digits and grey images may mean something else mirrored.

    Raises:
        OptionError: The data are no images.
    """
    x, _ = data.take([0])
    if options.augment is None:
        return list(AUGMENTATIONS) if x.ndim == 4 and x.shape[1] == 3 else []
    if options.augment and x.ndim != 4:
        raise OptionError(f"--augment is for images (N, C, H, W), not for inputs of shape {tuple(x.shape)}")
    return list(options.augment)


def _report(options: argparse.Namespace, texts: Texts, history: History) -> None:
    """Say what came of it, and how to go on."""
    names = {"last": history.epochs[-1], **({"best": history.best} if history.best else {})}
    rows = [["epoch", "", "loss", "accuracy", "clean", "robust"]]
    for name, record in names.items():
        shares = ["-" if record[key] is None else f"{record[key]:.2%}" for key in ("accuracy", "clean", "robust")]
        rows.append([name, str(record["epoch"]), f"{record['loss']:.4f}", *shares])
    print("\n".join(aligned(rows)))
    if history.stopped_early:
        print(f"Stopped early: no better evaluation for {options.patience}; pass a larger --patience to go on.")
    written = [LAST, *([BEST] if history.best else []), METRICS, CURVES, CONFIG]
    written += [f"{TENSORBOARD}/"] if options.tensorboard else []
    print(f"Saved in {options.output}: {', '.join(written)}.")
    print(f"Measure it: {measuring_command(options, texts, BEST if history.best else LAST)}")


def measuring_command(options: argparse.Namespace, texts: Texts, weights: str) -> str:
    """The ``gradprune evaluate`` command for what was trained, on data it was not trained on where there are any."""
    taken = ("model", "classes", "mean", "std", "image-size", "grey", "data-root", "bounds", "norm")
    words = ["gradprune", "evaluate"]
    for name in taken:
        if name in texts and texts[name] != BY_NAME[name].default:
            text = texts[name]
            words += [f"--{name}", *([] if text is True else text if isinstance(text, list) else [text])]
    data = Path(options.data) / VALIDATION
    words += ["--data", str(data) if data.is_dir() else options.data]
    words += ["--checkpoint", str(options.output / weights), "--attack", "autoattack"]
    words += ["--eps", texts.get("eps", eps_text(8 / 255)), "--output", str(options.output / "evaluation")]
    return shlex.join(words)
