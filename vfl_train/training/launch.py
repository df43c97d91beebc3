"""One command, several processes: `vfl-train lora` starts itself again under torchrun, one process a GPU.

    one machine           a process for each GPU (CUDA_VISIBLE_DEVICES counts), or --num-processes
    several, by hand      the same command on each, with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT)
    several, under srun   one task a node: that node's launcher; one task a GPU: the tasks are the processes
    inside torchrun       RANK and WORLD_SIZE are there: nothing is started, the process just trains

The processes get the settings as a file, so that a call from Python is launched like a command line. Each
leaves its outcome in a file beside it; from these and torchrun's own findings the launcher raises, once, the
error that was first, with its contracted exit code. torchrun runs in this very process (its `run`, which
`python -m torch.distributed.run` calls too): signals reach the processes through it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from vfl_train.errors import ConfigError, DistributedError, VflError
from vfl_train.options import specs

if TYPE_CHECKING:
    from vfl_train.config import LoraConfig, SelectConfig

CONFIG, OUTCOME, PROCESS = "config.json", "rank-{}.json", "process.{}"
WORKER = "vfl_train.cli.worker"
INTERRUPTED, TERMINATED, DISTRIBUTED = 130, 143, DistributedError.exit_code
# How long the processes may take to end after SIGHUP or SIGQUIT, which ask for no checkpoint; then they are
# killed. Those that SIGTERM or Ctrl-C stop have all the time they need: torchrun does not hear of it.
_SHUTDOWN_SECONDS = 8
_PORTS = range(20000, 40000)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which this one is. `address` None: this machine alone."""

    count: int = 1
    rank: int = 0
    address: str | None = None
    port: int = 29500


def launched(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of a group already, as torchrun or srun with one task a GPU starts it."""
    return {"RANK", "WORLD_SIZE"} <= environment.keys()


def relaunch(config: LoraConfig | SelectConfig) -> bool:
    """Work in several processes, if that is wanted and this is not one of them. Returns whether it was done.

    Raises:
        ConfigError: the environment names several nodes and not how to meet.
        VflError: of the class and with the message of the process that failed first.
        KeyboardInterrupt: Ctrl-C; the processes have ended.
    """
    _adopt_srun_task(os.environ)
    if launched(os.environ):
        return False
    nodes, processes = find_nodes(os.environ), wanted_processes(config)
    if nodes.count * processes == 1 and getattr(config, "deepspeed", None) is None:
        return False
    _free_this_process()
    with tempfile.TemporaryDirectory(prefix="vfl-train-") as scratch:
        folder = Path(scratch)
        (folder / CONFIG).write_text(handed_over(config), encoding="utf-8")
        with _environment({"OMP_NUM_THREADS": str(threads(processes))}), _torchrun_is_quiet():
            _run(nodes, processes, folder)
    return True


def wanted_processes(config: LoraConfig | SelectConfig) -> int:
    """Processes of this machine: --num-processes, else one a visible GPU unless --device names one device.
    Raises ConfigError for more than there are GPUs."""
    if config.device not in ("auto", "cuda"):
        return config.num_processes or 1
    import torch

    gpus = torch.cuda.device_count()
    if gpus and (config.num_processes or 0) > gpus:
        raise ConfigError(
            f"--num-processes {config.num_processes} needs as many GPUs; {gpus} are visible",
            "take fewer, or --device cpu",
        )
    return config.num_processes or max(1, gpus)


def all_processes(config: LoraConfig | SelectConfig) -> int:
    """Processes of the whole run, over all its machines: this one's group, or the one that `relaunch` would
    start. Raises ConfigError as that."""
    if launched(os.environ):
        return int(os.environ["WORLD_SIZE"])
    return find_nodes(os.environ).count * wanted_processes(config)


def threads(processes: int) -> int:
    """Threads a process computes with on the CPU: with more than its share of the cores all of them crawl."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def handed_over(config: LoraConfig | SelectConfig) -> str:
    """The settings as JSON that `bind` of the class named by `kind` takes back."""
    values = {name: getattr(config, name) for name in specs(type(config))}
    debug = logging.getLogger("vfl_train").getEffectiveLevel() <= logging.DEBUG
    return json.dumps({"kind": type(config).__name__, "config": values, "debug": debug}, default=str)


# --- where the machines are ------------------------------------------------------------------------


def find_nodes(environment: Mapping[str, str]) -> Nodes:
    """From NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or from srun with one task a node.

    Raises ConfigError naming the variable that is missing or is no number."""
    count = _number(environment, "NNODES", _number(environment, "SLURM_STEP_NUM_NODES", 1))
    if count == 1:
        return Nodes()
    by_srun = "SLURM_NODEID" in environment and "NNODES" not in environment
    rank = _number(environment, "NODE_RANK", _number(environment, "SLURM_NODEID", -1) if by_srun else -1)
    address = environment.get("MASTER_ADDR") or (_first_host(environment) if by_srun else None)
    if rank < 0 or rank >= count:
        raise ConfigError(f"NNODES is {count}, but NODE_RANK does not say which one this is", "set 0, 1, ...")
    if not address:
        raise ConfigError(f"NNODES is {count}, but MASTER_ADDR names no node to meet at", "name node 0")
    return Nodes(count, rank, address, _port(environment))


def _adopt_srun_task(environment: Any) -> None:
    """srun with several tasks a node: each task is a process of the group, so name it as torchrun would.
    Only inside a job step: a batch script carries SLURM_NTASKS too, and nobody else would come."""
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    if launched(environment) or tasks <= nodes:
        return
    named = {
        "RANK": environment.get("SLURM_PROCID"), "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment.get("SLURM_LOCALID"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment),
        "MASTER_PORT": str(_port(environment)),
    }  # fmt: skip
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise ConfigError(f"srun runs {tasks} tasks, but nothing says {missing[0]}", "set it")
    environment.update(named)


def _first_host(environment: Mapping[str, str]) -> str | None:
    """The first name of a node list such as `gpu[003-007,9],login1`."""
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", names)
    return "".join(part or "" for part in found.groups()) if found else None


def _port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT, or one that all nodes of a SLURM job derive alike and two jobs hardly share."""
    job = _number(environment, "SLURM_JOB_ID", 0)
    return _number(environment, "MASTER_PORT", _PORTS[job % len(_PORTS)] if job else 29500)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if text and not text.isdigit():
        raise ConfigError(f"{name}={text!r} is not a number", "set it to one, or unset it")
    return int(text) if text else default


# --- running, and what came of it ------------------------------------------------------------------


def torchrun_arguments(nodes: Nodes, processes: int, folder: Path) -> list[str]:
    """torchrun's command line. No restarts: what failed once is looked at, not repeated."""
    where = ["--standalone", "--local-addr=127.0.0.1"]
    if nodes.address is not None:
        where = [
            f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}",
            f"--master-addr={nodes.address}", f"--master-port={nodes.port}",
        ]  # fmt: skip
    limits = [
        "--max-restarts=0", f"--shutdown-timeout={_SHUTDOWN_SECONDS}", "--signals-to-handle=SIGHUP,SIGQUIT",
    ]  # fmt: skip
    return [*where, f"--nproc-per-node={processes}", *limits, "-m", WORKER, str(folder)]


