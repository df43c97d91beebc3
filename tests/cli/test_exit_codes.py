"""Every failure is one line on stderr and the exit code of the contract."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vfl_train import errors
from vfl_train.cli import main
from vfl_train.cli.command import config_command
from vfl_train.cli.main_group import MainGroup
from vfl_train.options import Config

CODES = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.VerificationError: 4,
    errors.NumericError: 5,
    errors.DistributedError: 6,
    errors.DiskError: 7,
    errors.HubError: 8,
}


def fails_with(error: BaseException, *args: str) -> Result:
    """Result of a command whose work raises `error`."""
    group = MainGroup("vfl-train")

    @config_command("work", Config, "vfl-train work")
    def work(config: Config) -> None:
        """Fail."""
        raise error

    group.add_command(work)
    return CliRunner().invoke(group, ["work", *args])


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_our_errors(kind: type[errors.VflError], code: int) -> None:
    result = fails_with(kind("row 3 is bad", "mend it"))
    assert (result.exit_code, result.stderr) == (code, "error: row 3 is bad (mend it)\n")


def test_every_error_class_is_tested() -> None:
    kinds = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.VflError)}
    assert kinds == {*CODES, errors.VflError}


def test_foreign_error_is_one_line() -> None:
    result = fails_with(RuntimeError("first\nsecond"))
    assert result.exit_code == 1
    expected = "error: RuntimeError: first second (run again with --debug for the traceback)\n"
    assert result.stderr == expected


def test_debug_shows_the_traceback() -> None:
    result = fails_with(RuntimeError("deep inside"), "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "raise error" in result.stderr


def test_terminal_commands_in_data_are_not_sent_to_the_terminal() -> None:
    result = fails_with(errors.DataError("row \x1b[2J\x07 is bad"))
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError('IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
def test_full_disk(error: Exception) -> None:
    result = fails_with(error)
    assert result.exit_code == 7 and "disk is full" in result.stderr


def test_full_disk_behind_another_error() -> None:
    outer = RuntimeError("unexpected pos 704 vs 598")
    outer.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert fails_with(outer).exit_code == 7


def test_missing_extra_is_named_with_its_command() -> None:
    result = fails_with(ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed"))
    assert result.exit_code == 2 and "pip install 'vfl-train[deepspeed]'" in result.stderr


def test_ctrl_c() -> None:
    result = fails_with(KeyboardInterrupt())
    assert result.exit_code == 130 and result.stderr.strip() == "interrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_process_cleanly(number: signal.Signals, code: int, tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from vfl_train.cli import main\n"
        "from vfl_train.cli.command import config_command\n"
        "from vfl_train.options import Config\n"
        "@config_command('work', Config, '')\n"
        "def work(config):\n"
        "    try:\n"
        "        pathlib.Path('started').touch(); time.sleep(30)\n"
        "    finally:\n"
        "        pathlib.Path('cleaned').touch()\n"
        "main.add_command(work)\n"
        "main(['work'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert (tmp_path / "cleaned").exists() and b"Traceback" not in stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("profil", "Did you mean 'profile'?"),
        ("profile --pair 3 --output x", "--pairs"),
        ("profile --pairs many --output x", "--pairs must be a whole number, not 'many'"),
        ("profile --intervention swop --output x", "did you mean 'swap'?"),
        ("profile", "--output is missing"),
        ("profile --output", "--output"),
        ("profile --output x --functions ocr,Count", "'Count' is not a function name"),
        ("profile --output x --functions ocr,ocr", "twice"),
        ("profile --output x --device gpu", "--device"),
        ("profile --output x --pairs 0", "at least 1"),
        ("merge --output x", "ADAPTER... is missing"),
        ("lora --data d --output x", "which layers to train"),
        ("lora --data d --output x --layers 20-23 --functions ocr", "exclude each other"),
        ("lora --data d --output x --layers 23-20", "rising range"),
        ("lora --data d --output x --layers 3 --learning-rate nan", "--learning-rate"),
        ("select --profile p --data d --output x --budget 1.5", "--budget"),
        ("select --profile p --data d --output x --mix ocr=0.9,count=0.9", "adds up to 1.8"),
        ("eval --output x --fail-if-drop ocr=1", "--adapter"),
        ("eval --output x --adapter a --fail-if-drop ocr", "NAME=NUMBER"),
        ("export a --output x --push-to-hub me", "USER/NAME"),
        ("data look d", "must be one of check, preview"),
    ],
)
def test_usage_errors_exit_2_in_one_line(args: str, word: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, args.split())
    assert result.exit_code == 2
    assert word in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")


def test_no_option_takes_a_token() -> None:
    names = {name for command in main.commands.values() for param in command.params for name in param.opts}
    assert not [
        name for name in names if "token" in name and name not in ("--batch-tokens", "--max-new-tokens")
    ]


def test_libraries_are_told_to_be_quiet(tmp_path: Path) -> None:
    code = (
        "import os\nfrom vfl_train.cli import main\n"
        "main.main(['knockout', '--data', 'd', '--output', 'o', *FLAGS], standalone_mode=True)\n"
    )
    names = ("HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    for flags, verbosity in (([], "error"), (["--debug"], None)):
        script = "import atexit\natexit.register(lambda: print([os.environ.get(n) for n in NAMES]))\n" + code
        script = script.replace("NAMES", repr(names)).replace("FLAGS", repr(flags))
        done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, cwd=tmp_path)
        assert done.stdout.decode().splitlines()[-1] == repr(["1", "false", verbosity])
