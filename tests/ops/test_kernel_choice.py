"""What is faster is measured once and remembered."""

from __future__ import annotations

import json
import time

import pytest
import torch

from gradprune.ops import kernel_choice as timing


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(timing, "_answers", {})


def sleeper(seconds: float):
    return lambda: time.sleep(seconds)


def kernels(candidate: float, baseline: float):
    return lambda: (sleeper(candidate), sleeper(baseline))


def not_again():
    raise AssertionError("measured again")


def test_the_faster_one_wins_clearly_or_not_at_all():
    assert timing.is_faster("fast", kernels(0.001, 0.01))
    assert not timing.is_faster("slow", kernels(0.01, 0.001))
    assert not timing.is_faster("equal", kernels(0.02, 0.02))


def test_measured_once():
    assert timing.is_faster("fast", kernels(0.001, 0.01))
    assert timing.is_faster("fast", not_again)


def test_remembered_by_the_next_process(monkeypatch):
    assert timing.is_faster("fast", kernels(0.001, 0.01))
    monkeypatch.setattr(timing, "_answers", {})
    assert timing.is_faster("fast", not_again)


def test_depends_on_the_number_of_threads():
    threads = torch.get_num_threads()
    assert timing.is_faster("fast", kernels(0.001, 0.01))
    torch.set_num_threads(threads + 1)
    try:
        assert not timing.is_faster("fast", kernels(0.01, 0.001))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00"])
def test_a_broken_file_is_measured_anew(content):
    file = timing._file()
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert timing.is_faster("fast", kernels(0.001, 0.01))
    assert list(json.loads(file.read_text()).values()) == [True]


def test_a_folder_that_cannot_be_written_is_no_failure(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    assert timing.is_faster("fast", kernels(0.001, 0.01))


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    timing.is_faster("random", lambda: (lambda: torch.rand(3), lambda: torch.rand(3)))
    assert torch.equal(torch.rand(1), expected)
