from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import interpreted, step_by_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_testing import apply, aten, captured
from torch import Tensor, nn

from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.passes.narrow_outputs import NarrowOutputs
from gradprune.passes.narrow_rows import ATTENTION, ATTENTION_BACKWARD, NarrowRows, Place, Row
from gradprune.passes.select_outputs import SelectOutputs

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 8, 2


class Block(nn.Module):
    """A transformer's block, layer norm first."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        x = x + self.project(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor], depth: int = 2, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block(causal) for _ in range(depth)))
        self.norm, self.head, self.read = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4), read
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.norm(self.blocks(x))))


def graph_of(model: nn.Module, form: str = "step") -> StepGraph:
    """The graph that the pass is given."""
    torch.manual_seed(1)
    x, y = torch.rand(BATCH, TOKENS, WIDTH), torch.tensor([1, 3])
    if form == "step":
        graph = captured(step_by_backward(model, F.cross_entropy), x + 0.01, x, y)
    else:
        graph = captured(model, x.requires_grad_(True))
    for before in (SelectOutputs(), NarrowOutputs()):
        apply(before, graph)
    return graph


def rows_of_products(graph: StepGraph) -> list[int]:
    """How many rows each matrix product computes, in their order."""
    return [tensor_of(node).shape[0] for node in graph.calls() if node.target in (aten.mm.default, aten.addmm.default)]


def queries(graph: StepGraph) -> list[int]:
    """For how many queries each attention, and each backward pass of one, is computed."""
    return [
        tensor_of(node.args[target is ATTENTION_BACKWARD]).shape[2]
        for target in (ATTENTION, ATTENTION_BACKWARD)
        for node in graph.calls()
        if node.target is target
    ]


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x: x[:, 0],
    "third": lambda x: x[:, 2],
    "last": lambda x: x[:, -1],
    "through a copy": lambda x: x[:, 0].clone(),
    "slice of one": lambda x: x[:, 1:2].flatten(1),
}


@pytest.mark.parametrize("form", ["step", "model"])
@pytest.mark.parametrize("read", READS)
def test_last_block_computes_the_token_that_is_read(read: str, form: str):
    graph = graph_of(Transformer(READS[read]), form)
    full = BATCH * TOKENS
    assert set(rows_of_products(graph)) == {full, BATCH}
    applied = apply(NarrowRows(), graph)
    # Forward: a whole block, queries, keys and values of the second, the rest of it, the head; backward the same.
    assert rows_of_products(graph) == [full] * 5 + [BATCH] * 4 + [BATCH] * 4 + [full] * 5
    assert queries(graph) == [TOKENS, 1, 1, TOKENS]
    assert {change.reason for change in applied.result.narrowed} == {"only one row of it is read, or is not zero"}
    assert len(applied.result.narrowed) == 8


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.mean(1),
        lambda x: x[:, 0] + x[:, 1],
        lambda x: x[:, :2].mean(1),
        lambda x: x[:, 0] + x.mean(1),
    ],
    ids=["mean", "two tokens", "slice of two", "token and mean"],
)
def test_what_reads_more_stays(read: Callable[[Tensor], Tensor]):
    graph = graph_of(Transformer(read))
    assert not apply(NarrowRows(), graph).changed


def test_causal_attention_stays():
    graph = graph_of(Transformer(READS["last"], causal=True))
    apply(NarrowRows(), graph)
    assert rows_of_products(graph)[5:9] == [BATCH] * 4
    assert queries(graph) == [TOKENS] * 4


def test_token_whose_position_is_data():
    def read(x: Tensor) -> Tensor:
        return x.gather(1, torch.zeros(len(x), 1, WIDTH, dtype=torch.long))[:, 0]

    assert not apply(NarrowRows(), graph_of(Transformer(read))).changed


def test_images_and_labels_that_are_selected():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[:, 0])

    assert not apply(NarrowRows(), graph_of(Net())).changed


def test_symbolic_shapes_stay():
    model = Transformer(READS["first"])
    x, y = torch.rand(BATCH, TOKENS, WIDTH), torch.tensor([1, 3])
    graph = captured(step_by_backward(model, F.cross_entropy), x + 0.01, x, y, dynamic=True)
    before = str(graph.graph)
    assert not NarrowRows().run(graph).changed
    assert str(graph.graph) == before


def test_symbolic_batch_stays_one():
    import gradprune

    model = Transformer(READS["first"])
    step = gradprune.compile(step_by_backward(model, lambda logits, y: F.cross_entropy(logits, y[:, 0])), strict=True)
    with interpreted(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5):
            x, y = torch.rand(batch, TOKENS, WIDTH), torch.ones(batch, 2, dtype=torch.long)
            for tensor in (x, y):
                torch._dynamo.mark_dynamic(tensor, 0)  # an error, should a pass fix it
            step(x, x, y)


@pytest.mark.inductor
def test_compiled_step():
    import gradprune

    model = Transformer(READS["first"])
    torch.manual_seed(1)
    x, y = torch.rand(BATCH, TOKENS, WIDTH), torch.tensor([1, 3])
    step = step_by_backward(model, F.cross_entropy)
    expected = step(x + 0.01, x, y)
    report = gradprune.explain(step, x + 0.01, x, y)
    assert next(record for record in report.passes if record.name == "narrow-rows").result.narrowed
    actual = gradprune.compile(step, strict=True)(x + 0.01, x, y)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


# --- Rows in shapes ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_row_is_the_same_in_every_shape(shape: list[int], data: st.DataObject):
    axis = data.draw(st.integers(0, len(shape) - 1))
    shape[axis] = size = data.draw(st.integers(2, 4))
    index = data.draw(st.integers(0, size - 1))
    row = Place(axis, 1, size, 1, index).row(shape, axis)
    assert row == Row(math.prod(shape[:axis]), size, math.prod(shape[axis + 1 :]), index)
    values = torch.arange(math.prod(shape)).view(shape)
    wanted = values.select(axis, index).flatten()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(shape) - 1)))) if len(shape) > 1 else []
    merged = [math.prod(shape[a:b]) for a, b in zip([0, *cuts], [*cuts, len(shape)], strict=True)]
    place = row.place(merged)
    assert place is not None  # within one dimension, whichever are flattened
    apart = values.view(place.apart(merged))
    assert torch.equal(apart.select(place.axis + 1, index).flatten(), wanted)
    assert math.prod(place.alone(merged)) == len(wanted)
    assert place.row(merged, place.axis) == row


def test_rows_that_are_cut():
    row = Row(2, 6, 4, 1)
    assert row.place([2, 6, 4]) == Place(1, 1, 6, 1, 1)
    assert row.place([12, 4]) == Place(0, 2, 6, 1, 1)
    assert row.place([2, 24]) == Place(1, 1, 6, 4, 1)
    assert row.place([2, 3, 2, 4]) is None  # its rows lie in two dimensions
    assert row.place([3, 4, 4]) is None
    assert row.place([2, 6, 5]) is None
