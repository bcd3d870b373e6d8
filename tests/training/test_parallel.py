"""Training by two processes, with DDP and FSDP2, against training by one with batches that are twice as large."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

from gradprune.attacks import PGD
from gradprune.errors import OptionError
from gradprune.training import AdversarialTrainer, PGDTraining, parallel

SCRIPT = Path(__file__).with_name("parallel_script.py")

NAMES = ["plain", "pgd", "fast", "trades", "mart", "awp", "free"]

Ranks = list[Any]
"""What a check of the script found, by rank."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """Runs the script once; returns what each of its checks found."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, folder]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )

    @functools.cache
    def read(check: str) -> Ranks:
        files = [folder / f"{check}-{rank}.pt" for rank in (0, 1)]
        if not all(file.exists() for file in files):
            pytest.fail(f"the processes ended with {done.returncode} before {check}:\n{done.stderr[-6000:]}")
        return [torch.load(file) for file in files]

    return read


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))


def assert_agree(ranks: Ranks, reference: dict[str, Any], tolerance: float = 1e-12) -> None:
    """Both processes have the same, bitwise; and what one process has, within rounding."""
    for key in ("weights", "averages", "buffers"):
        assert_same(ranks[0][key], ranks[1][key])
        for value, expected in zip(ranks[0][key], reference[key], strict=True):
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(ranks[0]["losses"], ranks[1]["losses"])
    torch.testing.assert_close(ranks[0]["losses"], reference["losses"], rtol=tolerance, atol=tolerance)
    assert ranks[0]["correct"] + ranks[1]["correct"] == reference["correct"]


def of(ranks: Ranks, name: str) -> tuple[Ranks, dict[str, Any]]:
    """What the processes did, and what one process did."""
    return [rank[name][0] for rank in ranks], ranks[0][name][1]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(found: Callable[[str], Ranks], name: str) -> None:
    ranks, reference = of(found("objectives"), name)
    assert_agree(ranks, reference)
    assert len(ranks[0]["averages"]) == 6


@pytest.mark.parametrize("name", ["trades", "free"])
def test_two_compiled_processes_train_as_one(found: Callable[[str], Ranks], name: str) -> None:
    assert_agree(*of(found("compiled"), name))


def test_no_attack_communicates(found: Callable[[str], Ranks]) -> None:
    for rank in range(2):
        eager, compiled = found("counted")[rank], found("compiled")[rank]["collectives"]
        # One bucket of gradients, the loss, and the buffers.
        assert sorted(eager["updating"]["all"]) == ["c10d::allreduce_", "c10d::allreduce_", "c10d::broadcast_"]
        assert sorted(compiled["all"]) == ["c10d::allreduce_", "c10d::allreduce_"]
        assert eager["waiting"]["all"] == ["c10d::allreduce_"]
        assert eager["none"]["all"] == []
        for counts in (*eager.values(), compiled):
            assert counts["inner"] == counts["before"] == []


@pytest.mark.parametrize("name", ["pgd", "awp"])
def test_accumulated_batches_are_averaged_once(found: Callable[[str], Ranks], name: str) -> None:
    accumulated = [rank[0] for rank in found("accumulated")]
    assert_agree(*of(accumulated, name))


def test_accumulated_batches_equal_larger_ones(found: Callable[[str], Ranks]) -> None:
    results, larger = found("accumulated")[0]
    torch.testing.assert_close(results["pgd"][0]["weights"], larger, rtol=1e-12, atol=1e-12)


def test_buffers_are_shared_after_an_update(found: Callable[[str], Ranks]) -> None:
    first, second = found("batch_norm")
    for before, after in ((0, 1), (2, 3)):
        assert not any(torch.equal(a, b) for a, b in zip(first[before], second[before], strict=True) if a.ndim)
        assert_same(first[after], second[after])
        assert_same(first[after], first[before])
    assert len(first[0]) == 6  # three, and those of adversarial examples


