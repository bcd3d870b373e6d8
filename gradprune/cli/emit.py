"""``gradprune emit``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gradprune.emit.gpus import GPUS
from gradprune.emit.record import Request
from gradprune.emit.run import check, emit
from gradprune.emit.table import check_table, table
from gradprune.errors import OptionError
from gradprune.support.arguments import parse_whole
from gradprune.support.progress import stage
from gradprune.workloads.target import BATCH

from .options import AUTOCAST, add_target_options, check_modules

CHECKED = 2
"""Images to check unless asked otherwise: an interpreter takes its time."""

DESCRIPTION = """\
Show what an attack step becomes on a GPU, without one: Inductor generates its Triton kernels and calls of libraries for
the GPU asked for, Triton and ptxas compile them, and each call is listed with the bytes it moves and the time that the
roofline gives it, each kernel with its registers, spills, shared memory and occupancy. All of it is a static estimate:
nothing is run. With --check, what is generated is executed on the CPU and compared with eager. It takes Triton (pip
install "gradprune[emit]") and a C++ compiler, but no CUDA.
"""

EPILOG = """\
what to emit:
  timm:NAME       one step of PGD on a model of timm
  digits          the same on the small network of gradprune demo
  module:name     a model, or a function without arguments that returns one or (step, arguments), made on whatever
                  device torch has as default: see gradprune inspect --help

examples:
  gradprune emit timm:resnet18 --batch 32                          for a T4
  gradprune emit timm:resnet18 --batch 32 --autocast fp16 --target sm_80
  gradprune emit timm:resnet18 --batch 32 --against frozen-compile  beside torch.compile with frozen parameters
  gradprune emit timm:resnet18 --output emitted                    source, PTX and cubin of every kernel, and JSON
  gradprune emit timm:resnet18 --check --image-size 32             in Triton's interpreter, against float64
  gradprune emit mine:net --check --blocks real --races            with the blocks of a GPU, looking for races

A kernel is compiled in every configuration that Inductor would try when it first runs: registers are given from the
least to the most, everything else for the worst. Bytes are those of whole buffers, once for each kernel that reads one
and once for each that writes it. What libraries allocate for themselves is not known and not counted.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune emit``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("step", metavar="STEP", help="timm:NAME, digits or module:name, see below")
    group = parser.add_argument_group("what to emit")
    group.add_argument(
        "--target", choices=tuple(GPUS), default="sm_75", help="GPU to generate code for (default: %(default)s, a T4)"
    )
    group.add_argument(
        "--autocast", choices=tuple(AUTOCAST), help="type the model computes in (default: that of its weights)"
    )
    add_target_options(group, batch=None, shown=f"{BATCH}, {CHECKED} to check")
    group.add_argument(
        "--against", choices=("frozen-compile",), help="what torch.compile makes of it with frozen parameters, too"
    )
    group.add_argument(
        "--assume-faster", action="store_true", help="take for faster what the GPU would choose by measuring both"
    )
    group.add_argument("--source-only", action="store_true", help="do not compile what is generated")
    group = parser.add_argument_group("executing it on the CPU")
    group.add_argument(
        "--check", action="store_true", help="execute a model's step in Triton's interpreter, and compare it with eager"
    )
    group.add_argument(
        "--blocks", choices=("big", "real"), default="big", help="as big as they may be, or as on a GPU: slow"
    )
    group.add_argument("--races", action="store_true", help="look for addresses that two programs share")
    group.add_argument("--steps", type=parse_whole, default=2, metavar="N", help="of the attack (default: %(default)s)")
    group = parser.add_argument_group("what to show")
    group.add_argument("--json", action="store_true", help="print the emission as JSON")
    group.add_argument("--output", type=Path, metavar="DIR", help="write source, PTX, cubins and emission.json")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out.

    Returns:
        The exit status.

    Raises:
        GradpruneError: It cannot be done.
    """
    autocast = AUTOCAST.get(arguments.autocast)
    if arguments.autocast is not None and arguments.autocast not in GPUS[arguments.target].rates:
        raise OptionError(f"{arguments.target} has no {autocast}: pass --autocast fp16, or another --target")
    if arguments.step.startswith("timm:"):
        check_modules({"timm"})
    request = Request(
        target=arguments.step,
        gpu=arguments.target,
        form=arguments.form,
        batch=arguments.batch or (CHECKED if arguments.check else BATCH),
        image_size=arguments.image_size,
        autocast=autocast,
        disable=tuple(arguments.disable),
        exact_order=arguments.exact_order,
        against=arguments.against,
        binaries=not arguments.source_only,
        assume_faster=arguments.assume_faster,
    )
    if arguments.check:
        if arguments.output is not None or arguments.against is not None:
            raise OptionError("--check neither writes files nor compares: leave out --output and --against")
        with stage(f"checking {arguments.step} for {arguments.target}"):
            options = {"real_blocks": arguments.blocks == "real", "races": arguments.races, "steps": arguments.steps}
            checked = check(request, **options)
        print(json.dumps(checked, indent=1) if arguments.json else check_table(checked))
        return int(bool(checked["wrong"]))
    with stage(f"emitting {arguments.step} for {arguments.target}"):
        emitted = emit(request, arguments.output)
    print(json.dumps(emitted, indent=1) if arguments.json else table(emitted))
    if arguments.output is not None and not arguments.json:
        print(f"Saved in {arguments.output}.")
    return 0
