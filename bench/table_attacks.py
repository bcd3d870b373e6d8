"""The rows of [SB] Tables 1 to 3, and what libraries recommend today, as users of seven libraries run them.

Each is made of a model and of a function that attacks may be given to, ``gradprune.patch`` or nothing, so that all ways
to run it share one piece of code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .cases import Workload
from .shims import load
from .verdict import Length, methods

Patch = Callable[[Any], Any]
"""``gradprune.patch``, or what returns its argument."""

Attack = Callable[[Tensor, Tensor], Tensor]
"""From inputs ``(N, C, H, W)`` and labels ``(N,)`` to adversarial examples, shaped like the inputs."""

NETWORKS = {
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
    "ResNet50": "resnet50",
    "ResNet101": "resnet101",
    "ResNet152": "resnet152",
    "ViT-base": "vit_base_patch16_224",
}
"""The networks of Table 2, and what timm calls them."""

BATCHES = (4, 8, 16, 32, 64, 128)
"""The batches of Table 2."""

BATCH = 16
"""That of all other rows."""

ART_EPS = 0.3
"""The default of ART's attacks."""

WRAPPED = "no object of this library is known to patch: of a function that makes the attack and runs it"


@dataclass(frozen=True)
class Lengths:
    """How long attacks are; what is ``None`` is left to the library's default.

    Attributes:
        pgd: Steps of the PGD of Tables 1 and 2.
        iterations: Of PGD and BIM of ART.
        queries: Of Square of ART.
        ensemble: Steps of the parts of ART's AutoAttack.
        apgd: Steps of APGD.
        cw: Steps of CW.
        momentum: Steps of MI-FGSM, SI-NI-FGSM and VMI-FGSM.
        recommended: Steps of APGD, DDN and FMN of adv-lib.
        standard: Of AutoAttack.
    """

    pgd: int = 50
    iterations: int | None = None
    queries: int | None = None
    ensemble: int | None = None
    apgd: int | None = None
    cw: int | None = None
    momentum: int | None = None
    recommended: int = 100
    standard: Length = field(default_factory=Length)


Build = Callable[[nn.Module, Workload, Lengths, Patch], Attack]


@dataclass(frozen=True)
class Row:
    """One measurement of a table, in the ways of ``bench tables``.

    Attributes:
        table: Which table, as on the command line.
        name: What the paper calls it.
        library: One of ``shims.LIBRARIES``.
        build: Makes the attack.
        paper: Seconds of the original and of the semi-backward run in [SB], on a T4.
        network: One of ``NETWORKS``.
        batch: Images in a batch, of ``BATCHES``.
        eps: Radius of the Linf ball that what is returned lies in: ``"case"`` is that of the case, ``None`` is none.
        norm: Of the perturbation, for tables.
        shrinks: Whether the attack goes on with a part of the batch, so that code is compiled for any batch.
        half_fooled: Whether to attack in the smallest ball in which a short PGD fools half of the samples.
        note: What is said of it below the table.
    """

    table: str
    name: str
    library: str
    build: Build
    paper: tuple[float, float] | None = None
    network: str = "ResNet50"
    batch: int = BATCH
    eps: Literal["case"] | float | None = "case"
    norm: Literal["linf", "l2"] = "linf"
    shrinks: bool = False
    half_fooled: bool = False
    note: str = ""


def some(**options: Any) -> dict[str, Any]:
    """The options that are not ``None``."""
    return {name: value for name, value in options.items() if value is not None}


# --- Table 1: PGD in six libraries ------------------------------------------------------------------------------------


