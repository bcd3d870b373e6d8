"""Lottery tickets and adversarial training: networks pruned by magnitude, rewound or drawn again [LR 3].

After every round of training the smallest weights go, ``torch.nn.utils.prune`` choosing them, and what is left is
trained again: from its initial values, which makes it a ticket, or, with the same masks, from values drawn again. Masks
and weights are inputs of what is compiled: no round compiles anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from gradprune.attacks import FGSM
from gradprune.support.figures import figure_of
from gradprune.training.checkpoint import FORMAT, VERSION, read_checkpoint, write_checkpoint

from .context import Context
from .figures import OURS, PAPER, finish, percent
from .networks import TicketNet, drawn
from .outcome import Claim, Outcome, Picture, Table
from .records import Figures
from .study import Study
from .training import objective_of, seeded, train
from .written import as_written

EPS = 0.3
NORMAL, ADVERSARIAL = "normal", "FGSM"
TICKET, DRAWN = "rewound", "drawn again"
COLORS = {TICKET: OURS, DRAWN: PAPER}
DECAYED, KEPT = 0.12, 0.015
"""Shares of weights left at which, by the paper, what is drawn again has decayed and tickets have not."""
NEAR, BELOW = 0.05, 0.03
"""Of accuracy that a ticket may lose there, and that it has to be better by."""


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Attributes:
        train: Images to train on.
        test: Images to test on.
        rounds: Of training, that of the whole network included.
        share: Of the weights that are left, what goes after a round.
        epochs: Of a round.
        batch: Samples in a batch.
        neurons: Of the two hidden layers.
    """

    train: int | None = None
    test: int | None = None
    rounds: int = 20
    share: float = 0.3
    epochs: int = 12
    batch: int = 100
    neurons: tuple[int, int] = (300, 100)


