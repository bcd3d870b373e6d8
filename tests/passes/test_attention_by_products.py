"""Attention by products. Run on a CPU that is given the operators of a GPU, by pretending that it is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pass_testing import apply, captured, evaluate, find, random_arguments, run, step_of
from torch import Tensor, nn

from gradprune.emit.externals import register_attention
from gradprune.graph.step_graph import StepGraph
from gradprune.passes import attention_by_products as module
from gradprune.passes.attention_by_products import BACKWARD, FORWARD, AttentionByProducts
from gradprune.passes.narrow_outputs import NarrowOutputs
from gradprune.passes.narrow_rows import NarrowRows
from gradprune.passes.pipeline import PIPELINE
from gradprune.passes.select_outputs import SelectOutputs

aten = torch.ops.aten

BATCH, HEADS, WIDTH = 2, 2, 4

Make = Callable[[], tuple[Callable[[], object], Callable[[], object]]]


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = register_attention()

    def is_faster(what: str, make: Make, device: torch.device) -> bool:
        for kernel in make():
            kernel()
        return True

    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(module, "is_faster", is_faster)
    yield
    library._destroy()


class Attention(nn.Module):
    """A layer that reads one token of what it computes, or the mean of all."""

    def __init__(
        self, bias: str = "none", reads_one: bool = False, is_causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 8)
        self.bias, self.reads_one, self.options = bias, reads_one, (dropout, is_causal)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(samples, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        result = FORWARD(query, key, value, self._bias(samples, tokens), True, *self.options, scale=0.3)[0]
        result = self.out(result.transpose(1, 2).reshape(samples, tokens, -1)) + x
        return result[:, 0] if self.reads_one else result.mean(1)

    def _bias(self, samples: int, tokens: int) -> Tensor | None:
        if self.bias == "none":
            return None
        rows = 1 if self.bias == "keys" else tokens
        is_seen = (torch.arange(samples * rows * tokens) % 3 > 0).view(samples, 1, rows, tokens)
        is_seen[:, :, 0, :] &= self.bias != "empty"  # a query that sees no key
        is_seen[:, :, :, 0] |= self.bias != "empty"
        mask = torch.zeros(is_seen.shape).masked_fill(~is_seen, -torch.inf)
        return mask.expand(samples, HEADS, tokens, tokens)


def graph_of(model: nn.Module, tokens: int = 5) -> StepGraph:
    graph = captured(step_of(model), torch.rand(BATCH, tokens, 8))
    for step_pass in (SelectOutputs(), NarrowOutputs()):
        step_pass.run(graph)
    return graph


@pytest.mark.parametrize("tokens", [5, 8, 16])
@pytest.mark.parametrize("bias", ["none", "keys", "pairs"])
def test_equals_fused_attention(bias: str, tokens: int):
    graph = graph_of(Attention(bias), tokens)
    assert find(graph, BACKWARD)
    assert len(apply(AttentionByProducts(), graph).result.narrowed) == 1
    assert not find(graph, FORWARD)
    assert not find(graph, BACKWARD)


def test_a_query_that_sees_no_key_is_worth_nothing():
    graph = graph_of(Attention("empty"))
    run(AttentionByProducts(), graph)
    assert not find(graph, FORWARD)
    for value in evaluate(graph, random_arguments(graph)):
        assert value.isfinite().all()


def test_inference():
    model = Attention().requires_grad_(False)
    graph = captured(lambda x: model(x), torch.rand(BATCH, 5, 8))
    assert apply(AttentionByProducts(), graph).changed


def test_one_row_is_computed_alone():
    graph = graph_of(Attention(reads_one=True))
    run(AttentionByProducts(), graph)
    assert apply(NarrowRows(), graph).changed
    rows = [node.meta["val"].shape[1] for node in find(graph, aten.bmm.default)]
    assert rows.count(1) >= 3, rows


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout": 0.5}], ids=str)
def test_what_products_cannot_do_stays(options: dict[str, object]):
    graph = graph_of(Attention(**options))  # type: ignore[arg-type]
    before = str(graph.graph)
    assert not AttentionByProducts().run(graph).changed
    assert str(graph.graph) == before


def test_long_sequences_stay_fused():
    assert not apply(AttentionByProducts(), graph_of(Attention(), module.LONGEST * WIDTH + 1)).changed


def test_what_is_not_faster_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "is_faster", lambda *arguments: False)
    assert not apply(AttentionByProducts(), graph_of(Attention())).changed


def test_comes_before_rows_are_narrowed():
    names = [step.name for step in PIPELINE]
    assert names.index(AttentionByProducts.name) < names.index(NarrowRows.name)
