"""Validation: which rows are held out, what their loss is, and what is done about it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from selections import write_selection

from vfl_train.config import LoraConfig
from vfl_train.data.collator import Collator
from vfl_train.data.readers import read_dataset
from vfl_train.data.rows import ImageRef, Row, assistant_message, user_message
from vfl_train.errors import ConfigError, DataError
from vfl_train.models import VisionLanguageModel
from vfl_train.training.best import BestAdapter
from vfl_train.training.run import train_lora
from vfl_train.training.validation import Validation, split_rows

MakeConfig = Callable[..., LoraConfig]


# --- which rows are held out -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Ten images, each under two names and asked about twice, one row with two images that ties two
    groups together, and text rows, each twice."""
    folder, made = tmp_path_factory.mktemp("pool"), []

    def add(text: str, *names: str) -> None:
        refs = tuple(ImageRef(folder / name, None, name) for name in names)
        messages = (user_message(text, len(refs)), assistant_message("yes"))
        made.append(Row(len(made), f"u{len(made)}", "pool", messages, refs, b""))

    for index in range(10):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
        shutil.copy(folder / f"{index}.png", folder / f"{index}-again.png")
        add("is it red?", f"{index}.png")
        add("is it blue?", f"{index}-again.png")
        add("a question without an image", *())
        made[-1] = Row(len(made) - 1, made[-1].uid, "pool", (user_message(f"{index // 2}?", 0),
                       assistant_message("yes")), (), b"")  # fmt: skip
    add("which is redder?", "0.png", "1-again.png")
    return made


def groups_of(row: Row) -> set[str]:
    """Pictures by their number, texts by themselves; pictures 0 and 1 are one group."""
    names = {ref.label.split(".")[0].split("-")[0] for ref in row.images} or {row.messages[0].text}
    return {"0" if name == "1" else name for name in names}


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_duplicates_stay_on_one_side(pool: list[Row], share: float) -> None:
    train, held = split_rows(pool, share, seed=0)
    assert {r.row for r in train} | {r.row for r in held} == {r.row for r in pool}
    assert len(train) + len(held) == len(pool)
    assert not {g for r in train for g in groups_of(r)} & {g for r in held for g in groups_of(r)}
    assert 0 < len(held) <= max(5, share * len(pool))
    assert len(held) >= share * len(pool) - 5  # the largest group
    assert [r.row for r in held] == sorted(r.row for r in held)


def test_the_split_follows_from_content_and_seed_alone(pool: list[Row]) -> None:
    held = {r.uid for r in split_rows(pool, 0.3, seed=0)[1]}
    shuffled = random.Random(1).sample(pool, len(pool))
    assert {r.uid for r in split_rows(shuffled, 0.3, seed=0)[1]} == held
    assert {r.uid for r in split_rows(pool, 0.3, seed=1)[1]} != held


def test_rows_that_all_share_an_image_cannot_be_split(pool: list[Row]) -> None:
    with pytest.raises(ConfigError, match="no row to train on"):
        split_rows(pool[:2], 0.5, seed=0)


