"""Checkpoints on the disk: whole or not there, whatever happens while they are written or lie there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from nursery import forked
from resume_cases import die_at

from vfl_train.errors import ConfigError, DiskError, VerificationError
from vfl_train.training import checkpoint
from vfl_train.training.checkpoint import clean, newest_valid, problem, require_room, save

FILES = {
    "adapter_model.safetensors": bytes(range(256)) * 40,
    "optimizer.safetensors": bytes(reversed(range(256))) * 80,
    "rng.safetensors": b"\x01\x02" * 500,
    "progress.json": b'{"global_step": 1}',
    "templates/chat_template.jinja": b"{{ messages }}",
}
FINGERPRINT = {"command": "lora", "options": {"learning_rate": 1e-4}, "versions": {"torch": "2"}}
EVERY_FILE = (*FILES, checkpoint.MANIFEST)


def test_a_checkpoint_is_its_files_and_a_manifest_that_proves_them(tmp_path: Path) -> None:
    folder = save(tmp_path, 123, FILES, FINGERPRINT)
    assert folder == tmp_path / "step-000123" and problem(folder) == ""
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 123 and manifest["fingerprint"] == FINGERPRINT
    assert set(manifest["files"]) == set(FILES)
    assert {"sha256", "bytes"} == set(manifest["files"]["progress.json"])
    found = newest_valid(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 123
    assert found.checkpoint.fingerprint == FINGERPRINT and found.skipped == ()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000123"]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere") == checkpoint.Found(None, ())
    (tmp_path / "step-000001.bak").mkdir()
    (tmp_path / "step-000002").write_text("a file")
    assert newest_valid(tmp_path).checkpoint is None


def test_as_many_stay_as_asked_for_and_the_newest_is_by_number(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, FILES, FINGERPRINT, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]
    found = newest_valid(tmp_path).checkpoint
    assert found is not None and found.step == 1_000_001


def test_the_old_ones_stay_until_the_new_one_has_been_read_back(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, FILES, FINGERPRINT, keep=2)
    real = checkpoint._write

    def rotten(path: Path, content: bytes) -> None:
        real(path, content[:-1] + b"?" if path.name == "rng.safetensors" else content)

    monkeypatch.setattr(checkpoint, "_write", rotten)
    with pytest.raises(VerificationError, match=r"rng\.safetensors has changed"):
        save(tmp_path, 3, FILES, FINGERPRINT, keep=2)
    found = newest_valid(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 2
    assert problem(tmp_path / "step-000001") == ""


def test_a_damaged_one_of_the_same_step_is_replaced_and_a_valid_one_left(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, FILES, FINGERPRINT)
    (folder / "progress.json").unlink()
    save(tmp_path, 1, FILES, FINGERPRINT)
    assert problem(folder) == ""
    before = (folder / checkpoint.MANIFEST).stat().st_ino
    save(tmp_path, 1, {"other": b""}, FINGERPRINT)
    assert (folder / checkpoint.MANIFEST).stat().st_ino == before


def test_a_damaged_one_of_a_later_step_takes_no_place(tmp_path: Path) -> None:
    """Else the checkpoint just written would be the oldest beyond `keep`, and only the damaged one stay."""
    for step in (2, 4):
        save(tmp_path, step, FILES, FINGERPRINT)
    (tmp_path / "step-000004" / "progress.json").unlink()
    save(tmp_path, 3, FILES, FINGERPRINT, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    assert newest_valid(tmp_path).checkpoint is not None


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "MANIFEST.json"])
def test_no_file_lands_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="inside a checkpoint"):
        save(tmp_path / "checkpoints", 1, {name: b""}, FINGERPRINT)
    assert not any((tmp_path / "checkpoints").iterdir())


# --- R4: corruption ----------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, truncate, empty, flip_a_bit])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_every_damage_is_found_by_name_and_the_older_one_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """R4, on disk alone: 6 files x 4 kinds of damage."""
    for step in (1, 2):
        save(tmp_path, step, FILES, FINGERPRINT)
    damage(tmp_path / "step-000002" / name)
    found = newest_valid(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 1
    ((skipped, reason),) = found.skipped
    assert skipped == "step-000002" and name in reason


def test_any_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    """A flip in a number of the fingerprint leaves good JSON; the manifest's own hash finds it."""
    folder = save(tmp_path, 1, FILES, FINGERPRINT)
    whole = (folder / checkpoint.MANIFEST).read_bytes()
    for position in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[position] ^= 1
        (folder / checkpoint.MANIFEST).write_bytes(broken)
        same = json.loads(whole) == _parsed(bytes(broken))  # white space
        assert same or problem(folder), position
    (folder / checkpoint.MANIFEST).write_text("[]")
    assert problem(folder) == "MANIFEST.json is damaged"


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    save(tmp_path, 1, FILES, FINGERPRINT).rename(tmp_path / "step-000009")
    assert newest_valid(tmp_path).skipped == (("step-000009", "MANIFEST.json is that of step 1"),)


