"""The group of all commands, and the one place where an exception becomes a line and an exit code."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click

from vfl_train.cpu import keep_freed_memory
from vfl_train.errors import ConfigError, DiskError, VflError
from vfl_train.hub.privacy import for_the_terminal

INTERRUPTED, TERMINATED = 130, 143

# Optional packages by the name of their import, with what brings them.
_EXTRAS = {"deepspeed": "deepspeed", "bitsandbytes": "quant", "flash_attn": "flash"}


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler on the way takes it for a failure."""


@dataclass
class CliState:
    """What the options of a command tell the outermost handler."""

    debug: bool = False


class MainGroup(click.Group):
    """Keeps the commands in the order they were added and exits by contract (see `vfl_train.errors`)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of use."""
        return list(self.commands)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; with `standalone_mode` the process ends with the contracted exit code."""
        state = CliState()

        def call() -> Any:
            return super(MainGroup, self).main(
                args=args,
                prog_name=prog_name or "vfl-train",
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                obj=state,
                **extra,
            )

        if not standalone_mode:
            return call()
        keep_freed_memory()
        with messages(), sigterm():
            code = exit_code_of(call, state)
        sys.exit(code)


def exit_code_of(call: Callable[[], Any], state: CliState) -> int:
    """Run `call`; report its failure as one line on stderr. Returns the exit code."""
    try:
        result = call()
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return _report("interrupted", INTERRUPTED)
    except Terminated:
        return _report("terminated", TERMINATED)
    except click.ClickException as e:
        return _report(f"error: {_with_help(e)}", e.exit_code)
    except Exception as e:
        if state.debug:
            traceback.print_exc()
        error = as_vfl_error(e)
        return _report(f"error: {error}", error.exit_code)


def as_vfl_error(error: Exception) -> VflError:
    """`error` as what the user can act on: a full disk, a missing optional package, or a fault of ours."""
    if isinstance(error, VflError):
        return error
    if _disk_is_full(error):
        return DiskError("the disk is full", "make room and run the same command again")
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        extra = _EXTRAS[error.name]
        return ConfigError(f"this needs the package {error.name}", f"pip install 'vfl-train[{extra}]'")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return VflError(
            "the device ran out of memory", "lower --batch-tokens or the batch size, or --max-pixels"
        )
    return VflError(f"{type(error).__name__}: {error}", "run again with --debug for the traceback")


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether ENOSPC is behind `error`. Libraries written in Rust say it only in their text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _with_help(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "vfl-train"
    return f"{error.format_message()} ({where} --help shows what it takes)"


def _report(message: str, code: int) -> int:
    """Print `message` as one line: text of data files may hold line ends and terminal commands."""
    line = " ".join(for_the_terminal(message).split())
    click.echo("".join(c if c.isprintable() else "?" for c in line), err=True)
    return code


class _ToStderr(logging.Handler):
    """Messages of our own modules, plainly, to whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        click.echo(prefix + for_the_terminal(record.getMessage()), err=True)


@contextmanager
def messages() -> Iterator[None]:
    """Messages of our modules go to stderr inside the block."""
    logger, handler = logging.getLogger("vfl_train"), _ToStderr()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def sigterm() -> Iterator[None]:
    """Turn SIGTERM into `Terminated`, so that `with` and `finally` blocks clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
