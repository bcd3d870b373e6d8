"""What attacks maximise, per sample.

Note [One graph for all losses]: compiling a network takes seconds to minutes, and what the losses add to it is a few
operations on logits. So the graph that attacks compile holds all losses of labels, and one index says which of them
is differentiated; PGD, APGD with either of its losses, FAB and C&W share one compilation. A loss of the user's own, and
the divergence from clean probabilities, have a graph of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits ``(N, classes)`` and whatever the attack was given for labels to losses ``(N,)``."""

TINY = 1e-12
"""Keeps quotients of logits finite when logits are equal, as in the reference code of [Croce & Hein 2020]."""


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, :1]).squeeze(1)


def _other(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest logit of another class than the label."""
    is_own = torch.arange(logits.shape[1], device=logits.device) == labels[:, :1]
    return logits.masked_fill(is_own, -torch.inf).amax(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the label."""
    return F.cross_entropy(logits, labels[:, 0], reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's: positive where the sample is misclassified (Carlini & Wagner 2017)."""
    return _other(logits, labels) - _own(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over the distance of first and third (Croce & Hein 2020, section 4.1)."""
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + TINY)


def dlr_targeted(logits: Tensor, labels: Tensor) -> Tensor:
    """The target's logit minus the label's, over a spread of the largest four (Croce & Hein 2020, section 4.2)."""
    top = logits.topk(4, dim=1).values
    return difference(logits, labels) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + TINY)


def difference(logits: Tensor, labels: Tensor) -> Tensor:
    """The target's logit minus the label's."""
    return logits.gather(1, labels[:, 1:]).squeeze(1) - _own(logits, labels)


def kl(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Kullback-Leibler divergence from clean probabilities ``(N, classes)`` to these (Zhang et al. 2019, TRADES)."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)


LABEL_LOSSES: dict[str, tuple[Loss, int]] = {
    "ce": (cross_entropy, 1),
    "margin": (margin, 2),
    "difference": (difference, 2),
    "dlr": (dlr, 3),
    "dlr-targeted": (dlr_targeted, 4),
}
"""Losses of label and target, ``(N, 2)``; and how many classes each needs."""


def label_losses(logits: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """One of ``LABEL_LOSSES``, see Note [One graph for all losses].

    Args:
        logits: ``(N, classes)``.
        labels: Labels and targets, ``(N, 2)``, int64.
        chosen: Position in ``LABEL_LOSSES``, int64, a scalar.

    Returns:
        Losses ``(N,)``; zero for one that needs more classes.
    """
    values = [
        loss(logits, labels) if logits.shape[1] >= classes else logits[:, 0] * 0
        for loss, classes in LABEL_LOSSES.values()
    ]
    return torch.stack(values).index_select(0, chosen.view(1)).squeeze(0)