# --- R1, R2: kills -------------------------------------------------------------------------------------


def write_until_killed(root: Path, pulse: int) -> None:
    """Save one checkpoint after the other; a byte to `pulse` before each file."""
    real = checkpoint._write

    def told(path: Path, content: bytes) -> None:
        os.write(pulse, b".")
        real(path, content)

    checkpoint._write = told
    found = newest_valid(root).checkpoint
    assert found is not None
    for step in range(found.step + 1, 1_000_000):
        save(root, step, FILES, FINGERPRINT, keep=2)


def test_a_hundred_kills_leave_no_invalid_newest(tmp_path: Path) -> None:
    """R2: 0 of 100, and the next start cleans up. The moments follow the writing, not the clock: a kill comes
    after 1 to 20 files, and within the time that a file takes here."""
    rng, leftovers, last = random.Random(0), 0, 1
    times = [time.monotonic()]
    for step in (1, 2, 3):
        save(tmp_path, step, FILES, FINGERPRINT)
        times.append(time.monotonic())
    one_file = min(after - before for before, after in pairwise(times)) / len(EVERY_FILE)
    for _ in range(100):
        heard, pulse = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(tmp_path, pulse)
            finally:
                os._exit(1)
        os.close(pulse)
        for _ in range(rng.randint(1, 20)):
            assert os.read(heard, 1) == b"."
        time.sleep(rng.uniform(0.0, one_file))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(heard)
        found = newest_valid(tmp_path)
        assert found.checkpoint is not None and not found.skipped
        assert found.checkpoint.step >= last
        last = found.checkpoint.step
        leftovers += any(tmp_path.glob(".tmp-*"))
        clean(tmp_path)
        assert all(p.name.startswith("step-") for p in tmp_path.iterdir())
    assert leftovers > 20 and last > 50, "the kills did not hit the writing, or none was finished"


def test_a_kill_at_every_write_boundary_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """R1 for the writer alone: also while the oldest is taken away. test_resume does it with a whole run."""
    boundary, steps = 0, []
    while True:
        boundary += 1
        root = tmp_path / str(boundary)
        for step in (1, 2):
            save(root, step, FILES, FINGERPRINT)
        code, count = forked(die_at, boundary, lambda root=root: save(root, 3, FILES, FINGERPRINT))
        found = newest_valid(root)
        assert found.checkpoint is not None and not found.skipped, boundary
        clean(root)
        steps.append(found.checkpoint.step)
        assert len(list(root.iterdir())) >= 2
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert count == boundary - 1 and count >= 2 * len(EVERY_FILE) + 4
    assert steps == sorted(steps) and set(steps) == {2, 3}


# --- R10: the disk -----------------------------------------------------------------------------------


