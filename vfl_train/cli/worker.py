"""One process of a launched run: `python -m vfl_train.cli.worker FOLDER`, started by `training.launch`.

Only the first process talks; how each ended stands in FOLDER/rank-K.json, which the launcher reads.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfl_train.cli.command import quiet_libraries
from vfl_train.cli.main_group import CliState, Terminated, as_vfl_error, messages, sigterm
from vfl_train.config import LoraConfig, SelectConfig
from vfl_train.cpu import keep_freed_memory
from vfl_train.training.launch import CONFIG, INTERRUPTED, OUTCOME, PROCESS, TERMINATED

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def main(folder: Path, call: Callable[[Any], object] | None = None) -> int:
    """Do what is asked with the settings in `folder`; returns the exit code and leaves the outcome there."""
    (folder / PROCESS.format(os.getpid())).touch()  # whom the launcher sends signals on to
    _end_with_the_launcher()
    keep_freed_memory()
    handed = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    quiet_libraries(CliState(debug=handed["debug"]))
    with messages(), sigterm():
        if rank > 0:
            logging.getLogger("vfl_train").setLevel(logging.CRITICAL)
        try:
            kind = SelectConfig if handed["kind"] == SelectConfig.__name__ else LoraConfig
            (call or _command(kind))(kind.bind(handed["config"]))
        except KeyboardInterrupt:
            return INTERRUPTED
        except Terminated:
            return TERMINATED
        except Exception as e:
            if handed["debug"]:
                traceback.print_exc()
            error = as_vfl_error(e)
            outcome = {
                "rank": rank, "code": error.exit_code, "message": error.message, "fix": error.fix,
                "time": time.time(),
            }  # fmt: skip
            (folder / OUTCOME.format(rank)).write_text(json.dumps(outcome), encoding="utf-8")
            return error.exit_code
    return 0


def _command(kind: type) -> Callable[[Any], object]:
    """What is done with settings of this kind."""
    if kind is SelectConfig:
        from vfl_train.data_select.run import select

        return select
    from vfl_train.training.run import train_lora

    return train_lora


def _end_with_the_launcher() -> None:
    """Have the kernel end this process when the launcher is killed: nobody else would, and it holds a GPU."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    if code:
        # At the end of the interpreter, the threads of a broken process group may abort it, or wait for a
        # process that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