# --- the loss --------------------------------------------------------------------------------------


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_the_loss_is_the_mean_over_all_answer_tokens_of_the_held_out_rows(
    make_config: MakeConfig, tmp_path: Path, data_file: Path
) -> None:
    """Also by function; unequal batches weigh by their tokens; nothing of it disturbs the training log."""
    buckets = ["ocr", "count", "language"] * 8
    selected = write_selection(tmp_path / "select", data_file, buckets, range(24))
    config = make_config(
        tmp_path / "a", data=str(selected), image_root=data_file.parent, eval_share=0.4, eval_steps=1,
        learning_rate=0.0, max_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    folder = train_lora(config)
    rows = read_dataset(selected, data_file.parent).rows
    held = split_rows(rows, 0.4, config.seed)[1]
    vlm = VisionLanguageModel.load(config.model, device="cpu")
    sums: dict[str, list[float]] = {}
    for row in held:
        batch = Collator(vlm.encoder)([row])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = vlm.model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        for name in ("eval_loss", f"eval_loss/{buckets[row.row]}"):
            nats, tokens = sums.get(name, [0.0, 0])
            sums[name] = [nats + loss.item(), tokens + int((labels != -100).sum())]
    wanted = {name: float(nats / tokens) for name, (nats, tokens) in sums.items()}
    found = [e for e in entries(folder) if "eval_loss" in e]
    assert [e["step"] for e in found] == [1, 2]
    for name, value in wanted.items():
        assert found[0][name] == pytest.approx(value, rel=1e-4), name
    logged = [e for e in entries(folder) if "loss" in e]
    assert [e["step"] for e in logged] == [1, 2] and not any("eval_loss" in e for e in logged)
    assert f"| validation rows | {len(held)} |" in (folder / "README.md").read_text()


def test_validation_does_not_change_what_is_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same training rows with and without validation give the same adapter."""
    data = Path(make_config(tmp_path).data)
    rows = read_dataset(data).rows
    train = {r.row for r in split_rows(rows, 0.3, 0)[0]}
    lines = data.read_text().splitlines()
    part, rest = data.parent / "part.jsonl", data.parent / "rest.jsonl"
    part.write_text("".join(lines[i] + "\n" for i in range(24) if i in train))
    rest.write_text("".join(lines[i] + "\n" for i in range(24) if i not in train))
    plain = train_lora(make_config(tmp_path / "plain", data=str(part), max_steps=3))
    held = train_lora(make_config(tmp_path / "held", eval_share=0.3, eval_steps=1, max_steps=3))
    other = train_lora(make_config(tmp_path / "o", data=str(part), eval_data=str(rest), max_steps=3))
    weights = [(f / "adapter_model.safetensors").read_bytes() for f in (plain, held, other)]
    assert weights[0] == weights[1] == weights[2]
    last = [[e["eval_loss"] for e in entries(f) if "eval_loss" in e][-1] for f in (held, other)]
    assert last[0] == pytest.approx(last[1], rel=1e-6)


# --- what is done about it -------------------------------------------------------------------------


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Replace the measured losses by given ones."""

    def given(*values: float) -> list[float]:
        left = list(values)
        monkeypatch.setattr(Validation, "measure", lambda self: {"eval_loss": left.pop(0)})
        return left

    return given


def test_the_best_adapter_is_kept_and_nothing_else_left(
    make_config: MakeConfig, tmp_path: Path, losses
) -> None:
    two = train_lora(make_config(tmp_path / "two", max_steps=2, lr_scheduler_type="constant"))
    settings = {"eval_steps": 1, "max_steps": 4, "lr_scheduler_type": "constant"}
    settings["eval_data"] = make_config(tmp_path).data
    losses(3.0, 1.0, 2.0, 2.5)
    best = train_lora(make_config(tmp_path / "best", load_best_model_at_end=True, **settings))
    losses(3.0, 1.0, 2.0, 2.5)
    last = train_lora(make_config(tmp_path / "last", **settings))
    wanted, found, other = (load_file(f / "adapter_model.safetensors") for f in (two, best, last))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not all(torch.equal(wanted[name], other[name]) for name in wanted)
    assert not (best / "checkpoints").exists()
    assert "1.0000 at step 2, kept" in (best / "README.md").read_text()


def test_early_stopping_counts_validations_without_a_lower_loss(
    make_config: MakeConfig, tmp_path: Path, losses
) -> None:
    left = losses(3.0, 2.0, 2.0, 2.1, 1.0)
    data = make_config(tmp_path).data
    folder = train_lora(
        make_config(tmp_path / "a", eval_data=data, eval_steps=1, max_steps=6, early_stopping_patience=2)
    )
    assert [e["step"] for e in entries(folder) if "eval_loss" in e] == [1, 2, 3, 4]
    assert left == [1.0]
    card = (folder / "README.md").read_text()
    assert "4 of 6: stopped early, no lower validation loss in 2 validations" in card


def test_each_epoch_is_judged_without_eval_steps(make_config: MakeConfig, tmp_path: Path, losses) -> None:
    losses(3.0, 2.0)
    data = make_config(tmp_path).data
    config = make_config(tmp_path / "a", eval_data=data, max_steps=-1, num_train_epochs=2, limit=8)
    assert [e["step"] for e in entries(train_lora(config)) if "eval_loss" in e] == [2, 4]


class _Stop(Exception):
    pass


def test_an_interrupted_run_knows_the_best_of_before(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best at step 2, checkpoint at 3, killed at 4: resumed and whole runs end with the same adapter, out of
    patience at the same step."""
    data = make_config(tmp_path).data
    settings = {
        "eval_data": data, "eval_steps": 1, "max_steps": 7, "save_steps": 3, "load_best_model_at_end": True,
        "lr_scheduler_type": "constant", "early_stopping_patience": 3,
    }  # fmt: skip
    curve, stop_at = dict(enumerate([3.0, 1.0, 2.0, 2.5, 2.5, 2.5, 2.5], start=1)), [0]

    def measure(self: Validation) -> dict[str, float]:
        step = self.trainer.state.global_step
        if step == stop_at[0]:
            raise _Stop
        return {"eval_loss": curve[step]}

    monkeypatch.setattr(Validation, "measure", measure)
    whole = train_lora(make_config(tmp_path / "whole", **settings))
    stop_at[0] = 4
    with pytest.raises(_Stop):
        train_lora(make_config(tmp_path / "cut", **settings))
    stop_at[0] = 0
    cut = train_lora(make_config(tmp_path / "cut", **settings))
    first, second = (load_file(f / "adapter_model.safetensors") for f in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for folder in (whole, cut):
        assert [e["step"] for e in entries(folder) if "eval_loss" in e] == [1, 2, 3, 4, 5]


def test_a_best_adapter_that_is_gone_is_judged_anew(tmp_path: Path, caplog) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    best = BestAdapter(tmp_path / "best", [("a.lora_A.default.weight", parameter)])
    validation = Validation([], lambda rows: {}, SimpleNamespace(), None, best)
    validation.load_state({"best_loss": 1.0, "best_step": 2, "last_step": 3, "since_best": 1})
    assert validation.best_loss == float("inf") and "is gone" in caplog.text
    best.keep(2)
    validation.load_state({"best_loss": 1.0, "best_step": 2, "last_step": 3, "since_best": 1})
    assert (validation.best_loss, validation.since_best) == (1.0, 1)


def test_best_adapters_that_checkpoints_may_need_stay(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    best = BestAdapter(tmp_path / "best", [("a.lora_A.default.weight", parameter)], keep=2)
    for step in range(1, 6):
        parameter.data.fill_(step)
        best.keep(step)
        if step in (2, 3):
            best.pin(step)
    assert {p.name for p in (tmp_path / "best").iterdir()} == {f"step-00000{n}" for n in (2, 3, 5)}
    best.restore(3)
    assert parameter.tolist() == [3.0, 3.0]


def test_validation_rows_that_cannot_be_read_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="empty") as caught:
        train_lora(make_config(tmp_path / "a", eval_data=str(empty)))
    assert caught.value.exit_code == 3 and not (tmp_path / "a").exists()
