"""The ``gradprune`` command: one parser, one subcommand per file that adds itself to it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gradprune.errors import GradpruneError, OptionError

from . import bench, demo, inspect
from . import evaluate as evaluation
from . import train as training

USAGE_ERROR = 2
FAILURE = 1

ADD_COMMANDS: tuple[Callable[[argparse._SubParsersAction[Any]], None], ...] = (
    demo.add_command,
    inspect.add_command,
    evaluation.add_commands,
    training.add_command,
    bench.add_command,
)
"""What ``--help`` lists, in this order. Each adds its subparser and sets ``run`` to what carries it out."""

DESCRIPTION = """\
gradprune compiles adversarial-attack steps so that only the gradient of the input perturbation is computed:
the weight gradients, and all that only they need, are pruned out of the backward graph (backward-graph pruning).
"""

EPILOG = """\
examples:
  gradprune demo --output demo-output      see it work on photographs and on a network trained on the spot
  gradprune inspect timm:resnet18          what is pruned from a step of PGD, and what is not
  gradprune attack --model digits --data digits --attack pgd --eps 0.1
                                           adversarial examples, with a record and pictures of them
  gradprune evaluate --model digits --data digits --attack fgsm pgd --eps 0 .05 .1 .2
                                           accuracy under attacks: records, a table, a plot, pictures
  gradprune train --model digits --data digits --objective trades --eps 0.2
                                           adversarial training: checkpoints, metrics, curves
  gradprune bench step --rounds 5          one step of PGD beside eager PyTorch and torch.compile
  gradprune COMMAND --help                 what a command does and what can be changed
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="gradprune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gradprune {_version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for add_command in ADD_COMMANDS:
        add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        The exit status: 0 when all went well, 1 when the work could not be done, 2 when it was asked for wrongly.

    Raises:
        SystemExit: By argparse, for ``--help``, ``--version`` and arguments it cannot parse.
    """
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except GradpruneError as error:
        print(f"gradprune {arguments.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, OptionError) else FAILURE
    except KeyboardInterrupt as interrupt:
        print(f"gradprune {arguments.command}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    return status


def _version() -> str:
    """Version of the installed package; a source tree that was never installed has none."""
    try:
        return version("gradprune")
    except PackageNotFoundError:
        return "(not installed)"