def test_nan_in_one_process_stops_all(found: Callable[[str], Ranks]) -> None:
    ranks = found("not_finite")
    for rank in ranks:
        assert "the loss is nan after 0 updates" in rank["message"]
        assert rank["same"]
    assert_agree(*of(ranks, "behind"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_losses_are_scaled_alike(found: Callable[[str], Ranks], engine: str) -> None:
    first, second = (rank[engine] for rank in found("half_precision"))
    assert_same(first["weights"], second["weights"])
    assert first["skipped"]
    assert second["skipped"]
    assert first["scale"] == second["scale"] == pytest.approx(5e37)


def test_objects_reach_the_right_process(found: Callable[[str], Ranks]) -> None:
    first, second = found("objects")
    assert [value["rank"] for value in first["gathered"]] == [0, 1]
    assert first["gathered"][1]["values"].tolist() == [1, 1]
    assert second["gathered"] is None
    assert (first["scattered"], second["scattered"]) == ("first", "second")
    assert first["shared"] == second["shared"] == 10
    assert first["sum"].tolist() == second["sum"].tolist() == [2, 1]
    assert (first["first"], second["first"]) == (True, False)


# --- FSDP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd", "trades", "awp", "free", "accumulated awp"])
def test_sharded_weights_train_as_whole_ones(found: Callable[[str], Ranks], name: str) -> None:
    assert_agree(*of(found("fsdp"), name))


def test_sharded_weights_train_compiled(found: Callable[[str], Ranks]) -> None:
    ranks = found("fsdp_compiled")
    assert_agree(*of(ranks, "pgd"), tolerance=1e-4)
    assert max(ranks[0]["refreshes"]) == 3  # the attack has seen the weights of every iteration


def test_sharded_weights_are_gathered_once_before_the_attack(found: Callable[[str], Ranks]) -> None:
    ranks = found("fsdp_counted")
    for rank in ranks:
        assert rank["inner"] == []
        assert rank["before"] == ["c10d::_allgather_base_"] * 3  # two blocks, and the rest
        assert rank["all"].count("c10d::_reduce_scatter_base_") == 3
        assert rank["all"].count("c10d::broadcast_") == 1
        assert rank["equal"]
        assert rank["modes"]
        assert rank["averaged"]
    assert_same(ranks[0]["buffers"], ranks[1]["buffers"])


@pytest.mark.parametrize("target", ["ddp", "fsdp"])
@pytest.mark.parametrize("source", ["ddp", "fsdp"])
def test_states_are_the_same_for_all_engines(found: Callable[[str], Ranks], source: str, target: str) -> None:
    ranks = found("checkpoints")
    further = [rank[source, "further"] for rank in ranks]
    reference = {**further[0], "correct": sum(rank["correct"] for rank in further)}
    assert_agree([rank[source, target] for rank in ranks], reference)
    assert [rank[source, "empty"] for rank in ranks] == [False, True]
    assert ranks[0][source, "keys"] == ["0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias", "3.weight", "3.bias"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_training_goes_on_where_it_was_interrupted(found: Callable[[str], Ranks], engine: str) -> None:
    ranks = found("fitted")
    for rank in ranks:
        once, twice = rank[engine, "once"], rank[engine, "twice"]
        assert_same(once["weights"], twice["weights"])
        assert torch.equal(once["delta"], twice["delta"])
    assert_same(ranks[0][engine, "once"]["weights"], ranks[1][engine, "once"]["weights"])
    assert not torch.equal(ranks[0][engine, "once"]["delta"], ranks[1][engine, "once"]["delta"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_accuracy_is_that_of_all_processes(found: Callable[[str], Ranks], engine: str) -> None:
    first, second = found("fitted")
    assert first[engine, "accuracy"] == second[engine, "accuracy"]
    alone = zip(first["accuracy"], second["accuracy"], strict=True)
    assert first[engine, "accuracy"] == pytest.approx([(a + b) / 2 for a, b in alone])


# --- One process ------------------------------------------------------------------------------------------------------


def make(model: nn.Module, **options: Any) -> AdversarialTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return AdversarialTrainer(model, optimizer, PGDTraining(attack=PGD(steps=1)), compile=False, **options)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))


def test_one_process_never_communicates(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch.distributed was called")

    for name in ("all_reduce", "broadcast", "barrier", "gather_object", "scatter_object_list", "get_rank"):
        monkeypatch.setattr(dist, name, fail)
    one, other = make(network(), ema=0.5), make(network(), ema=0.5)
    for _ in range(2):
        one.step(torch.rand(4, 1, 2, 2), torch.arange(4) % 3)
    parallel.load_model_state(other.model, parallel.model_state(one.model))
    parallel.load_optimizer_state(other.optimizer, parallel.optimizer_state(one.optimizer))
    parallel.load_averages_state(other.model, other.averages, parallel.averages_state(one.model, one.averages))
    assert_same(list(other.model.state_dict().values()), list(one.model.state_dict().values()))
    assert_same(other.averages, one.averages)
    parallel.barrier()
    assert parallel.gather(1) == [1]
    assert parallel.scatter([2]) == 2
    assert parallel.share(3) == 3
    assert parallel.sum_counts(torch.tensor(4)) == 4
    assert parallel.is_first()


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(OptionError, match="parallel"):
        make(network(), parallel="ddp")
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    with pytest.raises(OptionError, match="SyncBatchNorm"):
        make(synchronised, batch_norm="train")


def test_wrapped_models_are_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(OptionError, match="pass the model itself"):
            make(nn.parallel.DistributedDataParallel(network()))
        with pytest.raises(OptionError, match="replica"):
            make(fully_shard(network()))
        model = network()
        distribute_module(model, init_device_mesh("cpu", (1,)))
        with pytest.raises(OptionError, match="not by fully_shard"):
            make(model)
    finally:
        dist.destroy_process_group()
