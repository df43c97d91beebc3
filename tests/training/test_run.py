"""`vfl-train lora` as a whole: the adapter folder, what it refuses, what it leaves behind when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from vfl_train.config import LoraConfig
from vfl_train.errors import ConfigError, DataError, NumericError
from vfl_train.schemas import FunctionProfile, ModelInfo, Profile
from vfl_train.training.estimate import steps_of
from vfl_train.training.run import train_lora

MakeConfig = Callable[..., LoraConfig]
EXPECTED = {
    "adapter_model.safetensors", "adapter_config.json", "plan.json", "train_config.yaml", "README.md",
    "manifest.json", "train_log.jsonl", "tokenizer.json", "tokenizer_config.json", "processor_config.json",
    "chat_template.jinja", "logits_reference.json", "training.png",
}  # fmt: skip


def write_profile(folder: Path, base_folder: Path) -> Path:
    text = json.loads((base_folder / "config.json").read_text())["text_config"]
    flat, info = [0.0] * 12, (50, 50, [0.0] * 12, [0.0] * 12, [[0.0, 0.1]] * 12, {})
    ocr = FunctionProfile("ok", *info, 10, [9, 10], [10], False)
    model = ModelInfo("somewhere/else", None, "qwen2_5_vl", len(flat), text["hidden_size"])
    profile = Profile(model, "swap", "text", "reference", "float32", 0, {}, {}, {"ocr": ocr})
    (folder / "profile.json").write_text(json.dumps(profile.to_json()), encoding="utf-8")
    return folder / "profile.json"


def test_the_folder_is_complete_and_holds_nothing_else(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert names >= EXPECTED
    assert not [n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not [p for p in trained.iterdir() if p.is_dir()]
    suffixes = {".json", ".jsonl", ".md", ".yaml", ".jinja", ".png", ".safetensors", ""}
    assert {p.suffix for p in trained.iterdir()} <= suffixes


def test_no_path_of_the_machine_is_in_any_file(trained: Path, data_file: Path, base_folder: Path) -> None:
    base = json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(base_folder)  # as the user named it; export cuts it
    for path in trained.iterdir():
        content = path.read_bytes()
        assert str(data_file.parent).encode() not in content, path.name
        assert str(trained.parent).encode() not in content, path.name
        if path.name not in ("adapter_config.json", ".vfl-run.json"):
            assert str(base_folder).encode() not in content, path.name


def test_plain_peft_loads_it_and_it_changes_the_answers(trained: Path, base_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vfl_train.hub.samples import next_logits, sample_inputs

    base = AutoModelForImageTextToText.from_pretrained(base_folder).eval()
    inputs = sample_inputs(AutoProcessor.from_pretrained(trained), 2)
    plain = next_logits(base, inputs)
    adapted = PeftModel.from_pretrained(base, trained).eval()
    assert not torch.equal(next_logits(adapted, inputs)[0], plain[0])
    planned = json.loads((trained / "plan.json").read_text())["module_names"]
    assert json.loads((trained / "adapter_config.json").read_text())["target_modules"] == planned
    assert len(planned) == 3 * 7


def test_card_config_and_log_say_what_was_done(trained: Path) -> None:
    head = yaml.safe_load((trained / "README.md").read_text().split("---\n")[1])
    assert head["base_model_relation"] == "adapter"
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "image-text-to-text")
    settings = yaml.safe_load((trained / "train_config.yaml").read_text())["lora"]
    assert LoraConfig.bind({**settings, "output": "x"}).layers == "7-8,10"
    log = [json.loads(line) for line in (trained / "train_log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "loss" in e] == [1, 2]


def test_a_finished_run_is_not_repeated_and_a_changed_one_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    output = train_lora(make_config(tmp_path / "a", max_steps=1))
    before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    train_lora(make_config(output, max_steps=1))
    assert before == {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    with pytest.raises(ConfigError, match="learning_rate"):
        train_lora(make_config(output, max_steps=1, learning_rate=0.5))


def test_functions_of_a_profile_are_trained_and_the_profile_kept(
    make_config: MakeConfig, tmp_path: Path, base_folder: Path, caplog
) -> None:
    profile = write_profile(tmp_path, base_folder)
    config = make_config(tmp_path / "a", layers=None, functions=("ocr",), profile=str(profile), max_steps=1)
    output = train_lora(config)
    plan = json.loads((output / "plan.json").read_text())
    assert plan["layers"] == [10] and plan["functions"] == {"ocr": [10]}
    assert Profile.load(output).functions["ocr"].flip_block == [10]
    assert "somewhere/else" in caplog.text
    assert "`ocr` (10)" in (output / "README.md").read_text()


def test_a_dry_run_shows_the_map_and_writes_nothing(make_config: MakeConfig, tmp_path: Path, capsys) -> None:
    train_lora(make_config(tmp_path / "a", dry_run=True, layers="7-8", max_steps=-1))
    shown = capsys.readouterr().out
    assert shown.count("●") == 2 * 7
    assert "optimizer steps 6" in shown and "layers 7-11 only" in shown and "vision tower" in shown
    assert not (tmp_path / "a").exists()


def test_a_run_that_fails_leaves_no_adapter(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="rows"):
        train_lora(make_config(tmp_path / "a", learning_rate=1e30, max_steps=4, max_grad_norm=0.0))
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert not names & {"adapter_model.safetensors", "adapter_config.json", "manifest.json"}
    assert json.loads((tmp_path / "a" / ".vfl-run.json").read_text())["status"] == "running"


def test_bad_rows_are_quarantined_and_only_bad_rows_are_an_error(
    make_config: MakeConfig, tmp_path: Path, data_file: Path
) -> None:
    good = data_file.read_text().splitlines()[:4]
    missing = good[0].replace("0.png", "none.png")
    mixed, bad = data_file.parent / "mixed.jsonl", data_file.parent / "bad.jsonl"
    mixed.write_text("\n".join([*good, missing]) + "\n")
    bad.write_text(missing + "\n")
    output = train_lora(make_config(tmp_path / "a", data=str(mixed), max_steps=1))
    entries = (output / "quarantine.jsonl").read_text().splitlines()
    assert len(entries) == 1 and json.loads(entries[0])["code"] == "image_missing"
    with pytest.raises(DataError, match="no usable row"):
        train_lora(make_config(tmp_path / "b", data=str(bad)))


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "epochs", "processes", "steps"),
    [
        (24, 4, 1, 1, 1, 6),
        (24, 5, 2, 1, 1, 3),
        (24, 5, 2, 2, 1, 6),
        (3, 4, 8, 1, 1, 1),
        (24, 4, 1, 0.5, 1, 3),
        (24, 4, 1, 1.1, 1, 7),
        (25, 1, 2, 1, 4, 4),
    ],
)
def test_steps_are_counted_as_the_trainer_does(
    make_config: MakeConfig, tmp_path: Path, rows: int, batch: int, accumulate: int, epochs: float,
    processes: int, steps: int,
) -> None:  # fmt: skip
    config = make_config(
        tmp_path, max_steps=-1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        num_train_epochs=epochs,
    )  # fmt: skip
    assert steps_of(config, rows, processes) == steps


def test_a_plain_run_prints_its_own_messages_and_fetches_no_kernel(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """DeepSpeed and bitsandbytes, which TRL and PEFT import where they are installed, are loud on a CPU, and
    the latter fetches code from the Hub if it finds the package `kernels`."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("print('kernels was imported')\n")
    config = make_config(tmp_path / "adapter")
    options = [
        f"--model={config.model}", f"--data={config.data}", "--layers=10", "--max-steps=1", "--device=cpu",
        f"--output={config.output}",
    ]  # fmt: skip
    script = f"import sys; from vfl_train.cli import main; main.main({['lora', *options]!r})"
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    paths = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**environment, "PYTHONPATH": paths}, cwd=tmp_path, text=True,
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    starts = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert starts == [config.data, config.data, "first batch", "layers 10"]
