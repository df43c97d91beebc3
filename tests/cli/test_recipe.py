"""Recipes: every key binds, a wrong one is named, and the nearer word counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import pytest

from vfl_train.cli import main
from vfl_train.cli.command import config_of
from vfl_train.cli.main_group import CliState
from vfl_train.config import (
    COMMANDS,
    EvalConfig,
    LoraConfig,
    MergeConfig,
    PlanConfig,
    ProfileConfig,
    SelectConfig,
)
from vfl_train.errors import ConfigError
from vfl_train.options import Config, specs
from vfl_train.recipe import Recipe, bundled

PIPELINE = (ProfileConfig, SelectConfig, LoraConfig, EvalConfig, MergeConfig)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str) -> Recipe:
    Path("r.yaml").write_text(text, encoding="utf-8")
    return Recipe.load("r.yaml")


def parse(*args: str) -> Config:
    command = main.commands[args[0]]
    ctx = command.make_context(args[0], list(args[1:]), parent=click.Context(main, obj=CliState()))
    return config_of(ctx, command.config_class)


# --- the bundled ones ----------------------------------------------------------------------------


def test_bundled_recipes_are_there() -> None:
    assert {"quickstart", "vfl_lora"} < set(bundled())  # those of models: tests/recipes


@pytest.mark.parametrize("name", bundled())
@pytest.mark.parametrize("config_class", PIPELINE)
def test_every_key_of_a_bundled_recipe_binds(name: str, config_class: type[Config], project: Path) -> None:
    recipe = Recipe.load(name)
    command = next(key for key, value in COMMANDS.items() if value is config_class)
    config = recipe.config(config_class)
    shared = (key for key in recipe.shared if key in specs(config_class) and specs(config_class)[key].shared)
    for key in (*recipe.sections.get(command, ()), *shared):
        assert getattr(config, key) not in (None, (), ""), f"{name}: {key} did not arrive"


@pytest.mark.parametrize("name", bundled())
def test_a_bundled_recipe_has_a_section_for_each_later_step(name: str) -> None:
    assert set(Recipe.load(name).sections) >= {"select", "lora", "eval", "merge"}


def test_vfl_lora_writes_every_training_key_out() -> None:
    keys = {s.name for s in specs(LoraConfig).values() if s.group == "training"}
    # max_steps would override the epochs, bf16 follows the device.
    assert keys - {"max_steps", "bf16"} <= set(Recipe.load("vfl_lora").sections["lora"])


def test_training_keys_are_training_arguments_names() -> None:
    from transformers import TrainingArguments

    ours = {
        s.name for s in specs(LoraConfig).values() if s.group == "training" and not s.name.startswith("lora_")
    }
    assert ours <= {f.name for f in dataclasses.fields(TrainingArguments)}


# --- what is wrong is named ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modell: x", ["r.yaml", "'modell'", "did you mean 'model'?"]),
        ("selct: {budget: 1}", ["did you mean 'select'?"]),
        ("select: {budgett: 0.2}", ["key of select 'budgett'", "did you mean 'budget'?"]),
        ("lora: {learning-rate: 1}", ["did you mean 'learning_rate'?"]),
        ("lora: {budget: 0.2}", ["option of select"]),
        ("output: here", ["put it into that section"]),
        ("profile: {pairs: many}", ["profile.pairs", "whole number", "'many'"]),
        ("profile: {pairs: 1.5}", ["profile.pairs", "whole number"]),
        ("seed: true", ["seed", "whole number"]),
        ("lora: {per_function: 'no'}", ["true or false"]),
        ("lora: {learning_rate: .nan}", ["lora.learning_rate", "a number"]),
        ("lora: {control: mirrored}", ["all, random, reversed"]),
        ("functions: [[ocr]]", ["functions", "list of names"]),
        ("model: [a]", ["model", "text"]),
        ("project: 3", ["project"]),
        ("model: a\nmodel: b", ["'model' stands twice", "line 2"]),
        ("- model", ["keys with values"]),
        ("", ["keys with values"]),
        ("model: [a", ["not a recipe", "line 1"]),
        ("[" * 3000, ["not a recipe"]),
        ("model: '\\0'".replace("'", '"'), ["model"]),
    ],
)
def test_wrong_recipe_is_refused_by_name(text: str, words: list[str], project: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir [pwned]", "!!python/name:os.mkdir", "!!python/object/new:list [x]"],
)
def test_recipe_cannot_name_code(tag: str, project: Path) -> None:
    with pytest.raises(ConfigError, match="tag"):
        load(f"model: {tag}")
    assert not Path("pwned").exists()


def test_missing_recipe_names_the_bundled_ones(project: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        Recipe.load("quikstart.yaml")


def test_huge_or_binary_file_is_no_recipe(project: Path) -> None:
    Path("big.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    Path("bin.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("big.yaml", "bin.yaml", "."):
        with pytest.raises(ConfigError):
            Recipe.load(name)


# --- the nearer word counts ------------------------------------------------------------------------


def test_flag_over_section_over_shared_over_default(project: Path) -> None:
    Path("vfl-train.yaml").write_text(
        "seed: 1\npairs: 7\nprofile: {pairs: 8}\ndata: d.jsonl\nfunctions: ocr\n", encoding="utf-8"
    )
    assert parse("eval").pairs == 7
    assert parse("profile").pairs == 8
    assert parse("profile", "--pairs", "9").pairs == 9
    assert (parse("profile").seed, parse("profile", "--seed", "0").seed) == (1, 0)
    assert parse("profile").batch_tokens == 8192


def test_project_file_lets_the_designs_commands_run_as_they_stand(project: Path) -> None:
    Path("vfl-train.yaml").write_text("project: p\nmodel: m\ndata: d.jsonl\n", encoding="utf-8")
    select = parse("select", "--budget", "0.2")
    lora = parse("lora", "--functions", "ocr,count")
    assert (select.profile, select.output, select.model) == ("p/profile/profile.json", Path("p/select"), "m")
    assert (lora.profile, lora.output, lora.data) == ("p/profile/profile.json", Path("p/lora"), "d.jsonl")


def test_profile_is_taken_from_where_the_recipe_writes_it(project: Path) -> None:
    recipe = load("profile: {output: elsewhere}\n")
    assert recipe.config(PlanConfig).profile == "elsewhere/profile.json"
    assert recipe.config(PlanConfig, {"profile": "mine.json"}).profile == "mine.json"


def test_without_a_recipe_the_profile_folder_is_used_if_there(project: Path) -> None:
    with pytest.raises(ConfigError, match="--profile is missing"):
        parse("plan")
    Path("profile").mkdir()
    Path("profile/profile.json").touch()
    assert parse("plan").profile == "profile/profile.json"


def test_config_beats_the_project_file(project: Path) -> None:
    Path("vfl-train.yaml").write_text("seed: 1\nproject: p\n", encoding="utf-8")
    Path("other.yaml").write_text("seed: 2\nproject: q\n", encoding="utf-8")
    config = parse("profile", "--config", "other.yaml")
    assert (config.seed, config.output) == (2, Path("q/profile"))


def test_demo_does_not_read_the_project_file(project: Path) -> None:
    Path("vfl-train.yaml").write_text("seed: 5\n", encoding="utf-8")
    assert parse("demo").seed == 0


def test_layers_by_flag_displace_functions_of_the_recipe(project: Path) -> None:
    Path("vfl-train.yaml").write_text("functions: [ocr]\ndata: d\n", encoding="utf-8")
    config = parse("lora", "--layers", "20-23")
    assert (config.layers, config.functions) == ("20-23", ())
    assert parse("lora").functions == ("ocr",)


def test_shared_data_is_for_training_not_for_evaluation(project: Path) -> None:
    recipe = load("data: train.jsonl\nfunctions: ocr\n")
    assert recipe.config(LoraConfig).data == "train.jsonl"
    assert recipe.config(EvalConfig).data is None


def test_no_form_of_a_flag_undoes_the_recipe(project: Path) -> None:
    Path("vfl-train.yaml").write_text("overwrite: true\nload_in_4bit: true\n", encoding="utf-8")
    assert parse("profile").overwrite and parse("profile").load_in_4bit
    assert not parse("profile", "--no-overwrite").overwrite


def test_yaml_and_command_line_mean_the_same(project: Path) -> None:
    recipe = load(
        "data: d\nlora: {layers: [20, 21], learning_rate: 1e-4}\n"
        "select: {budget: 0.5, mix: {ocr: 0.25, count: 0.75}}\n"
        "eval: {drop_from: [24, 20], fail_if_drop: {ocr: 1}, adapter: a}\n"
    )
    lora = parse("lora", "--data", "d", "--output", "lora", "--layers", "20,21", "--learning-rate", "1e-4")
    assert recipe.config(LoraConfig) == lora
    select = ["--data", "d", "--profile", "profile/profile.json", "--output", "select", "--budget", "0.5"]
    assert recipe.config(SelectConfig) == parse("select", *select, "--mix", "ocr=0.25,count=0.75")
    evaluation = ["--adapter", "a", "--drop-from", "24,20", "--fail-if-drop", "ocr=1", "--output", "eval"]
    evaluation += ["--profile", "profile/profile.json"]  # of a project, for --rerun NAME
    assert recipe.config(EvalConfig) == parse("eval", *evaluation)


def test_sections_and_shared_keys_of_the_same_name(project: Path) -> None:
    """`profile` and `data` are both commands and options: a mapping is a section, text is the option."""
    recipe = load("data: {limit: 3}\nprofile: mine.json\n")
    assert recipe.sections == {"data": {"limit": 3}} and recipe.shared == {"profile": "mine.json"}


def test_unknown_key_on_the_command_line_is_one_line_exit_2(project: Path) -> None:
    from click.testing import CliRunner

    Path("vfl-train.yaml").write_text("select:\n  budgett: 0.2\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["profile", "--output", "x"])
    assert result.exit_code == 2
    expected = "error: vfl-train.yaml: unknown key of select 'budgett' (did you mean 'budget'?)\n"
    assert result.stderr == expected
