"""Executes what was generated for a GPU on the CPU, and compares it with eager.

A model's step of PGD is emitted and, in the same process, run: its Triton kernels in Triton's interpreter, its library
calls by ATen. Its input gradient and its iterate are compared with eager in float64, and eager in the type that the
model computes in with the same. What that cannot show is in ``NOT_SHOWN``.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradprune.compiler.hoisted_step import reset_all
from gradprune.compiler.lower import compile_graph
from gradprune.compiler.options import Options
from gradprune.errors import GradpruneError
from gradprune.inspect.explain import call_compiled
from gradprune.ops.kernel_choice import not_measuring
from gradprune.torch_compat import dynamo
from gradprune.torch_compat.aot import FakeTensorMode
from gradprune.torch_compat.fake_cuda import Generated, canaries, fake_cuda
from gradprune.workloads.target import EPS, STEP_SIZE, TargetOptions, in_autocast, load_real_model, without_memory

from .emission import Emitter
from .execution import Change, Executable, Settings, executing
from .externals import register_attention
from .gpus import GPUS
from .record import Request

NOT_SHOWN = (
    "what ptxas makes of a kernel, rounding by libdevice and TF32, results and layouts of cuDNN and cuBLAS, streams, "
    "CUDA graphs, other tile sizes"
)
"""What agreement on a CPU leaves open."""
USABLE = 1e-4
"""Part of an image's largest gradient from which on the sign of a gradient is more than rounding."""
AGREED = 0.1
"""Part of it by which eager may be off there: behind a kink that rounding crosses, as of ReLU6, all is another."""
STEPS = 2
IMAGES_FOR_STATISTICS = 16
_ARGUMENT = re.compile(r"args'?\]?\[(\d+)\]")


@dataclass
class StepOutcome:
    """How one step compares.

    Attributes:
        generated: Distance of the input gradient from eager float64, relative to the norm of that.
        eager: The same of eager in the type that the model computes in.
        generated_median: The same, the median over images of each image's own.
        eager_median: The same.
        differing: Pixels of the iterate that differ although the gradient's sign is certain.
        usable: Pixels at which it is.
        loss: Difference of the loss.
    """

    generated: float
    eager: float
    generated_median: float
    eager_median: float
    differing: int
    usable: int
    loss: float


@dataclass
class CheckOutcome:
    """What a check found.

    Attributes:
        request: What was checked.
        steps: One for each step of the attack.
        counts: Launches, programs, and results that were brought into the layout that the code expects.
        wrong: Why it does not pass; empty if it does.
    """

    request: Request
    steps: list[StepOutcome]
    counts: dict[str, int]
    wrong: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with what it does not show."""
        return {**dataclasses.asdict(self), "not_shown": NOT_SHOWN}

    def judge(self) -> None:
        """Say what is wrong."""
        for number, step in enumerate(self.steps):
            if self.request.autocast is None:
                if not step.generated <= 3 * step.eager + 1e-6:
                    self.wrong.append(
                        f"step {number}: the gradient is {step.generated:.1e} from float64, eager {step.eager:.1e}"
                    )
                if step.differing:
                    self.wrong.append(f"step {number}: {step.differing} of {step.usable} certain pixels differ")
            elif not step.generated_median <= 2 * step.eager_median:
                self.wrong.append(
                    f"step {number}: the median gradient is {step.generated_median:.1e} from float64, "
                    f"eager autocast {step.eager_median:.1e}"
                )


class Executor(Emitter):
    """An inner compiler whose results compute, on a CPU."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def result(self, generated: Generated | None, nothing: Callable[..., Any]) -> Callable[..., Any]:
        """What runs the code."""
        return nothing if generated is None else Executable(generated, nothing, self._settings)


def check_here(
    request: Request,
    *,
    real_blocks: bool = False,
    races: bool = False,
    steps: int = STEPS,
    change: Change | None = None,
) -> CheckOutcome:
    """Emit, execute and compare within this process, which has loaded the device and set ``TRITON_INTERPRET``.

    Args:
        request: What to check; its target is a model.
        real_blocks: Take the block sizes that a GPU would try first, not the biggest.
        races: Look for addresses that two programs share.
        steps: Steps of the attack. The prologue's values are used again from the second on.
        change: What is done to the source of each kernel before, to see whether that is found.

    Raises:
        OptionError: The target is no model.
        GradpruneError: It cannot be emitted.
        KernelError: A kernel touches memory that is not its own, or a promise made to it is broken.
    """
    dtype = None if request.autocast is None else getattr(torch, request.autocast)
    options = TargetOptions(request.target, request.form, request.batch, request.image_size)
    model, shape = load_real_model(options)
    torch.manual_seed(0)
    _awaken(model, shape)
    x = torch.rand(request.batch, *shape)
    with torch.no_grad():
        y = model(x).argmax(1)
    x_adv = (x + (torch.rand_like(x) - 0.5) * EPS).clamp(0, 1)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    settings = Settings(real_blocks, races, change)
    attention = register_attention()
    with fake_cuda(GPUS[request.gpu].properties), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = canaries()
        if wrong:
            raise GradpruneError(f"torch does not take the device for a GPU with cuDNN: {'; '.join(wrong)}")
        compiled, inputs = _compile(request, model, (x_adv, x, y), dtype, settings)
        reset_all()
        outcomes = []
        for _ in range(steps):
            given = [state[one] if isinstance(one, str) else (x_adv, x, y)[one] for one in inputs]
            found = _run(request.form, compiled, inputs, given, (x_adv, x, y))
            outcomes.append(_compare(found, model, dtype, (x_adv, x, y)))
            x_adv = found[0]
    del attention
    outcome = CheckOutcome(request, outcomes, dict(settings.counts))
    outcome.judge()
    return outcome