def _run(nodes: Nodes, processes: int, folder: Path) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with _PassedOn(folder) as signals:
        try:
            run.run(run.parse_args(torchrun_arguments(nodes, processes, folder)))
        except ChildFailedError as e:
            codes = {rank: failure.exitcode for rank, failure in e.failures.items()}
            signals.number = signals.number or stopped_by(codes)
            failure = first_failure(folder, codes)
            # Lost processes are what a signal brings about; a full disk while they save is not.
            if not signals.number or failure.exit_code not in (VflError.exit_code, DISTRIBUTED):
                raise failure from e
        except (RuntimeError, OSError) as e:  # the nodes did not find each other
            reason = str(e).strip().splitlines()[0]
            raise DistributedError(
                f"torchrun could not start: {reason}", "check MASTER_ADDR, MASTER_PORT and NNODES"
            ) from e
    if signals.number:
        signal.raise_signal(signals.number)  # the processes have ended; now it is for our own handler
        raise KeyboardInterrupt  # there was none


class _PassedOn:
    """Sends SIGTERM and Ctrl-C on to the processes and waits for them: torchrun would kill them seconds
    later, in the middle of the checkpoint that they write first. `number`: of the signal that came."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the others cannot have handlers
            numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
            self._before = {number: signal.getsignal(number) for number in numbers}
            for number in numbers[:2]:
                signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        processes = list(self.folder.glob(PROCESS.format("*")))
        if not processes:
            raise KeyboardInterrupt  # nothing has started yet
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(int(process.suffix[1:]), number)


def stopped_by(exit_codes: Mapping[int, int]) -> int:
    """The signal that stopped all these processes, or 0: one that another node got, or one of them alone."""
    found = set(exit_codes.values())
    if not found or not found <= {INTERRUPTED, TERMINATED}:
        return 0
    return signal.SIGTERM if TERMINATED in found else signal.SIGINT


def first_failure(folder: Path, exit_codes: Mapping[int, int]) -> VflError:
    """What to raise, from the outcomes in `folder` and the exit codes torchrun saw (negative: a signal).

    A process that names its own fault comes first, then one that died without a word; that a process lost
    another, or was ended by the launcher (SIGTERM), is only their consequence."""
    outcomes = sorted(map(_read_outcome, folder.glob(OUTCOME.format("*"))), key=lambda o: o["time"])
    told = {outcome["rank"] for outcome in outcomes}
    for outcome in outcomes:
        if outcome["code"] not in (DISTRIBUTED, INTERRUPTED, TERMINATED):
            return _as_error(outcome)
    for rank, code in sorted(exit_codes.items(), key=lambda item: (item[1] == -signal.SIGTERM, item)):
        if code < 0 and rank not in told:
            name = signal.Signals(-code).name
            hint = "often the machine ran out of memory" if name == "SIGKILL" else "see its messages above"
            return DistributedError(f"rank {rank} died (signal {-code}, {name}); the others were ended", hint)
    for outcome in outcomes:
        if outcome["code"] == DISTRIBUTED:
            return _as_error(outcome)
    rank, code = next(iter(sorted(exit_codes.items())), (0, 1))
    return DistributedError(f"rank {rank} ended with exit code {code} and without a message")


def _read_outcome(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _as_error(outcome: Mapping[str, Any]) -> VflError:
    """The error of a process, in the class of its exit code."""
    classes = {c.exit_code: c for c in VflError.__subclasses__()}
    return classes.get(outcome["code"], VflError)(outcome["message"], outcome["fix"])


def _free_this_process() -> None:
    """Give back the GPU memory that earlier steps of a pipeline left cached here: the processes need it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """`changes` where the user set nothing; everything as before afterwards (torchrun adds its own)."""
    before = dict(os.environ)
    for name, value in changes.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _torchrun_is_quiet() -> Iterator[None]:
    """torchrun's own log repeats each failure over a screen; `first_failure` says it in a line."""
    logger = logging.getLogger("torch.distributed.elastic")
    before = logger.level
    if logging.getLogger("vfl_train").getEffectiveLevel() > logging.DEBUG:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
