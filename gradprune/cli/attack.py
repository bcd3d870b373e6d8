"""``gradprune attack``: adversarial examples of a data set."""

from __future__ import annotations

import argparse

from gradprune.evaluation.tables import text

from .evaluate import NAMES, RESUMING, add_options, prepared

DESCRIPTION = """\
Attack a model on a data set. Writes adversarial.npz (x_adv, y, index in the data set, predictions, clean_predictions),
record.json (accuracy, perturbation, all settings) and pictures.png (original, adversarial, perturbation, heat map).
"""

EXAMPLES = """\
examples:
  gradprune attack --model digits --data digits --attack pgd --eps 0.1 --output adversarial
  gradprune attack --model models:net --checkpoint net.pt --data photos --image-size 224 --attack autoattack --eps 4/255
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune attack``."""
    parser.description, parser.epilog = DESCRIPTION, f"{NAMES}\n{RESUMING}\n{EXAMPLES}"
    add_options(parser, several=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out ``gradprune attack``.

    Raises:
        OptionError: Something was asked for that does not exist, or the output cannot be written.
        GradpruneError: The attack cannot be run on this model with these inputs, or something is not installed.
    """
    with prepared(arguments) as evaluation:
        attack = evaluation.attacks[0] if evaluation.attacks else evaluation.clean
        (job,) = evaluation.jobs([attack], lambda slug: evaluation.output)
        record = evaluation.carry_out(job, keep=len(evaluation.subject.data))
        if evaluation.ranks.is_first:
            drawn = evaluation.draw(job, record)
            print(text([record]))
            print(f"Saved in {evaluation.output}: adversarial.npz, record.json{', pictures.png' if drawn else ''}.")
        evaluation.ranks.wait()
    return 0