def test_a_full_disk_in_the_middle_removes_the_stage_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1, FILES, FINGERPRINT)
    real = os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) > 15_000:  # the optimizer
            real(descriptor, content[:5000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskError, match="the disk is full") as raised:
        save(tmp_path, 2, FILES, FINGERPRINT)
    assert raised.value.exit_code == 7 and "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert problem(tmp_path / "step-000001") == ""


def test_too_little_room_is_refused_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 3_300_000))
    require_room(tmp_path, size=1_000_000, keep=2)
    with pytest.raises(DiskError, match=r"room for 3\.3 MB, 2 checkpoints need 3\.6 MB"):
        require_room(tmp_path, size=1_100_000, keep=2)
    save(tmp_path, 1, {"x": bytes(400_000)}, FINGERPRINT)  # what will be taken away counts as room
    require_room(tmp_path, size=1_100_000, keep=2)


# --- R5: whose checkpoint ------------------------------------------------------------------------------


def test_checkpoints_stay_until_the_run_is_done_and_are_in_no_manifest(tmp_path: Path) -> None:
    from vfl_train.runs import CHECKPOINTS, RunFolder

    output = tmp_path / "run"

    def attempt(fail: bool) -> None:
        with RunFolder.open(output, FINGERPRINT) as run:
            save(run.folder / CHECKPOINTS, 1, FILES, FINGERPRINT)
            run.write_text("result.txt", "x")
            if fail:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        attempt(fail=True)
    assert newest_valid(output / CHECKPOINTS).checkpoint is not None
    attempt(fail=False)
    assert sorted(p.name for p in output.iterdir()) == [".vfl-run.json", "manifest.json", "result.txt"]
    assert set(json.loads((output / "manifest.json").read_text())["files"]) == {"result.txt"}
    (output / CHECKPOINTS).mkdir()  # killed between the mark "done" and the removal
    with RunFolder.open(output, FINGERPRINT) as run:
        assert run.already_done
    assert not (output / CHECKPOINTS).exists()


def test_a_change_stays_allowed_until_a_checkpoint_has_it(tmp_path: Path) -> None:
    """The second attempt with it, after a first that ended before it saved anything."""
    from vfl_train.config import LoraConfig
    from vfl_train.runs import CHECKPOINTS, RunFolder
    from vfl_train.training.resume import Checkpoints

    key = "options.learning_rate"
    config = LoraConfig(data="x", output=tmp_path, layers="1", allow_config_change=("learning_rate",))
    with pytest.raises(RuntimeError), RunFolder.open(tmp_path, FINGERPRINT) as run:
        save(run.folder / CHECKPOINTS, 2, FILES, FINGERPRINT)
        raise RuntimeError
    other = {**FINGERPRINT, "options": {"learning_rate": 2e-4}}
    for _ in range(2):
        with (
            pytest.raises(RuntimeError),
            RunFolder.open(tmp_path, other, allow_change=config.allow_config_change) as run,
        ):
            checkpoints = Checkpoints.of(run, config, {})
            assert checkpoints.find() == tmp_path / "checkpoints" / "step-000002"
            assert checkpoints.changed == (key,)
            raise RuntimeError


def test_allowed_settings_go_on_and_a_finished_run_never_changes(tmp_path: Path) -> None:
    from vfl_train.runs import RunFolder

    other = {**FINGERPRINT, "options": {"learning_rate": 2e-4}}
    with pytest.raises(RuntimeError), RunFolder.open(tmp_path, FINGERPRINT) as run:
        run.write_text("half.txt", "x")
        raise RuntimeError
    for option, offered in ((None, False), ([], True)):
        with pytest.raises(ConfigError) as caught:
            RunFolder.open(tmp_path, other, allow_change=option)
        assert ("--allow-config-change learning_rate" in caught.value.fix) is offered
    with RunFolder.open(tmp_path, other, allow_change=["learning_rate"]) as run:
        assert run.resumed
    with pytest.raises(ConfigError, match=r"options\.learning_rate was 0\.0002, is now 0\.0001") as caught:
        RunFolder.open(tmp_path, FINGERPRINT, allow_change=["learning_rate"])
    assert "--allow-config-change" not in caught.value.fix
