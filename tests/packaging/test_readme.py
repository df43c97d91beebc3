"""The README's commands exist, take the options it shows, and are what .ci/run runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from vfl_train.cli import main
from vfl_train.cli.main_group import CliState

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL) + re.findall(
    r"`([^`\n]+)`", README
)


def commands(text: str) -> list[str]:
    """Single commands of shell text: joined over line ends, split at `&&`."""
    lines = text.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def vfl_commands() -> list[list[str]]:
    words = (
        shlex.split(c) for text in CODE for c in commands(text) if re.match(r"(\.venv/bin/)?vfl-train\b", c)
    )
    return [found for found in words if len(found) > 1]


@pytest.mark.parametrize("words", vfl_commands(), ids=" ".join)
def test_command_parses(words: list[str]) -> None:
    args = words[1:]
    if args[0] == "COMMAND":
        return
    command = main.commands[args[0]]
    if args[-1].startswith("--"):  # the README speaks of the option, not of a value
        assert args[-1] in {name for param in command.params for name in param.opts}
        return
    parent = click.Context(main, obj=CliState())
    command.make_context(args[0], args[1:], parent=parent)


def test_readme_names_every_command_that_works() -> None:
    shown = {words[1] for words in vfl_commands()}
    assert shown >= set(main.commands)


def test_ci_runs_what_the_readme_says() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    said = [c for text in CODE for c in commands(text) if c.startswith(".venv/bin/")]
    assert any("pip install -c constraints.txt -e ." in c for c in said)
    assert '-c constraints.txt -e ".[test]"' in ci and ".venv/bin/python -m pytest" in ci
    assert '.venv/bin/pip install -c constraints.txt -e ".[test]"' in said
    assert ".venv/bin/python -m pytest" in said


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_exit_codes_are_those_of_the_errors() -> None:
    from vfl_train import errors

    codes = {
        e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.VflError)
    }
    table = README.split("## Exit codes")[1].split("\n## ")[0]
    shown = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(",")
    }
    assert shown == codes | {0, 130, 143}
