"""What a step computes once per attack is never stale, by whichever route the weights change.

Every route goes through the same check: a running attack uses values that were computed before the change, the weights
change enough for the input gradient to become another one, and the next step must give what eager gives with the
weights as they are then. That the check can fail is a test of its own, which suspends the tracking of changes.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState, Step, interpreted, relative_error, step_by_autograd_grad, step_by_backward
from tiny import network
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import gradprune
from gradprune.compiler.hoisted_step import HoistedStep, _steps, one_attack

TOLERANCE = 1e-4
"""Of a gradient in float32, relative to its largest element."""

CHANGE = 0.05
"""How much a change of the weights changes the gradient at least, relative as well."""

STRICT = {"strict": True, "verify": True}

Change = Callable[["Network"], None]
When = Literal["within an attack", "between attacks"]


class Network(nn.Module):
    """Convolution, batch norm, ReLU, a strided convolution and a linear layer, for 8x8 images in three channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(128, 5)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.running_mean)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.last(F.relu(self.norm(self.conv(x))))).flatten(1))


def images(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The start of an attack, the clean images and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 8, 8, generator=generator)
    return x + 0.01 * torch.rand(x.shape, generator=generator), x, torch.tensor([seed % 5, 3])


def attack_step(model: nn.Module) -> Step:
    return step_by_autograd_grad(model, F.cross_entropy)


def refreshes() -> int:
    """How often the prologues of this file's steps have run so far."""
    _known.update(_steps)
    return sum(step.refreshes for step in _known)


_known: set[HoistedStep] = set()
"""Holds on to the steps, lest the sum becomes smaller when one is collected."""


class Subject:
    """A compiled step, and the eager step on the very same model to compare it with."""

    def __init__(self, model: nn.Module, make: Callable[[Any], Callable[..., Any]] = attack_step, **options: Any):
        self.model = model
        self.step = torch.compile(make(model), backend="gradprune", options={**STRICT, **options})
        self.eager = make(model)

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Step and compare with eager; returns what the step returned."""
        expected = self.eager(*arguments)
        actual = self.step(*arguments)
        assert relative_error(actual[1], expected[1]) < TOLERANCE, "the gradient is not that of the weights as they are"
        return actual

    def reuses(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Step as above, and have the prologue rest."""
        before = refreshes()
        actual = self(*arguments)
        assert refreshes() == before, "the prologue ran again within an attack"
        return actual


def check(subject: Subject, change: Change, when: When, after: Callable[[], None] = lambda: None) -> None:
    """The first step after a change of the weights gives what eager gives, and so does the next one.

    Args:
        subject: What is checked.
        change: Changes weights of the model.
        when: In the middle of an attack, or after it.
        after: Follows the change.
    """
    x_adv, x, y = images()
    start = x_adv.clone()
    x_adv, _ = subject(x_adv, x, y)
    x_adv, _ = subject.reuses(x_adv, x, y)
    if when == "between attacks":
        x_adv = start
    before = subject.eager(x_adv, x, y)[1]
    change(subject.model)
    after()
    assert relative_error(subject.eager(x_adv, x, y)[1], before) > CHANGE, "the change is too small to be seen"
    x_adv, _ = subject(x_adv, x, y)
    subject(x_adv, x, y)


# --- Fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def independent(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let what the tests of ``compiled`` share stay compiled; everything else is forgotten, as in other files."""
    torch.manual_seed(0)
    # A step that were compiled too often would run as eager, and be right.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    if "compiled" not in request.fixturenames:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[Subject]:
    yield Subject(Network())
    torch._dynamo.reset()


@pytest.fixture
def compiled(compiled_once: Subject) -> Iterator[Subject]:
    """A step that Inductor compiled, with the weights that it was compiled with."""
    compiled_once.step(*images())
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield compiled_once
    restore(compiled_once.model)


def restore(model: nn.Module) -> None:
    model.load_state_dict(Network().state_dict())
    model.requires_grad_(True).eval().zero_grad()


@pytest.fixture
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and steps use what they have computed once for ever."""

    def suspend() -> None:
        monkeypatch.setattr(HoistedStep, "_continues_attack", lambda self, inputs: self._values is not None)
        monkeypatch.setattr(HoistedStep, "_are_unchanged", lambda self, weights: True)

    return suspend


@pytest.fixture
def no_code() -> Iterator[None]:
    with interpreted():
        yield


# --- Routes -----------------------------------------------------------------------------------------------------------


def by_optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Change:
    def change(model: Network) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = kind(model.parameters(), lr=0.2, **options)
        optimizer.step()
        optimizer.zero_grad()

    return change


class DataSGD(torch.optim.Optimizer):
    """An optimizer as they were written when there was no ``no_grad``."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-group["lr"])


def in_place(model: Network) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def through_data(model: Network) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def in_inference_mode(model: Network) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def by_foreach(model: Network) -> None:
    torch._foreach_mul_([parameter.detach() for parameter in model.parameters()], 1.5)


