"""Every configuration compiles for Hopper with the installed triton, no GPU needed, and fits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from vfl_train.kernels.vision_kv.resources import spills_in_loops

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def table(tmp_path, *words: str) -> list[list[str]]:
    """The cells of the lines of the table that contain `words`; in a process where triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "vfl_train.kernels.vision_kv.resources", *words],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    print(f"\n{result.stdout}")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()]
    return [row for row in cells if row and re.match(r"(forward|combine|backward)", row[0])]


def check(rows: list[list[str]]) -> None:
    for name, tile, _, _, registers, shared, _, spills, products in rows:
        assert int(registers) <= 255 and int(shared) <= 227, name
        assert int(spills) == 0 or "fp32" in name, name  # float32 is for checks, not for speed
        if name.startswith("forward") and "bf16" in name:
            assert products == ("HGMMA" if int(tile.split()[0]) >= 64 else "HMMA"), name


def test_the_main_configuration_fits_hopper(tmp_path):
    rows = table(tmp_path, "forward bf16 D=128", "block_m=128")
    assert len(rows) == 1
    check(rows)


@pytest.mark.slow
def test_all_configurations_fit_hopper(tmp_path):
    rows = table(tmp_path)
    names = {row[0].rsplit(" ", 2)[0] for row in rows}
    assert names == {"forward", "forward split", "combine", "backward_queries", "backward_keys",
                     "backward_keys causal"}  # fmt: skip
    assert {row[0].rsplit("=")[1] for row in rows} == {"64", "80", "96", "128", "256"}
    check(rows)


def test_spills_are_counted_in_innermost_loops_only():
    code = """
        /*0010*/  STL [R1], R2 ;
        /*0020*/  LDL R3, [R1] ;
        /*0030*/  LDL R4, [R1] ;
        /*0040*/  @P0 BRA 0x30 ;
        /*0050*/  @P1 BRA 0x20 ;
        /*0060*/  @P2 BRA 0x80 ;
        /*0070*/  STL [R1], R2 ;
    """
    assert spills_in_loops(code) == 1
