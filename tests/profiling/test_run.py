"""`vfl-train profile` of the bundled phantom: the planted layers, the file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from vfl_train.cli import main
from vfl_train.config import ProfileConfig
from vfl_train.errors import DataError
from vfl_train.functions.probes import save_probe_set
from vfl_train.phantom.architecture import LAYERS, PLANTED
from vfl_train.phantom.datasets import probe_set
from vfl_train.profiling import run
from vfl_train.profiling.measure import _drop_profile
from vfl_train.profiling.run import profile
from vfl_train.schemas import Profile

FUNCTIONS = ("emotion",)  # the surest of the phantom's: every pair is answered


def config_of(output: Path, **settings) -> ProfileConfig:
    return ProfileConfig(
        **{
            "output": output, "functions": FUNCTIONS, "pairs": 22, "control_pairs": 2, "device": "cpu",
            "batch_tokens": 2048, **settings,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(config, profile) of one run."""
    config = config_of(tmp_path_factory.mktemp("profile") / "out", functions=FUNCTIONS)
    return config, profile(config)


def run_cli(output: Path, *args: object):
    return CliRunner().invoke(
        main, ["profile", "--output", str(output), "--device", "cpu", "--pairs", "2", *map(str, args)]
    )


def test_the_planted_layers_are_found(found):
    _, result = found
    for name in FUNCTIONS:
        f = result.functions[name]
        assert f.status == "ok" and f.pairs == 22 and f.pairs_answered >= 20
        assert f.peak_layer == PLANTED[name] and f.flip_block == [PLANTED[name]]
        assert PLANTED[name] in f.layers and not f.distributed
        assert f.change_rate[f.peak_layer] > 0.9 and f.flip_rate[f.peak_layer] > 0.9
        low, high = f.ci95[f.peak_layer]
        assert 0 <= low <= f.change_rate[f.peak_layer] <= high <= 1


def test_controls(found):
    f = found[1].functions["emotion"]
    assert set(f.controls) == {"self", "nuisance", "unrelated", "noise"}
    assert f.controls["self"] == [0.0] * LAYERS
    assert max(f.controls["nuisance"]) < 0.5 < f.controls["unrelated"][PLANTED["emotion"]]
    assert f.details["control_directions"] == {"self": 4, "nuisance": 4, "unrelated": 4, "noise": 4}


def test_the_file_follows_the_contract(found):
    config, result = found
    value = json.loads((config.output / "profile.json").read_text(encoding="utf-8"))
    assert Profile.load(config.output) == result == Profile.load(config.output / "profile.json")
    assert next(iter(value.items())) == ("schema_version", 1)
    assert value.keys() >= {
        "model", "intervention", "phase", "path", "dtype", "seed", "versions", "probe_set", "functions",
        "drop_curve", "drop_plan", "interaction", "cost",
    }  # fmt: skip
    assert value["path"] == "engine" and value["dtype"] == "float32"
    assert value["model"] == {
        "name_or_path": "phantom", "revision": None, "model_type": "qwen2_5_vl", "num_layers": LAYERS,
        "hidden_size": 128,
    }  # fmt: skip
    f = value["functions"]["emotion"]
    for rates in (f["change_rate"], f["flip_rate"], f["ci95"], *f["controls"].values()):
        assert len(rates) == LAYERS
    assert Image.open(config.output / "profile.png").format == "PNG"
    assert "<h3>emotion</h3>" in (config.output / "report.html").read_text(encoding="utf-8")


def test_the_settings_say_what_was_in_force(found):
    settings = found[1].settings
    assert (settings["pairs"], settings["control_pairs"], settings["own_probes"]) == (22, 2, False)
    assert settings["drop_points"] == 1.0
    assert (settings["answer_tokens"], settings["box_answer_tokens"]) == (32, 64)


def test_a_limit_is_what_counts_as_pairs(tmp_path):
    assert profile(config_of(tmp_path / "out", pairs=3, limit=1, control_pairs=0)).settings["pairs"] == 1


def test_an_estimate_that_fails_leaves_an_older_run_alone(tmp_path, monkeypatch):
    profile(config_of(tmp_path / "out", pairs=1, control_pairs=0))

    def fail(*args):
        raise DataError("no forward fits")

    monkeypatch.setattr(run, "estimate", fail)
    with pytest.raises(DataError, match="no forward fits"):
        profile(config_of(tmp_path / "out", pairs=2, control_pairs=0, overwrite=True))
    assert Profile.load(tmp_path / "out").settings["pairs"] == 1