def by_initialization(model: Network) -> None:
    model.conv.reset_parameters()
    nn.init.normal_(model.last.weight, std=0.2)


def by_view(model: Network) -> None:
    with torch.no_grad():
        model.conv.weight[1:5].zero_()
        model.last.weight.view(-1)[::2].mul_(-1)


def by_state_dict(model: Network) -> None:
    model.load_state_dict(Network(seed=7).state_dict())


def by_assigned_state_dict(model: Network) -> None:
    model.load_state_dict(Network(seed=7).state_dict(), assign=True)


def by_new_data(model: Network) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def by_vector(model: Network) -> None:
    size = sum(parameter.numel() for parameter in model.parameters())
    vector_to_parameters(0.2 * torch.randn(size), model.parameters())


def by_swapped_data(model: Network) -> None:
    other = Network(seed=7)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        one.data, two.data = two.data, one.data


def by_swapped_values(model: Network) -> None:
    other = Network(seed=7)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(other.state_dict())
    other.load_state_dict(kept)


def by_swapped_tensors(model: Network) -> None:
    for one, two in zip(model.parameters(), Network(seed=7).parameters(), strict=True):
        torch.utils.swap_tensors(one, two)


def by_new_parameter(model: Network) -> None:
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 1.5)
    model.last.weight = nn.Parameter(torch.randn_like(model.last.weight))


def by_parameter_at_the_same_place(model: Network) -> None:
    """The old one is gone when the new one is made, so that the new one may take its place in memory."""
    for layer in (model.conv, model.last):
        shape = layer.weight.shape
        layer.weight = None
        layer.weight = nn.Parameter(0.3 * torch.randn(shape))


def by_new_buffer(model: Network) -> None:
    model.norm.running_mean = model.norm.running_mean + 1
    model.norm.register_buffer("running_var", model.norm.running_var * 4)


def by_buffer_in_place(model: Network) -> None:
    model.norm.running_mean.add_(1)
    model.norm.running_var.mul_(4)


def by_data_of_buffers(model: Network) -> None:
    model.norm.running_mean.data.add_(1)
    model.norm.running_var.data.mul_(4)


def by_new_statistics(model: Network) -> None:
    model.norm.reset_running_stats()


def by_new_linear(model: Network) -> None:
    model.last = Network(seed=7).last
    model.fc = nn.Linear(128, 5)


def by_new_norm(model: Network) -> None:
    model.norm = Network(seed=7).norm


def by_double(model: Network) -> None:
    model.double()
    in_place(model)
    model.float()


def by_channels_last(model: Network) -> None:
    model.to(memory_format=torch.channels_last)
    in_place(model)
    model.to(memory_format=torch.contiguous_format)


def by_average(**options: Any) -> Change:
    """The attacked model is the average of one that is trained."""

    def change(model: Network) -> None:
        averaged = AveragedModel(model, **options)
        averaged.module = model
        averaged.n_averaged += 1
        averaged.update_parameters(Network(seed=7))

    return change


def by_first_average(model: Network) -> None:
    averaged = AveragedModel(model)
    averaged.module = model
    averaged.update_parameters(Network(seed=7))


