"""``gradprune evaluate``; and options and preparations that it shares with ``gradprune attack``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from gradprune.attacks.registry import DEFAULT_STEP_SIZE, AttackOptions, build_attacks
from gradprune.errors import OptionError
from gradprune.evaluation.evaluation import PICTURES, Evaluation
from gradprune.evaluation.robustbench import check_about, parse_about, save_records
from gradprune.support.arguments import parse_whole
from gradprune.support.distributed import started
from gradprune.workloads.data_sets import load_data
from gradprune.workloads.models import load_model

from .options import (
    AUTOCAST,
    add_model_and_data,
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

COMPILE: dict[str, bool | Literal["auto"]] = {"always": True, "auto": "auto", "never": False}

NAMES = """\
models (--model):
  digits              a small network for 8x8 digits, trained on the spot in seconds
  timm:NAME           any model of timm, with the normalisation it expects; --pretrained loads its weights
  module:name         a torch.nn.Module, or what returns one, in module.py of this directory or installed
data (--data):
  digits              450 digits that the network above was not trained on
  FOLDER              a folder of images for each class, classes numbered in the order of their names
  FILE.npz            x, inputs (N, C, H, W), and y, labels (N,)
  torchvision:NAME    the test part of a data set of torchvision, in --data-root
Integers are divided by 255, so that inputs are in [0, 1]; a model that takes others is given --mean and --std, or
--bounds.
attacks (--attack):
  fgsm rs-fgsm bim pgd mi-fgsm ni-fgsm si-ni-fgsm vmi-fgsm vni-fgsm di-fgsm ti-fgsm apgd apgd-t cw deepfool fab square
  autoattack
--eps does not apply to cw and deepfool, --steps not to fgsm, rs-fgsm, square and autoattack. --eps 0 is no attack.
"""

RESUMING = """\
Finished batches are kept in the output folder until all are done, for AutoAttack also after each of its parts; called
again, the command goes on where it was interrupted. What depends on the code of your model is recognised by its weights
and its printed structure: after a change that shows in neither, take another folder.
"""

EVALUATE = """\
Measure a model's accuracy under several attacks, each with every eps and number of steps. Writes results/*/record.json,
accuracy.md (a table of all records in the folder), accuracy.png (accuracy against eps), pictures of the first images
under each attack in results/*/pictures.png, and the first image under all of them in first-image.png.
"""

EVALUATE_EXAMPLES = """\
examples:
  a sweep of eps with FGSM:
    gradprune evaluate --model digits --data digits --attack fgsm --eps 0 .05 .1 .15 .2 .25 .3 --output sweep
  a grid of steps and eps, targeted at the least likely class, in steps of eps/10; both go into one table:
    gradprune evaluate --model digits --data digits --attack bim --targeted least-likely --step-size eps/10 \\
      --steps 5 10 20 --eps .031 --output grid
    gradprune evaluate --model digits --data digits --attack bim --targeted least-likely --step-size eps/10 \\
      --steps 10 --eps .015 .046 --output grid
  several attacks, two processes:
    torchrun --nproc-per-node 2 -m gradprune evaluate --model timm:resnet18 --pretrained --data imagenet/val \\
      --image-size 224 --limit 1000 --attack pgd autoattack --eps 2/255 4/255
  a record for RobustBench:
    gradprune evaluate --model mine:net --data cifar10.npz --attack autoattack --eps 8/255 \\
      --robustbench Mine2026 architecture=ResNet-18 venue=ICLR
  samples leave PGD as soon as they are fooled:
    gradprune evaluate --model digits --data digits --attack pgd --steps 50 --eps .1 --set stop_at_success=true
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune evaluate``."""
    parser.description, parser.epilog = EVALUATE, f"{NAMES}\n{RESUMING}\n{EVALUATE_EXAMPLES}"
    add_options(parser, several=True)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Add the options; with ``several``, those that take several values do."""
    many: Any = {"nargs": "+", "action": "extend"} if several else {"nargs": 1}
    group = parser.add_argument_group("what to attack")
    add_model_and_data(group)
    group.add_argument(
        "--bounds", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="valid inputs (default: 0 1)"
    )
    group = parser.add_argument_group("attacks")
    group.add_argument("--attack", required=True, metavar="NAME", help="see below", **many)
    group.add_argument(
        "--eps", type=parse_number, metavar="E", help="radius, such as 0.1 or 8/255 (default: 8/255)", **many
    )
    group.add_argument("--norm", choices=("linf", "l2", "l1"), help="(default: linf; l2 for cw and deepfool)")
    group.add_argument(
        "--steps", type=parse_whole, metavar="N", help="of iterated attacks (default: each attack's)", **many
    )
    group.add_argument(
        "--step-size", type=parse_step_size, metavar="A", help="a number or part of eps (default: eps/4)"
    )
    group.add_argument("--targeted", choices=("least-likely", "second-best", "random"), help="(default: untargeted)")
    group.add_argument(
        "--set",
        type=parse_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of the attacks, such as restarts=5 (repeatable)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")
    group = parser.add_argument_group("how to run")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument("--batch-size", type=parse_whole, default=128, metavar="N", help="(default: %(default)s)")
    group.add_argument("--autocast", choices=AUTOCAST, help="type to run the model in (default: float32)")
    group.add_argument(
        "--compile",
        choices=COMPILE,
        default="always",
        help="always; never, which is sooner for a few steps; or auto, once it has paid (default: %(default)s)",
    )
    group.add_argument("--no-compile", action="store_const", const="never", dest="compile", help="--compile never")
    default = "evaluation" if several else "adversarial"
    group.add_argument("--output", type=Path, default=Path(default), metavar="DIR", help="(default: %(default)s)")
    if several:
        group.add_argument(
            "--keep-examples",
            action="store_true",
            help=f"all in results/*/adversarial.npz (default: {PICTURES} of each)",
        )
        group.add_argument(
            "--robustbench",
            nargs="+",
            metavar=("NAME", "FIELD=VALUE"),
            help="write autoattack's result as RobustBench keeps it, model_info/DATA/NORM/NAME.json, with other fields",
        )


