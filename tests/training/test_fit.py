"""Training over epochs: resumed exactly, wherever it stopped; stopped early; and nothing lost when something fails."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed
import numpy as np
import pytest
import torch
from networks import batch, loader, network, separable
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gradprune import OptionError, TrainingError
from gradprune.attacks import PGD
from gradprune.training import TRADES, AdversarialTrainer, NearPGD, Objective, PGDTraining, Plain
from gradprune.training.checkpoint import read_checkpoint

AT = PGDTraining(attack=PGD(eps=0.1, step_size=0.03, steps=2))


def trainer_of(objective: Objective = AT, lr: float = 0.1, **settings: Any) -> AdversarialTrainer:
    settings.setdefault("compile", False)
    model = network()
    return AdversarialTrainer(model, torch.optim.SGD(model.parameters(), lr, momentum=0.9), objective, **settings)


class Stop(Exception):
    """Raised in place of an interruption."""


class Recorder:
    """A watcher that keeps what it is told and stops the training behind an iteration."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.start: Any = None
        self.iterations: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.ended = 0

    def begin(self, start: Any) -> None:
        self.start = start

    def iteration(self, record: dict[str, Any]) -> None:
        self.iterations.append(record)
        if record["iteration"] == self.stop:
            raise Stop

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs.append(record)

    def end(self) -> None:
        self.ended += 1


