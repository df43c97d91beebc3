"""Rows sorted by likeness to probes, where functions share layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from vfl_train.config import SelectConfig
from vfl_train.data_select import choose
from vfl_train.data_select import run as select_run
from vfl_train.data_select.run import bucket_rule, select
from vfl_train.data_select.signature import Likeness, overlapping, probe_rows, signatures
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.probes import builtin_probe_set, save_probe_set
from vfl_train.phantom.architecture import LAYERS, PLANTED, WIDTH
from vfl_train.phantom.datasets import write_pool
from vfl_train.schemas import BY_LAYER, LANGUAGE, FunctionProfile, ModelInfo, Profile

FUNCTIONS = ("ocr", "relation")
READS = {"ocr": [0.0, 0.2, 3.0, 1.5], "relation": [0.0, 3.0, 0.3, 1.5]}  # log-odds moved, layer by layer


def drawn(function: str, n: int, seed: int, size: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(loss_full [n], losses by layer [n, 4]) of rows of a function whose layers move the odds as READS."""
    rng = np.random.default_rng(seed)
    odds = rng.uniform(1.0, 4.0, n)
    moved = size * np.array(READS[function]) * rng.lognormal(0.0, 0.4, (n, 4))
    return np.logaddexp(0, -odds), np.logaddexp(0, -(odds[:, None] - moved))


def together(n: int, seed: int, size: float = 1.0) -> tuple[np.ndarray, ...]:
    """(function, loss_full, by_layer, need of the whole block, its loss's rise) of both functions' rows."""
    parts = [drawn(f, n, seed + i, size) for i, f in enumerate(FUNCTIONS)]
    full, each = (np.concatenate(side) for side in zip(*parts, strict=True))
    blind = np.logaddexp(0, -(-choose.log_odds(full) * -1 - 4.0 * size))
    need = np.abs(choose.log_odds(full) - choose.log_odds(blind))
    return np.repeat(FUNCTIONS, n), full, each, need, blind - full


def test_rows_of_equal_blocks_are_told_apart() -> None:
    function, full, each, need, _ = together(60, 0)
    like = Likeness(function, full, each, dict.fromkeys(FUNCTIONS, need))
    truth, full, each, need, delta = together(300, 10)
    found = like.buckets(full, each, dict.fromkeys(FUNCTIONS, need), dict.fromkeys(FUNCTIONS, delta))
    assert (found == truth).mean() > 0.95
    plain = choose.buckets(dict.fromkeys(FUNCTIONS, need), dict.fromkeys(FUNCTIONS, delta))
    assert (plain == truth).mean() == 0.5, "equal blocks say nothing: all rows go to the first"


def test_rows_that_nothing_moves_are_language() -> None:
    function, full, each, need, _ = together(60, 0)
    like = Likeness(function, full, each, dict.fromkeys(FUNCTIONS, need))
    _, full, each, need, delta = together(50, 3, size=1e-3)
    found = like.buckets(full, each, dict.fromkeys(FUNCTIONS, need), dict.fromkeys(FUNCTIONS, delta))
    assert set(found) == {LANGUAGE}
    still = np.tile(full[:, None], 4)
    zero = dict.fromkeys(FUNCTIONS, np.zeros(len(full)))
    assert set(like.buckets(full, still, zero, zero)) == {LANGUAGE}


def test_signatures_are_shares() -> None:
    _, full, each, _, _ = together(20, 1)
    found = signatures(full, each)
    assert found.shape == each.shape and np.allclose(np.linalg.norm(found, axis=1), 1.0)
    assert not signatures(full, np.tile(full[:, None], 4)).any()


def test_probes_the_model_does_not_answer_do_not_count() -> None:
    function, full, each, need, _ = together(25, 0)
    unknown = np.where(function == "relation", full + 5.0, full)
    with pytest.raises(DataError, match="answers 0 probes of relation, 20 are needed"):
        Likeness(function, unknown, each, dict.fromkeys(FUNCTIONS, need))


