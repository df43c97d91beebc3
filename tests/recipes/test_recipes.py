"""Every model's recipe: bound to the schema, true in its head, two steps on a tiny model of its family."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from selections import write_selection
from tiny_models import saved

from vfl_train.cli import main
from vfl_train.cli.command import config_of
from vfl_train.cli.main_group import CliState
from vfl_train.config import LoraConfig
from vfl_train.models import VisionLanguageModel
from vfl_train.recipe import Recipe, bundled
from vfl_train.schemas import FunctionProfile, Profile
from vfl_train.training.run import train_lora

FAMILY = {
    "qwen2_5_vl_3b": "qwen2_5_vl", "qwen2_5_vl_7b": "qwen2_5_vl", "qwen3_vl_8b": "qwen3_vl",
    "llava_1_5_7b": "llava", "llava_onevision_7b": "llava_onevision", "internvl3_8b": "internvl",
    "smolvlm_2b": "smolvlm", "gemma3_4b": "gemma3",
}  # fmt: skip
GENERAL = {"quickstart", "vfl_lora"}  # of no model in particular
LAYERS = {"ocr": [3], "count": [2]}


def head_of(name: str) -> str:
    text = files("vfl_train.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
    return "\n".join(line.lstrip("#") for line in text.split("\n\n")[0].splitlines())


def config_by_command(line: str) -> LoraConfig:
    """The settings of a command line as the shell would give it."""
    _, command_name, *arguments = shlex.split(line)
    command = main.commands[command_name]
    context = command.make_context(command_name, arguments, parent=click.Context(main, obj=CliState()))
    return config_of(context, command.config_class)


def test_every_recipe_is_of_a_family_or_general() -> None:
    assert set(bundled()) == set(FAMILY) | GENERAL


@pytest.mark.parametrize("name", FAMILY)
def test_the_head_says_what_by_which_command_and_in_what_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = head_of(name)
    assert f"vfl-train run {name} " in head and "estimate by formula" in head and "GB a GPU" in head
    (command,) = (line.strip() for line in head.splitlines() if line.strip().startswith("vfl-train lora"))
    eight, one = config_by_command(command), Recipe.load(name).config(LoraConfig)

    def rows(config: LoraConfig, gpus: int) -> int:
        return gpus * config.per_device_train_batch_size * config.gradient_accumulation_steps

    assert rows(eight, 8) == rows(one, 1) == 16
    assert (eight.model, eight.learning_rate) == (one.model, one.learning_rate)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows with an image each."""
    folder, rng, lines = tmp_path_factory.mktemp("pool"), np.random.default_rng(0), []
    for index in range(8):
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nhow many cats?"}, {"from": "gpt", "value": f"{index}"}]
        lines.append(json.dumps({"image": f"{index}.png", "conversations": turns}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_profile(path: Path, model: Path) -> None:
    info = VisionLanguageModel.load(str(model), device="cpu").info
    flat = [0.0] * info.num_layers
    functions = {
        name: FunctionProfile("ok", 50, 50, flat, flat, [[0.0, 0.1]] * len(flat), {}, k[0], k, k, False)
        for name, k in LAYERS.items()
    }
    path.parent.mkdir(parents=True)
    value = Profile(info, "swap", "text", "reference", "float32", 0, {}, {}, functions).to_json()
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def two_steps(
    models: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Run the lora step of a recipe where it runs, with a tiny model and small numbers in the place of its
    own; everything else is as the recipe has it."""

    def run(name: str) -> Path:
        monkeypatch.chdir(tmp_path)
        model = saved(FAMILY[name], models)
        recipe = Recipe.load(name)
        write_profile(recipe.project / "profile" / "profile.json", model)
        data = write_selection(recipe.project / "select", pool, ["ocr", "count"] * 4, range(8))
        assert recipe.config(LoraConfig).data == str(data.parent)
        small = {
            "model": str(model), "image_root": str(pool.parent), "device": "cpu", "dtype": "float32",
            "max_steps": 2, "eval_steps": 1, "eval_share": 0.2, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "logging_steps": 1,
        }  # fmt: skip
        return train_lora(recipe.config(LoraConfig, small))

    return run


# One recipe a family: the two of Qwen2.5-VL differ in the model's name alone.
@pytest.mark.parametrize("name", [name for name in FAMILY if name != "qwen2_5_vl_3b"])
def test_two_steps_of_the_recipe_on_a_tiny_model_of_the_family(
    name: str, two_steps: Callable[[str], Path]
) -> None:
    folder = two_steps(name)
    assert folder == Path(Recipe.load(name).project / "lora")
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["layers"] == [2, 3] and plan["functions"] == LAYERS
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "loss" in e] == [1, 2]
    assert [e["step"] for e in log if "eval_loss" in e] == [1, 2]
    assert any("loss/ocr" in e for e in log)
    assert log[0]["first_batch/images"] == 2 and log[0]["first_batch/image_tokens"] > 0
    assert (folder / "adapter_model.safetensors").is_file()
