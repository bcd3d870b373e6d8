"""What is begun is over when it is waited for."""

from __future__ import annotations

import threading

import pytest

from gradprune.torch_compat import background


def test_waiting_takes_what_fails_with_what_succeeds():
    go = threading.Event()
    slow = background.begin(go.wait)
    failing = background.begin(int, "no number")
    assert not slow.done()
    go.set()
    background.wait()
    assert slow.result() is True
    with pytest.raises(ValueError, match="no number"):
        failing.result()
    assert not background._begun
