"""The bar shows on a terminal and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from vfl_train.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_when_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), label="pairs")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_shows_count_and_label_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(iter("abc"), total=3, label="pairs")) == ["a", "b", "c"]
    assert "pairs" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_an_exception_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())

    def broken():
        yield 1
        raise KeyError("x")

    with pytest.raises(KeyError):
        list(track(broken()))
