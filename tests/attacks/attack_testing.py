"""What the tests of attacks share: a network that is quick, data that touches the bounds, and every attack in brief."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import gradprune.attacks as library
from gradprune.attacks import NORMS, Attack, Runtime

EAGER = Runtime(compile=False)
CLASSES = 6
EPS = {"linf": 0.15, "l2": 0.8, "l1": 3.0}
"""Radii at which some samples of ``Network`` are fooled and some are not."""

KINDS: dict[str, type[Attack]] = {
    name: kind
    for name in library.__all__
    if inspect.isclass(kind := getattr(library, name)) and issubclass(kind, Attack) and not inspect.isabstract(kind)
}

BRIEF: dict[str, dict[str, Any]] = {
    "APGD": {"steps": 8, "restarts": 2},
    "AutoAttack": {"steps": 6, "queries": 10, "targets": 2},
    "BIM": {"steps": 3, "step_size": 0.04},
    "CW": {"steps": 12, "searches": 2, "learning_rate": 0.1},
    "DIFGSM": {"steps": 3, "step_size": 0.04},
    "DeepFool": {"steps": 8, "candidates": 2},
    "FAB": {"steps": 6, "targets": 2, "restarts": 2},
    "FGSM": {},
    "MIFGSM": {"steps": 3, "step_size": 0.04},
    "NIFGSM": {"steps": 3, "step_size": 0.04},
    "PGD": {"steps": 3, "step_size": 0.04, "restarts": 2},
    "RSFGSM": {},
    "SINIFGSM": {"steps": 3, "step_size": 0.04, "scales": 2},
    "Square": {"queries": 25, "restarts": 2},
    "TIFGSM": {"steps": 3, "step_size": 0.04, "kernel": 3},
    "TargetedAPGD": {"steps": 6, "targets": 2},
    "TransferAttack": {"steps": 3, "step_size": 0.04, "scales": 2, "neighbors": 1, "diversity": 1.0, "decay": 0.5},
    "VMIFGSM": {"steps": 2, "step_size": 0.04, "neighbors": 2},
    "VNIFGSM": {"steps": 2, "step_size": 0.04, "neighbors": 2},
}
"""Settings with which an attack takes milliseconds; for every attack there is."""


def brief(name: str, **options: Any) -> Attack:
    """An attack in brief, seeded unless ``options`` say otherwise."""
    fields = KINDS[name].__dataclass_fields__
    own = {"seed": 0, **BRIEF[name], **options}
    if "eps" in fields and "eps" not in own:
        own["eps"] = EPS[own.get("norm", "linf")]
    return KINDS[name](**own)


def norms_of(name: str) -> list[str]:
    """The norms that an attack has an option for."""
    if "norm" not in KINDS[name].__dataclass_fields__:
        return []
    return ["linf", "l2"] if name == "DeepFool" else list(NORMS)


EVERY_NORM = [(name, norm) for name in KINDS for norm in norms_of(name) or [None]]
"""Every attack with each of its norms; ``None`` for an attack that has no such option."""


def options_of(norm: str | None) -> dict[str, str]:
    """The norm as options."""
    return {} if norm is None else {"norm": norm}


class Network(nn.Module):
    """Convolution, batch norm, dropout and a linear layer, for 8x8 images in two channels. In evaluation mode."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.dropout = nn.Dropout(0.3)
            self.fc = nn.Linear(96, CLASSES)
            nn.init.uniform_(self.norm.running_var, 0.5, 2)
            nn.init.normal_(self.fc.weight, std=0.3)  # so that probabilities are not all alike
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(torch.relu(self.norm(self.conv(x)))).flatten(1))


def samples(model: nn.Module, count: int = 10, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images of which a fifth of the pixels is at the bounds, and the model's own labels but for one."""
    generator = torch.Generator().manual_seed(1)
    x = (1.2 * torch.rand(count, 2, 8, 8, generator=generator) - 0.1).clamp(0, 1).to(dtype)
    y = labels_of(model.to(dtype), x)
    y[0] = (y[0] + 1) % CLASSES  # misclassified before anything is attacked
    return x, y


@torch.no_grad()
def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    """What the model takes inputs for."""
    return model(x).argmax(1)


def norm_in_float64(delta: Tensor, norm: str) -> Tensor:
    """Norms ``(N,)`` of perturbations, by plain formulas."""
    flat = delta.double().flatten(1)
    return {"linf": flat.abs().amax(1), "l2": flat.square().sum(1).sqrt(), "l1": flat.abs().sum(1)}[norm]


def assert_close_for_most(actual: Tensor, expected: Tensor, *, atol: float, share: float = 0.95) -> None:
    """Most samples are where they should be, within ``atol`` and, for losses, relative to them.

    An iteration that takes signs, maxima and comparisons amplifies rounding, which differs from processor to processor:
    where a value is as good as zero, a run may go another way from there on.
    """
    assert actual.shape == expected.shape
    scale = expected.abs().clamp_min(1)
    close = ((actual - expected).abs() <= atol * scale).reshape(len(actual), -1).all(1)
    assert close.double().mean() >= share, f"{int(close.sum())} of {len(close)} samples agree"
