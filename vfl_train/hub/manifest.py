"""`manifest.json`: the sha256 of every file of a finished folder, and the check against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vfl_train.errors import VerificationError
from vfl_train.runs import MANIFEST, file_sha256
from vfl_train.schemas import read_json

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"sha256", "bytes"}} of a finished folder. Raises VerificationError if there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise VerificationError(
            f"{folder} has no {MANIFEST}", "it is no finished vfl-train output: run the command again"
        )
    value = read_json(path)
    files = value.get("files") if isinstance(value, dict) else None
    entries = files.items() if isinstance(files, dict) else ()
    if not files or any(not isinstance(v, dict) or "sha256" not in v for _, v in entries):
        raise VerificationError(f"{path} does not follow the manifest contract")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise VerificationError(f"{path} names a file outside the folder: {name}")
    return files


def verify_manifest(folder: Path) -> int:
    """Compare every listed file with its sha256.

    Returns:
        The number of files checked.

    Raises:
        VerificationError: naming the first file that is missing, cut short or changed, or that is pickled
            (other files that are not listed are let be: verification.json is one).
    """
    files = read_manifest(folder)
    for name, entry in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{name} is missing from {folder}", "make the folder again")
        size, bytes_ = path.stat().st_size, entry.get("bytes")
        if isinstance(bytes_, int) and size < bytes_:
            raise VerificationError(
                f"{name} in {folder} is cut short: {size} of {bytes_} bytes", "copy or make it again"
            )
        if file_sha256(path) != entry["sha256"]:
            raise VerificationError(f"{name} in {folder} was changed after it was written", "make it again")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in PICKLED:  # listed or not: no folder of ours holds one
            raise VerificationError(f"{name} in {folder} may hold code", "remove it")
    return len(files)
