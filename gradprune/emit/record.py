"""What was asked for and what came of it, as data that two processes hand each other and JSON files hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

ESTIMATE = "static estimate"
"""What all of it is."""


@dataclass(frozen=True)
class Request:
    """What to emit.

    Attributes:
        target: ``module:name``, ``timm:NAME`` or ``digits``.
        gpu: A name in ``GPUS``.
        form: ``"step"`` or ``"model"``.
        batch: Images of a stock attack.
        image_size: Height and width; ``None`` for the model's own.
        autocast: ``"float16"`` or ``"bfloat16"`` for the model of a stock attack.
        disable: Passes to leave out.
        exact_order: Leave out passes that may round differently.
        assume_faster: Take for faster on the GPU what it would choose by measuring.
        against: ``"frozen-compile"`` to emit what ``torch.compile`` makes of the same call with frozen parameters.
        binaries: Whether to compile what is generated.
    """

    target: str
    gpu: str
    form: str = "step"
    batch: int = 8
    image_size: int | None = None
    autocast: str | None = None
    disable: tuple[str, ...] = ()
    exact_order: bool = False
    against: str | None = None
    binaries: bool = True
    assume_faster: bool = False


@dataclass
class Call:
    """A kernel that a part launches, or a function of a library that it calls.

    Attributes:
        name: Of the kernel or the function.
        kind: ``"generated"`` or ``"external"``.
        reads: Bytes by buffer; each buffer is counted once.
        writes: The same. Of an external call, without what it needs for itself.
        flops: Of the arithmetic of contractions; 0 for all else.
        rate: Which of the GPU's rates they run at.
        seconds: By the roofline.
        sources: Calls that wrote what it reads, by their positions in the part, and how many bytes: edges of the graph.
    """

    name: str
    kind: str
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    rate: str = "fp32"
    seconds: float = 0.0
    sources: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass
class Part:
    """What one call of generated code does.

    Attributes:
        name: ``"prologue"``, ``"step"``, ``"forward"`` or ``"backward"``; with a number where there are several.
        calls: In the order in which they are made.
        peak_bytes: Most that is alive at once of what it allocates, and of what a backward pass is handed.
        returned_bytes: Of what it allocates and returns.
        code: What Inductor generated.
    """

    name: str
    calls: list[Call]
    peak_bytes: int
    returned_bytes: int
    code: str = field(default="", repr=False)

    def of(self, kind: str) -> list[Call]:
        """Calls of a kind."""
        return [call for call in self.calls if call.kind == kind]


@dataclass
class Kernel:
    """A generated kernel compiled for the GPU.

    Attributes:
        name: Its name, which is one of its part.
        part: The part that launches it.
        configs: For each configuration that is tried when it first runs: ``config`` (block sizes), ``warps``,
            ``registers`` and ``stack_bytes`` of a thread, ``shared_bytes`` of a block, ``occupancy``, ``cubin_bytes``.
    """

    name: str
    part: str
    configs: list[dict[str, Any]]


@dataclass
class Emission:
    """Everything that was generated for a step.

    Attributes:
        request: What was asked for.
        gpu: Name of the GPU.
        versions: Of torch and Triton.
        summary: One line about what was compiled.
        parts: What gradprune's step or model consists of.
        kernels: Compiled kernels, of parts that are not compared against; empty if nothing was compiled.
        fused_bytes: Bytes that the step would move if all that is not a contraction were fused, forward and backward
            apart: ``Report.moved_bytes``.
        hoisted_bytes: Of the values that the prologue makes.
        fallback: What the compilation had to do without.
        against: The parts of what it is compared with.
        unmeasured: What a GPU would have measured to choose between two kernels.
    """

    request: Request
    gpu: str
    versions: dict[str, str]
    summary: str
    parts: list[Part]
    kernels: list[Kernel] = field(default_factory=list)
    fused_bytes: int = 0
    hoisted_bytes: int = 0
    fallback: str | None = None
    against: list[Part] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with a label, totals, and without the generated code."""
        data = dataclasses.asdict(self)
        for part in (*data["parts"], *data["against"]):
            del part["code"]
        totals = {"gradprune": dataclasses.asdict(totals_of(self.parts))}
        if self.against:
            totals[str(self.request.against)] = dataclasses.asdict(totals_of(self.against))
        return {"label": ESTIMATE, **data, "totals": totals}


@dataclass(frozen=True)
class Totals:
    """What parts but the prologue come to.

    Attributes:
        kernels: Generated kernels that differ.
        launches: Of generated kernels.
        external: Calls of libraries.
        generated_bytes: Read and written by generated kernels.
        external_bytes: Read and written by libraries.
        external_flops: Of libraries.
        generated_seconds: By the roofline.
        external_seconds: The same.
        peak_bytes: The largest of all parts.
    """

    kernels: int
    launches: int
    external: int
    generated_bytes: int
    external_bytes: int
    external_flops: int
    generated_seconds: float
    external_seconds: float
    peak_bytes: int


def totals_of(parts: list[Part]) -> Totals:
    """Sums over parts; what runs once per attack is not in them."""
    repeated = [part for part in parts if not part.name.startswith("prologue")]
    generated = [call for part in repeated for call in part.of("generated")]
    external = [call for part in repeated for call in part.of("external")]
    return Totals(
        kernels=sum(len({call.name for call in part.of("generated")}) for part in repeated),
        launches=len(generated),
        external=len(external),
        generated_bytes=sum(call.bytes for call in generated),
        external_bytes=sum(call.bytes for call in external),
        external_flops=sum(call.flops for call in external),
        generated_seconds=sum(call.seconds for call in generated),
        external_seconds=sum(call.seconds for call in external),
        peak_bytes=max((part.peak_bytes for part in repeated), default=0),
    )
