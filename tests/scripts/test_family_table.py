"""The committed table of families against the registry: its rows, facts and refusals, not its digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "family_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text: str) -> dict[str, dict[str, str]]:
    """The table's cells by family and column."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in body}


def test_the_committed_table_is_of_this_registry(script):
    committed = script.README.read_text("utf-8").partition(script.START)[2].partition(script.END)[0]
    found = rows(committed)
    fix = "run scripts/family_table.py"
    assert sorted(found) == sorted(script.NAMES), fix
    for name, cells in found.items():
        assert cells == cells | script.facts(name), fix
        assert float(cells["reference error"]) < 1e-4
    assert committed.strip().endswith("\n".join(script.refusals())), fix


def test_a_row_is_measured(script):
    (cells,) = rows(script.table(["llava"])).values()
    assert cells["text between them"] == "no: the template puts images first"
    errors = [float(cells[f"{path} error"]) for path in ("reference", "engine")]
    assert min(errors) > 0 and max(errors) < 1e-5
