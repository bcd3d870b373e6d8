"""Adversarial attacks: frozen values, called as ``attack(model, x, y)``.

    from gradprune.attacks import PGD

    x_adv = PGD(norm="linf", eps=8 / 255, step_size=2 / 255, steps=10)(model, x, y)

``base`` holds what all have in common, ``norms`` what makes one threat model another; the rest is a file per family.
"""

from gradprune.runtime import Runtime

from .apgd import APGD, TargetedAPGD
from .auto_attack import AutoAttack
from .base import Attack
from .cw import CW
from .deepfool import DeepFool
from .fab import FAB
from .norms import NORMS, Norm
from .pgd import BIM, FGSM, PGD, RSFGSM
from .square import Square
from .transfer import DIFGSM, MIFGSM, NIFGSM, SINIFGSM, TIFGSM, VMIFGSM, VNIFGSM, TransferAttack

__all__ = [
    "APGD",
    "BIM",
    "CW",
    "DIFGSM",
    "FAB",
    "FGSM",
    "MIFGSM",
    "NIFGSM",
    "NORMS",
    "PGD",
    "RSFGSM",
    "SINIFGSM",
    "TIFGSM",
    "VMIFGSM",
    "VNIFGSM",
    "Attack",
    "AutoAttack",
    "DeepFool",
    "Norm",
    "Runtime",
    "Square",
    "TargetedAPGD",
    "TransferAttack",
]