def by_swapped_average(model: Network) -> None:
    """As trainers do that evaluate with averaged weights."""
    averaged = AveragedModel(Network(seed=7), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    averaged.update_parameters(Network(seed=8))
    with torch.no_grad():
        for parameter, average in zip(model.parameters(), averaged.parameters(), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


def by_update_bn(model: Network) -> None:
    update_bn([3 * torch.rand(4, 3, 8, 8) for _ in range(2)], model)


def by_forward_in_training(model: Network) -> None:
    """Running statistics are written by the kernel of batch norm, which no operator's schema says."""
    model.train()
    model(30 * torch.rand(4, 3, 8, 8))
    model.eval()


def by_distributed_copy(model: Network) -> None:
    """What ``DistributedDataParallel`` does to buffers before a forward pass, and to all weights when it is built."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        through_data(model)  # the values that another process sends, of which nothing is noticed before the copy
        tensors = [tensor.detach() for tensor in (*model.parameters(), *model.norm.buffers())]
        distributed._broadcast_coalesced(distributed.group.WORLD, tensors, 1 << 20, 0)
    finally:
        distributed.destroy_process_group()


NOTICED: dict[str, Change] = {
    "SGD for loop": by_optimizer(torch.optim.SGD, foreach=False),
    "SGD foreach": by_optimizer(torch.optim.SGD, foreach=True, momentum=0.9),
    "SGD fused": by_optimizer(torch.optim.SGD, fused=True),
    "Adam for loop": by_optimizer(torch.optim.Adam, foreach=False),
    "Adam foreach": by_optimizer(torch.optim.Adam, foreach=True),
    "Adam fused": by_optimizer(torch.optim.Adam, fused=True),
    "optimizer on data": by_optimizer(DataSGD),
    "in place": in_place,
    "in place in inference mode": in_inference_mode,
    "foreach on detached": by_foreach,
    "initialization": by_initialization,
    "view written": by_view,
    "load_state_dict": by_state_dict,
    "load_state_dict assign": by_assigned_state_dict,
    "data assigned": by_new_data,
    "data swapped": by_swapped_data,
    "values swapped": by_swapped_values,
    "swap_tensors": by_swapped_tensors,
    "vector_to_parameters": by_vector,
    "parameter assigned": by_new_parameter,
    "parameter made after deletion": by_parameter_at_the_same_place,
    "buffer assigned": by_new_buffer,
    "buffer in place": by_buffer_in_place,
    "data of buffers": by_data_of_buffers,
    "reset_running_stats": by_new_statistics,
    "layers replaced": by_new_linear,
    "norm replaced": by_new_norm,
    "double and back": by_double,
    "channels last and back": by_channels_last,
    "average": by_average(),
    "moving average": by_average(multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "moving average with buffers": by_average(multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "first average": by_first_average,
    "average swapped in": by_swapped_average,
    "update_bn": by_update_bn,
    "forward pass in training mode": by_forward_in_training,
    "DDP copy": by_distributed_copy,
}
"""Changes that the next step notices, whenever they happen."""


@pytest.mark.parametrize("when", ["within an attack", "between attacks"])
@pytest.mark.parametrize("route", NOTICED)
def test_change_is_noticed(compiled: Subject, route: str, when: When):
    check(compiled, NOTICED[route], when)


# --- Writes that torch cannot see -------------------------------------------------------------------------------------


def through_numpy(model: Network) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[:] *= np.float32(1.5)


def through_storage(model: Network) -> None:
    flipped = model.last.weight.detach().flip(0).contiguous()
    model.last.weight.untyped_storage().copy_(flipped.untyped_storage())


def update_through_data(model: Network) -> None:
    """A hand-written optimizer step of old, when there was no ``no_grad``."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=-0.2)


UNSEEN: dict[str, Change] = {
    "data": through_data,
    "numpy": through_numpy,
    "storage": through_storage,
    "update of data": update_through_data,
}
"""Changes that are noticed between attacks, and within one after ``invalidate``."""


@pytest.mark.parametrize("route", UNSEEN)
def test_unseen_change_between_attacks(compiled: Subject, route: str):
    check(compiled, UNSEEN[route], "between attacks")


@pytest.mark.parametrize("modules", ["model", "layers", "all"])
@pytest.mark.parametrize("route", UNSEEN)
def test_unseen_change_and_invalidate(compiled: Subject, route: str, modules: str):
    changed = {"model": [compiled.model], "layers": [compiled.model.norm, compiled.model.last], "all": []}[modules]
    check(compiled, UNSEEN[route], "within an attack", after=lambda: gradprune.invalidate(*changed))


def test_invalidate_concerns_the_steps_that_read_the_modules(compiled: Subject, monkeypatch: pytest.MonkeyPatch):
    """Other steps may belong to attacks whose weights are as they were."""
    forgetful: list[HoistedStep] = []
    with interpreted(), torch._dynamo.config.patch(error_on_recompile=False):
        # Written in another way, for what is compiled of one function serves all networks of a kind.
        other = Subject(Network(), lambda model: step_by_backward(model, F.cross_entropy))
        other.step(*images())
    compiled(*images())
    monkeypatch.setattr(HoistedStep, "forget", lambda step: forgetful.append(step))
    gradprune.invalidate(Network())
    assert forgetful == []
    gradprune.invalidate(other.model)
    assert len(forgetful) == 1
    gradprune.invalidate(compiled.model.last)
    assert len(set(forgetful)) == 2
    gradprune.invalidate(compiled.model, other.model)
    assert len(set(forgetful)) == 2
    gradprune.invalidate()
    assert set(forgetful) == set(_steps)


def test_invalidate_takes_modules():
    with pytest.raises(TypeError, match=r"nn\.Modules whose weights changed, not Tensor"):
        gradprune.invalidate(torch.zeros(1))  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_code")
def test_always_refresh():
    subject = Subject(Network(), always_refresh=True)
    x_adv, x, y = images()
    for change in UNSEEN.values():
        x_adv, _ = subject(x_adv, x, y)
        before = subject.eager(x_adv, x, y)[1]
        change(subject.model)
        assert relative_error(subject.eager(x_adv, x, y)[1], before) > CHANGE
        x_adv, _ = subject(x_adv, x, y)


# --- The check itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["within an attack", "between attacks"])
@pytest.mark.parametrize("route", [*NOTICED, *UNSEEN])
def test_stale_values_would_show(compiled: Subject, route: str, when: When, no_tracking: Callable[[], None]):
    compiled(*images())
    no_tracking()
    with pytest.raises(AssertionError, match="not that of the weights as they are"):
        check(compiled, {**NOTICED, **UNSEEN}[route], when)


# --- Addresses that are used again ------------------------------------------------------------------------------------


def placed(values: Tensor, memory: Tensor) -> Tensor:
    """A new tensor with these values at the address of ``memory``, as an allocator gives freed memory out again."""
    memory.copy_(values)
    return torch.from_numpy(memory.numpy())


@pytest.mark.parametrize("kind", ["data", "parameter"])
def test_address_of_a_weight_is_used_again(compiled: Subject, kind: str):
    layer = compiled.model.last
    memory = torch.empty_like(layer.weight)
    old = layer.weight.detach().clone()
    layer.weight.data = placed(old, memory)

    def change(model: Network) -> None:
        if kind == "data":
            layer.weight.data = placed(old.flip(0), memory)
        else:
            layer.weight = None
            gc.collect()
            layer.weight = nn.Parameter(placed(old.flip(0), memory))
        assert layer.weight.data_ptr() == memory.data_ptr()

    check(compiled, change, "within an attack")


def test_address_of_a_result_is_used_again(compiled: Subject):
    """The next attack starts in memory that the result of the last one has left, and is another attack all the same."""
    for _ in range(50):
        start, x, y = images()
        address = compiled(start, x, y)[0].data_ptr()
        candidates = [start.clone() for _ in range(20)]
        same = [candidate for candidate in candidates if candidate.data_ptr() == address]
        if same:
            through_data(compiled.model)
            compiled(same[0], x, y)
            return
    pytest.skip("this allocator does not give memory out again")


# --- Perturbed and restored weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["in place", "data and invalidate"])
def test_perturbed_and_restored_within_an_attack(compiled: Subject, way: str):
    """Adversarial weight perturbation."""
    x_adv, x, y = images()
    offsets = [0.3 * torch.randn_like(parameter) for parameter in compiled.model.parameters()]
    x_adv, plain = compiled(x_adv, x, y)
    for sign in (1, -1, 1, -1):
        x_adv, _ = compiled.reuses(x_adv, x, y)
        before = compiled.eager(x_adv, x, y)[1]
        for parameter, offset in zip(compiled.model.parameters(), offsets, strict=True):
            if way == "in place":
                with torch.no_grad():
                    parameter.add_(offset, alpha=sign)
            else:
                parameter.data.add_(offset, alpha=sign)
        if way != "in place":
            gradprune.invalidate(compiled.model)
        assert relative_error(compiled.eager(x_adv, x, y)[1], before) > CHANGE
        x_adv, _ = compiled(x_adv, x, y)
    assert relative_error(compiled(*images())[1], plain) < TOLERANCE


def test_perturbed_and_restored_through_data_between_attacks(compiled: Subject):
    offsets = [0.3 * torch.randn_like(parameter) for parameter in compiled.model.parameters()]
    gradients = []
    for sign in (1, -1, 1, -1):
        x_adv, x, y = images()
        x_adv, gradient = compiled(x_adv, x, y)
        compiled.reuses(x_adv, x, y)
        gradients.append(gradient)
        for parameter, offset in zip(compiled.model.parameters(), offsets, strict=True):
            parameter.data.add_(offset, alpha=sign)
    assert relative_error(gradients[2], gradients[0]) < TOLERANCE
    assert relative_error(gradients[1], gradients[0]) > CHANGE


# --- Attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [in_place, through_data], ids=["in place", "data"])
def test_prologue_runs_once_per_attack(compiled: Subject, change: Change):
    for attack in range(3):
        change(compiled.model)
        before = refreshes()
        x_adv, x, y = images(attack)
        for _ in range(5):
            x_adv, _ = compiled(x_adv, x, y)
            assert refreshes() == before + 1


def test_prologue_runs_at_most_once_per_attack_on_weights_as_they_were(compiled: Subject):
    counts = [refreshes()]
    for attack in range(3):
        x_adv, x, y = images(attack)
        x_adv, _ = compiled(x_adv, x, y)
        compiled.reuses(x_adv, x, y)
        counts.append(refreshes())
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(counts))


@pytest.mark.parametrize("when", ["within an attack", "between attacks"])
@pytest.mark.parametrize("name", [name for name in Network().state_dict() if name != "norm.num_batches_tracked"])
def test_every_weight_counts(compiled: Subject, name: str, when: When):
    """One element of one weight is enough, the others being as they were."""

    def change(model: Network) -> None:
        weight = model.state_dict()[name]  # shares memory and version counter
        weight = weight if when == "within an attack" else weight.data
        weight.view(-1)[-1] += 30

    check(compiled, change, when)


def test_iterate_may_be_a_view_of_the_result(compiled: Subject):
    """Whatever the loop does around the step: the memory is that of the result."""
    x_adv, x, y = images()
    x_adv, _ = compiled(x_adv, x, y)
    x_adv, _ = compiled.reuses(x_adv.view(2, 3, 64).view_as(x), x, y)
    x_adv, _ = compiled.reuses(x_adv.detach().clamp_(0, 1), x, y)


@pytest.mark.parametrize("change", [in_place, through_data], ids=["in place", "data"])
def test_interleaved_attacks(compiled: Subject, change: Change):
    """Two attacks take turns, and a third one begins in between."""
    (one, x_one, y_one), (two, x_two, y_two) = images(1), images(2)
    for _ in range(3):
        one, _ = compiled(one, x_one, y_one)
        two, _ = compiled(two, x_two, y_two)
        compiled(*images(3))
        change(compiled.model)
        one, _ = compiled(one, x_one, y_one)
        one, _ = compiled.reuses(one, x_one, y_one)
        change(compiled.model)
        two, _ = compiled(two, x_two, y_two)
        restore(compiled.model)


@pytest.mark.parametrize("change", [in_place, through_data], ids=["in place", "data"])
def test_alternating_batches(compiled: Subject, change: Change):
    batches = [images(1), images(2)]
    for attack in range(4):
        x_adv, x, y = batches[attack % 2]
        for _ in range(3):
            x_adv, _ = compiled(x_adv, x, y)
        change(compiled.model)


def test_nothing_of_model_and_optimizer_is_touched(compiled: Subject):
    model = compiled.model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    model.fc.bias.grad = None
    state = ModelState.of(model)
    versions = [tensor._version for tensor in state.tensors.values()]
    moments = copy.deepcopy(optimizer.state_dict())
    for attack in range(2):
        x_adv, x, y = images(attack)
        for _ in range(3):
            x_adv, _ = compiled(x_adv, x, y)
    state.assert_untouched(model)
    assert [tensor._version for tensor in state.tensors.values()] == versions
    torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)


