"""Options of the backend: a frozen dataclass, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradprune.errors import OptionError, unknown
from gradprune.passes.base import Pass, Tier
from gradprune.passes.pipeline import PASS_NAMES
from gradprune.torch_compat.inductor import inductor_config, list_mode_options

CHECKS = ("auto", "first", "always", "never")


@dataclass(frozen=True)
class Options:
    """What can be set in ``torch.compile(..., backend="gradprune", options={...})``.

    Attributes:
        disable: Names of passes to leave out, such as ``("dgrad-as-convolution",)``.
        exact_order: Leave out every pass that may round differently from eager (tier "reorders float").
        fold_batch_norm: Fold batch norm in evaluation mode into the convolution or linear layer before it.
        passes: Passes of your own, see ``gradprune.passes.base.Pass`` and ``gradprune.passes.rewrite.rewrite``. They
            run behind those of gradprune, but what they make of weights is hoisted all the same.
        always_refresh: Look for changed weights at every call as at the start of an attack. For code that writes to
            ``weight.data`` between two steps of one attack; see also ``gradprune.invalidate``.
        forward_only: Move what depends on weights alone out of a function that takes no gradient as well, for the
            queries of a black-box attack. Such calls continue nothing, so weights are compared with their copies at
            each; for attacks of ``gradprune.attacks`` at the first.
        background: Have another process compile a step, and run the captured graph meanwhile, eagerly and with frozen
            weights: the first call takes as long as Dynamo takes to capture it. What cannot be stored for later
            processes is compiled at once: models that are called from outside, symbolic sizes, steps that write their
            inputs, passes of your own, what runs on a GPU.
        strict: Raise when a pass fails. By default the graph is compiled as it was captured, with one warning, and
            the reason is in the report.
        check: When to compare what is compiled with the captured graph run eagerly on the same inputs: ``"first"``, at
            the first call; ``"always"``; ``"never"``; by default, ``"auto"``, at the first call if an eager step takes
            less than a tenth of the compilation's time. If it is wrong there is a warning, and the captured graph runs
            eagerly; with ``strict`` an error.
        verify: Check the graph after every pass. Costs compile time; meant for tests and bug reports.
        dump: Folder to write every stage of the compilation to, a subfolder for each graph: programs, kernels, report,
            ``repro.py``. By default what the environment variable ``GRADPRUNE_DUMP`` says. Changes nothing else; if it
            cannot be written there is a warning.
        dump_inputs: Write the values of inputs and weights as well, for ``repro.py --saved``.
        mode: One of Inductor's modes, such as ``"max-autotune"``.
        inductor: Settings of ``torch._inductor.config`` for this compilation, such as ``{"max_autotune": True}``.
    """

    disable: tuple[str, ...] = ()
    exact_order: bool = False
    fold_batch_norm: bool = True
    passes: tuple[Pass, ...] = ()
    always_refresh: bool = False
    forward_only: bool = False
    background: bool = False
    strict: bool = False
    check: str = "auto"
    verify: bool = False
    dump: str | os.PathLike[str] | None = None
    dump_inputs: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            name, value = option.name, getattr(self, option.name)
            if isinstance(option.default, bool) and not isinstance(value, bool):
                raise OptionError(f"gradprune option {name!r} must be True or False, not {value!r}")
        if self.check not in CHECKS:
            raise OptionError(f"gradprune option 'check' must be one of {', '.join(CHECKS)}, not {self.check!r}")
        folder: object = self.dump
        if folder is not None and not (isinstance(folder, (str, os.PathLike)) and os.fspath(folder)):
            raise OptionError(f"gradprune option 'dump' must be the path of a folder, not {folder!r}")
        names: object = self.disable
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise OptionError(f"gradprune option 'disable' must be a list of pass names, not {self.disable!r}")
        object.__setattr__(self, "disable", tuple(names))
        self._check_passes()
        known = (*PASS_NAMES, *(step.name for step in self.passes))
        for name in self.disable:
            if name not in known:
                raise OptionError(f"gradprune option 'disable': {unknown('pass', name, known)}")
        if self.mode is not None and self.mode not in _inductor_modes():
            raise OptionError(f"gradprune option 'mode': {unknown('mode', self.mode, _inductor_modes())}")
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"gradprune option 'inductor' must be a mapping, not {self.inductor!r}")
        settings = inductor_config.get_config_copy() if self.inductor else {}
        for name in self.inductor:
            if name not in settings:
                raise OptionError(f"gradprune option 'inductor': {unknown('Inductor setting', name, settings)}")

    def _check_passes(self) -> None:
        passes: object = self.passes
        if isinstance(passes, str) or not isinstance(passes, Iterable):
            raise OptionError(f"gradprune option 'passes' must be a list of passes, not {passes!r}")
        object.__setattr__(self, "passes", tuple(passes))
        names = list(PASS_NAMES)
        for step in self.passes:
            made: object = step
            if not isinstance(made, Pass):
                raise OptionError(
                    f"gradprune option 'passes': {made!r} is no pass: derive its class from gradprune.passes.base.Pass "
                    "and pass an instance, or decorate a function with gradprune.passes.rewrite.rewrite"
                )
            if not (isinstance(getattr(step, "name", None), str) and isinstance(getattr(step, "tier", None), Tier)):
                raise OptionError(f"gradprune option 'passes': {made!r} does not say its name and its tier")
            if step.name in names:
                raise OptionError(f"gradprune option 'passes': the name {step.name!r} is taken: choose another")
            names.append(step.name)

    @property
    def inductor_settings(self) -> dict[str, Any]:
        """What ``mode`` stands for, and ``inductor`` on top of it."""
        return {**_inductor_modes().get(self.mode or "", {}), **self.inductor}

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Build from a plain mapping.

        Raises:
            OptionError: A name or a value is unknown; the message has the nearest valid name.
        """
        names = [option.name for option in dataclasses.fields(cls)]
        for name in options or {}:
            if name not in names:
                raise OptionError(f"gradprune has {unknown('option', name, names)}")
        return cls(**(options or {}))


def _inductor_modes() -> dict[str, dict[str, Any]]:
    return {"default": {}, **list_mode_options()}
