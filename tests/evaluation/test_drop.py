"""`eval --drop-from` on the bundled phantom, whose layers are known: the planted order shows in the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from vfl_train.cli import main
from vfl_train.config import EvalConfig
from vfl_train.errors import ConfigError
from vfl_train.evaluation.drop import DropFrom
from vfl_train.evaluation.run import evaluate
from vfl_train.phantom import world
from vfl_train.phantom.architecture import LAYERS, PLANTED
from vfl_train.schemas import wilson

FROM = (0, *PLANTED.values(), LAYERS - 1)


def config_of(output: Path, **settings) -> EvalConfig:
    return EvalConfig(**{"output": output, "device": "cpu", "pairs": 2, **settings})


def card_of(folder: Path) -> dict:
    return json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """(folder, scores) of all functions with the image dropped from each planted layer on."""
    folder = tmp_path_factory.mktemp("drop") / "out"
    return folder, evaluate(config_of(folder, drop_from=FROM))


@pytest.mark.parametrize("function", PLANTED)
def test_a_function_lives_as_long_as_its_layer_reads_the_image(dropped, function):
    """Dropped above its planted layer nothing is lost; from that layer on, at most chance is left."""
    s = dropped[1][function]
    assert s.accuracy == 1, "the phantom does not know its probes: the test shows nothing"
    for layer in FROM:
        found = s.drop_from[str(layer)]
        if layer > PLANTED[function]:
            assert found["accuracy"] == 1 and found["delta"] == 0
        else:
            assert found["accuracy"] <= 0.5 and found["delta"] <= -50


def test_what_the_scorecard_says_of_drops(dropped):
    folder, scores = dropped
    card = card_of(folder)
    assert card["drop_from"].pop("rows") > len(PLANTED) * 4 * len(FROM), "one pass a row and more for some"
    assert card["drop_from"] == {
        "layers": sorted(FROM, reverse=True), "path": "engine", "reference_rows": 0, "reasons": {}
    }  # fmt: skip
    ocr = card["functions"]["ocr"]["drop_from"]
    assert list(ocr) == [str(layer) for layer in sorted(FROM, reverse=True)]
    assert ocr["10"] == {"accuracy": 0.0, "n": 4, "ci95": wilson(0, 4), "delta": -100.0}
    assert scores["ocr"].drop_from == ocr


def test_the_reference_path_gives_the_same_scores(dropped, tmp_path):
    some = {"drop_from": (10, 7, 3), "functions": ("emotion", "grounding", "ocr")}
    scores = evaluate(config_of(tmp_path / "out", **some, path="reference"))
    assert card_of(tmp_path / "out")["drop_from"]["path"] == "reference"
    for name, s in scores.items():
        assert s.drop_from == {k: dropped[1][name].drop_from[k] for k in ("10", "7", "3")}


def test_order_and_repeats_do_not_matter_and_nothing_runs_twice(dropped, capsys):
    folder, scores = dropped
    again = evaluate(config_of(folder, drop_from=(*reversed(FROM), 5, 5)))
    assert again == scores
    said = capsys.readouterr().out
    assert "already done" in said and "image dropped from a layer" in said
    with pytest.raises(ConfigError, match=r"holds another run: options\.drop_from"):
        evaluate(config_of(folder, drop_from=(5,)))


@pytest.mark.parametrize("layer", [LAYERS, 99])
def test_a_layer_the_model_does_not_have_is_named(tmp_path, layer):
    with pytest.raises(ConfigError, match=f"--drop-from {layer} is outside this model's layers 0-11"):
        evaluate(config_of(tmp_path / "out", drop_from=(5, layer)))
    assert not (tmp_path / "out").exists()


def test_changes_are_paired_over_questions_with_an_image():
    """A question without an image counts for neither side."""
    drops = DropFrom((2, 1))
    untouched = [True, False, True, True]
    after = [{2: True, 1: False}, {2: True, 1: False}, None, {2: True, 1: True}]
    assert drops.scores(untouched, after) == {
        "2": {"accuracy": 1.0, "n": 3, "ci95": wilson(3, 3), "delta": pytest.approx(100 / 3)},
        "1": {"accuracy": 1 / 3, "n": 3, "ci95": wilson(1, 3), "delta": pytest.approx(-100 / 3)},
    }
    assert drops.scores([True], [None]) is None


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Labelled rows of three sources: read in deep layers, read in low ones beside a question of text only,
    and of text only."""
    folder, rng, lines = tmp_path_factory.mktemp("rows"), np.random.default_rng(3), []

    def row(question: str, answer: str, source: str, **image) -> dict:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "source": source, **image}

    for i in range(4):
        scene = world.sample_scene(rng)
        world.render(scene).save(folder / f"{i}.png")
        for function, source in (("ocr", "text"), ("emotion", "faces")):
            question = f"<image>{world.QUESTIONS[function]}"
            lines.append(row(question, world.answer(scene, function), source, images=[f"{i}.png"]))
    (first, reply), *_ = world.LANGUAGE
    lines += [row(first, reply, "faces"), row(first, reply, "blind")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


def test_labelled_rows_give_the_papers_table(rows, tmp_path):
    args = ["eval", "--data", str(rows), "--drop-from", "11,7,0", "--device", "cpu"]
    result = CliRunner().invoke(main, [*args, "--output", str(tmp_path / "out")], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    functions = card_of(tmp_path / "out")["functions"]
    accuracy = {
        name: [d["accuracy"] for d in functions[name]["drop_from"].values()] for name in ("text", "faces")
    }
    assert functions["text"]["accuracy"] == 1 and accuracy["text"] == [1, 0, 0]
    assert accuracy["faces"][:2] == [1, 1] and accuracy["faces"][2] <= 0.5
    assert functions["faces"]["n"] == 5 and functions["faces"]["drop_from"]["7"]["n"] == 4
    assert "drop_from" not in functions["blind"], "without an image there is nothing to drop"
    for line in (r"text +│ 4 │ 100.0% .*100.0% \(\+0.0\).* 0.0% \(-100.0\)", "blind +│ 0 │ no image"):
        assert re.search(line, result.output), result.output
