"""What studies have in common: records to go on from, pages, and attacks as the papers' programs have them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradprune.attacks import BIM, FGSM, PGD, Runtime
from gradprune.cli.main import main
from gradprune.errors import OptionError
from gradprune.studies import lab
from gradprune.studies.data import Batches
from gradprune.studies.records import Records, read_lines
from gradprune.studies.training import seeded
from gradprune.studies.written import as_written

EAGERLY = Runtime(compile=False)


def figures(folder: Path) -> list[Any]:
    """What was measured, but for seconds and compilations."""
    return [(line["cell"], line["figures"]) for line in read_lines(folder / "record.jsonl")[1:]]


def study(output: Path, *arguments: str, name: str = "lab") -> int:
    options = ("--scale", "toy", "--eager", "--data", "digits", "--output", str(output))
    return main(["study", name, *options, *arguments])


def test_a_study_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path) == 0
    shown = capsys.readouterr()
    assert "lab: " in shown.err
    assert "processor time" in shown.err
    assert "reproduced: [LAB] accuracy falls with eps" in shown.out
    page = (tmp_path / "index.html").read_text()
    named = re.findall(r'<img src="([^"]+)"', page)
    assert named == ["lab-eager/curves.png", "lab-eager/first-image.png"]
    for file in named:
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "index.md").read_text()
    assert "1,797 digits (scikit-learn)" in text
    assert all(f"]({file})" in text for file in named)
    assert not list(tmp_path.rglob("*.pt"))  # what is in the record needs no checkpoint
    before = figures(tmp_path / "lab-eager")
    assert study(tmp_path) == 0  # all of it is found
    assert figures(tmp_path / "lab-eager") == before


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert study(tmp_path / "whole", "--seed", "3") == 0

    class Interrupting(lab.Progress):
        def epoch(self, record: dict[str, Any]) -> None:
            if (tmp_path / "parts/lab-eager/record.jsonl").exists() == self.in_second and record["epoch"] == 1:
                self.__class__.stopped.append(record["iteration"])
                raise KeyboardInterrupt

        in_second = False
        stopped: list[int] = []  # noqa: RUF012

    with monkeypatch.context() as patched:
        patched.setattr(lab, "Progress", Interrupting)
        assert study(tmp_path / "parts", "--seed", "3") == 130  # in the first cell
        assert not (tmp_path / "parts/lab-eager/record.jsonl").exists()
        Interrupting.in_second = True
        assert study(tmp_path / "parts", "--seed", "3") == 130  # in the second one
        assert len(figures(tmp_path / "parts/lab-eager")) == 1
    assert len(Interrupting.stopped) == 2
    assert study(tmp_path / "parts", "--seed", "3") == 0
    assert figures(tmp_path / "parts/lab-eager") == figures(tmp_path / "whole/lab-eager")
    assert study(tmp_path / "other", "--seed", "4") == 0
    assert figures(tmp_path / "other/lab-eager") != figures(tmp_path / "whole/lab-eager")


def test_a_record_of_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path / "record.jsonl", {"seed": 0, "data": "MNIST"})
    assert records.get("one", lambda: ({"accuracy": 0.5}, {"seconds": 1.0})) == {"accuracy": 0.5}
    again = Records(tmp_path / "record.jsonl", {"seed": 0, "data": "MNIST"})
    again.resume()
    assert again.get("one", lambda: pytest.fail("it is there")) == {"accuracy": 0.5}
    with pytest.raises(OptionError, match=r"seed was 0 and is 1: pass --fresh"):
        Records(tmp_path / "record.jsonl", {"seed": 1, "data": "MNIST"}).resume()
    (tmp_path / "record.jsonl").write_text("no JSON")
    with pytest.raises(OptionError, match="cannot read"):
        again.resume()
    assert main(["study", "lap"]) == 2
    assert "did you mean 'lab'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.3, step_size=0.1, steps=3, seed=1),
        BIM(eps=0.2, step_size=0.1, steps=2, targeted="least-likely", seed=1),
        FGSM(eps=0.1, seed=1),
        PGD(eps=0.3, steps=2, seed=1, loss=lambda logits, y: -logits.gather(1, y[:, None]).squeeze(1)),
    ],
    ids=["pgd", "targeted", "fgsm", "own-loss"],
)
def test_attacks_as_written_find_the_same_and_compute_weight_gradients(attack: PGD) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    x, y = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.randint(4, (5,))
    computed: list[int] = []
    model[1].weight.register_hook(lambda gradient: computed.append(1))
    written = as_written(attack)(model, x, y)
    assert len(computed) == attack.steps
    assert torch.equal(written, attack(model, x, y, runtime=EAGERLY))
    assert not torch.equal(written, x)
    assert model[3].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_are_whole_and_shuffled() -> None:
    x = torch.arange(10.0)[:, None]
    torch.manual_seed(0)
    batches = Batches(x, x[:, 0].long(), 4)
    first, second = (torch.cat([labels for _, labels in batches]) for _ in range(2))
    assert len(batches) == 2
    assert len(first.unique()) == 8
    assert not torch.equal(first, second)


def test_seeds_of_parts_differ() -> None:
    seeds = {seeded(seed, *names) for seed in range(3) for names in (("a",), ("b",), ("a", 1), ("a", 2))}
    assert len(seeds) == 12
