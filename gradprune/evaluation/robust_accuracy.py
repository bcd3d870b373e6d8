"""Clean and robust accuracy in one call, named as RobustBench names it."""

from __future__ import annotations

from torch import Tensor, nn

from gradprune.attacks import AutoAttack
from gradprune.errors import OptionError, unknown
from gradprune.runtime import Runtime

THREAT_MODELS = {"Linf": "linf", "L2": "l2", "L1": "l1"}


def benchmark(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat_model: str = "Linf",
    eps: float = 8 / 255,
    *,
    batch_size: int = 32,
    seed: int = 0,
    runtime: Runtime = Runtime(progress=True),  # noqa: B008
) -> tuple[float, float]:
    """Measure accuracy, and what is left of it under the standard AutoAttack.

        clean, robust = benchmark(model, x_test, y_test, threat_model="Linf", eps=8 / 255)

    ``evaluate`` does so with files, which it goes on from after an interruption, and with other attacks.

    Args:
        model: From images in [0, 1] to logits ``(N, classes)``; it is attacked in evaluation mode.
        x: Images ``(N, C, H, W)``, on the device of the model.
        y: Labels ``(N,)``, int64.
        threat_model: ``"Linf"``, ``"L2"`` or ``"L1"``.
        eps: Radius of the ball.
        batch_size: Images in a batch.
        seed: Of all random numbers.
        runtime: How to run the attack.

    Returns:
        Shares of the images, from 0 to 1: those that are classified as labelled, and those that still are when
        attacked.

    Raises:
        OptionError: There is no such threat model.
        AttackError: Images or labels are unfit, see ``Attack``.
    """
    if threat_model not in THREAT_MODELS:
        raise OptionError(unknown("threat model", threat_model, list(THREAT_MODELS)))
    if not len(x):
        raise OptionError("there are no images to measure accuracy on")
    attack = AutoAttack(norm=THREAT_MODELS[threat_model], eps=eps, seed=seed)  # type: ignore[arg-type]
    clean = robust = 0
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        attacked = attack(model, images, labels, runtime=runtime)
        with runtime.attack(model, images) as query:
            clean += int((query.logits(images).argmax(1) == labels).sum())
            robust += int((query.logits(attacked).argmax(1) == labels).sum())
    return clean / len(x), robust / len(x)