def test_results_are_not_written_by_later_steps(compiled: Subject):
    x_adv, x, y = images()
    kept = []
    for _ in range(4):
        x_adv, gradient = compiled(x_adv, x, y)
        kept.append((x_adv, x_adv.clone(), gradient, gradient.clone()))
        in_place(compiled.model)
    assert all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in kept)


@pytest.mark.usefixtures("no_code")
def test_aliased_first_step():
    """An attack without random start calls ``step(x, x, y)`` first, which is a graph of its own."""
    subject = Subject(Network())
    for change in (in_place, through_data, by_new_data, in_place):
        _, x, y = images()
        x_adv, _ = subject(x, x, y)
        in_place(subject.model)
        for _ in range(2):
            x_adv, _ = subject(x_adv, x, y)
        subject.reuses(x_adv, x, y)
        change(subject.model)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("way", ["optimizer", "data and invalidate"])
def test_perturbation_that_goes_on_to_the_next_batch(way: str):
    """Free adversarial training: to the step, all of training is one attack."""

    def make(model: nn.Module) -> Callable[..., Any]:
        def step(delta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            delta = delta.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
            return (delta.detach() + 0.01 * gradient.sign()).clamp(-0.03, 0.03), gradient

        return step

    subject = Subject(Network(), make)
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=0.1, momentum=0.9)
    delta = torch.zeros(2, 3, 8, 8)
    for batch in range(3):
        _, x, y = images(batch)
        for _ in range(2):
            delta, _ = subject(delta, x, y)
            delta, _ = subject.reuses(delta, x, y)
            if way == "optimizer":
                optimizer.zero_grad()
                F.cross_entropy(subject.model(x + delta), y).backward()
                optimizer.step()
            else:
                update_through_data(subject.model)
                gradprune.invalidate(subject.model)


