"""--help teaches and is fast: nothing heavy is imported, every command shows an example that works."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from vfl_train.cli import main
from vfl_train.cli.command import config_of
from vfl_train.cli.main_group import CliState
from vfl_train.options import specs

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "matplotlib", "pyarrow", "numpy", "PIL")
CONTRACT = {
    "demo": "output",
    "run": "",
    "profile": "model adapter functions probes pairs intervention phase path output dry-run",
    "probes": "",
    "select": "model profile data image-root budget functions method ablation mix from-scores output fill "
    "layer-rule dry-run",
    "lora": "model profile functions layers data output layer-rule per-function control dry-run deepspeed "
    "num-processes load-in-4bit cache-prefix",
    "eval": "model adapter probes data drop-from rerun fail-if-drop output",
    "knockout": "model data shots module output",
    "merge": "output",
    "export": "output target push-to-hub",
    "verify": "",
    "migrate": "output",
    "plan": "profile functions emit",
    "data": "",
    "env": "",
}
LOADS_A_MODEL = ("profile", "select", "lora", "eval", "knockout")
MODEL_OPTIONS = "revision dtype device load-in-4bit max-pixels limit seed"


def option_names(command: click.Command) -> set[str]:
    return {name for param in command.params for name in param.opts if name.startswith("--")}


def test_commands_are_those_of_the_contract() -> None:
    assert set(main.commands) == set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_options_are_those_of_the_contract(name: str) -> None:
    wanted = CONTRACT[name].split() + (MODEL_OPTIONS.split() if name in LOADS_A_MODEL else [])
    assert {f"--{option}" for option in wanted} <= option_names(main.commands[name])


@pytest.mark.parametrize("name", CONTRACT)
def test_help_explains(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output and f"vfl-train {name}" in result.output
    for spec in specs(main.commands[name].config_class).values():
        assert spec.help.endswith((".", "]")), f"{spec.name}: a sentence, please"


@pytest.mark.parametrize("name", CONTRACT)
def test_first_sentence_fits_the_overview(name: str) -> None:
    overview = CliRunner().invoke(main, ["--help"]).output
    (line,) = [line for line in overview.splitlines() if line.startswith(f"  {name} ")]
    assert not line.endswith("...")


def examples() -> list[list[str]]:
    found = []
    for command in main.commands.values():
        text = command.epilog.split("Example:")[1].replace("\\\n", " ")
        found += [shlex.split(line, comments=True) for line in text.strip().splitlines()]
    return found


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_example_binds(words: list[str], tmp_path, monkeypatch) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.json").touch()
    monkeypatch.chdir(tmp_path)
    assert words[0] == "vfl-train"
    command = main.commands[words[1]]
    ctx = command.make_context(words[1], words[2:], parent=click.Context(main, obj=CliState()))
    config_of(ctx, command.config_class)


def test_without_arguments_it_shows_the_overview() -> None:
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0 and "Commands:" in result.output


def test_help_imports_nothing_heavy_and_is_fast() -> None:
    code = (
        "import sys\n"
        "from vfl_train.cli import main\n"
        "for args in [[], *([name] for name in main.commands)]:\n"
        "    main.main([*args, '--help'], standalone_mode=False)\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert seconds < 1.5


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output.startswith("vfl-train, version 0.")


def test_env_shows_no_paths(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 0
    assert "torch" in result.output and "device" in result.output
    assert "/" not in result.output and "hf_xx" not in result.output