def weights_of(trainer: AdversarialTrainer) -> list[Tensor]:
    return [value.clone() for value in trainer.model.state_dict().values()] + [*trainer.averages]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- Resumption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (AT, {"compile": True, "ema": 0.9}),
        (
            TRADES(attack=NearPGD(eps=0.1, step_size=0.03, steps=2, loss="kl")),
            {"batch_norm": "separate", "accumulate": 2},
        ),
    ],
    ids=["compiled", "separate statistics, accumulated"],
)
def test_resumed_equals_uninterrupted(objective: Objective, settings: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer_of(objective, **settings)
    history = whole.fit(loader(), 3, validation=loader(24), checkpoint_seconds=0, folder=tmp_path / "whole")
    for stop in (3, 8, 13):
        with pytest.raises(Stop):
            trainer_of(objective, **settings).fit(
                loader(),
                3,
                validation=loader(24),
                folder=tmp_path / "parts",
                checkpoint_seconds=0,
                watchers=[Recorder(stop)],
            )
        torch.rand(stop)  # a process of its own would not have the same random state either
        torch._dynamo.reset()
    parts = trainer_of(objective, **settings)
    resumed = parts.fit(loader(), 3, validation=loader(24), folder=tmp_path / "parts", checkpoint_seconds=0)
    assert same(weights_of(parts), weights_of(whole))
    assert [_without_seconds(record) for record in resumed.epochs] == [_without_seconds(r) for r in history.epochs]


def _without_seconds(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}


@pytest.mark.parametrize("kind", ["awp", "free", "fp16"])
def test_killed_at_random_moments(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = multiprocessing.get_context("forkserver")
    monkeypatch.setenv("PYTHONPATH", str(Path(killed.__file__).parent))  # the server does not get sys.path in time
    processes.set_forkserver_preload(["killed"])

    def start(folder: Path) -> Any:
        process = processes.Process(target=killed.train, args=(kind, folder))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    folder = tmp_path / "killed"
    moments = random.Random(kind)
    positions = []
    for _ in range(10):
        process = start(folder)
        first = time.monotonic()
        before = _written(folder)
        while process.is_alive() and _written(folder) == before and time.monotonic() - first < 60:
            time.sleep(0.005)  # until it has gone on from where the one before was killed
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the training ended before it was killed ten times"
        for file in folder.glob("*.pt"):
            torch.load(file, weights_only=True)
        saved = read_checkpoint(folder / "last.pt")
        positions.append((saved["iterations"], saved["progress"]["epoch"]))
    assert positions == sorted(set(positions)), "each went on from where the one before was killed"
    last = start(folder)
    last.join()
    assert last.exitcode == 0
    ends = [torch.load(place / "end.pt", weights_only=True) for place in (tmp_path / "whole", folder)]
    assert same(*ends)
    assert sorted(file.name for file in folder.iterdir()) == ["best.pt", "end.pt", "last.pt"]


def _written(folder: Path) -> int:
    """When the last checkpoint was written."""
    file = folder / "last.pt"
    return file.stat().st_mtime_ns if file.exists() else 0


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws from all the global generators, as augmentations do."""

    def __init__(self) -> None:
        self.x, self.y = separable(48)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        noise = 0.01 * random.random() + 0.01 * np.random.rand() + 0.01 * torch.rand(()).item()
        return (self.x[place] * (1 - noise)), self.y[place]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_augmentation(workers: int, tmp_path: Path) -> None:
    def make() -> DataLoader[Any]:
        generator = torch.Generator()  # one of its own is seeded as well
        return DataLoader(Augmented(), 12, shuffle=True, num_workers=workers, generator=generator)

    whole = trainer_of()
    whole.fit(make(), 2)
    with pytest.raises(Stop):
        trainer_of().fit(make(), 2, folder=tmp_path, checkpoint_seconds=0, watchers=[Recorder(6)])
    parts = trainer_of()
    recorder = Recorder()
    parts.fit(make(), 2, folder=tmp_path, watchers=[recorder])
    assert recorder.start.iteration == 5
    assert same(weights_of(parts), weights_of(whole))


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = trainer_of()
    history = first.fit(loader(), 2, folder=tmp_path)
    again, recorder = trainer_of(), Recorder()
    assert again.fit(loader(), 2, folder=tmp_path, watchers=[recorder]).epochs == history.epochs
    assert same(weights_of(again), weights_of(first))
    assert recorder.iterations == []
    longer = trainer_of()
    assert [record["epoch"] for record in longer.fit(loader(), 3, folder=tmp_path).epochs] == [1, 2, 3]


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    first, second = trainer_of(), trainer_of()
    first.fit(loader(), 1, folder=tmp_path)
    second.fit(loader(), 1, folder=tmp_path, resume=False)
    assert second.iterations == first.iterations


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_behind_a_batch(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)

    class Sender(Recorder):
        def iteration(self, record: dict[str, Any]) -> None:
            super().iteration(record)
            if record["iteration"] == 3:
                os.kill(os.getpid(), number)

    sender = Sender()
    with pytest.raises(KeyboardInterrupt, match=r"last\.pt"):
        trainer_of().fit(loader(), 2, folder=tmp_path, watchers=[sender])
    assert len(sender.iterations) == 3
    assert sender.ended == 1
    assert read_checkpoint(tmp_path / "last.pt")["iterations"] == 3
    assert signal.getsignal(number) == before


# --- Evaluation and early stopping ------------------------------------------------------------------------------------


def test_records_and_best(tmp_path: Path) -> None:
    trainer, recorder = trainer_of(ema=0.5), Recorder()
    history = trainer.fit(
        loader(), 4, validation=loader(24, shuffle=False), evaluate_every=2, folder=tmp_path, watchers=[recorder]
    )
    assert recorder.epochs == history.epochs
    assert [record["clean"] is None for record in history.epochs] == [True, False, True, False]
    assert history.best is not None
    assert history.best["robust"] == max(record["robust"] for record in history.epochs if record["robust"] is not None)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["record"] == history.best
    model = network()
    model.load_state_dict(best["model"])
    score = trainer_of().model
    score.load_state_dict(best["model"])
    other = AdversarialTrainer(score, torch.optim.SGD(score.parameters(), 0.1), AT, compile=False)
    attack = PGD(eps=0.1, step_size=0.025, steps=20, seed=0)
    assert other.evaluate(loader(24, shuffle=False), attack) == (history.best["clean"], history.best["robust"])
    means = [record["loss"] for record in recorder.iterations[:6]]
    samples = [record["samples"] for record in recorder.iterations[:6]]
    assert samples == [12] * 5 + [4]
    assert history.epochs[0]["loss"] == pytest.approx(np.average(means, weights=samples))


def test_early_stop(tmp_path: Path) -> None:
    trainer = trainer_of(lr=0.0)  # no evaluation is better than the first
    history = trainer.fit(loader(), 9, validation=loader(24), patience=2, folder=tmp_path)
    assert history.stopped_early
    assert [record["best"] for record in history.epochs] == [True, False, False]
    again = trainer_of(lr=0.0).fit(loader(), 9, validation=loader(24), patience=2, folder=tmp_path)
    assert len(again.epochs) == 3
    assert len(trainer_of(lr=0.0).fit(loader(), 4, validation=loader(24), folder=tmp_path).epochs) == 4


def test_plain_training_is_evaluated_on_clean_inputs() -> None:
    history = trainer_of(Plain()).fit(loader(), 1, validation=loader(24))
    assert history.epochs[0]["robust"] is None
    assert history.best is history.epochs[0]


def test_model_is_left_in_its_mode() -> None:
    trainer = trainer_of()
    trainer.model.eval()
    trainer.model[0].training = True
    modes = [module.training for module in trainer.model.modules()]
    trainer.fit(loader(), 1, validation=loader(24))
    assert [module.training for module in trainer.model.modules()] == modes


# --- What fails -------------------------------------------------------------------------------------------------------


def interrupted(folder: Path) -> dict[str, Any]:
    """A training that has a checkpoint of its third iteration."""
    with pytest.raises(Stop):
        trainer_of().fit(loader(), 2, folder=folder, checkpoint_seconds=0, watchers=[Recorder(4)])
    return read_checkpoint(folder / "last.pt")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _replace(path: Path) -> None:
    torch.save({"model": {}}, path)


def _make_newer(path: Path) -> None:
    torch.save({**read_checkpoint(path), "version": 99}, path)


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def _make_malicious(path: Path) -> None:
    torch.save({"format": Malicious()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "damaged or no checkpoint"),
        (_empty, "damaged or no checkpoint"),
        (_replace, "not written by this trainer"),
        (_make_newer, "version 99"),
        (_make_malicious, "damaged or no checkpoint"),
    ],
)
def test_unusable_checkpoints(
    damage: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    interrupted(tmp_path)
    damage(tmp_path / "last.pt")
    content = (tmp_path / "last.pt").read_bytes()
    trainer = trainer_of()
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match=message):
        trainer.fit(loader(), 2, folder=tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == content
    assert same(weights_of(trainer), before)
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_training(tmp_path: Path) -> None:
    interrupted(tmp_path)
    other = PGDTraining(attack=PGD(eps=0.2, step_size=0.03, steps=2))
    for trainer, arguments, message in (
        (trainer_of(other), {}, "objective was .*eps=0.1.* and is .*eps=0.2"),
        (trainer_of(lr=0.2), {}, "optimizer was .*0.1.* and is .*0.2"),
        (trainer_of(clip=1.0), {}, "clip was None and is 1.0"),
        (trainer_of(), {"seed": 1}, "seed was 0 and is 1"),
    ):
        with pytest.raises(TrainingError, match=message):
            trainer.fit(loader(), 2, folder=tmp_path, **arguments)
    with pytest.raises(TrainingError, match="batches was 6 and is 8"):
        trainer_of().fit(loader(size=8), 2, folder=tmp_path)


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    interrupted(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    trainer = AdversarialTrainer(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), AT, compile=False)
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match="of another model"):
        trainer.fit(loader(), 2, folder=tmp_path)
    assert same(weights_of(trainer), before)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
        lambda optimizer, total: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total),
        lambda optimizer, total: torch.optim.lr_scheduler.MultiStepLR(optimizer, [total // 5]),
        lambda optimizer, total: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
            ],
            [3],
        ),
    ],
    ids=["cosine", "one cycle", "multistep", "sequential"],
)
def test_schedulers(scheduler: Any, tmp_path: Path) -> None:
    def make(total: int) -> AdversarialTrainer:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return AdversarialTrainer(model, optimizer, Plain(), scheduler=scheduler(optimizer, total), compile=False)

    rates = Recorder()
    make(40).fit(loader(), 2, watchers=[rates])
    with pytest.raises(Stop):
        make(40).fit(loader(), 2, folder=tmp_path, checkpoint_seconds=0, watchers=[Recorder(5)])
    with pytest.raises(TrainingError, match="scheduler was"):
        make(50).fit(loader(), 2, folder=tmp_path)
    resumed = Recorder()
    make(40).fit(loader(), 2, folder=tmp_path, watchers=[resumed])
    assert [r["lr"] for r in resumed.iterations] == [r["lr"] for r in rates.iterations[4:]]
    assert len({r["lr"] for r in rates.iterations}) > 1


def test_full_disk(tmp_path: Path) -> None:
    saved = interrupted(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = trainer_of()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(TrainingError, match=r"cannot write the checkpoint .*last\.pt: .*the one before"):
            trainer.fit(loader(), 2, folder=tmp_path, checkpoint_seconds=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(tmp_path / "last.pt")["iterations"] == saved["iterations"]
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot write to .*pass another folder"):
        trainer_of().fit(loader(), 1, folder=tmp_path / "file" / "run")


def test_nan_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def batches() -> list[tuple[Tensor, Tensor]]:
        good, bad = batch(), batch(seed=1)
        bad[0][0] = torch.nan
        return [good, good, bad]

    trainer = trainer_of(Plain())
    with pytest.raises(TrainingError, match=r"epoch 1, batch 3: the loss is nan .*the last checkpoint is .*last\.pt"):
        trainer.fit(batches(), 1, folder=tmp_path, checkpoint_seconds=0)
    assert read_checkpoint(tmp_path / "last.pt")["iterations"] == 2


class Failing:
    """Batches, and an error in the middle of them."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield batch()
        yield batch()
        raise OSError("the file system has gone")

    def __len__(self) -> int:
        return 6


def test_loader_that_raises(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="epoch 1, batch 3: the loader raised OSError: the file system has gone"):
        trainer_of().fit(Failing(), 1, folder=tmp_path)
    assert read_checkpoint(tmp_path / "last.pt")["iterations"] == 2  # nothing that was computed is lost


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([batch()[0]], "two tensors, and returns Tensor"),
        ([(*batch(), 1)], "returns tuple of 3"),
        ([], "no batches"),
        ([{"x": 1}], "returns dict"),
    ],
)
def test_bad_loaders(batches: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer_of().fit(batches, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs has to be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every has to be at least 1"),
        ({"patience": 3}, "needs validation data"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        trainer_of().fit(loader(), **{"epochs": 1, "folder": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


def test_state_in_the_middle_of_an_update() -> None:
    trainer = trainer_of(accumulate=2)
    trainer.step(*batch())
    with pytest.raises(TrainingError, match="1 of 2 batches"):
        trainer.state_dict()
    trainer.step(*batch())
    state = trainer.state_dict()
    other = trainer_of(accumulate=2)
    other.load_state_dict(copy.deepcopy(state))
    assert same(weights_of(other), weights_of(trainer))


def test_records_are_plain_numbers() -> None:
    recorder = Recorder()
    trainer_of().fit(loader(), 1, validation=loader(24), watchers=[recorder])
    assert json.loads(json.dumps(recorder.epochs)) == recorder.epochs
    assert json.loads(json.dumps(recorder.iterations)) == recorder.iterations
    assert len(TensorDataset(*separable())) == sum(record["samples"] for record in recorder.iterations)
