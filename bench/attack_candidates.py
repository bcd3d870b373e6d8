"""The attacks that are compared as a whole, each in gradprune and in Torchattacks with the same settings."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradprune.attacks import (
    APGD,
    CW,
    FAB,
    FGSM,
    MIFGSM,
    NIFGSM,
    PGD,
    SINIFGSM,
    VMIFGSM,
    Attack,
    DeepFool,
    Runtime,
    Square,
)
from gradprune.errors import GradpruneError, OptionError, unknown
from gradprune.torch_compat.aot import functorch_config
from gradprune.workloads.vision import let_torchvision_import

from .attack_step import Step
from .baselines import DTYPES, GRADPRUNE, Baseline, Contender
from .cases import SEED, Case, Workload
from .store import Settings

TORCHATTACKS = "Torchattacks"
TORCHATTACKS_FROZEN = "Torchattacks, frozen"
TORCHATTACKS_COMPILED = "Torchattacks, frozen + compile(model)"
UNCOMPILED = "gradprune, not compiled"

RIVALS = (TORCHATTACKS, TORCHATTACKS_FROZEN, TORCHATTACKS_COMPILED, UNCOMPILED)
"""What every whole attack is compared with by name."""

CLASSES = 10
"""DeepFool of Torchattacks looks at all classes. With ten of them that is what gradprune's does by default."""

APGD_STEPS, FAB_STEPS, QUERIES = 20, 10, 100

WHOLE_WORK = Runtime(active_set=False)
"""Torchattacks computes whole batches, but for what the algorithm itself drops: so that the work is the same."""

Theirs = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One attack in both libraries.

    Attributes:
        key: Its name, on the command line and in tables.
        ours: Makes gradprune's of a case.
        theirs: Makes that of Torchattacks of the library, the model and the case.
        deterministic: Whether both start alike and draw nothing, so that what they return can be compared.
        norm: Of the perturbation, for tables.
        bounded: Whether what is returned lies in the ball of the case.
        backs_up: Whether Torchattacks runs several backward passes over one forward pass.
        ball: Radius to attack in, as a share of the case's; in all of it, a random search has fooled an untrained
            network after a few queries.
    """

    key: str
    ours: Callable[[Case], Attack]
    theirs: Callable[[Any, nn.Module, Case], Theirs]
    deterministic: bool = True
    norm: Literal["linf", "l2"] = "linf"
    bounded: bool = True
    backs_up: bool = False
    ball: float = 1.0


def _pgd(steps: int) -> Method:
    """From the input itself, so that both start alike."""

    def ours(case: Case) -> Attack:
        return PGD(random_start=False, steps=steps, step_size=case.step_size, **_ball(case))

    def theirs(library: Any, model: nn.Module, case: Case) -> Theirs:
        attack: Theirs = library.PGD(model, random_start=False, steps=steps, alpha=case.step_size, eps=case.eps)
        return attack

    return Method(f"pgd-{steps}", ours, theirs)


def _momentum(kind: Callable[..., Attack], name: str, *, deterministic: bool = True, **options: Any) -> Method:
    """One of the relatives of MI-FGSM; ``options`` are those of Torchattacks for what is gradprune's default."""

    def ours(case: Case) -> Attack:
        return kind(steps=10, step_size=case.step_size, **_ball(case))

    def theirs(library: Any, model: nn.Module, case: Case) -> Theirs:
        make = getattr(library, name)
        attack: Theirs = make(model, steps=10, alpha=case.step_size, eps=case.eps, decay=1.0, **options)
        return attack

    return Method(name.lower(), ours, theirs, deterministic)


def _apgd(loss: str) -> Method:
    def ours(case: Case) -> Attack:
        return APGD(loss=loss, steps=APGD_STEPS, **_ball(case))

    def theirs(library: Any, model: nn.Module, case: Case) -> Theirs:
        attack: Theirs = library.APGD(model, loss=loss, steps=APGD_STEPS, eps=case.eps, seed=SEED)
        return attack

    return Method(f"apgd-{loss}", ours, theirs, deterministic=False)


def _ball(case: Case) -> dict[str, Any]:
    return {"eps": case.eps, "bounds": case.bounds, "seed": SEED}


METHODS = (
    Method("fgsm", lambda case: FGSM(**_ball(case)), lambda library, model, case: library.FGSM(model, eps=case.eps)),
    _pgd(10),
    _pgd(50),
    _momentum(MIFGSM, "MIFGSM"),
    _momentum(NIFGSM, "NIFGSM"),
    _momentum(SINIFGSM, "SINIFGSM", m=5),
    _momentum(VMIFGSM, "VMIFGSM", deterministic=False, N=5, beta=1.5),
    _apgd("ce"),
    _apgd("dlr"),
    Method(
        "cw",
        lambda case: CW(steps=50, learning_rate=0.004, constant=20.0, bounds=case.bounds, seed=SEED),
        lambda library, model, case: library.CW(model, steps=50, lr=0.004, c=20, kappa=0),
        norm="l2",
        bounded=False,
    ),
    Method(
        "deepfool",
        lambda case: DeepFool(steps=50, overshoot=0.02, candidates=CLASSES - 1, bounds=case.bounds, seed=SEED),
        lambda library, model, case: library.DeepFool(model, steps=50, overshoot=0.02),
        norm="l2",
        bounded=False,
        backs_up=True,
    ),
    Method(
        "fab",
        lambda case: FAB(steps=FAB_STEPS, targets=CLASSES - 1, stop_at_success=True, **_ball(case)),
        lambda library, model, case: library.FAB(
            model, steps=FAB_STEPS, multi_targeted=True, n_classes=CLASSES, eps=case.eps, seed=SEED
        ),
    ),
    Method(
        "square",
        lambda case: Square(queries=QUERIES, **_ball(case)),
        lambda library, model, case: library.Square(model, n_queries=QUERIES, eps=case.eps, seed=SEED),
        deterministic=False,
        ball=0.1,
    ),
)