def test_drop_curve_and_plan(found):
    """From the layer after the planted one on, the image can go."""
    result, planted = found[1], PLANTED["emotion"]
    curve, plan = result.drop_curve["emotion"], result.drop_plan["emotion"]
    assert curve["n"] == 2 * result.functions["emotion"].pairs_answered
    assert len(curve["accuracy"]) == len(curve["ci95"]) == LAYERS + 1 and curve["accuracy"][-1] == 1.0
    assert max(curve["accuracy"][: planted + 1]) < 0.7 and min(curve["accuracy"][planted + 1 :]) > 0.95
    assert all(low <= a <= high for a, (low, high) in zip(curve["accuracy"], curve["ci95"], strict=True))
    assert plan["allowed_points"] == 1.0 and plan["points_lost"] <= 1.0
    assert plan["from_layer"] >= planted + 1


def test_what_the_joint_swaps_say(found):
    f, planted = found[1].functions["emotion"], PLANTED["emotion"]
    details = f.details
    assert details["all_layers"] == details["from_layer"][0] == details["up_to_layer"][-1] > 0.9
    assert min(details["from_layer"][: planted + 1]) > 0.9 > 0.1 > max(details["from_layer"][planted + 1 :])
    assert max(details["up_to_layer"][:planted]) < 0.1 < 0.9 < min(details["up_to_layer"][planted:])
    assert details["block"] == f.flip_rate[planted] and details["base_changed"] == 0.0


def test_examples_say_what_the_swap_changed(found):
    examples = found[1].functions["emotion"].examples
    assert len(examples) == 3
    for e in examples:
        assert e.keys() == {"pair", "question", "answer_a", "answer_b", "said", "said_swapped"}
        assert (e["said"], e["said_swapped"]) == (e["answer_a"], e["answer_b"])


def test_cost(found):
    """All layers singly, from each on, up to each and dropped from each, controls and flips, for a few
    forwards; the naive way would take one a row."""
    cost, f = found[1].cost, found[1].functions["emotion"]
    rows = 2 * f.pairs_answered * (1 + 3 * LAYERS - 3 + LAYERS)
    assert rows < cost["rows"] < 1.5 * rows and cost["reference_rows"] == 0 and cost["reasons"] == {}
    assert f.details["cost"]["sweep_forwards"] < cost["plain_forwards"] < 12 < rows / (2 * f.pairs_answered)
    assert cost["token_layers"] == f.details["cost"]["token_layers"] > 0 and cost["seconds"] > 0
    assert found[1].interaction == {}  # of one function


