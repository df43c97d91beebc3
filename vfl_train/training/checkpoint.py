"""Checkpoints on the disk: whole or not there, checked by hash, the newest good one found by looking.

    OUTPUT/checkpoints/step-000123/   the files of one checkpoint and MANIFEST.json
    OUTPUT/checkpoints/.tmp-123-4711  one that is being written (by process 4711) or taken away

A checkpoint is written under its temporary name: every file, flushed to the disk one by one, then the
manifest with size and sha256 of each, then the folder; only then is it renamed, and the parent flushed. So
a name `step-*` means a finished write, and the manifest proves that it is still what was written. There is
no pointer to the newest one that could itself be lost (reference: transformers#35782, DeepSpeed's `latest`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vfl_train.errors import DiskError, VerificationError
from vfl_train.runs import disk_errors, file_sha256, flush_to_disk

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".tmp-"
_PIECE = 16 << 20  # bytes a write call


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were all found as they were written."""

    folder: Path
    step: int
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, or None, and newer ones that were passed over: (name, reason)."""

    checkpoint: Checkpoint | None
    skipped: tuple[tuple[str, str], ...]


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint folder of an optimizer step."""
    return f"step-{step:06d}"


def save(
    root: Path, step: int, files: Mapping[str, bytes], fingerprint: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint, all or nothing. Once it has been read back, take away the oldest ones beyond `keep`
    and damaged ones of later steps. Returns its folder. A valid checkpoint of this step is left as it is.

    Args:
        files: names (relative, with "/") and contents.
        fingerprint: what the run depends on, compared at resume.

    Raises:
        DiskError: no room, or not writable; the staged folder is gone, earlier checkpoints are untouched.
        VerificationError: what came back from the disk is not what was written.
    """
    folder, staged = root / checkpoint_name(step), _temporary(root, step)
    with disk_errors(folder):
        root.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            if not problem(folder):
                return folder
            _remove(folder)
        try:
            _stage(staged, step, files, fingerprint)
            os.rename(staged, folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        flush_to_disk(root)
        wrong = problem(folder)
        if wrong:
            raise VerificationError(f"checkpoint {folder} was written, but {wrong}", "check the disk")
        for name in _superseded(root, folder.name, keep):
            _remove(root / name)
    return folder


def newest_valid(root: Path) -> Found:
    """The newest checkpoint under `root` whose manifest and files are whole; what was newer and is not."""
    skipped: list[tuple[str, str]] = []
    for name in _names(root):
        wrong = problem(root / name)
        if not wrong:
            return Found(read(root / name), tuple(skipped))
        skipped.append((name, wrong))
    return Found(None, tuple(skipped))


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, which `problem` has found whole."""
    manifest = _read_manifest(folder)
    return Checkpoint(folder, manifest["step"], manifest["fingerprint"])


def problem(folder: Path) -> str:
    """What is wrong with the checkpoint in `folder`, naming the file; nothing if it is whole."""
    try:
        manifest = _read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        reason = "is missing" if isinstance(e, FileNotFoundError) else "is damaged"
        return f"{MANIFEST} {reason}"
    if checkpoint_name(manifest["step"]) != folder.name:
        return f"{MANIFEST} is that of step {manifest['step']}"
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
        if file_sha256(path) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def clean(root: Path) -> None:
    """Remove what an interrupted save or removal left behind. Raises DiskError."""
    with disk_errors(root):
        for path in root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)


def require_room(root: Path, size: int, keep: int) -> None:
    """Raises DiskError unless the disk of `root` takes `keep` more checkpoints of `size` bytes, the one that
    is being written beside them, and 10 %."""
    root.mkdir(parents=True, exist_ok=True)
    old = sum(f.stat().st_size for name in _names(root) for f in (root / name).rglob("*") if f.is_file())
    needed, free = int(size * (keep + 1) * 1.1), shutil.disk_usage(root).free + old
    if free < needed:
        raise DiskError(
            f"{root} has room for {free / 1e6:.1f} MB, {keep} checkpoints need {needed / 1e6:.1f} MB",
            "make room, or give another folder to --output",
        )


def _stage(staged: Path, step: int, files: Mapping[str, bytes], fingerprint: Mapping[str, Any]) -> None:
    os.mkdir(staged)
    for name, content in files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or name == MANIFEST:
            raise ValueError(f"{name!r} is not a file name inside a checkpoint")
        path = staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)
    facts = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()}
    value = {"step": step, "files": facts, "fingerprint": fingerprint}
    manifest = json.dumps({**value, "sha256": _digest(value)}, indent=2, ensure_ascii=False)
    _write(staged / MANIFEST, manifest.encode("utf-8"))
    for folder in {path.parent for path in staged.rglob("*")}:
        flush_to_disk(folder)


def _write(path: Path, content: bytes) -> None:
    """Write a new file and flush it. os.write, not a buffer: what fails, fails here and in this file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest[:_PIECE]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises one of many errors if it is not what was written."""
    value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if value.pop("sha256") != _digest(value):
        raise ValueError("its own hash does not fit")
    return dict(value)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def _names(root: Path) -> Sequence[str]:
    """Names of the checkpoints under `root`, whole or not, the newest first."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), p.name) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [name for _, name in sorted(found, reverse=True)]


def _superseded(root: Path, newest: str, keep: int) -> list[str]:
    """The checkpoints beyond `keep` up to `newest`, and damaged ones of later steps: passed over when the run
    went on from an earlier one, they must not take the place of good ones."""
    names = _names(root)
    at = names.index(newest)
    return [*(name for name in names[:at] if problem(root / name)), *names[at + max(keep, 1) :]]


def _temporary(root: Path, step: int, suffix: str = "") -> Path:
    return root / f"{_TEMPORARY}{step}-{os.getpid()}{suffix}"


def _remove(folder: Path) -> None:
    # Renamed first: a removal cut short must not look like a checkpoint that lost some files.
    leaving = _temporary(folder.parent, int(folder.name.rsplit("-", 1)[1]), "-old")
    os.rename(folder, leaving)
    shutil.rmtree(leaving)
