"""Files and folders that appear under their name only when they are complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vfl_train.errors import DiskError


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file, all or nothing. Raises DiskError."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.writelines(chunks)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to write a file or a folder of files to; it takes the place of `path`,
    and of what was there, when the block ends well. Raises DiskError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            _to_disk(file)
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and run again" if full else "check --output"
        raise DiskError(f"{path} cannot be written: {error.strerror or error}", fix) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