@pytest.mark.usefixtures("no_code")
def test_models_given_as_arguments():
    """One compiled step for several models of a kind, as an attack on an ensemble calls it."""

    def make(_: nn.Module) -> Callable[..., Any]:
        def step(x_adv: Tensor, x: Tensor, y: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
            return attack_step(model)(x_adv, x, y)

        return step

    one, two = Network(seed=7), Network(seed=8)
    subject = Subject(one, make)
    x_adv, x, y = images()
    for _ in range(3):
        for model in (one, two, two):
            x_adv, _ = subject(x_adv, x, y, model)
    in_place(two)
    x_adv, _ = subject(x_adv, x, y, two)
    x_adv, _ = subject(x_adv, x, y, one)


# --- Failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("part", ["prologue", "step"])
@pytest.mark.parametrize("when", ["within an attack", "between attacks"])
def test_nothing_stale_is_left_by_a_failure(part: str, when: When, monkeypatch: pytest.MonkeyPatch):
    existing = set(_steps)
    subject = Subject(Network())
    subject(*images())
    (step,) = set(_steps) - existing

    def fail(*arguments: Any) -> None:
        raise MemoryError("out of memory")

    def failing(model: Network) -> None:
        in_place(model)
        with monkeypatch.context() as patch:
            patch.setattr(*((step._prologue, "run") if part == "prologue" else (step, "_step")), fail)
            with pytest.raises(MemoryError):
                subject.step(*arguments)
        through_data(model)
        if part == "step":  # the prologue was through by then
            gradprune.invalidate(model)

    for _ in range(2):
        x_adv, x, y = images()
        x_adv, _ = subject(x_adv, x, y)
        arguments = (x_adv if when == "within an attack" else images()[0], x, y)
        check_after_failure(subject, failing, arguments)


def check_after_failure(subject: Subject, failing: Change, arguments: tuple[Tensor, ...]) -> None:
    failing(subject.model)
    x_adv, _ = subject(*arguments)
    subject.reuses(x_adv, *arguments[1:])
    restore(subject.model)


# --- Modes, types and layouts -----------------------------------------------------------------------------------------


def test_training_and_evaluation_mode():
    """In training mode the step writes the statistics, and nothing made of them is kept; later steps must see them."""
    model, twin = network(), network()
    subject, eager = Subject(model), attack_step(twin)

    def both(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        expected, actual = eager(x_adv, x, y), subject.step(x_adv, x, y)
        assert relative_error(actual[1], expected[1]) < TOLERANCE
        torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)
        torch.testing.assert_close(model[1].running_var, twin[1].running_var)
        return actual[0]

    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 3, 4, 4, generator=generator), torch.tensor([1, 3])
    x_adv = both(x + 0.01, x, y)
    for _ in range(2):
        x_adv = both(x_adv, x, y)
        before = eager(x_adv, x, y)[1]
        model.train(), twin.train()
        for _ in range(3):
            # Its result goes nowhere: the attack in evaluation mode is continued below as if nothing had been.
            both(4 * x, x, y)
        model.eval(), twin.eval()
        assert relative_error(eager(x_adv, x, y)[1], before) > CHANGE
        x_adv = both(x_adv, x, y)
    evaluation, training = gradprune.reports(subject.step)[-2:]
    folded = [change.reason for report in (evaluation, training) for change in report.narrowed]
    assert sum("folded into" in reason for reason in folded) == 1
    assert any("add" in change.operator for change in evaluation.hoisted)  # the folded bias
    assert all("convolution" in change.operator for change in training.hoisted)  # packed weights only


