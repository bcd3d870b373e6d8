"""How attacks are run, and what an attack may ask a model while it runs."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from gradprune.compiler.devices import computes_in_bfloat16
from gradprune.compiler.hoisted_step import one_attack
from gradprune.compiler.options import Options
from gradprune.errors import AttackError, OptionError, unknown

from .functions import Answer, Functions, Sized, compiler, gradient_function, logits_function, original
from .guard import Mode, unchanged
from .losses import LABEL_LOSSES, Loss, kl, label_losses
from .measured import Measured

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How attacks are run; every attack takes one, and what it does not say is as here.

    Attributes:
        compile: Compile with gradprune. The first attack on a model then takes a compilation, of seconds to minutes; on
            a model that is attacked for a few steps only, ``False`` (eager, with frozen weights) is faster. ``"auto"``
            begins eagerly, compiles what has been called for as long as compiling takes, and calls what it has measured
            to be faster for each number of rows. When it does depends on the clock: results of two runs may differ by
            rounding, from which an attack that compares losses may go another way.
        autocast: Type to run the model in (``torch.float16``, ``torch.bfloat16``); perturbations stay float32.
        mode: ``"eval"`` attacks the model in evaluation mode. ``"keep"`` leaves every module in its mode, such as batch
            norm in training mode; buffers are restored afterwards, and samples, which then see each other, all stay.
        active_set: Let samples leave the batch as soon as the attack is over for them.
        batch_size: Rows to compute at once, at most; ``None`` for the size of the batch attacked.
        progress: Show a progress bar on standard error.
        options: For the compilation, see ``gradprune.Options``.
    """

    compile: bool | Literal["auto"] = True
    autocast: torch.dtype | None = None
    mode: Mode = "eval"
    active_set: bool = True
    batch_size: int | None = None
    progress: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.compile not in (True, False, "auto"):
            raise OptionError(f'compile has to be True, False or "auto", not {self.compile!r}')
        if self.mode not in ("eval", "keep"):
            raise OptionError(unknown("mode", self.mode, ["eval", "keep"]))
        if self.autocast not in (None, torch.float16, torch.bfloat16):
            raise OptionError(f"autocast has to be torch.float16, torch.bfloat16 or None, not {self.autocast!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"batch_size has to be at least 1, not {self.batch_size}")
        if Options.parse(self.options).background and self.compile == "auto":
            raise OptionError(
                'compile="auto" begins eagerly by itself: leave out the option background, or compile=True'
            )

    @contextmanager
    def attack(self, model: Any, x: Tensor) -> Iterator[Query]:
        """Begin an attack; within the block weights must not change, for their prologue runs once.

        Args:
            model: From inputs to logits ``(N, classes)``.
            x: The clean inputs ``(N, ...)``.

        Yields:
            What the attack may ask.
        """
        model = original(model)
        if self.autocast is torch.bfloat16:
            _warn_of_bfloat16(x.device)
        with unchanged(model, self.mode), one_attack(), torch.inference_mode(False), torch.enable_grad():
            yield Query(self, model, x)


@functools.cache
def _warn_of_bfloat16(device: torch.device) -> None:
    """Say once if a device computes bfloat16 in float32."""
    if not computes_in_bfloat16(device):
        log.warning(
            "gradprune: %s has no instructions for bfloat16 and takes longer in it than in float32: "
            "autocast=torch.float16 is faster",
            device,
        )


class Query:
    """What an attack asks a model while it runs.

    Attributes:
        classes: How many classes the model tells apart.
        separable: Whether samples do not see each other, so that some may leave.
        gradients: How many rows gradients were asked for.
        forwards: How many rows only logits were asked for.
    """

    def __init__(self, runtime: Runtime, model: Any, x: Tensor) -> None:
        self.runtime = runtime
        self._model = model
        self._functions = Functions.of(model)
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.separable = not any(module.training for module in modules)
        self._batch = runtime.batch_size or (len(x) if self.separable else None)
        self.gradients = 0
        self.forwards = 0
        self._indices = {name: torch.tensor(i, device=x.device) for i, name in enumerate(LABEL_LOSSES)}
        self.classes = self._count_classes(x)

    def gradient(self, x: Tensor, labels: Tensor, loss: str | Loss = "ce") -> Answer:
        """Losses ``(N,)``, logits ``(N, classes)`` and the gradient of each loss by its input.

        Args:
            x: Inputs ``(N, ...)``.
            labels: Labels and targets ``(N, 2)``; for ``"kl"`` clean probabilities ``(N, classes)``.
            loss: One of ``LABEL_LOSSES``, ``"kl"``, or a function from logits and labels ``(N,)`` to losses ``(N,)``.
        """
        self.gradients += len(x)
        if isinstance(loss, str) and loss in LABEL_LOSSES:
            self._check_loss(loss)
            return self._call("labels", label_losses, x, labels, self._indices[loss])
        if loss == "kl":
            return self._call("kl", kl, x, labels)
        if isinstance(loss, str):
            raise OptionError(unknown("loss", loss, [*LABEL_LOSSES, "kl"]))
        return self._call(loss, loss, x, labels[:, 0])

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)``; nothing is kept for a backward pass."""
        self.forwards += len(x)
        key = "logits", *self._key(x)

        def make() -> Sized:
            return self._sized(logits_function(self.runtime.autocast), x.device, forward_only=True)

        function = self._functions.get(key, make)
        return function(self._model, x, separable=self.separable, batch=self._batch)  # type: ignore[no-any-return]

    def losses(self, x: Tensor, labels: Tensor, loss: str | Loss = "ce") -> tuple[Tensor, Tensor]:
        """Losses ``(N,)`` and logits ``(N, classes)`` without a gradient."""
        logits = self.logits(x)
        if isinstance(loss, str):
            return (kl if loss == "kl" else LABEL_LOSSES[loss][0])(logits, labels), logits
        return loss(logits, labels[:, 0]), logits

    def steps(self, steps: int, description: str) -> Iterable[int]:
        """``range(steps)``, with a progress bar if the runtime shows one."""
        return self.watch(range(steps), description)

    def watch(self, pieces: Iterable[T], description: str) -> Iterable[T]:
        """``pieces``, with a progress bar if the runtime shows one."""
        if not self.runtime.progress:
            return pieces
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise AttackError('progress=True needs tqdm: run pip install "gradprune[cli]"') from error
        bar: Iterable[T] = tqdm(pieces, desc=description, file=sys.stderr, leave=False)
        return bar

    def _call(self, key: Any, loss: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Answer:

        def make() -> Sized:
            return self._sized(gradient_function(loss, self.runtime.autocast), x.device)

        function = self._functions.get((key, *self._key(x)), make)
        return function(self._model, x, *others, separable=self.separable, batch=self._batch)  # type: ignore[no-any-return]

    def _sized(self, function: Any, device: torch.device, *, forward_only: bool = False) -> Sized:
        options = self.runtime.options
        if not self.runtime.compile:
            return Sized(function, None)
        compile_one = compiler(options, forward_only=forward_only)
        if self.runtime.compile == "auto":
            return Measured(function, compile_one)
        has_symbolic_sizes = device.type == "cpu" and not Options.parse(options).background
        compile_any = compiler(options, forward_only=forward_only, any_size=True)
        # What a later process finds compiled is of known size: the gradient at the largest, which all of PGD asks for.
        return Sized(
            function, compile_one, compile_any if has_symbolic_sizes else None, has_own_largest=not forward_only
        )

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        """What a compiled function is specialised to, apart from the size of the batch."""
        runtime = self.runtime
        settings = runtime.compile, runtime.autocast, self.separable, repr(sorted(runtime.options.items()))
        return (*settings, x.shape[1:], x.dtype, x.device)

    def _check_loss(self, loss: str) -> None:
        needed = LABEL_LOSSES[loss][1]
        if self.classes < needed:
            raise AttackError(f"the loss {loss!r} needs {needed} classes or more, and the model has {self.classes}")

    def _count_classes(self, x: Tensor) -> int:
        """Ask the model itself, once: a label that is no class must be found before a GPU does."""
        known = self._functions.classes
        parameters = self._model.parameters() if isinstance(self._model, nn.Module) else ()
        key = x.shape[1:], sum(parameter.numel() for parameter in parameters)
        if key not in known:
            logits = logits_function(self.runtime.autocast)(self._model, x[:1] if self.separable else x)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise AttackError(f"the model has to return logits (N, classes), not {shape}: wrap it in a function")
            known[key] = logits.shape[1]
        return known[key]
