"""What a user gets wrong: one line, the exit code of the contract, and no output folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_profile import VALUE

from vfl_train.cli import main
from vfl_train.options import specs

ROW = {"messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}],
       "images": ["0.png"]}  # fmt: skip


def without_answer() -> dict:
    return {**ROW, "messages": ROW["messages"][:1]}


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


CASES = {
    # content of the data file, options, exit code, words of the message
    "empty": ("", [], 3, ["is empty"]),
    "all quarantined": (rows({**ROW, "images": ["gone.png"]}), [], 3, ["no usable row", "gone.png"]),
    "no supervised token": (rows(without_answer()), [], 3, ["no assistant turn has text"]),
    "all too long": (rows(ROW), ["--max-length", "3"], 3, ["none of 1 rows", "--max-length 3"]),
    "too long": (rows(ROW), ["--max-length", "3", "--overlong", "error"], 3, ["row 0 (line 1)", "tokens"]),
    "no layer": (rows(ROW), ["--layers", "99"], 2, ["layer 99 does not exist", "12 layers"]),
    "no part": (rows(ROW), ["--also-adapt", "head"], 2, ["'head' is unknown", "connector or vision"]),
    "not scored": (rows(ROW), ["--per-function"], 2, ["--per-function needs --functions"]),
    "no scores": (rows(ROW), ["--scores", "."], 2, ["holds no scores.parquet"]),
    "no validation": (rows(ROW), ["--load-best-model-at-end"], 2, ["no validation rows"]),
    "no data": (None, [], 2, ["there is no file"]),
    "validation not there": (rows(ROW), ["--eval-data", "no.jsonl"], 2, ["there is no file no.jsonl"]),
    "only validation": (rows(ROW), ["--eval-share", "0.5"], 2, ["leaves no row to train on"]),
    "tracker": (rows(ROW), ["--report-to", "tensorbord"], 2, ["did you mean 'tensorboard'"]),
    "wrong profile": (rows(ROW), ["--profile", "p.json", "--functions", "ocr"], 2, ["num_layers 3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_the_contracts_exit_code(
    case: str, tmp_path: Path, base_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, options, code, words = CASES[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("rows.jsonl").write_text(content, encoding="utf-8")
    Path("p.json").write_text(json.dumps(VALUE), encoding="utf-8")
    given = ["--model", str(base_folder), "--data", "rows.jsonl", "--image-root", str(data_file.parent),
             "--output", "out", "--device", "cpu", "--max-steps", "1"]  # fmt: skip
    layers = [] if {"--layers", "--functions"} & set(options) else ["--layers", "10"]
    result = CliRunner().invoke(main, ["lora", *given, *layers, *options])
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == code, result.stderr
    assert last.startswith("error: ") and all(word in last for word in words), last
    assert "Traceback" not in result.stderr
    assert not Path("out").exists() or {p.name for p in Path("out").iterdir()} <= {".vfl-run.json"}


def test_training_options_are_training_arguments_names() -> None:
    """What is no TrainingArguments name stands elsewhere in --help."""
    from transformers import TrainingArguments

    from vfl_train.config import LoraConfig

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = {"early_stopping_patience", "attn_implementation", "eval_share", "eval_data"}
    assert not own & names
    assert {specs(LoraConfig)[name].group for name in own} <= {"command", "model"}