@pytest.mark.usefixtures("no_code")
def test_requires_grad_is_toggled():
    """With and without, the step is compiled to code of its own; each keeps values that the other does not refresh."""
    existing, subject = set(_steps), Subject(Network())
    x_adv, x, y = images()
    for step in range(6):
        subject.model.requires_grad_(step % 2 == 0)
        x_adv, _ = subject(x_adv, x, y)
        x_adv, _ = subject(x_adv, x, y)
        if step < 4:
            in_place(subject.model)
        else:
            through_data(subject.model)
            x_adv = images()[0]
    assert len(set(_steps) - existing) == 2


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    "conversions",
    [
        [{"dtype": torch.float64}, {"dtype": torch.float32}],
        [{"memory_format": torch.channels_last}, {"memory_format": torch.contiguous_format}],
    ],
    ids=["float64", "channels last"],
)
def test_converted_and_back(conversions: list[dict[str, Any]]):
    """For another type or layout the step is compiled anew; back in the first one, what it has kept is old."""
    existing, subject = set(_steps), Subject(Network())
    for change in (in_place, through_data):
        for conversion in conversions:
            x_adv, x, y = images()
            dtype = subject.model.conv.weight.dtype
            x_adv, _ = subject(x_adv.to(dtype), x.to(dtype), y)
            subject.reuses(x_adv, x.to(dtype), y)
            subject.model.to(**conversion)
            change(subject.model)
    subject(*images())
    assert len(set(_steps) - existing) == 2


# --- Weights that are not plain parameters ----------------------------------------------------------------------------


def weight_norm(model: Network) -> Network:
    for layer in (model.conv, model.last, model.fc):
        parametrizations.weight_norm(layer)
    return model


def spectral_norm(model: Network) -> Network:
    for layer in (model.conv, model.last, model.fc):
        parametrizations.spectral_norm(layer)
    return model.eval()


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm])
def test_parametrized_weights(parametrize: Callable[[Network], Network]):
    """The normalized weight is a value of weights as well; it is computed once per attack, and not once for all."""
    subject = Subject(parametrize(Network()))

    def noise(model: Network) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def noise_through_data(model: Network) -> None:
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))

    check(subject, noise, "within an attack")
    check(subject, by_optimizer(torch.optim.SGD), "within an attack")
    check(subject, noise_through_data, "between attacks")
    check(subject, noise_through_data, "within an attack", after=lambda: gradprune.invalidate(subject.model))
    assert gradprune.reports(subject.step)[-1].hoisted


@pytest.mark.usefixtures("no_code")
def test_spectral_norm_in_training_mode():
    """Every forward pass does a power iteration and stores its vectors: none of it is the same from step to step."""
    model, twin = spectral_norm(Network()).train(), spectral_norm(Network()).train()
    twin.load_state_dict(model.state_dict())
    step, eager = Subject(model).step, attack_step(twin)
    x_adv, x, y = images()
    for _ in range(4):
        expected = eager(x_adv, x, y)
        x_adv, gradient = step(x_adv, x, y)
        assert relative_error(gradient, expected[1]) < TOLERANCE
        for (name, one), two in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


