"""The main job end to end, small, offline: `run_steps` on a small pool, and what the demo says of it."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest
from pools import WRITERS, pool_rows

from vfl_train import demo as demo_module
from vfl_train.demo import demo_steps, headline, make_world, report
from vfl_train.pipeline import run_steps
from vfl_train.schemas import read_json


@pytest.fixture(scope="module")
def no_sockets():
    """No connection may be tried while the demo runs."""
    patch = pytest.MonkeyPatch()

    def refuse(self, address, *rest):
        raise AssertionError(f"the demo tried to connect to {address}")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket.socket, "connect_ex", refuse)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def small(tmp_path_factory, no_sockets):
    """(outcome, world folder, demo folder) of a small demo: fewer rows, pairs and steps, same code."""
    patch = pytest.MonkeyPatch()
    patch.setattr(demo_module, "POOL_ROWS", 100)
    folder = tmp_path_factory.mktemp("demo")
    world = make_world(folder / "world", seed=0)
    patch.undo()
    steps = demo_steps(folder, world, seed=0, overwrite=False)
    steps = dataclasses.replace(
        steps,
        profile=dataclasses.replace(steps.profile, pairs=20, control_pairs=1, functions=("ocr", "count")),
        lora=dataclasses.replace(steps.lora, max_steps=3, per_device_train_batch_size=4),
        eval=dataclasses.replace(steps.eval, pairs=4),
    )
    return run_steps(steps), world, folder


def test_every_step_leaves_its_files(small):
    _, _, folder = small
    wanted = {
        "profile": ["profile.json", "profile.png", "report.html"],
        "select": ["scores.parquet", "selected.json", "selection.json", "quarantine.jsonl", "report.html"],
        "lora": [
            "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "profile.json",
            "plan.json", "train_config.yaml", "README.md",
        ],
        "eval": ["scorecard.json"],
        "merged": ["model.safetensors", "config.json", "verification.json"],
    }  # fmt: skip
    for name, files in wanted.items():
        for file in files:
            assert (folder / name / file).is_file(), f"{name}/{file}"


def test_headline_and_report_hold_the_measured_figures(small):
    outcome, world, folder = small
    facts = headline(outcome, read_json(world / "truth.json"))
    assert facts["picked"] == 20
    assert facts["found"]["ocr"] == [facts["planted"]["ocr"]]
    assert facts["ocr_in_picked"] > facts["ocr_in_pool"]
    html = report(outcome, facts)
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("data:image/png;base64,") > 10
    assert outcome.verification["passed"] is True
    assert Path(folder / "lora" / "plan.json").is_file()


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("json", ".json"), ("jsonl", ".jsonl"), ("parquet", ".parquet"), ("tar", ".tar"), ("arrow", "")],
)
def test_a_recipe_links_its_steps(tmp_path, monkeypatch, kind, ending):
    """What a recipe leaves out follows from the step before: select writes in the format of its input."""
    from vfl_train import pipeline
    from vfl_train.config import RunConfig

    (tmp_path / "pool").mkdir()
    data = WRITERS[kind](tmp_path / "pool", pool_rows(4))
    recipe = tmp_path / "vfl-train.yaml"
    recipe.write_text(f"project: {tmp_path}/out\ndata: {data}\nfunctions: [ocr]\nlora: {{max_steps: 7}}\n")
    seen = []
    monkeypatch.setattr(pipeline, "run_steps", seen.append)
    pipeline.run_recipe(RunConfig(recipe=str(recipe)))
    (steps,) = seen
    project = tmp_path / "out"
    assert steps.profile.functions == () == steps.eval.functions  # all of them: buckets and forgetting
    assert steps.select.functions == steps.lora.functions == ("ocr",)
    assert Path(steps.select.profile) == project / "profile" / "profile.json"
    assert Path(steps.lora.data) == project / "select" / f"selected{ending}"
    assert steps.lora.image_root == (data if data.is_dir() else tmp_path / "pool")
    assert steps.lora.max_steps == 7
    assert Path(steps.eval.adapter) == project / "lora"
    assert steps.merge.adapters == (str(project / "lora"),)


def test_a_second_run_does_nothing_again(small, capsys):
    outcome, _, folder = small
    before = (folder / "lora" / "adapter_model.safetensors").stat().st_mtime_ns
    again = run_steps(outcome.steps)
    assert (folder / "lora" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert again.seconds["lora"] < 5
