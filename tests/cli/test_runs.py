"""Output folders: one run a folder, nothing half-written, nothing foreign deleted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vfl_train.config import SelectConfig
from vfl_train.errors import ConfigError, DiskError, NumericError
from vfl_train.runs import MANIFEST, MARKER, RunFolder, dumps, fingerprint

FINGERPRINT = {"command": "work", "options": {"seed": 0, "pairs": 50}}


def finish(folder: Path, **changes: object) -> None:
    with RunFolder.open(folder, {**FINGERPRINT, **changes}) as run:
        run.write_json("result.json", {"x": 1})
        run.write_text("sub/notes.txt", "text\n")


def status(folder: Path) -> str:
    return json.loads((folder / MARKER).read_text())["status"]


def temporary_files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if "tmp" in p.name]


# --- resume, done, mismatch ----------------------------------------------------------------------


def test_finished_run_has_hashes_of_every_file(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    finish(out)
    content = (out / "result.json").read_bytes()
    files = json.loads((out / MANIFEST).read_text())["files"]
    assert set(files) == {"result.json", "sub/notes.txt"}
    assert files["result.json"] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    marker = json.loads((out / MARKER).read_text())
    assert marker["status"] == "done" and marker["fingerprint"] == FINGERPRINT
    assert set(marker["files"]) == {*files, MANIFEST}


def test_same_run_again_is_already_done_and_changes_nothing(tmp_path: Path) -> None:
    finish(tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    with RunFolder.open(tmp_path, FINGERPRINT) as run:
        assert run.already_done and not run.resumed
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}


def test_unfinished_run_is_resumed_with_its_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunFolder.open(tmp_path, FINGERPRINT) as run:
        run.write_text("part.txt", "kept")
        raise ValueError
    assert status(tmp_path) == "running"
    with RunFolder.open(tmp_path, FINGERPRINT) as run:
        assert run.resumed and not run.already_done
        assert run.path("part.txt").read_text() == "kept"
    assert status(tmp_path) == "done"


def test_new_and_empty_folders_are_neither(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, FINGERPRINT) as run:
        assert not run.resumed and not run.already_done


def test_another_run_is_refused_naming_key_and_both_values(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RunFolder.open(tmp_path, {"command": "work", "options": {"seed": 3, "pairs": 50}})
    assert "options.seed was 0, is now 3" in str(caught.value) and "--overwrite" in caught.value.fix
    assert "pairs" not in str(caught.value)


def test_a_key_that_is_new_or_gone_is_named(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(ConfigError, match='extra was "nothing", is now 1'):
        RunFolder.open(tmp_path, {**FINGERPRINT, "extra": 1})


def test_tuples_and_lists_are_the_same_fingerprint(tmp_path: Path) -> None:
    finish(tmp_path, functions=("ocr", "count"))
    assert RunFolder.open(tmp_path, {**FINGERPRINT, "functions": ["ocr", "count"]}).already_done


def test_missing_result_of_a_finished_run_is_noticed(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"result\.json is gone"):
        RunFolder.open(tmp_path, FINGERPRINT)


# --- foreign folders and --overwrite -----------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="vfl-train did not write"):
        RunFolder.open(tmp_path, FINGERPRINT, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_an_old_run_but_follows_no_link(tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    finish(out)
    (out / "link").symlink_to(outside)
    with RunFolder.open(out, {"command": "other"}, overwrite=True) as run:
        assert not run.resumed
        run.write_text("new.txt", "new")
    assert sorted(p.name for p in out.iterdir()) == sorted([MARKER, MANIFEST, "new.txt"])
    assert (outside / "precious").exists()


def test_overwrite_refuses_the_folder_one_is_in(tmp_path: Path, monkeypatch) -> None:
    finish(tmp_path)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises(ConfigError, match="you are in"):
        RunFolder.open(tmp_path, {"command": "other"}, overwrite=True)
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"fingerprint": 1}', '{"fingerprint": {}, "status": "x", "files": {}}']
)
def test_damaged_marker_is_named_and_can_be_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        RunFolder.open(tmp_path, FINGERPRINT)
    assert not RunFolder.open(tmp_path, FINGERPRINT, overwrite=True).already_done


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.open(tmp_path / "file", FINGERPRINT)


# --- nothing half-written --------------------------------------------------------------------------


def test_writer_that_fails_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunFolder.open(tmp_path, FINGERPRINT) as run:
        run.write_text("a.txt", "old")
        with run.replacing("a.txt") as temporary:
            temporary.write_text("half of the ne")
            raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert not temporary_files(tmp_path) and status(tmp_path) == "running"


def test_temporary_file_keeps_the_suffix_and_folder(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, FINGERPRINT) as run, run.replacing("sub/x.parquet") as temporary:
        assert temporary.suffix == ".parquet" and temporary.parent == tmp_path / "sub"
        temporary.touch()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf"), np.array([1.0, np.nan])])
def test_non_finite_numbers_are_refused_by_key(tmp_path: Path, value: object) -> None:
    with (
        pytest.raises(NumericError, match=r"result\.json\.ocr\.0\.rate"),
        RunFolder.open(tmp_path, FINGERPRINT) as run,
    ):
        run.write_json("result.json", {"ocr": [{"rate": value}]})
    assert not (tmp_path / "result.json").exists() and not temporary_files(tmp_path)


def test_json_takes_dataclasses_and_numpy_but_no_objects() -> None:
    @dataclass
    class Point:
        x: object

    assert json.loads(dumps(Point(np.arange(2)))) == {"x": [0, 1]}
    assert json.loads(dumps({"é": np.float64(0.5)})) == {"é": 0.5}
    with pytest.raises(TypeError, match="set"):
        dumps({"x": {1}})


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", ""])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with RunFolder.open(tmp_path / "out", FINGERPRINT) as run, pytest.raises(ConfigError, match="inside"):
        run.path(name)


def test_full_disk_is_a_disk_error_and_the_old_file_stays(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DiskError, match="disk is full"), RunFolder.open(tmp_path, FINGERPRINT) as run:
        run.write_text("a.txt", "old")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            run.write_text("a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and not temporary_files(tmp_path)


def test_full_disk_of_any_writer_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="disk is full"), RunFolder.open(tmp_path, FINGERPRINT):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folder_below_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DiskError, match="cannot write"),
        RunFolder.open(tmp_path / "file" / "out", FINGERPRINT),
    ):
        pass


def test_kill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """SIGKILL cleans nothing up: the next start does, and finds the last complete file."""
    code = (
        "import os, signal, sys\n"
        "from vfl_train.runs import RunFolder\n"
        f"with RunFolder.open(sys.argv[1], {FINGERPRINT!r}) as run:\n"
        "    run.write_text('a.txt', 'old')\n"
        "    with run.replacing('a.txt') as temporary:\n"
        "        temporary.write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL and temporary_files(tmp_path)
    with RunFolder.open(tmp_path, FINGERPRINT) as run:
        assert run.resumed and run.path("a.txt").read_text() == "old"
        assert not temporary_files(tmp_path)


# --- fingerprints --------------------------------------------------------------------------------


def test_fingerprint_holds_settings_and_hashes_but_no_paths(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    config = SelectConfig(
        profile="p.json", data=str(data), output=tmp_path, image_root=tmp_path, overwrite=True
    )
    found = fingerprint("select", config, {"data": "0" * 64, "profile": "1" * 64}, ("click",))
    assert str(tmp_path) not in json.dumps(found)
    assert found["options"]["budget"] == "0.2" and "overwrite" not in found["options"]
    assert set(found["versions"]) == {"vfl-train", "click"}
    moved = SelectConfig(profile="q.json", data="elsewhere.jsonl", output="other")
    assert fingerprint("select", moved, {"data": "0" * 64, "profile": "1" * 64}, ("click",)) == found