def _awaken(model: nn.Module, shape: Sequence[int]) -> None:
    """Give an untrained network a gradient worth comparing: statistics of batches, and no branch that is zero."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    fresh = [one for one in norms if one.running_mean is not None and not one.running_mean.any()]
    with torch.no_grad():
        for norm in fresh:
            norm.momentum = None
            norm.train()
            if norm.affine and not norm.weight.any():
                norm.weight.uniform_(0.2, 0.5)
        for module in model.modules():
            scale = getattr(module, "gamma", None)
            if isinstance(scale, Tensor) and scale.abs().max() < 1e-3:
                scale.uniform_(0.2, 0.5)
        if fresh:
            model(torch.rand(IMAGES_FOR_STATISTICS, *shape))
    model.eval()


def _step(model: nn.Module) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """One step of PGD that returns its gradient and its loss as well."""

    def attack_step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_adv = x_adv.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x_adv), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        return _update(x_adv.detach(), x, gradient), gradient, loss.detach()

    return attack_step


def _update(x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    return torch.clamp(x + (x_adv + STEP_SIZE * gradient.sign() - x).clamp(-EPS, EPS), 0, 1)


def _compile(
    request: Request, model: nn.Module, args: Sequence[Tensor], dtype: torch.dtype | None, settings: Settings
) -> tuple[Callable[..., Any], list[str | int]]:
    """The compiled step or model, and what its inputs are: names of weights, or positions of arguments."""
    mode, executor = FakeTensorMode(), Executor(settings)
    fake = without_memory(model, mode, "cuda")
    names = {id(one): name for name, one in (*fake.named_parameters(), *fake.named_buffers())}
    found: list[tuple[Callable[..., Any], list[str | int]]] = []

    def compile_one(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        inputs: list[str | int] = []
        for node in gm.graph.find_nodes(op="placeholder"):
            name = names.get(id(node.meta["grapharg"].example))
            argument = _ARGUMENT.search(dynamo.source_name(node))
            if name is None and argument is None:
                raise GradpruneError(f"{request.target} reads {dynamo.source_name(node)}, which is no weight of it")
            inputs.append(name if name is not None else int(argument[1]) if argument else 0)
        options = Options(disable=request.disable, exact_order=request.exact_order, strict=True, check="never")
        compiled = compile_graph(gm, examples, options, [executor], inner_compile=executor)
        found.append((compiled, inputs))
        return compiled

    computes = in_autocast(fake, "cuda", dtype)
    with mode, not_measuring(assumed=request.assume_faster):
        copies = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda") for one in args]
        if request.form == "model":
            call_compiled(computes, (copies[0].requires_grad_(True),), compile_one, backward=True)
        else:
            call_compiled(_step(computes), copies, compile_one, flags=tuple(dynamo.TRACED_FLAGS))
    if len(found) != 1:
        raise GradpruneError(f"{request.target} is not one graph but {len(found)}: what breaks it has to go")
    return found[0]


def _run(
    form: str, compiled: Callable[..., Any], inputs: Sequence[str | int], given: list[Any], args: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The iterate, the gradient and the loss of one step."""
    x_adv, x, y = args
    if form == "step":
        with executing(), torch.no_grad():
            iterate, gradient, loss = compiled(*given)
        return iterate, gradient, loss
    leaf = x_adv.detach().clone().requires_grad_(True)
    with executing():
        (logits,) = compiled(*(leaf if one == 0 else value for one, value in zip(inputs, given, strict=True)))
        loss = F.cross_entropy(logits, y)
        loss.backward()
    assert leaf.grad is not None
    return _update(x_adv, x, leaf.grad), leaf.grad, loss.detach()


def _compare(
    found: tuple[Tensor, Tensor, Tensor], model: nn.Module, dtype: torch.dtype | None, args: Sequence[Tensor]
) -> StepOutcome:
    x_adv, x, y = args
    iterate, exact, loss = _step(copy.deepcopy(model).double())(x_adv.double(), x.double(), y)
    _, eager, _ = _step(in_autocast(model, "cpu", dtype))(x_adv, x, y)
    largest = exact.abs().flatten(1).amax(1).view(-1, *[1] * (exact.dim() - 1))
    usable = (exact.abs() > USABLE * largest) & ((eager - exact).abs() < AGREED * exact.abs())
    differs = (found[0].double() - iterate).abs() > 1e-5
    return StepOutcome(
        *(_distance(found[1], exact), _distance(eager, exact)),
        *(_median(found[1], exact), _median(eager, exact)),
        differing=int((differs & usable).sum()),
        usable=int(usable.sum()),
        loss=abs(found[2].item() - loss.item()),
    )


def _distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _median(value: Tensor, exact: Tensor) -> float:
    errors = (value.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return float(errors.median())
