"""`vfl-train select` on small pools of the phantom's world, with the bundled phantom."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from vfl_train.cli import main
from vfl_train.config import SelectConfig
from vfl_train.data_select import run as select_run
from vfl_train.data_select.run import select
from vfl_train.errors import ConfigError, DataError
from vfl_train.phantom import world
from vfl_train.phantom.architecture import LAYERS, PLANTED, WIDTH
from vfl_train.phantom.datasets import write_pool
from vfl_train.schemas import LANGUAGE, FunctionProfile, ModelInfo, Profile, score_columns

FILES = {"scores.parquet", "selection.json", "quarantine.jsonl", "report.html"}
KINDS = ("ocr", "count", "emotion")
SHARES = {"ocr": 0.3, "count": 0.2, "emotion": 0.3, LANGUAGE: 0.2}


def profile_of(layers: dict[str, list[int]], depth: int = LAYERS) -> Profile:
    """What a profile would say if it found `layers`."""
    zeros = [0.0] * depth
    functions = {
        name: FunctionProfile(
            "ok" if k else "not_measurable", 50, 50 if k else 3, zeros, zeros, [[0.0, 1.0]] * depth, {},
            k[0] if k else None, k, k, False,
        )
        for name, k in layers.items()
    }  # fmt: skip
    info = ModelInfo("phantom", None, "qwen2_5_vl", depth, WIDTH)
    return Profile(info, "swap", "text", "reference", "float32", 0, {}, {}, functions)


@pytest.fixture(scope="session")
def profile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    found = profile_of({**{f: [PLANTED[f]] for f in KINDS}, "relation": []})
    path.write_text(json.dumps(found.to_json()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Path:
    """40 LLaVA rows, two of them unusable: an image that is not there and one from the web."""
    path = write_pool(tmp_path_factory.mktemp("pool"), 40, 0, SHARES)
    rows = json.loads(path.read_text(encoding="utf-8"))
    visual = [row for row in rows if "image" in row]
    visual[3]["image"], visual[7]["image"] = "images/gone.png", "https://example.com/a.png"
    # Spaces and key order that a JSON writer would not reproduce.
    path.write_text("[" + ",\n\n".join(json.dumps(r, indent=1) for r in rows) + "]", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def selected(profile, pool, tmp_path_factory):
    """(config, record) of one run."""
    config = SelectConfig(
        profile=str(profile), data=str(pool), output=tmp_path_factory.mktemp("select") / "out",
        budget="0.25", functions=("ocr",), device="cpu",
    )  # fmt: skip
    return config, select(config)


def elements(path: Path) -> list[str]:
    """The raw texts of a JSON array's elements."""
    text, decoder, out, at = path.read_text(encoding="utf-8"), json.JSONDecoder(), [], 1
    while "{" in text[at:]:
        start = text.index("{", at)
        _, at = decoder.raw_decode(text, start)
        out.append(text[start:at])
    return out


def table(config) -> dict[str, list]:
    return pq.read_table(config.output / "scores.parquet").to_pydict()


def test_files_and_columns_follow_the_contract(selected):
    config, record = selected
    assert {p.name for p in config.output.iterdir()} >= FILES | {"selected.json"}
    columns = table(config)
    assert list(columns) == score_columns(KINDS)
    assert len(set(columns["uid"])) == len(columns["row"]) == record["rows_kept"] == 38
    assert columns["row"] == sorted(columns["row"]) and set(columns["source"]) == {"pool"}
    assert set(columns["bucket"]) <= {*KINDS, LANGUAGE}
    assert record["selected"] == "selected.json" and record["layers"] == {f: [PLANTED[f]] for f in KINDS}
    assert record == json.loads((config.output / "selection.json").read_text(encoding="utf-8"))


def test_every_row_is_kept_or_quarantined(selected, pool):
    config, record = selected
    lines = (config.output / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    codes = {json.loads(line)["code"] for line in lines}
    assert codes == {"image_missing", "remote_image"}
    assert (
        record["data"]["rows_read"] == record["rows_kept"] + record["rows_quarantined"] == len(elements(pool))
    )


def test_selected_rows_are_byte_equal_and_in_input_order(selected, pool):
    config, record = selected
    chosen, everything = elements(config.output / "selected.json"), elements(pool)
    positions = [everything.index(text) for text in chosen]
    assert positions == sorted(positions) and len(chosen) == record["rows_selected"] == 9
    columns = table(config)
    assert positions == [r for r, s in zip(columns["row"], columns["selected"], strict=True) if s]


def test_ocr_rows_are_picked_for_ocr(selected, pool):
    """What the rows ask for stands in truth.json, which no command reads."""
    config, _ = selected
    truth = json.loads((pool.parent / "truth.json").read_text(encoding="utf-8"))
    chosen = json.loads((config.output / "selected.json").read_text(encoding="utf-8"))
    kinds = [truth[row["id"]] for row in chosen]
    assert kinds.count("ocr") / len(kinds) >= 0.8
    columns = table(config)
    names = json.loads(pool.read_text(encoding="utf-8"))
    right = [b == truth[names[r]["id"]] for r, b in zip(columns["row"], columns["bucket"], strict=True)]
    assert np.mean(right) >= 0.8


def test_scores_are_reused_without_a_model(selected, monkeypatch, tmp_path):
    config, record = selected
    monkeypatch.setattr(select_run, "VisionLanguageModel", None)
    again = SelectConfig(**{**vars(config), "from_scores": config.output, "output": tmp_path / "again"})
    second = select(again)
    assert {k: v for k, v in second.items()} == record
    for name in ("selected.json", "quarantine.jsonl", "report.html"):
        assert (again.output / name).read_bytes() == (config.output / name).read_bytes()
    assert table(again) == table(config)
    count = SelectConfig(
        **{
            **vars(again),
            "functions": ("count",),
            "mix": "count=1",
            "budget": "3",
            "output": tmp_path / "count",
        }
    )
    assert {b for b, s in zip(table(again)["bucket"], table(again)["selected"], strict=True) if s} == {"ocr"}
    assert select(count)["buckets"]["count"]["selected"] == 3


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"ablation": "nested"}, "scored with ablation block"),
        ({"limit": 9}, "rows that the data does not have"),
        ({"from_scores": Path("/not/there")}, "holds no scores.parquet"),
        ({"layer_rule": "paper", "profile": "other"}, "scored with layers"),
        ({"data": "longer"}, "no score of row 40"),
    ],
)
def test_scores_of_something_else_are_refused(selected, pool, changes, word, tmp_path):
    config, _ = selected
    changes = dict(changes)
    if "profile" in changes:
        changes["profile"] = str(tmp_path / "profile.json")
        other = profile_of({f: [PLANTED[f], PLANTED[f] + 1] for f in KINDS}).to_json()
        Path(changes["profile"]).write_text(json.dumps(other), encoding="utf-8")
    if "data" in changes:
        changes |= {"data": str(tmp_path / "pool.json"), "image_root": pool.parent}
        turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
        more = pool.read_text(encoding="utf-8")[:-1] + "," + json.dumps({"conversations": turns}) + "]"
        Path(changes["data"]).write_text(more, encoding="utf-8")
    settings = {**vars(config), "from_scores": config.output, "output": tmp_path / "again", **changes}
    with pytest.raises(ConfigError, match=word):
        select(SelectConfig(**settings))


