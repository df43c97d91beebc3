"""`vfl-train select` on small pools of the phantom's world, with the bundled phantom."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from vfl_train.cli import main, worker
from vfl_train.config import SelectConfig
from vfl_train.data_select import run as select_run
from vfl_train.data_select.run import select
from vfl_train.errors import ConfigError, DataError
from vfl_train.phantom import world
from vfl_train.phantom.architecture import LAYERS, PLANTED, WIDTH
from vfl_train.phantom.datasets import write_pool
from vfl_train.schemas import LANGUAGE, FunctionProfile, ModelInfo, Profile, score_columns
from vfl_train.training import launch

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
    # The model is not needed, and what is said of it is what scored the rows.
    other = {"model": "not/loaded", "from_scores": config.output, "output": tmp_path / "again"}
    again = SelectConfig(**{**vars(config), **other})
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
        ({"limit": 9}, "the first rows 40, not 9"),
        ({"from_scores": Path("/not/there")}, "holds no scores.parquet"),
        ({"layer_rule": "paper", "profile": "other"}, "scored with the layers"),
        ({"data": "longer"}, "data of sha256"),
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


# --- caps, copies, doubts, other trainers -----------------------------------------------------------


@pytest.fixture(scope="module")
def spoilt(profile, tmp_path_factory):
    """(config, row ids by what is wrong) of a run over 60 rows: wrong labels, a copy, a re-encoded copy."""
    folder = tmp_path_factory.mktemp("spoilt")
    path = write_pool(folder, 60, 4, {"ocr": 0.5, "emotion": 0.5})
    rows = json.loads(path.read_text(encoding="utf-8"))
    kinds = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    moods = [row for row in rows if kinds[row["id"]] == "emotion"]
    for row in moods[:3]:
        said = row["conversations"][1]
        said["value"] = next(mood for mood in world.MOODS if mood != said["value"])
    copy, scaled = dict(moods[5], id="copy"), dict(moods[6], id="scaled", image="images/scaled.png")
    Image.open(folder / moods[6]["image"]).resize((128, 128)).save(folder / "images" / "scaled.png")
    rows += [copy, scaled]
    for i, row in enumerate(rows):
        row["source"] = "ab"[i % 2]
    path.write_text(json.dumps(rows), encoding="utf-8")
    config = SelectConfig(
        profile=str(profile), data=str(path), output=folder / "out", budget="20", device="cpu",
        functions=("ocr", "emotion"), cap_per_source="0.5", emit="swift",
    )  # fmt: skip
    record = select(config)
    places = {row["id"]: i for i, row in enumerate(rows)}
    return config, record, {"wrong": [places[r["id"]] for r in moods[:3]], "copies": [60, 61],
                            "of": [places[moods[5]["id"]], places[moods[6]["id"]]]}  # fmt: skip


def test_copies_are_flagged_and_one_of_each_stays(spoilt):
    config, record, rows = spoilt
    flags = dict(zip(table(config)["row"], table(config)["flags"], strict=True))
    for copy, of in zip(rows["copies"], rows["of"], strict=True):
        assert flags[copy] == [f"near_duplicate:{of}"] and flags[of] == []
    assert record["flags"]["near_duplicate"] == 2
    chosen = {r for r, s in zip(table(config)["row"], table(config)["selected"], strict=True) if s}
    assert not chosen & set(rows["copies"])


def test_wrong_labels_are_doubted_and_not_picked(spoilt):
    config, record, rows = spoilt
    doubted = {
        r
        for r, f in zip(table(config)["row"], table(config)["flags"], strict=True)
        if "suspicious_label" in f
    }
    assert doubted >= set(rows["wrong"]) and len(doubted) == record["flags"]["suspicious_label"] <= 5
    chosen = {r for r, s in zip(table(config)["row"], table(config)["selected"], strict=True) if s}
    assert not chosen & doubted
    assert "Labels in doubt" in (config.output / "report.html").read_text(encoding="utf-8")


def test_a_source_gives_no_more_than_its_share_of_the_budget(spoilt, tmp_path):
    config, record, _ = spoilt
    columns = table(config)
    picked = [s for s, taken in zip(columns["source"], columns["selected"], strict=True) if taken]
    assert record["rows_selected"] == 20 and picked.count("a") == picked.count("b") == 10
    few = {**vars(config), "from_scores": config.output, "emit": None}
    capped = select(SelectConfig(**{**few, "cap_per_source": "3", "output": tmp_path / "3"}))
    assert capped["rows_selected"] == 6
    freely = select(SelectConfig(**{**few, "cap_per_source": None, "output": tmp_path / "free"}))
    assert freely["rows_selected"] == 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "50", "functions": ("emotion",)}, "the wanted buckets hold only"),
        ({"budget": "50", "mix": "ocr=0.1"}, "the shares of --mix take only 5 of the 50"),
        ({"budget": "62", "fill": True}, "near-duplicates leave only 60 of the 62"),
        ({"budget": "62", "method": "loss"}, "near-duplicates leave only 60 of the 62"),
        ({"cap_per_source": "3", "method": "loss"}, "near-duplicates and --cap-per-source leave only 6"),
    ],
)
def test_fewer_rows_than_the_budget_are_explained(spoilt, tmp_path, capsys, changes, said):
    config, *_ = spoilt
    settings = {**vars(config), "emit": None, "cap_per_source": None, "from_scores": config.output}
    select(SelectConfig(**{**settings, "output": tmp_path / "out", **changes}))
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_flags_survive_ranking_from_scores(spoilt, tmp_path):
    config, record, _ = spoilt
    settings = {
        **vars(config),
        "from_scores": config.output,
        "output": tmp_path / "again",
        "method": "random",
    }
    again = SelectConfig(**settings)
    assert select(again)["flags"] == record["flags"]
    assert table(again)["flags"] == table(config)["flags"]


def test_side_files_of_another_trainer(spoilt):
    config, record, _ = spoilt
    assert "swift.jsonl" in record["emitted"]
    lines = [json.loads(line) for line in (config.output / "swift.jsonl").open(encoding="utf-8")]
    assert len(lines) == record["rows_selected"]
    assert {line["channel"] for line in lines} == {"ocr", "emotion"}


def test_a_dry_run_says_what_it_costs_and_writes_nothing(profile, pool, tmp_path, capsys):
    config = SelectConfig(
        profile=str(profile), data=str(pool), output=tmp_path / "out", device="cpu", dry_run=True
    )
    assert select(config) == {}
    said = capsys.readouterr().out
    assert re.search(r"about [\d.e+]+ rows/s a process: 40 rows in [\d.e-]+ hours with one process", said)
    assert "GPU" not in said and "budget 8 rows of at most 40" in said and not config.output.exists()


def test_settings_reach_the_processes_of_a_launched_run(tmp_path):
    """What the launcher writes, the worker turns back into the same settings for the same command."""
    config = SelectConfig(profile="p.json", data="d.json", output=tmp_path, num_processes=2, mix="ocr=0.5")
    (tmp_path / launch.CONFIG).write_text(launch.handed_over(config), encoding="utf-8")
    got: list[SelectConfig] = []
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("RANK", "0")
        changed.setattr(worker, "_end_with_the_launcher", lambda: None)
        assert worker.main(tmp_path, got.append) == 0
    assert got == [config] and worker._command(type(got[0])) is select
    assert launch.wanted_processes(config) == 2