class LotteryStudy(Study):
    """A 300-100 network, pruned round by round to 0.2 % of its weights, in normal and in FGSM training."""

    name = "lottery"
    title = "Lottery tickets under FGSM [LR 3]"
    scales = {  # noqa: RUF012
        "full": Scale(),
        "small": Scale(4000, 1000, rounds=10, share=0.5, epochs=8),
        "toy": Scale(100, 40, rounds=3, share=0.7, epochs=2, batch=20, neurons=(16, 8)),
    }

    def measure(self, context: Context, scale: Scale) -> Outcome:
        """See ``Study.measure``."""
        net = TicketNet(context.images.shape, context.images.classes, scale.neurons)
        rounds = {
            training: [self._cell(context, scale, net, training, number) for number in range(scale.rounds)]
            for training in (NORMAL, ADVERSARIAL)
        }
        for training in rounds:
            masks_file(context, training).unlink(missing_ok=True)
        weights = sum(mask.numel() for mask in net.masks)
        last = rounds[NORMAL][-1]["left"]
        about = (
            f"Fully connected, {scale.neurons[0]}-{scale.neurons[1]}-{context.images.classes}, {weights:,} weights; "
            f"{len(context.images.train_x):,} images to train on, {scale.epochs} epochs a round of Adam at 1.2e-3; "
            f"after each of {scale.rounds} rounds the smallest {scale.share:.0%} of the weights of every layer go, "
            f"down to {last:.2%}. Drawn again are the weights of the ticket, with its masks. FGSM has eps {EPS:g}."
        )
        return self.outcome(
            context,
            about,
            self._claims(rounds),
            [self._table(rounds)],
            [self._picture(context, rounds)],
        )

    # --- Measuring ----------------------------------------------------------------------------------------------------

    def _cell(self, context: Context, scale: Scale, net: TicketNet, training: str, number: int) -> Figures:
        """One round: train what is left twice, and prune the ticket."""
        key, images = f"{training} training, round {number:02}", context.images

        def measure() -> Figures:
            masks = read_masks(context, training, number) if number else [torch.ones_like(mask) for mask in net.masks]
            initial, again = (
                drawn(seeded(context.options.seed, *names), TicketNet, images.shape, images.classes, scale.neurons)
                for names in (("ticket",), (training, number))
            )
            figures: Figures = {}
            for way, start in ((DRAWN, again), (TICKET, initial)):  # the ticket in the end: its weights are pruned
                net.load_state_dict(start.state_dict())
                set_masks(net, masks)
                attack = FGSM(eps=EPS)
                train(
                    context,
                    key,
                    net,
                    objective_of(context, None if training == NORMAL else attack),
                    torch.optim.Adam(net.parameters(), 1.2e-3),
                    (images.train_x, images.train_y),
                    epochs=scale.epochs,
                    batch=scale.batch,
                    part=way,
                    compile="attack",  # one trainer a round: its outer step would be compiled every time
                )
                tested = (images.test_x, images.test_y)
                figures[way] = {
                    "clean": context.accuracy(net, *tested, None, scale.batch),
                    "FGSM": context.accuracy(net, *tested, context.attack(FGSM(eps=EPS, seed=0)), scale.batch),
                }
            figures["left"] = left(net.masks)
            if not context.options.eager and training == ADVERSARIAL and number == 0:
                x, y = images.train_x[: scale.batch], images.train_y[: scale.batch]
                written, runtime = as_written(attack), context.runtime(len(x))
                context.pace(lambda: attack(net, x, y, runtime=runtime), lambda: written(net, x, y))
            layers = [layer for layer in net.layers if isinstance(layer, nn.Linear)]
            following = [pruned(layer.weight, mask, scale.share) for layer, mask in zip(layers, net.masks, strict=True)]
            # Before the record says that this round is done: what goes on from there needs them.
            write_masks(context, training, {number: [*net.masks], number + 1: following})
            names = {f"{training}/{way}/{what}": figures[way][what] for way in COLORS for what in ("clean", "FGSM")}
            context.log(number, {**names, f"{training}/left": figures["left"]})
            return figures

        return context.cell(key, measure)

    # --- Showing ------------------------------------------------------------------------------------------------------

    def _claims(self, rounds: dict[str, list[Figures]]) -> list[Claim]:
        normal, adversarial = rounds[NORMAL], rounds[ADVERSARIAL]
        sparse = [one for one in normal if KEPT <= one["left"] <= DECAYED]
        dense = normal[0][TICKET]["clean"]
        means = {way: average([one[way]["clean"] for one in sparse]) for way in COLORS} if sparse else {}
        ahead = [
            ours[TICKET]["FGSM"] - theirs[TICKET]["FGSM"] for ours, theirs in zip(adversarial, normal, strict=True)
        ]
        return [
            Claim(
                "[LR] a rewound ticket keeps its accuracy where what is drawn again decays",
                "with 1.5 % to 12 % of the weights left, after normal training, tickets are on average within 5 "
                "points of the whole network's clean accuracy, and 3 points or more above what is drawn again",
                f"whole {percent(dense)} %, " + ", ".join(f"{way} {percent(mean)} %" for way, mean in means.items()),
                means[TICKET] >= dense - NEAR and means[TICKET] >= means[DRAWN] + BELOW if sparse else None,
            ),
            Claim(
                "[LR] adversarial training keeps adversarial accuracy up at every sparsity",
                "in every round tickets trained against FGSM have a higher FGSM accuracy than those trained normally",
                f"{min(ahead) * 100:+.1f} to {max(ahead) * 100:+.1f} points",
                min(ahead) > 0,
            ),
        ]

    def _table(self, rounds: dict[str, list[Figures]]) -> Table:
        head = ["weights left", *(f"{training}, {way}: clean / FGSM" for training in rounds for way in COLORS)]
        rows = []
        for together in zip(*rounds.values(), strict=True):
            row = [f"{together[0]['left']:.2%}"]
            for one in together:
                row += [f"{percent(one[way]['clean'])} / {percent(one[way]['FGSM'])}" for way in COLORS]
            rows.append(row)
        return Table("Accuracy in % by the share of weights left", head, rows)

    def _picture(self, context: Context, rounds: dict[str, list[Figures]]) -> Picture:
        figure = figure_of(11, 7.6)
        panels = figure.subplots(2, 2)
        number = 9
        for row, (training, cells) in zip(panels, rounds.items(), strict=True):
            for axis, what in zip(row, ("clean", "FGSM"), strict=True):
                for way, color in COLORS.items():
                    shares = [100 * one[way][what] for one in cells]
                    axis.plot([100 * one["left"] for one in cells], shares, marker="o", color=color, label=way)
                axis.set_xscale("log")
                axis.invert_xaxis()
                axis.axvline(12, color="0.5", linewidth=0.8, linestyle=":")
                axis.axvline(1.5, color="0.5", linewidth=0.8, linestyle=":")
                axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
                title = f"{training} training, {what} accuracy (figure {number})"
                finish(axis, "weights left, %", "test accuracy, %", title, percent=True)
                number += 1
        caption = "Tickets and what is drawn again; dotted: where, in the paper, the latter and the former decay [LR 3]"
        return context.draw(figure, "lottery.png", caption)


# --- Masks ------------------------------------------------------------------------------------------------------------


def pruned(weight: Tensor, mask: Tensor, share: float) -> Tensor:
    """The mask without the smallest ``share`` of the weights that it leaves."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight.detach().clone())
    prune.custom_from_mask(holder, "weight", mask)
    prune.l1_unstructured(holder, "weight", amount=share)
    mask_left = holder.weight_mask
    assert isinstance(mask_left, Tensor)
    return mask_left.detach()


@torch.no_grad()
def set_masks(net: TicketNet, masks: Sequence[Tensor]) -> None:
    """Write masks into a network."""
    for own, mask in zip(net.masks, masks, strict=True):
        own.copy_(mask)


def left(masks: Sequence[Tensor]) -> float:
    """Share of the weights that masks leave."""
    return float(sum(mask.sum() for mask in masks)) / sum(mask.numel() for mask in masks)


def masks_file(context: Context, training: str) -> Path:
    """Where the masks of the next round are."""
    return context.folder / f"masks-{training}.pt"


def write_masks(context: Context, training: str, masks: dict[int, list[Tensor]]) -> None:
    """Keep masks by the number of their round."""
    content = {number: [mask.bool() for mask in layers] for number, layers in masks.items()}
    write_checkpoint(masks_file(context, training), {"format": FORMAT, "version": VERSION, "masks": content})


def read_masks(context: Context, training: str, number: int) -> list[Tensor]:
    """The masks of a round.

    Raises:
        TrainingError: They are not where the round before has left them.
    """
    found: dict[int, list[Tensor]] = read_checkpoint(masks_file(context, training))["masks"]
    return found[number]


def average(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)