def choose_methods(keys: Sequence[str] | None) -> list[Method]:
    """The attacks called ``keys``, in the order of the tables; ``None`` takes all.

    Raises:
        OptionError: There is no such attack.
    """
    known = {method.key: method for method in METHODS}
    for key in keys or ():
        if key not in known:
            raise OptionError(unknown("attack", key, known))
    return [method for method in METHODS if keys is None or method.key in keys]


class TenClasses(nn.Module):
    """The first ten classes of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 10)``."""
        return self.network(x)[:, :CLASSES]  # type: ignore[no-any-return]


def with_ten_classes(work: Workload) -> Workload:
    """The same with ten classes at most; labels are what the network then reads in the clean inputs."""
    with torch.no_grad():
        logits = work.model(work.x)
    if logits.shape[1] <= CLASSES:
        return work
    return Workload(work.case, TenClasses(work.model).eval(), work.x, logits[:, :CLASSES].argmax(1))


def whole(attack: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """A whole attack ``(x, y) -> x_adv`` in the form of a single step, which is what can be timed in turn."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = attack(x, y)
        return found, found

    return step


def our_contender(
    name: str, make: Callable[[Case], Attack], runtime: Runtime, work: Workload, settings: Settings
) -> Contender:
    """An attack of gradprune, on a model of its own with live parameters.

    Args:
        name: Its name in tables.
        make: Makes the attack.
        runtime: How to run it, apart from what ``settings`` say.
        work: What to attack.
        settings: Of the run.
    """
    model = copy.deepcopy(work.model).requires_grad_(True)
    attack = make(work.case)
    runtime = dataclasses.replace(runtime, autocast=DTYPES[settings.autocast])
    step = whole(lambda x, y: attack(model, x, y, runtime=runtime))
    return Contender(name, model, step, compiled=bool(runtime.compile))


def their_contender(
    name: str, method: Method, frozen: bool, compiled: bool, work: Workload, settings: Settings
) -> Contender:
    """An attack of Torchattacks, on a model of its own.

    Args:
        name: Its name in tables.
        method: Makes the attack.
        frozen: Whether parameters require no gradient.
        compiled: Whether ``torch.compile`` of the model is attacked.
        work: What to attack.
        settings: Of the run.

    Raises:
        GradpruneError: It is not installed, or is for other inputs.
    """
    library = torchattacks()
    if work.x.ndim != 4 or work.case.bounds != (0.0, 1.0):
        raise GradpruneError("Torchattacks attacks images (N, C, H, W) in [0, 1] only")
    model = copy.deepcopy(work.model).requires_grad_(not frozen)
    attacked: Any = torch.compile(model) if compiled else model
    attack = method.theirs(library, attacked, work.case)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        # A compiled backward pass that may run again must not write into what was saved for it.
        with functorch_config.patch(donated_buffer=functorch_config.donated_buffer and not method.backs_up):
            yield

    def seeded(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        dtype = DTYPES[settings.autocast]
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return attack(x, y).detach()

    return Contender(name, model, whole(seeded), compiled=compiled, context=context)


def ways(method: Method) -> list[Baseline]:
    """The ways to run one attack, in the order of the tables."""
    return [
        Baseline("", TORCHATTACKS, partial(their_contender, TORCHATTACKS, method, False, False), compiles=False),
        Baseline(
            "", TORCHATTACKS_FROZEN, partial(their_contender, TORCHATTACKS_FROZEN, method, True, False), compiles=False
        ),
        Baseline("", TORCHATTACKS_COMPILED, partial(their_contender, TORCHATTACKS_COMPILED, method, True, True)),
        Baseline(
            "",
            UNCOMPILED,
            partial(our_contender, UNCOMPILED, method.ours, dataclasses.replace(WHOLE_WORK, compile=False)),
            compiles=False,
        ),
        Baseline("", GRADPRUNE, partial(our_contender, GRADPRUNE, method.ours, WHOLE_WORK)),
    ]


def torchattacks() -> Any:
    """The library.

    Raises:
        GradpruneError: It cannot be imported.
    """
    # What torchvision lacks must be known to torch before something imports it; without torchvision there is nothing.
    with contextlib.suppress(ImportError):
        let_torchvision_import()
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise GradpruneError(
            f"Torchattacks cannot be imported ({error}): run pip install --no-deps torchattacks, and "
            "pip install scipy requests torchvision tqdm"
        ) from error


def torchattacks_version() -> str:
    """For the environment of the figures."""
    try:
        return version("torchattacks")
    except PackageNotFoundError:
        return "not installed"
