"""Scores are computed once: shards by process, resumed, and never reused for anything else."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_vlm

from vfl_train.config import SelectConfig
from vfl_train.data.pool import open_pool
from vfl_train.data.rows import Reason, Rejected
from vfl_train.data_select import run as select_run
from vfl_train.data_select import shards
from vfl_train.data_select.scoring import Scores
from vfl_train.errors import DataError
from vfl_train.interventions.readout import Cost
from vfl_train.phantom.architecture import PLANTED
from vfl_train.phantom.datasets import write_pool

SIZE = 8  # rows of a shard here


class Fake:
    """A scorer that counts what it is asked for and refuses row 5."""

    by_layer = False

    def __init__(self):
        self.rejected, self.cost, self.asked = [], Cost(), []

    def score(self, rows):
        self.asked += [row.row for row in rows]
        self.rejected += [
            Rejected(r.row, r.id, Reason.not_encodable, "no", r.line) for r in rows if r.row == 5
        ]
        self.cost.rows += len(rows)
        return [Scores(r, 3, r.row / 7, {"ocr": 1.0}, {"ocr": 0.5}, 0.1) for r in rows if r.row != 5]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", SIZE)


@pytest.fixture
def pool(tmp_path):
    """20 rows, one of them broken; row 2 has an image."""
    lines = []
    for i in range(20):
        turns = [{"role": "user", "content": f"what is {i} ?"}, {"role": "assistant", "content": "it"}]
        lines.append(json.dumps({"messages": turns}))
    lines[2] = lines[2].replace('"what', '"<image>what').replace("}]}", '}], "images": ["a.png"]}')
    lines[11] = "{broken"
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "rows.jsonl"


def score(pool, folder, base="base", rank=0, size=1) -> list[int]:
    """The rows that had to be scored."""
    scorer = Fake()
    shards.score_shards(open_pool(pool), 20, scorer, ["ocr"], folder, base, rank, size)
    return scorer.asked


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


EVERY = [i for i in range(20) if i != 11]


def test_every_row_is_scored_or_refused(pool, tmp_path):
    assert score(pool, tmp_path / "shards") == EVERY
    assert sorted(contents(tmp_path / "shards")) == [f"00000{k}.parquet" for k in range(3)]
    found = shards.read_shards(tmp_path / "shards", 20, ["ocr"])
    assert found.table["row"].to_pylist() == [i for i in EVERY if i != 5]
    assert found.column("loss_full").tolist() == [i / 7 for i in EVERY if i != 5]
    assert [(r.row, str(r.code), r.line) for r in found.rejected] == [
        (5, "not_encodable", 6),
        (11, "bad_json", 12),
    ]
    assert found.forwards == len(EVERY)


def test_processes_share_the_shards_and_the_bytes_are_the_same(pool, tmp_path):
    score(pool, tmp_path / "alone")
    assert score(pool, tmp_path / "two", rank=1, size=2) == list(range(8, 16))[:3] + list(range(12, 16))
    score(pool, tmp_path / "two", rank=0, size=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


def test_what_is_there_is_not_scored_again(pool, tmp_path):
    folder = tmp_path / "shards"
    score(pool, folder)
    before = contents(folder)
    assert score(pool, folder) == []
    (folder / "000001.parquet").unlink()
    assert score(pool, folder) == [i for i in range(8, 16) if i != 11]
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "another file"])
def test_a_damaged_shard_is_scored_again_and_it_is_said(pool, tmp_path, damage, caplog):
    folder = tmp_path / "shards"
    score(pool, folder)
    before, path = contents(folder), folder / "000000.parquet"
    whole = path.read_bytes()
    middle = whole.index(b"PAR1") + 40
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    path.write_bytes({"cut": whole[:-9], "byte": flipped, "empty": b"", "another file": b"{}"}[damage])
    with caplog.at_level(logging.WARNING, "vfl_train"):
        assert score(pool, folder) == list(range(8))
    assert "000000.parquet is damaged" in caplog.text
    assert contents(folder) == before


def test_a_missing_shard_is_an_error_when_all_should_be_there(pool, tmp_path):
    score(pool, tmp_path / "shards", rank=0, size=2)
    with pytest.raises(DataError, match=r"block 1 .* is missing"):
        shards.read_shards(tmp_path / "shards", 20, ["ocr"])


def test_two_writers_of_one_shard_do_no_harm(pool, tmp_path):
    folder = tmp_path / "shards"
    score(pool, folder)
    before = contents(folder)
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]\nfrom pathlib import Path\n"
        "from test_shards import shards, score\nshards.SHARD_ROWS = 8\n"
        "for _ in range(5):\n    score(Path(sys.argv[1]), Path(sys.argv[2]), base=str(_ % 2))\n"
    )
    paths = [str(Path(__file__).parent), *(p for p in sys.path if "support" in p)]
    command = [sys.executable, "-c", code, str(pool), str(folder), *paths]
    writers = [subprocess.Popen(command) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    score(pool, folder)
    assert contents(folder) == before, "and nothing is left beside them"


# --- what scores depend on ---------------------------------------------------------------------------


def test_another_base_or_other_rows_or_images_are_scored_again(pool, tmp_path):
    folder = tmp_path / "shards"
    score(pool, folder)
    assert score(pool, folder, base="other") == EVERY
    lines = pool.read_text(encoding="utf-8").splitlines()
    lines[17] = lines[17].replace('"it"', '"that"')
    pool.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert score(pool, folder, base="other") == [16, 17, 18, 19]
    (pool.parent / "a.png").write_bytes(b"two and more")
    assert score(pool, folder, base="other") == list(range(8))
    assert score(pool, folder, base="other") == []


def base_of(vlm, layers=None, ablation="block") -> str:
    scorer = select_run.Scorer(vlm, layers or {"ocr": [2]}, ablation)
    inputs = select_run._scoring_inputs(scorer)
    return shards.base_key({**inputs, "layers": scorer.layers, "ablation": ablation})


def test_model_dtype_processor_layers_ablation_and_code_are_told_apart(monkeypatch):
    vlm = tiny_vlm("qwen2_5_vl")
    first = base_of(vlm)
    assert base_of(vlm) == first
    found = {base_of(vlm, {"ocr": [2, 3]}), base_of(vlm, ablation="nested")}
    size = vlm.processor.image_processor.size
    with monkeypatch.context() as changed:
        changed.setitem(size, "longest_edge", size["longest_edge"] // 2)
        found.add(base_of(vlm))
    with monkeypatch.context() as changed:
        changed.setattr(vlm.processor, "chat_template", vlm.processor.chat_template + " ")
        found.add(base_of(vlm))
    with monkeypatch.context() as changed:
        changed.setattr(type(vlm), "dtype", "bfloat16")
        found.add(base_of(vlm))
    with monkeypatch.context() as changed:
        changed.setattr(select_run, "code_digest", lambda: "later")
        found.add(base_of(vlm))
    weight = vlm.base.get_output_embeddings().weight.data
    kept = weight[0, 0].item()
    weight[0, 0] += 1
    found.add(base_of(vlm))
    weight[0, 0] = kept
    assert len(found | {first}) == 8 and base_of(vlm) == first


# --- the command, killed -----------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
from vfl_train.data_select import shards
shards.SHARD_ROWS = 8
if sys.argv[1] == "kill":
    write = shards.write_shard
    def write_and_die(path, *rest):
        write(path, *rest)
        if path.name == "000001.parquet":
            os.kill(os.getpid(), signal.SIGKILL)
    shards.write_shard = write_and_die
from vfl_train.cli import main
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_in_two_processes_to_the_same_bytes(tmp_path):
    pool = write_pool(tmp_path / "pool", 24, 3)
    functions = {f: {"layers": [k], "flip_block": [k]} for f, k in PLANTED.items()}
    (tmp_path / "profile.json").write_text(json.dumps(profile_json(functions)), encoding="utf-8")
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    common = ["select", "--profile", tmp_path / "profile.json", "--data", pool, "--device", "cpu", "--output"]
    select_run.select(
        SelectConfig(
            profile=str(tmp_path / "profile.json"), data=str(pool), output=tmp_path / "once", device="cpu"
        )
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(mode: str, *launcher: str) -> tuple[int, str]:
        command = [sys.executable, *launcher, tmp_path / "driver.py", mode, *common, tmp_path / "out"]
        done = subprocess.run(command, env=environment, timeout=600, stderr=subprocess.PIPE, text=True)
        return done.returncode, done.stderr

    assert run("kill")[0] == -signal.SIGKILL
    assert {p.name for p in (tmp_path / "out" / "shards").glob("0*")} == {"000000.parquet", "000001.parquet"}
    assert not (tmp_path / "out" / "scores.parquet").exists()
    (tmp_path / "out" / "shards" / "000000.parquet").write_bytes(b"cut")
    two = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    code, said = run("run", *two)
    assert code == 0, said
    assert "000000.parquet is damaged" in said
    assert "1 of 1 blocks were scored before" in said, "000001 is used by the second process"
    assert not (tmp_path / "out" / "shards").exists(), "work in progress goes when the run is done"
    for name in ("scores.parquet", "selected.json", "selection.json", "quarantine.jsonl", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name


def profile_json(functions: dict) -> dict:
    """profile.json with these layers."""
    from vfl_train.phantom.architecture import LAYERS, WIDTH
    from vfl_train.schemas import FunctionProfile, ModelInfo, Profile

    found = {
        name: FunctionProfile(
            "ok", 50, 50, [], [], [], {}, f["layers"][0], f["layers"], f["flip_block"], False
        )
        for name, f in functions.items()
    }
    info = ModelInfo("phantom", None, "qwen2_5_vl", LAYERS, WIDTH)
    return Profile(info, "swap", "text", "engine", "float32", 0, {}, {}, found).to_json()