def test_functions_overlap_by_one_layer() -> None:
    assert overlapping({"ocr": [6, 7], "count": [1, 2], "relation": [7, 8]})
    assert not overlapping({"ocr": [6, 7], "count": [1, 2]})


def test_what_auto_means(caplog: pytest.LogCaptureFixture) -> None:
    config = SelectConfig(profile="p", data="d", output=Path("o"))
    shared, apart = {"ocr": [1, 2], "count": [2]}, {"ocr": [1], "count": [2]}
    assert bucket_rule(config, shared) == "signature" and bucket_rule(config, apart) == "need"
    assert bucket_rule(config, {**shared, "mine": [2]}) == "need"
    assert "give --probes with pairs of mine" in caplog.text
    own = SelectConfig(profile="p", data="d", output=Path("o"), probes=Path("pairs"))
    assert bucket_rule(own, {**shared, "mine": [2]}) == "signature"
    forced = SelectConfig(profile="p", data="d", output=Path("o"), bucket_rule="signature")
    assert bucket_rule(forced, apart) == "signature"


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SelectConfig:
    """A pool of two functions which a profile says share all their layers."""
    folder = tmp_path_factory.mktemp("signature")
    block, zeros = sorted(PLANTED[f] for f in FUNCTIONS), [0.0] * LAYERS
    functions = {
        f: FunctionProfile(
            "ok", 50, 50, zeros, zeros, [[0.0, 1.0]] * LAYERS, {}, block[0], block, block, False
        )
        for f in FUNCTIONS
    }
    info = ModelInfo("phantom", None, "qwen2_5_vl", LAYERS, WIDTH)
    found = Profile(info, "swap", "text", "reference", "float32", 0, {}, {}, functions)
    (folder / "profile.json").write_text(json.dumps(found.to_json()), encoding="utf-8")
    pool = write_pool(folder / "pool", 40, 0, {"ocr": 0.4, "relation": 0.4, LANGUAGE: 0.2})
    save_probe_set(builtin_probe_set(FUNCTIONS, 12, 5, world="phantom"), folder / "pairs")
    return SelectConfig(
        profile=str(folder / "profile.json"), data=str(pool), output=folder / "out", budget="0.25",
        functions=("ocr",), probes=folder / "pairs", device="cpu",
    )  # fmt: skip


def test_a_pool_is_sorted_by_signature(config: SelectConfig, tmp_path: Path, monkeypatch) -> None:
    record = select(config)
    assert record["bucket_rule"] == "signature"
    scores = pq.read_table(config.output / "scores.parquet").to_pydict()
    assert all(len(each) == LAYERS for each in scores[BY_LAYER])
    truth = json.loads((Path(config.data).parent / "truth.json").read_text(encoding="utf-8"))
    rows = json.loads(Path(config.data).read_text(encoding="utf-8"))
    right = [b == truth[rows[r]["id"]] for r, b in zip(scores["row"], scores["bucket"], strict=True)]
    assert np.mean(right) > 0.9
    # Ranking again needs no model, and what it needs lies in the folder.
    monkeypatch.setattr(select_run, "VisionLanguageModel", None)
    again = {**vars(config), "output": tmp_path / "again", "from_scores": config.output}
    assert select(SelectConfig(**again))["buckets"] == record["buckets"]
    plain = select(SelectConfig(**{**again, "output": tmp_path / "plain", "bucket_rule": "need"}))
    assert plain["bucket_rule"] == "need" and plain["buckets"] != record["buckets"]
    with pytest.raises(ConfigError, match="was scored without signatures"):
        select(SelectConfig(**{**again, "output": tmp_path / "x", "from_scores": tmp_path / "plain"}))


def test_both_sides_of_a_pair_are_rows(config: SelectConfig) -> None:
    rows = probe_rows(builtin_probe_set(FUNCTIONS, 3, 0, world="phantom"), FUNCTIONS)
    assert [row.source for row in rows] == ["ocr"] * 6 + ["relation"] * 6
    assert len({row.uid for row in rows}) == 12 and all(len(row.images) == 1 for row in rows)
    assert rows[0].messages[0] == rows[1].messages[0] and rows[0].messages[1] != rows[1].messages[1]