def test_a_messages_jsonl_pool(profile, tmp_path):
    """Byte-equal lines, a system turn, more than one answer; nothing is read outside the image root."""
    rng, lines = np.random.default_rng(0), []
    (tmp_path / "images").mkdir()
    for i in range(6):
        scene = world.sample_scene(rng)
        world.render(scene).save(tmp_path / "images" / f"{i}.png")
        turns = [{"role": "user", "content": f"<image>{world.QUESTIONS['ocr']}"}]
        turns += [{"role": "assistant", "content": world.answer(scene, "ocr")}]
        if i % 2:
            turns += [{"role": "user", "content": world.QUESTIONS["count"]}]
            turns += [{"role": "assistant", "content": world.answer(scene, "count")}]
        lines.append(
            json.dumps({"messages": turns, "images": [f"{i}.png"], "source": f"part{i % 2}"}, indent=None)
        )
    lines[2] = lines[2].replace(", ", " ,  ")
    lines[4] = lines[4].replace("4.png", "../../4.png")
    data = tmp_path / "rows.jsonl"
    data.write_bytes("\n".join(lines).encode() + b"\n{broken\n")
    config = SelectConfig(
        profile=str(profile), data=str(data), image_root=tmp_path / "images", output=tmp_path / "out",
        budget="0.8", method="visual-gain", device="cpu",
    )  # fmt: skip
    record = select(config)
    assert record["data"]["format"] == "messages-jsonl" and record["rows_kept"] == 5
    assert record["quarantine"] == {"bad_json": 1, "image_outside_root": 1}
    chosen = (config.output / "selected.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(chosen) == 4 and [lines.index(line) for line in chosen] == sorted(map(lines.index, chosen))
    assert set(table(config)["source"]) == {"part0", "part1"}
    tokens = dict(zip(table(config)["row"], table(config)["n_answer_tokens"], strict=True))
    assert tokens[1] > tokens[0]


def run_cli(*args: object):
    return CliRunner().invoke(main, ["select", *map(str, args), "--device", "cpu"])


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--functions", "smell"], "no function 'smell'"),
        (["--functions", "relation"], "relation was not measurable: 3 of 50 pairs answered"),
        (["--mix", "smell=1"], "no function 'smell'"),
        (["--budget", "2.5"], "--budget"),
    ],
)
def test_what_the_profile_does_not_have_exits_2(profile, pool, tmp_path, args, word):
    result = run_cli("--profile", profile, "--data", pool, "--output", tmp_path / "out", *args)
    assert result.exit_code == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_profile_of_another_depth_exits_2(pool, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_of({"ocr": [20]}, depth=28).to_json()), encoding="utf-8")
    result = run_cli("--profile", path, "--data", pool, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "num_layers 28, the model has 12" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_pool_without_a_usable_row_exits_3(profile, tmp_path):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "three"}]
    data = tmp_path / "pool.json"
    data.write_text(json.dumps([{"image": "gone.png", "conversations": turns}] * 3), encoding="utf-8")
    result = run_cli("--profile", profile, "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 3 and "no usable row" in result.stderr


def test_a_pool_that_the_model_cannot_encode_exits_3(profile, tmp_path):
    turns = [{"from": "human", "value": "<|image_pad|> ?"}, {"from": "gpt", "value": "three"}]
    data = tmp_path / "pool.json"
    data.write_text(json.dumps([{"conversations": turns}] * 3), encoding="utf-8")
    with pytest.raises(DataError, match="no row of the pool can be encoded"):
        select(SelectConfig(profile=str(profile), data=str(data), output=tmp_path / "out", device="cpu"))


def test_a_second_run_is_already_done(selected, capsys):
    config, _ = selected
    before = (config.output / "manifest.json").read_bytes()
    select(config)
    assert "already done" in capsys.readouterr().out
    assert (config.output / "manifest.json").read_bytes() == before
