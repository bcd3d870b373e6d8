"""Benchmarks side by side: who waits for whom, and what takes too long."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradprune.bench.turns import side_by_side, within

pytest.importorskip("fcntl")

OTHER = """
import sys, time
from pathlib import Path
from gradprune.bench.turns import side_by_side
folder = Path(sys.argv[1])
with side_by_side(folder / "lock") as alone:
    (folder / "begun").touch()
    while not (folder / "finish").exists():
        time.sleep(0.01)
    (folder / "checked").touch()
    alone()
    (folder / "alone").touch()
"""


def wait_for(path: Path) -> None:
    ends = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < ends, f"no {path.name}"
        time.sleep(0.01)


def test_who_is_timed_waits_for_all_who_compile(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)]) as other:
        with side_by_side(tmp_path / "lock") as alone:
            wait_for(tmp_path / "begun")  # both compile
            (tmp_path / "finish").touch()
            alone()
            assert (tmp_path / "checked").exists()
            was_alone = (tmp_path / "alone").exists()  # the other one's turn came first, or has not come
            time.sleep(0.2)
            assert (tmp_path / "alone").exists() is was_alone
        wait_for(tmp_path / "alone")
        assert other.wait(60) == 0


def test_by_oneself():
    with side_by_side(None) as alone:
        alone()


def test_what_takes_too_long(capfd: pytest.CaptureFixture[str]):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="longer than 1 s"), within(1):
        time.sleep(30)
    assert time.monotonic() - began < 20
    assert "test_what_takes_too_long" in capfd.readouterr().err
    with within(1), within(None):
        pass
    time.sleep(1.1)  # nothing is left behind
