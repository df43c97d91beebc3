"""From one command to several processes: where they run, whose error comes back, how signals reach them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vfl_train.config import LoraConfig
from vfl_train.errors import ConfigError, DataError, DistributedError, NumericError, VflError
from vfl_train.training import launch
from vfl_train.training.launch import Nodes, find_nodes, first_failure, handed_over, relaunch, stopped_by

MakeConfig = Callable[..., LoraConfig]
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC")) or name in ("RANK", "WORLD_SIZE", "NNODES"):
            monkeypatch.delenv(name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The torchrun command lines that would have been run."""
    from torch.distributed import run

    lines: list[list[str]] = []
    monkeypatch.setattr(run, "run", lambda args: None)
    parse = run.parse_args
    monkeypatch.setattr(run, "parse_args", lambda line: lines.append(line) or parse(line))
    return lines


def test_one_process_is_not_launched(started: list, make_config: MakeConfig, tmp_path: Path) -> None:
    assert not relaunch(make_config(tmp_path))
    assert not relaunch(make_config(tmp_path, num_processes=1))
    assert not started


def test_one_process_a_visible_gpu(
    started: list, make_config: MakeConfig, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert relaunch(make_config(tmp_path, device="auto"))
    assert "--nproc-per-node=3" in started[0] and "--max-restarts=0" in started[0]
    assert not relaunch(make_config(tmp_path, device="cuda:1"))
    assert relaunch(make_config(tmp_path, device="auto", num_processes=2))
    assert "--nproc-per-node=2" in started[1]
    with pytest.raises(ConfigError, match="3 are visible"):
        relaunch(make_config(tmp_path, device="auto", num_processes=4))


def test_inside_torchrun_it_just_trains(
    started: list, make_config: MakeConfig, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not relaunch(make_config(tmp_path, num_processes=2))


def test_the_processes_get_exactly_the_settings(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, learning_rate=3e-5, allow_config_change=("seed", "x"), bf16=False, num_processes=2
    )
    assert LoraConfig.bind(json.loads(handed_over(config))["config"]) == config


def test_threads_share_the_cores(started: list, make_config: MakeConfig, tmp_path, monkeypatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(
        "torch.distributed.run.run", lambda args: seen.append(os.environ.get("OMP_NUM_THREADS"))
    )
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    relaunch(make_config(tmp_path, num_processes=2))
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    relaunch(make_config(tmp_path, num_processes=16))
    assert seen == ["4", "3"]


# --- several machines ----------------------------------------------------------------------------


def test_nodes_by_hand() -> None:
    named = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu1", "MASTER_PORT": "1234"}
    assert find_nodes(named) == Nodes(2, 1, "gpu1", 1234)
    line = launch.torchrun_arguments(find_nodes(named), 8, Path("x"))
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=gpu1", "--master-port=1234"} <= set(line)
    assert find_nodes({}) == Nodes()


@pytest.mark.parametrize(
    "left_out, named", [("NODE_RANK", "NODE_RANK"), ("MASTER_ADDR", "MASTER_ADDR"), ("NNODES", "NNODES")]
)
def test_nodes_that_cannot_meet_are_refused(left_out: str, named: str) -> None:
    environment = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu1"}
    environment = {**environment, left_out: "many" if left_out == "NNODES" else ""}
    with pytest.raises(ConfigError, match=named):
        find_nodes(environment)


SRUN = {
    "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[003-004,9].x,login1",
}  # fmt: skip


def test_srun_with_one_task_a_node_launches_there() -> None:
    assert find_nodes({**SRUN, "SLURM_STEP_NUM_TASKS": "2"}) == Nodes(2, 1, "gpu003.x", 20077)


@pytest.mark.parametrize("names, first", [("a1", "a1"), ("a1,a2", "a1"), ("n[7,9-12]", "n7"), ("", None)])
def test_the_first_host(names: str, first: str | None) -> None:
    assert launch._first_host({"SLURM_JOB_NODELIST": names}) == first


def test_srun_with_one_task_a_gpu_is_the_group(started, make_config, tmp_path, monkeypatch) -> None:
    tasks = {**SRUN, "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    for name, value in tasks.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set is put back
        monkeypatch.delenv(name)
    assert not relaunch(make_config(tmp_path))
    assert [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["9", "16", "1"]
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu003.x", "20077")


def test_a_batch_script_waits_for_nobody(started, make_config, tmp_path, monkeypatch) -> None:
    """sbatch sets SLURM_NTASKS and SLURM_PROCID for the script itself, which runs once."""
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    assert not relaunch(make_config(tmp_path))
    assert "RANK" not in os.environ


# --- whose error it was ---------------------------------------------------------------------------


def outcome(folder: Path, rank: int, code: int, message: str, at: float) -> None:
    entry = {"rank": rank, "code": code, "message": message, "fix": "do", "time": at}
    (folder / launch.OUTCOME.format(rank)).write_text(json.dumps(entry))


@pytest.mark.parametrize(
    "outcomes, codes, kind, text",
    [
        ([(0, 6, "lost rank 1", 1.0), (1, 3, "bad row", 2.0)], {0: 6, 1: 3}, DataError, "bad row"),
        ([(1, 5, "later", 9.0), (0, 5, "first", 3.0)], {0: 5}, NumericError, "first"),
        ([(0, 6, "lost rank 1", 1.0)], {0: 6, 1: -9}, DistributedError, "rank 1 died (signal 9, SIGKILL)"),
        ([], {0: -15, 1: -9}, DistributedError, "rank 1 died (signal 9, SIGKILL)"),
        ([], {0: -15}, DistributedError, "rank 0 died (signal 15, SIGTERM)"),
        ([(0, 6, "lost rank 1", 1.0)], {0: 6}, DistributedError, "lost rank 1"),
        ([(0, 1, "RuntimeError: odd", 1.0)], {0: 1}, VflError, "RuntimeError: odd"),
        ([], {1: 1}, DistributedError, "rank 1 ended with exit code 1"),
    ],
)
def test_the_first_cause_is_raised(tmp_path: Path, outcomes, codes, kind, text) -> None:
    for entry in outcomes:
        outcome(tmp_path, *entry)
    error = first_failure(tmp_path, codes)
    assert type(error) is kind and text in str(error)


# --- real processes, without the imports of training ----------------------------------------------

STUB = """
import os, signal, sys, time
from pathlib import Path
from vfl_train.cli import worker
from vfl_train.errors import DataError, DiskError

def call(config):
    rank = os.environ["RANK"]
    (Path(os.environ["VFL_STUB"]) / f"ready-{rank}").touch()
    if config.seed == 3 and rank == "1":
        raise DataError("row 7 is bad", "mend it")
    if config.seed == 9 and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        time.sleep(60 if config.seed else 0)
    except BaseException:
        time.sleep(3)  # as long as the step and its checkpoint take
        folder = Path(os.environ["VFL_STUB"])
        (folder / f"saved-{rank}").touch()
        while config.seed < 3 and len(list(folder.glob("saved-*"))) < 2:
            time.sleep(0.01)  # they leave together
        if config.seed == 2:
            raise DiskError("the disk is full", "make room")
        raise

code = worker.main(Path(sys.argv[1]), call)
if code:
    os._exit(code)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stub_worker.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("VFL_STUB", str(tmp_path))
    monkeypatch.setattr(launch, "WORKER", "stub_worker")
    return tmp_path


def test_a_failure_ends_the_others_and_comes_back_as_it_was(stub: Path, make_config: MakeConfig) -> None:
    begin = time.monotonic()
    with pytest.raises(DataError) as raised:
        relaunch(make_config(stub / "out", num_processes=2, seed=3))
    assert (raised.value.message, raised.value.fix) == ("row 7 is bad", "mend it")
    assert time.monotonic() - begin < 40  # not the 60 s that the other one sleeps


def test_a_killed_process_is_named(stub: Path, make_config: MakeConfig) -> None:
    with pytest.raises(DistributedError, match=r"rank 1 died \(signal 9, SIGKILL\)"):
        relaunch(make_config(stub / "out", num_processes=2, seed=9))


LAUNCHER = """
import sys
from vfl_train.cli import main
from vfl_train.training import launch

launch.WORKER, launch._SHUTDOWN_SECONDS = "stub_worker", 1
main("lora --data x --output y --layers 1 --num-processes 2 --device cpu --seed".split() + sys.argv[1:])
"""


@pytest.mark.parametrize(
    "seed, number, code, line",
    [
        ("1", signal.SIGTERM, 143, "terminated"),
        ("1", signal.SIGINT, 130, "interrupted"),
        ("2", signal.SIGTERM, 7, "error: the disk is full (make room)"),
    ],
)
def test_signals_reach_the_processes_and_these_may_finish(
    stub: Path, seed: str, number: int, code: int, line: str
) -> None:
    """What fails while they finish is told all the same."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, seed], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while len(list(stub.glob("ready-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors.strip()) == (code, line)
    assert len(list(stub.glob("saved-*"))) == 2


def test_processes_that_a_signal_stopped_are_no_failure() -> None:
    """Only one of them got it, or those of another node: they stop together."""
    assert stopped_by({0: 143, 1: 143}) == signal.SIGTERM
    assert stopped_by({0: 130, 1: 130}) == signal.SIGINT
    assert stopped_by({0: 6, 1: 143}) == stopped_by({0: -9}) == stopped_by({}) == 0


def test_the_processes_end_with_a_killed_launcher(stub: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, "1"], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(list(stub.glob("ready-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert _left(stub, 15.0) == []


def _left(folder: Path, seconds: float) -> list[Any]:
    """Processes of this test that still run after at most `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found = [p for p in Path("/proc").glob("[0-9]*/environ") if _is_ours(p, folder)]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def _is_ours(path: Path, folder: Path) -> bool:
    try:
        ours = f"VFL_STUB={folder}".encode() in path.read_bytes()
        return ours and b"-m\0stub_worker" in (path.parent / "cmdline").read_bytes()
    except OSError:
        return False
