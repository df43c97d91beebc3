"""`vfl-train eval` with the bundled phantom: accuracy, an adapter beside its base, the gate, data rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from world_rows import world_rows, write_jsonl

from vfl_train.cli import main
from vfl_train.config import EvalConfig, LoraConfig
from vfl_train.data.rows import user_message
from vfl_train.errors import ConfigError, DataError, VerificationError
from vfl_train.evaluation import score as module
from vfl_train.evaluation.questions import Question
from vfl_train.evaluation.run import check_gate, evaluate
from vfl_train.phantom import world
from vfl_train.schemas import FunctionScore, wilson


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter on the ocr layer that spoils it: random weights, as large as the layer's own."""
    from vfl_train.models import VisionLanguageModel
    from vfl_train.runs import RunFolder
    from vfl_train.training.adapter import apply_lora, trainable_parameters
    from vfl_train.training.plan import build_plan, choose_layers
    from vfl_train.training.run import save_adapter_folder

    folder = tmp_path_factory.mktemp("adapter") / "spoilt"
    vlm = VisionLanguageModel.load("phantom", device="cpu")
    plan = build_plan(choose_layers(vlm.info, layers="10"), vlm, lora_r=4)
    adapted = apply_lora(vlm.model, plan, r=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(adapted):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    config = LoraConfig(model="phantom", layers="10", data="rows.jsonl", output=folder)
    with RunFolder.open(folder, {"layers": "10"}) as run:
        save_adapter_folder(adapted.eval(), vlm, plan, config, run)
    return folder


def config_of(output: Path, **settings) -> EvalConfig:
    return EvalConfig(
        **{"output": output, "functions": ("emotion", "ocr"), "pairs": 10, "device": "cpu", **settings}
    )


@pytest.fixture(scope="module")
def spoilt(adapter, tmp_path_factory):
    """(config, scores) of one run with the adapter."""
    config = config_of(tmp_path_factory.mktemp("eval") / "out", adapter=str(adapter))
    return config, evaluate(config)


def card_of(folder: Path) -> dict:
    return json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))


def test_the_phantom_answers_its_probes(tmp_path):
    scores = evaluate(config_of(tmp_path / "out"))
    for name in ("emotion", "ocr"):
        assert scores[name].accuracy >= 0.9 and scores[name].n == 20
        assert scores[name].ci95 == wilson(scores[name].accuracy * 20, 20)
    card = card_of(tmp_path / "out")
    assert card.pop("questions").keys() == {"name", "sha256"}
    assert card == {
        "model": "phantom", "adapter": None, "manifest_sha256": None,
        "functions": {
            name: {"accuracy": s.accuracy, "n": 20, "ci95": s.ci95} for name, s in scores.items()
        },
    }  # fmt: skip


def test_an_adapter_is_judged_beside_its_base(spoilt, tmp_path):
    config, scores = spoilt
    base = evaluate(config_of(tmp_path / "base"))
    for name, s in scores.items():
        assert s.base_accuracy == base[name].accuracy
        assert s.delta == pytest.approx(100 * (s.accuracy - s.base_accuracy))
    assert scores["ocr"].delta < -30, "random weights did not spoil the layer: the test shows nothing"
    card = card_of(config.output)
    assert card["adapter"] == "spoilt"
    found = card["functions"]["ocr"]
    assert found.keys() == {
        "accuracy", "n", "ci95", "base_accuracy", "delta", "delta_ci95", "gained", "lost",
    }  # fmt: skip
    assert 100 * (found["gained"] - found["lost"]) / found["n"] == pytest.approx(found["delta"])
    assert found["delta_ci95"][0] < found["delta"] < found["delta_ci95"][1] < 0


@pytest.mark.parametrize("size", [1, 7])
def test_the_batch_size_changes_nothing(spoilt, tmp_path, size):
    config, _ = spoilt
    settings = {**vars(config), "batch_size": size, "pairs": 3, "output": tmp_path / "out"}
    few = evaluate(EvalConfig(**settings))
    assert few == evaluate(EvalConfig(**{**settings, "batch_size": 32, "output": tmp_path / "other"}))


