"""A run that is killed goes on with the function it was at, and half a result never looks like one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vfl_train.config import ProfileConfig
from vfl_train.errors import ConfigError
from vfl_train.profiling import measure, partial
from vfl_train.profiling.run import profile
from vfl_train.runs import is_done
from vfl_train.schemas import Profile

FUNCTIONS = ("emotion", "ocr")
# As `settings` below, killed (no cleaning up) when the first function has been kept.
KILLED = """
import os, signal, sys
from vfl_train.config import ProfileConfig
from vfl_train.profiling import measure, partial
from vfl_train.profiling.run import profile
save = partial.save
def save_and_die(*args):
    save(*args)
    os.kill(os.getpid(), signal.SIGKILL)
partial.save, measure.MIN_ANSWERED_PAIRS = save_and_die, 3
profile(
    ProfileConfig(
        model="phantom", output=sys.argv[1], functions=("emotion", "ocr"), pairs=4, control_pairs=1,
        device="cpu",
    )
)
"""


def settings(output: Path) -> ProfileConfig:
    return ProfileConfig(
        output=output, functions=FUNCTIONS, pairs=4, control_pairs=1, device="cpu", model="phantom"
    )


def content(folder: Path) -> dict:
    """profile.json without what depends on the clock."""
    value = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    for cost in (value["cost"], *(f["details"]["cost"] for f in value["functions"].values())):
        assert cost.pop("seconds") > 0
    return value


@pytest.fixture(autouse=True)
def few_pairs_are_enough(monkeypatch):
    monkeypatch.setattr(measure, "MIN_ANSWERED_PAIRS", 3)


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The functions that are measured from here on."""
    names, plain = [], measure.measure_function

    def note(sweeper, pairs, config):
        names.append(sweeper.label)
        return plain(sweeper, pairs, config)

    monkeypatch.setattr(measure, "measure_function", note)
    return names


def test_a_killed_run_goes_on_and_ends_with_the_same_profile(tmp_path, measured, capsys):
    out = tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in out.iterdir()) == [".vfl-run.json", "partial"] and not is_done(out)
    assert [p.name for p in (out / "partial").iterdir()] == ["emotion.json"]
    profile(settings(out))
    assert measured == ["ocr"] and "going on at ocr; measured before: emotion" in capsys.readouterr().out
    assert is_done(out) and not (out / "partial").exists()
    assert not any("partial" in name for name in json.loads((out / "manifest.json").read_text())["files"])
    profile(settings(tmp_path / "whole"))
    assert measured == ["ocr", *FUNCTIONS]
    assert content(out) == content(tmp_path / "whole")
    assert Profile.load(out).interaction["emotion"]["ocr"]["own"] == 1.0  # needs what was kept of emotion


def test_an_exception_leaves_what_was_done_and_damage_is_measured_again(tmp_path, measured, monkeypatch):
    plain, out = partial.save, tmp_path / "out"

    def fail(run, name, kept):
        plain(run, name, kept)
        if name == "ocr":
            raise KeyboardInterrupt

    monkeypatch.setattr(partial, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        profile(settings(out))
    assert not (out / "profile.json").exists()
    (out / "partial" / "emotion.json").write_text('{"function": {}}', encoding="utf-8")
    monkeypatch.setattr(partial, "save", plain)
    profile(settings(out))
    assert measured == ["emotion", "ocr", "emotion"]
    assert list(Profile.load(out).functions) == list(FUNCTIONS)


def test_what_another_run_kept_is_not_used(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(measure, "interaction", fail)
    with pytest.raises(KeyboardInterrupt):
        profile(settings(out))
    with pytest.raises(ConfigError, match="pairs was 4, is now 2"):
        profile(replace(settings(out), pairs=2))
    assert len(list((out / "partial").iterdir())) == 2
