"""Clean and robust accuracy in one call, named as RobustBench names it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradprune.attacks import AutoAttack
from gradprune.errors import OptionError, unknown
from gradprune.runtime import Runtime

from .robustbench import THREAT_MODELS, check_about, model_info


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
    to_disk: bool = False,
    model_name: str | None = None,
    dataset: str = "data",
    folder: Path | str = ".",
    about: Mapping[str, Any] | None = None,
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
        to_disk: Write the result as RobustBench keeps it, to
            ``folder/model_info/<dataset>/<threat model>/<model_name>.json``.
        model_name: Of that file.
        dataset: What ``x`` is, such as ``"cifar10"``.
        folder: An existing folder.
        about: What else that file says, see ``robustbench.ModelInfo``.

    Returns:
        Shares of the images, from 0 to 1: those that are classified as labelled, and those that still are when
        attacked.

    Raises:
        OptionError: There is no such threat model, or the result cannot be written so.
        AttackError: Images or labels are unfit, see ``Attack``.
    """
    if threat_model not in THREAT_MODELS:
        raise OptionError(unknown("threat model", threat_model, list(THREAT_MODELS)))
    if not len(x):
        raise OptionError("there are no images to measure accuracy on")
    if to_disk and model_name is None:
        raise OptionError("to_disk writes a file named after the model: pass model_name")
    check_about(model_name or "model", about or {})
    attack = AutoAttack(norm=THREAT_MODELS[threat_model], eps=eps, seed=seed)  # type: ignore[arg-type]
    clean = robust = 0
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        attacked = attack(model, images, labels, runtime=runtime)
        with runtime.attack(model, images) as query:
            clean += int((query.logits(images).argmax(1) == labels).sum())
            robust += int((query.logits(attacked).argmax(1) == labels).sum())
    result = clean / len(x), robust / len(x)
    if to_disk and model_name is not None:
        model_info(dataset, eps, *result, about).save(Path(folder), threat_model, model_name)
    return result
