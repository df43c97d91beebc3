"""`vfl-train knockout` and what reads its file: the contract, bad input, eval and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from planted_interference import planted_phantom, script

from vfl_train.cli import main
from vfl_train.config import EvalConfig, ExportConfig, KnockoutConfig, VerifyConfig
from vfl_train.errors import ConfigError
from vfl_train.evaluation.layers import show_touched
from vfl_train.evaluation.questions import Question
from vfl_train.evaluation.run import evaluate
from vfl_train.hub.export import export
from vfl_train.hub.samples import next_logits, sample_inputs
from vfl_train.hub.verify import verify
from vfl_train.interventions import knockout
from vfl_train.interventions.standing import standing
from vfl_train.knockout.plot import plot_bytes
from vfl_train.knockout.record import Knockout
from vfl_train.knockout.run import run_knockout, show, similarity, split, sweep_forwards
from vfl_train.models import VisionLanguageModel
from vfl_train.phantom import world
from vfl_train.phantom.architecture import LAYERS
from vfl_train.schemas import FunctionScore

LAYER = script().LAYER
KEYS = {"interaction", "margin", "layer", "held_out_gain", "ci95", "confirmed", "shots", "shot_rows"}


def write_rows(folder: Path, sources: dict[str, list[str]], answer=world.answer) -> Path:
    """Rows about scenes: `sources` maps a source to the functions that its rows ask for, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(3), []
    for i in range(max(map(len, sources.values()))):
        scene = world.sample_scene(rng)
        world.render(scene).save(folder / f"{i}.png")
        for source, functions in sources.items():
            if i < len(functions):
                turns = [
                    {"role": "user", "content": f"<image>{world.QUESTIONS[functions[i]]}"},
                    {"role": "assistant", "content": answer(scene, functions[i])},
                ]
                lines.append(json.dumps({"messages": turns, "images": [f"{i}.png"], "source": source}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The phantom with its interfering layer, as a plain transformers folder."""
    folder = tmp_path_factory.mktemp("planted")
    planted_phantom().model.save_pretrained(folder)
    planted_phantom().processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), {"mood": ["emotion"] * 24})


def config_of(model: Path | str, data: Path, output: Path, **settings) -> KnockoutConfig:
    return KnockoutConfig(
        **{"model": str(model), "data": str(data), "output": output, "device": "cpu",
           "max_new_tokens": 6, **settings}
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(model, rows, tmp_path_factory) -> tuple[Path, dict]:
    """(folder, content) of a run on the task that is interfered with."""
    folder = tmp_path_factory.mktemp("one") / "out"
    return folder, run_knockout(config_of(model, rows, folder))


def test_the_file_follows_the_contract(one, model):
    folder, found = one
    assert json.loads((folder / "knockout.json").read_text()) == json.loads(json.dumps(found))
    assert found.keys() >= KEYS | {"schema_version", "model", "module", "tasks", "cost", "versions"}
    assert len(found["interaction"]) == len(found["margin"]) == LAYERS
    assert (found["layer"], found["shots"], found["reason"]) == (LAYER, 10, "")
    assert found["held_out"]["n"] == 14 and found["held_out_gain"] >= 50
    assert found["ci95"][0] > 0 and found["ci95"][0] <= found["held_out_gain"] <= found["ci95"][1]
    assert found["tasks"].keys() == {"mood"} and found["tasks"]["mood"]["margin"] == found["margin"]
    assert found["confirmed"] is True and len(set(found["shot_rows"])) == 10
    assert set(found["shot_rows"]) < set(range(24)) and len(found["data"]["sha256"]) == 64
    assert "similarity" not in found
    assert Image.open(folder / "knockout.png").size[0] > 1000
    read = Knockout.load(folder)
    assert (read.layer, read.layer_of("mood"), read.layer_of("other")) == (LAYER, LAYER, LAYER)


def test_what_it_cost_is_said(one):
    """10 shots of 13 branches at half price, 14 held-out samples of two, generating what is wrong."""
    cost = one[1]["cost"]
    depth = LAYERS - 1  # of the last layer, nothing is counted here
    least = 10 * (1 + (depth + 1) / 2) + 14 * (1 + (depth - LAYER) / depth)
    assert cost["reference_rows"] == 0
    assert (
        least * 0.98 <= cost["plain_forwards"] <= 3 * least
    )  # prompts and what is fed of labels: not one length


def test_the_same_seed_gives_the_same_file(one, model, rows, tmp_path):
    again = run_knockout(config_of(model, rows, tmp_path / "again"))
    for key in (*KEYS, "tasks"):
        assert again[key] == one[1][key]
    other = run_knockout(config_of(model, rows, tmp_path / "other", seed=1))
    assert other["margin"] != one[1]["margin"]


def test_a_finished_run_is_not_run_again(one, model, rows, capsys):
    folder, found = one
    assert run_knockout(config_of(model, rows, folder))["layer"] == found["layer"]
    assert "already done" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds another run"):
        run_knockout(config_of(model, rows, folder, shots=9))


def test_several_tasks_are_chosen_for_apart_and_compared(model, tmp_path):
    data = write_rows(
        tmp_path / "data",
        {"mood": ["emotion"] * 24, "shape": ["recognition"] * 20, "near": ["relation"] * 20},
    )
    found = run_knockout(config_of(model, data, tmp_path / "out", module="attention"))
    tasks = found["tasks"]
    assert {name: t["layer"] for name, t in tasks.items()} == {"mood": LAYER, "shape": None, "near": None}
    assert tasks["shape"]["held_out_gain"] is None and "chance" in tasks["shape"]["reason"]
    assert tasks["shape"]["candidate"]["ci95"][0] <= 0
    assert found["shots"] == 30 and found["held_out"]["n"] == 34
    similar = found["similarity"]
    assert similar["tasks"] == list(tasks) and len(similar["merges"]) == 2
    assert np.diag(np.array(similar["margin"], float)) == pytest.approx(1)
    assert sorted(similar["order"]) == [0, 1, 2]


@pytest.mark.parametrize("module", ["mlp", "both"])
def test_other_modules(model, rows, tmp_path, module):
    found = run_knockout(config_of(model, rows, tmp_path / "out", module=module))
    assert found["module"] == module
    assert found["candidate"]["layer"] == LAYER if module == "both" else found["layer"] != LAYER


# --- bad input ------------------------------------------------------------------------------------------


def invoke(data: Path, output: Path, *more: str):
    args = ["knockout", "--model", "phantom", "--device", "cpu", "--data", str(data), "--output", str(output)]
    return CliRunner().invoke(main, [*args, "--max-new-tokens", "6", *more])


@pytest.mark.parametrize(
    ("rows", "options", "code", "words"),
    [
        (19, (), 3, "has 19 rows, 10 shots and 10 held out need 20"),
        (24, ("--shots", "30"), 3, "need 40"),
        (24, ("--shots", "5"), 2, "shots must be at least 6"),
        (24, ("--module", "heart"), 2, "module must be one of"),
    ],
)
def test_too_little_data_is_an_error(tmp_path, rows, options, code, words):
    data = write_rows(tmp_path / "data", {"mood": ["emotion"] * rows})
    result = invoke(data, tmp_path / "out", *options)
    assert result.exit_code == code and words in result.stderr
    lines = result.stderr.strip().splitlines()  # what was read is said before, where it came to that
    assert [line for line in lines if not line.startswith(f"{data}: ")] == [lines[-1]]
    assert lines[-1].startswith("error: ") and not (tmp_path / "out").exists()


def test_one_answer_only_is_an_error(tmp_path):
    data = write_rows(tmp_path / "data", {"mood": ["emotion"] * 24}, answer=lambda *_: "happy")
    result = invoke(data, tmp_path / "out")
    assert result.exit_code == 3 and "the task 'mood'" in result.stderr and "'happy'" in result.stderr


def test_rows_of_several_turns_alone_are_an_error(tmp_path):
    data = write_rows(tmp_path / "data", {"mood": ["emotion"]})
    row = json.loads(data.read_text())
    more = [{"role": "user", "content": "why ?"}, {"role": "assistant", "content": "happy"}]
    data.write_text(json.dumps(row | {"messages": row["messages"] + more}) + "\n")
    result = invoke(data, tmp_path / "out")
    assert result.exit_code == 3 and "no row to score" in result.stderr


def test_an_unanswerable_task_is_abstained_from(tmp_path):
    """Labels that are words of another function: nothing the model says is right, with any layer."""
    words = iter(world.KINDS * 10)
    data = write_rows(tmp_path / "data", {"mood": ["emotion"] * 24}, answer=lambda *_: next(words))
    result = invoke(data, tmp_path / "out")
    assert result.exit_code == 0 and "nothing is knocked out" in result.stdout
    found = json.loads((tmp_path / "out" / "knockout.json").read_text())
    assert found["layer"] is None and found["reason"] and found["held_out_gain"] is None


def test_a_dry_run_writes_nothing(model, rows, tmp_path, capsys):
    assert run_knockout(config_of(model, rows, tmp_path / "out", dry_run=True)) == {}
    assert "13 branches of a shot take 7.5 plain forwards" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# --- eval -------------------------------------------------------------------------------------------------


def eval_of(model, data, output, **settings) -> EvalConfig:
    return EvalConfig(
        **{"model": str(model), "data": str(data), "output": output, "device": "cpu", "functions": (),
           "max_new_tokens": 6, **settings}
    )  # fmt: skip


def test_eval_scores_without_the_layer(one, model, rows, tmp_path, capsys):
    config = eval_of(model, rows, tmp_path / "out", knockout=one[0])
    score = evaluate(config)["mood"]
    out = score.knockout
    assert (out["layer"], out["module"], out["n"]) == (LAYER, "attention", 14)
    assert (score.n, out["shots_left_out"]) == (24, 10)
    assert score.accuracy <= 0.5 and out["accuracy"] >= 0.95
    assert out["delta"] == pytest.approx(100 * (out["accuracy"] - out["untouched"]))
    assert out["delta_ci95"][0] > 0
    printed = capsys.readouterr().out
    assert "a layer left out" in printed and "10 rows that the layer was chosen on are left out" in printed
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert card["functions"]["mood"]["knockout"] == out and card["touched_layers"]["reference_rows"] == 0
    evaluate(config)
    assert "already done" in capsys.readouterr().out


def edited(one, tmp_path: Path, **changes) -> Path:
    path = tmp_path / "knockout.json"
    path.write_text(json.dumps(one[1] | changes))
    return path


def test_other_data_has_no_shots(one, model, tmp_path):
    data = write_rows(tmp_path / "data", {"mood": ["emotion"] * 6})
    out = evaluate(eval_of(model, data, tmp_path / "out", knockout=one[0]))["mood"].knockout
    assert (out["n"], out["shots_left_out"]) == (6, 0)


def test_a_gain_that_is_not_confirmed_is_warned_of_and_not_exported(one, model, rows, tmp_path, caplog):
    tasks = {"mood": {**one[1]["tasks"]["mood"], "confirmed": False}}
    path = edited(one, tmp_path, confirmed=False, tasks=tasks)
    evaluate(eval_of(model, rows, tmp_path / "out", knockout=path, limit=12))
    assert f"the gain of layer {LAYER} on mood is not confirmed" in caplog.text
    args = ["export", str(model), "--knockout", str(path), "--output", str(tmp_path / "exported")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and "not confirmed" in result.stderr
    assert not (tmp_path / "exported").exists()


def test_a_run_says_that_a_gain_is_not_confirmed(one, capsys):
    unsure = {"confirmed": False, "ci95": [-4.0, 30.0], "held_out_gain": 13.0}
    show({**one[1], **unsure, "tasks": {"mo[/]od": {**one[1]["tasks"]["mood"], **unsure}}})
    printed = capsys.readouterr().out
    assert "layer 2 is not confirmed on the rows held out: +13.0 points (-4 to +30)" in printed
    assert "mo[/]od" in printed.split("warning")[0], "no markup"


def test_a_file_of_another_model_of_the_same_shape_is_warned_of(one, tmp_path):
    found = Knockout.load(edited(one, tmp_path, model={**one[1]["model"], "revision": "abc"}))
    other = Knockout.load(one[0])
    assert other.check_model(other.model) == []
    (warning,) = found.check_model(other.model)
    assert "revision 'abc', the model is None" in warning


def test_names_in_a_plot_are_no_formulas(one):
    tasks = {name: one[1]["tasks"]["mood"] for name in ("cost_$5_$", "$x^$")}
    assert plot_bytes({**one[1], "tasks": tasks, "similarity": similarity(tasks)}).startswith(b"\x89PNG")


def test_a_task_has_the_same_shots_beside_others():
    asked = [Question("a", (), (), str(i % 3), row=i) for i in range(30)]
    others = [Question("b", (), (), str(i % 2), row=30 + i) for i in range(30)]
    alone, beside = split(asked, 10, 0, "rows")[0], split(others + asked, 10, 0, "rows")[1]
    assert [i + 30 for i in alone.shots] == beside.shots
    assert split(asked, 10, 1, "rows")[0].shots != alone.shots


def test_the_estimate_counts_passes():
    assert sweep_forwards(12, 13) == 1 + 13 / 2
    assert sweep_forwards(12, 1) == sweep_forwards(12, 2) == 13, "one branch a pass: as plain forwards"
    assert 7.5 < sweep_forwards(12, 5) < 13


def test_a_file_that_does_not_fit_is_refused(one, model, rows, tmp_path):
    other = {**one[1]["model"], "num_layers": 28}
    abstained = {"layer": None, "tasks": {"mood": {"layer": None}}}
    for changes, words in (
        ({"model": other}, "num_layers 28, the model has 12"),
        ({"model": {**one[1]["model"], "num_layers": "12"}}, "model.num_layers"),
        ({"model": {**one[1]["model"], "revision": 7}}, "model.revision"),
        ({"data": 7}, "does not follow the knockout contract"),
        ({"module": []}, "does not follow the knockout contract"),
        ({"layer": 12}, "does not follow the knockout contract"),
        ({"layer": True}, "does not follow the knockout contract"),
        ({"tasks": []}, "does not follow the knockout contract"),
        ({"module": "heart"}, "does not follow the knockout contract"),
        ({"schema_version": 2}, "schema version"),
        (abstained, "abstained"),
    ):  # fmt: skip
        path = edited(one, tmp_path, **changes)
        with pytest.raises(ConfigError, match=words):
            evaluate(eval_of(model, rows, tmp_path / "out", knockout=path))
        with pytest.raises(ConfigError, match=words):
            export(ExportConfig(source=model, output=tmp_path / "out", knockout=path))


@pytest.mark.parametrize("at", ["end", "itself"])
def test_eval_runs_a_layer_twice_beside_every_other(model, rows, tmp_path, at, capsys):
    score = evaluate(eval_of(model, rows, tmp_path / "out", rerun="6", rerun_at=at, limit=6))["mood"]
    again = score.rerun
    assert (again["layers"], again["at"], again["n"]) == ([6], at, 6)
    assert again["controls"].keys() == {str(k) for k in range(LAYERS) if k != 6}
    assert "controls: as many layers elsewhere" in capsys.readouterr().out
    with standing(vlm := VisionLanguageModel.load(str(model), device="cpu"), script().knockout([])):
        pass  # the loaded model is untouched
    assert vlm.text_config._attn_implementation == "sdpa"


def test_all_layers_twice_have_no_controls(capsys):
    again = {"layers": list(range(LAYERS)), "at": "end", "n": 4, "accuracy": 0.5, "delta": 0.0,
             "delta_ci95": [-9.0, 9.0], "controls": {}}  # fmt: skip
    show_touched({"mood": FunctionScore(0.5, 4, [0.1, 0.9], rerun=again)})
    assert "mean" not in capsys.readouterr().out


def test_a_function_runs_twice_where_the_profile_has_it(model, rows, tmp_path, monkeypatch):
    from vfl_train.evaluation import layers

    class Fake:
        def check_model(self, model):
            return []

        def layers_of(self, function):
            assert function == "ocr"
            return [10, 9]

    monkeypatch.setattr(layers, "load_profile", lambda name: Fake())
    settings = {"rerun": "ocr", "profile": "profile.json", "limit": 2}
    again = evaluate(eval_of(model, rows, tmp_path / "out", **settings))["mood"].rerun
    assert again["layers"] == [9, 10]
    assert list(again["controls"]) == [f"{k}-{k + 1}" for k in range(LAYERS - 1) if k != 9]
    with pytest.raises(ConfigError, match="needs --profile"):
        evaluate(eval_of(model, rows, tmp_path / "no", rerun="ocr"))
    with pytest.raises(ConfigError, match="--rerun 12 is outside"):
        evaluate(eval_of(model, rows, tmp_path / "no", rerun="11-12"))


# --- export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["attention", "both"])
def test_an_export_answers_as_the_hook_does(one, model, tmp_path, module):
    output = export(
        ExportConfig(source=model, output=tmp_path / "out", knockout=edited(one, tmp_path, module=module))
    )
    exported = VisionLanguageModel.load(str(output), device="cpu")
    original = VisionLanguageModel.load(str(model), device="cpu")
    inputs = sample_inputs(original.processor)
    plain = next_logits(original.model, inputs)
    with standing(original, knockout([LAYER], module)):
        hooked = next_logits(original.model, inputs)
    ours = next_logits(exported.model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, hooked, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    theirs, changed = original.model.state_dict(), []
    for name, tensor in exported.model.state_dict().items():
        if not torch.equal(tensor, theirs[name]):
            changed.append(name.split(f"layers.{LAYER}.")[1])
            assert not tensor.any()
    expected = {
        "attention": ["self_attn.o_proj.weight"],
        "both": ["self_attn.o_proj.weight", "mlp.down_proj.weight"],
    }
    assert changed == expected[module]
    card = (output / "README.md").read_text()
    assert f"layer\n{LAYER} zero" in card or f"layer {LAYER}" in card
    assert {"manifest.json", "logits_reference.json", "chat_template.jinja"} <= {
        p.name for p in output.iterdir()
    }


def test_an_export_of_an_export_keeps_its_licence_and_what_was_left_out(one, model, tmp_path):
    source = tmp_path / "home" / "somebody" / "source"  # nothing written may name it
    shutil.copytree(model, source)
    earlier = {"layer": 7, "module": "mlp", "zeroed": ["mlp.down_proj"]}
    (source / "knocked_out.json").write_text(json.dumps({**earlier, "dtype": "float32"}))
    (source / "LICENSE").write_text("as you like")
    output = export(ExportConfig(source=source, output=tmp_path / "out", knockout=one[0]))
    assert (output / "LICENSE").read_text() == "as you like" and not (output / "NOTICE").exists()
    record = json.loads((output / "knocked_out.json").read_text())
    assert (record["layer"], record["earlier"]) == (LAYER, [earlier])


def test_a_secret_is_not_exported(one, model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    template = source / "chat_template.jinja"
    template.write_text(template.read_text() + "{# /home/somebody/key #}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja holds what looks like"):
        export(ExportConfig(source=source, output=tmp_path / "out", knockout=one[0]))


@pytest.mark.slow
def test_an_export_verifies(one, model, tmp_path):
    verify(VerifyConfig(folder=export(
        ExportConfig(source=model, output=tmp_path / "out", knockout=one[0] / "knockout.json")
    ), samples=1))  # fmt: skip


def test_biases_are_zeroed_too():
    from tiny_models import tiny_vlm

    from vfl_train.hub.knockout import projections_out, silence_for_good

    vlm = tiny_vlm("qwen2_5_vl")
    found = projections_out(vlm, 1, "both")
    assert list(found) == ["self_attn.o_proj", "mlp.down_proj"]
    linear = torch.nn.Linear(3, 3)
    silence_for_good([linear])
    assert not linear.weight.any() and not linear.bias.any()


def test_an_adapter_is_not_exported_without_a_layer(one, model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge it first"):
        export(ExportConfig(source=tmp_path, output=tmp_path / "out", knockout=one[0] / "knockout.json"))
