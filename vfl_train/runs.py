"""Output folders: one run a folder, nothing half-written, finished work never done twice.

A folder that vfl-train writes carries `.vfl-run.json`: the fingerprint of the run (what its result depends
on), whether it is done, and the hash of every file. Files appear under their name only when complete:
they are written beside it, flushed to the disk and renamed.

Not covered: two processes writing the same folder at once.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from vfl_train import __version__
from vfl_train.errors import ConfigError, DiskError, NumericError
from vfl_train.fingerprints import allowed_keys, refuse_differences
from vfl_train.options import Config, specs

MARKER = ".vfl-run.json"
MANIFEST = "manifest.json"
_TEMPORARY = ".vfl-tmp-"
# Work in progress: in no manifest, and removed once the run is marked done.
CHECKPOINTS, SHARDS = "checkpoints", "shards"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# Settings that change how and where something is computed, not what.
_NOT_OF_THE_RESULT = (
    "output", "overwrite", "dry_run", "batch_tokens", "batch_size", "device", "allow_config_change",
    "save_steps", "save_total_limit", "dataloader_num_workers", "report_to", "num_processes", "ddp_timeout",
    "private",
)  # fmt: skip


class RunFolder:
    """An output folder in use. Open it with `RunFolder.open` in a `with` statement."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], state: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.already_done = state == "done"
        self.resumed = state == "running"

    @classmethod
    def open(
        cls,
        output: str | Path,
        fingerprint: Mapping[str, Any],
        overwrite: bool = False,
        allow_change: Sequence[str] | None = None,
    ) -> RunFolder:
        """Take `output` for a run with this fingerprint.

        Same fingerprint and finished: `already_done`, nothing will be written. Same fingerprint and not
        finished: `resumed`, complete files of the earlier attempt are still there. `overwrite` empties the
        folder first, if it is a run folder. The keys of the fingerprint in `allow_change` (in full,
        `options.learning_rate`, or their last part) may differ from those of an unfinished run; None: the
        command has no --allow-config-change.

        Raises:
            ConfigError: the folder holds another run (naming what differs), or files that are not ours, or
                `allow_change` names a key that the fingerprint has not.
            NumericError: a non-finite number in the fingerprint.
            DiskError: the folder cannot be made.
        """
        folder = Path(output)
        wanted = json.loads(dumps(dict(fingerprint), "fingerprint"))
        allowed = allowed_keys(wanted, allow_change or ())
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file", "give a folder to --output")
        if not folder.is_dir() or not any(folder.iterdir()):
            return cls(folder, wanted, "new")
        if overwrite:
            return cls(folder, wanted, _empty(folder))
        return cls(folder, wanted, _state(folder, wanted, allowed, allow_change is not None))

    def __enter__(self) -> Self:
        if self.already_done:
            self._remove_checkpoints()
        else:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_temporary()
            self._mark("running", {})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.already_done:
            return
        self._remove_temporary()
        if error is None:
            self._finish()
            self._remove_checkpoints()
        elif isinstance(error, OSError) and error.errno in _FULL:
            raise _disk_full(self.folder, error) from error

    def path(self, name: str) -> Path:
        """Where the file `name` of this run lies; its folder is made. For writers that are atomic
        themselves; others use `replacing`. Raises ConfigError if `name` leads out of the folder."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ConfigError(f"{name!r} is not a file name inside {self.folder}")
        path = self.folder.joinpath(*pure.parts)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A temporary path (same folder, same suffix) to write to; it becomes `name` when the block ends
        well and is removed when it does not. Raises DiskError."""
        path = self.path(name)
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
        try:
            with disk_errors(path):
                yield temporary
                flush_to_disk(temporary)
                os.replace(temporary, path)
                flush_to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> Path:
        """Write `text` as UTF-8, all or nothing. Raises DiskError."""
        return self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write `content`, all or nothing. Raises DiskError."""
        with self.replacing(name) as temporary:
            temporary.write_bytes(content)
        return self.path(name)

    def write_json(self, name: str, value: Any) -> Path:
        """Write `value` (plain types, dataclasses, numpy numbers and arrays) as JSON, all or nothing.

        Raises NumericError naming the key of a non-finite number, DiskError.
        """
        return self.write_text(name, dumps(value, name) + "\n")

    def _finish(self) -> None:
        hashes = {name: file_sha256(self.folder / name) for name in self._files()}
        sizes = {name: (self.folder / name).stat().st_size for name in hashes}
        self.write_json(MANIFEST, {"files": {n: {"sha256": hashes[n], "bytes": sizes[n]} for n in hashes}})
        # Last of all: with this file the run counts as finished.
        self._mark("done", {**hashes, MANIFEST: file_sha256(self.folder / MANIFEST)})

    def _mark(self, status: str, hashes: Mapping[str, str]) -> None:
        self.write_json(MARKER, {"fingerprint": self.fingerprint, "status": status, "files": hashes})

    def _remove_checkpoints(self) -> None:
        # Only after the mark "done": until then they are what a crash would be resumed from.
        for name in (CHECKPOINTS, SHARDS):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _files(self) -> list[str]:
        """Names of the run's files, sorted, without work in progress; a link counts if it leads to a file."""
        every = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        passing = (MARKER, MANIFEST)
        in_progress = (f"{CHECKPOINTS}/", f"{SHARDS}/")
        return sorted(n for n in every if n not in passing and not n.startswith(in_progress))

    def _remove_temporary(self) -> None:
        for path in self.folder.rglob(f"{_TEMPORARY}*"):
            path.unlink(missing_ok=True)


