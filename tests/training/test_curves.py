"""The loss of each function while training, and what the first batch holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from selections import write_selection

from vfl_train.config import LoraConfig
from vfl_train.data.collator import Collator
from vfl_train.data.readers import read_dataset
from vfl_train.errors import ConfigError, DataError
from vfl_train.models import VisionLanguageModel
from vfl_train.training import trainer
from vfl_train.training.curves import FunctionLosses, TrainingCurves, first_batch
from vfl_train.training.reporting import trackers
from vfl_train.training.run import train_lora

MakeConfig = Callable[..., LoraConfig]
BUCKETS = ["ocr", "count", "language"] * 8


@pytest.fixture(scope="module")
def run(
    make_config: MakeConfig, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    """A run that does not learn (learning rate 0) on rows with buckets, with TensorBoard; and the rows of
    each micro-batch."""
    tmp_path, seen = tmp_path_factory.mktemp("curves"), []
    selected = write_selection(tmp_path / "select", data_file, BUCKETS, range(24))
    call = trainer.RowCollator.__call__

    def watched(self, items):
        seen.append([item["row"] for item in items])
        return call(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.RowCollator, "__call__", watched)
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        folder = train_lora(
            make_config(
                tmp_path / "a", data=str(selected), image_root=data_file.parent, learning_rate=0.0,
                max_steps=4, logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=3,
                report_to="tensorboard",
            )
        )  # fmt: skip
    return folder, seen


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_each_functions_loss_is_the_mean_over_its_answer_tokens(run, data_file: Path) -> None:
    folder, seen = run
    config = json.loads((folder / "adapter_config.json").read_text())
    vlm = VisionLanguageModel.load(config["base_model_name_or_path"], device="cpu")
    rows = read_dataset(data_file).rows
    sums = {name: [0.0, 0] for name in BUCKETS}
    for row in (row for batch in seen[:4] for row in batch):  # the first log: two steps of two micro-batches
        inputs = Collator(vlm.encoder)([rows[row]])
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = vlm.model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        sums[BUCKETS[row]][0] += loss.item()
        sums[BUCKETS[row]][1] += int((labels != -100).sum())
    first, second = (e for e in log_of(folder) if "loss" in e)
    for name, (nats, tokens) in sums.items():
        assert first[f"loss/{name}"] == pytest.approx(nats / tokens, rel=1e-4), name
    assert {k for k in second if k.startswith("loss/")} == {f"loss/{name}" for name in set(BUCKETS)}
    assert second["loss/ocr"] != first["loss/ocr"]  # the sums start anew


def test_tensorboard_gets_the_same_and_lies_in_the_output(run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run[0]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = [e["loss/count"] for e in log_of(folder) if "loss/count" in e]
    assert [s.value for s in events.Scalars("train/loss/count")] == pytest.approx(logged)
    assert "train/first_batch/image_tokens" in events.Tags()["scalars"]


def test_the_plot_has_a_panel_for_functions(run, trained: Path) -> None:
    heights = [Image.open(folder / "training.png").size[1] for folder in (trained, run[0])]
    assert heights[0] < heights[1]


def test_the_first_batch_is_reported_once(run) -> None:
    found = [e for e in log_of(run[0]) if "first_batch/rows" in e]
    assert len(found) == 1 and found[0]["step"] == 0 and found[0]["rows"] == 24
    assert found[0]["first_batch/rows"] == found[0]["first_batch/images"] == 3
    assert 0 < found[0]["first_batch/image_tokens"] < found[0]["first_batch/tokens"]
    assert 0 < found[0]["first_batch/supervised_share"] < 0.2


def test_without_buckets_there_is_no_function_curve(trained: Path) -> None:
    assert not [key for e in log_of(trained) for key in e if key.startswith("loss/")]


def batch(supervised: int) -> dict[str, torch.Tensor]:
    labels = torch.full((2, 6), -100)
    labels[0, 6 - supervised :] = 3
    ids = torch.tensor([[9, 9, 9, 1, 2, 3], [9, 9, 9, 1, 2, 0]])
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]])}


def test_first_batch_counts() -> None:
    assert first_batch([4, 7], batch(2), {4: 1, 7: 2}, [9]) == {
        "rows": 2, "images": 3, "tokens": 11, "image_tokens": 6, "supervised_tokens": 2,
        "supervised_share": 0.1818,
    }  # fmt: skip


def test_a_first_batch_without_a_supervised_token_is_a_data_error() -> None:
    with pytest.raises(DataError, match="rows 4, 7 is supervised") as caught:
        first_batch([4, 7], batch(0), {4: 1, 7: 2}, [9])
    assert caught.value.exit_code == 3


def test_open_sums_are_part_of_a_checkpoint(data_file: Path) -> None:
    rows = read_dataset(data_file).rows
    curves, resumed = (TrainingCurves(rows, {0: "ocr", 1: "count"}) for _ in range(2))
    for each in (curves, resumed):
        each.trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    output = SimpleNamespace(log_probs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
                             label_mask=torch.tensor([[1, 1], [1, 0]]))  # fmt: skip
    curves.losses.add([0, 5], output)
    resumed.load_state(json.loads(json.dumps(curves.state()))["attributes"])
    for each in (curves, resumed):
        each.losses.add([1, 0], output)
    assert curves.logged() == resumed.logged() == {"loss/ocr": 2.0, "loss/count": 1.5}
    assert curves.logged() == {}


def test_a_sample_that_no_loss_covers_counts_nowhere() -> None:
    losses = FunctionLosses({0: "ocr"}, "loss")
    output = SimpleNamespace(log_probs=torch.tensor([[-2.0], [0.0]]), label_mask=torch.tensor([[1], [0]]))
    losses.add([0], output)  # one row, a batch of two (see training.mixed)
    assert losses.take() == {"loss": 2.0, "loss/ocr": 2.0}


# --- trackers --------------------------------------------------------------------------------------


def test_trackers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers("none") == [] and trackers("tensorboard") == ["tensorboard"]
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        trackers("wandb")
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        trackers("wandbb")


def test_an_unknown_tracker_is_refused_before_anything_is_read(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="tensorbored"):
        train_lora(make_config(tmp_path / "a", data="nowhere.jsonl", report_to="tensorbored"))


def test_the_first_batch_is_said(make_config: MakeConfig, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "vfl_train"):
        train_lora(make_config(tmp_path / "a", max_steps=1))
    assert caplog.text.count("first batch: 4 rows, 4 images") == 1
