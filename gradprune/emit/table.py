"""An emission as text: what is called in which order, what it moves, and what all of it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .record import ESTIMATE

WIDTH = 44
"""Characters of a kernel's name; what is longer loses its middle."""
NAMES = {"frozen-compile": "frozen + compile"}
HEAD = f"  {'':>3}  {'':<{WIDTH}}{'read MB':>10}{'written MB':>11}{'GFLOP':>8}{'us':>8}"
FACTS = f"{'registers':>11}{'spilled':>9}{'shared':>8}{'occupancy':>11}"


def table(emitted: Mapping[str, Any]) -> str:
    """Print-out of an emission.

    Args:
        emitted: ``Emission.to_dict()``.
    """
    request, versions = emitted["request"], emitted["versions"]
    lines = [
        f"gradprune emit {request['target']} for {request['gpu']} ({emitted['gpu']}), torch {versions['torch']}, "
        f"Triton {versions['triton']}",
        f"{ESTIMATE}: generated{' and compiled' if request['binaries'] else ''}, not run; times are the roofline's",
        "",
        f"  {emitted['summary']}",
    ]
    if emitted["fallback"]:
        lines.append(f"  fallback: {emitted['fallback']}")
    if emitted["unmeasured"]:
        assumed = "taken for faster" if request["assume_faster"] else "not taken: --assume-faster takes them"
        lines.append(f"  kernels that a GPU would measure first: {len(emitted['unmeasured'])}, here {assumed}")
    compiled = {(kernel["part"], kernel["name"]): kernel["configs"] for kernel in emitted["kernels"]}
    for part in emitted["parts"]:
        if part["name"].startswith("prologue"):
            moved = sum(sum(call["reads"].values()) + sum(call["writes"].values()) for call in part["calls"])
            lines += [
                "",
                f"{part['name']}, once per attack: {len(part['calls'])} calls, {moved / 1e6:,.1f} MB moved; its values "
                f"take {emitted['hoisted_bytes'] / 1e6:,.1f} MB",
            ]
            continue
        lines += ["", f"{part['name']}, in the order of its calls", HEAD + (FACTS if compiled else "")]
        for position, call in enumerate(part["calls"]):
            lines.append(_call_line(position, call, compiled.get((part["name"], call["name"]))))
    lines += ["", *_totals(emitted)]
    return "\n".join(line.rstrip() for line in lines)


def check_table(checked: Mapping[str, Any]) -> str:
    """Print-out of a check.

    Args:
        checked: ``CheckOutcome.to_dict()``.
    """
    request, counts = checked["request"], dict(checked["counts"])
    launches, programs = counts.pop("launches", 0), counts.pop("programs", 0)
    lines = [
        f"gradprune emit --check {request['target']} for {request['gpu']}, {request['form']} form, batch "
        f"{request['batch']}: executed on a CPU, kernels in Triton's interpreter, libraries by ATen",
        f"  {launches} launches, {programs} programs{''.join(f', {n} {what}' for what, n in counts.items())}",
        "",
        "  distance of the input gradient from eager float64, and pixels that differ although their sign is certain",
        f"  {'step':>4}{'generated':>12}{'eager':>10}{'median image':>15}{'eager':>10}{'pixels':>18}{'loss':>10}",
    ]
    for number, step in enumerate(checked["steps"]):
        lines.append(
            f"  {number:>4}{step['generated']:>12.1e}{step['eager']:>10.1e}{step['generated_median']:>15.1e}"
            f"{step['eager_median']:>10.1e}{step['differing']:>8} of {step['usable']:>6}{step['loss']:>10.1e}"
        )
    lines += ["", *(f"wrong: {one}" for one in checked["wrong"]), f"{'fails' if checked['wrong'] else 'passes'}."]
    return "\n".join([*lines, f"Not shown by this: {checked['not_shown']}."])


def _call_line(position: int, call: Mapping[str, Any], configs: Sequence[Mapping[str, Any]] | None) -> str:
    name = call["name"].removeprefix("triton_")
    if len(name) > WIDTH - 2:
        name = f"{name[: WIDTH // 2 - 4]}...{name[-WIDTH // 2 :]}"
    flops = f"{call['flops'] / 1e9:.2f}" if call["flops"] else ""
    read, written = (sum(call[what].values()) / 1e6 for what in ("reads", "writes"))
    line = f"  {position:>3}  {name:<{WIDTH}}{read:>10,.2f}{written:>11,.2f}{flops:>8}{call['seconds'] * 1e6:>8,.1f}"
    if not configs:
        return line
    registers = [config["registers"] for config in configs]
    span = str(max(registers)) if len(set(registers)) == 1 else f"{min(registers)}-{max(registers)}"
    spilled, shared = (max(config[what] for config in configs) for what in ("stack_bytes", "shared_bytes"))
    return f"{line}{span:>11}{spilled:>9,}{shared:>8,}{min(config['occupancy'] for config in configs):>11.2f}"


def _totals(emitted: Mapping[str, Any]) -> list[str]:
    totals: Mapping[str, Mapping[str, Any]] = emitted["totals"]
    names = [NAMES.get(name, name) for name in totals]
    lines = [f"  {'one call, without the prologue':<34}" + "".join(f"{name:>18}" for name in names)]

    def add(label: str, key: str, unit: float = 0) -> None:
        values = [each[key] for each in totals.values()]
        ratio = f"  {values[1] / values[0]:.2f}x" if len(values) > 1 and values[0] else ""
        shown = [f"{value / unit:.3g}" if unit else str(value) for value in values]
        lines.append(f"  {label:<34}" + "".join(f"{one:>18}" for one in shown) + ratio)

    add("generated kernels", "kernels")
    add("launches of them", "launches")
    add("external calls", "external")
    add("GB moved by generated kernels", "generated_bytes", 1e9)
    add("GB moved by external calls", "external_bytes", 1e9)
    add("GFLOP of external calls", "external_flops", 1e9)
    add("MB peak", "peak_bytes", 1e6)
    add("ms of generated kernels, roofline", "generated_seconds", 1e-3)
    add("ms of external calls, roofline", "external_seconds", 1e-3)
    ours = totals["gradprune"]
    moved = ours["generated_bytes"] + ours["external_bytes"]
    lines.append(
        f"  {moved / 1e9:.3g} GB moved in all; {emitted['fused_bytes'] / 1e9:.3g} GB if all between two contractions "
        "were one kernel"
    )
    configs = [config for kernel in emitted["kernels"] for config in kernel["configs"]]
    if configs:
        most = {key: max(config[key] for config in configs) for key in ("registers", "stack_bytes", "shared_bytes")}
        occupancy = min(config["occupancy"] for config in configs)
        lines.append(
            f"  {len(configs)} configurations of {len(emitted['kernels'])} kernels, prologue included, compile: at "
            f"most {most['registers']} registers and {most['stack_bytes']} bytes spilled a thread, "
            f"{most['shared_bytes']:,} bytes of shared memory, occupancy at least {occupancy:.2f}"
        )
    return lines