def test_the_gate_exits_4_after_writing_and_every_time(adapter, tmp_path):
    args = ["eval", "--adapter", str(adapter), "--functions", "ocr", "--pairs", "4", "--device", "cpu"]
    args += ["--output", str(tmp_path / "out"), "--fail-if-drop", "ocr=1"]
    first = CliRunner().invoke(main, args)
    assert first.exit_code == 4 and "ocr lost" in first.stderr and "allowed 1" in first.stderr
    assert card_of(tmp_path / "out")["functions"]["ocr"]["delta"] < -1
    again = CliRunner().invoke(main, args)
    assert "already done" in again.stdout
    assert again.exit_code == 4, "a failed gate does not pass the second time"
    assert again.stderr.splitlines()[-1] == first.stderr.splitlines()[-1]


def test_an_unknown_function_in_the_gate_exits_2_before_anything_is_written(adapter, tmp_path):
    args = ["eval", "--adapter", str(adapter), "--functions", "ocr", "--pairs", "4", "--device", "cpu"]
    args += ["--output", str(tmp_path / "out"), "--fail-if-drop", "smell=1"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and "'smell', which is not measured" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_gate_allows():
    score = lambda delta: FunctionScore(0.5, 10, [0.0, 1.0], 0.5, delta)  # noqa: E731
    scores = {"ocr": score(-2.0), "count": score(-3.5), "relation": score(9.0)}
    check_gate(scores, {})
    check_gate(scores, {"ocr": 2.0, "relation": 0.0})
    with pytest.raises(VerificationError, match=r"ocr lost 2.0 points \(allowed 1.5\); count lost 3.5"):
        check_gate(scores, {"ocr": 1.5, "count": 0.0})


def test_another_adapter_under_the_same_name_is_not_already_done(adapter, spoilt, tmp_path):
    """The scorecard of a folder is of the weights that were there, not of the folder's name."""
    import shutil

    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    config = config_of(tmp_path / "out", adapter=str(copy), pairs=2)
    evaluate(config)
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({k: v * 0.5 for k, v in weights.items()}, copy / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"holds another run: inputs\.model"):
        evaluate(config)


# --- rows as questions ----------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows of two sources, one of them wrong throughout; one row of two turns and one of text only."""
    lines = world_rows(tmp_path, ["emotion"] * 8, seed=1)
    for i, line in enumerate(lines):
        line["source"] = ("wrong", "right")[i % 2]
        if i % 2 == 0:
            line["messages"][1]["content"] = "no mood at all"
    lines[0]["messages"] = lines[0]["messages"] * 2
    lines[0]["messages"][2] = {"role": "user", "content": world.QUESTIONS["count"]}
    question, reply = world.LANGUAGE[0]
    lines.append(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}
    )
    return write_jsonl(tmp_path / "rows.jsonl", lines)


def test_rows_are_scored_by_source(rows, tmp_path):
    scores = evaluate(config_of(tmp_path / "out", data=str(rows), functions=()))
    assert {name: s.n for name, s in scores.items()} == {"right": 4, "wrong": 3, "rows": 1}
    assert scores["right"].accuracy >= 0.75 and scores["wrong"].accuracy == 0
    only = evaluate(config_of(tmp_path / "only", data=str(rows), functions=("right",)))
    assert only == {"right": scores["right"]}


