"""``gradprune inspect``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import webbrowser
from pathlib import Path

from gradprune.compiler.options import Options
from gradprune.emit.gpus import GPUS
from gradprune.emit.record import Request
from gradprune.emit.run import check_requirements, emit
from gradprune.errors import GradpruneError, OptionError
from gradprune.graph.cost import FLOP_CLASSES
from gradprune.inspect.dot import dot
from gradprune.inspect.dump import VARIABLE
from gradprune.inspect.explain import Counted, analyse, count_frozen_compile
from gradprune.inspect.page import add_emission
from gradprune.ops.kernel_choice import not_measuring
from gradprune.report.report import Report, unit_of
from gradprune.support.progress import stage
from gradprune.workloads.target import BATCH, TargetOptions, load_target

from .options import add_target_options

DESCRIPTION = """\
Show what gradprune makes of an attack step: what is removed from its backward graph, what is not and why, what is
computed once per attack, and what all of it should bring. Nothing is run or compiled and no activation is allocated:
tensors have shapes but no memory, so that a ResNet-152 at batch 256 takes a minute on a laptop.
"""

EPILOG = """\
targets:
  timm:NAME       one step of PGD on a model of timm, with the normalisation and the image size it expects
  digits          the same on the small network of gradprune demo
  module:name     from module.py of this directory, or installed: a torch.nn.Module, or a function without arguments
                  that returns one (attacked by PGD as above), or a function that returns a step and its arguments:

                      # mine.py
                      def pgd():
                          model = make_model().eval()

                          def attack_step(x_adv, x, y):
                              x_adv = x_adv.detach().requires_grad_(True)
                              F.cross_entropy(model(x_adv), y).backward()
                              return x_adv.detach() + 0.01 * x_adv.grad.sign()

                          x = torch.rand(32, 3, 224, 224)
                          return attack_step, (x, x.clone(), torch.zeros(32, dtype=torch.long))

                      $ gradprune inspect mine:pgd

                  Shapes and types matter, values do not: there are none. A function that needs some to make its model,
                  one that reads a file by numpy for example, takes --real.

examples:
  gradprune inspect timm:resnet18                        the report
  gradprune inspect timm:resnet152 --batch 256           of a step that would need 60 GB
  gradprune inspect timm:resnet18 --form model           what accelerate(model) does for an attack library
  gradprune inspect timm:vit_small_patch16_224 --disable early-masks
  gradprune inspect timm:resnet18 --dump out --open      every stage as a file, and the page that compares them
  gradprune inspect timm:resnet18 --gpu sm_75 --open     the page lists the kernels of a T4 too, see gradprune emit
  gradprune inspect timm:resnet18 --why convolution_5    what needs this node; names are those of the dump
  gradprune inspect timm:resnet18 --against frozen-compile
                                                         beside torch.compile on a model with frozen parameters