def is_done(folder: str | Path) -> bool:
    """Whether `folder` holds a finished run."""
    path = Path(folder) / MARKER
    return path.is_file() and _read_marker(Path(folder))["status"] == "done"


# --- fingerprints --------------------------------------------------------------------------------


def fingerprint(
    command: str, config: Config, inputs: Mapping[str, str], packages: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What the result of `command` depends on: its settings, its inputs, the versions that compute it.

    Args:
        inputs: name -> sha256 of every file or folder read. A setting of that name is left out, as are all
            that are paths: the same data in another place is the same data. Give a local model or adapter
            here too, or its name alone will stand for it.
        packages: distributions whose version changes the result, like "torch".
    """
    options = {
        name: getattr(config, name)
        for name, spec in specs(type(config)).items()
        if name not in _NOT_OF_THE_RESULT and name not in inputs and spec.kind is not Path
    }
    versions = {"vfl-train": __version__, **{name: metadata.version(name) for name in packages}}
    return {"command": command, "options": options, "inputs": dict(inputs), "versions": versions}


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dumps(value: Any, what: str = "value") -> str:
    """Indented JSON of `value`. Raises NumericError naming the key of a number that is not finite."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    where = _non_finite(json.loads(text), what)
    if where:
        raise NumericError(f"{where} is not a finite number", "nothing was written")
    return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _non_finite(value: Any, where: str) -> str:
    """Dotted path of the first number that is not finite, or nothing."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next(filter(None, (_non_finite(item, f"{where}.{key}") for key, item in items)), "")


# --- what is in a folder already -------------------------------------------------------------------


def _state(folder: Path, wanted: Mapping[str, Any], allowed: Collection[str], may_change: bool) -> str:
    """`running` or `done` of the run in `folder` if it is the wanted one (until done, but for the `allowed`
    keys; `may_change`: others could be), `new` if there is nothing of it but its marker. Raises
    ConfigError."""
    if not (folder / MARKER).is_file():
        raise ConfigError(
            f"{folder} is not empty and vfl-train did not write it", "give another folder to --output"
        )
    found = _read_marker(folder)
    if found["status"] == "running" and len(list(folder.iterdir())) == 1:
        return "new"  # a run that was refused or stopped before it wrote anything
    finished = found["status"] == "done"
    resumable = may_change and not finished
    refuse_differences(str(folder), found["fingerprint"], wanted, () if finished else allowed, resumable)
    if not finished:
        return "running"
    missing = [name for name in found["files"] if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{missing[0]} is gone from the finished run in {folder}", "--overwrite runs it again"
        )
    return "done"


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        ok = isinstance(found["fingerprint"], dict) and isinstance(found["files"], dict)
        ok = ok and found["status"] in ("running", "done")
    except (OSError, ValueError, KeyError, TypeError):
        ok = False
    if not ok:
        raise ConfigError(f"{folder / MARKER} is damaged", "--overwrite starts again")
    return dict(found)


def _empty(folder: Path) -> str:
    """Remove the old run in `folder`. Raises ConfigError for a folder that is not a run's."""
    if not (folder / MARKER).is_file():
        raise ConfigError(
            f"{folder} holds files that vfl-train did not write; --overwrite does not delete them",
            "give another folder to --output",
        )
    if Path.cwd().resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--overwrite would delete {folder}, the folder you are in", "run from outside it")
    # The marker goes last: a removal cut short leaves a folder that is still known as a run's.
    for path in sorted(folder.iterdir(), key=lambda p: p.name == MARKER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return "new"


# --- the disk --------------------------------------------------------------------------------------


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, from the cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises DiskError where the block, writing `path`, meets a full or closed disk."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise _disk_full(path, e) from e
        if e.errno in _CLOSED or isinstance(e, FileExistsError | NotADirectoryError):
            raise DiskError(f"cannot write {path}: {e.strerror}", "give another folder to --output") from e
        raise


def _disk_full(path: Path, error: OSError) -> DiskError:
    reason = "the disk is full" if error.errno != errno.EFBIG else "the file may not grow further (ulimit -f)"
    return DiskError(f"{reason}, {path} was not finished", "make room and run the same command again")