class Shifted(nn.Module):
    """A network behind a shift of the images, whose logarithm is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.shift: Tensor
        with torch.inference_mode():
            self.register_buffer("shift", torch.rand(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.shift.exp())


@pytest.mark.usefixtures("no_code")
def test_weight_created_in_inference_mode():
    """It has no version counter that could tell of a change."""
    model = Shifted()
    assert model.shift.is_inference()
    subject = Subject(model)
    x = torch.rand(2, 3, 4, 4)
    x_adv, y = x + 0.01, torch.tensor([1, 3])
    for _ in range(3):
        before = subject.eager(x_adv, x, y)[1]
        with torch.inference_mode():
            model.shift.add_(0.5)
        assert relative_error(subject.eager(x_adv, x, y)[1], before) > CHANGE
        x_adv, _ = subject(x_adv, x, y)


@pytest.mark.usefixtures("no_code")
def test_noise_on_weights_is_drawn_at_every_step():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Network()

        def forward(self, x: Tensor) -> Tensor:
            weight = self.inner.conv.weight
            hidden = F.conv2d(x, F.dropout(2 * weight, 0.5, training=True) + 0.1 * torch.randn_like(weight))
            return self.inner.fc(F.pad(hidden, (1, 1, 1, 1)).flatten(1)[:, :128])

    subject = Subject(Noisy())
    start, x, y = images()
    x_adv, first = subject.step(start, x, y)
    _, second = subject.step(x_adv.copy_(start), x, y)  # goes on with the attack, from the same images
    assert relative_error(second, first) > CHANGE


# --- What a step hands out --------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Tensor], Any]] = {
    "value": lambda weight: weight * 2,
    "clone": lambda weight: (weight * 2).clone(),
    "view": lambda weight: (weight * 2).view(-1),
    "slice": lambda weight: (weight * 2)[1:],
    "transposed": lambda weight: (weight * 2).permute(1, 0, 2, 3),
    "sum with zero": lambda weight: (weight * 2) + 0,
    "tensor_split": lambda weight: (weight * 2).tensor_split(2),
    "unbind": lambda weight: (weight * 2).unbind(0),
    "split": lambda weight: (weight * 2).split(3),
    "chunk": lambda weight: (weight * 2).chunk(2),
}


@pytest.mark.parametrize(
    ("compiler", "parts"),
    [
        pytest.param("none", list(PARTS), id="interpreted"),
        pytest.param("inductor", list(PARTS), id="inductor"),
    ],
)
def test_returned_values_of_weights(compiler: str, parts: list[str], request: pytest.FixtureRequest):
    """Two steps hand out different memory, and the caller may write to it without harm to later steps."""
    if compiler == "none":
        request.getfixturevalue("no_code")

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.conv.weight * 2).tanh().flatten(1)

    def make(model: Doubled) -> Callable[..., Any]:
        inner = attack_step(model)

        def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            result: list[Tensor] = [*inner(x_adv, x, y)]
            with torch.no_grad():
                for name in parts:
                    value = PARTS[name](model.conv.weight)
                    result += value if isinstance(value, tuple) else [value]
            return tuple(result)

        return step

    subject = Subject(Doubled(), make)
    x_adv, x, y = images()
    results = [subject(x_adv, x, y)]
    for _ in range(3):
        results.append(subject(results[-1][0], x, y))
        for one, two in zip(results[-1][2:], results[-2][2:], strict=True):
            assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
        expected = subject.eager(x_adv, x, y)[2:]
        for one, two in zip(results[-1][2:], expected, strict=True):
            torch.testing.assert_close(one, two)
            one.mul_(-3)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("extra", ["nothing", "clean images", "view of clean images", "weight"])
def test_unseen_change_between_attacks_by_a_step_that_returns_an_argument(extra: str):
    """Memory that the step was given continues no attack, even if the step handed it out as well."""

    def make(model: Network) -> Callable[..., Any]:
        inner = attack_step(model)

        def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            returned = {
                "nothing": lambda: (),
                "clean images": lambda: (x,),
                "view of clean images": lambda: (x.flatten(1),),
                "weight": lambda: (model.conv.weight.detach(),),
            }
            return (*inner(x_adv, x, y), *returned[extra]())

        return step

    subject = Subject(Network(), make)
    x_adv, x, y = images()
    for _ in range(2):
        result = subject(x_adv, x, y)
        subject.reuses(result[0], x, y)
        through_data(subject.model)


# --- Models -----------------------------------------------------------------------------------------------------------


def gradient_of(model: nn.Module) -> Tensor:
    """Gradient of the loss at the start of an attack."""
    x_adv, _, y = images()
    x_adv.requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]


@pytest.fixture(scope="module")
def accelerated_once() -> Iterator[tuple[Network, nn.Module]]:
    model = Network()
    yield model, gradprune.accelerate(model, **STRICT)
    torch._dynamo.reset()


@pytest.fixture
def accelerated(accelerated_once: tuple[Network, nn.Module]) -> Iterator[tuple[Network, nn.Module]]:
    """A model, and what Inductor compiled of it with the weights that it has."""
    model, fast = accelerated_once
    gradient_of(fast)
    yield accelerated_once
    restore(model)


@pytest.mark.parametrize("route", [*NOTICED, *UNSEEN])
def test_models_compare_their_weights_at_every_call(accelerated: tuple[Network, nn.Module], route: str):
    model, fast = accelerated
    before = gradient_of(model)
    assert relative_error(gradient_of(fast), before) < TOLERANCE
    {**NOTICED, **UNSEEN}[route](model)
    expected = gradient_of(model)
    assert relative_error(expected, before) > CHANGE, "the change is too small to be seen"
    assert relative_error(gradient_of(fast), expected) < TOLERANCE


def test_prologue_of_a_model_rests_while_its_weights_are_the_same(accelerated: tuple[Network, nn.Module]):
    _, fast = accelerated
    before = refreshes()
    for _ in range(3):
        gradient_of(fast)
        with torch.no_grad():
            fast(images()[0])
    assert refreshes() - before <= 1, "of the compilation without gradients"
    with one_attack():
        gradient_of(fast)
    assert refreshes() - before <= 1


@pytest.mark.parametrize("through", ["in place", "data"])
def test_backward_passes_are_those_of_their_forward_pass(accelerated: tuple[Network, nn.Module], through: str):
    """Two forward passes are under way when the first backward pass runs, and hoisted weights have changed in between.

    Eager raises where it notices, and otherwise mixes old activations with new weights.
    """
    model, fast = accelerated
    x_adv, _, y = images()
    inputs, losses, expected = [], [], []
    for _ in range(2):
        expected.append(gradient_of(model))
        inputs.append(x_adv.clone().requires_grad_(True))
        losses.append(F.cross_entropy(fast(inputs[-1]), y))
        with torch.no_grad():
            weight = model.conv.weight if through == "in place" else model.conv.weight.data
            weight.copy_(torch.randn_like(weight))
    assert relative_error(expected[1], expected[0]) > CHANGE
    for k in (1, 0):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(losses[k], inputs[k], retain_graph=True)
            assert relative_error(gradient, expected[k]) < TOLERANCE


@pytest.mark.usefixtures("no_code")
def test_weights_of_a_model_that_are_attacked_are_not_hoisted():
    """A patch that is a parameter changes at every step."""

    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()
            self.patch = nn.Parameter(torch.zeros(1, 3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x + self.patch.tanh())

    model, x = Patched(), images()[1]
    gradprune.perturbation(model.patch)
    fast = gradprune.accelerate(model, **STRICT)
    for _ in range(3):
        found = []
        for one in (model, fast):
            model.patch.grad = None
            F.cross_entropy(one(x), images()[2]).backward()
            assert model.patch.grad is not None
            found.append(model.patch.grad)
        assert relative_error(found[1], found[0]) < TOLERANCE
        with torch.no_grad():
            model.patch -= found[0].sign()
    assert all("tanh" not in change.operator for report in gradprune.reports(fast) for change in report.hoisted)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_compiled_attack_and_compiled_training():
    """Adversarial training for three epochs compiles nothing twice, and every attack sees the weights as they are."""
    model = network(training=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    attack = torch.compile(step_by_backward(model, F.cross_entropy), backend="gradprune", options=STRICT)
    eager, train = attack_step(model), torch.compile(train_step)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.rand(2, 3, 4, 4, generator=generator), torch.tensor(labels)) for labels in ([0, 1], [2, 3])]
    graphs, losses = [], []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for x, y in batches:
                model.eval()
                x_adv, before = x + 0.01, refreshes()
                for _ in range(3):
                    expected = eager(x_adv, x, y)[1]
                    x_adv, gradient = attack(x_adv, x, y)
                    assert relative_error(gradient, expected) < TOLERANCE
                assert refreshes() == before + 1
                assert all(parameter.grad is None for parameter in model.parameters())
                model.train()
                losses.append(train(x_adv, y))
                optimizer.zero_grad()
            graphs.append(counters["stats"]["unique_graphs"])
        # Compiled code writes the weights in place as well, here in the middle of an attack.
        model.eval()
        x_adv, _ = attack(x_adv, x, y)
        before = eager(x_adv, x, y)[1]
        model.train()
        train(x_adv, y)
        optimizer.zero_grad()
        model.eval()
        expected = eager(x_adv, x, y)[1]
        assert relative_error(expected, before) > CHANGE
        assert relative_error(attack(x_adv, x, y)[1], expected) < TOLERANCE
    assert graphs[0] == graphs[1] == graphs[2]
    assert float(losses[-1]) < float(losses[0])
