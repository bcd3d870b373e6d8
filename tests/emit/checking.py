"""Runs many checks in one process: ``python checking.py LIBRARY CHECKS``, in the folder of ``targets.py``."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any


def breaks(pattern: str, replacement: str) -> Callable[[str, str], str]:
    """A change of the first kernel that has something, behind its signature."""
    broken: list[str] = []

    def change(name: str, source: str) -> str:
        head, jit, body = source.partition("@triton.jit")
        if broken:
            return source
        body, count = re.subn(pattern, replacement, body, count=1)
        if count:
            broken.append(name)
        return head + jit + body

    return change


CHANGES = {
    "maximum": (r"triton_helpers\.maximum", "triton_helpers.minimum"),
    "mask": (r"(tmp\d+ = tmp\d+) <= (tmp\d+)", r"\1 < \2"),
    "assertion": (r"(tl\.device_assert\(\(0 <= tmp\d+\) & \(tmp\d+ < )\d+", r"\g<1>0"),
    "bounds": (r"(tl\.store\(out_ptr\d+ \+ \()", r"\g<1>1 + "),
}


def without_strides(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Code generation that does not say which strides the outputs of the forward graph have."""
    import torch

    def call(gm: Any, inputs: Sequence[Any], **kwargs: Any) -> Any:
        generated = generate(gm, inputs, **kwargs)
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            context.output_strides.clear()
        return generated

    return call


def main(library: str, checks: str) -> None:
    """Print one line of JSON for each check."""
    ctypes.CDLL(library)
    import torch

    from gradprune.emit import emission
    from gradprune.emit.check import check_here
    from gradprune.emit.record import Request

    generate = emission.generate
    for name, (fields, options) in json.loads(checks).items():
        torch._dynamo.reset()
        broken = options.pop("break", None)
        emission.generate = without_strides(generate) if broken == "strides" else generate
        change = breaks(*CHANGES[broken]) if broken in CHANGES else None
        try:
            result = check_here(Request(**{**fields, "disable": ()}), change=change, **options).to_dict()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({name: result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