def torchattacks_pgd(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    """PGD of Torchattacks, in the ball of the case, from a random start."""
    library = load("Torchattacks", "torchattacks")
    attack: Attack = patch(library.PGD(model, eps=work.case.eps, alpha=work.case.step_size, steps=lengths.pgd))
    return attack


def _foolbox(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    library = load("Foolbox", "foolbox")
    wrapped = library.PyTorchModel(model, bounds=work.case.bounds, device=work.x.device)
    descent = patch(library.attacks.LinfPGD(steps=lengths.pgd, abs_stepsize=work.case.step_size, random_start=True))
    return lambda x, y: descent(wrapped, x, y, epsilons=work.case.eps)[1]


def _advertorch(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    kind = load("AdverTorch", "advertorch.attacks").LinfPGDAttack
    settings = {"eps": work.case.eps, "eps_iter": work.case.step_size, "nb_iter": lengths.pgd}

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return kind(model, **settings).perturb(x, y)  # type: ignore[no-any-return]

    return _bound(patch(attack), model)


def _deeprobust(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    kind = load("DeepRobust", "deeprobust.image.attack.pgd").PGD
    settings = {"epsilon": work.case.eps, "step_size": work.case.step_size, "num_steps": lengths.pgd}

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return kind(model, x.device.type).generate(x, y, **settings)  # type: ignore[no-any-return]

    return _bound(patch(attack), model)


def _cleverhans(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    descent = patch(
        load("CleverHans", "cleverhans.torch.attacks.projected_gradient_descent").projected_gradient_descent
    )
    eps, step_size = work.case.eps, work.case.step_size
    bounds = dict(zip(("clip_min", "clip_max"), work.case.bounds or (None, None), strict=True))
    return lambda x, y: descent(model, x, eps, step_size, lengths.pgd, math.inf, y=y, **bounds)


def _bound(attack: Callable[[nn.Module, Tensor, Tensor], Tensor], model: nn.Module) -> Attack:
    return lambda x, y: attack(model, x, y)


# --- Table 3: attacks of ART and of Torchattacks ----------------------------------------------------------------------


def _art_classifier(model: nn.Module, work: Workload) -> Any:
    """A classifier of ART; its number of classes is what the model says of one input."""
    estimators = load("ART", "art.estimators.classification")
    classes = work.model(work.x[:1]).shape[1]
    return estimators.PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        work.case.shape,
        classes,
        clip_values=work.case.bounds,
        device_type="gpu" if work.x.is_cuda else "cpu",
    )


def _run_art(attack: Any, device: Any) -> Attack:
    return lambda x, y: torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(device)


def _art(kind: str, **lengths_of: str) -> Build:
    """An attack of ART with its own defaults, but for lengths and what it prints.

    Args:
        kind: Its class.
        lengths_of: Its options, and which of ``Lengths`` they are.
    """

    def build(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
        make = getattr(load("ART", "art.attacks.evasion"), kind)
        options = some(**{option: getattr(lengths, name) for option, name in lengths_of.items()})
        if kind != "FastGradientMethod":
            options["verbose"] = False
        return _run_art(patch(make(_art_classifier(model, work), **options)), work.x.device)

    return build


def art_pgd(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    """PGD of ART with the ball and the steps of Table 1, from a random start."""
    make = load("ART", "art.attacks.evasion").ProjectedGradientDescent
    ball = {"eps": work.case.eps, "eps_step": work.case.step_size, "num_random_init": 1}
    attack = make(_art_classifier(model, work), max_iter=lengths.pgd, verbose=False, **ball)
    return _run_art(patch(attack), work.x.device)


def _art_ensemble(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    """AutoAttack of ART: its own parts, shorter if lengths say so."""
    library, classifier = load("ART", "art.attacks.evasion"), _art_classifier(model, work)
    parts, steps = None, lengths.ensemble
    if steps is not None:
        common = {"max_iter": steps, "nb_random_init": 1, "batch_size": 32, "verbose": False}
        losses = ("cross_entropy", "difference_logits_ratio")
        parts = [
            *(library.AutoProjectedGradientDescent(classifier, loss_type=loss, **common) for loss in losses),
            library.DeepFool(classifier, max_iter=steps, epsilon=1e-3, nb_grads=10, batch_size=32, verbose=False),
            library.SquareAttack(classifier, max_iter=steps, p_init=0.8, verbose=False),
        ]
    attack = library.AutoAttack(classifier, attacks=parts)
    for part in attack.attacks:
        part.set_params(verbose=False)
    return _run_art(patch(attack), work.x.device)


def _torchattacks(kind: str, length: str) -> Build:
    """An attack of Torchattacks with its own defaults, but for its steps."""

    def build(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
        make = getattr(load("Torchattacks", "torchattacks"), kind)
        attack: Attack = patch(make(model, **some(steps=getattr(lengths, length))))
        return attack

    return build


# --- What libraries recommend today -----------------------------------------------------------------------------------


def _adv_lib(name: str, steps: str, *, ball: bool, **settings: Any) -> Build:
    """An attack of adv-lib, which are functions of the model."""

    def build(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
        attack = patch(getattr(load("adv-lib", "adv_lib.attacks"), name))
        options = {**settings, steps: lengths.recommended, **({"eps": work.case.eps} if ball else {})}
        return lambda x, y: attack(model, x, y, **options)

    return build


def _standard(model: nn.Module, work: Workload, lengths: Lengths, patch: Patch) -> Attack:
    method = methods(lengths.standard)["autoattack"]
    attack: Attack = patch(method.theirs(load("Torchattacks", "torchattacks"), model, work.case))
    return attack


# --- All rows ---------------------------------------------------------------------------------------------------------


ROWS = (
    Row("1", "Torchattacks", "Torchattacks", torchattacks_pgd, (6.89, 4.74)),
    Row("1", "Foolbox", "Foolbox", _foolbox, (7.38, 5.44)),
    Row("1", "ART", "ART", art_pgd, (7.09, 5.00)),
    Row("1", "AdverTorch", "AdverTorch", _advertorch, (7.43, 5.48), note=WRAPPED),
    Row("1", "DeepRobust", "DeepRobust", _deeprobust, (7.23, 4.94), note=WRAPPED),
    Row("1", "CleverHans", "CleverHans", _cleverhans, (7.36, 4.96)),
    *(
        Row("2", f"batch {batch}", "Torchattacks", torchattacks_pgd, paper, batch=batch)
        for batch, paper in zip(
            BATCHES,
            ((2.06, 1.41), (3.99, 2.75), (6.89, 4.74), (13.83, 9.44), (27.24, 18.60), (54.6, 36.6)),
            strict=True,
        )
    ),
    *(
        Row("2", network, "Torchattacks", torchattacks_pgd, paper, network=network)
        for network, paper in zip(
            NETWORKS,
            ((2.13, 1.52), (3.57, 2.54), (6.89, 4.74), (11.92, 7.89), (16.49, 11.01), (26.5, 19.2)),
            strict=True,
        )
    ),
    Row("3", "PGD", "ART", _art("ProjectedGradientDescent", max_iter="iterations"), (15.2, 10.2), eps=ART_EPS),
    Row("3", "AutoAttack", "ART", _art_ensemble, (0.08, 0.06), eps=ART_EPS, shrinks=True),
    Row("3", "BIM", "ART", _art("BasicIterativeMethod", max_iter="iterations"), (15.2, 10.2), eps=ART_EPS),
    Row("3", "Square", "ART", _art("SquareAttack", max_iter="queries"), (0.14, 0.11), eps=ART_EPS, shrinks=True),
    Row("3", "FGSM", "ART", _art("FastGradientMethod"), (0.20, 0.15), eps=ART_EPS),
    Row("3", "APGD", "Torchattacks", _torchattacks("APGD", "apgd"), (0.07, 0.05), shrinks=True),
    Row("3", "CW", "Torchattacks", _torchattacks("CW", "cw"), (6.85, 4.76), eps=None, norm="l2"),
    Row("3", "MI-FGSM", "Torchattacks", _torchattacks("MIFGSM", "momentum"), (1.18, 0.94)),
    Row("3", "SI-NI-FGSM", "Torchattacks", _torchattacks("SINIFGSM", "momentum"), (6.81, 4.71)),
    Row("3", "VMI-FGSM", "Torchattacks", _torchattacks("VMIFGSM", "momentum"), (8.27, 5.68)),
    *(
        Row(
            "attackbench",
            f"APGD-{loss.upper()}",
            "adv-lib",
            _adv_lib("apgd", "n_iter", ball=True, norm=math.inf, loss_function=loss),
            half_fooled=True,
            shrinks=True,
        )
        for loss in ("ce", "dlr")
    ),
    Row("attackbench", "AutoAttack", "Torchattacks", _standard, half_fooled=True, shrinks=True),
    Row("attackbench", "DDN", "adv-lib", _adv_lib("ddn", "steps", ball=False), eps=None, norm="l2"),
    Row("attackbench", "FMN", "adv-lib", _adv_lib("fmn", "steps", ball=False, norm=2), eps=None, norm="l2"),
)
"""All rows that are attacks on pictures, in the order of the paper."""