def test_a_source_that_is_not_there_is_named(rows, tmp_path):
    with pytest.raises(ConfigError, match="the source 'smell'"):
        evaluate(config_of(tmp_path / "out", data=str(rows), functions=("right", "smell")))
    rows.write_text(rows.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no row to score"):
        evaluate(config_of(tmp_path / "out", data=str(rows), functions=()))


def test_a_row_that_cannot_be_asked_is_quarantined_and_the_rest_is_scored(rows, tmp_path, capsys):
    lines = rows.read_text(encoding="utf-8").splitlines()
    broken = json.loads(lines[3])
    broken["messages"][0]["content"] = "<image>what is <|image_pad|> here?"
    gone = json.loads(lines[5]) | {"images": ["nowhere.png"]}
    rows.write_text("\n".join([*lines, json.dumps(broken), json.dumps(gone)]) + "\n", encoding="utf-8")
    scores = evaluate(config_of(tmp_path / "out", data=str(rows), functions=()))
    assert {name: s.n for name, s in scores.items()} == {"right": 4, "wrong": 3, "rows": 1}
    assert "2 rows cannot be used" in capsys.readouterr().out
    assert card_of(tmp_path / "out")["quarantined"] == 2
    text = (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    assert [(e["line"], e["code"]) for e in entries] == [(10, "placeholder_in_text"), (11, "image_missing")]
    rows.write_text(json.dumps(broken) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no row can be encoded by this model; row 0"):
        evaluate(config_of(tmp_path / "none", data=str(rows), functions=()))


def test_a_model_is_judged_beside_another_as_an_adapter_is_beside_its_base(tmp_path):
    """The twin answers most of what the phantom answers; compared with itself nothing changes."""
    settings = {"functions": ("emotion",), "pairs": 6}
    same = evaluate(config_of(tmp_path / "same", base="phantom", **settings))["emotion"]
    assert (same.delta, same.gained, same.lost) == (0.0, 0, 0)
    alone = evaluate(config_of(tmp_path / "alone", model="phantom-unplanted", **settings))["emotion"]
    beside = evaluate(config_of(tmp_path / "beside", base="phantom-unplanted", **settings))["emotion"]
    assert beside.base_accuracy == alone.accuracy and beside.accuracy == same.accuracy
    assert card_of(tmp_path / "beside")["base"] == "phantom-unplanted"
    with pytest.raises(ConfigError, match="holds another run"):
        evaluate(config_of(tmp_path / "beside", base="phantom", **settings))
    with pytest.raises(ConfigError, match="leave --base out"):
        config_of(tmp_path / "both", base="phantom", adapter="adapter")


def test_how_rows_are_judged(tmp_path):
    """Rows that expect an option, letter and words: answers give the words alone, and hold no box."""
    rows = world_rows(tmp_path, ["ocr"] * 3, 2, lambda scene, function: f"A. {world.answer(scene, function)}")
    data = write_jsonl(tmp_path / "options.jsonl", rows)
    accuracy = {
        match: evaluate(config_of(tmp_path / match, data=str(data), functions=(), match=match))[
            "options"
        ].accuracy
        for match in ("exact", "choice", "iou")
    }
    assert accuracy == {"exact": 0, "choice": 1, "iou": 0}
    with pytest.raises(ConfigError, match="--match is for --data"):
        config_of(tmp_path / "out", match="iou")


def test_of_an_adapter_the_adapted_model_is_dropped(adapter, spoilt, tmp_path):
    """And the gate looks at the adapter's own change, not at what the drop costs."""
    settings = {"adapter": str(adapter), "drop_from": (11, 0)}
    scores = evaluate(config_of(tmp_path / "out", **settings, fail_if_drop="emotion=5"))
    before = spoilt[1]
    for name, s in scores.items():
        assert (s.accuracy, s.delta) == (before[name].accuracy, before[name].delta)
        for found in s.drop_from.values():
            assert found["delta"] == pytest.approx(100 * (found["accuracy"] - s.accuracy))
    assert scores["ocr"].drop_from["11"]["accuracy"] < scores["ocr"].base_accuracy
    assert scores["emotion"].drop_from["0"]["delta"] < -5


def test_chunks_are_bounded_by_prompts_and_tokens(monkeypatch):
    asked = [Question("f", (user_message(text, 0),), (), "") for text in ("a", "a a", "a", "a a a", "a")]
    vlm = SimpleNamespace(
        prompt_of=lambda messages, images, videos: SimpleNamespace(length=10 * len(messages[0].text.split()))
    )
    lengths = lambda: [[p.length for _, p in c] for c in module.chunks(vlm, asked, [])]  # noqa: E731
    assert lengths() == [[10, 20, 10, 30, 10]]
    monkeypatch.setattr(module, "CHUNK_TOKENS", 30)
    assert lengths() == [[10, 20], [10], [30], [10]]
    monkeypatch.setattr(module, "CHUNK_TOKENS", 5)
    assert lengths() == [[10], [20], [10], [30], [10]], "a prompt over the budget goes alone"
    monkeypatch.setattr(module, "CHUNK_TOKENS", 1000)
    monkeypatch.setattr(module, "CHUNK", 2)
    assert lengths() == [[10, 20], [10, 30], [10]]


def test_a_dry_run_says_how_much_and_writes_nothing(adapter, tmp_path, capsys):
    settings = {"adapter": str(adapter), "pairs": 3, "drop_from": (5, 3)}
    assert evaluate(config_of(tmp_path / "out", **settings, dry_run=True)) == {}
    said = capsys.readouterr().out
    assert "12 questions: emotion 6, ocr 6" in said
    assert "48 answers: 12 as the model is, 12 by its base, 24 with the image dropped" in said
    assert re.search(r"has \d\d tokens", said) and re.search(r"about \d+\.\d min", said)
    evaluate(config_of(tmp_path / "out", pairs=3, base="phantom-unplanted", dry_run=True))
    assert "24 answers: 12 as the model is, 12 by its base" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