def run(arguments: argparse.Namespace) -> int:
    """Carry out ``gradprune evaluate``.

    Raises:
        OptionError: Something was asked for that does not exist, or the output cannot be written.
        GradpruneError: An attack cannot be run on this model with these inputs, or something is not installed.
    """
    name, about = _robustbench(arguments)
    with prepared(arguments) as evaluation:
        records, written = evaluation.run_all(keep_examples=arguments.keep_examples)
        if evaluation.ranks.is_first:
            files = save_records(records, evaluation.output, name, about) if name else []
            written += [str(file.relative_to(evaluation.output)) for file in files]
            print(f"Saved in {evaluation.output}: {', '.join(written)}.")
    return 0


def _robustbench(arguments: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """Name of the model and what is said of it for RobustBench; no name if nothing is to be written."""
    if not arguments.robustbench:
        return None, {}
    name, *settings = arguments.robustbench
    about = dict(parse_about(one) for one in settings)
    check_about(name, about)
    if arguments.attack.count("autoattack") != 1 or len(arguments.eps or [0]) != 1:
        raise OptionError("--robustbench is about one result: pass --attack autoattack once, and one --eps")
    return name, about


@contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[Evaluation]:
    """Check and load everything that was asked for: what can be known to fail fails here, before any work."""
    options = _attack_options(arguments)
    attacks = build_attacks(options)
    check_modules({"matplotlib", "tqdm", *modules_of(arguments.model, arguments.data)})
    from gradprune.support.progress import stage  # imports tqdm, an optional dependency

    if COMPILE[arguments.compile]:
        check_compiler()
    prepare_directory(arguments.output)
    with started() as ranks:
        device = choose_device(arguments.device, ranks.local)
        with stage("loading model and data") if ranks.is_first else nullcontext():
            samples = load_data(data_options(arguments))
            check_channels(arguments, samples)
            model = load_model(model_options(arguments), arguments.seed)
        yield Evaluation.prepare(
            model,
            samples,
            attacks,
            arguments.output,
            device=device,
            batch_size=arguments.batch_size,
            bounds=options.bounds,
            seed=arguments.seed,
            autocast=autocast_type(arguments.autocast),
            compile=COMPILE[arguments.compile],
            name=_model_name(arguments),
            ranks=ranks,
        )


def _attack_options(arguments: argparse.Namespace) -> AttackOptions:
    low, high = arguments.bounds
    if not low < high:
        raise OptionError(f"--bounds has to be a smaller and a larger number, not {low:g} and {high:g}")
    return AttackOptions(
        names=arguments.attack,
        eps=arguments.eps or [8 / 255],
        norm=arguments.norm,
        steps=arguments.steps,
        step_size=arguments.step_size or DEFAULT_STEP_SIZE,
        targeted=arguments.targeted,
        bounds=(low, high),
        seed=arguments.seed,
        settings=dict(arguments.set),
    )


def _model_name(arguments: argparse.Namespace) -> str:
    return str(arguments.model) if arguments.checkpoint is None else f"{arguments.model} ({arguments.checkpoint.name})"