Which of two kernels is faster is not timed here: what an earlier compilation on this machine has not measured counts as
no faster, and a line says so.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune inspect``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("target", metavar="TARGET", help="timm:NAME, digits or module:name, see below")
    group = parser.add_argument_group("what to inspect")
    add_target_options(group, batch=BATCH, shown=BATCH)
    group.add_argument(
        "--real", action="store_true", help="allocate weights and inputs, for a function that reads them"
    )
    group = parser.add_argument_group("what to show")
    group.add_argument("--why", action="append", default=[], metavar="NODE", help="why a node is computed, or is not")
    group.add_argument(
        "--against", choices=("frozen-compile",), help="count what torch.compile does with frozen parameters, too"
    )
    group.add_argument(
        "--gpu", choices=tuple(GPUS), help="with --dump or --open: generate its code for this GPU, for the page"
    )
    group.add_argument("--json", action="store_true", help="print the report as JSON")
    group.add_argument("--dump", type=Path, metavar="DIR", help="write every stage to a folder in DIR")
    group.add_argument("--dot", type=Path, metavar="FILE", help="write the graph for Graphviz")
    group.add_argument("--open", action="store_true", help="open the page that compares before and after in a browser")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out.

    Returns:
        The exit status.

    Raises:
        GradpruneError: It cannot be done.
    """
    dump = arguments.dump
    if arguments.gpu is not None:
        if dump is None and not arguments.open:
            raise OptionError("--gpu is for the page: pass --dump or --open too, or use gradprune emit")
        if arguments.real:
            raise OptionError("--gpu generates code without values: leave out --real")
        check_requirements()
    if arguments.open and dump is None and not os.environ.get(VARIABLE):
        dump = Path(tempfile.mkdtemp(prefix="gradprune-"))
    options = Options(disable=tuple(arguments.disable), exact_order=arguments.exact_order, dump=dump)
    target = load_target(
        TargetOptions(arguments.target, arguments.form, arguments.batch, arguments.image_size, arguments.real)
    )
    counted = None
    with target.context, not_measuring() as unmeasured:
        try:
            analysis = analyse(target.function, target.args, options)
            if arguments.against:
                counted = count_frozen_compile(target.function, target.args, analysis.weights)
        except GradpruneError:
            raise
        except Exception as error:  # what the user's function raises, or torch where it cannot be traced
            raise GradpruneError(
                f"{arguments.target} could not be captured: {type(error).__name__}: {error}. Nothing is run here, so "
                "that tensors have no values: if the step reads some, by .item() for example, leave that out"
            ) from error
    report = analysis.report
    answers = [report.why(node) for node in arguments.why]
    if arguments.dot is not None:
        _write_dot(arguments.dot, report)
    if arguments.json:
        against = {} if counted is None else {"against": {"name": arguments.against, **vars(counted)}}
        print(json.dumps({**report.to_dict(), **against}, indent=1))
    else:
        print(report)
        if unmeasured:
            print(f"  {len(set(unmeasured))} choices between kernels not timed on this machine: taken to be no faster")
        if counted is not None:
            print(f"\n{beside(report, counted)}")
        for answer in answers:
            print(f"\n{answer}")
    page = Path(report.dump or "", "page.html")
    if (arguments.open or arguments.gpu) and (report.dump is None or not page.exists()):
        raise GradpruneError(f"there is no page: {report.dump_error}")
    if arguments.gpu:
        with stage(f"emitting {arguments.target} for {arguments.gpu}"):
            add_emission(page, emit(_request(arguments)))
    if arguments.open:
        webbrowser.open(page.resolve().as_uri())
    return int(arguments.dump is not None and report.dump_error is not None)


def _request(arguments: argparse.Namespace) -> Request:
    return Request(
        target=arguments.target,
        gpu=arguments.gpu,
        form=arguments.form,
        batch=arguments.batch,
        image_size=arguments.image_size,
        disable=tuple(arguments.disable),
        exact_order=arguments.exact_order,
    )


def beside(report: Report, counted: Counted) -> str:
    """What torch.compile makes of the same step with frozen parameters, beside the pruned graph."""
    names = ("frozen + compile", "gradprune")
    lines = [f"  {'':<24}{names[0]:>18}{names[1]:>14}"]

    def add(label: str, theirs: float, ours: float, unit: float = 1, digits: int = 0) -> None:
        ratio = f"{theirs / ours:.2f}x" if ours else ""
        lines.append(f"  {label:<24}{theirs / unit:>18,.{digits}f}{ours / unit:>14,.{digits}f}  {ratio}".rstrip())

    ours = report.flops["after"]
    add("operators", counted.ops, report.ops["after"])
    unit, prefix = unit_of(max(sum(ours.values()), sum(counted.flops.values())))
    for name in FLOP_CLASSES:
        if ours[name] or counted.flops[name]:
            add(f"{prefix}FLOP {name.replace('_', ' ')}", counted.flops[name], ours[name], unit, 2)
    add(f"{prefix}FLOP total", sum(counted.flops.values()), sum(ours.values()), unit, 2)
    unit, prefix = unit_of(max(counted.saved_bytes, report.saved_bytes["after"]))
    add(f"{prefix}B saved for backward", counted.saved_bytes, report.saved_bytes["after"], unit, 1)
    return "\n".join(lines)


def _write_dot(path: Path, report: Report) -> None:
    from gradprune.support.files import write_text

    try:
        write_text(path, dot(report))
    except OSError as error:
        raise OptionError(f"cannot write --dot {path}: {error.strerror or error}") from error