def test_a_second_run_is_already_done(found, capsys):
    config, result = found
    before = (config.output / "manifest.json").read_bytes()
    assert profile(config) == result
    assert "already done" in capsys.readouterr().out
    assert (config.output / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("intervention", ["drop", "drop-from"])
def test_drops(tmp_path, intervention):
    config = config_of(tmp_path / "out", intervention=intervention)
    f = profile(config).functions["emotion"]
    assert f.status == "ok" and f.flip_rate == [] and f.controls == {} and f.flip_block == []
    rates, planted = f.change_rate, PLANTED["emotion"]
    assert f.peak_layer == planted and planted in f.layers and not f.distributed
    if intervention == "drop-from":
        assert min(rates[: planted + 1]) > 0.5 > max(rates[planted + 1 :])
    else:
        assert rates[planted] > 0.5 > max(r for k, r in enumerate(rates) if abs(k - planted) > 1)
    found = Profile.load(config.output)
    assert found.intervention == intervention
    if intervention == "drop-from":
        wrong = [1 - a for a in found.drop_curve["emotion"]["accuracy"][:-1]]
        assert wrong == pytest.approx(rates)  # here what is changed is wrong
        assert found.drop_plan["emotion"]["from_layer"] >= planted + 1
    else:
        assert found.drop_curve == found.drop_plan == {}


def test_distributed_speaks_of_flip_blocks_alone():
    wide = _drop_profile(False, 20, 20, [0.9] * LAYERS, [[0.8, 1.0]] * LAYERS)
    assert len(wide.layers) == LAYERS and not wide.distributed


def test_fewer_than_20_answered_pairs_are_not_measurable(tmp_path):
    found = profile(config_of(tmp_path / "out", pairs=19)).functions["emotion"]
    assert (found.status, found.pairs, found.peak_layer) == ("not_measurable", 19, None)
    assert found.layers == found.flip_block == found.examples == []
    assert found.change_rate[PLANTED["emotion"]] > 0.9  # measured and kept, but nothing is concluded
    assert Profile.load(tmp_path / "out").functions["emotion"] == found


def test_a_model_that_answers_no_pair_has_no_rates(tmp_path):
    save_probe_set(probe_set({"emotion": 2}, 0), tmp_path / "probes")
    path = tmp_path / "probes" / "pairs.jsonl"
    lines = [{**json.loads(line), "answer_a": "bored"} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert run_cli(tmp_path / "out", "--probes", tmp_path / "probes").exit_code == 0
    found = Profile.load(tmp_path / "out").functions["emotion"]
    assert (found.status, found.pairs_answered) == ("not_measurable", 0)
    assert Profile.load(tmp_path / "out").drop_curve == {}
    assert found.change_rate == found.flip_rate == [0.0] * 12
    assert found.ci95 == [[0.0, 1.0]] * 12


def test_a_probe_folder_gives_what_the_builtin_pairs_give(tmp_path):
    """The same pairs from files; a wrong expected answer makes a pair unanswered."""
    probes = probe_set({"emotion": 2}, 0)
    save_probe_set(probes, tmp_path / "probes")
    lines = (tmp_path / "probes" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "answer_b": "bored"})
    (tmp_path / "probes" / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run_cli(tmp_path / "out", "--probes", tmp_path / "probes")
    assert result.exit_code == 0, result.stderr
    found = Profile.load(tmp_path / "out")
    assert found.functions["emotion"].pairs_answered == 1
    assert found.probe_set["name"] == "probes" and found.settings["own_probes"] is True
    assert "pairs are used" not in result.stdout
    result = run_cli(tmp_path / "fewer", "--probes", tmp_path / "probes", "--limit", 1)
    assert "emotion: the first 1 of 2 pairs are used (--pairs)" in result.stdout.splitlines()


def test_images_of_unequal_size_exit_3_naming_the_line(tmp_path):
    probes = tmp_path / "probes"
    save_probe_set(probe_set({"emotion": 2}, 0), probes)
    Image.new("RGB", (64, 48)).save(probes / "emotion-001-b.png")
    result = run_cli(tmp_path / "out", "--probes", probes)
    assert result.exit_code == 3 and "line 2" in result.stderr and "sizes must be equal" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_refusals_exit_2_and_leave_the_folder_alone(tmp_path):
    result = run_cli(tmp_path / "out", "--functions", "smell")
    assert result.exit_code == 2 and "unknown function 'smell'" in result.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    for args in ((), ("--overwrite",)):
        result = run_cli(tmp_path / "mine", "--functions", "emotion", *args)
        assert result.exit_code == 2 and "did not write" in result.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_another_setting_is_another_run(tmp_path):
    assert run_cli(tmp_path / "out", "--functions", "emotion").exit_code == 0
    result = run_cli(tmp_path / "out", "--functions", "emotion", "--phase", "decode")
    assert result.exit_code == 2 and 'phase was "text", is now "decode"' in result.stderr


def test_dry_run_writes_nothing(tmp_path):
    result = run_cli(tmp_path / "out", "--functions", "emotion", "--dry-run")
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    line, everything = result.stdout.splitlines()
    assert line.startswith("emotion: 2 pairs, prompts of ") and " plain forwards an image" in line
    assert everything.startswith("about ") and "on 4 images" in everything


def test_a_prompt_that_the_model_cannot_take_exits_3_naming_the_line(tmp_path):
    save_probe_set(probe_set({"emotion": 2}, 0), tmp_path / "probes")
    path = tmp_path / "probes" / "pairs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    bad = json.dumps({**json.loads(lines[1]), "question": "how does <|image_pad|> feel ?"})
    for number, text in ((2, [lines[0], bad]), (1, [bad, lines[0]])):
        path.write_text("\n".join(text), encoding="utf-8")
        out = tmp_path / f"out-{number}"
        result = run_cli(out, "--probes", tmp_path / "probes")
        assert result.exit_code == 3 and f"emotion: line {number}: " in result.stderr
        assert "<|image_pad|>" in result.stderr and not (out / "profile.json").exists()
    assert not out.exists()  # the first pair is looked at before the folder is made


def test_the_reference_path_finds_the_same_and_says_its_name(tmp_path):
    found = [
        profile(config_of(tmp_path / p, pairs=2, control_pairs=1, path=p)) for p in ("engine", "reference")
    ]
    engine, reference = (f.functions["emotion"] for f in found)
    assert [f.path for f in found] == ["engine", "reference"]
    assert engine.change_rate == reference.change_rate and engine.flip_rate == reference.flip_rate
    assert found[0].drop_curve == found[1].drop_curve
    assert found[0].cost["token_layers"] < found[1].cost["token_layers"] / 4


def test_rows_that_the_engine_left_to_the_reference_path_are_told(tmp_path, monkeypatch, capsys):
    from vfl_train.interventions import engine

    monkeypatch.setattr(engine, "why_not", lambda row: "not today" if row.branch else None)
    found = profile(config_of(tmp_path / "out", pairs=2, control_pairs=0))
    there, rows = found.cost["reference_rows"], found.cost["rows"]
    assert 0 < there < rows and found.cost["reasons"] == {"not today": there} and found.path == "engine"
    assert f"{there} of {rows} rows ran on the reference path: not today ({there})" in capsys.readouterr().out
    monkeypatch.setattr(engine, "why_not", lambda row: "never")
    assert profile(config_of(tmp_path / "other", pairs=2, control_pairs=0)).path == "reference"
