"""The ``gradprune`` command: a file per subcommand, and only the one asked for is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

USAGE_ERROR = 2
FAILURE = 1

COMMANDS = {
    "demo": "see gradprune work, beside eager PyTorch and plain torch.compile",
    "inspect": "see what is pruned, without running it",
    "emit": "see what a step becomes on a GPU, without one",
    "attack": "make adversarial examples of a data set",
    "evaluate": "measure accuracy under several attacks",
    "train": "train a model adversarially",
    "study": "repeat experiments of papers, with their numbers beside ours",
    "bench": "measure gradprune beside eager PyTorch, torch.compile and JAX",
}
"""What ``--help`` lists, in this order. ``configure(parser)`` of the module called by the name adds the options of a
command, and sets ``run`` to what carries it out."""

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
  gradprune study lab --scale small        a CNN and FGSM at growing eps: figures, tables, an index of all studies
  gradprune bench step --rounds 5          one step of PGD beside eager PyTorch and torch.compile
  gradprune COMMAND --help                 what a command does and what can be changed
"""


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line, with the options of the command that is called and the names of the others."""
    parser = argparse.ArgumentParser(
        prog="gradprune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gradprune {_version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, help in COMMANDS.items():
        own = commands.add_parser(name, help=help, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == called:
            import_module(f"gradprune.cli.{name}").configure(own)
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
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser(argv).parse_args(argv)
    from gradprune.errors import GradpruneError, OptionError  # imports torch

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
