"""scripts/check_phantom.py: a missed bar is told. The measuring itself is tested in tests/profiling."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vfl_train.phantom.architecture import LAYERS, PLANTED
from vfl_train.schemas import FunctionProfile

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_phantom.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_phantom", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rates(name: str, planted: float, away: float) -> list[float]:
    values = [away] * LAYERS
    values[PLANTED[name]] = planted
    return values


def found(**changes: FunctionProfile) -> SimpleNamespace:
    functions = {
        name: FunctionProfile(
            "ok", 20, 20, rates(name, 1.0, 0.02), rates(name, 0.97, 0.0), [], {}, k, [k], [k], False
        )
        for name, k in PLANTED.items()
    }
    return SimpleNamespace(functions=functions | changes)


def test_bars_that_are_just_met_and_each_that_is_missed(script):
    accuracy = dict.fromkeys(PLANTED, 0.98)
    assert script.missed_bars(found(), accuracy) == []
    assert script.missed_bars(found(), accuracy | {"ocr": 0.97}) == [
        "ocr: accuracy 97.0%, at least 98% is wanted"
    ]
    ocr = found().functions["ocr"]
    (flips,) = script.missed_bars(found(ocr=replace(ocr, flip_rate=rates("ocr", 0.96, 0.0))), accuracy)
    (away,) = script.missed_bars(found(ocr=replace(ocr, change_rate=rates("ocr", 1.0, 0.03))), accuracy)
    assert "flips 96.0%" in flips and "3.0% change" in away


@pytest.mark.parametrize(("model", "code"), [("phantom", 1), ("phantom-unplanted", None)])
def test_the_exit_code(script, tmp_path, monkeypatch, model, code):
    scores = dict.fromkeys(PLANTED, SimpleNamespace(accuracy=0.5, n=2))
    monkeypatch.setattr(script, "evaluate", lambda config: scores)
    monkeypatch.setattr(script, "profile", lambda config: found())
    monkeypatch.setattr(script, "digit_probe", lambda vlm: (0.5, 0.125))
    arguments = ["check_phantom.py", model, "--output", str(tmp_path), "--pairs", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    if code is None:
        script.main()
        return
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == code
